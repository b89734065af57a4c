"""Workers that die, Redis that stalls, restarts, forgets or answers too late: nothing hangs, nothing is doubled."""

from __future__ import annotations

import gc
import math
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest
import trio
import trio.testing

from inference_trio import redis_link, redis_worker
from inference_trio.access import Owner
from inference_trio.connection import Connection
from inference_trio.errors import OverloadedError
from inference_trio.redis_link import AwayError, Link
from inference_trio.redis_store import RedisStore, open_redis_store
from inference_trio.variables import Secret

from . import fakes
from .fakes import FakeModel, FakeWebSocket, finish, hang, text
from .harness import PATIENCE
from .redis_server import RedisServer, running_redis
from .test_connection import CALLS, HELLO, TOOL, numbers, text_of, transcript
from .test_report import Notebook
from .test_store_contract import Workers, in_redis


@pytest.fixture(scope="module")
def running() -> Iterator[RedisServer]:
    with running_redis() as server:
        yield server


@pytest.fixture
def redis(running: RedisServer, monkeypatch: pytest.MonkeyPatch) -> RedisServer:
    """Workers in one process miss their leases together, or not at all: so these can be short."""
    running.ask("FLUSHALL")
    monkeypatch.setattr(redis_worker, "INTERVAL", 0.05)
    monkeypatch.setattr(redis_link, "LOOK_INTERVAL", 0.1)
    return running


@attrs.define(eq=False)
class Mortal(Workers):
    """Workers that may be killed."""

    redis: RedisServer
    scopes: list[trio.CancelScope] = attrs.field(factory=list)
    notebooks: list[Notebook] = attrs.field(factory=list)
    """What the observers of each were told."""

    async def start(self, settings: Any) -> None:
        await self.nursery.start(self._live, settings)

    async def _live(self, settings: Any, task_status: trio.TaskStatus[None]) -> None:
        with trio.CancelScope() as scope:
            self.notebooks.append(Notebook())
            observers = self.notebooks[-1:]
            async with open_redis_store(settings, self.model, lambda _: self.owner, observers) as store:
                self.stores.append(store)
                self.scopes.append(scope)
                task_status.started()
                await trio.sleep_forever()

    def kill(self, number: int) -> None:
        """As `kill -9` does; its lease runs out at once."""
        worker = self.stores[number].worker
        self.scopes[number].cancel()
        self.redis.ask("ZADD", f"{worker.for_all}:leases", "1", worker.id)

    async def started(
        self, worker: int = 0, frames: int = 2, outgoing: float = math.inf, **params: Any
    ) -> tuple[FakeWebSocket, list[Any]]:
        """A connection with a running task, and so many frames of it."""
        socket = await self.connect(worker, await self.create(worker, **params), outgoing=outgoing)
        socket.call("generate", {"message": "hi"})
        return socket, [await socket.hear() for _ in range(frames)]


@asynccontextmanager
async def mortals(redis: RedisServer, *rounds: list[Any], count: int = 3, **changes: Any) -> AsyncIterator[Mortal]:
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            it = Mortal([], nursery, FakeModel(*rounds), Owner(None), redis)
            for _ in range(count):
                await it.start(fakes.settings(**changes, store=Secret(redis.url)))
            yield it
            nursery.cancel_scope.cancel()


async def pause() -> None:
    """For whatever comes from outside of this process."""
    await trio.sleep(0.01)


def is_ready(store: RedisStore) -> bool:
    return store._worker is not None and not store.link.is_away


async def whole(it: Mortal, worker: int, session_id: str) -> list[Any]:
    """All notifications of a session."""
    while not is_ready(it.stores[worker]):
        await pause()
    socket = await it.connect(worker, session_id, after=0)
    _, *frames = await transcript(socket)
    await socket.drop()
    return frames


# Workers that die


STATES = {
    "streaming": ([text("Hel"), hang], 2),
    "awaiting_tools": ([text("Hel"), *CALLS], 4),
    "before anything came": ([hang], 1),
}


