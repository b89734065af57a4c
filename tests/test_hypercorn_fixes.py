"""What `inference_trio.hypercorn_fixes` promises, over loopback sockets.

Each fix has two tests: one with it, and one named ``test_without_…`` that shows Hypercorn or Quart-Trio as they
come. When the second one fails, an upgrade has made the fix unnecessary.

The clock runs as usual, and a test moves it on instead of waiting. ``wait_all_tasks_blocked`` is used only where
what is still to happen needs no more input: how fast the kernel delivers must not matter.
"""

from __future__ import annotations

import json
import logging
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

import attrs
import h2.connection
import h2.errors
import h2.events
import hypercorn.protocol
import hypercorn.protocol.h11
import hypercorn.trio
import hypercorn.trio.run
import pytest
import trio
from hypercorn.config import Config
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.protocol.http_stream import HTTPStream
from hypercorn.protocol.ws_stream import WSStream
from hypercorn.trio import serve
from hypercorn.trio.tcp_server import TCPServer
from quart import request, websocket
from quart_trio import QuartTrio
from quart_trio.wrappers import TrioWebsocket
from trio.testing import MockClock, wait_all_tasks_blocked
from wsproto.events import BytesMessage, CloseConnection, Message, Ping, Pong, TextMessage

from inference_trio import hypercorn_fixes
from inference_trio.arriving import Arriving
from inference_trio.hypercorn_fixes import AppEndedError, Hooks, ServerLimits, install
from inference_trio.hypercorn_streams import BoundedWebsocket, OnlyHTTP1
from tests.sockets import HANDSHAKE, Client, connected, everything, pour, pour_out

MEGABYTE = 2**20
HOUR = 3600
LIMITS = ServerLimits(max_message_bytes=1000)
BURST = 100  # messages of the largest size: more than may wait for a handler
POST = b"POST /length HTTP/1.1\r\nHost: localhost\r\n%s\r\n"
UNBOUNDED_QUART = hasattr(TrioWebsocket, "buffer_class")  # Quart-Trio 0.13, which buffers without a bound


