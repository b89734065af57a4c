"""Drives one task with one model: rounds, retries, waiting for tools, time limits, cancellation.

The runner is where time passes. What it sees happen it tells the `Task` as events, and what follows goes to the
session's outbox; the task's state says what to do next. Everything it waits for lies within one cancel scope, so a
cancel takes effect at once wherever the task is: leaving the model's stream closes the upstream request.
"""

from __future__ import annotations

import itertools
import logging
import math
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import attrs
import trio
from langchain_core.messages import BaseMessage

from .chat import JsonObject
from .deltas import Delta
from .errors import (
    BrokenStreamError,
    InferenceError,
    InternalError,
    NoSuchTaskError,
    ToolTimeoutError,
    UpstreamTimeoutError,
)
from .logs import log_context
from .messages import Conversed, ModelRequest, RoundAccumulator
from .outbox import Budget, Gathered
from .protocol import Error, TaskNotification
from .report import FailedAttempt, Observer, TaskReport, Timeline
from .settings import Settings
from .task import (
    CancelRequested,
    Event,
    IllegalTransitionError,
    ReasoningReceived,
    Task,
    TaskFailed,
    TaskState,
    TextReceived,
    ToolCallsRequested,
    ToolOutcome,
    ToolResultsReceived,
)

LONGEST_WAIT = 60.0
"""Seconds; a provider that asks to wait longer before the next attempt has refused."""

LAST_CHUNKS_TIMEOUT = 5.0
"""Seconds between chunks once the model has said why it stopped: only the usage is still to come."""

MESSAGES_GATHERED = 4
"""How many messages of the largest size a task may gather: what its model says, and the results of tools."""

logger = logging.getLogger(__name__)


_PARAMETERS_OF_TOOLS = ("tool_choice", "parallel_tool_calls")


class Model(Protocol):
    """What the runner needs of a chat model."""

    async def stream(self, request: ModelRequest, receive: Callable[[Delta], Awaitable[None]]) -> None:
        """One call of the model: awaits ``receive`` with each delta. Raises `InferenceError`."""


class Sink(Protocol):
    """Where notifications go."""

    @property
    def budget(self) -> Budget:
        """Where what the task holds is counted."""

    @property
    def is_full(self) -> bool:
        """Whether text must not be appended before `wait_for_room` has returned."""

    def append(self, note: TaskNotification) -> None: ...

    async def wait_for_room(self) -> None:
        """Returns when more may be appended."""


def _gathered(runner: Runner) -> Gathered:
    return Gathered(MESSAGES_GATHERED * runner.settings.max_message_bytes, runner.sink.budget)


