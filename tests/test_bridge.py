"""`inference_trio.bridge`: against a scripted transport, and with a real ChatOpenAI over loopback sockets."""

from __future__ import annotations

import gc
import gzip
import itertools
import json
import math
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeVar

import httpx2
import openai
import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

from inference_trio import bridge
from inference_trio.bridge import MAX_UNREAD_BYTES, MAX_UNRECEIVED_ITEMS, TrioTransport, stream_in_thread

URL = "http://upstream.test/"

T = TypeVar("T")

Step = bytes | trio.Event | Exception
"""One step of a scripted body: send these bytes, wait for this event, or fail with this error."""


class ScriptedBody(httpx2.AsyncByteStream):
    def __init__(self, steps: tuple[Step, ...], transport: ScriptedTransport) -> None:
        self.steps = steps
        self.transport = transport

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for step in self.steps:
            await trio.lowlevel.checkpoint()
            if isinstance(step, bytes):
                self.transport.bytes_read += len(step)
                yield step
            elif isinstance(step, trio.Event):
                await step.wait()
            else:
                raise step

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()  # a close that is not shielded from a cancel does not get beyond this
        self.transport.open -= 1


class ScriptedTransport(httpx2.AsyncBaseTransport):
    """Answers every request with the same steps, once ``answer`` is set."""

    def __init__(self, *steps: Step, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.steps = steps
        self.status = status
        self.headers = headers
        self.requests: list[httpx2.Request] = []
        self.requested = trio.Event()
        self.answer = trio.Event()
        self.answer.set()
        self.failure: Exception | None = None
        self.open = 0
        self.bytes_read = 0

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        self.requested.set()
        await self.answer.wait()
        if self.failure is not None:
            raise self.failure
        self.open += 1
        return httpx2.Response(self.status, headers=self.headers, stream=ScriptedBody(self.steps, self))


class Sink:
    """A ``receive`` that keeps what it gets, once its gate (if it has one) is open.

    ``entered`` says that it was called; ``full`` that it is blocked, and the thread has no room either, for an
    iterator that went through `fill`.
    """

    def __init__(self, gate: trio.Event | None = None) -> None:
        self.items: list[Any] = []
        self.entered = trio.Event()
        self.entered_for_thread = threading.Event()
        self.full = trio.Event()
        self.gate = gate

    def fill(self, iterator: Iterator[T]) -> Iterator[T]:
        for i, item in enumerate(iterator):
            if i == 1:
                self.entered_for_thread.wait()  # so that the first item is a batch of its own
            if i == 1 + MAX_UNRECEIVED_ITEMS:
                trio.from_thread.run_sync(self.full.set)
            yield item

    async def __call__(self, batch: list[Any]) -> None:
        assert batch
        self.entered.set()
        self.entered_for_thread.set()
        if self.gate is not None:
            await self.gate.wait()
        self.items += batch


def lines(transport: httpx2.AsyncBaseTransport) -> Callable[[], Iterator[str]]:
    """What a provider's client does in small: an item for every line that is no comment."""
    client = httpx2.Client(transport=TrioTransport(transport))

    def iterate() -> Iterator[str]:
        with client.stream("POST", URL, json={"stream": True}) as response:
            for line in response.iter_lines():
                if not line.startswith(":"):
                    yield line

    return iterate


def limiter() -> trio.CapacityLimiter:
    return trio.CapacityLimiter(200)


async def stream_until(
    reached: trio.Event,
    iterate: Callable[[], Iterator[Any]],
    receive: Callable[[list[Any]], Awaitable[None]],
) -> None:
    """Cancel the stream once ``reached`` is set, and see that its thread has ended."""
    places = limiter()

    async def cancel(scope: trio.CancelScope) -> None:
        await reached.wait()
        scope.cancel()

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as scope:
                nursery.start_soon(cancel, scope)
                await stream_in_thread(iterate, receive, limiter=places)
    assert scope.cancelled_caught
    assert places.borrowed_tokens == 0


# Items and bytes


@settings(deadline=None, max_examples=60)
@given(
    words=st.lists(st.text("abc", max_size=3), max_size=40),
    sizes=st.lists(st.integers(1, 20), min_size=1),
    naps=st.lists(st.integers(0, 2), min_size=1),
)
async def test_all_items_arrive_in_order_however_the_bytes_are_cut(
    words: list[str], sizes: list[int], naps: list[int]
) -> None:
    data = "".join(f"{word}\n" for word in words).encode()
    steps = []
    for size in itertools.cycle(sizes):
        if not data:
            break
        steps.append(data[:size])
        data = data[size:]
    naps_without_end = itertools.cycle(naps)
    received: list[str] = []

    async def receive(batch: list[str]) -> None:
        assert batch
        for _ in range(next(naps_without_end)):
            await trio.lowlevel.checkpoint()
        received.extend(batch)

    transport = ScriptedTransport(*steps)
    with trio.fail_after(10):
        await stream_in_thread(lines(transport), receive, limiter=limiter())
    assert received == words
    assert transport.open == 0


async def test_what_waits_is_given_to_the_thread_as_one_piece_of_bytes() -> None:
    sink = Sink()
    transport = ScriptedTransport(b"a", b"b", b"c", b"", sink.entered, b"d")

    def iterate() -> Iterator[bytes]:
        with httpx2.Client(transport=TrioTransport(transport)).stream("GET", URL) as response:
            trio.from_thread.run(trio.testing.wait_all_tasks_blocked)
            yield from response.iter_raw()

    with trio.fail_after(10):
        await stream_in_thread(iterate, sink, limiter=limiter())
    assert sink.items == [b"abc", b"d"]


async def test_bytes_that_yield_no_item_make_room_for_more() -> None:
    comments = [b":" + b"." * 998 + b"\n"] * (5 * MAX_UNREAD_BYTES // 1000)
    sink = Sink()
    with trio.fail_after(10):
        await stream_in_thread(lines(ScriptedTransport(*comments, b"item\n")), sink, limiter=limiter())
    assert sink.items == ["item"]


async def test_any_iterator_will_do_and_a_request_is_not_needed() -> None:
    sink = Sink()
    with trio.fail_after(10):
        await stream_in_thread(lambda: iter(range(1000)), sink, limiter=limiter())
        await stream_in_thread(lambda: iter(()), sink, limiter=limiter())
    assert sink.items == list(range(1000))


async def test_the_request_reaches_the_transport_as_it_was_made() -> None:
    transport = ScriptedTransport()
    client = httpx2.Client(transport=TrioTransport(transport))

    def iterate() -> Iterator[None]:
        client.post(URL, content=iter([b"not ", b"bytes"]), headers={"X-Key": "1"}, timeout=7)
        yield from ()

    with trio.fail_after(10):
        await stream_in_thread(iterate, Sink(), limiter=limiter())
    [request] = transport.requests
    assert await request.aread() == b"not bytes"
    assert isinstance(request.stream, httpx2.AsyncByteStream)
    assert request.headers["X-Key"] == "1"
    assert request.extensions["timeout"]["read"] == 7


async def test_context_variables_reach_the_thread_and_the_transport() -> None:
    name = ContextVar[str]("name")
    seen: list[str] = []

    class Transport(ScriptedTransport):
        async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
            seen.append(name.get())
            return await super().handle_async_request(request)

    name.set("stream 1")
    with trio.fail_after(10):
        await stream_in_thread(lines(Transport()), Sink(), limiter=limiter())
    assert seen == ["stream 1"]


async def test_a_hundred_streams_share_one_transport_and_get_each_their_own() -> None:
    class Echo(ScriptedTransport):
        async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
            self.open += 1
            steps = tuple(b"%s %d\n" % (request.url.raw_path, i) for i in range(50))
            return httpx2.Response(200, stream=ScriptedBody(steps, self))

    echo = Echo()
    client = httpx2.Client(transport=TrioTransport(echo))
    sinks = [Sink() for _ in range(100)]

    async def one(n: int) -> None:
        def iterate() -> Iterator[str]:
            with client.stream("GET", f"{URL}{n}") as response:
                yield from response.iter_lines()

        await stream_in_thread(iterate, sinks[n], limiter=places)

    places = limiter()
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            for n in range(100):
                nursery.start_soon(one, n)
    for n, sink in enumerate(sinks):
        assert sink.items == [f"/{n} {i}" for i in range(50)]
    assert echo.open == 0


# Back-pressure


async def test_while_receive_is_blocked_the_thread_stops_after_a_bounded_number_of_items() -> None:
    sink = Sink(gate=trio.Event())
    produced: list[int] = []

    def produce() -> Iterator[int]:
        for i in itertools.count():
            produced.append(i)
            yield i

    await stream_until(sink.full, lambda: sink.fill(produce()), sink)
    assert len(produced) == 1 + MAX_UNRECEIVED_ITEMS + 1  # one is in `receive`, one has found no room
    assert sink.items == []


async def test_while_receive_is_blocked_the_body_is_not_read_beyond_a_bound_and_later_all_of_it_arrives() -> None:
    gate = trio.Event()
    sink = Sink(gate)
    expected = [f"{i:0999}" for i in range(2000)]
    transport = ScriptedTransport(*[f"{line}\n".encode() for line in expected])

    async def look_then_open() -> None:
        await sink.full.wait()
        await trio.testing.wait_all_tasks_blocked()
        as_items, in_the_thread, unread = (MAX_UNRECEIVED_ITEMS + 2) * 1000, MAX_UNREAD_BYTES, MAX_UNREAD_BYTES
        assert transport.bytes_read <= as_items + in_the_thread + unread + 2000
        gate.set()

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(look_then_open)
            await stream_in_thread(lambda: sink.fill(lines(transport)()), sink, limiter=limiter())
    assert sink.items == expected
    assert transport.open == 0


# The end of a body


async def test_items_are_delivered_while_the_end_of_the_body_is_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge, "END_OF_BODY_GRACE", math.inf)
    places, thread_ended = trio.CapacityLimiter(1), trio.Event()
    transport = ScriptedTransport(b"item\n", thread_ended, b"rest")
    received: list[str] = []

    async def receive(batch: list[str]) -> None:
        received.extend(batch)
        async with places:
            thread_ended.set()

    with trio.fail_after(10):
        await stream_in_thread(lambda: itertools.islice(lines(transport)(), 1), receive, limiter=places)
    assert received == ["item"]
    assert transport.bytes_read == len(b"item\nrest")
    assert transport.open == 0


async def test_a_body_that_does_not_end_with_its_iterator_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge, "END_OF_BODY_GRACE", 0)
    transport, sink = ScriptedTransport(b"item\n", trio.Event()), Sink()
    with trio.fail_after(10):
        await stream_in_thread(lambda: itertools.islice(lines(transport)(), 1), sink, limiter=limiter())
    assert sink.items == ["item"]
    assert transport.open == 0


