"""What Hypercorn 0.18 and Quart-Trio 0.12/0.13 lack for a WebSocket server that strangers can reach.

`install` puts subclasses in place of the names that Hypercorn's Trio worker looks up; an application calls it
when it is imported, so the plain ``hypercorn`` command has them too. Every reason stands at its override.

How a connection ends. One task reads the socket, inside the cancel scope ``_reading``; all else is the
application's task and a few of Hypercorn's. Whatever ends a connection ends its reading:

* The peer went silent, or the application took nothing: the scope's deadline, moved on with each read, is reached.
* A write failed or took too long: the socket is closed.
* We close (after a close frame or a last response): we send end-of-file, then read and discard for at most
  ``LINGER`` seconds. A socket that is closed with unread input is reset, and many a client then never sees
  why it was closed.

Then the socket is closed, the application is told, and the scope around the whole connection is cancelled, so
that no task outlives its socket. A WebSocket handler learns of the end in one way only: it is cancelled.

An application that does not read: its peer is made to wait (TCP's own back-pressure), which keeps memory
bounded: by a handful of messages each in Hypercorn's queue and in Quart's. The price is that pings, pongs and a
close by the peer wait as well, so the connection is dropped after ``pong_timeout`` of that. To drop it at the
first full queue would punish clients that send a burst.

Left to the application: ``send`` on a closed stream returns without a checkpoint, so a loop around it needs one
of its own; a handler that raises closes with 1000, so it has to close with 1011 itself;
``app.websocket_class = BoundedWebsocket``; ``MAX_CONTENT_LENGTH`` equal to ``max_message_bytes``, and
``BODY_TIMEOUT`` for a body that trickles in.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

import attrs
import hypercorn.protocol.h2
import hypercorn.protocol.h11
import hypercorn.trio
import hypercorn.trio.run
import trio
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData
from hypercorn.protocol.events import Body, EndBody, StreamClosed
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.http_stream import HTTPStream
from hypercorn.protocol.ws_stream import FrameTooLargeError, WebsocketBuffer, WSStream
from hypercorn.trio.tcp_server import MAX_RECV, TCPServer
from hypercorn.typing import ASGIReceiveEvent, ASGISendEvent, WebsocketAcceptEvent
from quart_trio.wrappers import TrioWebsocket
from wsproto.events import CloseConnection, Message, Ping
from wsproto.frame_protocol import CloseReason

LINGER = 5.0
"""Seconds for which a connection that we close is still read, and an application is told that it ended."""

STOPPING_TIME = 0.5
"""Seconds that connections have to end by themselves when Hypercorn stops."""

plain_worker_serve = hypercorn.trio.run.worker_serve
"""Hypercorn's own, for another app beside the one that it was started with."""

QUEUED_MESSAGES = 4
"""Messages waiting for a handler in `BoundedWebsocket`."""


@attrs.frozen
class ServerLimits:
    """What one connection may take. Sizes in bytes, times in seconds.

    ``max_message_bytes``: a WebSocket message, in UTF-8 where it is text, or the body of a request. A larger
    message is answered with close code 1009; of a larger body the application sees just enough to refuse it.
    ``write_timeout``: how long one write may take before the peer is dropped.
    ``ping_interval``, ``pong_timeout``: how often a WebSocket is pinged, and how long any peer may send nothing at
    all before it is dropped. The second must be larger than the first, and than any response takes.
    ``header_timeout``: until the first or the next request's headers are complete.
    """

    max_message_bytes: int
    write_timeout: float = 30.0
    ping_interval: float = 20.0
    pong_timeout: float = 60.0
    header_timeout: float = 30.0

    def apply(self, config: Config) -> None:
        """Set what Hypercorn can be told."""
        config.websocket_max_message_size = self.max_message_bytes
        config.wsgi_max_body_size = self.max_message_bytes
        config.websocket_ping_interval = self.ping_interval
        # Runs from the connection's start, or the last response, to the next complete headers.
        config.keep_alive_timeout = self.header_timeout
        config.max_app_queue_size = 1


