"""What Hypercorn 0.18 and Quart-Trio 0.12/0.13 lack in a request and in a WebSocket: limits, fairness, good manners.

`hypercorn_fixes.install` puts these classes in their places. Every reason stands at its override.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, Protocol, cast
from urllib.parse import unquote, urlsplit

import h11
import trio
from hypercorn.events import Closed, RawData
from hypercorn.protocol.events import Body, EndBody, Request, StreamClosed
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.protocol.http_stream import ASGIHTTPState, HTTPStream
from hypercorn.protocol.ws_stream import WSStream
from hypercorn.typing import ASGIReceiveEvent, ASGISendEvent, TaskGroup, WebsocketAcceptEvent
from quart_trio.wrappers import TrioWebsocket
from wsproto.connection import ConnectionState
from wsproto.events import CloseConnection, Message, Ping, TextMessage
from wsproto.frame_protocol import CloseReason

from .arriving import Arriving, Inbox, Share
from .errors import OverloadedError
from .jsonrpc import encode

HTTP_1_1_REQUIRED = bytes.fromhex("000000040000000000000008070000000000000000000000000d")
"""What a server may answer to HTTP/2: its settings, none, and GOAWAY with this code (RFC 9113, sections 6.8 and 7)."""


TRY_AGAIN_LATER = 1013
"""WebSocket close code for an overload (IANA's registry of close codes)."""

_TOKENS = (b"connection", b"sec-websocket-protocol", b"sec-websocket-extensions")
"""Headers that are lists of tokens, which are ASCII (RFC 9110, section 5.6.2)."""

OUTLET = "inference_trio.outlet"
"""Where in a WebSocket's scope the `Outlet` of its connection is, in ``state``."""

_STREAM = "inference_trio.stream"
"""Where its `BoundedWSStream` is."""


class Outlet(Protocol):
    """The way to a socket that does not lead through half a dozen layers, each of which may wait."""

    @property
    def is_idle(self) -> bool:
        """Whether all that was to be written is."""

    def write_soon(self, data: bytes, task_group: TaskGroup) -> None:
        """Write after all that came before, without waiting for it."""


def overloaded(message: str) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Headers and body of the 503 for what is refused before the application sees it."""
    body = encode({"error": OverloadedError(message, retry_after=1).to_wire()}).encode()
    size = str(len(body)).encode()
    headers = [(b"connection", b"close"), (b"retry-after", b"1"), (b"content-type", b"application/json")]
    return [*headers, (b"content-length", size)], body


class OnlyHTTP1(H11Protocol):
    """HTTP/1.1, and no way from there to HTTP/2.

    Hypercorn speaks HTTP/2 with whoever begins with it. It has no bound there on frames that cost it work (resets,
    settings, pings), handles all of a read without a pause, and data after the end of a stream is an error of its
    own. WebSockets need none of it; a proxy that speaks HTTP/2 to its clients speaks HTTP/1.1 to its servers.
    """

    async def _check_protocol(self, event: h11.Request) -> None:
        """An upgrade may be ignored, and is (RFC 9110, section 7.8)."""

    async def _create_stream(self, request: h11.Request) -> None:
        if not request.http_version.startswith(b"1"):
            await self.send(RawData(HTTP_1_1_REQUIRED))
            await self.send(Closed())
        elif not _can_be_read(request):
            await self._send_error_response(400)
            await self.send(Closed())
        else:
            await super()._create_stream(request)


def _can_be_read(request: h11.Request) -> bool:
    """Whether Hypercorn can decode the lists of tokens as ASCII, and Quart take the target apart.

    Otherwise the connection would fail, or the request with a traceback in the log.
    """
    path = unquote(request.target.partition(b"?")[0].decode("latin-1"))
    try:
        urlsplit(path)
    except ValueError:
        return False
    return path != "" and all(value.isascii() for name, value in request.headers if name in _TOKENS)


class BoundedHTTPStream(HTTPStream):
    """A request whose body is cut off after the limit is passed, instead of read to its end.

    Quart 0.23 looks at the size of a body without ``Content-Length`` only when it is complete. The part that
    passes the limit is delivered and called the end: Quart then answers 413 by its own rule.
    """

    def __init__(self, arriving: Arriving, *args: Any) -> None:
        super().__init__(*args)
        self._share = Share(arriving, self._give_way)

    async def handle(self, event: StreamEvent) -> None:
        if isinstance(event, (Body, EndBody)) and (self._passed or self._share.is_over):
            return
        if isinstance(event, Body):
            self._share.hold(self._share.size + len(event.data))
        await super().handle(event)
        if isinstance(event, Body):
            if self._passed:
                await super().handle(EndBody(stream_id=event.stream_id))
            await self._share.wait_for_room()

    async def app_send(self, message: ASGISendEvent | None) -> None:
        if message is None:
            self._share.end()  # the application has ended, in whichever way: until then it has the body
        await super().app_send(message)

    def _give_way(self) -> None:
        self._share.arriving.on_refusal("http", 503)
        self.task_group.spawn(self._refuse)

    async def _refuse(self) -> None:
        headers, body = overloaded("Too much is arriving on all connections together")
        if self.state is ASGIHTTPState.REQUEST and not self.closed:
            await self.app_send({"type": "http.response.start", "status": 503, "headers": headers, "trailers": False})
            await self.app_send({"type": "http.response.body", "body": body, "more_body": False})

    @property
    def _passed(self) -> bool:
        return self._share.size > self.config.wsgi_max_body_size


class BoundedWSStream(WSStream):
    """A WebSocket that keeps to its size limit, and to RFC 6455 when it is closed."""

    app_put: Callable[..., Awaitable[None]]

    def __init__(self, arriving: Arriving, *args: Any) -> None:
        super().__init__(*args)
        self.inbox = Inbox(Share(arriving, self._give_way))
        self._outlet: Outlet | None = None
        self.app_put = _discard

    async def handle(self, event: StreamEvent) -> None:
        if isinstance(event, Request):
            # `BoundedWebsocket` finds this: on the way through Quart, messages would wait uncounted.
            self._outlet = event.state.get(OUTLET)
            event = replace(event, state={**event.state, _STREAM: self})  # type: ignore[arg-type]
        elif isinstance(event, StreamClosed):
            self.inbox.close()
        await super().handle(event)

    async def _accept(self, message: WebsocketAcceptEvent) -> None:
        # Hypercorn accepts permessage-deflate whenever it is offered, and inflates without a limit.
        self.handshake.extensions = None
        await super()._accept(message)

    async def app_send(self, message: ASGISendEvent | None) -> None:
        if message is None:
            # The application has ended: to tell it of the disconnect would wait for room in its queue.
            self.app_put = _discard
            self.inbox.close()
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
            if self.closed or self.inbox.share.is_over:
                return

    async def _handle_message(self, event: Message[Any]) -> None:
        if self.inbox.extend(event.data) > self.config.websocket_max_message_size:
            # Hypercorn sends the close frame too, but counts characters, and then keeps the socket and the message.
            await self._end(CloseConnection(code=CloseReason.MESSAGE_TOO_BIG))
            return
        if event.message_finished:
            self.inbox.finish(isinstance(event, TextMessage))
        await self.inbox.wait_for_room()

    @property
    def is_free(self) -> bool:
        """Whether it is open, and all that was sent before has been written."""
        is_idle = self._outlet is not None and self._outlet.is_idle
        return is_idle and not self.closed and self.connection.state is ConnectionState.OPEN

    def send_at_once(self, text: str) -> None:
        """What `app_send` does, while it `is_free`, but without waiting for anything."""
        cast("Outlet", self._outlet).write_soon(self.connection.send(TextMessage(data=text)), self.task_group)

    def _give_way(self) -> None:
        self.inbox.share.arriving.on_refusal("websocket", TRY_AGAIN_LATER)
        self.task_group.spawn(self._end, CloseConnection(code=TRY_AGAIN_LATER))

    async def _end(self, close: CloseConnection) -> None:
        self.inbox.close()
        if not self.closed:
            await self._send_wsproto_event(close)
            await self.send(StreamClosed(stream_id=self.stream_id))


async def _discard(event: ASGIReceiveEvent) -> None:
    """Take what nobody will receive."""


class BoundedWebsocket(TrioWebsocket):
    """``app.websocket_class``: takes its messages from the `Inbox` of its `BoundedWSStream`, and may send past Quart.

    What Quart-Trio keeps for a handler has no bound in bytes, and none in number in 0.13. And it holds on to the last
    message until the next one comes.
    """

    async def receive(self) -> bytes | str:
        """The next message. Whoever asks for it is through with the one before."""
        await self.accept()
        return await self._stream.inbox.take()

    @property
    def is_free(self) -> bool:
        """Whether the WebSocket, which must have been accepted, `send_at_once`s."""
        return self._stream.is_free

    def send_at_once(self, text: str) -> None:
        """The same as `send`, while it `is_free`, but without waiting."""
        self._stream.send_at_once(text)

    @property
    def _stream(self) -> BoundedWSStream:
        stream: BoundedWSStream = self.scope["state"][_STREAM]
        return stream
