"""Between the chat format of OpenAI, LangChain's messages, and what a round of the model comes to.

A conversation is kept in OpenAI's format. `to_langchain` makes LangChain's messages of it, and each of those
carries the message it was made from: LangChain has no place for much of what providers of that format send and
want back. `RoundAccumulator` makes of a round's deltas what the task is told at its end.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import attrs
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.messages.ai import add_ai_message_chunks
from langchain_core.messages.tool import invalid_tool_call, tool_call

from .chat import JsonObject
from .deltas import REASONING_FIELDS, Delta
from .errors import BrokenStreamError, UpstreamError
from .protocol import Usage
from .task import RoundFinished, ToolCall, ToolCallsRequested
from .tool_calls import ToolCallAssembler, parse_arguments

_CUT_OFF = ("length", "content_filter")
_FAILURES = (
    "error",
    "abort",
    "cancelled",
    "insufficient_system_resource",
    "malformed_function_call",
    "network_error",
)
_TOOL_BLOCKS = ("tool_use", "input_json_delta", "function_call", "tool_call", "tool_call_chunk")
_WIRE_FORM = "openai_message"


# The conversation


Conversed = JsonObject | BaseMessage
"""A message of the conversation: in OpenAI's format, or the model's own as its provider has it."""


def to_langchain(messages: Sequence[Conversed]) -> list[BaseMessage]:
    """LangChain's messages for chat messages as `chat.Message` allows them.

    An upstream that speaks OpenAI's format gets the messages as they are (`wire_form`), another one gets what
    LangChain makes of the standard fields. Arguments of a tool call that are not a JSON object make it one of
    LangChain's invalid tool calls.
    """
    return [_CONVERTERS[message["role"]](message) if isinstance(message, dict) else message for message in messages]


def wire_form(message: Conversed) -> JsonObject | None:
    """The message in OpenAI's format, if it is in that or was made from that."""
    return message if isinstance(message, dict) else message.additional_kwargs.get(_WIRE_FORM)


def _system(message: JsonObject) -> BaseMessage:
    converted = SystemMessage(**_common(message))
    if message["role"] == "developer":
        converted.additional_kwargs["__openai_role__"] = "developer"
    return converted


def _user(message: JsonObject) -> BaseMessage:
    return HumanMessage(**_common(message))


def _tool(message: JsonObject) -> BaseMessage:
    return ToolMessage(**_common(message), tool_call_id=message["tool_call_id"])


def _assistant(message: JsonObject) -> BaseMessage:
    converted = AIMessage(**_common(message))
    converted.additional_kwargs |= {field: message[field] for field in REASONING_FIELDS if message.get(field)}
    for call in message.get("tool_calls") or ():
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        try:
            parsed = parse_arguments(arguments)
        except ValueError as error:
            invalid = invalid_tool_call(name=name, args=arguments, id=call["id"], error=str(error))
            converted.invalid_tool_calls.append(invalid)
        else:
            converted.tool_calls.append(tool_call(name=name, args=parsed, id=call["id"]))
    return converted


def _common(message: JsonObject) -> dict[str, Any]:
    return {
        "content": message.get("content") or "",
        "name": message.get("name"),
        "additional_kwargs": {_WIRE_FORM: message},
    }


_CONVERTERS = {
    "system": _system,
    "developer": _system,
    "user": _user,
    "assistant": _assistant,
    "tool": _tool,
}


# Rounds


@attrs.frozen
class ModelRequest:
    """One call of a model.

    ``tools`` are in OpenAI's form, ``parameters`` have the names of OpenAI's chat completions and only those that
    are set, ``model`` is another one than the configured one.
    """

    messages: Sequence[Conversed]
    tools: Sequence[JsonObject] = ()
    parameters: Mapping[str, Any] = attrs.field(factory=dict)
    model: str | None = None


@attrs.define
class RoundAccumulator:
    """What a round of the model has said so far, except its text and reasoning."""

    finish_reason: str | None = None
    _usage: Usage | None = None
    _tool_calls: ToolCallAssembler = attrs.field(factory=ToolCallAssembler)
    _opaque: list[AIMessageChunk] = attrs.field(factory=list)

    def add(self, delta: Delta) -> None:
        for piece in delta.tool_calls:
            self._tool_calls.add(piece)
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
        if delta.usage is not None:
            self._usage = delta.usage
        if delta.opaque is not None:
            self._opaque.append(delta.opaque)

    def finish(self, offered: Collection[str], used_ids: Collection[str] = ()) -> RoundFinished | ToolCallsRequested:
        """What the round comes to, given the names of the tools offered and the call ids of earlier rounds.

        Calls in a message that was cut off (``length``, ``content_filter``) are dropped. Raises BrokenStreamError
        where no finish reason came, or one that speaks of calls and there are none, and UpstreamError where it
        says that the provider failed.
        """
        reason = self.finish_reason
        if reason is None:
            raise BrokenStreamError("The provider's stream ended without a finish reason")
        if reason.lower() in _FAILURES:
            raise UpstreamError(
                "The provider gave up in the middle of its answer",
                status=None,
                type=reason,
                retryable=True,
                provider_message="",
            )
        calls = () if reason in _CUT_OFF else tuple(self._tool_calls.complete(offered, used_ids))
        if reason == "tool_calls" and not calls:
            raise BrokenStreamError("The provider says that the model calls tools, but there is no call")
        return ToolCallsRequested(calls, reason, self._usage) if calls else RoundFinished(reason, self._usage)

    def provider_message(self, text: str, calls: Sequence[ToolCall]) -> AIMessage | None:
        """The model's message for the next round, where its provider wants back more than ``text`` and ``calls``."""
        if not self._opaque:
            return None
        merged = add_ai_message_chunks(*self._opaque)
        content: Any = text
        if isinstance(merged.content, list):
            content = [block for block in merged.content if _type_of(block) not in _TOOL_BLOCKS]
            if not merged.additional_kwargs and all(_type_of(block) == "text" for block in content):
                return None
        return AIMessage(
            content=content,
            additional_kwargs=merged.additional_kwargs,
            response_metadata=merged.response_metadata,
            tool_calls=[tool_call(name=call.name, args=call.parameters, id=call.id) for call in calls],
        )


def _type_of(block: Any) -> str:
    return "text" if isinstance(block, str) else str(block.get("type"))
