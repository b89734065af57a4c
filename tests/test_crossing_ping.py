"""A server's ping that meets our close on the way, which trio-websocket cannot take: nobody may notice."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio
import trio_websocket
from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, CloseConnection, Request

from inference_trio.client.transport import open_transport
from tests.harness import reaching

PING = b"\x89\x00"


async def ping_at_the_close(stream: trio.SocketStream) -> None:
    """Sends the ping where it would answer the close, as if the ping had been on its way by then."""
    connection = WSConnection(ConnectionType.SERVER)
    while data := await stream.receive_some():
        connection.receive_data(data)
        for event in connection.events():
            if isinstance(event, Request):
                await stream.send_all(connection.send(AcceptConnection()))
            elif isinstance(event, CloseConnection):
                await stream.send_all(PING)


@pytest.fixture
async def port() -> AsyncIterator[int]:
    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, ping_at_the_close, 0, host="127.0.0.1"))
        yield listener.socket.getsockname()[1]
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def of_the_client(port: int) -> AsyncIterator[None]:
    async with (
        open_transport(f"http://127.0.0.1:{port}", None, None) as transport,
        transport.open_socket("a-session", 0),
    ):
        yield


@asynccontextmanager
async def of_the_harness(port: int) -> AsyncIterator[None]:
    async with reaching(f"http://127.0.0.1:{port}") as server, server.connect("a-session"):
        yield


@pytest.mark.parametrize("connected", [of_the_client, of_the_harness])
async def test_a_ping_that_crosses_the_close_disturbs_nobody(connected, port: int) -> None:  # type: ignore[no-untyped-def]
    others = trio.Event()

    async def visit() -> None:
        async with connected(port):
            pass
        await trio.lowlevel.checkpoint()
        others.set()

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(visit)
    assert others.is_set()


async def test_what_else_cancels_is_not_swallowed(port: int) -> None:
    with trio.CancelScope() as scope:
        async with of_the_harness(port):
            scope.cancel()
            await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught


async def test_trio_websocket_still_needs_it(port: int) -> None:
    with pytest.raises(trio.Cancelled):
        async with trio_websocket.open_websocket_url(f"ws://127.0.0.1:{port}/"):
            pass
