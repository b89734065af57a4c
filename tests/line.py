"""A TCP line to a server that breaks where the test says, to the frame.

It passes on what it gets in pieces: the head of an HTTP message is one, each WebSocket frame is one. HTTP requests that
are no handshake pass unharmed.
"""

from __future__ import annotations

import contextlib
import math
import ssl
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Literal, TypeAlias
from urllib.parse import urlsplit

import attrs
import trio

Way: TypeAlias = Literal["up", "down"]


@attrs.frozen
class Cut:
    """Breaks a WebSocket in place of the piece that comes after so many, to the server (`up`) or from it."""

    way: Way
    after: int


@attrs.define(eq=False)
class Line:
    """`cuts` has one for each WebSocket to come; those after the last are left whole. `target` may be changed."""

    url: str
    target: str
    cuts: deque[Cut]
    made: int = 0
    """How many cuts have come about."""
    sockets: int = 0
    """How many WebSockets have been asked for."""
    loses: bool = False
    """Whether what comes from the server is lost on the way: it comes out of `lost`."""
    _losing: Any = attrs.field(factory=lambda: trio.open_memory_channel[bytes](math.inf))
    _newest: trio.CancelScope = attrs.field(factory=trio.CancelScope)

    @property
    def lost(self) -> trio.MemoryReceiveChannel[bytes]:
        channel: trio.MemoryReceiveChannel[bytes] = self._losing[1]
        return channel

    def cut(self) -> None:
        """Breaks the newest WebSocket's connection now."""
        self._newest.cancel()

    async def serve(self, client: trio.abc.Stream) -> None:
        target = urlsplit(self.target)
        try:
            server = await trio.open_tcp_stream(target.hostname or "", target.port or 0)
        except OSError:
            return
        async with server, trio.open_nursery() as nursery:
            upwards, head = _Pieces(client), b""
            with contextlib.suppress(trio.BrokenResourceError):
                head = await upwards.next()
            cut = self._begin(nursery.cancel_scope) if head.startswith(b"GET ") else None
            nursery.start_soon(
                self._pass, _Pieces(server, come_down=True), client, cut if cut and cut.way == "down" else None
            )
            await self._pass(upwards, server, cut if cut and cut.way == "up" else None, head)
            nursery.cancel_scope.cancel()

    def _begin(self, scope: trio.CancelScope) -> Cut | None:
        self.sockets += 1
        self._newest = scope
        return self.cuts.popleft() if self.cuts else None

    async def _pass(self, pieces: _Pieces, to: trio.abc.Stream, cut: Cut | None, first: bytes = b"") -> None:
        count = 0
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while piece := first or await pieces.next():
                if cut and count == cut.after:
                    self.made += 1
                    break
                count += 1
                first = b""
                if self.loses and pieces.come_down:
                    self._losing[0].send_nowait(piece)
                else:
                    await to.send_all(piece)
        await trio.aclose_forcefully(to)


@attrs.define(eq=False)
class _Pieces:
    """The head of the HTTP message, and then frames; what is no frame, as it comes."""

    _stream: trio.abc.Stream
    come_down: bool = False
    _is_websocket: bool | None = None
    _buffer: bytearray = attrs.field(factory=bytearray)

    async def next(self) -> bytes:
        """Nothing at the end of the stream."""
        while not (size := self._size()) or len(self._buffer) < size:
            data = await self._stream.receive_some()
            if not data:
                return b""
            self._buffer += data
        piece = bytes(self._buffer[:size])
        del self._buffer[:size]
        if self._is_websocket is None:
            self._is_websocket = b"upgrade: websocket" in piece.lower()
        return piece

    def _size(self) -> int:
        """Of the next piece; 0 where too little is there to say."""
        if self._is_websocket is None:
            return self._buffer.find(b"\r\n\r\n") + 4 if b"\r\n\r\n" in self._buffer else 0
        return _size_of_frame(self._buffer) if self._is_websocket else len(self._buffer)


def _size_of_frame(data: bytearray) -> int:
    """RFC 6455, section 5.2; 0 where too little is there to say."""
    if len(data) < 2:
        return 0
    length, mask = data[1] & 127, 4 * (data[1] >> 7)
    extended = {126: 2, 127: 8}.get(length, 0)
    if len(data) < 2 + extended:
        return 0
    return 2 + extended + mask + (int.from_bytes(data[2 : 2 + extended], "big") if extended else length)


@asynccontextmanager
async def open_line(target: str, *cuts: Cut, ssl_context: ssl.SSLContext | None = None) -> AsyncIterator[Line]:
    """With an `ssl_context` the line is for `https://localhost`; to its target it goes on without."""
    listeners: Any = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    if ssl_context:
        listeners = [trio.SSLListener(listener, ssl_context, https_compatible=True) for listener in listeners]
    line = Line(f"https://localhost:{port}" if ssl_context else f"http://127.0.0.1:{port}", target, deque(cuts))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(trio.serve_listeners, line.serve, listeners))
        yield line
        nursery.cancel_scope.cancel()
