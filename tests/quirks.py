"""What compatible providers really stream, as ready-made answers with what a reader should make of them.

`QUIRKS` are ways to send tool calls, `STREAMS` ways to send a stream of text. Nothing here is invented for
its own sake: an entry stands for servers that do so, or for a way in which connections and models fail.
"""

from __future__ import annotations

from typing import Any, Literal

import attrs

from tests.answers import (
    ABSENT,
    Answer,
    bom,
    chunk,
    comment,
    crlf,
    done,
    drop,
    error,
    finish,
    half_chunk,
    head,
    raw,
    reply,
    reset,
    split,
    sse,
    status,
    text,
    together,
    tokens,
    tool_chunk,
    tool_delta,
    usage,
)


@attrs.frozen
class ExpectedCall:
    """``id`` is ``None`` where the provider sent none that can be used: then any that is not empty and is unique.

    With ``problem`` the arguments are not a JSON object, and the model has to be told so.
    """

    name: str
    parameters: dict[str, Any] = attrs.field(factory=dict)
    id: str | None = None
    problem: bool = False


@attrs.frozen
class Quirk:
    """The chunks of one model message and the calls in it, in order.

    With a ``finish_reason`` of ``length`` the message was cut off, and no call of it may be carried out.
    """

    chunks: tuple[dict[str, Any], ...]
    calls: tuple[ExpectedCall, ...]
    finish_reason: str = "tool_calls"

    @property
    def answer(self) -> Answer:
        return (*map(sse, self.chunks), usage(), done())


BERLIN = {"city": "Berlin"}
PARIS = {"city": "Paris"}
BERLIN_JSON = '{"city": "Berlin"}'
PARIS_JSON = '{"city": "Paris"}'


def _quirk(
    *chunks: dict[str, Any] | tuple[dict[str, Any], ...], calls: list[ExpectedCall], finish: str = "tool_calls"
) -> Quirk:
    """A chunk may be given as the tuple of its tool-call deltas."""
    wire = [tool_chunk(*item) if isinstance(item, tuple) else item for item in chunks]
    return Quirk((*wire, chunk({}, finish)), tuple(calls), finish)


def _one(*deltas: dict[str, Any], finish: str = "tool_calls", **expected: Any) -> Quirk:
    """One call of ``weather``, each delta in a chunk of its own."""
    call = ExpectedCall("weather", **{"parameters": BERLIN, "id": "call_1"} | expected)
    return _quirk(*((delta,) for delta in deltas), calls=[call], finish=finish)


def _whole(arguments: Any = BERLIN_JSON, **fields: Any) -> dict[str, Any]:
    return tool_delta(**{"index": 0, "id": "call_1", "name": "weather", "arguments": arguments} | fields)


def _more(arguments: str, **fields: Any) -> dict[str, Any]:
    """A delta that goes on with the first call."""
    return tool_delta(**{"index": 0, "type": ABSENT, "arguments": arguments} | fields)


BOTH = [ExpectedCall("weather", BERLIN, "call_1"), ExpectedCall("time", PARIS, "call_2")]
BOTH_WITHOUT_ID = [ExpectedCall("weather", BERLIN), ExpectedCall("time", PARIS)]
SAME_TOOL_WITHOUT_ID = [ExpectedCall("weather", BERLIN), ExpectedCall("weather", PARIS)]


def _second(arguments: str = PARIS_JSON, **fields: Any) -> dict[str, Any]:
    return tool_delta(**{"index": 1, "id": "call_2", "name": "time", "arguments": arguments} | fields)


