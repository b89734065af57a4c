"""What every store of sessions does: in memory, and in Redis with three workers.

With Redis each call may go to another worker; in memory all three are the same.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from typing import Any

import attrs
import pytest
import trio

from inference_trio.access import Owner
from inference_trio.connection import Connection
from inference_trio.errors import InvalidParamsError, OverloadedError
from inference_trio.protocol import CreateSession
from inference_trio.redis_store import open_redis_store
from inference_trio.store import SessionStore
from inference_trio.stores import Store
from inference_trio.variables import Secret

from . import fakes
from .fakes import FakeModel, FakeWebSocket, finish, hang, text
from .harness import PATIENCE
from .processes import reserved_port
from .redis_server import RedisServer, running_redis
from .test_connection import CALLS, HELLO, TOOL, numbers, text_of, transcript

KB = 1024


@attrs.define(eq=False)
class Workers:
    stores: list[Any]
    nursery: trio.Nursery
    model: FakeModel
    owner: Owner

    async def create(self, worker: int = 0, **params: Any) -> str:
        session = await self.stores[worker].create(CreateSession(**params), self.owner)
        return session.id

    async def connect(self, worker: int, session_id: str, after: int | None = None, **options: Any) -> FakeWebSocket:
        session = await self.stores[worker].get(session_id)
        assert session is not None
        socket = FakeWebSocket(session_id, **options)
        connection = Connection(socket, session)
        await session.attach(connection, after)

        async def serve() -> None:
            with socket.scope:
                await connection.run()
            socket.gone.set()

        self.nursery.start_soon(serve)
        return socket


@pytest.fixture(scope="module")
def redis() -> Iterator[list[RedisServer]]:
    with running_redis() as server:
        yield [server]


@contextmanager
def running_node(bus: int, first_slot: int, last_slot: int) -> Iterator[RedisServer]:
    options = ("--cluster-enabled", "yes", "--cluster-announce-ip", "127.0.0.1", "--cluster-port", str(bus))
    with running_redis(*options) as server:
        assert server.ask("CLUSTER", "ADDSLOTSRANGE", str(first_slot), str(last_slot)) == b"+OK\r\n"
        yield server


@pytest.fixture(scope="module")
def cluster() -> Iterator[list[RedisServer]]:
    """A Redis Cluster of two servers. Each refuses scripts that touch keys of two slots."""
    with (
        reserved_port() as first_bus,
        reserved_port() as second_bus,
        running_node(first_bus, 0, 8191) as first,
        running_node(second_bus, 8192, 16383) as second,
    ):
        assert first.ask("CLUSTER", "MEET", "127.0.0.1", str(second.port), str(second_bus)) == b"+OK\r\n"
        for server in (first, second):
            while b"cluster_state:ok" not in server.ask("CLUSTER", "INFO"):
                time.sleep(0.01)
        yield [first, second]


@asynccontextmanager
async def in_memory(*rounds: list[Any], **changes: Any) -> AsyncIterator[Workers]:
    async with trio.open_nursery() as nursery:
        model = FakeModel(*rounds)
        store = SessionStore(fakes.settings(**changes), model, nursery)
        yield Workers([store] * 3, nursery, model, Owner(None))
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def in_redis(url: str, *rounds: list[Any], **changes: Any) -> AsyncIterator[Workers]:
    async with trio.open_nursery() as nursery, AsyncExitStack() as stack:
        model, owner = FakeModel(*rounds), Owner(None)
        settings = fakes.settings(**changes, store=Secret(url))
        stores = [await stack.enter_async_context(open_redis_store(settings, model, lambda _: owner)) for _ in range(3)]
        yield Workers(stores, nursery, model, owner)
        nursery.cancel_scope.cancel()


@pytest.fixture(params=["memory", "redis", "cluster"])
def workers(request: pytest.FixtureRequest) -> Any:
    if request.param == "memory":
        return in_memory
    servers = request.getfixturevalue(request.param)
    for server in servers:
        server.ask("FLUSHALL")
    return partial(in_redis, servers[0].url + ("?cluster=true" if request.param == "cluster" else ""))


async def answer_and_end(socket: FakeWebSocket) -> tuple[Any, list[Any]]:
    """The answer to a request, and the notifications up to the end of a task: whichever comes first."""
    frames = await transcript(socket)
    answers = [frame for frame in frames if "id" in frame] or [await socket.hear()]
    return answers[0], [frame for frame in frames if "method" in frame]


async def test_an_answer_comes_whole_and_numbered(workers: Any) -> None:
    async with workers(HELLO) as it:
        socket = await it.connect(0, await it.create())
        socket.call("generate", {"message": "hi"})
        answer, *notes = await transcript(socket)
        assert answer["result"]["state"] == "streaming"
        assert text_of(notes) == "Hello"
        assert numbers(notes) == list(range(1, len(notes) + 1))
        assert notes[-1]["params"]["final_text"] == "Hello"
        assert notes[-1]["params"]["session_id"] == socket.session_id


async def test_a_session_is_known_to_every_worker_and_a_strange_one_to_none(workers: Any) -> None:
    async with workers(HELLO) as it:
        session_id = await it.create(0, tools=[fakes.tool(TOOL)])
        for store in it.stores:
            session = await store.get(session_id)
            assert [tool["function"]["name"] for tool in session.tools] == ["look"]
            for strange in ("nonesuch", "}", f"{{{session_id[2:]}}}"):
                assert await store.get(strange) is None


async def test_created_here_connected_there_and_the_tool_result_comes_elsewhere(workers: Any) -> None:
    async with workers(CALLS, HELLO) as it:
        session_id = await it.create(0, tools=[fakes.tool(TOOL)])
        first = await it.connect(1, session_id)
        first.call("generate", {"message": "hi"})
        answer, one, two = [await first.hear() for _ in range(3)]
        task_id = answer["result"]["task_id"]
        await first.drop()
        second = await it.connect(2, session_id, after=one["params"]["seq"])
        resumed, again = await second.hear(), await second.hear()
        assert resumed["params"]["tasks"] == [
            {"task_id": task_id, "state": "awaiting_tools", "outstanding": ["c1", "c2"]}
        ]
        assert again == two
        results = [{"tool_call_id": name, "result": "seen"} for name in ("c1", "c2")]
        second.call("tool_result", {"task_id": task_id, "results": results})
        accepted, rest = await answer_and_end(second)
        assert accepted["result"] == {
            "task_id": task_id,
            "accepted": ["c1", "c2"],
            "outstanding": [],
            "state": "streaming",
        }
        assert text_of(rest) == "Hello"
        assert numbers(rest) == list(range(3, 3 + len(rest)))


async def test_results_that_do_not_fit_are_refused_wherever_they_come(workers: Any) -> None:
    async with workers(CALLS, HELLO) as it:
        session_id = await it.create(0, tools=[fakes.tool(TOOL)])
        first = await it.connect(1, session_id)
        first.call("generate", {"message": "hi"})
        answer, *_ = [await first.hear() for _ in range(3)]
        task_id = answer["result"]["task_id"]
        second = await it.connect(2, session_id)
        wrong = {"tool_call_id": "nobody", "result": 1}
        for name, code in ((task_id, -32602), ("task_nobody", -32004)):
            second.call("tool_result", {"task_id": name, "results": [wrong]})
            assert (await second.hear())["error"]["code"] == code


async def test_a_cancel_is_answered_when_the_task_has_ended_wherever_it_runs(workers: Any) -> None:
    async with workers([text("Hel"), hang]) as it:
        session_id = await it.create()
        first = await it.connect(0, session_id)
        first.call("generate", {"message": "hi"})
        answer, _ = [await first.hear() for _ in range(2)]
        task_id = answer["result"]["task_id"]
        second = await it.connect(1, session_id)
        second.call("cancel", {})
        answer, notes = await answer_and_end(second)
        assert answer["result"] == {"cancelled": [task_id]}
        assert notes[-1]["params"]["status_message"] == "cancelled"
        assert it.model.streaming == 0
        second.call("cancel", {"task_id": task_id})
        assert (await second.hear())["result"] == {"cancelled": []}


async def test_a_newer_connection_takes_over(workers: Any) -> None:
    async with workers(HELLO) as it:
        session_id = await it.create()
        older = await it.connect(0, session_id)
        newer = await it.connect(1, session_id)
        with trio.fail_after(PATIENCE):
            await older.gone.wait()
        assert older.close_code == 4409
        newer.call("generate", {"message": "hi"})
        assert (await transcript(newer))[-1]["params"]["final_text"] == "Hello"


async def test_a_number_that_was_not_given_out_is_refused_and_changes_nothing(workers: Any) -> None:
    async with workers(HELLO) as it:
        session_id = await it.create()
        socket = await it.connect(0, session_id)
        with pytest.raises(InvalidParamsError, match="from 0 to 0 - at `after`"):
            await it.connect(1, session_id, after=1)
        socket.call("generate", {"message": "hi"})
        assert (await transcript(socket))[-1]["params"]["final_text"] == "Hello"


async def test_what_was_sent_is_replayed_as_it_was(workers: Any) -> None:
    async with workers(HELLO) as it:
        session_id = await it.create()
        first = await it.connect(0, session_id)
        first.call("generate", {"message": "hi"})
        _, *notes = await transcript(first)
        await first.drop()
        for after in range(len(notes) + 1):
            socket = await it.connect(after % 3, session_id, after=after)
            resumed, *again = [await socket.hear() for _ in range(1 + len(notes) - after)]
            assert again == notes[after:]
            assert resumed["params"] == {
                "session_id": session_id,
                "after": after,
                "oldest_seq": 1,
                "latest_seq": len(notes),
                "gap": False,
                "tasks": [],
            }


async def test_a_model_waits_for_a_client_that_does_not_read_and_nothing_is_lost(workers: Any) -> None:
    pieces = [text("x" * KB) for _ in range(100)]
    async with workers([*pieces, finish()], outbox_bytes=32 * KB) as it:
        session_id = await it.create()
        socket = await it.connect(0, session_id, outgoing=0)
        socket.call("generate", {"message": "hi"})
        frames = await transcript(socket)
        assert text_of(frames) == "x" * 100 * KB
        assert numbers(frames) == list(range(1, len(numbers(frames)) + 1))
        await socket.drop()
        again = await it.connect(1, session_id, after=0)
        resumed = (await again.hear())["params"]
        assert resumed["gap"] is True
        assert (await again.hear())["params"]["seq"] == resumed["oldest_seq"] > 1


async def test_a_task_waits_for_a_reader_at_another_worker(workers: Any) -> None:
    pieces = [text("x" * KB) for _ in range(100)]
    go_on = trio.Event()
    async with workers([text("go"), fakes.wait(go_on), *pieces, finish()], outbox_bytes=32 * KB) as it:
        session_id = await it.create()
        first = await it.connect(0, session_id)
        first.call("generate", {"message": "hi"})
        heard = [await first.hear() for _ in range(2)]
        await first.drop()
        second = await it.connect(1, session_id, after=heard[-1]["params"]["seq"], outgoing=0)
        go_on.set()
        _, *frames = await transcript(second)
        assert text_of([*heard, *frames]) == "go" + "x" * 100 * KB
        assert numbers(frames) == list(range(2, len(frames) + 2))


async def test_without_a_connection_tasks_are_cancelled_after_the_window(workers: Any) -> None:
    async with workers([text("Hel"), hang], resume_window=0.0) as it:
        session_id = await it.create()
        first = await it.connect(0, session_id)
        first.call("generate", {"message": "hi"})
        await first.hear()
        await first.hear()
        second = await it.connect(1, session_id)
        await first.gone.wait()
        assert it.model.streaming == 1, "the second connection has it"
        await second.drop()
        with trio.fail_after(PATIENCE):
            while it.model.streaming:
                await trio.lowlevel.checkpoint()
        frames = await transcript(await it.connect(2, session_id, after=1))
        assert frames[-1]["params"]["status_message"] == "cancelled"


async def test_sessions_are_counted_over_all_workers(workers: Any) -> None:
    async with workers(HELLO, max_sessions=2) as it:
        await it.create(0)
        await it.create(1)
        with pytest.raises(OverloadedError, match="too many sessions on the server: 2"):
            await it.create(2)


async def test_tasks_are_counted_over_all_workers_and_given_back(workers: Any) -> None:
    async with workers([hang], max_tasks=2) as it:
        sockets = [await it.connect(worker, await it.create(worker)) for worker in range(3)]
        for socket in sockets[:2]:
            socket.call("generate", {"message": "hi"})
            assert "result" in await socket.hear()
        sockets[2].call("generate", {"message": "hi"})
        assert "too many tasks on the server: 2" in (await sockets[2].hear())["error"]["message"]
        sockets[0].call("cancel")
        await transcript(sockets[0])
        with trio.fail_after(PATIENCE):
            while True:
                sockets[2].call("generate", {"message": "hi"})
                if "result" in await sockets[2].hear():
                    break


@pytest.mark.parametrize(("limits", "where"), [({"max_tasks": 1}, "of this token: 1"), ({}, "in this session: 2")])
async def test_tasks_are_limited_for_a_token_and_in_a_session(workers: Any, limits: Any, where: str) -> None:
    async with workers([hang], max_tasks_per_session=2) as it:
        for name, value in limits.items():
            setattr(it.owner, name, value)
        socket = await it.connect(0, await it.create())
        answers = []
        for _ in range(3):
            socket.call("generate", {"message": "hi"})
            answers.append(await socket.hear())
        assert where in answers[-1]["error"]["message"]


async def test_requests_of_a_token_are_counted_over_all_workers(workers: Any) -> None:
    async with workers([hang]) as it:
        it.owner.requests_per_minute = 3
        for worker in range(3):
            await it.create(worker)
        with pytest.raises(OverloadedError, match="3 requests a minute") as refused:
            await it.stores[0].spend_request(it.owner)
        assert 0 < refused.value.data["retry_after"] <= 20


async def test_a_ticket_is_good_once_at_any_worker(workers: Any) -> None:
    async with workers(HELLO) as it:
        session_id = await it.create()
        ticket = await (await it.stores[0].get(session_id)).issue_ticket()
        elsewhere = await it.stores[1].get(session_id)
        assert await elsewhere.redeem("another") is False
        assert await elsewhere.redeem(ticket) is True
        assert await elsewhere.redeem(ticket) is False


async def test_a_worker_that_stops_lets_its_tasks_end_and_closes(workers: Any) -> None:
    go_on = trio.Event()
    async with workers([text("Hel"), fakes.wait(go_on), text("lo"), finish()], drain_seconds=30.0) as it:
        socket = await it.connect(0, await it.create())
        socket.call("generate", {"message": "hi"})
        await socket.hear()
        await socket.hear()
        it.nursery.start_soon(it.stores[0].drain)
        assert (await socket.hear())["method"] == "draining"
        socket.call("generate", {"message": "hi"})
        assert (await socket.hear())["error"]["code"] == -32005
        go_on.set()
        assert (await transcript(socket))[-1]["params"]["final_text"] == "Hello"
        with trio.fail_after(PATIENCE):
            await socket.gone.wait()
        assert socket.close_code == 1012


def test_both_are_stores() -> None:
    _: list[type[Store]] = [SessionStore]
