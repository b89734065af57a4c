"""Servers that share a Redis: a client that is cut comes back to another one, and one that dies is survived."""

from __future__ import annotations

import itertools
import json
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
import trio_websocket

from inference_trio.variables import Secret
from tests import answers
from tests.harness import PATIENCE, Client, Server, open_server, reaching, settings
from tests.processes import server_process
from tests.proxy import Direction, Fate, How, Proxy
from tests.redis_server import RedisServer, running_redis
from tests.test_connection import numbers, text_of
from tests.test_metrics import scrape
from tests.test_resume import CUTS, ROUNDS, TOOLS, UNCUT, Scene, content
from tests.transcripts import Transcript, check_that_no_number_had_two_meanings
from tests.upstream import Upstream, open_upstream


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with running_redis() as server:
        yield server


@attrs.define(eq=False)
class Balancer(Proxy):
    """Sends each connection to another server."""

    ports: Iterator[int] = attrs.field(factory=lambda: iter(()))

    async def serve(self, to_port: int, client: trio.SocketStream) -> None:
        await super().serve(next(self.ports), client)


@asynccontextmanager
async def scene(redis: RedisServer, *fates: Fate) -> AsyncIterator[Scene]:
    async with AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(open_upstream(*ROUNDS))
        shared = settings(upstream.base_url, store=Secret(redis.url))
        servers = [await stack.enter_async_context(open_server(shared)) for _ in range(3)]
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        proxy = Balancer(
            listeners[0].socket.getsockname()[1],
            fates=itertools.chain(fates, itertools.repeat(Fate())),
            ports=itertools.cycle(server.port for server in servers[1:] + servers[:1]),
        )
        nursery = await stack.enter_async_context(trio.open_nursery())
        nursery.start_soon(partial(trio.serve_listeners, partial(proxy.serve, 0), listeners))
        transcript = Transcript(await servers[0].create_session(tools=TOOLS), proxy)
        built = Scene(upstream, proxy, transcript)
        transcript.on_note = built.open_gate
        yield built
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("direction", "frames"), CUTS)
async def test_a_cut_after_any_frame_changes_nothing(redis: RedisServer, direction: Direction, frames: int) -> None:
    """Half-open: the server that is left still believes in its connection, and has to be told."""
    async with scene(redis, Fate(direction, frames, how="half-open")) as it:
        notes = await it.transcript.generate(message="hi")
        assert [content(note) for note in notes] == UNCUT
        assert len(it.upstream.requests) == 2, "one for each round"
        check_that_no_number_had_two_meanings(it.proxy)


@pytest.mark.parametrize("how", ["closed", "half-open"])
async def test_a_connection_that_is_cut_after_every_single_frame_gets_there(redis: RedisServer, how: How) -> None:
    async with scene(redis, *[Fate("down", 2, how=how)] * 30) as it:
        notes = await it.transcript.generate(message="hi")
        assert [content(note) for note in notes] == UNCUT
        assert len(it.upstream.requests) == 2
        check_that_no_number_had_two_meanings(it.proxy)


CALL = (answers.tool_call(0, "call_a", "weather", "{}"), answers.finish("tool_calls"), answers.done())
LIVES = {
    "streaming": [(answers.text("Hel"), answers.hang())],
    "awaiting_tools": [(answers.text("Hel"), *CALL)],
    "between rounds": [(answers.text("Hel"), *CALL), (answers.hang(),)],
}


async def brought_to(state: str, session_id: str, server: Server, upstream: Upstream) -> int:
    """Runs a task of the session until it is in this state; how many notifications there were."""
    upstream.script(*LIVES[state])
    async with server.connect(session_id) as client:
        task_id = await client.generate()
        assert (await client.hear())["method"] == "text_chunk"
        if state == "streaming":
            return 1
        assert (await client.hear())["method"] == "function_call_request"
        if state == "between rounds":
            before = len(upstream.requests)
            await client.call("tool_result", {"task_id": task_id, "results": [{"tool_call_id": "call_a", "result": 1}]})
            await upstream.wait_for_requests(before + 1)
        return 2


async def check_the_error(client: Client, heard: int) -> None:
    frame = await client.hear()
    assert frame["method"] == "error"
    assert frame["params"]["seq"] == heard + 1
    assert frame["params"]["error"]["code"] == -32006
    assert frame["params"]["error"]["data"] == {"reason": "worker lost", "partial_text": "Hel"}


