"""The chat model: what the rest of the server knows of LangChain and the providers.

A model's own code blocks, so `stream_in_thread` runs it; what it raises becomes an exception of ours there.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Protocol

import attrs
import trio
from langchain_core.tracers.langchain import wait_for_all_tracers

from .bridge import stream_in_thread
from .deltas import Delta, mended
from .messages import ModelRequest
from .openai_model import open_openai
from .providers import open_provider
from .settings import Settings
from .upstream_errors import translated
from .variables import SHORTEST_KEY


class Source(Protocol):
    """Where deltas come from."""

    def deltas(self, request: ModelRequest) -> Iterator[Delta | None]:
        """What one call of the model gives, with surrogates as they came. For `stream_in_thread`."""

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
        await stream_in_thread(partial(self._deltas, request), receive, limiter=self._limiter)

    async def aclose(self) -> None:
        """Close the connections to the provider, and let LangSmith have what its client has not sent yet."""
        await self._source.aclose()
        await trio.to_thread.run_sync(wait_for_all_tracers, abandon_on_cancel=True)

    def _deltas(self, request: ModelRequest) -> Iterator[Delta | None]:
        has_begun = False
        try:
            for delta in mended(self._source.deltas(request)):
                has_begun = has_begun or delta is not None
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
