"""The chat model: what the rest of the server knows of LangChain and the providers.

A model's own code blocks, so it runs apart (`bridge`), where also what it raises becomes an exception of ours.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Protocol

import attrs
import trio

from .bridge import stream_blocking
from .deltas import Delta, mended
from .messages import ModelRequest
from .openai_model import open_openai
from .providers import open_provider
from .settings import Settings
from .upstream_errors import translated
from .variables import SHORTEST_KEY


class Source(Protocol):
    """Where deltas come from."""

    def needs_thread(self) -> bool:
        """Whether `deltas` may block in something else than `wait_for`."""

    def deltas(self, request: ModelRequest) -> Iterator[Delta]:
        """What one call of the model gives, with surrogates as they came. Blocks."""

    async def aclose(self) -> None: ...


@attrs.frozen
class ChatModel:
    """``name`` is that of the configured model. ``secrets`` are kept out of what errors say."""

    name: str
    _source: Source
    _limiter: trio.CapacityLimiter
    _secrets: tuple[str, ...] = ()

    async def stream(self, request: ModelRequest, receive: Callable[[Delta], Awaitable[None]]) -> None:
        """Call the model and await ``receive`` with each delta.

        Raises, for whatever the provider did, an InferenceError that says whether another attempt makes sense;
        InvalidParamsError for a parameter that the provider does not take. Cancelling it closes the request.
        """
        threads = self._limiter if self._source.needs_thread() else None
        await stream_blocking(partial(self._deltas, request), receive, threads=threads)

    async def aclose(self) -> None:
        """Close the connections to the provider."""
        await self._source.aclose()

    def _deltas(self, request: ModelRequest) -> Iterator[Delta]:
        has_begun = False
        try:
            for delta in mended(self._source.deltas(request)):
                has_begun = True
                yield delta
        except Exception as error:
            ours = translated(error, has_begun=has_begun, secrets=self._secrets)
            if ours is error:
                raise
            raise ours from error


def build_model(settings: Settings) -> ChatModel:
    """The model that ``settings`` name, not connected yet.

    Raises ConfigurationError where there is no such provider, or a package for it is missing.
    """
    keys = [settings.api_key.reveal()] if settings.api_key else []
    open_source = open_openai if settings.provider in ("openai", "local") else open_provider
    return ChatModel(
        name=settings.model_name,
        source=open_source(settings),
        limiter=trio.CapacityLimiter(settings.max_tasks),
        secrets=tuple(key for key in keys if len(key) >= SHORTEST_KEY),
    )
