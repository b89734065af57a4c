"""Sessions: what survives a connection.

A `Session` owns its tools, its tasks and its outbox. A connection only attaches to it: it takes what the outbox
holds, and when it is gone the tasks go on for the resume window. Of two connections the newer one counts. What
concerns all sessions, limits above all, is the store's.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from typing import Any, Protocol

import attrs
import msgspec
import trio

from .access import Owner, Ticket
from .chat import JsonObject
from .errors import InvalidParamsError, NoSuchTaskError, OverloadedError
from .jsonrpc import Call
from .logs import log_context
from .outbox import Entry, Outbox, Replay
from .protocol import (
    Accepted,
    Draining,
    Generate,
    NamedToolChoice,
    Notification,
    Resumed,
    Started,
    TaskNotification,
    TaskStatus,
    ToolResult,
)
from .runner import Model, Runner
from .settings import Settings
from .task import Task, outcome_of

logger = logging.getLogger(__name__)

TAKEN_OVER = 4409
"""WebSocket close code for a connection whose session was taken over by a newer one."""

BYTES_PER_BYTE_OF_JSON = 3
"""What a request holds while its task runs: its Python objects, LangChain's, and the body that is sent upstream."""

RETRY_AFTER = 1.0
"""Seconds after which a client refused for a limit may try again."""

