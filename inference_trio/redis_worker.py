"""A worker's life in Redis: its lease, its inbox, and the end of what other workers left behind.

A life ends when its lease is lost, or when Redis was away for too long; the next one begins with nothing.
"""

from __future__ import annotations

import logging
import secrets
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any, Protocol
from weakref import WeakValueDictionary

import attrs
import msgspec
import trio

from .errors import BrokenStreamError, InferenceError, OverloadedError
from .protocol import Error
from .redis_delivery import encoded
from .redis_link import FOREVER, RETRY_AFTER, AwayError, Link, Value
from .redis_scripts import ROOT, inbox_key, key_for_all, session_key
from .running import RunningTasks

LEASE = 5.0
"""Seconds for which a worker counts as alive after it has renewed its lease."""

INTERVAL = 1.0
"""Seconds between two renewals."""

LEAVING_INTERVAL = 0.05
"""Seconds between two attempts to leave."""

GRACE = 3.0
"""Seconds: where nobody renewed for longer, it was Redis that was away, and no lease has run out."""

LONGEST_ABSENCE = 30.0
"""Seconds for which tasks and connections wait for Redis."""

OVERHEAD = 160
"""Bytes for the envelope of a notification (as in `outbox`)."""

REMEMBERED = 10_000
"""Messages whose ids are remembered, so that a copy of one is not taken twice."""

logger = logging.getLogger(__name__)

Message = list[Any]
"""A kind, a session's id, and what the kind needs."""


class Resident(Protocol):
    """What a worker needs of a session that is in use here."""

    tasks: RunningTasks

    @property
    def id(self) -> str: ...

    @property
    def owner_name(self) -> str: ...

    @property
    def is_idle(self) -> bool: ...

    def receive(self, message: Message) -> None:
        """A message of another worker, or of this one. Does not wait."""