@pytest.fixture(autouse=True)
def hypercorn_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo whatever was installed before, and afterwards what the test installs.

    Nothing in a test ends because a connection has lingered for long enough.
    """
    for module in (hypercorn.trio, hypercorn.trio.run):
        monkeypatch.setattr(module, "worker_serve", hypercorn_fixes.plain_worker_serve)
    monkeypatch.setattr(hypercorn.trio.run, "TCPServer", TCPServer)
    monkeypatch.setattr(hypercorn.protocol, "H11Protocol", H11Protocol)
    monkeypatch.setattr(hypercorn.protocol.h11, "WSStream", WSStream)
    monkeypatch.setattr(hypercorn.protocol.h11, "HTTPStream", HTTPStream)
    monkeypatch.setattr(hypercorn_fixes, "LINGER", HOUR)


@pytest.fixture
def clock() -> MockClock:
    return MockClock(rate=1)


class ToyApp(QuartTrio):
    """Routes that behave in one way each.

    ``free`` says whether it could send at once; ``hurry`` does so, with more than the kernel takes. ``shout`` sends one
    message that is more than that. ``deaf`` receives one message, then none until ``leave`` is set; ``mutter`` then
    sends without end. The last four set ``busy`` when they have come that far, the last three ``ended``.
    """

    def __init__(self) -> None:
        super().__init__("toy")
        self.config["MAX_CONTENT_LENGTH"] = LIMITS.max_message_bytes
        self.busy = trio.Event()
        self.leave = trio.Event()
        self.ended = trio.Event()
        self.post("/length")(self.length)
        for handler in (self.echo, self.free, self.hurry, self.shout, self.deaf, self.mutter):
            self.websocket(f"/{handler.__name__}")(handler)

    async def length(self) -> str:
        return str(len(await request.get_data()))

    async def echo(self) -> None:
        while True:
            await websocket.send(repr(await websocket.receive()))

    async def free(self) -> None:
        await websocket.accept()
        await websocket.send(f"{websocket.is_free}")

    async def hurry(self) -> None:
        await websocket.accept()
        websocket.send_at_once("first")
        websocket.send_at_once("x" * 32 * MEGABYTE)
        self.busy.set()
        await websocket.send(f"{websocket.is_free}")
        websocket.send_at_once("last")
        await self.leave.wait()

    async def shout(self) -> None:
        try:
            self.busy.set()
            await websocket.send(bytes(32 * MEGABYTE))
        finally:
            self.ended.set()

    async def deaf(self) -> None:
        try:
            await websocket.receive()
            self.busy.set()
            await self.leave.wait()
        finally:
            self.ended.set()

    async def mutter(self) -> None:
        try:
            await websocket.receive()
            self.busy.set()
            await self.leave.wait()
            while True:
                await websocket.send("x")
                await trio.lowlevel.checkpoint()
        finally:
            self.ended.set()


@asynccontextmanager
async def serving(app: ToyApp, **settings: object) -> AsyncIterator[int]:
    """Serve ``app``, as the ``hypercorn`` command does, on the port that this yields."""
    is_installed = hypercorn.protocol.h11.WSStream is not WSStream
    app.websocket_class = BoundedWebsocket if is_installed else TrioWebsocket
    config = Config.from_mapping(bind=["127.0.0.1:0"], errorlog=None)
    for name, value in settings.items():
        setattr(config, name, value)
    async with trio.open_nursery() as nursery:
        (bind,) = await nursery.start(partial(serve, app, config))
        yield int(bind.rpartition(":")[2])
        nursery.cancel_scope.cancel()


async def burst(client: Client) -> None:
    """Send many messages at once."""
    await client.stream.send_all(b"".join(client.connection.send(TextMessage(data="x" * 1000)) for _ in range(BURST)))


# A peer that does not read, or says nothing


async def test_a_client_that_stops_reading_is_dropped(clock: MockClock) -> None:
    install(LIMITS)
    app = ToyApp()
    async with serving(app) as port, connected(port, b"/shout"):
        await blocked(app)
        clock.jump(LIMITS.write_timeout)
        with trio.fail_after(10):
            await app.ended.wait()


async def test_a_client_that_reads_slowly_gets_a_message_that_takes_long(clock: MockClock) -> None:
    install(attrs.evolve(LIMITS, pong_timeout=HOUR))
    app = ToyApp()
    async with serving(app) as port, connected(port, b"/shout") as client:
        client.stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)  # else it grows to more than is read here
        await blocked(app)
        for _ in range(3):
            clock.jump(LIMITS.write_timeout * 0.6)
            await read(client, 10 * MEGABYTE)  # more than the kernel holds, so the server has gone on
        await read(client, MEGABYTE)


# What is sent without waiting


async def test_what_is_sent_at_once_is_written_whole_and_in_order() -> None:
    install(LIMITS)
    app = ToyApp()
    async with serving(app) as port, connected(port, b"/hurry") as client:
        await blocked(app)
        received = [await client.message()]
        while received[-1] != "last":
            received.append(await client.message())
        app.leave.set()
    first, *pieces, was_free, _ = received
    assert (first, was_free) == ("first", "False")
    assert "".join(pieces) == "x" * 32 * MEGABYTE


async def test_a_client_that_does_not_read_what_is_sent_at_once_is_dropped(clock: MockClock) -> None:
    install(LIMITS)
    app = ToyApp()
    async with serving(app) as port, connected(port, b"/hurry") as client:
        await blocked(app)
        clock.jump(LIMITS.write_timeout)
        await wait_all_tasks_blocked()
        with trio.fail_after(10):
            await pour_out(client.stream)


async def test_without_it_nothing_is_free_to_be_sent_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Hypercorn did not pass a connection's state on to its WebSocket, all would be sent the ordinary way."""
    install(LIMITS)
    monkeypatch.setattr(hypercorn_fixes, "OUTLET", "elsewhere")
    async with serving(ToyApp()) as port, connected(port, b"/free") as client:
        assert await client.message() == "False"


async def test_a_connection_that_was_accepted_is_free_to_be_sent_to() -> None:
    install(LIMITS)
    async with serving(ToyApp()) as port, connected(port, b"/free") as client:
        assert await client.message() == "True"