# Cancelling


async def test_cancel_while_waiting_for_a_place_in_the_limiter() -> None:
    places = trio.CapacityLimiter(1)
    started: list[bool] = []

    def iterate() -> Iterator[None]:
        started.append(True)
        yield None

    async with places:
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(stream_in_thread, iterate, Sink(), limiter=places))
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
    assert places.borrowed_tokens == 0
    assert not started


async def test_cancel_before_the_response_has_come() -> None:
    transport = ScriptedTransport()
    transport.answer = trio.Event()
    await stream_until(transport.requested, lines(transport), Sink())
    assert transport.open == 0


async def test_cancel_before_the_first_bytes_of_the_body() -> None:
    transport, answered = ScriptedTransport(trio.Event()), trio.Event()

    def iterate() -> Iterator[bytes]:
        with httpx2.Client(transport=TrioTransport(transport)).stream("GET", URL) as response:
            trio.from_thread.run_sync(answered.set)
            yield from response.iter_bytes()

    await stream_until(answered, iterate, Sink())
    assert transport.open == 0


async def test_cancel_in_mid_stream() -> None:
    transport, sink = ScriptedTransport(b"one\ntwo\n", trio.Event()), Sink()
    await stream_until(sink.entered, lines(transport), sink)
    assert sink.items in (["one"], ["one", "two"])
    assert transport.open == 0