QUIRKS: dict[str, Quirk] = {
    "as OpenAI does": _one(_whole(""), _more('{"city":'), _more(' "Berlin"}')),
    "whole in one chunk": _one(_whole()),
    "finish reason in the chunk of the call": Quirk(
        (tool_chunk(_whole(), finish_reason="tool_calls"),), (ExpectedCall("weather", BERLIN, "call_1"),)
    ),
    "finish reason stop": _one(_whole(), finish="stop"),
    "after text": _quirk(
        chunk({"role": "assistant", "content": "Let me see.", "tool_calls": None}),
        (_whole(),),
        calls=[ExpectedCall("weather", BERLIN, "call_1")],
    ),
    "two, interleaved by index": _quirk(
        (_whole(""),),
        (_second(""),),
        (_more('{"city":'),),
        (_more('{"city":', index=1),),
        (_more(' "Berlin"}'), _more(' "Paris"}', index=1)),
        calls=BOTH,
    ),
    "index counts from one and leaves gaps": _quirk((_whole(index=1),), (_second(index=3),), calls=BOTH),
    "index is a string": _quirk(
        (_whole('{"city":', index="0"),),
        (_more(' "Berlin"}', index="0"),),
        (_second(index="1"),),
        calls=BOTH,
    ),
    "index in the first delta only": _one(_whole('{"city":'), _more(' "Berlin"}', index=ABSENT)),
    "index is null": _quirk((_whole(index=None),), (_second(index=None),), calls=BOTH),
    "no index": _quirk(
        (_whole("", index=ABSENT),),
        (_more(BERLIN_JSON, index=ABSENT),),
        (_second("", index=ABSENT),),
        (_more(PARIS_JSON, index=ABSENT),),
        calls=BOTH,
    ),
    "no index, id in each delta": _quirk(
        (_whole("", index=ABSENT),),
        (_more(BERLIN_JSON, index=ABSENT, id="call_1"),),
        (_second("", index=ABSENT),),
        (_more(PARIS_JSON, index=ABSENT, id="call_2"),),
        calls=BOTH,
    ),
    "no index, two whole in one chunk": _quirk((_whole(index=ABSENT), _second(index=ABSENT)), calls=BOTH),
    "no index and no id, two whole in one chunk": _quirk(
        (_whole(index=ABSENT, id=ABSENT), _second(index=ABSENT, id=ABSENT)), calls=BOTH_WITHOUT_ID
    ),
    "two whole in one chunk": _quirk((_whole(), _second()), calls=BOTH),
    "all index 0, ids differ": _quirk(
        (_whole('{"city":'),), (_more(' "Berlin"}'),), (_second("", index=0),), (_more(PARIS_JSON),), calls=BOTH
    ),
    "all index 0, ids differ, id in each delta": _quirk(
        (_whole('{"city":'),),
        (_more(' "Berlin"}', id="call_1"),),
        (_second("", index=0),),
        (_more(PARIS_JSON, id="call_2"),),
        calls=BOTH,
    ),
    "all index 0, no id, names differ": _quirk(
        (_whole("", id=ABSENT),),
        (_more(BERLIN_JSON),),
        (_second("", index=0, id=ABSENT),),
        (_more(PARIS_JSON),),
        calls=BOTH_WITHOUT_ID,
    ),
    "all index 0, no id, names differ, the first without arguments": _quirk(
        (_whole("", id=ABSENT),),
        (_second(index=0, id=ABSENT),),
        calls=[ExpectedCall("weather"), ExpectedCall("time", PARIS)],
    ),
    "all index 0, no id, the same tool twice, each whole": _quirk(
        (_whole(id=ABSENT),), (_whole(PARIS_JSON, id=ABSENT),), calls=SAME_TOOL_WITHOUT_ID
    ),
    "no id": _quirk((_whole(id=ABSENT),), (_second(id=ABSENT),), calls=BOTH_WITHOUT_ID),
    "id is null": _quirk((_whole(id=None),), (_second(id=None),), calls=BOTH_WITHOUT_ID),
    "id is empty": _quirk((_whole(id=""),), (_second(id=""),), calls=BOTH_WITHOUT_ID),
    "id is empty after the first delta": _one(_whole('{"city":'), _more(' "Berlin"}', id="")),
    "id in each delta": _one(_whole('{"city":'), _more(' "Berlin"}', id="call_1")),
    "the same id for two calls": _quirk(
        (_whole(),), (_second(id="call_1"),), calls=[BOTH[0], ExpectedCall("time", PARIS)]
    ),
    "name in each delta": _one(
        _whole("", id="call_1"),
        _more('{"city":', id="call_1", name="weather"),
        _more(' "Berlin"}', id="call_1", name="weather"),
    ),
    "name in each delta, id in the first only": _one(
        _whole('{"ci'), _more('ty":', name="weather"), _more(' "Berlin"}', name="weather")
    ),
    "name is empty after the first delta": _one(_whole('{"city":'), _more(' "Berlin"}', name="")),
    "name in the second delta": _one(_whole(ABSENT, name=ABSENT), _more(BERLIN_JSON, name="weather")),
    "name is null in the first delta": _one(_whole("", name=None), _more(BERLIN_JSON, name="weather")),
    "no type": _one(_whole(type=ABSENT)),
    "arguments empty": _one(_whole(""), parameters={}),
    "arguments null": _one(_whole(None), parameters={}),
    "arguments missing": _one(_whole(ABSENT), parameters={}),
    "arguments an object": _one(_whole(BERLIN)),
    "arguments in white space": _one(_whole(' \r\n{"city":  "Berlin"}\n ')),
    "arguments cut within an escape": _one(
        _whole('{"city": "M\\u00'), _more('fcnchen"}'), parameters={"city": "München"}
    ),
    "arguments not JSON": _one(_whole("city=Berlin"), parameters={}, problem=True),
    "arguments an array": _one(_whole('["Berlin"]'), parameters={}, problem=True),
    "arguments a string": _one(_whole('"Berlin"'), parameters={}, problem=True),
    "arguments twice": _one(_whole(), _more(BERLIN_JSON), parameters={}, problem=True),
    "arguments with NaN": _one(_whole('{"city": NaN}'), parameters={}, problem=True),
    "arguments end early": _one(_whole('{"city": "Ber'), parameters={}, problem=True),
    "arguments cut off by the length": _one(_whole('{"city": "Ber'), finish="length", parameters={}, problem=True),
    "second call cut off by the length": _quirk(
        (_whole(),),
        (_second('{"city": "Pa'),),
        calls=[BOTH[0], ExpectedCall("time", id="call_2", problem=True)],
        finish="length",
    ),
}


