"""What the scripted upstream says: an answer is a step, or a list of steps.

Steps are frozen and hold no state, so an answer may be a constant that many tests share. Helpers that make
several steps return a tuple, which may stand anywhere in an answer::

    reply("Hel", "lo")                                          # a whole good answer
    [text("Hel"), pause("gate"), text("lo"), finish(), done()]  # the test sets upstream.gate("gate")
    status(429, {"error": {"message": "slow down"}}, headers={"Retry-After": "1"})
    [text("Hel"), drop()]
    split(1, reply("Grüße"))                                    # every byte in a write of its own

Where the first step is not a head, ``200`` and ``text/event-stream`` go out with the first byte of the body;
after the last step the body ends properly. So ``[]`` is an empty stream, ``[hang()]`` is silent before the
headers, and ``[head(), hang()]`` after them.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import attrs
import trio

EVENT_STREAM = "text/event-stream"
ABSENT: Any = object()
"""For a field that shall be missing, where ``None`` would send ``null``."""


class Wire(Protocol):
    """What a step may do with the connection; `tests.upstream.Connection` does it."""

    async def send_head(self, status: int, headers: dict[str, str]) -> None: ...
    async def send_body(self, parts: Iterable[bytes]) -> None: ...
    async def send_unframed(self, data: bytes) -> None: ...
    async def close(self, *, reset: bool) -> None: ...
    def gate(self, name: str) -> trio.Event: ...


class Step(Protocol):
    async def run(self, wire: Wire) -> None: ...


Answer: TypeAlias = Step | Sequence["Answer"]


@attrs.frozen
class Head:
    status: int
    headers: dict[str, str]

    async def run(self, wire: Wire) -> None:
        await wire.send_head(self.status, self.headers)


@attrs.frozen
class Body:
    """Bytes of the body in one TCP write; each part is an HTTP chunk of its own."""

    parts: tuple[bytes, ...]

    @property
    def data(self) -> bytes:
        return b"".join(self.parts)

    async def run(self, wire: Wire) -> None:
        await wire.send_body(self.parts)


@attrs.frozen
class Unframed:
    data: bytes

    async def run(self, wire: Wire) -> None:
        await wire.send_unframed(self.data)


@attrs.frozen
class Pause:
    event: trio.Event | str

    async def run(self, wire: Wire) -> None:
        event = wire.gate(self.event) if isinstance(self.event, str) else self.event
        await event.wait()


@attrs.frozen
class Sleep:
    seconds: float

    async def run(self, wire: Wire) -> None:
        await trio.sleep(self.seconds)


@attrs.frozen
class Close:
    reset: bool

    async def run(self, wire: Wire) -> None:
        await wire.close(reset=self.reset)


def flatten(answer: Answer) -> Iterator[Step]:
    """The steps of an answer in order. Raises `TypeError` for a list in a list: that is two answers."""
    if not isinstance(answer, list | tuple):
        yield answer  # type: ignore[misc]
        return
    for item in answer:
        if isinstance(item, list):
            raise TypeError("a list within an answer: pass each answer as an argument of its own")
        yield from flatten(item)


# Time and the connection.


def pause(event: trio.Event | str) -> Step:
    """Silent until the event is set; a name stands for ``upstream.gate(name)``."""
    return Pause(event)


def sleep(seconds: float) -> Step:
    """For use by hand; a test has `pause`."""
    return Sleep(seconds)


def hang() -> Step:
    """Silent until the peer closes the connection."""
    return Sleep(float("inf"))


def drop() -> Step:
    """Ends the connection where it is (FIN), with the body unfinished. Nothing may follow."""
    return Close(reset=False)


def reset() -> Step:
    """Breaks the connection off (RST). Nothing may follow."""
    return Close(reset=True)


# HTTP.


def head(status: int = 200, content_type: str = EVENT_STREAM, headers: dict[str, str] | None = None) -> Step:
    """Status line and headers. Without a ``Content-Length`` among them, the body is chunked."""
    return Head(status, {"Content-Type": content_type} | (headers or {}))


def status(
    code: int, body: Any = b"", *, headers: dict[str, str] | None = None, content_type: str = "application/json"
) -> Answer:
    """A whole answer that is not a stream. ``body``: bytes or a string as they are, anything else as JSON."""
    if isinstance(body, str):
        body = body.encode()
    data = body if isinstance(body, bytes) else _encode(body)
    length = {"Content-Length": str(len(data))}
    return (head(code, content_type, length | (headers or {})), Body((data,)))


def raw(data: bytes) -> Body:
    """Any bytes, as a piece of the body."""
    return Body((data,))


def unframed(data: bytes) -> Step:
    """Any bytes in place of HTTP: no head is sent for them, no chunk made of them."""
    return Unframed(data)


def half_chunk(data: bytes) -> Step:
    """An HTTP chunk that says it is longer than it is. `head` has to come before, `drop` or `hang` after."""
    return unframed(b"%x\r\n%b" % (len(data) + 100, data))


def split(size: int, *steps: Answer) -> Answer:
    """The same body in writes of ``size`` bytes, wherever events, lines and characters end."""

    def cut(run: Iterable[Body]) -> Iterator[Body]:
        data = b"".join(body.data for body in run)
        return (raw(data[start : start + size]) for start in range(0, len(data), size))

    return _regroup(steps, cut)


def together(*steps: Answer) -> Answer:
    """The same HTTP chunks, but all that nothing separates in a single TCP write."""
    return _regroup(steps, lambda run: [Body(tuple(part for body in run for part in body.parts))])


def crlf(*steps: Answer) -> Answer:
    """The same body with CRLF line ends."""
    return _regroup(steps, lambda run: [raw(body.data.replace(b"\n", b"\r\n")) for body in run])


def _regroup(steps: Sequence[Answer], change: Callable[[Iterable[Any]], Iterable[Step]]) -> tuple[Step, ...]:
    """Passes every run of body steps through ``change`` and leaves the other steps where they are."""
    runs = itertools.groupby(flatten(steps), lambda step: isinstance(step, Body))
    return tuple(step for is_body, run in runs for step in (change(run) if is_body else run))


# Server-sent events.


def sse(data: Any, *, space: bool = True, multiline: bool = False) -> Body:
    """One event with ``data`` as JSON; without the optional space, or with one ``data:`` a line."""
    lines = _encode(data, indent=1 if multiline else None).split(b"\n")
    prefix = b"data: " if space else b"data:"
    return raw(b"".join(prefix + line + b"\n" for line in lines) + b"\n")


def done() -> Body:
    return raw(b"data: [DONE]\n\n")


def comment(words: str = "keep-alive") -> Body:
    return raw(f": {words}\n\n".encode())


def bom() -> Body:
    return raw(b"\xef\xbb\xbf")


def _encode(data: Any, indent: int | None = None) -> bytes:
    """JSON in UTF-8. A lone surrogate has no UTF-8 and so becomes its escape, as providers send it."""
    return json.dumps(data, ensure_ascii=False, indent=indent).encode("utf-8", "backslashreplace")


# Chat completions.


def tokens(prompt: int = 7, completion: int = 3) -> dict[str, int]:
    """A usage object."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def chunk(delta: Any = ABSENT, finish_reason: str | None = None, **fields: Any) -> dict[str, Any]:
    """A chunk of a stream. ``fields`` adds to it or replaces: ``chunk(choices=None)``, ``chunk(usage=…)``."""
    choice: dict[str, Any] = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    if delta is ABSENT:
        del choice["delta"]
    frame = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1_700_000_000}
    return frame | {"model": "scripted", "choices": [choice]} | fields


