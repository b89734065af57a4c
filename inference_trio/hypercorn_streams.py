"""What Hypercorn 0.18 and Quart-Trio 0.12/0.13 lack in a request and in a WebSocket: limits, fairness, good manners.

`hypercorn_fixes.install` puts these classes in their places. Every reason stands at its override.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import attrs
import h11
import trio
from hypercorn.config import Config
from hypercorn.events import Closed, RawData
from hypercorn.protocol.events import Body, EndBody, StreamClosed
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.protocol.http_stream import ASGIHTTPState, HTTPStream
from hypercorn.protocol.ws_stream import FrameTooLargeError, WebsocketBuffer, WSStream
from hypercorn.typing import ASGIReceiveEvent, ASGISendEvent, WebsocketAcceptEvent
from quart_trio.wrappers import TrioWebsocket
from wsproto.events import CloseConnection, Message, Ping
from wsproto.frame_protocol import CloseReason

QUEUED_MESSAGES = 4
"""Messages waiting for a handler in `BoundedWebsocket`."""

HTTP_1_1_REQUIRED = bytes.fromhex("000000040000000000000008070000000000000000000000000d")
"""What a server may answer to HTTP/2: its settings, none, and GOAWAY with this code (RFC 9113, sections 6.8 and 7)."""


SMALL = 16 * 1024
"""Bytes of a message or body that may always arrive."""

TRY_AGAIN_LATER = 1013
"""WebSocket close code for an overload (IANA's registry of close codes)."""


@attrs.define
class Arriving:
    """Bytes of messages and bodies that have not ended yet, of all connections together."""

    limit: int
    used: int = 0

    def is_too_much(self, size: int) -> bool:
        """Whether one that holds so much has to go, so that small ones find room whatever large ones do."""
        return self.used > self.limit and size > SMALL


class OnlyHTTP1(H11Protocol):
    """HTTP/1.1, and no way from there to HTTP/2.

    Hypercorn speaks HTTP/2 with whoever begins with it. It has no bound there on frames that cost it work (resets,
    settings, pings), handles all of a read without a pause, and data after the end of a stream is an error of its
    own. WebSockets need none of it; a proxy that speaks HTTP/2 to its clients speaks HTTP/1.1 to its servers.
    """

    async def _check_protocol(self, event: h11.Request) -> None:
        """An upgrade may be ignored, and is (RFC 9110, section 7.8)."""

    async def _create_stream(self, request: h11.Request) -> None:
        if request.http_version.startswith(b"1"):
            await super()._create_stream(request)
        else:
            await self.send(RawData(HTTP_1_1_REQUIRED))
            await self.send(Closed())


class BoundedHTTPStream(HTTPStream):
    """A request whose body is cut off after the limit is passed, instead of read to its end.

    Quart 0.23 looks at the size of a body without ``Content-Length`` only when it is complete. The part that
    passes the limit is delivered and called the end: Quart then answers 413 by its own rule.
    """

    def __init__(self, arriving: Arriving, *args: Any) -> None:
        super().__init__(*args)
        self._arriving = arriving
        self._body_size = 0

    async def handle(self, event: StreamEvent) -> None:
        if self._passed and isinstance(event, (Body, EndBody)):
            return
        if isinstance(event, Body):
            self._count(len(event.data))
            if self._arriving.is_too_much(self._body_size) and self.state is ASGIHTTPState.REQUEST:
                await self._send_error_response(503)
                await self.send(StreamClosed(stream_id=event.stream_id))
                return
        elif isinstance(event, StreamClosed):
            self._count(-self._body_size)
        await super().handle(event)
        if isinstance(event, Body) and self._passed:
            await super().handle(EndBody(stream_id=event.stream_id))

    def _count(self, size: int) -> None:
        self._body_size += size
        self._arriving.used += size

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

    def __init__(self, arriving: Arriving, app: Any, config: Config, *args: Any) -> None:
        super().__init__(app, config, *args)
        self._arriving = arriving
        self._counted = 0
        self.app_put = _discard
        self.buffer = BytesCountingBuffer(config.websocket_max_message_size)

    async def handle(self, event: StreamEvent) -> None:
        if isinstance(event, StreamClosed):
            self._forget_message()
        await super().handle(event)

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
            # Thousands of frames may have come in one piece, and nothing else waits on the way of a ping.
            await trio.lowlevel.checkpoint()
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
        self._count_message()
        if self._arriving.is_too_much(self.buffer.length):
            await self._end(CloseConnection(code=TRY_AGAIN_LATER))
        elif event.message_finished:
            await self.app_put(self.buffer.to_message())
            self._forget_message()

    async def _end(self, close: CloseConnection) -> None:
        self._forget_message()
        await self._send_wsproto_event(close)
        await self.send(StreamClosed(stream_id=self.stream_id))

    def _forget_message(self) -> None:
        self.buffer.clear()
        self._count_message()

    def _count_message(self) -> None:
        self._arriving.used += self.buffer.length - self._counted
        self._counted = self.buffer.length


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
