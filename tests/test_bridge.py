"""`inference_trio.bridge`: against a scripted transport, and with a real ChatOpenAI over loopback sockets."""

from __future__ import annotations

import gzip
import itertools
import json
import math
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
from inference_trio.bridge import TrioTransport, call_blocking, stream_blocking, wait_for
from inference_trio.upstream_http import StreamTransport

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


async def tell(event: trio.Event) -> None:
    event.set()


def lines(transport: httpx2.AsyncBaseTransport) -> Callable[[], Iterator[str]]:
    """What a provider's client does in small: an item for every line that is no comment."""
    client = httpx2.Client(transport=TrioTransport(transport))

    def iterate() -> Iterator[str]:
        with client.stream("POST", URL, json={"stream": True}) as response:
            for line in response.iter_lines():
                if not line.startswith(":"):
                    yield line

    return iterate


@pytest.fixture(params=["greenlet", "thread"])
def threads(request: pytest.FixtureRequest) -> Iterator[trio.CapacityLimiter | None]:
    """Both ways to run blocking code, which have to behave alike. At the end no thread may be left."""
    limiter = trio.CapacityLimiter(200) if request.param == "thread" else None
    yield limiter
    assert limiter is None or limiter.borrowed_tokens == 0


Threads = trio.CapacityLimiter | None


async def stream_until(
    reached: trio.Event,
    iterate: Callable[[], Iterator[Any]],
    receive: Callable[[Any], Awaitable[None]],
    threads: Threads,
) -> None:
    """Cancel the stream once ``reached`` is set."""

    async def cancel(scope: trio.CancelScope) -> None:
        await reached.wait()
        scope.cancel()

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as scope:
                nursery.start_soon(cancel, scope)
                await stream_blocking(iterate, receive, threads=threads)
    assert scope.cancelled_caught


# Calls


async def test_a_call_returns_what_its_function_returns_and_raises_what_it_raises() -> None:
    error = ValueError("broken")

    def fail() -> None:
        raise error

    assert await call_blocking(lambda: 7) == 7
    with pytest.raises(ValueError, match="broken") as caught:
        await call_blocking(fail)
    assert caught.value is error


async def test_what_is_waited_for_is_awaited_in_the_task_that_called() -> None:
    async def who(answer: int) -> tuple[int, trio.lowlevel.Task]:
        await trio.lowlevel.checkpoint()
        return answer, trio.lowlevel.current_task()

    task = trio.lowlevel.current_task()
    assert await call_blocking(lambda: [wait_for(who, n) for n in range(3)]) == [(n, task) for n in range(3)]


async def test_what_is_waited_for_raises_where_it_is_waited_for() -> None:
    async def fail() -> None:
        await trio.lowlevel.checkpoint()
        raise KeyError("broken")

    def function() -> str:
        try:
            wait_for(fail)
        except KeyError as error:
            return f"caught {error}"
        return "nothing"

    assert await call_blocking(function) == "caught 'broken'"


async def test_calls_run_at_a_time_and_within_each_other() -> None:
    log: list[str] = []

    async def inner(name: str) -> None:
        await call_blocking(lambda: wait_for(note, f"{name} inner"))

    async def note(what: str) -> None:
        await trio.testing.wait_all_tasks_blocked()
        log.append(what)

    def outer(name: str) -> None:
        log.append(f"{name} begins")
        wait_for(inner, name)
        log.append(f"{name} ends")

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for name in ("a", "b"):
                nursery.start_soon(call_blocking, partial(outer, name))
    assert sorted(log[:2]) == ["a begins", "b begins"]
    assert sorted(log[2:]) == ["a ends", "a inner", "b ends", "b inner"]


async def test_a_cancelled_call_may_wait_for_more_on_its_way_out() -> None:
    log: list[str] = []

    async def tidy_up() -> None:
        with trio.CancelScope(shield=True):
            await trio.lowlevel.checkpoint()
            log.append("tidied up")
        await trio.lowlevel.checkpoint()

    def function() -> None:
        try:
            wait_for(trio.sleep_forever)
        finally:
            wait_for(tidy_up)

    with trio.CancelScope() as scope:
        scope.cancel()
        await call_blocking(function)
    assert scope.cancelled_caught
    assert log == ["tidied up"]


async def test_context_variables_are_seen_and_a_change_stays_within() -> None:
    name = ContextVar[str]("name", default="nothing")
    seen: list[str] = []

    def function() -> None:
        seen.append(name.get())
        name.set("changed")
        wait_for(trio.lowlevel.checkpoint)
        seen.append(name.get())

    name.set("outside")
    await call_blocking(function)
    assert [*seen, name.get()] == ["outside", "changed", "outside"]


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

    async def receive(item: str) -> None:
        for _ in range(next(naps_without_end)):
            await trio.lowlevel.checkpoint()
        received.append(item)

    transport = ScriptedTransport(*steps)
    with trio.fail_after(10):
        await stream_blocking(lines(transport), receive)
    assert received == words
    assert transport.open == 0


