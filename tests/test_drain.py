"""Stopping, with real processes and signals: what runs comes to its end, and the process ends whatever holds it up."""

from __future__ import annotations

import itertools
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import httpx2
import pytest
import trio
import trio_websocket
from wsproto.events import Ping, TextMessage

from tests import answers
from tests.harness import PATIENCE, Client, Server
from tests.processes import HYPERCORN, SERVE, WITHOUT_WORKERS, ServerProcess, as_server, server_process
from tests.sockets import HANDSHAKE, connected, pour, pour_out
from tests.sockets import Client as RawClient
from tests.upstream import Upstream, open_upstream

AN_HOUR = "3600"
COMMANDS = pytest.mark.parametrize(
    "command", [SERVE, HYPERCORN, WITHOUT_WORKERS], ids=["serve", "hypercorn", "hypercorn without workers"]
)
UNFETCHED = "tasks whose end no client has fetched, and which is lost now"
CUT = "connections that had not taken all that was sent, and are cut now"
LAST_RESORT = "the process ends without it"
SCRIPT = [answers.text("Hel"), answers.pause("go on"), answers.reply("lo")]


@attrs.frozen(eq=False)
class Serving:
    process: ServerProcess
    server: Server
    upstream: Upstream

    def stop(self) -> None:
        self.process.process.send_signal(signal.SIGTERM)

    @asynccontextmanager
    async def generating(self) -> AsyncIterator[Client]:
        """A client whose generation has begun, and goes on when it is let."""
        async with self.server.client() as client:
            await client.generate()
            assert (await client.hear())["params"]["chunk"] == "Hel"
            yield client


@asynccontextmanager
async def serving(
    folder: Path, command: tuple[str, ...] = SERVE, *, limits: Any = None, drain_seconds: str = AN_HOUR
) -> AsyncIterator[Serving]:
    async with open_upstream(SCRIPT) as upstream:
        with server_process(
            folder, upstream.base_url, limits, command, INFERENCE_DRAIN_SECONDS=drain_seconds
        ) as process:
            async with httpx2.AsyncClient(base_url=process.url, timeout=PATIENCE, verify=False) as http:
                yield Serving(process, as_server(process, http), upstream)


async def close_code(client: Client) -> int | None:
    with trio.fail_after(PATIENCE), pytest.raises(trio_websocket.ConnectionClosed) as closed:
        await client.socket.get_message()
    return closed.value.reason.code if closed.value.reason else None