async def read(client: Client, size: int) -> None:
    while size > 0:
        with trio.fail_after(10):
            data = await client.stream.receive_some(size)
        assert data, f"closed, with {size} bytes to come"
        size -= len(data)


async def test_without_a_write_timeout_it_blocks_for_ever(clock: MockClock) -> None:
    app = ToyApp()
    async with serving(app, read_timeout=10) as port, connected(port, b"/shout"):
        await blocked(app)
        clock.jump(HOUR)
        await wait_all_tasks_blocked()
        assert not app.ended.is_set()


async def test_a_server_that_stops_does_not_wait_for_a_client_that_does_not_read() -> None:
    install(LIMITS)
    app = ToyApp()
    async with AsyncExitStack() as clients:
        with trio.move_on_after(10) as soon:
            async with serving(app) as port:
                await clients.enter_async_context(connected(port, b"/shout"))
                await blocked(app)
        assert not soon.cancel_called


async def blocked(app: ToyApp) -> None:
    """Wait until the handler is busy, and nothing moves any more."""
    with trio.fail_after(10):
        await app.busy.wait()
        await wait_all_tasks_blocked()


async def test_a_silent_peer_is_dropped(clock: MockClock) -> None:
    install(LIMITS)
    async with serving(ToyApp()) as port, connected(port) as client:
        await wait_all_tasks_blocked()
        clock.jump(LIMITS.pong_timeout)
        await client.end_of_file()


async def test_without_a_pong_timeout_a_silent_peer_stays(clock: MockClock) -> None:
    async with serving(ToyApp(), websocket_ping_interval=20) as port, connected(port) as client:
        await wait_all_tasks_blocked()
        clock.jump(HOUR)
        with pytest.raises(trio.TooSlowError), trio.fail_after(0.5):
            await client.end_of_file()


async def test_a_peer_that_answers_pings_stays(clock: MockClock) -> None:
    install(LIMITS)
    async with serving(ToyApp()) as port, connected(port) as client:
        for _ in range(10):
            ping = await client.next(Ping)
            assert isinstance(ping, Ping)
            await client.send(ping.response())
            await client.send(TextMessage(data="read after the pong"))
            await client.message()
            await wait_all_tasks_blocked()
            clock.jump(LIMITS.ping_interval)


async def test_headers_that_trickle_in_are_not_waited_for(clock: MockClock) -> None:
    install(LIMITS)
    async with serving(ToyApp()) as port, kept_alive(port) as stream:
        for byte in b"GET /":
            await stream.send_all(bytes([byte]))
            clock.jump(LIMITS.header_timeout / 5)
        assert await everything(stream) == b""


async def test_a_connection_kept_alive_is_closed_in_time(clock: MockClock) -> None:
    install(LIMITS)
    async with serving(ToyApp()) as port, kept_alive(port) as stream:
        clock.jump(LIMITS.header_timeout)
        assert await everything(stream) == b""


async def test_without_it_a_connection_kept_alive_stays(clock: MockClock) -> None:
    async with serving(ToyApp()) as port, kept_alive(port) as stream:
        clock.jump(HOUR)
        with pytest.raises(trio.TooSlowError), trio.fail_after(0.5):
            await everything(stream)


@asynccontextmanager
async def kept_alive(port: int) -> AsyncIterator[trio.SocketStream]:
    """A connection that has had one response."""
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(POST % b"Content-Length: 0\r\n")
        response = b""
        while not response.endswith(b"\r\n\r\n0"):
            response += await stream.receive_some()
        await wait_all_tasks_blocked()
        yield stream


# Messages


async def test_a_message_of_the_largest_size_arrives() -> None:
    install(LIMITS)
    async with serving(ToyApp()) as port, connected(port) as client:
        await client.send(TextMessage(data="é" * 500))
        assert await client.message() == repr("é" * 500)


@pytest.mark.parametrize("message", ["x" * 1001, "é" * 501, b"x" * 1001, "x" * 8 * MEGABYTE])
async def test_a_message_over_the_limit_closes_with_1009_and_closes_the_socket(message: str | bytes) -> None:
    install(LIMITS)
    event: Message = TextMessage(data=message) if isinstance(message, str) else BytesMessage(data=message)
    async with serving(ToyApp()) as port, connected(port) as client:
        await client.send(event)
        assert await client.close_code() == 1009
        await client.end_of_file()