async def test_any_iterator_will_do_and_a_request_is_not_needed(threads: Threads) -> None:
    sink = Sink()
    with trio.fail_after(10):
        await stream_blocking(lambda: iter(range(1000)), sink, threads=threads)
        await stream_blocking(lambda: iter(()), sink, threads=threads)
    assert sink.items == list(range(1000))


async def test_the_request_reaches_the_transport_as_it_was_made(threads: Threads) -> None:
    transport = ScriptedTransport()
    client = httpx2.Client(transport=TrioTransport(transport))

    def iterate() -> Iterator[None]:
        client.post(URL, content=iter([b"not ", b"bytes"]), headers={"X-Key": "1"}, timeout=7)
        yield from ()

    with trio.fail_after(10):
        await stream_blocking(iterate, Sink(), threads=threads)
    [request] = transport.requests
    assert await request.aread() == b"not bytes"
    assert isinstance(request.stream, httpx2.AsyncByteStream)
    assert request.headers["X-Key"] == "1"
    assert request.extensions["timeout"]["read"] == 7


async def test_context_variables_reach_the_iterator_and_the_transport(threads: Threads) -> None:
    name = ContextVar[str]("name")
    seen: list[str] = []

    class Transport(ScriptedTransport):
        async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
            seen.append(name.get())
            return await super().handle_async_request(request)

    name.set("stream 1")
    with trio.fail_after(10):
        await stream_blocking(lines(Transport()), Sink(), threads=threads)
    assert seen == ["stream 1"]


async def test_a_hundred_streams_share_one_transport_and_get_each_their_own(threads: Threads) -> None:
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

        await stream_blocking(iterate, sinks[n], threads=threads)

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            for n in range(100):
                nursery.start_soon(one, n)
    for n, sink in enumerate(sinks):
        assert sink.items == [f"/{n} {i}" for i in range(50)]
    assert echo.open == 0


# Back-pressure


# The end of a body


async def test_a_body_that_does_not_end_with_its_iterator_is_closed(
    monkeypatch: pytest.MonkeyPatch, threads: Threads
) -> None:
    monkeypatch.setattr(bridge, "END_OF_BODY_GRACE", 0)
    transport, sink = ScriptedTransport(b"item\n", trio.Event()), Sink()
    with trio.fail_after(10):
        await stream_blocking(lambda: itertools.islice(lines(transport)(), 1), sink, threads=threads)
    assert sink.items == ["item"]
    assert transport.open == 0


# Cancelling


async def test_cancel_before_the_response_has_come(threads: Threads) -> None:
    transport = ScriptedTransport()
    transport.answer = trio.Event()
    await stream_until(transport.requested, lines(transport), Sink(), threads)
    assert transport.open == 0


async def test_cancel_before_the_first_bytes_of_the_body(threads: Threads) -> None:
    transport, answered = ScriptedTransport(trio.Event()), trio.Event()

    def iterate() -> Iterator[bytes]:
        with httpx2.Client(transport=TrioTransport(transport)).stream("GET", URL) as response:
            wait_for(tell, answered)
            yield from response.iter_bytes()

    await stream_until(answered, iterate, Sink(), threads)
    assert transport.open == 0


async def test_cancel_in_mid_stream(threads: Threads) -> None:
    transport, sink = ScriptedTransport(b"one\ntwo\n", trio.Event()), Sink()
    await stream_until(sink.entered, lines(transport), sink, threads)
    assert sink.items in (["one"], ["one", "two"])
    assert transport.open == 0


async def test_cancel_while_receive_is_blocked_receives_nothing_more(threads: Threads) -> None:
    transport, sink = ScriptedTransport(*[b"item\n"] * 10), Sink(gate=trio.Event())
    await stream_until(sink.entered, lines(transport), sink, threads)
    assert sink.items == []
    assert transport.open == 0


async def test_cancel_while_the_end_of_the_body_is_awaited(monkeypatch: pytest.MonkeyPatch, threads: Threads) -> None:
    monkeypatch.setattr(bridge, "END_OF_BODY_GRACE", math.inf)
    transport, sink = ScriptedTransport(b"item\n", trio.Event()), Sink()
    await stream_until(sink.entered, lambda: itertools.islice(lines(transport)(), 1), sink, threads)
    assert transport.open == 0


async def test_a_cancel_passes_through_except_exception_and_runs_finally(threads: Threads) -> None:
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

    await stream_until(sink.entered, iterate, sink, threads)
    assert log == ["finally"]
    assert sink.items == ["one"]


async def test_an_iterator_that_still_has_items_is_closed_when_it_is_cancelled(threads: Threads) -> None:
    sink, log = Sink(), []

    def iterate() -> Iterator[int]:
        try:
            yield from itertools.count()
        finally:
            log.append("finally")

    await stream_until(sink.entered, iterate, sink, threads)
    assert log == ["finally"]


# Failures