@attrs.define(eq=False)
class Worker:
    """``seen`` is the highest count of renewals that this process has seen; ``ttl`` (ms) is that of sessions.

    ``on_loss`` is called for each task of another worker that this one has ended, with the name of its model.
    """

    link: Link
    ttl: int
    seen: int
    nursery: trio.Nursery
    on_loss: Callable[[str], None] = lambda _: None
    id: str = attrs.field(factory=lambda: secrets.token_hex(6))
    era: str = ""
    is_over: bool = False
    is_behind: bool = False
    """Whether Redis was found to have less than it had: then another era has to begin."""
    sessions: WeakValueDictionary[str, Resident] = attrs.field(factory=WeakValueDictionary)
    _numbers: int = 0
    _renewed_at: float = attrs.field(factory=trio.current_time)
    _read: str = "0-0"
    _outgoing: dict[str, list[bytes]] = attrs.field(factory=lambda: defaultdict(list))
    _has_outgoing: trio.Event = attrs.field(factory=trio.Event)
    _known: OrderedDict[str, None] = attrs.field(factory=OrderedDict)
    _burying: set[str] = attrs.field(factory=set)

    @property
    def for_all(self) -> str:
        return key_for_all(self.era)

    def session_key(self, session_id: str) -> str:
        return session_key(self.era, session_id)

    def new_number(self) -> int:
        """Numbers that grow as long as this life lasts."""
        self._numbers += 1
        return self._numbers

    def new_connection(self) -> str:
        return f"{self.id}:{self.new_number()}"

    def in_use(self) -> list[Resident]:
        return [session for session in list(self.sessions.values()) if not session.is_idle]

    # The lease

    async def join(self) -> None:
        """Begins this life, as soon as Redis is there."""
        while not self.era:
            try:
                await self._renew()
            except AwayError:
                await trio.sleep(INTERVAL)

    async def live(self) -> None:
        """Returns when this life is over."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read_inbox)
            nursery.start_soon(self._send)
            nursery.start_soon(self._prolong)
            while await self._keep_lease():  # noqa: ASYNC110 (Redis sets no event)
                await trio.sleep(INTERVAL)
            nursery.cancel_scope.cancel()

    async def leave(self) -> None:
        """Ends this life in good order, as soon as Redis knows of nothing that it has any more."""
        while not await self.link.run("bury", self.for_all, self.id, 1):  # noqa: ASYNC110 (Redis sets no event)
            await trio.sleep(LEAVING_INTERVAL)

    def check(self) -> None:
        """Raises OverloadedError where this life is over: it may have ended during a call."""
        if self.is_over:
            raise OverloadedError("The server has lost what it had", retry_after=RETRY_AFTER)

    async def check_era(self) -> None:
        """Raises OverloadedError where a new era has begun: then what is not here may well be there."""
        if await self.link.run("era", ROOT) != self.era.encode():
            raise OverloadedError("The store of the sessions begins anew", retry_after=RETRY_AFTER)

    async def _keep_lease(self) -> bool:
        try:
            expired = await self._renew()
        except AwayError:
            return trio.current_time() - self._renewed_at < LONGEST_ABSENCE
        if expired is None:
            return False
        for worker in set(expired) - self._burying:
            self._burying.add(worker)
            self.nursery.start_soon(self._bury, worker)
        return True

    async def _renew(self) -> list[str] | None:
        """Workers whose lease has run out; ``None`` where this one's has. Raises AwayError."""
        terms = (int(LEASE * 1000), int(GRACE * 1000), self.era, self.seen, secrets.token_hex(4), int(self.is_behind))
        era, *rest = await self.link.probe("renew", ROOT, self.id, *terms)
        if not rest:
            return None
        self.link.is_back()
        self.era, self.seen, self._renewed_at = era.decode(), rest[0], trio.current_time()
        return [worker.decode() for worker in rest[1]]

    async def _prolong(self) -> None:
        """Keeps sessions in use from expiring."""
        while True:
            await trio.sleep(self.ttl / 3000)
            sessions = self.in_use()
            for session in sessions:
                await self.link.run("load", self.session_key(session.id), self.ttl, within=FOREVER)
            names = [name for session in sessions for name in (session.id, session.owner_name)]
            await self.link.run("prolong", self.for_all, self.ttl, *names, within=FOREVER)

    # The end of another worker

    async def _bury(self, worker: str) -> None:
        """Ends what a lost worker has left behind. Others may be at it as well, or have stopped midway."""
        logger.warning("worker %s is lost", worker)
        held = await self.link.run("held", self.for_all, worker, within=FOREVER)
        for name, value in zip(held[::2], held[1::2], strict=True):
            if b":" in name:
                await self.release(worker, name.decode(), value.decode())
            else:
                await self._fail(worker, name.decode(), *value.decode().split(" ", 2))
        await self.link.run("bury", self.for_all, worker, 0, within=FOREVER)
        self._burying.discard(worker)

    async def _fail(self, worker: str, task_id: str, session_id: str, owner: str, model: str) -> None:
        error = BrokenStreamError("The worker that ran this task is gone", reason="worker lost")
        if await self.end_task("fail", session_id, worker, task_id, error):
            self.on_loss(model)
        await self.link.run("dismiss", self.for_all, worker, task_id, owner, within=FOREVER)

    async def end_task(self, name: str, session_id: str, of: Value, task_id: str, error: InferenceError) -> bool:
        """Removes a task that does not run, by this script, and has its connection told of the error.

        Whether `fail` says that it was this worker that has ended it.
        """
        note = encoded(Error(task_id=task_id, error=error.to_wire()))
        key = self.session_key(session_id)
        reply = await self.link.run(name, key, self.ttl, of, task_id, note, OVERHEAD, self.id, within=FOREVER)
        if reply[0] == b"ok" and reply[1]:
            self.tell(reply[1].decode(), ["look", session_id])
        return bool(reply[2:] == [1])

    async def release(
        self, worker: str, connection: str, session_id: str, taken: int | str = "", owner: str = ""
    ) -> None:
        """The connection is gone: its session is detached, unless another connection has it."""
        key = self.session_key(session_id)
        reply = await self.link.run("detach", key, self.ttl, connection, taken, within=FOREVER)
        if reply[0] == b"ok":
            _, epoch, others, version, unsent = reply
            for other in others:
                self.post(other.decode(), ["detached", session_id, epoch, version, unsent])
        held = (worker, connection, "0", session_id, owner, self.ttl)
        await self.link.run("hold", self.for_all, *held, within=FOREVER)

    # Messages

    def tell(self, connection: str, message: Message) -> None:
        """Sends a message to the worker that has this connection."""
        self.post(connection.partition(":")[0], message)

    def post(self, worker: str, message: Message) -> None:
        """Sends a message to a worker. To this one it is there at once."""
        if worker == self.id:
            self._receive(message)
        else:
            self._outgoing[worker].append(msgspec.json.encode([secrets.token_hex(8), message]))
            self._has_outgoing.set()

    async def _send(self) -> None:
        while True:
            await self._has_outgoing.wait()
            self._has_outgoing = trio.Event()
            outgoing, self._outgoing = self._outgoing, defaultdict(list)
            for worker, messages in outgoing.items():
                await self.link.run("post", inbox_key(self.era, worker), *messages, within=FOREVER)

    async def _read_inbox(self) -> None:
        inbox = inbox_key(self.era, self.id)
        while True:
            try:
                messages = await self.link.messages(inbox, self._read, INTERVAL)
            except AwayError:
                await trio.sleep(INTERVAL)
                continue
            for self._read, data in messages:
                message_id, message = msgspec.json.decode(data)
                if self._is_new(message_id):
                    self._receive(message)
            if messages:
                await self.link.run("empty", inbox, self._read, within=FOREVER)

    def _is_new(self, message_id: str) -> bool:
        is_new = message_id not in self._known
        self._known[message_id] = None
        if len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return is_new

    def _receive(self, message: Message) -> None:
        session = self.sessions.get(message[1])
        if session:
            session.receive(message)