async def test_cancel_while_receive_is_blocked_receives_nothing_more() -> None:
    transport, sink = ScriptedTransport(*[b"item\n"] * 10), Sink(gate=trio.Event())
    await stream_until(sink.entered, lines(transport), sink)
    assert sink.items == []
    assert transport.open == 0


async def test_cancel_while_the_end_of_the_body_is_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge, "END_OF_BODY_GRACE", math.inf)
    transport, sink = ScriptedTransport(b"item\n", trio.Event()), Sink()
    await stream_until(sink.entered, lambda: itertools.islice(lines(transport)(), 1), sink)
    assert transport.open == 0


async def test_a_cancel_passes_through_except_exception_and_runs_finally_in_the_thread() -> None:
    transport, sink = ScriptedTransport(b"one\n", trio.Event()), Sink()
    log: list[str] = []

    def iterate() -> Iterator[str]:
        try:
            yield from lines(transport)()
            log.append("complete")
        except Exception:  # as a client does that retries
            log.append("retry")
            yield "retried"
        finally:
            log.append("finally")

    await stream_until(sink.entered, iterate, sink)
    assert log == ["finally"]
    assert sink.items == ["one"]


async def test_an_iterator_that_still_has_items_is_closed_when_it_is_cancelled() -> None:
    sink, log = Sink(), []

    def iterate() -> Iterator[int]:
        try:
            yield from itertools.count()
        finally:
            log.append("finally")

    await stream_until(sink.entered, iterate, sink)
    assert log == ["finally"]