async def test_without_it_the_socket_stays_open_after_1009_and_characters_count() -> None:
    async with serving(ToyApp(), websocket_max_message_size=1000) as port, connected(port) as client:
        await client.send(TextMessage(data="é" * 1000))
        assert await client.message() == repr("é" * 1000)
        await client.send(TextMessage(data="é" * 1001))
        assert await client.close_code() == 1009
        with pytest.raises(trio.TooSlowError), trio.fail_after(0.5):
            await client.end_of_file()


async def test_compression_is_not_accepted() -> None:
    install(LIMITS)
    offer = b"Sec-WebSocket-Extensions: permessage-deflate\r\n"
    async with serving(ToyApp()) as port, connected(port, headers=offer) as client:
        assert b"extensions" not in client.head.lower()
        await client.send(TextMessage(data="plain"))
        assert await client.message() == "'plain'"


async def test_without_it_compression_is_accepted() -> None:
    offer = b"Sec-WebSocket-Extensions: permessage-deflate\r\n"
    async with serving(ToyApp()) as port, connected(port, headers=offer) as client:
        assert b"permessage-deflate" in client.head


@pytest.mark.parametrize(
    ("message", "echo"),
    [(TextMessage(data=""), "''"), (BytesMessage(data=b"\xff"), r"b'\xff'"), (BytesMessage(data=b""), "b''")],
)
async def test_text_and_bytes_arrive_as_what_they_are(message: Message, echo: str) -> None:
    install(LIMITS)
    async with serving(ToyApp()) as port, connected(port) as client:
        await client.send(message)
        assert await client.message() == echo


async def test_without_it_an_empty_binary_message_arrives_as_none() -> None:
    async with serving(ToyApp()) as port, connected(port) as client:
        await client.send(BytesMessage(data=b""))
        assert await client.message() == "None"


BAD_FRAMES = {
    "text that is not UTF-8": (b"\x81\x81\0\0\0\0\xff", 1007),
    "no mask": (b"\x81\x01a", 1002),
    "an unknown opcode": (b"\x83\x80\0\0\0\0", 1002),
    "a ping in fragments": (b"\x09\x80\0\0\0\0", 1002),
    "a reserved bit": (b"\xc1\x81\0\0\0\0a", 1002),
    "a continuation of nothing": (b"\x80\x80\0\0\0\0", 1002),
    "a close frame of one byte": (b"\x88\x81\0\0\0\0a", 1002),
}


@pytest.mark.parametrize(("frame", "code"), BAD_FRAMES.values(), ids=BAD_FRAMES.keys())
async def test_a_bad_frame_closes_with_the_code_of_rfc_6455(frame: bytes, code: int) -> None:
    install(LIMITS)
    async with serving(ToyApp()) as port, connected(port) as client:
        await client.stream.send_all(frame)
        assert await client.close_code() == code
        await client.end_of_file()


async def test_without_it_a_bad_frame_closes_without_a_close_frame() -> None:
    app = ToyApp()
    app.log_exception = lambda *args: None  # type: ignore[method-assign]
    async with serving(app) as port, connected(port) as client:
        await client.stream.send_all(BAD_FRAMES["no mask"][0])
        await client.end_of_file()


async def test_a_close_of_the_peer_is_answered_with_its_code() -> None:
    install(LIMITS)
    async with serving(ToyApp()) as port, connected(port) as client:
        await client.send(CloseConnection(code=4000))
        assert await client.close_code() == 4000
        await client.end_of_file()


# An application that does not read

FLOOD_OF_MESSAGES = [(b"\x82\xfe\x03\xe8" + bytes(1004)) * 1000] * 20


async def test_an_application_that_does_not_read_is_cancelled_in_time(clock: MockClock) -> None:
    install(LIMITS)
    app = ToyApp()
    async with serving(app) as port, connected(port, b"/deaf") as client:
        await burst(client)
        await blocked(app)
        clock.jump(LIMITS.pong_timeout)
        with trio.fail_after(10):
            await app.ended.wait()