@pytest.mark.parametrize("state", STATES)
async def test_each_task_of_a_dead_worker_gets_one_error(redis: RedisServer, state: str) -> None:
    steps, frames = STATES[state]
    async with mortals(redis, steps) as it:
        first, heard = await it.started(0, frames, tools=[fakes.tool(TOOL)])
        task_id = heard[0]["result"]["task_id"]
        seen = frames - 1
        it.kill(0)
        socket = await it.connect(1, first.session_id, after=seen)
        _, *rest = await transcript(socket)
        assert rest[-1]["params"]["task_id"] == task_id
        error = rest[-1]["params"]["error"]
        assert (error["code"], error["data"]["reason"]) == (-32006, "worker lost")
        assert error["data"].get("partial_text") == ("Hel" if seen else None)
        assert numbers(rest) == [seen + 1]
        await socket.drop()
        assert [frame["method"] for frame in await whole(it, 2, first.session_id)].count("error") == 1


async def test_between_rounds_too(redis: RedisServer) -> None:
    async with mortals(redis, CALLS, [hang]) as it:
        first, heard = await it.started(0, 3, tools=[fakes.tool(TOOL)])
        results = [{"tool_call_id": name, "result": 1} for name in ("c1", "c2")]
        first.call("tool_result", {"task_id": heard[0]["result"]["task_id"], "results": results})
        await first.hear()
        it.kill(0)
        frames = await transcript(await it.connect(1, first.session_id, after=2))
        assert frames[0]["params"]["tasks"] == [] or frames[0]["params"]["tasks"][0]["state"] == "streaming"
        assert frames[-1]["params"]["error"]["data"] == {"reason": "worker lost"}


@pytest.mark.parametrize(
    "seed", [None, *range(6)], ids=lambda seed: "reliable" if seed is None else f"unreliable-{seed}"
)
async def test_a_task_that_is_lost_is_counted_once(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch, seed: int | None
) -> None:
    """By one of all that are left, and with its model; also where replies are lost."""
    async with mortals(redis, [hang], allowed_models=("a model", "another one")) as it:
        for model in (None, "a model", "another one"):
            socket = await it.connect(0, await it.create(0))
            socket.call("generate", {"message": "hi"} | ({"model": model} if model else {}))
            await socket.hear()
        if seed is not None:
            unreliable = Unreliable(seed)
            monkeypatch.setattr(Link, "_run", lambda *arguments: unreliable.run(*arguments))
        lost, *left = [store.worker for store in it.stores]
        it.kill(0)
        while lost.id.encode() in redis.ask("ZRANGE", f"{lost.for_all}:leases", "0", "-1") or any(
            worker._burying for worker in left
        ):
            await pause()
        counted = [model for notebook in it.notebooks for model in notebook.lost]
        assert sorted(counted) == sorted(["a model", "another one", it.stores[0].settings.model_name])


async def test_a_task_whose_worker_lives_but_was_given_up_is_not_counted_there_too(redis: RedisServer) -> None:
    async with mortals(redis, [text("Hel"), hang]) as it:
        socket, _ = await it.started(0)
        life = it.stores[0].worker
        tasks = life.sessions[socket.session_id].tasks
        redis.ask("ZADD", f"{life.for_all}:leases", "1", life.id)
        while not any(notebook.lost for notebook in it.notebooks) or tasks.runners:
            await pause()
        assert [notebook.reports for notebook in it.notebooks] == [[], [], []]


async def test_nor_where_it_learns_of_that_from_what_it_has_to_tell(redis: RedisServer) -> None:
    go_on = trio.Event()
    async with mortals(redis, [fakes.wait(go_on), text("Hello"), hang]) as it:
        socket, heard = await it.started(0, 1)
        worker, task_id = it.stores[0].worker, heard[0]["result"]["task_id"]
        await it.stores[1].worker._fail(worker.id, task_id, socket.session_id, "", "fake")
        go_on.set()
        while worker.sessions[socket.session_id].tasks.runners:
            await pause()
        assert [notebook.lost for notebook in it.notebooks] == [[], ["fake"], []]
        assert [notebook.reports for notebook in it.notebooks] == [[], [], []]


