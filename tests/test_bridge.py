"""`inference_trio.bridge`: against a scripted transport, and with a real ChatOpenAI over loopback sockets."""

from __future__ import annotations

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
from inference_trio.bridge import TrioTransport, reads_of, stream_in_thread
from inference_trio.upstream_http import StreamTransport

URL = "http://upstream.test/"

T = TypeVar("T")
Limiter = trio.CapacityLimiter

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
    """A ``receive`` that keeps what it gets, once its gate (if it has one) is open. ``entered``: it was called."""

    def __init__(self, gate: trio.Event | None = None) -> None:
        self.items: list[Any] = []
        self.entered = trio.Event()
        self.gate = gate

    async def __call__(self, item: Any) -> None:
        if self.gate is not None:
            self.entered.set()
            await self.gate.wait()
        self.items.append(item)
        self.entered.set()
        await trio.lowlevel.checkpoint()


Lines = Callable[[httpx2.AsyncBaseTransport], Callable[[], Iterator[str | None]]]
"""What a provider's client does in small: an item for every line that is no comment."""


def lines_in_thread(transport: httpx2.AsyncBaseTransport) -> Callable[[], Iterator[str | None]]:
    client = httpx2.Client(transport=TrioTransport(transport))

    def iterate() -> Iterator[str]:
        with client.stream("POST", URL, json={"stream": True}) as response:
            for line in response.iter_lines():
                if not line.startswith(":"):
                    yield line

    return iterate


def lines_in_trio(transport: httpx2.AsyncBaseTransport) -> Callable[[], Iterator[str | None]]:
    client = httpx2.Client(transport=TrioTransport(transport))

    def iterate() -> Iterator[str | None]:
        rest = b""
        with client.stream("POST", URL, json={"stream": True}) as response:
            for read in reads_of(response):
                *complete, rest = (rest + read).split(b"\n")
                yield from (line.decode() for line in complete if not line.startswith(b":"))
                if not read:
                    yield None

    return iterate


def first_of(iterator: Iterator[str | None]) -> Iterator[str | None]:
    """Not more than its first item."""
    for item in iterator:
        yield item
        if item is not None:
            return


