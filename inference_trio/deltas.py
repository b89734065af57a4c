"""What a model streams, in one shape: LangChain's chunks of any provider become `Delta`s.

Text may come cut between the two halves of a surrogate pair, as servers that count in UTF-16 do, or with half a
pair. `mended` keeps the first half back until the next chunk, so that what comes out can always be encoded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import attrs
from langchain_core.messages import AIMessageChunk

from .protocol import Usage

REASONING_FIELDS = ("reasoning_content", "reasoning")
"""Where providers of OpenAI's format send reasoning, and want it back: DeepSeek and vLLM, OpenRouter."""


@attrs.frozen
class ToolCallDelta:
    """A piece of a tool call. An ``index`` of ``None`` and empty strings are what did not come."""

    index: int | None = None
    id: str = ""
    name: str = ""
    arguments: str = ""


@attrs.frozen
class Delta:
    """What one chunk of a model's stream says. It may say nothing: then it only shows that the stream lives.

    ``finish_reason`` is in OpenAI's words where they have one for it, ``usage`` of the round so far. ``opaque``
    is the chunk itself where it carries what the provider wants back in the next round and what has no field
    here (signatures, content blocks).
    """

    text: str = ""
    reasoning: str = ""
    reasoning_field: str = REASONING_FIELDS[0]
    tool_calls: tuple[ToolCallDelta, ...] = ()
    finish_reason: str | None = None
    usage: Usage | None = None
    opaque: AIMessageChunk | None = None

    @property
    def size(self) -> int:
        """Characters that it adds to what the model has said."""
        size = len(self.text) + len(self.reasoning)
        return size + sum(len(call.arguments) for call in self.tool_calls) if self.tool_calls else size


def mended(deltas: Iterable[Delta | None]) -> Iterator[Delta | None]:
    """The same deltas, but text that can be encoded."""
    halves: dict[str, str] = {}
    for delta in deltas:
        yield _mended(delta, halves) if delta and (halves or not _is_encodable(delta)) else delta
    if halves:
        lone: dict[str, Any] = dict.fromkeys(halves, "\N{REPLACEMENT CHARACTER}")
        yield Delta(**lone)


def delta_of(message: AIMessageChunk, info: Mapping[str, Any]) -> Delta:
    """What one chunk says, with surrogates as they came."""
    reasoning, field = _reasoning_beside(message.additional_kwargs)
    text, in_blocks = message.content, ""
    if not isinstance(text, str):
        text, in_blocks = _text_of_blocks(message)
    return Delta(
        text=text,
        reasoning=reasoning or in_blocks,
        reasoning_field=field,
        tool_calls=tuple(map(_tool_call_delta, message.tool_call_chunks)),
        finish_reason=_finish_reason(info) or _finish_reason(message.response_metadata),
        usage=_usage(message),
        opaque=message if _is_opaque(message) else None,
    )


def well_formed(text: str) -> str:
    """``text`` with surrogate pairs joined, and lone surrogates, which no UTF-8 can hold, as U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _is_encodable(delta: Delta) -> bool:
    try:
        delta.text.encode()
        delta.reasoning.encode()
    except UnicodeEncodeError:
        return False
    return True


def _mended(delta: Delta, halves: dict[str, str]) -> Delta:
    """``halves`` has, by field, the first half of a pair that its text ended with."""
    mended: dict[str, Any] = {}
    for field in ("text", "reasoning"):
        if piece := getattr(delta, field):
            text = halves.pop(field, "") + piece
            if "\ud800" <= text[-1] <= "\udbff":
                text, halves[field] = text[:-1], text[-1]
            mended[field] = well_formed(text)
    return attrs.evolve(delta, **mended)


def _reasoning_beside(additional_kwargs: Mapping[str, Any]) -> tuple[str, str]:
    for field in REASONING_FIELDS:
        text = additional_kwargs.get(field)
        if text and isinstance(text, str):
            return text, field
    return "", REASONING_FIELDS[0]


def _text_of_blocks(message: AIMessageChunk) -> tuple[str, str]:
    """Text and reasoning of content that is a list of blocks, which LangChain knows to read for each provider."""
    text, reasoning = [], []
    blocks: list[Any] = [*message.content_blocks]
    for block in blocks:
        if block["type"] == "text":
            text.append(block.get("text", ""))
        elif block["type"] == "reasoning":
            reasoning.append(block.get("reasoning", ""))
        else:  # a refusal; before langchain-core 1.8 it stands within a non-standard block
            text.append(block.get("value", block).get("refusal", ""))
    return "".join(text), "".join(reasoning)


def _tool_call_delta(chunk: Mapping[str, Any]) -> ToolCallDelta:
    return ToolCallDelta(chunk.get("index"), chunk.get("id") or "", chunk.get("name") or "", chunk.get("args") or "")


_FINISH_REASON_KEYS = ("finish_reason", "stop_reason", "done_reason", "stopReason")
_FINISH_REASONS = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "complete": "stop",
    "completed": "stop",
    "max_tokens": "length",
    "max_output_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "tool_call": "tool_calls",
    "function_call": "tool_calls",
    "refusal": "content_filter",
    "safety": "content_filter",
    "sensitive": "content_filter",
    "recitation": "content_filter",
    "blocklist": "content_filter",
    "prohibited_content": "content_filter",
    "spii": "content_filter",
    "guardrail_intervened": "content_filter",
    "content_filtered": "content_filter",
    "stop": "stop",
    "length": "length",
    "failed": "error",
}
"""In OpenAI's words, by what other providers say, in lower case. What is not here stays as it came."""


def _finish_reason(metadata: Mapping[str, Any]) -> str | None:
    for key in _FINISH_REASON_KEYS:
        if reason := metadata.get(key):
            word = str(reason)
            return _FINISH_REASONS.get(word.lower(), word if re.fullmatch("[A-Za-z_]{1,32}", word) else "unknown")
    status = metadata.get("status")  # as OpenAI's Responses API says it
    if status == "incomplete":
        return _finish_reason({"finish_reason": (metadata.get("incomplete_details") or {}).get("reason")})
    return _FINISH_REASONS.get(status) if isinstance(status, str) else None


def _usage(message: AIMessageChunk) -> Usage | None:
    usage = message.usage_metadata
    return usage and Usage(usage["input_tokens"], usage["output_tokens"], usage["total_tokens"])


def _is_opaque(message: AIMessageChunk) -> bool:
    return isinstance(message.content, list) or not message.additional_kwargs.keys() <= set(REASONING_FIELDS)