# Failures


async def test_what_the_iterator_raises_comes_out_as_it_is_after_its_items() -> None:
    error, sink = ValueError("broken"), Sink()

    def iterate() -> Iterator[int]:
        yield from range(300)
        raise error

    with trio.fail_after(10), pytest.raises(ValueError, match="broken") as caught:
        await stream_in_thread(iterate, sink, limiter=limiter())
    assert caught.value is error
    assert sink.items == list(range(300))


async def test_what_receive_raises_comes_out_as_it_is_and_ends_the_stream() -> None:
    transport, error = ScriptedTransport(b"one\n", trio.Event()), KeyError("broken")
    places = limiter()

    async def receive(batch: list[str]) -> None:
        raise error

    with trio.fail_after(10), pytest.raises(KeyError) as caught:
        await stream_in_thread(lines(transport), receive, limiter=places)
    assert caught.value is error
    assert transport.open == 0
    assert places.borrowed_tokens == 0


async def test_a_failure_to_connect_is_raised_in_the_iterator() -> None:
    transport = ScriptedTransport()
    transport.failure = httpx2.ConnectTimeout("too slow")
    with trio.fail_after(10), pytest.raises(httpx2.ConnectTimeout) as caught:
        await stream_in_thread(lines(transport), Sink(), limiter=limiter())
    assert caught.value.request.url == URL


@pytest.mark.parametrize("kind", [httpx2.ReadError, httpx2.ReadTimeout, httpx2.RemoteProtocolError])
async def test_a_failure_in_mid_body_is_raised_in_the_iterator_as_what_it_was(kind: type[Exception]) -> None:
    transport, sink = ScriptedTransport(b"one\n", kind("broken")), Sink()
    with trio.fail_after(10), pytest.raises(kind, match="broken"):
        await stream_in_thread(lines(transport), sink, limiter=limiter())
    assert sink.items == ["one"]
    assert transport.open == 0


async def test_the_body_of_an_error_response_can_be_read_and_is_decompressed() -> None:
    body = gzip.compress(json.dumps({"error": {"message": "no"}}).encode())
    transport = ScriptedTransport(body[:9], body[9:], status=400, headers={"Content-Encoding": "gzip"})
    sink = Sink()

    def iterate() -> Iterator[Any]:
        response = httpx2.Client(transport=TrioTransport(transport)).get(URL)
        yield response.status_code
        yield response.json()

    with trio.fail_after(10):
        await stream_in_thread(iterate, sink, limiter=limiter())
    assert sink.items == [400, {"error": {"message": "no"}}]


def test_a_request_outside_of_a_stream_says_so() -> None:
    client = httpx2.Client(transport=TrioTransport(httpx2.AsyncHTTPTransport()))
    with pytest.raises(RuntimeError, match="stream_in_thread"):
        client.get(URL)


# A real client over real sockets


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def token(text: str) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    event = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    return chunk(b"data: %s\n\n" % json.dumps(event).encode())


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
DONE = chunk(b"data: [DONE]\n\n")
END = b"0\r\n\r\n"