@pytest.fixture(scope="module", params=[lines_in_thread, lines_in_trio])
def lines(request: pytest.FixtureRequest) -> Lines:
    """Both ways to iterate, which have to behave alike."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def limiter() -> Iterator[Limiter]:
    """At the end no thread may be left."""
    limiter = trio.CapacityLimiter(200)
    yield limiter
    assert limiter.borrowed_tokens == 0


async def stream_until(
    reached: trio.Event,
    iterate: Callable[[], Iterator[Any]],
    receive: Callable[[Any], Awaitable[None]],
    limiter: Limiter,
) -> None:
    """Cancel the stream once ``reached`` is set."""

    async def cancel(scope: trio.CancelScope) -> None:
        await reached.wait()
        scope.cancel()

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as scope:
                nursery.start_soon(cancel, scope)
                await stream_in_thread(iterate, receive, limiter=limiter)
    assert scope.cancelled_caught


# Items and bytes


@settings(max_examples=60)
@given(
    words=st.lists(st.text("abc", max_size=3), max_size=40),
    sizes=st.lists(st.integers(1, 20), min_size=1),
    naps=st.lists(st.integers(0, 2), min_size=1),
)
async def test_all_items_arrive_in_order_however_the_bytes_are_cut(
    lines: Lines, words: list[str], sizes: list[int], naps: list[int]
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

    async def receive(item: str) -> None:
        for _ in range(next(naps_without_end)):
            await trio.lowlevel.checkpoint()
        received.append(item)

    transport = ScriptedTransport(*steps)
    with trio.fail_after(10):
        await stream_in_thread(lines(transport), receive, limiter=trio.CapacityLimiter(1))
    assert received == words
    assert transport.open == 0


async def test_what_waits_is_given_in_one_go_and_then_nothing(limiter: Limiter) -> None:
    more = trio.Event()
    transport, pulled = ScriptedTransport(b"a", b"", b"b", more, b"c"), list[bytes]()

    def iterate() -> Iterator[bytes | None]:
        with httpx2.Client(transport=TrioTransport(transport)).stream("GET", URL) as response:
            for read in reads_of(response):
                pulled.append(read)
                yield read or None

    async def receive(read: bytes) -> None:
        more.set()

    with trio.fail_after(10):
        await stream_in_thread(iterate, receive, limiter=limiter)
    assert [read for read in pulled if read] == [b"a", b"b", b"c"]
    assert pulled[0] == b"", "the headers have come, and no more"


async def test_no_thread_is_held_once_the_iterator_waits(limiter: Limiter) -> None:
    transport, places = ScriptedTransport(b"one\ntwo\n"), list[Any]()

    async def receive(item: str) -> None:
        places.append((item, limiter.borrowed_tokens))

    with trio.fail_after(10):
        await stream_in_thread(lines_in_trio(transport), receive, limiter=limiter)
        await stream_in_thread(lines_in_thread(transport), receive, limiter=limiter)
    assert places == [("one", 0), ("two", 0), ("one", 1), ("two", 1)]


async def test_the_beginning_does_not_run_in_the_event_loop(limiter: Limiter) -> None:
    threads: list[int] = []

    def iterate() -> Iterator[None]:
        threads.append(threading.get_ident())
        yield from ()

    with trio.fail_after(10):
        await stream_in_thread(iterate, Sink(), limiter=limiter)
    assert threads != [threading.get_ident()]


async def test_a_compressed_body_is_waited_for(limiter: Limiter) -> None:
    body = gzip.compress(b"one\ntwo\n")
    transport = ScriptedTransport(body[:9], body[9:], headers={"Content-Encoding": "gzip"})
    with trio.fail_after(10):
        await stream_in_thread(lines_in_trio(transport), sink := Sink(), limiter=limiter)
    assert sink.items == ["one", "two"]


async def test_to_wait_without_a_request_or_to_make_one_later_is_an_error(limiter: Limiter) -> None:
    client = httpx2.Client(transport=TrioTransport(ScriptedTransport()))

    def iterate() -> Iterator[None]:
        client.get(URL)
        yield None
        client.get(URL)

    with trio.fail_after(10):
        with pytest.raises(RuntimeError, match="made no request"):
            await stream_in_thread(lambda: itertools.repeat(None), Sink(), limiter=limiter)
        with pytest.raises(RuntimeError, match="thread"):
            await stream_in_thread(iterate, Sink(), limiter=limiter)


async def test_any_iterator_will_do_and_a_request_is_not_needed(limiter: Limiter) -> None:
    sink = Sink()
    with trio.fail_after(10):
        await stream_in_thread(lambda: iter(range(1000)), sink, limiter=limiter)
        await stream_in_thread(lambda: iter(()), sink, limiter=limiter)
    assert sink.items == list(range(1000))


async def test_the_request_reaches_the_transport_as_it_was_made(limiter: Limiter) -> None:
    transport = ScriptedTransport()
    client = httpx2.Client(transport=TrioTransport(transport))

    def iterate() -> Iterator[None]:
        client.post(URL, content=iter([b"not ", b"bytes"]), headers={"X-Key": "1"}, timeout=7)
        yield from ()

    with trio.fail_after(10):
        await stream_in_thread(iterate, Sink(), limiter=limiter)
    [request] = transport.requests
    assert await request.aread() == b"not bytes"
    assert isinstance(request.stream, httpx2.AsyncByteStream)
    assert request.headers["X-Key"] == "1"
    assert request.extensions["timeout"]["read"] == 7


async def test_context_variables_reach_the_iterator_and_the_transport(lines: Lines, limiter: Limiter) -> None:
    name = ContextVar[str]("name")
    seen: list[str] = []

    class Transport(ScriptedTransport):
        async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
            seen.append(name.get())
            return await super().handle_async_request(request)

    name.set("stream 1")
    with trio.fail_after(10):
        await stream_in_thread(lines(Transport()), Sink(), limiter=limiter)
    assert seen == ["stream 1"]


async def test_a_hundred_streams_share_one_transport_and_get_each_their_own(lines: Lines, limiter: Limiter) -> None:
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

        await stream_in_thread(iterate, sinks[n], limiter=limiter)

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            for n in range(100):
                nursery.start_soon(one, n)
    for n, sink in enumerate(sinks):
        assert sink.items == [f"/{n} {i}" for i in range(50)]
    assert echo.open == 0


# Back-pressure


async def test_while_receive_waits_nothing_is_read_from_the_upstream(lines: Lines, limiter: Limiter) -> None:
    transport, sink = ScriptedTransport(*[b"item\n"] * 10), Sink(gate=trio.Event())
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(stream_in_thread, lines(transport), sink, limiter=limiter))
            await sink.entered.wait()
            await trio.testing.wait_all_tasks_blocked()
            assert transport.bytes_read == len(b"item\n")
            assert sink.gate is not None
            sink.gate.set()
    assert sink.items == ["item"] * 10


# The end of a body


async def test_a_body_that_does_not_end_with_its_iterator_is_closed(
    lines: Lines, monkeypatch: pytest.MonkeyPatch, limiter: Limiter
) -> None:
    monkeypatch.setattr(bridge, "END_OF_BODY_GRACE", 0)
    transport, sink = ScriptedTransport(b"item\n", trio.Event()), Sink()
    with trio.fail_after(10):
        await stream_in_thread(lambda: first_of(lines(transport)()), sink, limiter=limiter)
    assert sink.items == ["item"]
    assert transport.open == 0


# Cancelling


async def test_cancel_while_waiting_for_a_place_in_the_limiter() -> None:
    places = trio.CapacityLimiter(1)
    started: list[bool] = []

    def iterate() -> Iterator[None]:
        started.append(True)
        yield from ()

    async with places:
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(stream_in_thread, iterate, Sink(), limiter=places))
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
    assert places.borrowed_tokens == 0
    assert not started


async def test_cancel_before_the_response_has_come(lines: Lines, limiter: Limiter) -> None:
    transport = ScriptedTransport()
    transport.answer = trio.Event()
    await stream_until(transport.requested, lines(transport), Sink(), limiter)
    assert transport.open == 0


async def test_cancel_before_the_first_bytes_of_the_body(limiter: Limiter) -> None:
    transport, answered = ScriptedTransport(trio.Event()), trio.Event()

    def iterate() -> Iterator[bytes]:
        with httpx2.Client(transport=TrioTransport(transport)).stream("GET", URL) as response:
            trio.from_thread.run_sync(answered.set)
            yield from response.iter_bytes()

    await stream_until(answered, iterate, Sink(), limiter)
    assert transport.open == 0


async def test_cancel_in_mid_stream(lines: Lines, limiter: Limiter) -> None:
    transport, sink = ScriptedTransport(b"one\ntwo\n", trio.Event()), Sink()
    await stream_until(sink.entered, lines(transport), sink, limiter)
    assert sink.items in (["one"], ["one", "two"])
    assert transport.open == 0


async def test_cancel_while_receive_is_blocked_receives_nothing_more(lines: Lines, limiter: Limiter) -> None:
    transport, sink = ScriptedTransport(*[b"item\n"] * 10), Sink(gate=trio.Event())
    await stream_until(sink.entered, lines(transport), sink, limiter)
    assert sink.items == []
    assert transport.open == 0


async def test_cancel_while_the_end_of_the_body_is_awaited(
    lines: Lines, monkeypatch: pytest.MonkeyPatch, limiter: Limiter
) -> None:
    monkeypatch.setattr(bridge, "END_OF_BODY_GRACE", math.inf)
    transport, sink = ScriptedTransport(b"item\n", trio.Event()), Sink()
    await stream_until(sink.entered, lambda: first_of(lines(transport)()), sink, limiter)
    assert transport.open == 0


async def test_a_cancel_passes_through_except_exception_and_runs_finally(lines: Lines, limiter: Limiter) -> None:
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

    await stream_until(sink.entered, iterate, sink, limiter)
    assert log == ["finally"]
    assert sink.items == ["one"]


async def test_an_iterator_that_still_has_items_is_closed_when_it_is_cancelled(limiter: Limiter) -> None:
    sink, log = Sink(), []

    def iterate() -> Iterator[int]:
        try:
            yield from itertools.count()
        finally:
            log.append("finally")

    await stream_until(sink.entered, iterate, sink, limiter)
    assert log == ["finally"]


# Failures


async def test_what_the_iterator_raises_comes_out_as_it_is_after_its_items(limiter: Limiter) -> None:
    error, sink = ValueError("broken"), Sink()

    def iterate() -> Iterator[int]:
        yield from range(300)
        raise error

    with trio.fail_after(10), pytest.raises(ValueError, match="broken") as caught:
        await stream_in_thread(iterate, sink, limiter=limiter)
    assert caught.value is error
    assert sink.items == list(range(300))


async def test_what_receive_raises_comes_out_as_it_is_and_ends_the_stream(lines: Lines, limiter: Limiter) -> None:
    transport, error = ScriptedTransport(b"one\n", trio.Event()), KeyError("broken")

    async def receive(_: str) -> None:
        raise error

    with trio.fail_after(10), pytest.raises(KeyError) as caught:
        await stream_in_thread(lines(transport), receive, limiter=limiter)
    assert caught.value is error
    assert transport.open == 0


async def test_a_failure_to_connect_is_raised_in_the_iterator(lines: Lines, limiter: Limiter) -> None:
    transport = ScriptedTransport()
    transport.failure = httpx2.ConnectTimeout("too slow")
    with trio.fail_after(10), pytest.raises(httpx2.ConnectTimeout) as caught:
        await stream_in_thread(lines(transport), Sink(), limiter=limiter)
    assert caught.value.request.url == URL


@pytest.mark.parametrize("kind", [httpx2.ReadError, httpx2.ReadTimeout, httpx2.RemoteProtocolError])
async def test_a_failure_in_mid_body_is_raised_in_the_iterator_as_what_it_was(
    lines: Lines, kind: type[Exception], limiter: Limiter
) -> None:
    transport, sink = ScriptedTransport(b"one\n", kind("broken")), Sink()
    with trio.fail_after(10), pytest.raises(kind, match="broken"):
        await stream_in_thread(lines(transport), sink, limiter=limiter)
    assert sink.items == ["one"]
    assert transport.open == 0


async def test_the_body_of_an_error_response_can_be_read_and_is_decompressed(limiter: Limiter) -> None:
    body = gzip.compress(json.dumps({"error": {"message": "no"}}).encode())
    transport = ScriptedTransport(body[:9], body[9:], status=400, headers={"Content-Encoding": "gzip"})
    sink = Sink()

    def iterate() -> Iterator[Any]:
        response = httpx2.Client(transport=TrioTransport(transport)).get(URL)
        yield response.status_code
        yield response.json()

    with trio.fail_after(10):
        await stream_in_thread(iterate, sink, limiter=limiter)
    assert sink.items == [400, {"error": {"message": "no"}}]


def test_a_request_outside_of_a_stream_says_so() -> None:
    client = httpx2.Client(transport=TrioTransport(StreamTransport(30)))
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
async def transport() -> AsyncIterator[StreamTransport]:
    async with StreamTransport(keepalive_expiry=30) as transport:
        yield transport


def generation(upstream: Upstream, transport: StreamTransport) -> Callable[[], Iterator[str]]:
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
    start: Start, transport: StreamTransport, limiter: Limiter
) -> None:
    upstream = await start(HEAD, token("a"), token("b"), DONE, END)
    with trio.fail_after(10):
        for _ in range(3):
            sink = Sink()
            await stream_in_thread(generation(upstream, transport), sink, limiter=limiter)
            assert "".join(sink.items) == "ab"
    assert upstream.connections == 1


@pytest.mark.parametrize("pieces", [[], [HEAD], [HEAD, token("a")]], ids=["headers", "first token", "next token"])
async def test_a_cancel_closes_the_socket_of_a_silent_upstream(
    start: Start, transport: StreamTransport, pieces: list[bytes], limiter: Limiter
) -> None:
    upstream = await start(*pieces)
    sink = Sink()
    reached = sink.entered if len(pieces) == 2 else upstream.answered
    await stream_until(reached, generation(upstream, transport), sink, limiter)
    with trio.fail_after(10):
        await upstream.closed.wait()


async def test_an_error_response_is_the_client_librarys_own_error(
    start: Start, transport: StreamTransport, limiter: Limiter
) -> None:
    body = b'{"error": {"message": "no such model", "type": "invalid_request_error"}}'
    head = b"HTTP/1.1 404 Not Found\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    upstream = await start(head, body)
    for _ in range(2):
        with trio.fail_after(10), pytest.raises(openai.NotFoundError, match="no such model"):
            await stream_in_thread(generation(upstream, transport), Sink(), limiter=limiter)
    assert upstream.connections == 1


async def test_a_refused_connection_is_the_client_librarys_own_error(
    transport: StreamTransport, limiter: Limiter
) -> None:
    with trio.socket.socket() as unused:
        await unused.bind(("127.0.0.1", 0))  # taken, but nobody listens
        upstream = Upstream()
        upstream.port = unused.getsockname()[1]
        with trio.fail_after(10), pytest.raises(openai.APIConnectionError):
            await stream_in_thread(generation(upstream, transport), Sink(), limiter=limiter)


async def test_a_connection_that_breaks_off_in_mid_stream_is_the_client_librarys_own_error(
    start: Start, transport: StreamTransport, limiter: Limiter
) -> None:
    upstream, sink = await start(HEAD, token("a"), b"not a chunk\r\n"), Sink()
    with trio.fail_after(10), pytest.raises(openai.APIConnectionError):
        await stream_in_thread(generation(upstream, transport), sink, limiter=limiter)
    assert "".join(sink.items) == "a"
