"""A session that is kept in Redis, as one worker sees it that has its connection, or runs tasks of it, or both.

See `redis_scripts` for how all of it works together, and `session.Session` for what the methods do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import attrs
import msgspec
import trio

from .access import TICKET_LIFETIME, Owner, Ticket, digest
from .chat import JsonObject
from .errors import InvalidParamsError, NoSuchSessionError, OverloadedError
from .jsonrpc import Call
from .outbox import BYTES_PER_BYTE_OF_JSON, RETRY_AFTER
from .protocol import Accepted, Generate, Resumed, Started, TaskStatus, ToolResult
from .redis_calls import Calls, Ending, taken_over
from .redis_delivery import Delivery, Ready, ready
from .redis_limits import Limits, name_of
from .redis_link import FOREVER, PATIENCE
from .redis_producer import Appended, Producer, Room
from .redis_worker import Message, Worker
from .report import Observer
from .runner import Model, Runner
from .running import RunningTasks
from .session import TAKEN_OVER, Attachment
from .settings import Settings
from .store import SERVICE_RESTART, too_many


class Store(Protocol):
    """What a session needs of the store of this process."""

    settings: Settings
    model: Model
    limits: Limits
    observers: Sequence[Observer]

    def refuse_when_draining(self) -> None: ...

    def send_elsewhere_when_draining(self) -> None: ...


@attrs.define(eq=False)
class Attached:
    """A connection under its name in Redis, and what it is to be sent."""

    name: str
    epoch: int
    connection: Attachment
    delivery: Delivery
    feeding: trio.CancelScope = attrs.field(factory=trio.CancelScope)


@attrs.define(eq=False)
class RedisSession:
    id: str
    owner: Owner
    tools: Sequence[JsonObject]
    resume_window: float
    worker: Worker
    store: Store
    producer: Producer = attrs.field(init=False)
    tasks: RunningTasks = attrs.field(init=False)
    calls: Calls = attrs.field(init=False)
    _here: Attached | None = None
    _epoch: int = 0

    def __attrs_post_init__(self) -> None:
        store, worker = self.store, self.worker
        settings, limit = store.settings, store.settings.outbox_bytes
        self.producer = Producer(worker, self.id, limit, store.limits.budget, Room(limit // 2), self.appended)
        terms = (self.id, self.owner.name, settings, store.model, worker.nursery, self.producer, store.observers)
        self.tasks = RunningTasks(*terms)
        self.calls = Calls(worker, self.id, self.tasks, self.producer)

    @property
    def key(self) -> str:
        return self.worker.session_key(self.id)

    @property
    def owner_name(self) -> str:
        return name_of(self.owner)

    @property
    def attached(self) -> Attachment | None:
        return self._here.connection if self._here else None

    @property
    def is_idle(self) -> bool:
        return self._here is None and not self.tasks.runners

    async def _run(self, name: str, *arguments: Any, within: float = PATIENCE) -> Any:
        """Runs a script of the session that renews its time to live."""
        return await self.worker.link.run(name, self.key, self.worker.ttl, *arguments, within=within)

    # Tickets

    async def issue_ticket(self) -> str:
        text, ticket = Ticket.issue(0.0)
        await self.worker.link.run("ticket", self.key, ticket.digest, int(TICKET_LIFETIME * 1000))
        return text

    async def redeem(self, text: str) -> bool:
        return bool(await self.worker.link.run("redeem", self.key, digest(text)))

    # Connections

    async def attach(self, connection: Attachment, after: int | None) -> None:
        """Raises NoSuchSessionError where the session has ended meanwhile, else as `session.Session.attach`."""
        name = self.worker.new_connection()
        try:
            reply = await self._attach(name, after)
        except BaseException:
            self._release(name)
            raise
        epoch, previous, version, unsent, since, base, latest, workers, statuses = reply[1:]
        if previous:
            self.worker.tell(previous.decode(), ["over", self.id, epoch])
        if epoch < self._epoch:  # a newer connection was faster
            connection.close(TAKEN_OVER)
            self._release(name)
            return
        self._take_over(epoch)
        self.producer.room.update(version, unsent)
        for worker in workers:
            self.worker.post(worker.decode(), ["attached", self.id, epoch, version, unsent])
        delivery = Delivery(max(since, base), self.producer.room.half // 4, connection.wake, self.store.limits.budget)
        self._here = Attached(name, epoch, connection, delivery)
        self.worker.nursery.start_soon(self._feed, self._here)
        if after is not None:
            tasks = [msgspec.json.decode(status, type=TaskStatus) for status in statuses]
            connection.tell(Resumed(after=since, oldest_seq=base + 1, latest_seq=latest, gap=since < base, tasks=tasks))

    async def _attach(self, name: str, after: int | None) -> Any:
        held = (self.worker.id, name, "1", self.id, self.owner_name, self.worker.ttl)
        if await self.worker.link.run("hold", self.worker.for_all, *held) != [b"ok"]:
            raise OverloadedError("The server has lost what it had", retry_after=RETRY_AFTER)
        reply = await self._run("attach", name, "" if after is None else after)
        if reply[0] == b"beyond":
            raise InvalidParamsError(f"Expected a number from 0 to {reply[1]} - at `after`")
        if reply[0] == b"gone":
            raise NoSuchSessionError("There is no such session any more")
        self.worker.check()
        self.store.send_elsewhere_when_draining()
        return reply

    def _take_over(self, epoch: int) -> None:
        """There is a connection of this epoch. Another one here does not count any more."""
        if epoch > self._epoch:
            self._epoch = epoch
            if self._here:
                here = self._here
                self._leave(here)
                here.connection.close(TAKEN_OVER)

    def detach(self, connection: Attachment) -> None:
        if self._here and self._here.connection is connection:
            self._leave(self._here)

    def _leave(self, here: Attached) -> None:
        self._here = None
        here.feeding.cancel()
        here.delivery.close()
        self._release(here.name, here.delivery.taken)

    def _release(self, name: str, taken: int | str = "") -> None:
        if not self.worker.is_over:
            names = (self.worker.id, name, self.id)
            self.worker.nursery.start_soon(self.worker.release, *names, taken, self.owner_name)

    def take(self, connection: Attachment) -> Ready | None:
        if self._here is None or self._here.connection is not connection:
            return None
        return self._here.delivery.take()

    async def _feed(self, here: Attached) -> None:
        async def read() -> list[Ready] | None:
            return await self._read(here)

        with here.feeding:
            await here.delivery.feed(read)

    async def _read(self, here: Attached) -> list[Ready] | None:
        delivery, room = here.delivery, self.producer.room
        known = delivery.unacknowledged
        terms = (here.name, delivery.taken, delivery.position, room.half, delivery.most, self.worker.new_number())
        status, *reply = await self._run("take", *terms, within=FOREVER)
        if status != b"ok":
            self.worker.is_behind |= status == b"behind"
            here.connection.close(TAKEN_OVER if status == b"other" else SERVICE_RESTART)
            return None
        version, unsent, waiting, found = reply
        delivery.acknowledge(known)
        room.update(version, unsent)
        for worker in waiting:
            self.worker.post(worker.decode(), ["room", self.id, version, unsent])
        return [ready(*entry) for entry in zip(found[::3], found[1::3], found[2::3], strict=True)]

    # What the tasks here tell

    async def settle(self) -> None:
        """Returns when what the tasks here have told is in the log."""
        await self.producer.settle()

    def appended(self, appended: Appended | None) -> None:
        if appended is None:
            self.end()
            return
        if self._here:
            self._here.delivery.accept(appended.entries)
        if appended.connection:
            self.worker.tell(appended.connection, ["look", self.id])
        for task_id in appended.others:
            self.tasks.drop(task_id)

    def end(self) -> None:
        """The session is no more, or this worker has lost it: a client that comes back learns which."""
        self.producer.close()
        self.tasks.drop()
        if self._here:
            self._here.connection.close(SERVICE_RESTART)

    # Methods

    async def generate(self, call: Call, params: Generate) -> Started:
        self.store.refuse_when_draining()
        here = self._here
        if here is None or self.producer.is_full:
            raise OverloadedError("The notifications of this session are not read", retry_after=RETRY_AFTER)
        runner = self.tasks.prepare(call, params, self.tools)
        size = call.size * BYTES_PER_BYTE_OF_JSON
        self.store.limits.budget.hold(size)
        try:
            await self._register(runner, here.name)
        except BaseException:
            self._dismiss(runner, size, here)
            raise
        self.producer.open(runner.task)
        self.tasks.start(runner, lambda runner: self._dismiss(runner, size))
        return Started(self.id, runner.task.id, runner.task.state.value)

    async def _register(self, runner: Runner, connection: str) -> None:
        status = msgspec.json.encode(TaskStatus(runner.task.id, runner.task.state.value, []))
        most = self.store.settings.max_tasks_per_session
        await self.store.limits.admit(self.worker, self.id, runner.task.id, self.owner, runner.model_name)
        reply = await self._run("register", self.worker.id, runner.task.id, status, connection, most)
        if reply[0] == b"many":
            raise too_many("tasks", most, "in this session")
        if reply[0] != b"ok":
            raise taken_over()
        self.worker.check()
        self.store.refuse_when_draining()  # as of now every task is waited for

    def _dismiss(self, runner: Runner, size: int, asked_by: Attached | None = None) -> None:
        """The task has ended; or it has not begun, and this connection had asked for it."""
        self.store.limits.budget.release(size)
        if not self.worker.is_over:
            self.worker.nursery.start_soon(self._forget, runner.task.id, asked_by)

    async def _forget(self, task_id: str, asked_by: Attached | None) -> None:
        if asked_by:
            error = OverloadedError("The task could not begin", retry_after=RETRY_AFTER)
            await self.worker.end_task("unregister", self.id, asked_by.epoch, task_id, error)
        await self.producer.settle()
        await self.store.limits.dismiss(self.worker, task_id, self.owner)

    async def tool_result(self, params: ToolResult) -> Accepted:
        if self._here is None:
            raise taken_over()
        return await self.calls.tool_result(params, self._here.epoch)

    async def cancel(self, task_id: str | None) -> Ending:
        return await self.calls.cancel(task_id)

    # Messages of workers

    def receive(self, message: Message) -> None:
        match message:
            case ["look", _]:
                if self._here:
                    self._here.delivery.look()
            case ["room", _, version, unsent]:
                self.producer.room.update(version, unsent)
            case ["over", _, epoch]:
                self._take_over(epoch)
            case ["attached", _, epoch, version, unsent]:
                self._take_over(epoch)
                self.tasks.close_window()
                self.producer.room.update(version, unsent)
            case ["detached", _, epoch, version, unsent]:
                self.producer.room.update(version, unsent)
                if epoch >= self._epoch:
                    self.tasks.open_window(self.resume_window)
            case _:
                self.calls.receive(message)
