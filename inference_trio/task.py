"""One generation as a table-driven state machine.

A task goes through rounds, each one call of the model. A round streams text; when the model's message is
complete it either ends the task or asks for tool calls. Then the task waits until every call has its result,
and the next round begins:

    streaming ──ToolCallsRequested──▶ awaiting_tools ──ToolResultsReceived (last one)──▶ streaming
        │                                   │
        ├──RoundFinished──▶ done            │
        └──CancelRequested──▶ cancelled ◀───┤
        └──TaskFailed──▶ failed ◀───────────┘

Events are facts, told by whoever saw them happen. `Task.apply` takes one, moves to the next state and returns
the notifications that follow; the state then says what to do next: run a round, wait for results, or stop. An
event that `TRANSITIONS` does not allow raises and changes nothing. The three states on the right have no way
out, so a task ends once. Nothing here waits, reads a clock or knows who calls.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any, Literal

import attrs

from . import protocol
from .chat import JsonObject
from .errors import InferenceError, InvalidParamsError, TooManyRoundsError
from .jsonrpc import encode
from .protocol import Usage


@attrs.frozen
class ToolCall:
    """A complete tool call of the model.

    ``parameters`` are its arguments as a JSON object. Where ``problem`` is not ``None`` the call never reaches
    the client; the problem, one sentence, is what the model gets as its result.
    """

    id: str
    name: str
    parameters: JsonObject
    problem: str | None = None


@attrs.frozen
class ToolOutcome:
    """What became of one tool call: the text that the model gets."""

    call_id: str
    content: str


class TaskState(enum.Enum):
    """The values are the states' names on the wire."""

    STREAMING = "streaming"
    AWAITING_TOOLS = "awaiting_tools"
    DONE = "done"
    CANCELLED = "cancelled"
    FAILED = "failed"


# Events


@attrs.frozen
class TextReceived:
    text: str


@attrs.frozen
class ReasoningReceived:
    """``field`` is the name under which the provider sent it and wants it back."""

    text: str
    field: str = "reasoning_content"


@attrs.frozen
class RoundFinished:
    """The model's message is complete and calls no tool, or was cut off before its calls were complete."""

    finish_reason: str
    usage: Usage | None = None


@attrs.frozen
class ToolCallsRequested:
    """The model's message is complete and calls tools."""

    calls: tuple[ToolCall, ...]
    finish_reason: str
    usage: Usage | None = None


@attrs.frozen
class ToolResultsReceived:
    outcomes: tuple[ToolOutcome, ...]


@attrs.frozen
class CancelRequested:
    pass


@attrs.frozen
class TaskFailed:
    error: InferenceError


Event = (
    TextReceived
    | ReasoningReceived
    | RoundFinished
    | ToolCallsRequested
    | ToolResultsReceived
    | CancelRequested
    | TaskFailed
)

S = TaskState
TRANSITIONS: dict[TaskState, dict[type[Any], frozenset[TaskState]]] = {
    S.STREAMING: {
        TextReceived: frozenset({S.STREAMING}),
        ReasoningReceived: frozenset({S.STREAMING}),
        RoundFinished: frozenset({S.DONE}),
        # streaming: every call was refused, so the next round begins; failed: one round too many
        ToolCallsRequested: frozenset({S.AWAITING_TOOLS, S.STREAMING, S.FAILED}),
        CancelRequested: frozenset({S.CANCELLED}),
        TaskFailed: frozenset({S.FAILED}),
    },
    S.AWAITING_TOOLS: {
        ToolResultsReceived: frozenset({S.AWAITING_TOOLS, S.STREAMING}),
        CancelRequested: frozenset({S.CANCELLED}),
        TaskFailed: frozenset({S.FAILED}),
    },
    S.DONE: {},
    S.CANCELLED: {},
    S.FAILED: {},
}
"""The states to which each event may lead, by the state that it meets."""


class IllegalTransitionError(Exception):
    """The task is not in a state for this event; nothing has changed."""


Status = Literal["completed", "cancelled", "length", "content_filter"]
_STATUS: dict[str, Status] = {"length": "length", "content_filter": "content_filter"}
_SHOWN_IDS, _SHOWN_CHARACTERS = 20, 64  # of what a client sent, in an error
_CANCELLED_RESULT = "Error: the call was cancelled before it had a result."

Notifications = list[protocol.TaskNotification]