async def check_what_is_kept(server: Server, session_id: str) -> None:
    async with server.connect(session_id, "?after=0") as client:
        latest = (await client.hear())["params"]["latest_seq"]
        frames = [await client.hear() for _ in range(latest)]
        assert [frame["method"] for frame in frames].count("error") == 1
        assert numbers(frames) == list(range(1, latest + 1))
        assert text_of(frames) == "HelHello"


async def test_a_server_that_is_killed_costs_each_of_its_tasks_one_error_whatever_it_was_at(
    redis: RedisServer, tmp_path: Path
) -> None:
    async with open_upstream() as upstream, AsyncExitStack() as stack:
        victim_process = stack.enter_context(
            server_process(tmp_path, upstream.base_url, INFERENCE_STORE=redis.url)  # waits for it
        )
        survivor = await stack.enter_async_context(open_server(settings(upstream.base_url, store=Secret(redis.url))))
        victim = await stack.enter_async_context(reaching(victim_process.url))
        clients = {}
        for state in LIVES:
            session_id = await survivor.create_session(tools=TOOLS)
            heard = await brought_to(state, session_id, victim, upstream)
            client = await stack.enter_async_context(survivor.connect(session_id, f"?after={heard}"))
            (task,) = (await client.hear())["params"]["tasks"]
            assert task["state"] == ("awaiting_tools" if state == "awaiting_tools" else "streaming")
            clients[session_id] = client, heard
        victim_process.process.send_signal(signal.SIGKILL)
        for client, heard in clients.values():
            await check_the_error(client, heard)
        counted = await scrape(survivor)
        assert counted["inference_tasks_ended_total", "worker_lost", "deepseek-chat"] == len(LIVES)
        upstream.script(*[(answers.text("Hello"), answers.finish(), answers.done())] * len(LIVES))
        for session_id, (client, _) in clients.items():
            assert (await client.ask_model())["final_text"] == "Hello"
            await check_what_is_kept(survivor, session_id)


async def test_a_server_whose_redis_is_away_says_that_it_is_not_ready(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inference_trio.redis_link.LOOK_INTERVAL", 0.25)  # what reads the inbox waits for 1 s
    async with open_upstream() as upstream, open_server(settings(upstream.base_url, store=Secret(redis.url))) as server:
        assert (await server.get("/readyz")).status_code == 200
        redis.pause()
        try:
            with trio.fail_after(PATIENCE):
                while (await server.get("/readyz")).status_code == 200:  # noqa: ASYNC110 (Redis tells nobody)
                    await trio.sleep(0.01)
            assert (await server.get("/healthz")).status_code == 200
        finally:
            redis.go_on()
        with trio.fail_after(PATIENCE):
            while (await server.get("/readyz")).status_code != 200:  # noqa: ASYNC110
                await trio.sleep(0.01)


async def test_of_connections_that_race_for_a_session_one_stays(redis: RedisServer) -> None:
    script = (answers.text("Hello"), answers.finish(), answers.done())
    async with AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(open_upstream(script))
        shared = settings(upstream.base_url, store=Secret(redis.url))
        servers = [await stack.enter_async_context(open_server(shared)) for _ in range(2)]
        session_id = await servers[0].create_session()
        frames: list[Any] = []
        codes: list[int] = []
        told, hear = trio.open_memory_channel[None](100)

        async def connect(server: Server) -> None:
            async with server.connect(session_id) as client:
                clients.append(client)
                try:
                    while True:
                        frames.append(json.loads(await client.socket.get_message()))
                        told.send_nowait(None)
                except trio_websocket.ConnectionClosed as closed:
                    codes.append(closed.reason.code if closed.reason else 0)
                    told.send_nowait(None)

        clients: list[Client] = []
        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                for server in servers * 4:
                    nursery.start_soon(connect, server)
                while len(codes) < 7:
                    await hear.receive()
                (last,) = [client for client in clients if not client.socket.closed]
                await last.ask("generate", {"message": "hi"})
                while not frames or frames[-1].get("method") != "end":
                    await hear.receive()
                nursery.cancel_scope.cancel()
        assert codes == [4409] * 7
        assert text_of(frames) == "Hello"
