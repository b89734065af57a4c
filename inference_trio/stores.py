"""Where sessions are kept: in memory, or in Redis, as the settings say."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol

import trio

from . import connection
from .access import Access, Owner
from .errors import ConfigurationError
from .protocol import CreateSession
from .report import Census, Observer
from .runner import Model
from .session import Attachment
from .settings import Settings
from .store import SessionStore


class Session(connection.Session, Protocol):
    """What the routes need of a session, beside what a connection does; see `session.Session`."""

    @property
    def owner(self) -> Owner: ...

    async def issue_ticket(self) -> str: ...

    async def redeem(self, text: str) -> bool: ...

    async def attach(self, connection: Attachment, after: int | None) -> None: ...


class Store(Protocol):
    """All sessions; see `store.SessionStore`."""

    async def create(self, params: CreateSession, owner: Owner) -> Session: ...

    async def get(self, session_id: str) -> Session | None: ...

    async def spend_request(self, owner: Owner) -> None: ...

    def check_ready(self) -> None: ...

    def census(self) -> Census: ...

    async def drain(self) -> None: ...


def open_store(
    settings: Settings, model: Model, nursery: trio.Nursery, access: Access, observers: Sequence[Observer]
) -> AbstractAsyncContextManager[Store]:
    """The store that the settings name, for as long as the context lasts; ``nursery`` outlives every connection."""
    if settings.is_in_memory:
        return _in_memory(settings, model, nursery, observers)
    opened: Any = _redis().open_redis_store(settings, model, access.owner_named, observers)
    return opened  # type: ignore[no-any-return]


def check_store(settings: Settings) -> None:
    """Raises ConfigurationError where a package that the store needs is not there."""
    if not settings.is_in_memory:
        _redis()


@asynccontextmanager
async def _in_memory(
    settings: Settings, model: Model, nursery: trio.Nursery, observers: Sequence[Observer]
) -> AsyncIterator[Store]:
    store = SessionStore(settings, model, nursery, observers)
    async with trio.open_nursery() as own_nursery:
        own_nursery.start_soon(store.watch_expiry)
        yield store
        own_nursery.cancel_scope.cancel()


def _redis() -> Any:
    try:
        from . import redis_store
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"INFERENCE_STORE: {error.name} is not installed: pip install 'inference-trio[redis]'"
        ) from error
    return redis_store