def install(
    limits: ServerLimits,
    before_stop: Callable[[], Awaitable[None]] | None = None,
    before_start: Callable[[Config], None] = lambda _: None,
) -> None:
    """Make Hypercorn's Trio worker use these fixes in this process. The last call's arguments count.

    ``before_start`` is called with Hypercorn's configuration; ``before_stop`` is awaited between the signal to stop
    and the stop, while all is still served.
    """
    for module in (hypercorn.trio, hypercorn.trio.run):
        module.worker_serve = partial(_serve, before_start, before_stop) if before_stop else plain_worker_serve  # type: ignore[attr-defined]
    hypercorn.trio.run.TCPServer = partial(BoundedTCPServer, limits)  # type: ignore[assignment, attr-defined]
    for protocol in (hypercorn.protocol.h11, hypercorn.protocol.h2):
        protocol.WSStream = BoundedWSStream  # type: ignore[attr-defined]
        protocol.HTTPStream = BoundedHTTPStream  # type: ignore[attr-defined]


async def _serve(
    before_start: Callable[[Config], None],
    before_stop: Callable[[], Awaitable[None]],
    app: Any,
    config: Config,
    **options: Any,
) -> None:
    """Hypercorn tells open WebSockets nothing when it stops: they are cut off when its time is over."""
    before_start(config)
    trigger = options.pop("shutdown_trigger", None)
    config.graceful_timeout = STOPPING_TIME
    # Else it writes to stderr by itself, as well as through `logging`.
    config.errorlog = logging.getLogger("hypercorn.error")

    async def told_and_ready() -> None:
        await trigger()
        await before_stop()

    await plain_worker_serve(app, config, shutdown_trigger=told_and_ready if trigger else None, **options)


class BoundedTCPServer(TCPServer):
    """One connection, which ends in bounded time whatever its peer and its application do."""

    def __init__(self, limits: ServerLimits, app: Any, config: Config, *args: Any) -> None:
        limits.apply(config)
        super().__init__(app, config, *args)
        self._limits = limits
        self._closing = False
        self._connection = trio.CancelScope()
        self._reading = trio.CancelScope()

    async def run(self) -> None:
        """Serve the connection. Never raises an `Exception`.

        An error of Hypercorn's own ends the whole server otherwise, and a peer can provoke one: with a byte
        that is not ASCII in ``Sec-WebSocket-Protocol``, or with HTTP/2 data after its stream has ended.
        """
        try:
            with self._connection:
                await super().run()
        except* Exception:
            await self.config.log.exception("A connection failed")

    async def protocol_send(self, event: Event) -> None:
        """Write, close, or start and stop the idle timer.

        The last two are shielded, too: Quart-Trio cancels the task of a request as soon as Hypercorn tells it that
        the response is complete, which is before Hypercorn gets here. The connection was then neither closed nor
        timed, and stayed for as long as its peer liked.
        """
        if isinstance(event, RawData):
            await self._write(event.data)
        elif isinstance(event, Closed):
            with trio.CancelScope(shield=True):
                await self._linger()
            await self.protocol.handle(Closed())
        else:
            with trio.CancelScope(shield=True):
                await super().protocol_send(event)

    async def _write(self, data: bytes) -> None:
        """Write, whole frames only, hence the shield; a peer that does not read would hold it for ever."""
        if not self.send_lock.locked():
            data = self._write_at_once(data)
        if not data:
            return
        async with self.send_lock:
            try:
                with trio.fail_after(self._limits.write_timeout, shield=True):
                    await self.stream.send_all(data)
            except (trio.TooSlowError, trio.BrokenResourceError, trio.ClosedResourceError):
                await trio.aclose_forcefully(self.stream)

    def _write_at_once(self, data: bytes) -> bytes:
        """What the socket does not take at once. Mostly that is nothing, and locks and time limits are not needed."""
        if isinstance(self.stream, trio.SocketStream):
            with suppress(OSError):  # it takes nothing, or is broken: the ordinary way finds out
                return data[os.write(self.stream.socket.fileno(), data) :]
        return data

    async def _linger(self) -> None:
        self._closing = True
        self._reading.deadline = trio.current_time() + LINGER
        if not isinstance(self.stream, trio.abc.HalfCloseableStream):  # TLS
            await self.stream.aclose()
            return
        async with self.send_lock:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await self.stream.send_eof()

    async def _read_data(self) -> None:
        try:
            with self._reading:
                await self._receive()
        finally:
            # Also where the server stops: a write under way is shielded, and ends with its socket.
            await trio.aclose_forcefully(self.stream)
        with trio.move_on_after(LINGER):
            await self.protocol.handle(Closed())
        # Hypercorn would wait for the ping and idle timers, and for an application that does not read.
        self._connection.cancel()

    async def _receive(self) -> None:
        while True:
            if not self._closing:
                self._reading.deadline = trio.current_time() + self._limits.pong_timeout
            try:
                data = await self.stream.receive_some(MAX_RECV)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return
            if not self._closing:
                await self.protocol.handle(RawData(bytes(data)))
            if not data:
                return