@attrs.define(eq=False)
class Runner:
    """``tools`` are in OpenAI's form; ``parameters`` have the names of OpenAI's chat completions."""

    task: Task
    session_id: str
    model: Model
    model_name: str
    settings: Settings
    sink: Sink
    conversation: list[JsonObject]
    tools: Sequence[JsonObject]
    parameters: JsonObject
    observers: Sequence[Observer] = ()
    traceparent: str | None = None
    ended: trio.Event = attrs.field(factory=trio.Event)

    _gathered: Gathered = attrs.field(default=attrs.Factory(_gathered, takes_self=True))
    _scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    _results_came: trio.Event = attrs.field(factory=trio.Event)
    _messages: list[Conversed] = attrs.field(factory=list)
    _provider_message: BaseMessage | None = None
    _used_ids: set[str] = attrs.field(factory=set)
    _has_begun: bool = False
    _late_error: InferenceError | None = None
    _timeline: Timeline = attrs.field(factory=lambda: Timeline(trio.current_time()))

    def cancel(self) -> None:
        """Ends the task as cancelled unless it ends otherwise before; ``ended`` tells when the upstream is closed."""
        self._scope.cancel()

    def give_results(self, outcomes: tuple[ToolOutcome, ...]) -> None:
        """Raises NoSuchTaskError where the task waits for no tools, InvalidParamsError for a call not outstanding.

        Where there is no room for them, it raises InvalidParamsError for more than a task may gather, OverloadedError
        for more than sessions may hold.
        """
        size = sum(len(outcome.content) for outcome in outcomes)
        self._gathered.check(size)
        try:
            self._apply(ToolResultsReceived(outcomes))
        except IllegalTransitionError as error:
            raise NoSuchTaskError(f"Task {self.task.id} is {self.task.state.value} and waits for no tools") from error
        self._gathered.add(size)
        self._timeline.end_tool_waits(trio.current_time(), [outcome.call_id for outcome in outcomes])
        self._results_came.set()

    async def run(self) -> None:
        """Runs the task to its end. Raises nothing but a cancellation from outside."""
        with log_context(task_id=self.task.id, session_id=self.session_id):
            try:
                with self._scope:
                    await self._run_in_time()
            except InferenceError as error:
                self._fail(error)
            except Exception:
                logger.exception("defect in a task")
                self._fail(InternalError())
            finally:
                if not self.task.has_ended:
                    self._apply(CancelRequested())
                self._gathered.release()
                self.ended.set()
                self._tell_end()

    async def _run_in_time(self) -> None:
        limit = self.settings.task_timeout
        with trio.move_on_after(limit):
            while not self.task.has_ended:
                if self.task.state is TaskState.STREAMING:
                    await self._run_round()
                else:
                    await self._wait_for_results()
        if not self.task.has_ended:
            raise UpstreamTimeoutError(f"The task took longer than {limit:g} s", phase="task")

    # A round

    async def _run_round(self) -> None:
        self._extend_messages()
        self._timeline.begin_round(trio.current_time())
        for attempt in itertools.count():
            accumulator = RoundAccumulator()
            self._has_begun = False
            try:
                await self._stream(accumulator)
                break
            except InferenceError as error:
                may_retry = not self._has_begun and attempt < self.settings.max_retries
                delay = _delay_before_next(error, attempt) if may_retry else None
                self._tell_failure(FailedAttempt(trio.current_time(), error, is_retried=delay is not None))
                if delay is None:
                    raise
                logger.warning(
                    "attempt %d failed, the next one begins in %.1f s: %s", attempt + 1, delay, error.message
                )
            await trio.sleep(delay)
        self._close_round(accumulator)

    async def _stream(self, accumulator: RoundAccumulator) -> None:
        """One attempt. A model that has said why it stopped has said everything: what breaks after that is no error."""
        scope = trio.CancelScope(deadline=trio.current_time() + self.settings.first_token_timeout)

        async def receive(delta: Delta) -> None:
            if not self._has_begun:
                self._has_begun = True
                self._timeline.begin_answer(trio.current_time())
            accumulator.add(delta)
            self._say(delta)
            if self._gathered.is_too_much:
                accumulator.finish_reason = "length"
                scope.cancel()
            if self.sink.is_full:
                scope.deadline = math.inf
                await self.sink.wait_for_room()
            limit = self.settings.token_timeout
            if accumulator.finish_reason:
                limit = min(limit, LAST_CHUNKS_TIMEOUT)
            _extend(scope, limit)

        try:
            with scope:
                await self.model.stream(self._request(), receive)
        except BrokenStreamError:
            if accumulator.finish_reason is None:
                raise
        if scope.cancelled_caught and accumulator.finish_reason is None:
            raise self._too_slow()

    def _too_slow(self) -> UpstreamTimeoutError:
        if self._has_begun:
            limit, phase, what = self.settings.token_timeout, "token", "between two chunks"
        else:
            limit, phase, what = self.settings.first_token_timeout, "first_token", "until the first chunk"
        return UpstreamTimeoutError(f"The model was silent for {limit:g} s {what}", phase=phase)

    def _request(self) -> ModelRequest:
        """A forced tool choice is for the first round: kept up, it would make the model call tools without end."""
        parameters = self.parameters
        if not self.tools:  # OpenAI refuses these without tools
            parameters = {name: value for name, value in parameters.items() if name not in _PARAMETERS_OF_TOOLS}
        if self.task.rounds > 1 and parameters.get("tool_choice") not in ("none", "auto"):
            parameters = {name: value for name, value in parameters.items() if name != "tool_choice"}
        return ModelRequest(messages=self._messages, tools=self.tools, parameters=parameters, model=self.model_name)

    def _close_round(self, accumulator: RoundAccumulator) -> None:
        offered = [tool["function"]["name"] for tool in self.tools]
        event = accumulator.finish(offered, self._used_ids)
        self._timeline.end_round(trio.current_time(), event)
        self._apply(event)
        if isinstance(event, ToolCallsRequested) and not self.task.has_ended:
            self._used_ids.update(call.id for call in event.calls)
            said = next(message for message in reversed(self.task.messages) if message["role"] == "assistant")
            self._provider_message = accumulator.provider_message(said["content"] or "", event.calls)

    def _extend_messages(self) -> None:
        """Adds what has joined the conversation since the last round, the model's message as its provider has it."""
        conversed: list[Conversed] = [*self.conversation, *self.task.messages]
        joined = conversed[len(self._messages) :]
        if self._provider_message:
            joined[0] = self._provider_message
        self._messages += joined

    # Tools

    async def _wait_for_results(self) -> None:
        limit = self.settings.tool_timeout
        with trio.move_on_after(limit):
            while self.task.state is TaskState.AWAITING_TOOLS:
                self._results_came = trio.Event()
                await self._results_came.wait()
        if self.task.state is TaskState.AWAITING_TOOLS:
            raise ToolTimeoutError(f"No result came within {limit:g} s", outstanding=self.task.outstanding)

    # What happened

    def _say(self, delta: Delta) -> None:
        self._gathered.add(delta.size)
        if delta.reasoning:
            self._apply(ReasoningReceived(delta.reasoning, delta.reasoning_field))
        if delta.text:
            self._apply(TextReceived(delta.text))

    def _apply(self, event: Event) -> None:
        for note in self.task.apply(event):
            self.sink.append(note)

    def _fail(self, error: InferenceError) -> None:
        if self.task.has_ended:  # and how it did could not be told
            self._late_error = error
            self.sink.append(Error(task_id=self.task.id, error=error.to_wire()))
        else:
            self._apply(TaskFailed(error))

    # What is told about it

    def _tell_failure(self, failure: FailedAttempt) -> None:
        self._timeline.fail_attempt(failure)
        for observer in self.observers:
            observer.attempt_failed(self.model_name, failure)

    def _tell_end(self) -> None:
        report = self._report()
        content = {"conversation": self.conversation, "answer": self.task.text} if self.settings.log_content else {}
        logger.info("task ended", extra=_fields_of(report) | content)
        for observer in self.observers:
            observer.task_ended(report)

    def _report(self) -> TaskReport:
        return TaskReport(
            task_id=self.task.id,
            session_id=self.session_id,
            model=self.model_name,
            state=self.task.state,
            error=self._late_error or self.task.error,
            usage=self.task.usage,
            started_at=self._timeline.started_at,
            ended_at=trio.current_time(),
            rounds=self._timeline.rounds,
            tool_waits=list(self._timeline.tool_waits.values()),
            traceparent=self.traceparent,
        )