async def test_a_worker_that_was_given_up_and_does_not_know_yet_ends_nothing_of_others(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it misses in Redis was not forgotten, but ended by others: no other era begins."""
    go_on, renewal = trio.Event(), trio.Event()
    keep = redis_worker.Worker._keep_lease

    async def keep_late(self: redis_worker.Worker) -> bool:
        if self is life and not renewal.is_set():
            await renewal.wait()
        return await keep(self)

    async with mortals(redis, [text("Hel"), fakes.wait(go_on), text("lo"), hang]) as it:
        socket, _ = await it.started(0)
        life = it.stores[0].worker
        monkeypatch.setattr(redis_worker.Worker, "_keep_lease", keep_late)
        await pause()
        redis.ask("ZADD", f"{life.for_all}:leases", "1", life.id)
        while not any(notebook.lost for notebook in it.notebooks):
            await pause()
        go_on.set()
        await socket.gone.wait()
        renewal.set()
        while not life.is_over or not is_ready(it.stores[0]):
            await pause()
        assert {store.worker.era for store in it.stores} == {life.era}
        assert (await whole(it, 1, socket.session_id))[-1]["method"] == "error"


async def test_a_connection_at_another_worker_is_told_and_limits_heal(redis: RedisServer) -> None:
    async with mortals(redis, [text("Hel"), hang], max_tasks=1) as it:
        first, _ = await it.started(0)
        socket = await it.connect(1, first.session_id)
        it.kill(0)
        assert (await socket.hear())["method"] == "error"
        while True:
            socket.call("generate", {"message": "hi"})
            if "result" in await socket.hear():
                break


async def test_a_dead_workers_connections_count_as_gone(redis: RedisServer) -> None:
    async with mortals(redis, [text("Hel"), hang], resume_window=0.0) as it:
        first, _ = await it.started(0)
        second = await it.connect(1, first.session_id)
        await first.gone.wait()
        it.kill(1)
        while it.model.streaming:
            await pause()
        await second.gone.wait()
        frames = await whole(it, 2, first.session_id)
        assert frames[-1]["params"]["status_message"] == "cancelled"


async def test_a_worker_that_lost_its_lease_stops_its_tasks_and_begins_again(redis: RedisServer) -> None:
    async with mortals(redis, [text("Hel"), hang], HELLO) as it:
        first, _ = await it.started(0)
        life = it.stores[0].worker
        redis.ask("ZREM", f"{life.for_all}:leases", life.id)
        await first.gone.wait()
        assert first.close_code == 1012
        await pause()
        while not is_ready(it.stores[0]):
            await pause()
        assert it.model.streaming == 0
        socket = await it.connect(0, await it.create(0))
        socket.call("generate", {"message": "hi"})
        assert (await transcript(socket))[-1]["params"]["final_text"] == "Hello"


# Redis that is away


async def test_a_stall_delays_a_task_and_changes_nothing_of_it(redis: RedisServer) -> None:
    go_on = trio.Event()
    async with mortals(redis, [text("Hel"), fakes.wait(go_on), text("lo"), finish()]) as it:
        socket, heard = await it.started(0)
        redis.pause()
        go_on.set()
        try:
            while not all(store.link.is_away for store in it.stores):
                await pause()
            with pytest.raises(Exception, match="does not answer"):
                it.stores[1].check_ready()
        finally:
            redis.go_on()
        frames = heard[1:] + await transcript(socket)
        assert text_of(frames) == "Hello"
        assert numbers(frames) == list(range(1, len(frames) + 1))
        assert await whole(it, 1, socket.session_id) == frames
        it.stores[1].check_ready()


async def test_when_redis_is_away_for_too_long_connections_are_closed_and_tasks_stopped(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_worker, "LONGEST_ABSENCE", 0.5)
    async with mortals(redis, [text("Hel"), hang], HELLO) as it:
        socket, _ = await it.started(0)
        life = it.stores[0].worker
        redis.pause()
        try:
            await socket.gone.wait()
            assert socket.close_code == 1012
            while it.model.streaming or any(store._worker for store in it.stores):
                await pause()
            with pytest.raises(OverloadedError, match="does not answer"):
                it.stores[0].check_ready()
            with pytest.raises(OverloadedError, match="does not answer"):
                await it.stores[0].get(socket.session_id)
        finally:
            redis.go_on()
        while not all(map(is_ready, it.stores)):
            await pause()
        redis.ask("ZADD", f"{life.for_all}:leases", "1", life.id)  # as it will be after some seconds
        frames = await whole(it, 1, socket.session_id)
        assert frames[-1]["params"]["error"]["data"] == {"reason": "worker lost", "partial_text": "Hel"}
        socket = await it.connect(0, socket.session_id)
        socket.call("generate", {"message": "hi"})
        assert (await transcript(socket))[-1]["params"]["final_text"] == "Hello"


async def test_when_redis_has_no_memory_left_tasks_wait_and_lose_nothing(redis: RedisServer) -> None:
    go_on = trio.Event()
    async with mortals(redis, [text("Hel"), fakes.wait(go_on), text("lo"), finish()]) as it:
        socket, heard = await it.started(0)
        redis.ask("CONFIG", "SET", "maxmemory", "1")
        try:
            go_on.set()
            while not all(store.link.is_away for store in it.stores):
                await pause()
            with pytest.raises(OverloadedError, match="does not answer"):
                it.stores[1].check_ready()
        finally:
            redis.ask("CONFIG", "SET", "maxmemory", "0")
        frames = heard[1:] + await transcript(socket)
        assert text_of(frames) == "Hello"
        assert await whole(it, 1, socket.session_id) == frames


async def test_a_connection_that_waited_for_redis_while_its_worker_lost_its_lease_is_refused(
    redis: RedisServer,
) -> None:
    async with mortals(redis, HELLO) as it:
        session_id = await it.create(0)
        session = await it.stores[0].get(session_id)
        life = it.stores[0].worker
        redis.ask("ZREM", f"{life.for_all}:leases", life.id)
        with pytest.raises(OverloadedError, match="has lost what it had"):
            await session.attach(Connection(FakeWebSocket(session_id), session), None)


async def test_what_is_not_found_while_a_new_era_begins_may_be_there_soon(redis: RedisServer) -> None:
    async with mortals(redis, HELLO) as it:
        store = it.stores[0]
        redis.ask("HSET", "{inference}", "era", "another")
        with pytest.raises(OverloadedError, match="begins anew"):
            await store.worker.check_era()


async def test_when_redis_has_forgotten_one_era_begins_and_not_one_for_each_worker(redis: RedisServer) -> None:
    async with mortals(redis, HELLO, count=5) as it:
        lives = [store.worker for store in it.stores]
        await trio.to_thread.run_sync(redis.forget)
        while not all(life.is_over for life in lives) or not all(map(is_ready, it.stores)):
            await pause()
        eras = {store.worker.era for store in it.stores}
        assert len(eras) == 1
        for _ in range(20):
            await pause()
        assert {store.worker.era for store in it.stores if store._worker} == eras


async def test_one_era_begins_also_where_a_new_worker_is_the_first_to_come(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def keep_nothing(_: Any) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(redis_worker.Worker, "_keep_lease", keep_nothing)
    async with mortals(redis, HELLO, count=2) as it:
        earlier = it.stores[0].worker.era
        redis.ask("FLUSHALL")
        await it.start(it.stores[0].settings)
        new = it.stores[-1].worker.era
        assert new != earlier
        assert [await store.worker._renew() for store in it.stores] == [None, None, []]
        assert redis.ask("HGET", "{inference}", "era").split()[-1] == new.encode()


async def test_a_session_that_nobody_has_here_any_more_is_made_again_and_works_as_before(redis: RedisServer) -> None:
    async with mortals(redis, HELLO, HELLO) as it:
        session_id = await it.create(0, tools=[fakes.tool(TOOL)])
        notes: list[Any] = []
        for _ in range(2):
            while session_id in it.stores[0].worker.sessions:
                await pause()
                gc.collect()
            socket = await it.connect(0, session_id, after=len(notes))
            assert (await socket.hear())["params"]["latest_seq"] == len(notes)
            socket.call("generate", {"message": "hi"})
            _, *frames = await transcript(socket)
            assert text_of(frames) == "Hello"
            notes += frames
            await socket.drop()
        again = await it.connect(1, session_id, after=0)
        await again.hear()
        assert [await again.hear() for _ in notes] == notes


async def test_a_session_and_its_log_are_there_for_the_same_time(redis: RedisServer) -> None:
    """Else somebody who comes back finds the one without the other."""
    async with in_redis(redis.url, [text("Hello"), hang]) as it:
        socket = await it.connect(0, await it.create())
        key = it.stores[0].worker.session_key(socket.session_id)
        names = [key, f"{key}:log", f"{key}:tasks"]
        for name in names:
            redis.ask("PEXPIRE", name, str(it.stores[0].worker.ttl + 100 * len(name)))
        redis.ask("PEXPIRE", key, str(it.stores[0].worker.ttl // 2))
        socket.call("generate", {"message": "hi"})
        assert text_of([await socket.hear(), await socket.hear()]) == "Hello"
        assert len({redis.ask("PEXPIRETIME", name) for name in names}) == 1


async def test_a_restart_delays_a_task_and_changes_nothing_of_it(redis: RedisServer) -> None:
    go_on = trio.Event()
    async with mortals(redis, [text("Hel"), fakes.wait(go_on), text("lo"), finish()]) as it:
        socket, heard = await it.started(0)
        await trio.to_thread.run_sync(redis.restart)
        go_on.set()
        frames = heard[1:] + await transcript(socket)
        assert text_of(frames) == "Hello"
        assert await whole(it, 1, socket.session_id) == frames


async def test_when_redis_has_forgotten_everything_connections_are_closed_and_tasks_stopped(
    redis: RedisServer,
) -> None:
    async with mortals(redis, [text("Hel"), hang]) as it:
        socket, _ = await it.started(0)
        elsewhere = it.stores[1].worker
        await trio.to_thread.run_sync(redis.forget)
        await socket.gone.wait()
        assert socket.close_code == 1012
        while it.model.streaming or not elsewhere.is_over or not is_ready(it.stores[1]):
            await pause()
        assert await it.stores[1].get(socket.session_id) is None


async def test_when_redis_has_forgotten_something_no_session_of_before_exists(redis: RedisServer) -> None:
    async with mortals(redis, HELLO) as it:
        session_id = await it.create(0)
        redis.ask("HSET", "{inference}", "renewals", "1")
        lives = [store.worker for store in it.stores]
        while not all(life.is_over for life in lives) or not all(map(is_ready, it.stores)):
            await pause()
        assert await it.stores[2].get(session_id) is None


async def test_when_redis_has_forgotten_only_the_latest_text_nothing_takes_its_number(redis: RedisServer) -> None:
    go_on = trio.Event()
    async with mortals(redis, [text("Hel"), fakes.wait(go_on), text("lo"), finish()]) as it:
        socket, _ = await it.started(0)
        life = it.stores[0].worker
        key = life.session_key(socket.session_id)
        redis.ask("HSET", key, "latest", "0", "total", "0")
        redis.ask("HDEL", key, f"batch:{life.id}")
        redis.ask("DEL", f"{key}:log")
        go_on.set()
        await socket.gone.wait()
        assert (socket.close_code, socket.heard()) == (1012, [])
        while not life.is_over or not all(map(is_ready, it.stores)):
            await pause()
        assert await it.stores[0].get(socket.session_id) is None


# Replies that are lost, and copies of scripts that are run late


class Unreliable:
    """Runs scripts, forgets one reply in four, and runs one in four again when others have been run."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._run: Any = Link._run
        self._earlier: list[Any] = []
        self.lost = 0

    async def run(self, link: Link, name: str, key: str, arguments: Any) -> Any:
        reply = await self._run(link, name, key, arguments)
        if name not in ("renew", "ticket"):
            self._earlier.append((name, key, arguments))
        if self._earlier and self._random.random() < 0.25:
            late = self._earlier.pop(self._random.randrange(len(self._earlier)))
            await self._run(link, *late)
        if self._random.random() < 0.25:
            self.lost += 1
            raise AwayError("the reply was lost")
        return reply


@pytest.mark.parametrize("seed", range(6))
async def test_lost_replies_and_late_copies_change_nothing(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    steps = [text(f"{number} ") for number in range(30)]
    monkeypatch.setattr(redis_worker, "INTERVAL", 0.005)
    async with mortals(redis, [*steps, *CALLS], [*steps, finish()]) as it:
        unreliable = Unreliable(seed)
        monkeypatch.setattr(Link, "_run", lambda *arguments: unreliable.run(*arguments))
        session_id = await it.create(0, tools=[fakes.tool(TOOL)])
        socket = await it.connect(0, session_id)
        socket.call("generate", {"message": "hi"})
        frames = [await socket.hear()]
        task_id = frames[0]["result"]["task_id"]
        while sum(frame.get("method") == "function_call_request" for frame in frames) < 2:
            frames.append(await socket.hear())
        await socket.drop()
        socket = await it.connect(1, session_id, after=numbers(frames)[-1])
        results = [{"tool_call_id": name, "result": 1} for name in ("c1", "c2")]
        socket.call("tool_result", {"task_id": task_id, "results": results})
        frames += await transcript(socket)
        answers = [frame for frame in frames if frame.get("id") == 1]
        notes = [frame for frame in frames if "seq" in frame.get("params", {})]
        said = "".join(f"{number} " for number in range(30))
        assert text_of(notes) == said * 2
        assert numbers(notes) == list(range(1, len(notes) + 1))
        assert [answer for answer in answers if "error" in answer] == []
        assert unreliable.lost
        monkeypatch.setattr(Link, "_run", unreliable._run)
        await socket.drop()
        assert await whole(it, 2, session_id) == notes
        assert await tasks_known(it.stores[2], session_id) == []


async def tasks_known(store: RedisStore, session_id: str) -> list[Any]:
    return list(await store.worker.link.run("where", store.worker.session_key(session_id)))


async def test_a_late_copy_of_a_connection_that_is_gone_leaves_nothing(redis: RedisServer) -> None:
    async with mortals(redis, HELLO) as it:
        first = await it.connect(0, await it.create(0))
        worker, name = it.stores[0].worker, f"{it.stores[0].worker.id}:1"
        held = f"{worker.for_all}:held:{worker.id}"
        assert name.encode() in redis.ask("HKEYS", held)
        await first.drop()
        while name.encode() in redis.ask("HKEYS", held):
            await pause()
        terms = (worker.id, name, "1", first.session_id, "", worker.ttl)
        assert await worker.link.run("hold", worker.for_all, *terms) == [b"lost"]
        assert name.encode() not in redis.ask("HKEYS", held)


# What is under way while a client comes back


@attrs.define(eq=False)
class Slow:
    """Holds back the next script of one name, or its reply, as a slow line to Redis may."""

    name: str
    holds_reply: bool
    came: trio.Event = attrs.field(factory=trio.Event)
    go_on: trio.Event = attrs.field(factory=trio.Event)
    _run: Any = attrs.field(factory=lambda: Link._run)

    async def run(self, link: Link, name: str, key: str, arguments: Any) -> Any:
        if name != self.name or self.came.is_set():
            return await self._run(link, name, key, arguments)
        reply = await self._run(link, name, key, arguments) if self.holds_reply else None
        self.came.set()
        await self.go_on.wait()
        return reply if self.holds_reply else await self._run(link, name, key, arguments)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Any:
    def hold(name: str, *, holds_reply: bool) -> Slow:
        it = Slow(name, holds_reply)
        monkeypatch.setattr(Link, "_run", lambda *arguments: it.run(*arguments))
        return it

    return hold


RESULTS = [{"tool_call_id": name, "result": "seen"} for name in ("c1", "c2")]


@pytest.mark.parametrize("elsewhere", [False, True], ids=["the worker of the task", "another worker"])
async def test_a_result_that_is_not_in_resumed_is_taken_when_it_is_given_again(
    redis: RedisServer, slow: Any, elsewhere: bool
) -> None:
    async with mortals(redis, CALLS, HELLO) as it:
        first, heard = await it.started(0, 3, tools=[fakes.tool(TOOL)])
        task_id = heard[0]["result"]["task_id"]
        if elsewhere:
            first = await it.connect(1, first.session_id)
        given = slow("give", holds_reply=False)
        first.call("tool_result", {"task_id": task_id, "results": RESULTS})
        await given.came.wait()
        second = await it.connect(2, first.session_id, after=2)
        (task,) = (await second.hear())["params"]["tasks"]
        assert task == {"task_id": task_id, "state": "awaiting_tools", "outstanding": ["c1", "c2"]}
        given.go_on.set()
        second.call("tool_result", {"task_id": task_id, "results": RESULTS})
        frames = await transcript(second)
        assert [frame["result"]["accepted"] for frame in frames if "id" in frame] == [["c1", "c2"]]
        assert text_of(frames) == "Hello"


async def test_a_result_that_resumed_does_not_ask_for_was_taken(redis: RedisServer, slow: Any) -> None:
    async with mortals(redis, CALLS, HELLO) as it:
        first, heard = await it.started(0, 3, tools=[fakes.tool(TOOL)])
        given = slow("give", holds_reply=True)
        first.call("tool_result", {"task_id": heard[0]["result"]["task_id"], "results": RESULTS})
        await given.came.wait()
        second = await it.connect(1, first.session_id, after=2)
        assert (await second.hear())["params"]["tasks"][0]["outstanding"] == []
        await first.drop()
        given.go_on.set()
        assert text_of(await transcript(second)) == "Hello"


async def test_what_is_left_of_a_batch_is_not_done_for_a_connection_that_was_taken_over(
    redis: RedisServer, slow: Any
) -> None:
    async with mortals(redis, CALLS, HELLO) as it:
        first, heard = await it.started(0, 3, outgoing=0, tools=[fakes.tool(TOOL)])
        task_id = heard[0]["result"]["task_id"]
        given = slow("give", holds_reply=True)
        first.call("rpc.discover")  # whose answer it does not read: so it cannot be closed yet
        calls = [{"task_id": task_id, "results": [result]} for result in RESULTS]
        first.say([{"jsonrpc": "2.0", "id": 1, "method": "tool_result", "params": params} for params in calls])
        await given.came.wait()
        second = await it.connect(0, first.session_id, after=2)
        assert (await second.hear())["params"]["tasks"][0]["outstanding"] == ["c2"]
        given.go_on.set()
        await trio.testing.wait_all_tasks_blocked()
        second.call("tool_result", calls[1])
        assert (await second.hear())["result"]["accepted"] == ["c2"]


async def test_a_task_that_resumed_has_named_has_its_end(redis: RedisServer, slow: Any) -> None:
    async with mortals(redis, HELLO) as it:
        first = await it.connect(0, await it.create(0))
        registered = slow("register", holds_reply=True)
        first.call("generate", {"message": "hi"})
        await registered.came.wait()
        second = await it.connect(1, first.session_id, after=0)
        (task,) = (await second.hear())["params"]["tasks"]
        await first.drop()
        end = await second.hear()
        assert (end["method"], end["params"]["task_id"]) == ("error", task["task_id"])
        assert end["params"]["error"]["code"] == -32005
        assert await tasks_known(it.stores[1], first.session_id) == []


async def test_of_a_task_that_did_not_begin_and_that_nobody_has_seen_there_is_no_trace(
    redis: RedisServer, slow: Any
) -> None:
    async with mortals(redis, HELLO) as it:
        first = await it.connect(0, await it.create(0))
        registered = slow("register", holds_reply=True)
        first.call("generate", {"message": "hi"})
        await registered.came.wait()
        await first.drop()
        while await tasks_known(it.stores[0], first.session_id):
            await pause()
        second = await it.connect(1, first.session_id, after=0)
        assert (await second.hear())["params"]["latest_seq"] == 0