_NO_PARAMETERS = ("history", "message", "tools", "model")
_PARAMETERS = {name: name for name in Generate.__struct_fields__ if name not in _NO_PARAMETERS} | {
    "max_new_tokens": "max_tokens"
}
"""The model's parameters: names in `Generate`, and in OpenAI's chat completions."""


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

    def admit_task(self, session: Session, size: int) -> None:
        """Counts one more task that holds ``size`` bytes. Raises OverloadedError where it would be too many."""

    def dismiss_task(self, session: Session, size: int) -> None:
        """The task has ended."""

    def touch(self, session: Session) -> None:
        """The session was in use until now."""


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
    runners: dict[str, Runner] = attrs.field(factory=dict)
    last_used: float = attrs.field(factory=trio.current_time)
    attached: Attachment | None = None
    _room: trio.Event | None = None
    _window: trio.CancelScope | None = None

    # Connections

    def issue_ticket(self) -> str:
        """A ticket for one connection from a browser, in place of an earlier one."""
        text, self.ticket = Ticket.issue(trio.current_time())
        return text

    def redeem(self, text: str) -> bool:
        """Whether this is the session's ticket. It is good once."""
        is_good = self.ticket is not None and self.ticket.is_good(text, trio.current_time())
        if is_good:
            self.ticket = None
        return is_good

    def attach(self, connection: Attachment, after: int | None) -> None:
        """Makes this the session's connection. With ``after`` it is told so, and the outbox is replayed from there.

        Raises InvalidParamsError where ``after`` is not a number given out so far, or 0; then nothing has changed.
        """
        try:
            replay = self.outbox.rewind(self.outbox.latest_seq if after is None else after)
        except ValueError as error:
            raise InvalidParamsError(f"{error} - at `after`") from error
        if self.attached:
            self.attached.close(TAKEN_OVER)
        if self._window:
            self._window.cancel()
        self.attached = connection
        self.store.touch(self)
        self._make_room()
        if after is not None:
            connection.tell(self._resumed(replay))
        if self.store.drains_until is not None:
            connection.tell(Draining(max(self.store.drains_until - trio.current_time(), 0.0)))

    def detach(self, connection: Attachment) -> None:
        """The connection is gone. The tasks go on for the resume window, unless a newer connection has them."""
        if self.attached is connection:
            self.attached = None
            self.store.touch(self)
            if self.runners:
                self._window = trio.CancelScope()
                self.store.nursery.start_soon(self._cancel_after_window, self._window)

    async def _cancel_after_window(self, window: trio.CancelScope) -> None:
        with window:
            await trio.sleep(self.resume_window)
            self.cancel(None)

    def take(self, connection: Attachment) -> Entry | None:
        """The next notification for this connection; ``None`` when there is none, or when it was taken over."""
        if self.attached is not connection:
            return None
        entry = self.outbox.take()
        self._make_room()
        return entry

    @property
    def is_idle(self) -> bool:
        return self.attached is None and not self.runners

    def _resumed(self, replay: Replay) -> Resumed:
        tasks = [
            TaskStatus(runner.task.id, runner.task.state.value, runner.task.outstanding)
            for runner in self.runners.values()
        ]
        return Resumed(**attrs.asdict(replay), tasks=tasks)

    # Notifications: the sink of the session's runners

    def append(self, note: TaskNotification) -> None:
        self.outbox.append(note)
        if self.attached:
            self.attached.wake()

    async def wait_for_room(self) -> None:
        while self.outbox.is_full:
            if self._room is None:
                self._room = trio.Event()
            await self._room.wait()

    def _make_room(self) -> None:
        if self._room is not None and not self.outbox.is_full:
            self._room.set()
            self._room = None

    # Methods

    def generate(self, call: Call, params: Generate) -> Started:
        """Starts a task. Raises OverloadedError at a limit, InvalidParamsError for a model or choice not to be had."""
        settings = self.store.settings
        if self.outbox.is_full:
            raise OverloadedError("The notifications of this session are not read", retry_after=RETRY_AFTER)
        model_name = _model_name(settings, params.model)
        tools = self.tools if params.tools is None else [tool.to_openai() for tool in params.tools]
        _check_tool_choice(params.tool_choice, tools)
        size = call.size * BYTES_PER_BYTE_OF_JSON
        self.store.admit_task(self, size)
        task = Task(f"task_{secrets.token_hex(8)}", settings.tool_timeout, settings.max_tool_rounds)
        runner = Runner(
            task=task,
            session_id=self.id,
            model=self.store.model,
            model_name=model_name,
            settings=settings,
            sink=self,
            conversation=call.conversation,
            tools=tools,
            parameters=_parameters(params),
        )
        self.runners[task.id] = runner
        self.store.nursery.start_soon(self._run, runner, size)
        return Started(self.id, task.id, task.state.value)

    async def _run(self, runner: Runner, size: int) -> None:
        try:
            with log_context(owner=self.owner.name):
                await runner.run()
        except Exception:  # the nursery is that of all tasks
            logger.exception("defect in a runner")
        finally:
            del self.runners[runner.task.id]
            self.store.dismiss_task(self, size)

    def tool_result(self, params: ToolResult) -> Accepted:
        """Raises NoSuchTaskError or InvalidParamsError; then nothing has changed."""
        runner = self.runners.get(params.task_id)
        if runner is None:
            raise NoSuchTaskError(f"There is no running task {params.task_id[:64]!r} in this session")
        runner.give_results(tuple(outcome_of(result) for result in params.results))
        return Accepted(
            task_id=params.task_id,
            accepted=[result.tool_call_id for result in params.results],
            outstanding=runner.task.outstanding,
            state=runner.task.state.value,
        )

    def cancel(self, task_id: str | None) -> list[Runner]:
        """Cancels this task, or with ``None`` all of them; the runners' ``ended`` tells when they have ended."""
        runners = [runner for name, runner in self.runners.items() if task_id in (None, name)]
        for runner in runners:
            runner.cancel()
        return runners


def _model_name(settings: Settings, asked: str | None) -> str:
    if asked is None or asked == settings.model_name:
        return settings.model_name
    if asked not in settings.allowed_models:
        names = ", ".join(sorted({settings.model_name, *settings.allowed_models}))
        raise InvalidParamsError(f"Expected one of {names}, got {asked[:64]!r} - at `params.model`")
    return asked


def _parameters(params: Generate) -> JsonObject:
    given = {theirs: getattr(params, ours) for ours, theirs in _PARAMETERS.items()}
    parameters: JsonObject = msgspec.to_builtins({name: value for name, value in given.items() if value is not None})
    return parameters


def _check_tool_choice(choice: Any, tools: Sequence[JsonObject]) -> None:
    names = [tool["function"]["name"] for tool in tools]
    named = choice.function.name if isinstance(choice, NamedToolChoice) else None
    if (named and named not in names) or (choice == "required" and not names):
        raise InvalidParamsError(
            f"Expected a tool that is offered ({', '.join(names) or 'none is'}) - at `params.tool_choice`"
        )
