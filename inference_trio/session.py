"""Sessions: what survives a connection.

A `Session` owns its tools, its tasks and its outbox. A connection only attaches to it: it takes what the outbox
holds, and when it is gone the tasks go on for the resume window. Of two connections the newer one counts. What
concerns all sessions, limits above all, is the store's.

This is the session in memory. Its methods are `async` where another kind of session has to ask elsewhere; here none
of them waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Protocol

import attrs
import trio

from .access import Owner, Ticket
from .chat import JsonObject
from .errors import InvalidParamsError, OverloadedError
from .jsonrpc import Call
from .outbox import BYTES_PER_BYTE_OF_JSON, RETRY_AFTER, Budget, Entry, Outbox, Replay
from .protocol import Accepted, Draining, Generate, Notification, Resumed, Started, TaskNotification, ToolResult
from .report import Observer
from .runner import Model, Runner
from .running import RunnersEnding, RunningTasks
from .settings import Settings

TAKEN_OVER = 4409
"""WebSocket close code for a connection whose session was taken over by a newer one."""


class Attachment(Protocol):
    """What a session needs of a connection. No method waits."""

    closed: trio.Event
    """Set when the connection is gone."""

    def wake(self) -> None:
        """There is something to take."""

    def tell(self, note: Notification) -> None:
        """Send this, which belongs to no task."""

    def close(self, code: int) -> None:
        """Close with this WebSocket code when all that is there is sent."""


class Store(Protocol):
    """What a session needs of the place where it is kept."""

    settings: Settings
    model: Model
    nursery: trio.Nursery
    """Where tasks run: it outlives every connection."""
    drains_until: float | None
    observers: Sequence[Observer]
    """Who is told of tasks."""

    def admit_task(self, session: Session, size: int) -> None:
        """Counts one more task that holds ``size`` bytes. Raises OverloadedError where it would be too many."""

    def dismiss_task(self, session: Session, size: int) -> None:
        """The task has ended."""

    def touch(self, session: Session) -> None:
        """The session was in use until now."""


def _tasks(session: Session) -> RunningTasks:
    store = session.store
    return RunningTasks(
        session.id, session.owner.name, store.settings, store.model, store.nursery, session, store.observers
    )


@attrs.define(eq=False)
class Session:
    """``tools`` are in OpenAI's form, ``resume_window`` is in seconds, ``size`` is what it holds besides its outbox."""

    id: str
    owner: Owner
    tools: Sequence[JsonObject]
    resume_window: float
    size: int
    store: Store
    outbox: Outbox
    ticket: Ticket | None = None
    tasks: RunningTasks = attrs.field(default=attrs.Factory(_tasks, takes_self=True))
    last_used: float = attrs.field(factory=trio.current_time)
    attached: Attachment | None = None
    _producers: set[trio.Event] = attrs.field(factory=set)
    """One for each that waits for room."""

    # Connections

    async def issue_ticket(self) -> str:
        """A ticket for one connection from a browser, in place of an earlier one."""
        text, self.ticket = Ticket.issue(trio.current_time())
        return text

    async def redeem(self, text: str) -> bool:
        """Whether this is the session's ticket. It is good once."""
        is_good = self.ticket is not None and self.ticket.is_good(text, trio.current_time())
        if is_good:
            self.ticket = None
        return is_good

    async def attach(self, connection: Attachment, after: int | None) -> None:
        """Makes this the session's connection. With ``after`` it is told so, and the outbox is replayed from there.

        Raises InvalidParamsError where ``after`` is not a number given out so far, or 0; then nothing has changed.
        """
        try:
            replay = self.outbox.rewind(self.outbox.latest_seq if after is None else after)
        except ValueError as error:
            raise InvalidParamsError(f"{error} - at `after`") from error
        if self.attached:
            self.attached.close(TAKEN_OVER)
        self.tasks.close_window()
        self.attached = connection
        self.store.touch(self)
        self._wake_producers()
        if after is not None:
            connection.tell(self._resumed(replay))
        if self.store.drains_until is not None:
            connection.tell(Draining(max(self.store.drains_until - trio.current_time(), 0.0)))

    def detach(self, connection: Attachment) -> None:
        """The connection is gone. The tasks go on for the resume window, unless a newer connection has them."""
        if self.attached is connection:
            self.attached = None
            self.store.touch(self)
            self.tasks.open_window(self.resume_window)

    def take(self, connection: Attachment) -> Entry | None:
        """The next notification for this connection; ``None`` when there is none, or when it was taken over."""
        if self.attached is not connection:
            return None
        entry = self.outbox.take()
        self._wake_producers()
        return entry

    @property
    def is_idle(self) -> bool:
        return self.attached is None and not self.runners

    @property
    def runners(self) -> dict[str, Runner]:
        return self.tasks.runners

    def _resumed(self, replay: Replay) -> Resumed:
        return Resumed(**attrs.asdict(replay), tasks=self.tasks.statuses())

    # Notifications: the sink of the session's runners

    def append(self, note: TaskNotification) -> None:
        self.outbox.append(note)
        if self.attached:
            self.attached.wake()

    @property
    def is_full(self) -> bool:
        return self.outbox.is_full

    @property
    def budget(self) -> Budget:
        return self.outbox.budget

    async def settle(self) -> None:
        """Nothing: what the tasks have told is in the outbox at once."""

    async def wait_for_room(self) -> None:
        while self.outbox.is_full:
            awake = trio.Event()
            self._producers.add(awake)
            try:
                with self.outbox.budget.queueing(awake.set) if self.outbox.lacks_room else nullcontext():
                    await awake.wait()
            finally:
                self._producers.discard(awake)

    def _wake_producers(self) -> None:
        if self._producers and (self.outbox.lacks_room or not self.outbox.is_full):
            for awake in self._producers:
                awake.set()
            self._producers.clear()

    # Methods

    async def generate(self, call: Call, params: Generate) -> Started:
        """Starts a task. Raises OverloadedError at a limit, InvalidParamsError for a model or choice not to be had."""
        if self.outbox.is_full:
            raise OverloadedError("The notifications of this session are not read", retry_after=RETRY_AFTER)
        runner = self.tasks.prepare(call, params, self.tools)
        size = call.size * BYTES_PER_BYTE_OF_JSON
        self.store.admit_task(self, size)
        self.tasks.start(runner, lambda _: self.store.dismiss_task(self, size))
        return Started(self.id, runner.task.id, runner.task.state.value)

    async def tool_result(self, params: ToolResult) -> Accepted:
        """Raises NoSuchTaskError or InvalidParamsError; then nothing has changed."""
        return self.tasks.give_results(params)

    async def cancel(self, task_id: str | None) -> RunnersEnding:
        """Cancels this task, or with ``None`` all of them."""
        return self.tasks.cancel(task_id)
