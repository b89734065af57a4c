"""The tasks of one session that run in this process: started, given results, cancelled.

Where a session is kept is not known here; see `session.Session` for the one in memory.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import msgspec
import trio

from .chat import JsonObject
from .errors import InvalidParamsError, NoSuchTaskError
from .jsonrpc import Call
from .logs import log_context
from .protocol import Accepted, Generate, NamedToolChoice, TaskStatus, ToolResult
from .report import Observer
from .runner import Model, Runner, Sink
from .settings import Settings
from .task import Task, TaskState, outcome_of

logger = logging.getLogger(__name__)

_NO_PARAMETERS = ("history", "message", "tools", "model", "traceparent")
_PARAMETERS = {name: name for name in Generate.__struct_fields__ if name not in _NO_PARAMETERS} | {
    "max_new_tokens": "max_tokens"
}
"""The model's parameters: names in `Generate`, and in OpenAI's chat completions."""


@attrs.frozen
class RunnersEnding:
    """Tasks that were cancelled and may not have ended yet."""

    runners: Sequence[Runner]

    async def ended(self) -> list[str]:
        """Waits until all have ended; the ids of those that the cancelling has ended."""
        for runner in self.runners:
            await runner.ended.wait()
        return [runner.task.id for runner in self.runners if runner.task.state is TaskState.CANCELLED]


@attrs.define(eq=False)
class RunningTasks:
    """``nursery`` outlives every connection; ``sink`` is where the tasks' notifications go."""

    session_id: str
    owner_name: str | None
    settings: Settings
    model: Model
    nursery: trio.Nursery
    sink: Sink
    observers: Sequence[Observer] = ()
    runners: dict[str, Runner] = attrs.field(factory=dict)
    _window: trio.CancelScope | None = None

    def prepare(self, call: Call, params: Generate, tools: Sequence[JsonObject]) -> Runner:
        """What will run the task. Raises InvalidParamsError for a model or choice that is not to be had."""
        model_name = _model_name(self.settings, params.model)
        offered = tools if params.tools is None else [tool.to_openai() for tool in params.tools]
        _check_tool_choice(params.tool_choice, offered)
        return Runner(
            task=Task(f"task_{secrets.token_hex(8)}", self.settings.tool_timeout, self.settings.max_tool_rounds),
            session_id=self.session_id,
            model=self.model,
            model_name=model_name,
            settings=self.settings,
            sink=self.sink,
            conversation=call.conversation,
            tools=offered,
            parameters=_parameters(params),
            observers=self.observers,
            traceparent=params.traceparent,
        )

    def start(self, runner: Runner, dismiss: Callable[[Runner], None]) -> None:
        """Starts the task; ``dismiss`` is called when it has ended."""
        self.runners[runner.task.id] = runner
        self.nursery.start_soon(self._run, runner, dismiss)

    async def _run(self, runner: Runner, dismiss: Callable[[Runner], None]) -> None:
        try:
            with log_context(owner=self.owner_name):
                await runner.run()
        except Exception:  # the nursery is that of all tasks
            logger.exception("defect in a runner")
        finally:
            del self.runners[runner.task.id]
            if not self.runners:
                self.close_window()
            dismiss(runner)

    def give_results(self, params: ToolResult) -> Accepted:
        """Raises NoSuchTaskError or InvalidParamsError; then nothing has changed."""
        runner = self.runners.get(params.task_id)
        if runner is None:
            raise no_such_task(params.task_id)
        runner.give_results(tuple(outcome_of(result) for result in params.results))
        return Accepted(
            task_id=params.task_id,
            accepted=[result.tool_call_id for result in params.results],
            outstanding=runner.task.outstanding,
            state=runner.task.state.value,
        )

    def cancel(self, task_id: str | None = None) -> RunnersEnding:
        """Cancels this task, or with ``None`` all of them."""
        runners = [runner for name, runner in self.runners.items() if task_id in (None, name)]
        for runner in runners:
            runner.cancel()
        return RunnersEnding(runners)

    def drop(self, task_id: str | None = None) -> None:
        """Cancels as well, but nobody is told of the end here: these tasks have ended elsewhere, and otherwise."""
        for runner in self.cancel(task_id).runners:
            runner.observers = ()

    def statuses(self) -> list[TaskStatus]:
        return [status_of(runner.task) for runner in self.runners.values()]

    def open_window(self, seconds: float) -> None:
        """Cancels all tasks after this time, unless the window is closed before."""
        self.close_window()
        if self.runners:
            self._window = trio.CancelScope()
            self.nursery.start_soon(self._cancel_after, seconds, self._window)

    def close_window(self) -> None:
        if self._window:
            self._window.cancel()
            self._window = None

    async def _cancel_after(self, seconds: float, window: trio.CancelScope) -> None:
        with window:
            await trio.sleep(seconds)
            self.cancel()


def status_of(task: Task) -> TaskStatus:
    return TaskStatus(task.id, task.state.value, task.outstanding)


def no_such_task(task_id: str) -> NoSuchTaskError:
    return NoSuchTaskError(f"There is no running task {task_id[:64]!r} in this session")


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