class BoundedHTTPStream(HTTPStream):
    """A request whose body is cut off after the limit is passed, instead of read to its end.

    Quart 0.23 looks at the size of a body without ``Content-Length`` only when it is complete. The part that
    passes the limit is delivered and called the end: Quart then answers 413 by its own rule.
    """

    _body_size = 0

    async def handle(self, event: StreamEvent) -> None:
        if self._passed and isinstance(event, (Body, EndBody)):
            return
        await super().handle(event)
        if isinstance(event, Body):
            self._body_size += len(event.data)
            if self._passed:
                await super().handle(EndBody(stream_id=event.stream_id))

    @property
    def _passed(self) -> bool:
        return self._body_size > self.config.wsgi_max_body_size


class BytesCountingBuffer(WebsocketBuffer):
    """Counts text in bytes of UTF-8; Hypercorn counts characters."""

    def extend(self, event: Message[Any]) -> None:
        if isinstance(event.data, str):
            self.length += len(event.data.encode()) - len(event.data)
        super().extend(event)


class BoundedWSStream(WSStream):
    """A WebSocket that keeps to its size limit, and to RFC 6455 when it is closed."""

    app_put: Callable[..., Awaitable[None]]

    def __init__(self, app: Any, config: Config, *args: Any) -> None:
        super().__init__(app, config, *args)
        self.app_put = _discard
        self.buffer = BytesCountingBuffer(config.websocket_max_message_size)

    async def _accept(self, message: WebsocketAcceptEvent) -> None:
        # Hypercorn accepts permessage-deflate whenever it is offered, and inflates without a limit.
        self.handshake.extensions = None
        await super()._accept(message)

    async def app_send(self, message: ASGISendEvent | None) -> None:
        if message is None:
            # The application has ended: to tell it of the disconnect would wait for room in its queue.
            self.app_put = _discard
        await super().app_send(message)

    async def _handle_events(self) -> None:
        for event in self.connection.events():
            if isinstance(event, Message):
                await self._handle_message(event)
            elif isinstance(event, Ping):
                await self._send_wsproto_event(event.response())
            elif isinstance(event, CloseConnection):
                # The peer's close, or wsproto's verdict on a bad frame, which Hypercorn keeps to itself.
                await self._end(event.response())
            if self.closed:
                return

    async def _handle_message(self, event: Message[Any]) -> None:
        try:
            self.buffer.extend(event)
        except FrameTooLargeError:
            # Hypercorn sends the close frame too, but then keeps the socket and the buffer.
            await self._end(CloseConnection(code=CloseReason.MESSAGE_TOO_BIG))
            return
        if event.message_finished:
            await self.app_put(self.buffer.to_message())
            self.buffer.clear()

    async def _end(self, close: CloseConnection) -> None:
        self.buffer.clear()
        await self._send_wsproto_event(close)
        await self.send(StreamClosed(stream_id=self.stream_id))


async def _discard(event: ASGIReceiveEvent) -> None:
    """Take what nobody will receive."""


class BoundedBuffer:
    """What Quart-Trio 0.13 keeps for a handler, which has no bound of its own. 0.12 keeps ten messages instead."""

    def __init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[bytes | str](QUEUED_MESSAGES)

    async def put(self, data: bytes | str) -> None:
        await self._send.send(data)

    async def get(self) -> bytes | str:
        return await self._receive.receive()

    def disconnect(self) -> None:
        """Nothing: the handler is cancelled next, and would otherwise log an error for each disconnect."""


class BoundedWebsocket(TrioWebsocket):
    """``app.websocket_class``, on Quart-Trio 0.12 and 0.13."""

    buffer_class = BoundedBuffer

    async def receive(self) -> bytes | str:
        """The next message. Quart takes an empty binary one for a missing one: ``None``."""
        message: bytes | str | None = await super().receive()
        return b"" if message is None else message
