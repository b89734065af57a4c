"""Chunks of a chat completion from the bytes of its event stream.

All events of one read are handled together: text that has piled up while the thread was busy goes on to LangChain
as one chunk. What comes out are plain dicts, because LangChain takes those as well as the model objects of OpenAI's
client, and making the objects costs more than all the rest. The types below say what compatible servers may leave out
or send as ``null``; whatever else there is in a chunk is not looked at.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import msgspec

from .chat import JsonObject
from .deltas import REASONING_FIELDS
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


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    finish_reason: str | None = None
    usage: _Usage | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    model: Any = None
    error: Any = None
    object: Any = None


_decoder = msgspec.json.Decoder(_Chunk)


def read_chunks(reads: Iterable[bytes]) -> Iterator[JsonObject]:
    """The chunks of a stream, up to ``[DONE]`` or its end. ``reads`` are its bytes as they come.

    Raises ErrorInStreamError for an error that the provider reports in place of a chunk, and BrokenStreamError
    where there is no event at all or one is no chunk.
    """
    decoder = EventDecoder()
    for read in itertools.chain(reads, (None,)):
        events = decoder.finish() if read is None else decoder.feed(read)
        yield from _joined(map(_attempt, itertools.takewhile(_DONE.__ne__, events)))
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


def _joined(items: Iterable[JsonObject | Exception]) -> Iterator[JsonObject]:
    """The chunks, with those of nothing but text put together, up to the first failure, which is raised."""
    for field, run in itertools.groupby(items, key=_field_of_text):
        if field:
            text = "".join(item["choices"][0]["delta"][field] for item in run if isinstance(item, dict))
            yield _langchain_chunk({field: text})
        else:
            for item in run:
                if isinstance(item, Exception):
                    raise item
                yield item


def _field_of_text(item: JsonObject | Exception) -> str | None:
    """Where a chunk has its text, if there is nothing else in it."""
    if isinstance(item, Exception) or item["usage"] or not item["choices"]:
        return None
    choice = item["choices"][0]
    field, text = next(iter(choice["delta"].items()), ("", None))
    is_plain = len(choice["delta"]) == 1 and isinstance(text, str) and not choice["finish_reason"]
    return field if is_plain else None


def _attempt(event: bytes) -> JsonObject | Exception:
    """A chunk, or what is wrong with it, to be raised when all before it is through."""
    try:
        return _normalised(_decode(event), event)
    except (ErrorInStreamError, BrokenStreamError) as error:
        return error


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
    choice = chunk.choices[0] if chunk.choices else _Choice()
    usage = _complete_usage(chunk.usage) or _complete_usage(choice.usage)
    if not chunk.choices:
        return {"choices": [], "usage": usage}
    return _langchain_chunk(_fields_of(choice.delta or _Delta()), choice.finish_reason, usage, chunk.model)


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
    if delta.tool_calls:
        fields["tool_calls"] = [_langchain_tool_call(call) for call in delta.tool_calls]
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


def _complete_usage(usage: _Usage | None) -> JsonObject | None:
    """``None`` where numbers are missing, for LangChain would take them for 0."""
    if usage is None or usage.prompt_tokens is None or usage.completion_tokens is None:
        return None
    total = usage.total_tokens
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens if total is None else total,
    }
