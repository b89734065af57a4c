"""Chunks of a chat completion from the bytes of its event stream.

All events of one read are handled together: text that has piled up while the server was busy goes on to LangChain
as one chunk. What comes out are plain dicts, because LangChain takes those as well as the model objects of OpenAI's
client, and making the objects costs more than all the rest. The types below say what compatible servers may leave out
or send as ``null``; whatever else there is in a chunk is not looked at.
"""

from __future__ import annotations

import itertools
import json
import operator
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import msgspec

from .chat import JsonObject
from .deltas import REASONING_FIELDS, Delta
from .errors import BrokenStreamError
from .sse import EventDecoder
from .upstream_errors import ErrorInStreamError

_DONE = b"[DONE]"


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | dict[str, Any] | list[Any] | None = None


class _ToolCall(msgspec.Struct):
    index: int | str | None = None
    id: str | int | None = None
    function: _Function | None = None


class _Delta(msgspec.Struct):
    content: str | list[Any] | None = None
    refusal: str | None = None
    reasoning_content: Any = None
    reasoning: Any = None
    tool_calls: list[_ToolCall] | None = None
    function_call: _Function | None = None


class _Choice(msgspec.Struct):
    index: Any = None
    delta: _Delta | None = None
    message: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None
    usage: Any = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: Any = None
    model: Any = None
    error: Any = None
    object: Any = None


_FIRST = (None, 0, "0")
_TEXT_FIELDS = ("content", *REASONING_FIELDS)
_USAGE_FIELDS = ("prompt_tokens", "completion_tokens", "total_tokens")
_decoder = msgspec.json.Decoder(_Chunk)


class Plain(dict[str, Any]):
    """A chunk of which it is known already what LangChain would make of it: nothing but this."""

    def __init__(self, chunk: JsonObject, delta: Delta | None) -> None:
        super().__init__(chunk)
        self.delta = delta


NOTHING_YET = Plain({"choices": [], "usage": None}, None)
"""The chunk for a read that brought nothing."""


def read_chunks(reads: Iterable[bytes]) -> Iterator[JsonObject]:
    """The chunks of a stream, up to ``[DONE]`` or its end. ``reads`` are its bytes as they come.

    Raises ErrorInStreamError for an error that the provider reports in place of a chunk, and BrokenStreamError
    where there is no event at all or one is no chunk.
    """
    decoder = EventDecoder()
    for read in itertools.chain(reads, (None,)):
        if read == b"":
            yield NOTHING_YET
            continue
        events = decoder.finish() if read is None else decoder.feed(read)
        yield from _joined(itertools.takewhile(_DONE.__ne__, events))
        if _DONE in events:
            return
    if decoder.answer_so_far:
        _refuse(bytes(decoder.answer_so_far))


def _refuse(answer: bytes) -> NoReturn:
    """For an answer without any event: it may be an error that came with a good status."""
    try:
        body = msgspec.json.decode(answer)
    except (ValueError, RecursionError):
        body = None
    if isinstance(body, dict) and body.get("error"):
        raise ErrorInStreamError(body["error"])
    what = "not a stream of events" if answer.strip() else "empty"
    raise BrokenStreamError(f"The provider's answer is {what}")


def _joined(events: Iterable[bytes]) -> Iterator[JsonObject]:
    """The chunks, with those of nothing but text put together, up to the first failure, which is raised."""
    for field, run in itertools.groupby(map(_attempt, events), key=_first):
        if field:
            yield _plain_chunk(field, "".join([text for _, text in run]))
        else:
            for _, item in run:
                if isinstance(item, Exception):
                    raise item
                yield item


_first = operator.itemgetter(0)


def _attempt(event: bytes) -> tuple[str, Any]:
    """The field and its text, where there is nothing else; else nothing and the chunk, or what is wrong with it."""
    try:
        chunk = _decode(event)
        return _plain_text(chunk) or ("", _normalised(chunk, event))
    except (ErrorInStreamError, BrokenStreamError) as error:
        return "", error


