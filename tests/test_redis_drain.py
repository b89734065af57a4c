"""A worker that stops, while others have its sessions too: clients go there as soon as nothing keeps them here."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
import trio.testing

from inference_trio import redis_store
from inference_trio.client import TextChunk, connect
from inference_trio.connection import Connection
from inference_trio.errors import OverloadedError
from inference_trio.redis_link import Link
from inference_trio.variables import Secret

from . import answers, fakes
from .client_bench import text_of
from .fakes import FakeWebSocket, finish, hang, text
from .harness import PATIENCE, Server, open_server, settings
from .javascript import NODE, node, without
from .line import Line, open_line
from .redis_server import RedisServer, running_redis
from .test_connection import HELLO, transcript
from .test_metrics import scrape
from .test_redis_faults import Slow
from .test_store_contract import in_redis
from .upstream import Upstream, open_upstream


@pytest.fixture(scope="module")
def running() -> Iterator[RedisServer]:
    with running_redis() as server:
        yield server


@pytest.fixture
def redis(running: RedisServer) -> RedisServer:
    running.ask("FLUSHALL")
    return running


async def test_who_has_nothing_running_here_is_closed_at_once(redis: RedisServer) -> None:
    go_on = trio.Event()
    held = [text("Hel"), fakes.wait(go_on), text("lo"), finish()]
    async with in_redis(redis.url, held, HELLO, drain_seconds=3600.0) as it:
        busy, idle = [await it.connect(0, await it.create()) for _ in range(2)]
        busy.call("generate", {"message": "hi"})
        assert [await busy.hear() for _ in range(2)][1]["params"]["chunk"] == "Hel"
        it.nursery.start_soon(it.stores[0].drain)
        assert (await idle.hear())["method"] == "draining"
        await gone(idle)
        again = await it.connect(1, idle.session_id)
        again.call("generate", {"message": "hi"})
        await again.hear()
        assert (await transcript(again))[-1]["params"]["final_text"] == "Hello"
        assert not busy.gone.is_set()
        go_on.set()
        assert (await transcript(busy))[-1]["params"]["final_text"] == "Hello"
        await gone(busy)


async def test_who_has_something_running_elsewhere_is_closed_at_once_too(redis: RedisServer) -> None:
    go_on = trio.Event()
    async with in_redis(redis.url, [text("Hel"), fakes.wait(go_on), finish()], drain_seconds=3600.0) as it:
        first = await it.connect(1, await it.create())
        first.call("generate", {"message": "hi"})
        await first.hear()
        socket = await it.connect(0, first.session_id, after=0)
        it.nursery.start_soon(it.stores[0].drain)
        await gone(socket)
        go_on.set()
        assert (await transcript(await it.connect(2, first.session_id, after=0)))[-1]["method"] == "end"


async def gone(socket: FakeWebSocket) -> None:
    with trio.fail_after(PATIENCE):
        await socket.gone.wait()
    assert socket.close_code == 1012


async def test_whoever_comes_is_sent_to_another_one(redis: RedisServer) -> None:
    async with in_redis(redis.url, [text("Hel"), hang], drain_seconds=3600.0) as it:
        busy, session_id = await it.connect(0, await it.create()), await it.create()
        busy.call("generate", {"message": "hi"})
        await busy.hear()
        coming = await it.stores[0].get(session_id)
        it.nursery.start_soon(it.stores[0].drain)
        await busy.hear()
        with pytest.raises(OverloadedError) as refused:
            await it.stores[0].get(session_id)
        assert refused.value.data == {"retry_after": redis_store.SOON}
        with pytest.raises(OverloadedError):
            await coming.attach(Connection(FakeWebSocket(session_id), coming), 0)
        assert (await (await it.connect(1, session_id, after=0)).hear())["method"] == "resumed"


async def test_a_task_that_was_to_begin_just_then_does_not(redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else nothing would wait for it, and it would be cancelled in the midst."""
    run = Link.run

    async def stop_meanwhile(self: Link, name: str, *arguments: Any, **options: Any) -> Any:
        reply = await run(self, name, *arguments, **options)
        if name == "register":
            it.nursery.start_soon(it.stores[0].drain)
            await trio.testing.wait_all_tasks_blocked()
        return reply

    go_on = trio.Event()
    held = [text("Hel"), fakes.wait(go_on), text("lo"), finish()]
    async with in_redis(redis.url, held, [hang], drain_seconds=3600.0) as it:
        socket = await it.connect(0, await it.create())
        socket.call("generate", {"message": "hi"})
        await socket.hear()
        await socket.hear()
        monkeypatch.setattr(Link, "run", stop_meanwhile)
        socket.call("generate", {"message": "hi"})
        assert (await socket.hear())["method"] == "draining"
        assert (await socket.hear())["error"]["code"] == -32005
        go_on.set()
        assert (await transcript(socket))[-1]["params"]["final_text"] == "Hello"
        await gone(socket)