async def test_an_application_that_does_not_read_makes_its_peer_wait() -> None:
    install(LIMITS)
    app = ToyApp()
    async with serving(app) as port, connected(port, b"/deaf") as client, trio.open_nursery() as nursery:
        nursery.start_soon(pour, client.stream, FLOOD_OF_MESSAGES)
        await blocked(app)
        with pytest.raises(trio.TooSlowError), trio.fail_after(0.5):
            await app.ended.wait()
        assert nursery.child_tasks, "it is still sending"
        nursery.cancel_scope.cancel()


@pytest.mark.skipif(not UNBOUNDED_QUART, reason="Quart-Trio 0.12 keeps ten messages")
async def test_without_it_everything_is_taken() -> None:
    async with serving(ToyApp()) as port, connected(port, b"/deaf") as client:
        with trio.fail_after(10):
            await pour(client.stream, FLOOD_OF_MESSAGES)


async def test_an_application_that_writes_and_does_not_read_is_cancelled_when_its_peer_is_gone() -> None:
    install(LIMITS)
    app = ToyApp()
    async with serving(app) as port:
        async with connected(port, b"/mutter") as client:
            await burst(client)
            await blocked(app)
            client.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        app.leave.set()
        with trio.fail_after(10):
            await app.ended.wait()


async def test_a_handler_that_returns_ends_the_connection_although_messages_wait() -> None:
    install(LIMITS)
    app = ToyApp()
    async with serving(app) as port, connected(port, b"/deaf") as client:
        await burst(client)
        await blocked(app)
        app.leave.set()
        assert await client.close_code() == 1000
        await client.end_of_file()


@pytest.mark.skipif(UNBOUNDED_QUART, reason="Quart-Trio 0.13 keeps all messages, so that nothing waits")
async def test_without_it_the_connection_stays(clock: MockClock) -> None:
    app = ToyApp()
    async with serving(app) as port, connected(port, b"/deaf") as client:
        await burst(client)
        await blocked(app)
        app.leave.set()
        assert await client.close_code() == 1000
        clock.jump(HOUR)
        with pytest.raises(trio.TooSlowError), trio.fail_after(0.5):
            await client.end_of_file()


async def test_a_connection_leaves_no_task_behind() -> None:
    install(LIMITS)
    with trio.fail_after(10):
        await open_and_close_a_connection()


async def test_without_it_the_timer_of_pings_stays_a_while() -> None:
    with pytest.raises(trio.TooSlowError), trio.fail_after(0.5):
        await open_and_close_a_connection(websocket_ping_interval=20)


async def test_a_disconnect_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    install(LIMITS)
    await open_and_close_a_connection()
    assert caplog.messages == []


async def open_and_close_a_connection(**settings: object) -> None:
    """Return when there are as many tasks as before it."""
    async with serving(ToyApp(), **settings) as port:
        await wait_all_tasks_blocked()
        before = trio.lowlevel.current_statistics().tasks_living
        async with connected(port) as client:
            await client.send(CloseConnection(code=1000))
            assert await client.close_code() == 1000
        while trio.lowlevel.current_statistics().tasks_living > before:
            await trio.lowlevel.checkpoint()


# Errors inside Hypercorn