@attrs.frozen
class Stream:
    """An answer of text and how it ends.

    ``completed``: well. ``broken``: it must not pass for a complete answer. ``either``: a reader may ignore what
    is odd or refuse it, but nothing else may come of it. ``text`` is what came, before the break too; ``None``
    where lone surrogates may be replaced or joined, as long as what comes out can be encoded.
    """

    answer: Answer
    outcome: Literal["completed", "broken", "either"] = "completed"
    text: str | None = "Hello"


HELLO = text("Hel", "lo")
END = (finish(), done())
LINE = sse(chunk({"content": "Grüße"})).data

STREAMS: dict[str, Stream] = {
    "plain": Stream(reply("Hel", "lo")),
    "role first": Stream((sse(chunk({"role": "assistant", "content": ""})), reply("Hello"))),
    "a byte at a time": Stream(split(1, reply("Grüße 😀")), text="Grüße 😀"),
    "seven bytes at a time": Stream(split(7, reply("Grüße 😀")), text="Grüße 😀"),
    "many HTTP chunks in one write": Stream(together(reply("Hel", "lo"))),
    "one HTTP chunk": Stream(split(1_000_000, reply("Hel", "lo"))),
    "line ends CRLF": Stream(crlf(reply("Hel", "lo"))),
    "line ends CRLF, a byte at a time": Stream(split(1, crlf(reply("Hel", "lo")))),
    "comments": Stream((comment(), text("Hel"), comment(), raw(b":\n\n"), reply("lo"))),
    "other SSE fields": Stream((raw(b"event: message\nid: 1\nretry: 10\n"), reply("Hello"))),
    "no space after data": Stream((sse(chunk({"content": "Hello"}), space=False), END)),
    "an event of many lines": Stream((sse(chunk({"content": "Hello"}), multiline=True), END)),
    "byte order mark": Stream((bom(), reply("Hello"))),
    "no blank line at the end": Stream((HELLO, finish(), raw(b"data: [DONE]"))),
    "no choices": Stream((sse({"id": "chatcmpl-1"}), reply("Hello"))),
    "choices empty": Stream((sse(chunk(choices=[])), reply("Hello"))),
    "choices null": Stream((sse(chunk(choices=None)), reply("Hello"))),
    "delta null": Stream((sse(chunk(None)), reply("Hello"))),
    "no delta": Stream((sse(chunk()), reply("Hello"))),
    "content null": Stream((sse(chunk({"content": None})), reply("Hello"))),
    "usage in every chunk": Stream(
        (
            sse(chunk({"content": "Hel"}, usage=tokens(7, 1))),
            sse(chunk({"content": "lo"}, usage=tokens(7, 2))),
            finish(usage=tokens(7, 3)),
            done(),
        )
    ),
    "finish reason in the last chunk of text": Stream((text("Hel"), sse(chunk({"content": "lo"}, "stop")), done())),
    "finish reason empty until the end": Stream((sse(chunk({"content": "Hello"}, "")), END)),
    "no [DONE]": Stream((HELLO, finish())),
    "chunks after [DONE]": Stream((reply("Hel", "lo"), text(" and more"))),
    "a huge chunk": Stream(reply("x" * 1_000_000), text="x" * 1_000_000),
    "NUL characters": Stream(reply("a\0b"), text="a\0b"),
    "lone surrogate": Stream(reply("a\ud83db"), text=None),
    "surrogate pair over two chunks": Stream(reply("a\ud83d", "\ude00b"), text=None),
    "data null": Stream((sse(None), reply("Hello")), "either"),
    "data an array": Stream((sse([]), reply("Hello")), "either"),
    "not JSON": Stream((HELLO, raw(b"data: {nonsense\n\n"), END), "broken"),
    "not UTF-8": Stream((HELLO, raw(b'data: {"choices": "\xff\xfe"}\n\n'), END), "broken"),
    "error in mid-stream": Stream((HELLO, error()), "broken"),
    "error in mid-stream, with code": Stream((HELLO, error(code=429), done()), "broken"),
    "error beside choices": Stream((HELLO, sse(chunk({}, "error", error={"message": "down"})), done()), "broken"),
    "no finish reason": Stream((HELLO, done()), "broken"),
    "no finish reason, no [DONE]": Stream(HELLO, "broken"),
    "nothing": Stream((), "broken", ""),
    "only [DONE]": Stream(done(), "broken", ""),
    "empty body": Stream(status(200), "broken", ""),
    "HTML": Stream(status(200, "<html>Welcome</html>", content_type="text/html"), "broken", ""),
    "dropped before the headers": Stream(drop(), "broken", ""),
    "dropped after the headers": Stream((head(), drop()), "broken", ""),
    "dropped between events": Stream((HELLO, drop()), "broken"),
    "dropped after the finish reason": Stream((HELLO, finish(), drop()), "either"),
    "dropped within a line": Stream((HELLO, raw(LINE[:20]), drop()), "broken"),
    "dropped within a character": Stream((HELLO, raw(LINE[: LINE.index(b"\xc3") + 1]), drop()), "broken"),
    "dropped within an HTTP chunk": Stream((HELLO, half_chunk(LINE[:20]), drop()), "broken"),
    "reset before the headers": Stream(reset(), "broken", ""),
    "reset after the headers": Stream((head(), reset()), "broken", ""),
    "reset between events": Stream((HELLO, reset()), "broken"),
}