@COMMANDS
async def test_what_runs_ends_what_is_new_is_refused_and_clients_are_told(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    async with serving(tmp_path, command) as it, it.generating() as client:
        it.stop()
        assert (await client.hear())["method"] == "draining"
        assert (await client.call("generate", {"message": "more"}))["code"] == -32005
        for response in (await it.server.get("/readyz"), await it.server.post()):
            assert response.status_code == 503
            assert int(response.headers["retry-after"]) > 0
        it.upstream.gate("go on").set()
        *_, end = await client.until_end()
        assert end["params"]["final_text"] == "Hello"
        assert await close_code(client) == 1012
        assert await it.process.ended() == 0


async def test_a_client_that_was_cut_off_comes_back_while_the_server_stops_and_gets_the_rest(tmp_path: Path) -> None:
    async with serving(tmp_path) as it:
        async with it.generating() as client:
            it.stop()
            assert (await client.hear())["method"] == "draining"
        async with it.server.connect(client.session_id, "?after=1") as again:
            assert [(await again.hear())["method"] for _ in range(2)] == ["resumed", "draining"]
            it.upstream.gate("go on").set()
            *_, end = await again.until_end()
            assert end["params"]["final_text"] == "Hello"
            assert await close_code(again) == 1012
        assert await it.process.ended() == 0
        assert not any(line in it.process.console.read_text() for line in (UNFETCHED, CUT))


async def test_what_nobody_has_fetched_when_the_server_stops_is_said_to_be_lost(tmp_path: Path) -> None:
    async with serving(tmp_path, drain_seconds="0") as it:
        async with it.generating():
            pass
        it.stop()
        assert await it.process.ended() == 0
        assert f"{UNFETCHED}: 1" in it.process.console.read_text()


@pytest.mark.parametrize("command", [SERVE, HYPERCORN], ids=["serve", "hypercorn"])
async def test_what_runs_for_too_long_is_cancelled_and_its_client_told(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    async with serving(tmp_path, command, drain_seconds="0.2") as it, it.generating() as client:
        it.stop()
        draining = await client.hear()
        assert (draining["method"], draining["params"]["deadline"]) == ("draining", 0.2)
        (end,) = await client.until_end()
        assert (end["params"]["status_message"], end["params"]["final_text"]) == ("cancelled", "Hel")
        assert await close_code(client) == 1012
        assert await it.process.ended() == 0
        assert it.upstream.requests[0].closed.is_set()


@COMMANDS
async def test_a_second_signal_ends_it_at_once(command: tuple[str, ...], tmp_path: Path) -> None:
    async with serving(tmp_path, command) as it, it.generating() as client:
        it.process.tell_all(signal.SIGINT)
        assert (await client.hear())["method"] == "draining"
        it.process.tell_all(signal.SIGINT)
        assert await it.process.ended() == 0


@asynccontextmanager
async def not_reading(it: Serving) -> AsyncIterator[None]:
    async with connected_to_a_session(it) as client:
        question = client.connection.send(TextMessage(data='{"jsonrpc": "2.0", "id": 1, "method": "rpc.discover"}'))
        with trio.move_on_after(0.05):
            await pour(client.stream, itertools.repeat(question * 100))
        yield


@asynccontextmanager
async def half_open(it: Serving) -> AsyncIterator[None]:
    async with connected_to_a_session(it) as client:
        await client.stream.send_eof()
        yield


@asynccontextmanager
async def flooding(it: Serving) -> AsyncIterator[None]:
    async with connected_to_a_session(it) as client, trio.open_nursery() as nursery:
        nursery.start_soon(pour, client.stream, itertools.repeat(client.connection.send(Ping(payload=b"x"))))
        nursery.start_soon(pour_out, client.stream)
        yield
        nursery.cancel_scope.cancel()


STUCK = {
    "nothing": b"",
    "half a handshake": HANDSHAKE[:40],
    "half a body": b"POST /create_session HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{",
    "HTTP/2 and nothing more": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a pipeline": b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000,
}


@asynccontextmanager
async def stuck(it: Serving, opening: bytes) -> AsyncIterator[None]:
    async with await trio.open_tcp_stream("127.0.0.1", it.process.port) as stream:
        await stream.send_all(opening)
        yield


async def test_no_client_holds_up_the_end(tmp_path: Path) -> None:
    in_order = {"grace": 3600}
    async with (
        serving(tmp_path, limits=in_order, drain_seconds="0.2") as it,
        it.generating() as client,
        AsyncExitStack() as others,
    ):
        for behaviour in [not_reading, half_open, flooding, *(partial(stuck, opening=text) for text in STUCK.values())]:
            for _ in range(3):
                await others.enter_async_context(behaviour(it))
        it.stop()
        (end,) = [note for note in await client.until_end() if note["method"] == "end"]
        assert end["params"]["status_message"] == "cancelled"
        assert await close_code(client) == 1012
        assert await it.process.ended() == 0
        assert CUT in it.process.console.read_text()


@pytest.mark.parametrize("command", [SERVE, HYPERCORN], ids=["serve", "hypercorn"])
async def test_no_thread_holds_up_the_end(command: tuple[str, ...], tmp_path: Path) -> None:
    async with serving(tmp_path, command, limits={"stuck": True, "grace": 5}, drain_seconds="0") as it:
        async with it.server.client() as client:
            await client.generate()
            it.stop()
            assert await client.until("draining") == {"session_id": client.session_id, "deadline": 0}
            assert await close_code(client) == 1012
            assert await it.process.ended() == 0
        assert LAST_RESORT in it.process.console.read_text()


@asynccontextmanager
async def connected_to_a_session(it: Serving) -> AsyncIterator[RawClient]:
    async with connected(it.process.port, f"/ws/{await it.server.create_session()}".encode()) as client:
        yield client