@attrs.define
class Task:
    """``tool_timeout`` (seconds) is what the client is told; whoever waits keeps to it.

    ``max_tool_rounds`` is how many rounds may ask for tool calls.
    """

    id: str
    tool_timeout: float
    max_tool_rounds: int
    state: TaskState = TaskState.STREAMING
    rounds: int = 1
    messages: list[JsonObject] = attrs.field(factory=list)
    """What the task adds to the history, complete rounds only until the task has ended."""
    error: InferenceError | None = attrs.field(default=None, eq=False)
    """What it failed with."""

    _calls: tuple[ToolCall, ...] = ()
    _results: dict[str, str] = attrs.field(factory=dict)
    _round_text: list[str] = attrs.field(factory=list)
    _round_reasoning: list[str] = attrs.field(factory=list)
    _reasoning_field: str = ""
    _earlier_text: list[str] = attrs.field(factory=list)
    _usages: list[Usage | None] = attrs.field(factory=list)

    @property
    def has_ended(self) -> bool:
        return not TRANSITIONS[self.state]

    @property
    def outstanding(self) -> list[str]:
        """Ids of the calls whose results are waited for."""
        return [call.id for call in self._calls if call.id not in self._results]

    @property
    def text(self) -> str:
        """The text so far, over all rounds."""
        return "".join((*self._earlier_text, *self._round_text))

    @property
    def usage(self) -> Usage | None:
        """The sum over all rounds; ``None`` where a round gave none."""
        known = [usage for usage in self._usages if usage]
        if not known or len(known) < len(self._usages):
            return None
        return Usage(
            input_tokens=sum(usage.input_tokens for usage in known),
            output_tokens=sum(usage.output_tokens for usage in known),
            total_tokens=sum(usage.total_tokens for usage in known),
        )

    def apply(self, event: Event) -> Notifications:
        """Moves to the next state and returns what the client is to be told, in order.

        Raises IllegalTransitionError where the state does not allow the event, and InvalidParamsError where a
        result is for a call that is not outstanding; then nothing has changed.
        """
        if type(event) not in TRANSITIONS[self.state]:
            raise IllegalTransitionError(f"{type(event).__name__} in state {self.state.value}")
        self.state, notifications = self._handle(event)
        return notifications

    def _handle(self, event: Event) -> tuple[TaskState, Notifications]:
        match event:
            case TextReceived():
                return self._on_text(event)
            case ReasoningReceived():
                return self._on_reasoning(event)
            case RoundFinished():
                return self._on_finished(event)
            case ToolCallsRequested():
                return self._on_calls(event)
            case ToolResultsReceived():
                return self._on_results(event)
            case CancelRequested():
                return self._on_cancel()
            case _:
                return self._on_failed(event)

    def _on_text(self, event: TextReceived) -> tuple[TaskState, Notifications]:
        self._round_text.append(event.text)
        return S.STREAMING, [protocol.TextChunk(task_id=self.id, chunk=event.text)]

    def _on_reasoning(self, event: ReasoningReceived) -> tuple[TaskState, Notifications]:
        self._round_reasoning.append(event.text)
        self._reasoning_field = event.field
        return S.STREAMING, [protocol.ReasoningChunk(task_id=self.id, chunk=event.text)]

    def _on_finished(self, event: RoundFinished) -> tuple[TaskState, Notifications]:
        self._close_round(event.usage)
        status = _STATUS.get(event.finish_reason, "completed")
        return S.DONE, [self._end(status, event.finish_reason)]

    def _on_calls(self, event: ToolCallsRequested) -> tuple[TaskState, Notifications]:
        if self.rounds > self.max_tool_rounds:
            too_many = TooManyRoundsError(f"The model asked for tools in more than {self.max_tool_rounds} rounds")
            return self._on_failed(TaskFailed(too_many))
        self._close_round(event.usage, event.calls)
        self._calls = event.calls
        self._results = {call.id: f"Error: {call.problem}" for call in event.calls if call.problem}
        requests: Notifications = [self._request(call) for call in event.calls if not call.problem]
        return self._after_results(), requests

    def _on_results(self, event: ToolResultsReceived) -> tuple[TaskState, Notifications]:
        received = {outcome.call_id: outcome.content for outcome in event.outcomes}
        if not received.keys() <= set(self.outstanding) or len(received) < len(event.outcomes):
            got = [outcome.call_id[:_SHOWN_CHARACTERS] for outcome in event.outcomes[:_SHOWN_IDS]]
            raise InvalidParamsError(
                f"Expected each of {self.outstanding} at most once, got {got} - at `params.results`"
            )
        self._results |= received
        return self._after_results(), []

    def _on_cancel(self) -> tuple[TaskState, Notifications]:
        if self.state is S.STREAMING:
            self._close_round(None)
        else:
            self._results = dict.fromkeys(self.outstanding, _CANCELLED_RESULT) | self._results
            self._add_results()
        return S.CANCELLED, [self._end("cancelled", None)]

    def _on_failed(self, event: TaskFailed) -> tuple[TaskState, Notifications]:
        self.error = event.error
        wire = event.error.to_wire()
        if self.text:
            wire["data"] = {**wire.get("data", {}), "partial_text": self.text}
        return S.FAILED, [protocol.Error(task_id=self.id, error=wire)]

    def _after_results(self) -> TaskState:
        if self.outstanding:
            return S.AWAITING_TOOLS
        self._add_results()
        self.rounds += 1
        return S.STREAMING

    def _add_results(self) -> None:
        for call in self._calls:
            self.messages.append({"role": "tool", "tool_call_id": call.id, "content": self._results[call.id]})

    def _close_round(self, usage: Usage | None, calls: Sequence[ToolCall] = ()) -> None:
        text, reasoning = "".join(self._round_text), "".join(self._round_reasoning)
        if text or calls:
            message: JsonObject = {"role": "assistant", "content": text or None}
            if reasoning:
                message[self._reasoning_field] = reasoning
            if calls:
                message["tool_calls"] = [_call_of_message(call) for call in calls]
            self.messages.append(message)
        self._usages.append(usage)
        self._earlier_text.append(text)
        self._round_text.clear()
        self._round_reasoning.clear()

    def _request(self, call: ToolCall) -> protocol.FunctionCallRequest:
        return protocol.FunctionCallRequest(
            task_id=self.id,
            request_id=call.id,
            tool_name=call.name,
            parameters=call.parameters,
            timeout=self.tool_timeout,
        )

    def _end(self, status: Status, finish_reason: str | None) -> protocol.End:
        return protocol.End(
            task_id=self.id,
            status_message=status,
            final_text=self.text,
            finish_reason=finish_reason,
            usage=self.usage,
            messages=self.messages,
        )


def _call_of_message(call: ToolCall) -> JsonObject:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": encode(call.parameters)}}


def outcome_of(result: protocol.ResultOfTool) -> ToolOutcome:
    """The text that the model gets for a client's result: text as it is, anything else as JSON."""
    if result.is_error:
        content = f"Error: {result.error_message}"
    elif isinstance(result.result, str):
        content = result.result
    else:
        content = encode(result.result)
    return ToolOutcome(result.tool_call_id, content)