async def test_a_connection_that_fails_is_logged_and_leaves_the_others_alone(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(LIMITS)

    async def fail(*_: object) -> None:
        raise ValueError("of Hypercorn's own")

    async with serving(ToyApp(), errorlog=logging.getLogger("hypercorn.error")) as port:
        with monkeypatch.context() as patch:
            patch.setattr(OnlyHTTP1, "_check_protocol", fail)
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                await stream.send_all(POST % b"")
                assert await everything(stream) == b""
        async with connected(port) as client:
            await client.send(TextMessage(data="still here"))
            assert await client.message() == "'still here'"
    assert "A connection failed" in caplog.messages
    assert "of Hypercorn's own" in caplog.text


@pytest.mark.parametrize(
    "header", [b"Sec-WebSocket-Protocol: ticket.\xff", b"Connection: \xff, Upgrade", b"Sec-WebSocket-Extensions: \xff"]
)
async def test_a_handshake_that_is_not_ascii_is_refused(header: bytes, caplog: pytest.LogCaptureFixture) -> None:
    install(LIMITS)
    async with (
        serving(ToyApp(), errorlog=logging.getLogger("hypercorn.error")) as port,
        await trio.open_tcp_stream("127.0.0.1", port) as stream,
    ):
        await stream.send_all(HANDSHAKE % (b"/echo", header + b"\r\n"))
        assert (await everything(stream)).startswith(b"HTTP/1.1 400")
    assert caplog.messages == []


@pytest.mark.parametrize("target", [b"http://[", b"http://%5B/", b"?x"])
async def test_a_target_that_cannot_be_read_is_refused(target: bytes, caplog: pytest.LogCaptureFixture) -> None:
    install(LIMITS)
    async with (
        serving(ToyApp(), errorlog=logging.getLogger("hypercorn.error")) as port,
        await trio.open_tcp_stream("127.0.0.1", port) as stream,
    ):
        await stream.send_all(b"GET " + target + b" HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await everything(stream)).startswith(b"HTTP/1.1 400")
    assert caplog.messages == []


async def test_without_it_one_handshake_ends_the_whole_server() -> None:
    with pytest.RaisesGroup(UnicodeDecodeError, flatten_subgroups=True):
        await until_the_server_ends(send_handshake_that_is_not_ascii)


async def until_the_server_ends(attack: Callable[[int], Awaitable[None]]) -> None:
    with trio.fail_after(10):
        async with serving(ToyApp()) as port:
            await attack(port)
            await trio.sleep_forever()


async def send_handshake_that_is_not_ascii(port: int) -> None:
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(HANDSHAKE % (b"/echo", b"Sec-WebSocket-Protocol: \xff\r\n"))
        assert await everything(stream) == b""


# HTTP/2

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


async def test_http2_is_answered_with_the_wish_for_http1() -> None:
    install(LIMITS)
    async with serving(ToyApp()) as port, await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(PREFACE)
        client = h2.connection.H2Connection()
        client.initiate_connection()
        *_, event = client.receive_data(await everything(stream))
        assert isinstance(event, h2.events.ConnectionTerminated)
        assert event.error_code == h2.errors.ErrorCodes.HTTP_1_1_REQUIRED


async def test_without_it_http2_is_spoken() -> None:
    async with serving(ToyApp()) as port, await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(PREFACE)
        client = h2.connection.H2Connection()
        client.initiate_connection()
        settings, *_ = client.receive_data(await stream.receive_some())
        assert isinstance(settings, h2.events.RemoteSettingsChanged)


UPGRADE = POST % b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"


async def test_an_upgrade_to_http2_is_ignored() -> None:
    install(LIMITS)
    async with serving(ToyApp()) as port, await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(UPGRADE)
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 200")


async def test_without_it_an_upgrade_to_http2_is_made() -> None:
    async with serving(ToyApp()) as port, await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(UPGRADE)
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 101")


# Bodies


CHUNKED = POST % b"Transfer-Encoding: chunked\r\n"
CHUNK = b"3e8\r\n" + b"x" * 1000 + b"\r\n"


async def test_a_body_of_the_largest_size_arrives() -> None:
    install(LIMITS)
    async with serving(ToyApp()) as port, await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(POST % b"Connection: close\r\nTransfer-Encoding: chunked\r\n" + CHUNK + b"0\r\n\r\n")
        assert (await everything(stream)).endswith(b"\r\n\r\n1000")


async def test_a_body_without_an_end_is_refused_once_it_is_over_the_limit() -> None:
    install(LIMITS)
    async with serving(ToyApp()) as port, await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(CHUNKED + CHUNK + b"1\r\nx\r\n")
        assert (await everything(stream)).startswith(b"HTTP/1.1 413")


@pytest.mark.skipif(not UNBOUNDED_QUART, reason="Quart 0.22 counts while the body comes")
async def test_without_it_a_body_without_an_end_is_not_refused() -> None:
    async with serving(ToyApp()) as port, await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(CHUNKED + CHUNK + CHUNK)
        with pytest.raises(trio.TooSlowError), trio.fail_after(0.5):
            await stream.receive_some()


LARGE_BODY = POST % b"Content-Length: 8388608\r\n" + bytes(8 * MEGABYTE)


async def test_a_client_that_sends_its_large_body_to_the_end_still_sees_413() -> None:
    install(LIMITS)
    async with serving(ToyApp()) as port, await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(LARGE_BODY)
        assert (await everything(stream)).startswith(b"HTTP/1.1 413")


# All connections together

LARGE = attrs.evolve(LIMITS, max_message_bytes=100_000, max_arriving_bytes=100_000, max_connections=3)
BEGINNING = TextMessage(data="x" * 60_000, message_finished=False)
THE_END = TextMessage(data="x")


async def test_a_large_message_waits_until_the_one_before_it_has_ended() -> None:
    install(LARGE)
    async with serving(ToyApp()) as port, connected(port) as one, connected(port) as other:
        await one.send(BEGINNING)
        await wait_all_tasks_blocked()
        await other.send(BEGINNING)
        await other.send(THE_END)
        async with connected(port) as small:
            await small.send(TextMessage(data="small"))
            assert await small.message() == "'small'"
        with pytest.raises(trio.TooSlowError), trio.fail_after(0.5):
            await other.message()
        await one.send(THE_END)
        for client in (one, other):
            assert (await client.message()).startswith("'x")


Refusals = list[tuple[str, int]]


def install_and_note() -> tuple[Arriving, Refusals]:
    """With `LARGE`. What is arriving, and the list that refusals are put on."""
    refusals: Refusals = []
    return install(LARGE, Hooks(on_refusal=lambda *refusal: refusals.append(refusal))), refusals


async def test_a_message_that_does_not_end_gives_way_in_time(clock: MockClock) -> None:
    _, refusals = install_and_note()
    async with serving(ToyApp()) as port, connected(port) as one, connected(port) as other:
        await one.send(BEGINNING)
        await wait_all_tasks_blocked()
        clock.jump(LARGE.arriving_patience)
        await one.send(TextMessage(data="x", message_finished=False))
        await other.send(BEGINNING)
        await other.send(THE_END)
        assert await one.close_code() == 1013
        await one.end_of_file()
        assert (await other.message()).startswith("'x")
    assert refusals == [("websocket", 1013)]


async def test_a_message_that_waits_for_too_long_gives_way_too(clock: MockClock) -> None:
    install(attrs.evolve(LARGE, arriving_patience=HOUR))
    async with serving(ToyApp()) as port, connected(port) as one, connected(port) as other:
        await one.send(BEGINNING)
        await wait_all_tasks_blocked()
        await other.send(BEGINNING)
        await wait_all_tasks_blocked()
        clock.jump(LARGE.pong_timeout / 2)
        assert await other.close_code() == 1013
        await other.end_of_file()


BODY = POST % b"Content-Length: 70000\r\n" + b"x" * 60_000


class Posting(ToyApp):
    """``hold`` has the body of its request until ``leave`` is set, whatever becomes of the connection."""

    def __init__(self) -> None:
        super().__init__()
        self.config["MAX_CONTENT_LENGTH"] = LARGE.max_message_bytes
        self.post("/hold")(self.hold)

    async def hold(self) -> str:
        body = await request.get_data()
        with trio.CancelScope(shield=True):
            self.busy.set()
            await self.leave.wait()
        return str(len(body))


async def test_a_body_that_does_not_end_gives_way_in_time(clock: MockClock) -> None:
    _, refusals = install_and_note()
    async with serving(Posting()) as port, await trio.open_tcp_stream("127.0.0.1", port) as one:
        await one.send_all(BODY)
        await wait_all_tasks_blocked()
        clock.jump(LARGE.arriving_patience)
        async with await trio.open_tcp_stream("127.0.0.1", port) as other:
            await other.send_all(BODY + b"x" * 10_000)
            check_refusal(await everything(one))
            assert (await other.receive_some()).startswith(b"HTTP/1.1 200")
    assert refusals == [("http", 503)]


async def comes_to(arriving: Arriving, used: int) -> None:
    with trio.fail_after(10):
        while arriving.used != used:
            await trio.lowlevel.checkpoint()


def check_refusal(answer: bytes) -> None:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503")
    assert b"\r\nretry-after: 1\r\n" in head + b"\r\n"
    error = json.loads(body)["error"]
    assert (error["code"], error["data"]) == (-32005, {"retry_after": 1})


async def test_a_body_counts_until_the_application_lets_go_of_it() -> None:
    arriving, _ = install_and_note()
    app = Posting()
    async with serving(app) as port:
        async with await trio.open_tcp_stream("127.0.0.1", port) as one:
            await one.send_all((BODY + b"x" * 10_000).replace(b"/length", b"/hold"))
            await app.busy.wait()
        await wait_all_tasks_blocked()
        used = arriving.used
        app.leave.set()
        assert used == 70_000
        await comes_to(arriving, 0)


async def test_what_a_connection_held_that_fails_counts_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    arriving, _ = install_and_note()

    async def fail(*_: object) -> None:
        raise ValueError("of Hypercorn's own")

    async with serving(Posting()) as port, connected(port) as one:
        await one.send(BEGINNING)
        async with await trio.open_tcp_stream("127.0.0.1", port) as other:
            await other.send_all(BODY)
            await comes_to(arriving, 120_000)
            monkeypatch.setattr(OnlyHTTP1, "handle", fail)
            for stream in (one.stream, other):
                await stream.send_all(b"x")
                await everything(stream)
        await comes_to(arriving, 0)


async def test_a_connection_beyond_the_limit_is_told_and_closed() -> None:
    _, refusals = install_and_note()
    async with serving(ToyApp()) as port, connected(port), connected(port), connected(port) as client:
        async with await trio.open_tcp_stream("127.0.0.1", port) as one_more:
            check_refusal(await everything(one_more))
        assert refusals == [("http", 503)]
        await client.send(TextMessage(data="still here"))
        assert await client.message() == "'still here'"
        await client.send(CloseConnection(code=1000))
        assert await client.close_code() == 1000
        await client.end_of_file()
        await wait_all_tasks_blocked()
        async with connected(port):
            pass


FRAGMENT = b"\x00\x80\0\0\0\0"
FLOOD = b"\x02" + FRAGMENT[1:] + FRAGMENT * 10_000 + b"\x89" + FRAGMENT[1:]


async def test_a_flood_of_frames_is_handled_in_turns_with_all_else() -> None:
    install(LIMITS)
    assert await turns_of_others() > 9_000


async def test_without_it_a_flood_comes_first() -> None:
    assert await turns_of_others() < 1_000


async def turns_of_others() -> int:
    """How often another task has had its turn until the last frame of a flood, a ping, is answered."""
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with serving(ToyApp()) as port, connected(port) as client, trio.open_nursery() as nursery:
        await client.stream.send_all(FLOOD)
        nursery.start_soon(count)
        await client.next(Pong)
        nursery.cancel_scope.cancel()
    return turns


# An application that fails beside its requests


def failing() -> tuple[ToyApp, trio.Event]:
    """An app, and what makes a task in its nursery fail."""
    app, fail = ToyApp(), trio.Event()

    async def run() -> None:
        await fail.wait()
        raise RuntimeError

    async def start() -> None:
        app.nursery.start_soon(run)

    app.before_serving(start)
    return app, fail


async def test_an_application_that_fails_ends_its_server() -> None:
    install(LIMITS)
    app, fail = failing()
    failures: list[BaseException] = []
    with trio.fail_after(10):
        try:
            async with serving(app) as port, connected(port):
                fail.set()
                await trio.sleep_forever()
        except* AppEndedError as group:
            failures.append(group)
    assert failures


async def test_without_it_it_is_served_on() -> None:
    app, fail = failing()
    async with serving(app) as port, connected(port) as before:
        fail.set()
        await before.send(TextMessage(data="hi"))
        assert await before.message() == "'hi'"
        async with connected(port) as after:
            await after.send(TextMessage(data="hi"))
            assert await after.message() == "'hi'"


# Installing


async def test_the_limits_of_the_last_install_count() -> None:
    install(attrs.evolve(LIMITS, max_message_bytes=1))
    install(LIMITS)
    async with serving(ToyApp()) as port, connected(port) as client:
        await client.send(TextMessage(data="more than one"))
        assert await client.message() == "'more than one'"
