"""A WebSocket client that does nothing by itself, and may do anything.

What well-behaved clients have is in `tests.harness`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress

import attrs
import pytest
import trio
from wsproto.connection import Connection, ConnectionType
from wsproto.events import CloseConnection, Event, Message, TextMessage

HANDSHAKE = (
    b"GET %s HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n%s\r\n"
)


@attrs.frozen
class Client:
    """A WebSocket client that does nothing by itself. ``head`` is the server's answer to the handshake."""

    stream: trio.SocketStream
    head: bytes
    connection: Connection

    async def send(self, event: Event) -> None:
        await self.stream.send_all(self.connection.send(event))

    async def next(self, *kinds: type[Event]) -> Event | None:
        """The next event of these kinds, or else the close; ``None`` when the server has closed the socket."""
        with trio.fail_after(10):
            while True:
                for event in self.connection.events():
                    if isinstance(event, (*kinds, CloseConnection)):
                        return event
                data = await self.stream.receive_some()
                if not data:
                    return None
                self.connection.receive_data(data)

    async def message(self) -> str:
        """The next message, which is text."""
        event = await self.next(Message)
        assert isinstance(event, TextMessage), event
        return event.data

    async def close_code(self) -> int:
        """The code of the close that comes next."""
        event = await self.next()
        assert isinstance(event, CloseConnection)
        return event.code

    async def end_of_file(self) -> None:
        """The server closes the socket and says nothing before."""
        assert await self.next(Message) is None


@asynccontextmanager
async def connected(port: int, path: bytes = b"/echo", headers: bytes = b"") -> AsyncIterator[Client]:
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(HANDSHAKE % (path, headers))
        received = bytearray()
        with trio.fail_after(10):
            while b"\r\n\r\n" not in received:
                received += await stream.receive_some() or pytest.fail(f"no handshake: {bytes(received)!r}")
        head, _, rest = bytes(received).partition(b"\r\n\r\n")
        yield Client(stream, head, Connection(ConnectionType.CLIENT, trailing_data=rest))


async def pour(stream: trio.SocketStream, pieces: Iterable[bytes]) -> None:
    """Sends on until the server has closed the connection."""
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        for piece in pieces:
            await stream.send_all(piece)


async def pour_out(stream: trio.SocketStream) -> None:
    """Reads until the server has closed the connection."""
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        async for _ in stream:
            pass


async def everything(stream: trio.SocketStream) -> bytes:
    """What comes until the server closes the socket."""
    with trio.fail_after(10):
        return b"".join([chunk async for chunk in stream])