class Upstream:
    """Answers every request on a loopback socket with the same pieces, in a segment each."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces
        self.connections = 0
        self.answered = trio.Event()
        self.closed = trio.Event()
        self.port = 0

    async def serve(self, stream: trio.SocketStream) -> None:
        self.connections += 1
        try:
            while await self._request_came(stream):
                for piece in self.pieces:
                    await stream.send_all(piece)
                    await trio.lowlevel.checkpoint()
                self.answered.set()
        except trio.BrokenResourceError:
            pass
        self.closed.set()

    async def _request_came(self, stream: trio.SocketStream) -> bool:
        data = b""
        while not data.endswith(b"}"):  # of the JSON body
            received = await stream.receive_some()
            if not received:
                return False
            data += received
        return True


@pytest.fixture
def start(nursery: trio.Nursery) -> Callable[..., Awaitable[Upstream]]:
    async def start(*pieces: bytes) -> Upstream:
        upstream = Upstream(*pieces)
        [listener] = await nursery.start(partial(trio.serve_tcp, upstream.serve, 0, host="127.0.0.1"))
        upstream.port = listener.socket.getsockname()[1]
        return upstream

    return start


@pytest.fixture
async def transport() -> AsyncIterator[httpx2.AsyncHTTPTransport]:
    async with httpx2.AsyncHTTPTransport(trust_env=False) as transport:
        yield transport


def generation(upstream: Upstream, transport: httpx2.AsyncHTTPTransport) -> Callable[[], Iterator[str]]:
    model = ChatOpenAI(
        http_client=httpx2.Client(transport=TrioTransport(transport)),
        base_url=f"http://127.0.0.1:{upstream.port}/v1",
        api_key=SecretStr("x"),
        model="m",
        max_retries=0,
    )
    return lambda: (str(chunk.message.content) for chunk in model._stream([HumanMessage("Hello")]))


Start = Callable[..., Awaitable[Upstream]]


async def test_a_generation_streams_and_its_connection_is_used_again(
    start: Start, transport: httpx2.AsyncHTTPTransport
) -> None:
    upstream = await start(HEAD, token("a"), token("b"), DONE, END)
    with trio.fail_after(10):
        for _ in range(3):
            sink = Sink()
            await stream_in_thread(generation(upstream, transport), sink, limiter=limiter())
            assert "".join(sink.items) == "ab"
    assert upstream.connections == 1


@pytest.mark.parametrize("pieces", [[], [HEAD], [HEAD, token("a")]], ids=["headers", "first token", "next token"])
async def test_a_cancel_closes_the_socket_of_a_silent_upstream(
    start: Start, transport: httpx2.AsyncHTTPTransport, pieces: list[bytes]
) -> None:
    upstream = await start(*pieces)
    sink = Sink()
    reached = sink.entered if len(pieces) == 2 else upstream.answered
    await stream_until(reached, generation(upstream, transport), sink)
    with trio.fail_after(10):
        await upstream.closed.wait()


async def test_a_cancel_while_everything_is_blocked_closes_the_socket_and_leaves_nothing_to_the_collector(
    start: Start, transport: httpx2.AsyncHTTPTransport
) -> None:
    """The suspended generators of the HTTP client would warn when they are collected, which fails the test."""
    upstream = await start(HEAD, *[token("word ")] * 50_000)
    sink, blocked = Sink(gate=trio.Event()), trio.Event()

    async def watch() -> None:
        await sink.full.wait()
        await trio.testing.wait_all_tasks_blocked()
        blocked.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await stream_until(blocked, lambda: sink.fill(generation(upstream, transport)()), sink)
    with trio.fail_after(10):
        await upstream.closed.wait()
    assert not upstream.answered.is_set()
    gc.collect()


async def test_an_error_response_is_the_client_librarys_own_error(
    start: Start, transport: httpx2.AsyncHTTPTransport
) -> None:
    body = b'{"error": {"message": "no such model", "type": "invalid_request_error"}}'
    head = b"HTTP/1.1 404 Not Found\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    upstream = await start(head, body)
    for _ in range(2):
        with trio.fail_after(10), pytest.raises(openai.NotFoundError, match="no such model"):
            await stream_in_thread(generation(upstream, transport), Sink(), limiter=limiter())
    assert upstream.connections == 1


async def test_a_refused_connection_is_the_client_librarys_own_error(transport: httpx2.AsyncHTTPTransport) -> None:
    with trio.socket.socket() as unused:
        await unused.bind(("127.0.0.1", 0))  # taken, but nobody listens
        upstream = Upstream()
        upstream.port = unused.getsockname()[1]
        with trio.fail_after(10), pytest.raises(openai.APIConnectionError):
            await stream_in_thread(generation(upstream, transport), Sink(), limiter=limiter())


async def test_a_connection_that_breaks_off_in_mid_stream_is_the_client_librarys_own_error(
    start: Start, transport: httpx2.AsyncHTTPTransport
) -> None:
    upstream, sink = await start(HEAD, token("a"), b"not a chunk\r\n"), Sink()
    with trio.fail_after(10), pytest.raises(openai.APIConnectionError):
        await stream_in_thread(generation(upstream, transport), sink, limiter=limiter())
    assert "".join(sink.items) == "a"
