"""Sessions: what survives a connection.

A `Session` owns its tools, its tasks and its outbox. A connection only attaches to it: it takes what the outbox
holds, and when it is gone the tasks go on for the resume window. Of two connections the newer one counts.
`SessionStore` keeps the sessions, holds the limits over all of them, and forgets those that were idle too long.
"""

from __future__ import annotations

import logging
import secrets
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Protocol

import attrs
import msgspec
import trio

from .chat import JsonObject
from .errors import InvalidParamsError, NoSuchTaskError, OverloadedError
from .jsonrpc import Call
from .outbox import Entry, Outbox, Replay
from .protocol import (
    Accepted,
    CreateSession,
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

SERVICE_RESTART = 1012
"""WebSocket close code for a server that stops (IANA's registry of close codes)."""

CLOSING_TIME = 0.5
"""Seconds that cancelled tasks and closing connections are waited for when the server stops."""

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


@attrs.define(eq=False)
class Session:
    """``tools`` are in OpenAI's form, ``resume_window`` is in seconds."""

    id: str
    tools: Sequence[JsonObject]
    resume_window: float
    store: SessionStore
    outbox: Outbox
    runners: dict[str, Runner] = attrs.field(factory=dict)
    last_used: float = attrs.field(factory=trio.current_time)
    attached: Attachment | None = None
    _room: trio.Event | None = None
    _window: trio.CancelScope | None = None

    # Connections

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
        self.store.check_task_limits(self)
        if self.outbox.is_full:
            raise OverloadedError("The notifications of this session are not read", retry_after=RETRY_AFTER)
        model_name = self.store.model_for(params.model)
        tools = self.tools if params.tools is None else [tool.to_openai() for tool in params.tools]
        _check_tool_choice(params.tool_choice, tools)
        settings = self.store.settings
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
        self.store.nursery.start_soon(self._run, runner)
        self.runners[task.id] = runner
        self.store.running += 1
        return Started(self.id, task.id, task.state.value)

    async def _run(self, runner: Runner) -> None:
        try:
            await runner.run()
        except Exception:  # the nursery is that of all tasks
            logger.exception("defect in a runner")
        finally:
            self.store.running -= 1
            del self.runners[runner.task.id]
            self.store.touch(self)

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


@attrs.define(eq=False)
class SessionStore:
    """All sessions of this process. ``nursery`` is where tasks run: it outlives every connection."""

    settings: Settings
    model: Model
    nursery: trio.Nursery
    running: int = 0
    """Tasks running now."""
    drains_until: float | None = None
    """When the tasks that still run are cancelled, on Trio's clock, once the server is stopping."""

    _sessions: OrderedDict[str, Session] = attrs.field(factory=OrderedDict)
    """Those longest out of use first."""

    def __len__(self) -> int:
        return len(self._sessions)

    def create(self, params: CreateSession) -> Session:
        """Raises OverloadedError where there are too many sessions."""
        self.refuse_when_draining()
        self._forget_expired()
        if len(self) >= self.settings.max_sessions:
            raise OverloadedError("There are too many sessions", retry_after=RETRY_AFTER)
        window = self.settings.resume_window
        session = Session(
            id=secrets.token_urlsafe(24),
            tools=[tool.to_openai() for tool in params.tools or ()],
            resume_window=window if params.resume_window is None else min(window, params.resume_window),
            store=self,
            outbox=Outbox(self.settings.outbox_bytes),
        )
        self._sessions[session.id] = session
        return session

    def get(self, session_id: str) -> Session | None:
        """The session, if there is one that has not expired. Asking for it counts as use."""
        self._forget_expired()
        session = self._sessions.get(session_id)
        if session:
            self.touch(session)
        return session

    def touch(self, session: Session) -> None:
        """The session was in use until now."""
        session.last_used = trio.current_time()
        if session.id in self._sessions:
            self._sessions.move_to_end(session.id)

    def check_task_limits(self, session: Session) -> None:
        """Raises OverloadedError where one more task would be too many."""
        self.refuse_when_draining()
        per_session, in_all = self.settings.max_tasks_per_session, self.settings.max_tasks
        if len(session.runners) >= per_session:
            raise OverloadedError(f"This session already has {per_session} tasks", retry_after=RETRY_AFTER)
        if self.running >= in_all:
            raise OverloadedError("The server already has as many tasks as it may", retry_after=RETRY_AFTER)

    def model_for(self, name: str | None) -> str:
        """The model to use where ``name`` was asked for. Raises InvalidParamsError where that is not allowed."""
        default, allowed = self.settings.model_name, self.settings.allowed_models
        if name in (None, default):
            return default
        if name not in allowed:
            names = ", ".join(sorted({default, *allowed}))
            raise InvalidParamsError(f"Expected one of {names}, got {name[:64]!r} - at `params.model`")
        return name

    async def drain(self) -> None:
        """Stops: refuses sessions and tasks, lets the running ones end in time, cancels the rest, and closes.

        Returns in the time that the settings give, and at most twice `CLOSING_TIME` more.
        """
        limit = self.settings.drain_seconds
        self.drains_until = trio.current_time() + limit
        for session in self._sessions.values():
            if session.attached:
                session.attached.tell(Draining(limit))
        await self._wait_for_tasks(limit)
        for session in self._sessions.values():
            session.cancel(None)
        await self._wait_for_tasks(CLOSING_TIME)
        connections = [session.attached for session in self._sessions.values() if session.attached]
        for connection in connections:
            connection.close(SERVICE_RESTART)
        with trio.move_on_after(CLOSING_TIME):
            for connection in connections:
                await connection.closed.wait()

    async def _wait_for_tasks(self, limit: float) -> None:
        with trio.move_on_after(limit):
            for runner in [runner for session in self._sessions.values() for runner in session.runners.values()]:
                await runner.ended.wait()

    def refuse_when_draining(self) -> None:
        """Raises OverloadedError where the server is stopping."""
        if self.drains_until is not None:
            left = max(self.drains_until - trio.current_time(), RETRY_AFTER)
            raise OverloadedError("The server is stopping", retry_after=left)

    def _forget_expired(self) -> None:
        expired = trio.current_time() - self.settings.session_ttl
        while self._sessions:
            oldest = next(iter(self._sessions.values()))
            if oldest.last_used > expired:
                break
            if oldest.is_idle:
                del self._sessions[oldest.id]
            else:
                self.touch(oldest)
