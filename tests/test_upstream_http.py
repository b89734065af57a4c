"""`inference_trio.upstream_http`: against scripted peers on loopback sockets."""

from __future__ import annotations

import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

import attrs
import httpx2
import pytest
import trio
import trio.testing
import trustme

from inference_trio.upstream_http import StreamTransport

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


def chunks(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)


def sized(body: bytes, *headers: bytes) -> bytes:
    lines = [b"HTTP/1.1 200 OK", b"Content-Length: %d" % len(body), *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


Step = bytes | trio.Event


@attrs.define
class Peer:
    """Answers each request with the next list of steps: bytes to send, or an event to wait for.

    After the last answer it closes. ``requests`` are as they came, ``lost`` counts the connections that ended.
    """

    answers: list[list[Step]]
    port: int = 0
    connections: int = 0
    requests: list[bytes] = attrs.field(factory=list)
    lost: trio.Event = attrs.field(factory=trio.Event)

    async def serve(self, stream: trio.abc.Stream) -> None:
        self.connections += 1
        try:
            while self.answers and (request := await stream.receive_some()):
                self.requests.append(bytes(request))
                await self._answer(stream)
        except trio.BrokenResourceError:
            pass
        self.lost.set()

    async def _answer(self, stream: trio.abc.Stream) -> None:
        for step in self.answers.pop(0):
            if isinstance(step, bytes):
                await stream.send_all(step)
            else:
                await step.wait()


Start = Callable[..., Awaitable[Peer]]


@pytest.fixture
def start(nursery: trio.Nursery) -> Start:
    async def start(*answers: list[Step], context: ssl.SSLContext | None = None) -> Peer:
        peer = Peer(list(answers))
        if context:
            serve = partial(trio.serve_ssl_over_tcp, peer.serve, 0, context, host="127.0.0.1", https_compatible=True)
        else:
            serve = partial(trio.serve_tcp, peer.serve, 0, host="127.0.0.1")
        [listener] = await nursery.start(serve)
        listener = getattr(listener, "transport_listener", listener)
        peer.port = listener.socket.getsockname()[1]
        return peer

    return start


@pytest.fixture
async def transport() -> AsyncIterator[StreamTransport]:
    async with StreamTransport(keepalive_expiry=30) as transport:
        yield transport


async def post(
    transport: StreamTransport, peer: Peer, *, scheme: str = "http", **options: Any
) -> tuple[httpx2.Response, list[bytes]]:
    """The response, and its body in the pieces in which it was read."""
    with trio.fail_after(10):
        request = httpx2.Request("POST", f"{scheme}://localhost:{peer.port}/v1?a=b", content=b"body", **options)
        response = await transport.handle_async_request(request)
        try:
            pieces = [piece async for piece in response.aiter_raw()]
        finally:
            await response.aclose()
        return response, pieces


# Requests and answers


async def test_a_request_goes_out_as_it_was_made(start: Start, transport: StreamTransport) -> None:
    peer = await start([sized(b"")])
    await post(transport, peer, headers={"X-Key": "1"})
    head, _, body = peer.requests[0].partition(b"\r\n\r\n")
    assert body == b"body"
    assert head.splitlines() == [
        b"POST /v1?a=b HTTP/1.1",
        b"Host: localhost:%d" % peer.port,
        b"X-Key: 1",
        b"Content-Length: 4",
    ]


@pytest.mark.parametrize(
    "answer",
    [
        sized(b"ab"),
        CHUNKED + chunks(b"a", b"b") + END,
        CHUNKED + b"1;last=no\r\na\r\n01 \r\nb\r\n0\r\nStatus: 500\r\n\r\n",
        sized(b"5\r\n", b"Transfer-Encoding: chunked")[:-3] + b"1\r\na\r\n1\r\nb\r\n" + END,
        b"HTTP/1.1 200 OK\nContent-Length: 2\n\nab",
        b"HTTP/1.1 200 OK\r\n\r\nab",
        b"HTTP/1.0 200 OK\r\n\r\nab",
    ],
    ids=["sized", "chunked", "chunked with extras", "both", "plain line ends", "until it closes", "HTTP/1.0"],
)
async def test_a_body_ends_as_its_framing_says(start: Start, transport: StreamTransport, answer: bytes) -> None:
    response, pieces = await post(transport, await start([answer]))
    assert response.status_code == 200
    assert "status" not in response.headers
    assert b"".join(pieces) == b"ab"


async def test_all_that_has_come_is_one_piece(start: Start, transport: StreamTransport) -> None:
    _, pieces = await post(transport, await start([CHUNKED + chunks(*[b"token "] * 1000) + END]))
    assert pieces == [b"token " * 1000]


async def test_what_has_come_does_not_wait_for_more(start: Start, transport: StreamTransport) -> None:
    more = trio.Event()
    peer = await start([CHUNKED + chunks(b"a") + b"5\r\n123", more, b"45\r\n" + END])
    with trio.fail_after(10):
        response = await transport.handle_async_request(httpx2.Request("GET", f"http://127.0.0.1:{peer.port}"))
        pieces = aiter(response.aiter_raw())
        assert await anext(pieces) == b"a123"
        more.set()
        assert [piece async for piece in pieces] == [b"45"]


async def test_headers_arrive_and_informational_answers_are_passed_over(
    start: Start, transport: StreamTransport
) -> None:
    peer = await start([b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n", sized(b"", b"X-A: 1", b"x-a: 2")])
    response, _ = await post(transport, peer)
    assert response.headers.get_list("x-a") == ["1", "2"]
    assert "link" not in response.headers


# Connections


async def test_a_connection_is_used_again_once_its_answer_was_read(start: Start, transport: StreamTransport) -> None:
    peer = await start(*[[CHUNKED + chunks(b"a") + END]] * 3)
    for _ in range(3):
        assert (await post(transport, peer))[1] == [b"a"]
    assert peer.connections == 1
    await transport.aclose()
    with trio.fail_after(10):
        await peer.lost.wait()


async def test_requests_at_a_time_have_a_connection_each(start: Start, transport: StreamTransport) -> None:
    both = trio.Event()
    peer = await start(*[[CHUNKED, both, END]] * 2)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(post, transport, peer)
        nursery.start_soon(post, transport, peer)
        with trio.fail_after(10):
            while len(peer.requests) < 2:
                await trio.testing.wait_all_tasks_blocked(0.001)
        both.set()
    assert peer.connections == 2


@pytest.mark.parametrize(
    "answer",
    [
        sized(b"", b"Connection: close"),
        sized(b"", b"Connection: close") + b"x",
        sized(b"").replace(b"1.1", b"1.0"),
        sized(b"") + b"HTTP/1.1 200 OK\r\n",
        sized(b"") + b"x",
    ],
)
async def test_a_connection_that_says_more_than_its_answer_or_goodbye_is_not_used_again(
    start: Start, transport: StreamTransport, answer: bytes
) -> None:
    peer = await start([answer], [sized(b"second")])
    await post(transport, peer)
    assert (await post(transport, peer))[1] == [b"second"]
    assert peer.connections == 2


async def test_a_connection_that_the_peer_has_closed_meanwhile_is_not_used_again(
    start: Start, transport: StreamTransport
) -> None:
    peer = await start([sized(b"first")])
    await post(transport, peer)
    with trio.fail_after(10):
        await peer.lost.wait()
        peer.answers.append([sized(b"second")])
        assert (await post(transport, peer))[1] == [b"second"]
    assert peer.connections == 2


@pytest.mark.parametrize(("expiry", "connections"), [(0.0, 2), (-1.0, 2), (30.0, 1)])
async def test_a_connection_is_kept_for_a_while_or_not_at_all(start: Start, expiry: float, connections: int) -> None:
    """An expiry of less than nothing is one that has always passed."""
    peer = await start([sized(b"")], [sized(b"")])
    async with StreamTransport(keepalive_expiry=expiry) as transport:
        await post(transport, peer)
        await post(transport, peer)
    assert peer.connections == connections


async def test_an_answer_that_was_not_read_closes_its_connection(start: Start, transport: StreamTransport) -> None:
    peer = await start([CHUNKED + chunks(b"a")], [])
    with trio.fail_after(10):
        response = await transport.handle_async_request(httpx2.Request("GET", f"http://127.0.0.1:{peer.port}"))
        await response.aclose()
        await response.aclose()
        await peer.lost.wait()


async def test_a_cancel_before_the_answer_closes_the_connection(start: Start, transport: StreamTransport) -> None:
    peer = await start([b"HTTP/1.1 100 Continue\r\n\r\n"], [sized(b"")])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(post, transport, peer)
        with trio.fail_after(10):
            while not peer.requests:
                await trio.testing.wait_all_tasks_blocked(0.001)
        nursery.cancel_scope.cancel()
    with trio.fail_after(10):
        await peer.lost.wait()


async def test_tls_is_checked_and_its_connections_are_used_again(start: Start) -> None:
    authority = trustme.CA()
    serving, trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("localhost").configure_cert(serving)
    authority.configure_trust(trusting)
    peer = await start(*[[sized(b"secret")]] * 3, context=serving)
    async with StreamTransport(keepalive_expiry=30, ssl_context=trusting) as transport:
        for _ in range(2):
            assert (await post(transport, peer, scheme="https"))[1] == [b"secret"]
    assert peer.connections == 1
    async with StreamTransport(keepalive_expiry=30) as distrusting:
        with pytest.raises(httpx2.ConnectError, match="certificate"):
            await post(distrusting, peer, scheme="https")


# Failures


async def test_nobody_there_is_a_connect_error(transport: StreamTransport) -> None:
    with trio.socket.socket() as unused:
        await unused.bind(("127.0.0.1", 0))  # taken, but nobody listens
        with pytest.raises(httpx2.ConnectError):
            await post(transport, Peer([], port=unused.getsockname()[1]))


async def test_connecting_has_a_time_limit(start: Start, transport: StreamTransport) -> None:
    peer = await start([sized(b"")])
    with pytest.raises(httpx2.ConnectTimeout):
        await post(transport, peer, extensions={"timeout": {"connect": 0}})


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", httpx2.RemoteProtocolError),
        (b"HTTP/1.1 200 OK\r\n", httpx2.RemoteProtocolError),
        (b"hello\r\n\r\n", httpx2.RemoteProtocolError),
        (b"HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\nab", httpx2.RemoteProtocolError),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: x\r\n\r\nab", httpx2.RemoteProtocolError),
        (CHUNKED + chunks(b"a"), httpx2.RemoteProtocolError),
        (CHUNKED + chunks(b"a") + b"no chunk\r\n", httpx2.RemoteProtocolError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\na", httpx2.RemoteProtocolError),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000, httpx2.RemoteProtocolError),
    ],
)
async def test_an_answer_that_breaks_off_or_makes_no_sense_is_a_protocol_error(
    start: Start, transport: StreamTransport, answer: bytes, error: type[Exception]
) -> None:
    with pytest.raises(error):
        await post(transport, await start([answer]))
    assert not any(transport._idle.values())


async def test_what_came_before_a_failure_is_read_first(start: Start, transport: StreamTransport) -> None:
    peer = await start([CHUNKED + chunks(b"a", b"b") + b"no chunk\r\n"])
    with trio.fail_after(10):
        response = await transport.handle_async_request(httpx2.Request("GET", f"http://127.0.0.1:{peer.port}"))
        pieces = aiter(response.aiter_raw())
        assert await anext(pieces) == b"ab"
        with pytest.raises(httpx2.RemoteProtocolError):
            await anext(pieces)


async def test_a_connection_that_is_reset_is_a_read_error(nursery: trio.Nursery, transport: StreamTransport) -> None:
    async def reset(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stream.socket.close()

    [listener] = await nursery.start(partial(trio.serve_tcp, reset, 0, host="127.0.0.1"))
    with pytest.raises(httpx2.ReadError):
        await post(transport, Peer([], port=listener.socket.getsockname()[1]))