async def test_what_the_iterator_raises_comes_out_as_it_is_after_its_items(threads: Threads) -> None:
    error, sink = ValueError("broken"), Sink()

    def iterate() -> Iterator[int]:
        yield from range(300)
        raise error

    with trio.fail_after(10), pytest.raises(ValueError, match="broken") as caught:
        await stream_blocking(iterate, sink, threads=threads)
    assert caught.value is error
    assert sink.items == list(range(300))


async def test_what_receive_raises_comes_out_as_it_is_and_ends_the_stream(threads: Threads) -> None:
    transport, error = ScriptedTransport(b"one\n", trio.Event()), KeyError("broken")

    async def receive(_: str) -> None:
        raise error

    with trio.fail_after(10), pytest.raises(KeyError) as caught:
        await stream_blocking(lines(transport), receive, threads=threads)
    assert caught.value is error
    assert transport.open == 0


async def test_a_failure_to_connect_is_raised_in_the_iterator(threads: Threads) -> None:
    transport = ScriptedTransport()
    transport.failure = httpx2.ConnectTimeout("too slow")
    with trio.fail_after(10), pytest.raises(httpx2.ConnectTimeout) as caught:
        await stream_blocking(lines(transport), Sink(), threads=threads)
    assert caught.value.request.url == URL


@pytest.mark.parametrize("kind", [httpx2.ReadError, httpx2.ReadTimeout, httpx2.RemoteProtocolError])
async def test_a_failure_in_mid_body_is_raised_in_the_iterator_as_what_it_was(
    kind: type[Exception], threads: Threads
) -> None:
    transport, sink = ScriptedTransport(b"one\n", kind("broken")), Sink()
    with trio.fail_after(10), pytest.raises(kind, match="broken"):
        await stream_blocking(lines(transport), sink, threads=threads)
    assert sink.items == ["one"]
    assert transport.open == 0


async def test_the_body_of_an_error_response_can_be_read_and_is_decompressed(threads: Threads) -> None:
    body = gzip.compress(json.dumps({"error": {"message": "no"}}).encode())
    transport = ScriptedTransport(body[:9], body[9:], status=400, headers={"Content-Encoding": "gzip"})
    sink = Sink()

    def iterate() -> Iterator[Any]:
        response = httpx2.Client(transport=TrioTransport(transport)).get(URL)
        yield response.status_code
        yield response.json()

    with trio.fail_after(10):
        await stream_blocking(iterate, sink, threads=threads)
    assert sink.items == [400, {"error": {"message": "no"}}]


def test_a_request_outside_of_a_stream_says_so() -> None:
    client = httpx2.Client(transport=TrioTransport(StreamTransport(30)))
    with pytest.raises(RuntimeError, match="stream_blocking"):
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
    start: Start, transport: StreamTransport, threads: Threads
) -> None:
    upstream = await start(HEAD, token("a"), token("b"), DONE, END)
    with trio.fail_after(10):
        for _ in range(3):
            sink = Sink()
            await stream_blocking(generation(upstream, transport), sink, threads=threads)
            assert "".join(sink.items) == "ab"
    assert upstream.connections == 1


@pytest.mark.parametrize("pieces", [[], [HEAD], [HEAD, token("a")]], ids=["headers", "first token", "next token"])
async def test_a_cancel_closes_the_socket_of_a_silent_upstream(
    start: Start, transport: StreamTransport, pieces: list[bytes], threads: Threads
) -> None:
    upstream = await start(*pieces)
    sink = Sink()
    reached = sink.entered if len(pieces) == 2 else upstream.answered
    await stream_until(reached, generation(upstream, transport), sink, threads)
    with trio.fail_after(10):
        await upstream.closed.wait()


async def test_an_error_response_is_the_client_librarys_own_error(
    start: Start, transport: StreamTransport, threads: Threads
) -> None:
    body = b'{"error": {"message": "no such model", "type": "invalid_request_error"}}'
    head = b"HTTP/1.1 404 Not Found\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    upstream = await start(head, body)
    for _ in range(2):
        with trio.fail_after(10), pytest.raises(openai.NotFoundError, match="no such model"):
            await stream_blocking(generation(upstream, transport), Sink(), threads=threads)
    assert upstream.connections == 1


async def test_a_refused_connection_is_the_client_librarys_own_error(
    transport: StreamTransport, threads: Threads
) -> None:
    with trio.socket.socket() as unused:
        await unused.bind(("127.0.0.1", 0))  # taken, but nobody listens
        upstream = Upstream()
        upstream.port = unused.getsockname()[1]
        with trio.fail_after(10), pytest.raises(openai.APIConnectionError):
            await stream_blocking(generation(upstream, transport), Sink(), threads=threads)


async def test_a_connection_that_breaks_off_in_mid_stream_is_the_client_librarys_own_error(
    start: Start, transport: StreamTransport, threads: Threads
) -> None:
    upstream, sink = await start(HEAD, token("a"), b"not a chunk\r\n"), Sink()
    with trio.fail_after(10), pytest.raises(openai.APIConnectionError):
        await stream_blocking(generation(upstream, transport), sink, threads=threads)
    assert "".join(sink.items) == "a"
