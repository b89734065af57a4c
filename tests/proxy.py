"""A TCP proxy that knows WebSocket frames, and cuts, delays and splits what passes, as it is told.

Each connection through it is a `Line` with a `Fate`. When a line is cut, ``cut`` is set; how that looks to its ends is
the fate's ``how``: closed in order, reset, or half-open, where both ends keep a connection on which nothing passes.
A line records the text frames of both directions whole, also those that never got through.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Literal

import attrs
import trio

Direction = Literal["down", "up"]
How = Literal["closed", "reset", "half-open"]

_TEXT = 1
_BROKEN = (trio.BrokenResourceError, trio.ClosedResourceError)


@attrs.frozen
class Fate:
    """What happens to a line: it is cut once ``frames`` text frames, or ``size`` bytes, have passed in ``direction``.

    No frames means right after the handshake's head of that direction. ``whims`` delays and splits what passes.
    """

    direction: Direction = "down"
    frames: int | None = None
    size: int | None = None
    how: How = "closed"
    whims: random.Random | None = None


@attrs.define
class FrameReader:
    """Cuts the bytes of one direction into the handshake's head and frames (RFC 6455, section 5.2)."""

    _data: bytearray = attrs.field(factory=bytearray)
    _has_head: bool = False

    def feed(self, data: bytes) -> Iterator[tuple[bytes, str | None]]:
        """What is complete now: its bytes, and its text where it is a text frame."""
        self._data += data
        while size := self._size_of_next():
            unit = bytes(self._data[:size])
            del self._data[:size]
            yield unit, _text_of(unit) if self._has_head else None
            self._has_head = True

    def _size_of_next(self) -> int:
        if not self._has_head:
            return self._data.find(b"\r\n\r\n") + 4 if b"\r\n\r\n" in self._data else 0
        if len(self._data) < 2:
            return 0
        start, length = _payload_of(self._data)
        return start + length if len(self._data) >= start + length else 0


def _payload_of(frame: bytes | bytearray) -> tuple[int, int]:
    """Where the payload of a frame begins, and its length; a beginning that is too short has no end yet."""
    length, start = frame[1] & 0x7F, 2
    if length >= 126:
        size = 2 if length == 126 else 8
        start += size
        length = int.from_bytes(frame[2:start], "big") if len(frame) >= start else 1 << 62
    return start + (4 if frame[1] & 0x80 else 0), length


def _text_of(frame: bytes) -> str | None:
    if frame[0] & 0x0F != _TEXT:
        return None
    start, _ = _payload_of(frame)
    payload = frame[start:]
    if frame[1] & 0x80:
        mask = itertools.cycle(frame[start - 4 : start])
        payload = bytes(byte ^ key for byte, key in zip(payload, mask, strict=False))
    return payload.decode()


@attrs.define(eq=False)
class Line:
    """One connection through the proxy."""

    fate: Fate
    client: trio.SocketStream
    server: trio.SocketStream
    cut: trio.Event = attrs.field(factory=trio.Event)
    said: dict[Direction, list[Any]] = attrs.field(factory=lambda: {"down": [], "up": []})
    _passed: int = 0
    _frames_passed: int = 0

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._pump, "up", self.client, self.server)
            nursery.start_soon(self._pump, "down", self.server, self.client)

    async def _pump(self, direction: Direction, source: trio.SocketStream, target: trio.SocketStream) -> None:
        reader = FrameReader()
        with contextlib.suppress(*_BROKEN):
            while data := await source.receive_some(65_536):
                for unit, text in reader.feed(data):
                    if text is not None:
                        self.said[direction].append(json.loads(text))
                    if not self.cut.is_set():
                        await self._pass_on(direction, unit, is_text=text is not None, target=target)
        if not self.cut.is_set():
            with contextlib.suppress(*_BROKEN):
                await target.send_eof()

    async def _pass_on(self, direction: Direction, unit: bytes, *, is_text: bool, target: trio.SocketStream) -> None:
        counts = direction == self.fate.direction
        left = len(unit) if self.fate.size is None or not counts else self.fate.size - self._passed
        for piece in self._pieces(unit[:left]):
            if self.fate.whims:
                await trio.sleep(self.fate.whims.choice((0, 0, 0.001)))
            await target.send_all(piece)
        if counts:
            self._passed += len(unit)
            self._frames_passed += is_text
            if left < len(unit) or self._frames_passed == self.fate.frames:
                self.break_off()

    def _pieces(self, unit: bytes) -> Iterator[bytes]:
        start = 0
        while start < len(unit):
            size = self.fate.whims.choice((1, 7, 1000)) if self.fate.whims else len(unit)
            yield unit[start : start + size]
            start += size

    def break_off(self) -> None:
        """Cuts the line now."""
        self.cut.set()
        if self.fate.how == "half-open":
            return
        for end in (self.client, self.server):
            if self.fate.how == "reset":
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            end.socket.close()


@attrs.define(eq=False)
class Proxy:
    """Listens on ``port`` of the loopback address. ``lines`` has every line there was, oldest first."""

    port: int
    lines: list[Line] = attrs.field(factory=list)
    _fates: Iterator[Fate] = attrs.field(factory=lambda: itertools.repeat(Fate()))
    _dialled: Any = attrs.field(factory=lambda: trio.open_memory_channel[Line](1000))

    async def next_line(self) -> Line:
        """The line of the oldest connection that this was not asked for yet."""
        _, receive_channel = self._dialled
        line: Line = await receive_channel.receive()
        return line

    async def serve(self, to_port: int, client: trio.SocketStream) -> None:
        server = await trio.open_tcp_stream("127.0.0.1", to_port)
        line = Line(next(self._fates), client, server)
        self.lines.append(line)
        send_channel, _ = self._dialled
        send_channel.send_nowait(line)
        try:
            await line.run()
        finally:
            for end in (client, server):
                end.socket.close()


@asynccontextmanager
async def open_proxy(to_port: int, fates: Callable[[], Iterator[Fate]]) -> AsyncIterator[Proxy]:
    """A proxy to this port of the loopback address; ``fates`` has one for each connection, then none is cut."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    proxy = Proxy(listeners[0].socket.getsockname()[1], fates=itertools.chain(fates(), itertools.repeat(Fate())))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(trio.serve_listeners, partial(proxy.serve, to_port), listeners))
        yield proxy
        nursery.cancel_scope.cancel()