async def test_a_worker_leaves_when_redis_knows_that_its_tasks_have_ended(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else they would count as running for ever: what it leaves behind, nobody would look at."""
    go_on, slow = trio.Event(), Slow("dismiss", holds_reply=False)
    held = [text("Hel"), fakes.wait(go_on), finish()]
    async with in_redis(redis.url, held, drain_seconds=3600.0, resume_window=3600.0) as it:
        socket, worker = await it.connect(0, await it.create()), it.stores[0].worker
        socket.call("generate", {"message": "hi"})
        await socket.hear()
        await socket.drop()
        monkeypatch.setattr(Link, "_run", lambda *arguments: slow.run(*arguments))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(it.stores[0].drain)
            go_on.set()
            await slow.came.wait()
            assert await worker.link.run("bury", worker.for_all, worker.id, 1) == 0
            slow.go_on.set()
        assert redis.ask("HGET", f"{worker.for_all}:counts", "tasks") == b"$1\r\n0\r\n"
        assert worker.id.encode() not in redis.ask("ZRANGE", f"{worker.for_all}:leases", "0", "-1")


# A single server that is replaced: its clients find nobody else, and try until the next one is there


@attrs.frozen
class Replaced:
    """``line`` is what clients know."""

    upstream: Upstream
    old: Server
    new: Server
    line: Line

    async def stop(self) -> None:
        """Returns when the old one has refused the client, whose line is cut, more than once."""
        self.old.shutdown.set()
        with trio.fail_after(PATIENCE):
            while (await self.old.get("/readyz")).status_code == 200:  # noqa: ASYNC110 (nothing tells us)
                await trio.sleep(0.01)
            before = await self._refusals()
            self.line.cut()
            while await self._refusals() < before + 2:  # noqa: ASYNC110
                await trio.sleep(0.01)

    async def _refusals(self) -> float:
        return (await scrape(self.old))["inference_refused_total", "503", "http"]

    def go_on(self) -> None:
        self.line.target = self.new.url
        self.upstream.gate("go on").set()


@pytest.fixture
async def replaced(redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Replaced]:
    monkeypatch.setattr(redis_store, "SOON", 0.0)
    monkeypatch.setattr("inference_trio.client.session.backoff", lambda _: 0.0)
    held = [answers.text("Hel"), answers.pause("go on"), answers.reply("lo")]
    async with AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(open_upstream(held))
        shared = settings(upstream.base_url, store=Secret(redis.url), drain_seconds=3600.0)
        old, new = [await stack.enter_async_context(open_server(shared)) for _ in range(2)]
        yield Replaced(upstream, old, new, await stack.enter_async_context(open_line(old.url)))


async def test_the_python_client_finds_everything_at_the_next_server(replaced: Replaced) -> None:
    async with connect(replaced.line.url) as session, session.generate("hi") as task:
        assert await anext(task) == TextChunk("Hel")
        await replaced.stop()
        replaced.go_on()
        assert text_of([event async for event in task]) == "lo"
        assert task.result.final_text == "Hello"


async def test_the_javascript_client_finds_everything_at_the_next_server(replaced: Replaced, tmp_path: Path) -> None:
    source = """
    const session = await createSession(url, fast);
    const generation = session.generate("hi");
    for await (const event of generation) if (event.type === "text") say(event.text);
    say((await generation.result).text);
    session.close();
    """
    if not NODE:
        without("Node")
    async with node(source, replaced.line.url, tmp_path) as script:
        assert await script.hear() == "Hel"
        await replaced.stop()
        replaced.go_on()
        assert [await script.hear(), await script.hear()] == ["lo", "Hello"]
