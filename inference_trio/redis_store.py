"""All sessions, in Redis: for many workers on many hosts. What `store.SessionStore` is for memory."""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import attrs
import msgspec
import trio

from .access import Owner
from .errors import OverloadedError
from .outbox import Budget
from .protocol import CreateSession
from .redis_limits import Limits, name_of
from .redis_link import PATIENCE, RETRY_AFTER, Link, open_link
from .redis_session import RedisSession
from .redis_worker import Worker
from .report import Census, Observer
from .runner import Model
from .settings import Settings
from .store import CLOSING_TIME, census_of, refuse_when_draining, resume_window, wind_down

SOON = 1.0
"""Seconds after which a client may try again that was sent to another server, where there is none."""

logger = logging.getLogger(__name__)


@attrs.define(eq=False)
class RedisStore:
    """``owner_named`` gives the owner of a name, where there still is one."""

    settings: Settings
    model: Model
    owner_named: Callable[[str], Owner | None]
    link: Link
    observers: Sequence[Observer] = ()
    limits: Limits = attrs.field(
        default=attrs.Factory(lambda self: Limits(self.settings, Budget(self.settings.memory_bytes)), takes_self=True)
    )
    drains_until: float | None = None
    is_ready: trio.Event = attrs.field(factory=trio.Event)
    """Set when Redis was there for the first time."""
    _worker: Worker | None = None
    _seen: int = 0

    @property
    def worker(self) -> Worker:
        """This life in Redis. Raises OverloadedError where there is none."""
        if self._worker is None:
            raise OverloadedError("The store of the sessions does not answer", retry_after=RETRY_AFTER)
        return self._worker

    async def run(self) -> None:
        """Lives in Redis, one life after another."""
        while True:
            async with trio.open_nursery() as nursery:
                worker = Worker(self.link, int(self.settings.session_ttl * 1000), self._seen, nursery, self._tell_loss)
                await worker.join()
                self._worker = worker
                self.is_ready.set()
                try:
                    await worker.live()
                finally:
                    self._end(worker)
                if self.drains_until is not None:
                    return
                logger.warning("the lease is lost: connections are closed, tasks are stopped")
                nursery.cancel_scope.cancel()

    def _end(self, worker: Worker) -> None:
        self._worker = None
        self._seen = worker.seen
        worker.is_over = True
        for session in self._in_use(worker):
            session.end()

    def _tell_loss(self, model: str) -> None:
        for observer in self.observers:
            observer.task_lost(model)

    def _in_use(self, worker: Worker) -> list[RedisSession]:
        return [session for session in worker.in_use() if isinstance(session, RedisSession)]

    async def create(self, params: CreateSession, owner: Owner) -> RedisSession:
        self.refuse_when_draining()
        worker, session_id = self.worker, secrets.token_urlsafe(24)
        await self.limits.enter(worker, session_id, owner)
        tools = [tool.to_openai() for tool in params.tools or ()]
        window = resume_window(self.settings, params)
        terms = (msgspec.json.encode(tools), name_of(owner), window)
        await worker.link.run("create", worker.session_key(session_id), worker.ttl, *terms)
        return self._resident(RedisSession(session_id, owner, tools, window, worker, self))

    async def get(self, session_id: str) -> RedisSession | None:
        self.send_elsewhere_when_draining()
        worker = self.worker
        if not re.fullmatch(r"[\w-]{32}", session_id, re.ASCII):  # as `create` makes them; braces would mean something
            return None
        tools, name, window = await worker.link.run("load", worker.session_key(session_id), worker.ttl)
        if name is None:
            await worker.check_era()
        owner = self.owner_named(name.decode()) if name is not None else None
        if owner is None:
            return None
        known = worker.sessions.get(session_id)
        if isinstance(known, RedisSession):
            return known
        return self._resident(RedisSession(session_id, owner, msgspec.json.decode(tools), float(window), worker, self))

    def _resident(self, session: RedisSession) -> RedisSession:
        session.worker.sessions[session.id] = session
        return session

    async def spend_request(self, owner: Owner) -> None:
        await self.limits.spend(self.worker, owner)

    def refuse_when_draining(self) -> None:
        """Raises OverloadedError where the server is stopping."""
        refuse_when_draining(self.drains_until)

    def send_elsewhere_when_draining(self) -> None:
        """The same, for what any other server has as well: nobody has to wait until this one is back."""
        if self.drains_until is not None:
            raise OverloadedError("The server is stopping, and another one has the session", retry_after=SOON)

    def check_ready(self) -> None:
        """Raises OverloadedError where the server is stopping, or Redis is away."""
        self.refuse_when_draining()
        if self.link.is_away:
            raise OverloadedError("The store of the sessions does not answer", retry_after=RETRY_AFTER)

    def census(self) -> Census:
        """What this process has. Of sessions and notifications, those that are in use here."""
        sessions = self._in_use(self._worker) if self._worker else []
        pending = sum(session.producer.size for session in sessions)
        return census_of(sessions, len(sessions), pending, self.limits.budget.used)

    async def drain(self) -> None:
        limit = self.settings.drain_seconds
        self.drains_until = trio.current_time() + limit
        worker = self._worker
        if worker is None:
            return

        await wind_down(lambda: self._in_use(worker), limit, are_elsewhere=True)
        with trio.move_on_after(CLOSING_TIME):  # else its lease runs out, and others end what is left
            await worker.leave()


@asynccontextmanager
async def open_redis_store(
    settings: Settings,
    model: Model,
    owner_named: Callable[[str], Owner | None],
    observers: Sequence[Observer] = (),
) -> AsyncIterator[RedisStore]:
    """The store, when Redis is there, or was waited for long enough: it is ready as soon as Redis is."""
    async with open_link(settings.store.reveal()) as link, trio.open_nursery() as nursery:
        store = RedisStore(settings, model, owner_named, link, observers)
        nursery.start_soon(store.run)
        with trio.move_on_after(PATIENCE):
            await store.is_ready.wait()
        yield store
        nursery.cancel_scope.cancel()