def _plain_text(chunk: _Chunk) -> tuple[str, str] | None:
    if not chunk.choices or len(chunk.choices) > 1 or chunk.usage or chunk.error or chunk.object == "error":
        return None
    choice = chunk.choices[0]
    delta = choice.delta
    if delta is None or choice.finish_reason or choice.usage or choice.index not in _FIRST:
        return None
    if delta.refusal or delta.tool_calls or delta.function_call:
        return None
    texts = [(name, text) for name in _TEXT_FIELDS if (text := getattr(delta, name))]
    return texts[0] if len(texts) == 1 and isinstance(texts[0][1], str) else None


def _decode(event: bytes) -> _Chunk:
    try:
        return _decoder.decode(event)
    except (ValueError, RecursionError):
        return _decode_loosely(event)


def _decode_loosely(event: bytes) -> _Chunk:
    """Takes half a surrogate pair, and bytes that are not UTF-8, which the format of events says to replace."""
    try:
        decoded = json.loads(event.decode("utf-8", "replace"), parse_constant=_refuse_constant)
        return msgspec.convert(decoded, _Chunk)
    except (ValueError, RecursionError) as error:
        raise BrokenStreamError("The provider sent an event that is not a chunk of a chat completion") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _normalised(chunk: _Chunk, event: bytes) -> JsonObject:
    if chunk.error or chunk.object == "error":
        raise ErrorInStreamError(chunk.error or msgspec.json.decode(event))
    choice = next((choice for choice in chunk.choices or () if choice.index in _FIRST), None)
    usage = _complete_usage(chunk.usage) or _complete_usage(choice and choice.usage)
    if choice is None:
        return {"choices": [], "usage": usage}
    delta = choice.delta or choice.message or _Delta(content=choice.text)  # some servers send the last two
    return _langchain_chunk(_fields_of(delta), choice.finish_reason, usage, chunk.model)


def _plain_chunk(field: str, text: str) -> Plain:
    delta = Delta(text=text) if field == "content" else Delta(reasoning=text, reasoning_field=field)
    return Plain(_langchain_chunk({field: text}), delta)


def _langchain_chunk(
    delta: JsonObject, finish_reason: str | None = None, usage: JsonObject | None = None, model: Any = None
) -> JsonObject:
    return {"choices": [{"delta": delta, "finish_reason": finish_reason}], "usage": usage, "model": model}


def _fields_of(delta: _Delta) -> JsonObject:
    """What there is in a delta. Some servers send the same reasoning under both names."""
    fields: JsonObject = {}
    if content := delta.content or delta.refusal:
        fields["content"] = content
    for name in REASONING_FIELDS:
        text = getattr(delta, name)
        if text and isinstance(text, str):
            fields[name] = text
            break
    calls = delta.tool_calls or ([_ToolCall(function=delta.function_call)] if delta.function_call else [])
    if calls:
        fields["tool_calls"] = [_langchain_tool_call(call) for call in calls]
    return fields


def _langchain_tool_call(call: _ToolCall) -> JsonObject:
    function = call.function or _Function()
    arguments = function.arguments or ""
    if not isinstance(function.arguments, str | None):
        arguments = msgspec.json.encode(function.arguments).decode()
    index = int(call.index) if isinstance(call.index, str) and call.index.isdecimal() else call.index
    return {
        "index": index if isinstance(index, int) else None,
        "id": None if call.id is None else str(call.id),
        "function": {"name": function.name, "arguments": arguments},
    }


def _complete_usage(usage: Any) -> JsonObject | None:
    """``None`` where a number is missing or is none, for LangChain would take it for 0."""
    counts = [_count(usage.get(name)) for name in _USAGE_FIELDS] if isinstance(usage, dict) else []
    match counts:
        case [int(prompt), int(completion), total]:
            total = prompt + completion if total is None else total
            return dict(zip(_USAGE_FIELDS, (prompt, completion, total), strict=True))
    return None


def _count(value: Any) -> int | None:
    is_count = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 and value == int(value)
    return int(value) if is_count else None
