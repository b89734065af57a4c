"""All sessions, in memory: what they may hold and run together, when they end, and how all of it stops.

A session with neither a connection nor a task is idle, and ends when it was idle for too long. Where all together
hold too much, those idle longest first keep nothing but their newest notification (a connection that comes back
is told of the gap), sessions in use keep nothing for replay, and what is new is refused. The same goes for those of
one token, which may hold half of what all may: so there is some left for the others.
"""

from __future__ import annotations

import logging
import secrets
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import attrs
import msgspec
import trio

from .access import Owner
from .errors import OverloadedError
from .outbox import BYTES_PER_BYTE_OF_JSON, RETRY_AFTER, Budget, Outbox
from .protocol import CreateSession, Draining
from .report import Census, Observer
from .runner import Model
from .running import RunnersEnding, RunningTasks
from .session import Attachment, Session
from .settings import Settings
from .task import TaskState

logger = logging.getLogger(__name__)

SERVICE_RESTART = 1012
"""WebSocket close code for a server that stops (IANA's registry of close codes)."""

CLOSING_TIME = 0.5
"""Seconds that cancelled tasks and closing connections are waited for when the server stops."""

_EXPIRY_INTERVAL = 1.0
"""Seconds at the least between two looks for expired sessions."""

_SESSION_BYTES = 4096
"""What a session without tools or notifications takes."""


def _budget(store: SessionStore) -> Budget:
    return Budget(store.settings.memory_bytes, store.make_room)