def _fields_of(report: TaskReport) -> JsonObject:
    """What the log says of a task."""
    usage, first_token = report.usage, report.first_token_after
    return {
        "model": report.model,
        "state": report.state.value,
        "error": report.error and report.error.code,
        "rounds": len(report.rounds),
        "retries": report.retries,
        "input_tokens": usage and usage.input_tokens,
        "output_tokens": usage and usage.output_tokens,
        "first_token_s": first_token and round(first_token, 3),
        "duration_s": round(report.duration, 3),
    }


def _extend(scope: trio.CancelScope, limit: float) -> None:
    """Gives it ``limit`` seconds from now, or at most a tenth (and a second) more: moving a deadline is not cheap."""
    least = trio.current_time() + limit
    most = least + min(1.0, limit / 10)
    if not least <= scope.deadline <= most:
        scope.deadline = most


def _delay_before_next(error: InferenceError, attempt: int) -> float | None:
    """Seconds until the attempt after ``attempt`` (from 0); ``None`` where another one makes no sense."""
    asked: float = error.data.get("retry_after") or 0.0
    if not error.retryable or asked > LONGEST_WAIT:
        return None
    backoff: float = min(8.0, 0.5 * 2**attempt)
    return max(asked, backoff * random.uniform(0.5, 1.0))  # noqa: S311 (jitter, not a secret)