def tool_delta(
    *,
    index: Any = ABSENT,
    id: Any = ABSENT,  # noqa: A002
    type: Any = "function",  # noqa: A002
    name: Any = ABSENT,
    arguments: Any = ABSENT,
) -> dict[str, Any]:
    """An entry of ``delta.tool_calls`` with just the fields that are given."""
    function = _present(name=name, arguments=arguments)
    return _present(index=index, id=id, type=type, function=function)


def _present(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not ABSENT}


def tool_chunk(*deltas: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    """A chunk with these entries in ``delta.tool_calls``."""
    return chunk({"tool_calls": list(deltas)}, finish_reason)


def text(*pieces: str) -> Answer:
    return tuple(sse(chunk({"content": piece})) for piece in pieces)


def reasoning(*pieces: str, field: str = "reasoning_content") -> Answer:
    return tuple(sse(chunk({"content": None, field: piece})) for piece in pieces)


def tool_call(index: int, id: str, name: str, *arguments: str | dict[str, Any]) -> Answer:  # noqa: A002
    """A call as OpenAI streams it: id and name first, then each piece of the arguments (an object as JSON)."""
    pieces = [piece if isinstance(piece, str) else json.dumps(piece) for piece in arguments]
    first = tool_delta(index=index, id=id, name=name, arguments="")
    rest = [tool_delta(index=index, type=ABSENT, arguments=piece) for piece in pieces]
    return tuple(sse(tool_chunk(delta)) for delta in (first, *rest))


def finish(reason: str | None = "stop", usage: dict[str, int] | None = None) -> Body:
    """The chunk with the finish reason, which some providers give the usage as well."""
    return sse(chunk({}, reason) if usage is None else chunk({}, reason, usage=usage))


def usage(count: dict[str, int] | None = None) -> Body:
    """The usage as OpenAI sends it: last, in a chunk without choices."""
    return sse(chunk(choices=[], usage=count or tokens()))


def error(message: str = "the model is overloaded", **fields: Any) -> Body:
    """An error in mid-stream; OpenRouter's has ``code=429``."""
    return sse({"error": {"message": message, **fields}})


def reply(*pieces: str, reason: str = "stop") -> Answer:
    """A whole good answer of text."""
    return (text(*pieces), finish(reason), usage(), done())


def calls(*tool_calls: Answer, reason: str = "tool_calls") -> Answer:
    """A whole good answer of tool calls."""
    return (*tool_calls, finish(reason), usage(), done())


def completion(content: str = "Hello") -> dict[str, Any]:
    """The body of an answer by a server that does not stream although it was asked to."""
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return {"id": "chatcmpl-1", "object": "chat.completion", "choices": [choice], "usage": tokens()}