@attrs.define(eq=False)
class SessionStore:
    """``nursery`` is where tasks run: it outlives every connection."""

    settings: Settings
    model: Model
    nursery: trio.Nursery
    observers: Sequence[Observer] = ()
    budget: Budget = attrs.field(default=attrs.Factory(_budget, takes_self=True))
    running: int = 0
    """Tasks running now."""
    drains_until: float | None = None
    """When the tasks that still run are cancelled, on Trio's clock, once the server is stopping."""

    _budgets: dict[Owner, Budget] = attrs.field(factory=dict)
    """Of those that have a token."""
    _sessions: dict[str, Session] = attrs.field(factory=dict)
    _idle: OrderedDict[str, Session] = attrs.field(factory=OrderedDict)
    """Those longest idle first."""
    _replayable: defaultdict[Owner, OrderedDict[str, Session]] = attrs.field(factory=lambda: defaultdict(OrderedDict))
    """Of the idle ones, those that were not made to give up what they kept, in the same order."""

    def __len__(self) -> int:
        return len(self._sessions)

    async def create(self, params: CreateSession, owner: Owner) -> Session:
        """Raises OverloadedError where there are too many sessions."""
        self.refuse_when_draining()
        self._end_expired()
        _check_count("sessions", owner.sessions, owner.max_sessions, "of this token")
        _check_count("sessions", len(self), self.settings.max_sessions, "on the server")
        owner.spend_request(trio.current_time())
        tools = [tool.to_openai() for tool in params.tools or ()]
        session = Session(
            id=secrets.token_urlsafe(24),
            owner=owner,
            tools=tools,
            resume_window=resume_window(self.settings, params),
            size=_SESSION_BYTES + BYTES_PER_BYTE_OF_JSON * len(msgspec.json.encode(tools)),
            store=self,
            outbox=Outbox(self.settings.outbox_bytes, self.budget_of(owner)),
        )
        session.budget.hold(session.size)
        owner.sessions += 1
        self._sessions[session.id] = session
        self.touch(session)
        return session

    async def get(self, session_id: str) -> Session | None:
        """The session, if there is one that has not expired. Asking for it counts as use."""
        self._end_expired()
        session = self._sessions.get(session_id)
        if session:
            self.touch(session)
        return session

    def touch(self, session: Session) -> None:
        """The session was in use until now."""
        session.last_used = trio.current_time()
        for sessions in (self._idle, self._replayable[session.owner]):
            sessions.pop(session.id, None)
            if session.is_idle:
                sessions[session.id] = session

    async def spend_request(self, owner: Owner) -> None:
        """Raises OverloadedError where the owner asks for too much in a minute."""
        owner.spend_request(trio.current_time())

    def admit_task(self, session: Session, size: int) -> None:
        """Counts one more task that holds ``size`` bytes. Raises OverloadedError where it would be too many."""
        self.refuse_when_draining()
        owner, settings = session.owner, self.settings
        _check_count("tasks", len(session.runners), settings.max_tasks_per_session, "in this session")
        _check_count("tasks", owner.running, owner.max_tasks, "of this token")
        _check_count("tasks", self.running, settings.max_tasks, "on the server")
        owner.spend_request(trio.current_time())
        session.budget.hold(size)
        owner.running += 1
        self.running += 1

    def dismiss_task(self, session: Session, size: int) -> None:
        """The task has ended."""
        session.budget.release(size)
        session.owner.running -= 1
        self.running -= 1
        self.touch(session)

    def budget_of(self, owner: Owner) -> Budget:
        if owner.name is None:
            return self.budget
        if owner not in self._budgets:
            make_room = partial(self.make_room, owner)
            self._budgets[owner] = Budget(self.budget.limit // 2, make_room, whole=self.budget)
        return self._budgets[owner]

    def make_room(self, owner: Owner | None = None) -> None:
        """Brings what all sessions hold, or the owner's, within the limit, but takes nothing from those in use."""
        budget = self.budget_of(owner) if owner else self.budget
        candidates = [self._replayable[owner]] if owner else list(self._replayable.values())
        while budget.used > budget.limit and (candidates := [sessions for sessions in candidates if sessions]):
            longest_idle = min(candidates, key=lambda sessions: next(iter(sessions.values())).last_used)
            longest_idle.popitem(last=False)[1].outbox.shrink()

    async def watch_expiry(self) -> None:
        """Ends sessions as they expire, also where nobody asks for any; for ever."""
        ttl = self.settings.session_ttl
        while True:
            oldest = next(iter(self._idle.values()), None)
            expires = (oldest.last_used if oldest else trio.current_time()) + ttl
            await trio.sleep_until(max(expires, trio.current_time() + _EXPIRY_INTERVAL))
            self._end_expired()

    def _end_expired(self) -> None:
        expired = trio.current_time() - self.settings.session_ttl
        while self._idle and (oldest := next(iter(self._idle.values()))).last_used <= expired:
            self._end(oldest)

    def _end(self, session: Session) -> None:
        del self._sessions[session.id], self._idle[session.id]
        self._replayable[session.owner].pop(session.id, None)
        session.owner.sessions -= 1
        session.budget.release(session.size + session.outbox.size)

    def census(self) -> Census:
        sessions = list(self._sessions.values())
        outbox_bytes = sum(session.outbox.size for session in sessions)
        return census_of(sessions, len(sessions), outbox_bytes, self.budget.used)

    async def drain(self) -> None:
        """Stops: refuses sessions and tasks, lets the running ones end in time, cancels the rest, and closes.

        Returns in the time that the settings give, and at most twice `CLOSING_TIME` more.
        """
        limit = self.settings.drain_seconds
        self.drains_until = trio.current_time() + limit
        cut = await wind_down(lambda: list(self._sessions.values()), limit)
        if cut:
            logger.warning("connections that had not taken all that was sent, and are cut now: %d", cut)
        if lost := sum(session.outbox.unsent_ends for session in self._sessions.values()):
            logger.warning("tasks whose end no client has fetched, and which is lost now: %d", lost)

    def refuse_when_draining(self) -> None:
        """Raises OverloadedError where the server is stopping."""
        refuse_when_draining(self.drains_until)

    def check_ready(self) -> None:
        """Raises OverloadedError where new clients had better go elsewhere."""
        self.refuse_when_draining()


def refuse_when_draining(until: float | None) -> None:
    if until is not None:
        left = max(until - trio.current_time(), RETRY_AFTER)
        raise OverloadedError("The server is stopping", retry_after=left)


class InUse(Protocol):
    """What is needed of a session to count and to stop it."""

    tasks: RunningTasks

    @property
    def attached(self) -> Attachment | None: ...

    async def settle(self) -> None:
        """Returns when what the tasks here have told is where a connection takes it."""


async def wind_down(sessions: Callable[[], Sequence[InUse]], limit: float, *, are_elsewhere: bool = False) -> int:
    """Lets the tasks end within ``limit`` seconds, cancels the rest, and closes the connections.

    A connection is closed when it has sent all there is; for that, too, there is time up to the limit. Returns how
    many have not come to that. Where the sessions are elsewhere as well, a connection is closed as soon as none of its
    session's tasks is left here.
    """
    deadline = trio.current_time() + limit
    for connection in _connections(sessions()):
        connection.tell(Draining(limit))
    async with trio.open_nursery() as nursery:
        for session in sessions() if are_elsewhere else ():
            nursery.start_soon(_send_elsewhere, session)
        await _wait_for_tasks(sessions, limit)
        nursery.cancel_scope.cancel()
    for session in sessions():
        session.tasks.cancel()
    await _wait_for_tasks(sessions, CLOSING_TIME)
    with trio.move_on_at(max(deadline, trio.current_time()) + CLOSING_TIME):
        for connection in _close_all(sessions()):
            await connection.closed.wait()
    return len(_close_all(sessions()))  # with those that came meanwhile


async def _wait_for_tasks(sessions: Callable[[], Sequence[InUse]], limit: float) -> None:
    with trio.move_on_after(limit):
        for session in sessions():
            await _wait_for(session)


async def _wait_for(session: InUse) -> None:
    await RunnersEnding(list(session.tasks.runners.values())).ended()
    await session.settle()


async def _send_elsewhere(session: InUse) -> None:
    await _wait_for(session)
    if session.attached:
        session.attached.close(SERVICE_RESTART)


def census_of(sessions: Sequence[InUse], kept: int, outbox_bytes: int, held_bytes: int) -> Census:
    tasks = dict.fromkeys((TaskState.STREAMING, TaskState.AWAITING_TOOLS), 0)
    for runner in (runner for session in sessions for runner in session.tasks.runners.values()):
        if runner.task.state in tasks:  # it may have ended just now
            tasks[runner.task.state] += 1
    return Census(
        sessions=kept,
        connections=len(_connections(sessions)),
        tasks=tasks,
        outbox_bytes=outbox_bytes,
        held_bytes=held_bytes,
    )


def _connections(sessions: Sequence[InUse]) -> list[Attachment]:
    return [session.attached for session in sessions if session.attached]


def _close_all(sessions: Sequence[InUse]) -> list[Attachment]:
    connections = _connections(sessions)
    for connection in connections:
        connection.close(SERVICE_RESTART)
    return connections


def resume_window(settings: Settings, params: CreateSession) -> float:
    """The server's own (seconds), or less where less is asked for."""
    own = settings.resume_window
    return own if params.resume_window is None else min(own, params.resume_window)


def too_many(what: str, limit: int, where: str) -> OverloadedError:
    return OverloadedError(f"There are too many {what} {where}: {limit} at the most", retry_after=RETRY_AFTER)


def _check_count(what: str, count: int, limit: int | None, where: str) -> None:
    if limit is not None and count >= limit:
        raise too_many(what, limit, where)
