"""What goes over the wire: the parameters of each method, its answer, and the notifications.

A method's parameters are decoded into the types below, and the OpenRPC document is made from the same types:
what is published is what is checked. Nothing here does I/O or knows a session.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from .chat import Content, JsonObject, Message, NonEmpty, Params, Tool, ToolName, check_tools

# Methods


class NamedFunction(Params, frozen=True):
    name: ToolName


class NamedToolChoice(Params, frozen=True):
    function: NamedFunction
    type: Literal["function"]


TRACEPARENT = "^[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$"
"""W3C's Trace Context, section 3.2."""


class Generate(Params, frozen=True):
    """Start a task. Sampling parameters mean what they mean in OpenAI's chat completions."""

    method: ClassVar[str] = "generate"

    history: list[Message] | None = None
    message: Content | None = None
    tools: list[Tool] | None = None
    model: NonEmpty | None = None
    max_new_tokens: Annotated[int, Meta(ge=1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: JsonObject | None = None
    reasoning_effort: NonEmpty | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    traceparent: Annotated[str, Meta(pattern=TRACEPARENT)] | None = None

    def __post_init__(self) -> None:
        if not self.history and not self.message:
            raise ValueError("Expected `history` or `message`, at least one of them not empty")
        check_tools(self.tools)


class ResultOfTool(Params, frozen=True):
    """What a tool call gave: ``result``, or ``is_error`` and ``error_message``."""

    tool_call_id: NonEmpty
    tool_name: str | None = None
    result: Any | UnsetType = UNSET
    is_error: bool | None = None
    error_message: str | None = None

    def __post_init__(self) -> None:
        if self.is_error:
            if self.error_message is None or self.result is not UNSET:
                raise ValueError("Expected `error_message`, and no `result`, where `is_error` is true")
        elif self.result is UNSET or self.error_message is not None:
            raise ValueError("Expected `result`, or `is_error: true` with `error_message`")


class ToolResult(Params, frozen=True):
    """Give results of tool calls to the task that waits for them."""

    method: ClassVar[str] = "tool_result"

    task_id: NonEmpty
    results: Annotated[list[ResultOfTool], Meta(min_length=1)]


class Cancel(Params, frozen=True):
    """Cancel one task, or every task of the session."""

    method: ClassVar[str] = "cancel"

    task_id: NonEmpty | None = None


class Discover(Params, frozen=True):
    """Get the OpenRPC document of this service (OpenRPC specification, service discovery)."""

    method: ClassVar[str] = "rpc.discover"


METHODS: dict[str, type[Params]] = {call.method: call for call in (Generate, ToolResult, Cancel, Discover)}


class CreateSession(Params, frozen=True):
    """The body of ``POST /create_session``."""

    tools: list[Tool] | None = None
    resume_window: Annotated[float, Meta(ge=0)] | None = None

    def __post_init__(self) -> None:
        check_tools(self.tools)


# Notifications. All but `Resumed` and `Draining` carry the task they speak of.


class Notification(Struct, frozen=True, kw_only=True):
    """Something that the server tells on its own."""

    method: ClassVar[str]


class TaskNotification(Notification, frozen=True, kw_only=True):
    """Something that a task tells; on the wire it also has its number, ``seq``."""

    task_id: str


class TextChunk(TaskNotification, frozen=True):
    """Text of the answer. Together the chunks of a task are its ``final_text``."""

    method: ClassVar[str] = "text_chunk"
    chunk: NonEmpty


class ReasoningChunk(TaskNotification, frozen=True):
    """Reasoning text, of models that give it."""

    method: ClassVar[str] = "reasoning_chunk"
    chunk: NonEmpty


class FunctionCallRequest(TaskNotification, frozen=True):
    """A tool call for the client to carry out. ``timeout``: seconds until it counts as failed."""

    method: ClassVar[str] = "function_call_request"
    request_id: str
    tool_name: str
    parameters: JsonObject
    timeout: float


class Usage(Struct, frozen=True):
    """Tokens as the provider counted them; of a task, over all its rounds."""

    input_tokens: int
    output_tokens: int
    total_tokens: int


class End(TaskNotification, frozen=True):
    """The task has ended. ``messages`` is what it adds to the history, valid to be sent back as it is."""

    method: ClassVar[str] = "end"
    status_message: Literal["completed", "cancelled", "length", "content_filter"]
    final_text: str
    finish_reason: str | None
    usage: Usage | None
    messages: list[JsonObject]


class Error(TaskNotification, frozen=True):
    """The task has failed; text that came before is in ``data.partial_text``."""

    method: ClassVar[str] = "error"
    error: JsonObject


class TaskStatus(Struct, frozen=True):
    """A task that is running, and the tool calls it waits for."""

    task_id: str
    state: str
    outstanding: list[str]


class Resumed(Notification, frozen=True):
    """What follows: the kept notifications above ``after``; with a ``gap``, from ``oldest_seq`` on."""

    method: ClassVar[str] = "resumed"
    after: int
    oldest_seq: int
    latest_seq: int
    gap: bool
    tasks: list[TaskStatus]


class Draining(Notification, frozen=True):
    """The server is stopping. New tasks are refused; in ``deadline`` seconds those that still run are cancelled."""

    method: ClassVar[str] = "draining"
    deadline: float


class Kept(Struct, frozen=True):
    """A notification as it was kept: its parameters, each still as JSON."""

    method: str
    fields: dict[str, Raw]


NOTIFICATIONS: tuple[type[Notification], ...] = (
    TextChunk,
    ReasoningChunk,
    FunctionCallRequest,
    End,
    Error,
    Resumed,
    Draining,
)


# Answers


class Started(Struct, frozen=True):
    """Answer to `Generate`."""

    session_id: str
    task_id: str
    state: str


class Accepted(Struct, frozen=True):
    """Answer to `ToolResult`: the call ids that were taken, and those still waited for."""

    task_id: str
    accepted: list[str]
    outstanding: list[str]
    state: str


class Cancelled(Struct, frozen=True):
    """Answer to `Cancel`: the tasks that this call cancelled."""

    cancelled: list[str]


class Created(Struct, frozen=True):
    """Answer to ``POST /create_session``. The ticket comes where a token is asked for."""

    session_id: str
    ticket: str | UnsetType = UNSET


class NewTicket(Struct, frozen=True):
    """Answer to ``POST /sessions/{session_id}/ticket``."""

    ticket: str
