"""The scripted upstream does to a real HTTP client what its scripts say."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
import trio

from tests.answers import (
    ABSENT,
    Answer,
    Body,
    calls,
    chunk,
    crlf,
    done,
    drop,
    flatten,
    half_chunk,
    hang,
    head,
    pause,
    raw,
    reply,
    reset,
    split,
    sse,
    status,
    text,
    together,
    tool_call,
    tool_delta,
    unframed,
)
from tests.harness import PATIENCE
from tests.quirks import QUIRKS, STREAMS
from tests.scenarios import call_tool, example
from tests.upstream import Request, Script, Upstream, open_upstream

BODY = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "stream": True}


@contextlib.asynccontextmanager
async def opened(*answers: Script) -> AsyncIterator[Upstream]:
    """An upstream that gives up when the test hangs."""
    with trio.fail_after(PATIENCE):
        async with open_upstream(*answers) as upstream:
            yield upstream


@contextlib.asynccontextmanager
async def client_of(upstream: Upstream) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(base_url=upstream.base_url, timeout=None, trust_env=False) as client:
        yield client


async def post(upstream: Upstream, body: dict[str, Any] = BODY) -> httpx2.Response:
    async with client_of(upstream) as client:
        return await client.post("/chat/completions", json=body, headers={"Authorization": "Bearer key"})


async def send_by_hand(upstream: Upstream, headers: bytes = b"") -> trio.SocketStream:
    """A connection on which a request has been sent and nothing of the answer been read."""
    stream = await trio.open_tcp_stream("127.0.0.1", httpx2.URL(upstream.base_url).port or 0)
    body = json.dumps(BODY).encode()
    start = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n" % len(body)
    await stream.send_all(start + headers + b"\r\n" + body)
    return stream


async def read_until_broken(upstream: Upstream) -> tuple[bytes, type[Exception] | None]:
    """The body as far as it came, and the exception that ended it."""
    received = bytearray()
    async with client_of(upstream) as client:
        try:
            async with client.stream("POST", "/chat/completions", json=BODY) as response:
                async for data in response.aiter_raw():
                    received += data
        except httpx2.TransportError as error:
            return bytes(received), type(error)
    return bytes(received), None


def body_of(*answer: Answer) -> bytes:
    return b"".join(step.data for step in flatten(answer) if isinstance(step, Body))


async def test_a_reply_arrives_as_server_sent_events() -> None:
    async with opened(reply("Hel", "lo")) as upstream:
        response = await post(upstream)
    assert (response.status_code, response.headers["content-type"]) == (200, "text/event-stream")
    *events, last, rest = response.text.split("\n\n")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert [item["choices"][0]["delta"] for item in chunks[:-1]] == [{"content": "Hel"}, {"content": "lo"}, {}]
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert (chunks[-1]["choices"], chunks[-1]["usage"]["total_tokens"]) == ([], 10)
    assert (last, rest) == ("data: [DONE]", "")


async def test_a_request_is_recorded_with_its_body_and_headers() -> None:
    async with opened(reply()) as upstream:
        await post(upstream, BODY | {"max_tokens": 5})
        request = await upstream.wait_for_requests(1)
    assert request.path == "/v1/chat/completions"
    assert request.headers["authorization"] == "Bearer key"
    assert (request.body["max_tokens"], request.messages, request.tools) == (5, BODY["messages"], [])
    assert request.finished.is_set()
    assert request.complete


async def test_a_status_carries_its_headers_and_body() -> None:
    async with opened(
        status(429, {"error": {"message": "slow"}}, headers={"Retry-After": "1"}),
        status(200, "<html>", content_type="text/html"),
        status(200),
    ) as upstream:
        limited, page, empty = [await post(upstream) for _ in range(3)]
    assert (limited.status_code, limited.headers["retry-after"]) == (429, "1")
    assert limited.json() == {"error": {"message": "slow"}}
    assert (page.text, page.headers["content-type"]) == ("<html>", "text/html")
    assert (empty.status_code, empty.content) == (200, b"")


async def test_answers_are_given_in_order_and_then_the_script_is_used_up() -> None:
    async with opened(status(500), reply("one")) as upstream:
        codes = [(await post(upstream)).status_code for _ in range(3)]
        upstream.script(status(503))
        codes.append((await post(upstream)).status_code)
    assert codes == [500, 200, 418, 503]


async def test_a_function_answers_every_request_from_what_is_in_it() -> None:
    def answer(request: Request) -> Answer:
        return reply("it is " + request.messages[-1]["content"])

    async with opened(status(500), answer) as upstream:
        await post(upstream)
        replies = [
            (await post(upstream, {"messages": [{"role": "tool", "content": result}]})).text
            for result in ("one", "two")
        ]
    assert "it is one" in replies[0]
    assert "it is two" in replies[1]


async def test_other_routes_are_not_requests() -> None:
    async with opened() as upstream, client_of(upstream) as client:
        assert (await client.get("/models")).json()["data"][0]["id"] == "scripted"
        assert (await client.post("/completions", json={})).status_code == 404
        assert upstream.requests == []


async def test_connections_are_kept_alive_and_counted() -> None:
    async with opened(reply("a"), status(500), reply("b")) as upstream:
        async with client_of(upstream) as client:
            for _ in range(3):
                await client.post("/chat/completions", json=BODY)
            assert len(upstream.connections) == 1
            assert not upstream.requests[0].closed.is_set()
        await upstream.connections[0].closed.wait()
        assert all(request.closed.is_set() for request in upstream.requests)
        await post(upstream)
        assert len(upstream.connections) == 2


async def test_a_connection_ends_with_its_answer_when_the_client_asks_for_it() -> None:
    async with opened(reply("a")) as upstream, await send_by_hand(upstream, b"Connection: close\r\n") as stream:
        received = b"".join([data async for data in stream])
    assert received.endswith(b"\r\n0\r\n\r\n")


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(hang(), id="before the headers"),
        pytest.param([head(), hang()], id="before the first token"),
        pytest.param([text("a"), pause("never set"), text("b")], id="in mid-stream"),
    ],
)
async def test_closing_is_seen_while_the_script_is_silent(answer: Answer) -> None:
    async with opened(answer) as upstream:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read_until_broken, upstream)
            request = await upstream.wait_for_requests(1)
            await trio.testing.wait_all_tasks_blocked()
            assert not request.closed.is_set()
            assert not request.finished.is_set()
            nursery.cancel_scope.cancel()
        await request.closed.wait()
        await request.finished.wait()
        assert not request.complete


async def test_closing_is_seen_while_the_script_sends_more_than_anyone_reads() -> None:
    too_much = raw(b"x" * 50_000_000)
    async with opened(too_much) as upstream, client_of(upstream) as client:
        async with client.stream("POST", "/chat/completions", json=BODY):
            await trio.testing.wait_all_tasks_blocked()
            assert not upstream.requests[0].finished.is_set()
        await upstream.requests[0].closed.wait()
        await upstream.requests[0].finished.wait()


async def test_gates_release_an_answer_step_by_step() -> None:
    event = trio.Event()
    answer = [text("a"), pause("gate"), text("b"), pause(event), done()]
    async with (
        opened(answer) as upstream,
        client_of(upstream) as client,
        client.stream("POST", "/chat/completions", json=BODY) as response,
    ):
        stream = response.aiter_raw()
        assert await anext(stream) == body_of(text("a"))
        upstream.gate("gate").set()
        assert await anext(stream) == body_of(text("b"))
        event.set()
        assert [data async for data in stream] == [body_of(done())]


@pytest.mark.parametrize(
    ("answer", "received", "error"),
    [
        (drop(), b"", httpx2.RemoteProtocolError),
        ([head(), drop()], b"", httpx2.RemoteProtocolError),
        ([text("a"), drop()], body_of(text("a")), httpx2.RemoteProtocolError),
        ([raw("ü".encode()[:1]), drop()], b"\xc3", httpx2.RemoteProtocolError),
        ([head(), half_chunk(b"data: {"), drop()], b"data: {", httpx2.RemoteProtocolError),
        (reset(), b"", httpx2.ReadError),
        ([head(), reset()], b"", httpx2.ReadError),
    ],
)
async def test_a_connection_breaks_where_the_script_says(
    answer: Answer, received: bytes, error: type[Exception]
) -> None:
    async with opened(answer) as upstream:
        assert await read_until_broken(upstream) == (received, error)
        await upstream.requests[0].finished.wait()
        await upstream.requests[0].closed.wait()
        assert upstream.requests[0].complete


async def test_an_answer_need_not_be_http() -> None:
    async with opened([unframed(b"220 mail.example ESMTP\r\n\r\n"), hang()]) as upstream:
        assert await read_until_broken(upstream) == (b"", httpx2.RemoteProtocolError)


async def test_a_body_is_split_or_joined_to_the_byte() -> None:
    whole = body_of(reply("ü"))
    sizes = []
    answers = (split(1, reply("ü")), together(reply("ü")), split(10**6, reply("ü")))
    async with opened(*answers) as upstream, client_of(upstream) as client:
        for _ in answers:
            async with client.stream("POST", "/chat/completions", json=BODY) as response:
                parts = [data async for data in response.aiter_raw()]
            assert b"".join(parts) == whole
            sizes.append(len(parts))
    assert sizes == [len(whole), 4, 1]


async def test_joined_chunks_are_still_chunks_of_their_own() -> None:
    first, second = body_of(text("a")), body_of(text("b"))
    async with opened(together(text("a", "b"))) as upstream, await send_by_hand(upstream) as stream:
        received = bytearray()
        while not received.endswith(b"0\r\n\r\n"):
            received += await stream.receive_some()
    assert b"%x\r\n%b\r\n%x\r\n%b\r\n" % (len(first), first, len(second), second) in received


def test_line_ends_become_crlf_and_nothing_else_changes() -> None:
    assert body_of(crlf(text("a"), done())) == body_of(text("a"), done()).replace(b"\n", b"\r\n")


def test_half_a_chunk_says_it_is_longer_than_it_is() -> None:
    assert half_chunk(b"abc") == unframed(b"67\r\nabc")


def test_lone_surrogates_and_nul_are_escaped_and_other_characters_are_not() -> None:
    assert b'"a\\ud83d\\u0000\xc3\xbc"' in sse(chunk({"content": "a\ud83d\0ü"})).data


def test_a_list_in_an_answer_is_refused_for_it_would_be_two_answers() -> None:
    with pytest.raises(TypeError, match="argument of its own"):
        list(flatten([[text("a")], [text("b")]]))


def test_fields_that_are_absent_are_not_sent_and_null_is() -> None:
    assert tool_delta(id=None, name="f", type=ABSENT) == {"id": None, "function": {"name": "f"}}
    assert "delta" not in chunk()["choices"][0]
    assert chunk(None)["choices"][0]["delta"] is None


def test_a_tool_call_comes_in_pieces() -> None:
    events = body_of(calls(tool_call(0, "call_1", "f", '{"a":', "1}"))).split(b"\n\n")
    deltas = [json.loads(event[6:])["choices"][0]["delta"]["tool_calls"][0] for event in events[:3]]
    assert [delta["function"].get("arguments") for delta in deltas] == ["", '{"a":', "1}"]
    assert [delta.get("id") for delta in deltas] == ["call_1", None, None]


async def test_a_quirk_is_a_whole_stream_that_names_every_tool() -> None:
    async with opened(*(quirk.answer for quirk in QUIRKS.values())) as upstream:
        for name, quirk in QUIRKS.items():
            body, error = await read_until_broken(upstream)
            assert (error, body.endswith(b"data: [DONE]\n\n")) == (None, True), name
            assert all(call.name.encode() in body and not (call.problem and call.parameters) for call in quirk.calls)


async def test_a_stream_breaks_off_exactly_when_it_is_called_broken_off() -> None:
    async with opened(*(stream.answer for stream in STREAMS.values())) as upstream:
        for name in STREAMS:
            _, error = await read_until_broken(upstream)
            assert (error is not None) == name.startswith(("dropped", "reset")), name


def test_a_made_up_value_fits_its_schema() -> None:
    city = {"type": "string", "enum": ["Berlin"]}
    properties = {"city": city, "days": {"type": "integer"}, "unit": {"type": "string", "examples": ["C"]}}
    schema = {"type": "object", "properties": properties}
    assert example(schema) == {"city": "Berlin", "days": 1, "unit": "C"}
    assert example({}) == {}


async def test_the_tool_scenario_plays_a_whole_conversation() -> None:
    tools = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}]
    async with opened(lambda request: call_tool(request, rate=1e6)) as upstream:
        first = await post(upstream, BODY | {"tools": tools})
        result = {"role": "tool", "tool_call_id": "call_1", "content": "noon"}
        second = await post(upstream, BODY | {"tools": tools, "messages": [{"role": "user", "content": "Hi"}, result]})
    assert '"name": "now"' in first.text
    assert "noon" in second.text
