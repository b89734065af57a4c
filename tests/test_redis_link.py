"""The connection to Redis with a client that a test plays: what it never answers, answers late, or breaks off."""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import anyio
import attrs
import coredis._concurrency
import pytest
import trio
import trio.testing
from coredis.exceptions import RedisError, ResponseError

from inference_trio import redis_link
from inference_trio.logs import LOG_PERIOD
from inference_trio.redis_link import LONGEST_DEBT, LOOK_INTERVAL, AwayError, Link, Value
from inference_trio.redis_scripts import script

LONG_ENOUGH = (LONGEST_DEBT + 1) * LOOK_INTERVAL


@attrs.define(eq=False)
class Client:
    """Answers with its number, when the test says so; or raises. ``asked`` are the scripts of each round trip."""

    number: int
    error: Exception | None = None
    refuses: str = ""
    """The script that it refuses."""
    asked: list[list[str]] = attrs.field(factory=list)
    answers: trio.Event = attrs.field(factory=trio.Event)

    @asynccontextmanager
    async def pipeline(self, **_: Any) -> AsyncIterator[Pipeline]:
        pipeline = Pipeline(self)
        yield pipeline
        self.asked.append(pipeline.names)
        if self.error:
            raise self.error
        await self.answers.wait()


@attrs.define(eq=False)
class Pipeline:
    client: Client
    names: list[str] = attrs.field(factory=list)

    def evalsha(self, sha: str, keys: list[str], _: Sequence[Value]) -> Reply:
        assert sha == script(keys[0]).sha
        self.names.append(keys[0])
        return Reply(None if keys[0] == self.client.refuses else self.client.number)


@attrs.frozen
class Reply:
    """``None`` is a refusal."""

    number: int | None

    def __await__(self) -> Generator[None, None, int]:
        if self.number is None:
            raise ResponseError("no")
        return self.number
        yield


@asynccontextmanager
async def linked(*clients: Client) -> AsyncIterator[Link]:
    """A link that opens one of these after the other."""
    rest = iter(clients)

    @asynccontextmanager
    async def connect() -> AsyncIterator[Client]:
        yield next(rest)

    async with trio.open_nursery() as nursery:
        link = Link(connect)
        nursery.start_soon(link.serve)
        nursery.start_soon(link.watch)
        nursery.start_soon(link.send)
        await link.open()
        link.is_back()
        yield link
        nursery.cancel_scope.cancel()


async def ask(link: Link, replies: list[Any], name: str = "era") -> None:
    replies.append(await link.run(name, name))


async def test_what_comes_while_redis_is_asked_goes_there_in_one_round_trip() -> None:
    client = Client(1)
    replies: list[int] = []
    async with linked(client) as link, trio.open_nursery() as nursery:
        for name in ("era", "load", "spend", "era"):
            nursery.start_soon(ask, link, replies, name)
            if name == "era":
                await trio.testing.wait_all_tasks_blocked()
        assert client.asked == [["era"]]
        client.answers.set()
    assert [sorted(names) for names in client.asked] == [["era"], ["era", "load", "spend"]]
    assert replies == [1] * 4


async def test_a_script_that_is_refused_does_not_hold_up_the_others(autojump_clock: Any) -> None:
    client = Client(1, refuses="load")
    client.answers.set()
    replies: list[int] = []
    async with linked(client) as link, trio.open_nursery() as nursery:
        for name in ("era", "load", "spend"):
            nursery.start_soon(ask, link, replies, name)
        await trio.testing.wait_all_tasks_blocked()
        assert replies == [1, 1]
        client.refuses = ""
    assert replies == [1, 1, 1]
    assert client.asked[1:] == [["load"]]


async def test_refusals_are_in_the_log_once_a_minute(autojump_clock: Any, caplog: pytest.LogCaptureFixture) -> None:
    """However many wait; for each script, and with how many there were."""
    client = Client(1, refuses="load")
    client.answers.set()
    async with linked(client) as link, trio.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(partial(link.run, "load", "load", within=redis_link.FOREVER))
        await trio.sleep(LOG_PERIOD - 1)
        earlier = sum(map(len, client.asked))
        await trio.sleep(1 + redis_link.PAUSE)
        client.refuses = ""
    first, second = (record.getMessage() for record in caplog.records)
    assert first == "Redis refuses load (1): no"
    assert (
        earlier <= int(second.removeprefix("Redis refuses load (").removesuffix("): no")) < sum(map(len, client.asked))
    )


async def test_whoever_waits_for_a_client_that_is_given_up_asks_the_next_one(autojump_clock: Any) -> None:
    one, two = Client(1), Client(2)
    two.answers.set()
    replies: list[int] = []
    async with linked(one, two) as link, trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(ask, link, replies)
        await trio.sleep(LONG_ENOUGH - LOOK_INTERVAL / 2)
        assert (one.asked, link.is_away) == ([["era"] * 3], False)
        await trio.sleep(LOOK_INTERVAL)
        assert link.is_away
        link.is_back()
    assert replies == [2, 2, 2]


async def test_a_process_that_was_late_itself_does_not_give_up(mock_clock: trio.testing.MockClock) -> None:
    client = Client(1)
    replies: list[int] = []
    async with linked(client) as link, trio.open_nursery() as nursery:
        nursery.start_soon(ask, link, replies)
        for _ in range(LONGEST_DEBT):
            await trio.testing.wait_all_tasks_blocked()
            mock_clock.jump(3 * LOOK_INTERVAL)  # as long as something else had the loop
        await trio.testing.wait_all_tasks_blocked()
        assert not link.is_away
        client.answers.set()
    assert replies == [1]


async def test_only_the_oldest_debt_counts_and_not_that_something_is_always_under_way(autojump_clock: Any) -> None:
    client = Client(1)
    async with linked(client) as link:
        for _ in range(3 * LONGEST_DEBT):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask, link, [])
                await trio.sleep(LOOK_INTERVAL)
                client.answers.set()
            client.answers = trio.Event()
        assert not link.is_away


@pytest.mark.parametrize(
    "error",
    [
        *(RedisError, OSError),
        RuntimeError,  # the client was closed meanwhile
        anyio.ClosedResourceError,  # the connection was, between its choice and its use
        *(anyio.BrokenResourceError, anyio.EndOfStream),
        coredis._concurrency.QueueFull,  # while the client of a cluster was being closed
    ],
)
async def test_whatever_coredis_raises_redis_counts_as_away(error: type[Exception]) -> None:
    async with linked(Client(1, error()), Client(2)) as link:
        with pytest.raises(AwayError):
            await link.probe("era", "era")
        assert link.is_away


async def test_a_client_that_cannot_be_opened_is_in_the_log_once(
    autojump_clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """As that of a cluster, which connects at once."""
    attempts = []

    @asynccontextmanager
    async def connect() -> AsyncIterator[Client]:
        attempts.append(1)
        raise OSError("refused")
        yield

    async with trio.open_nursery() as nursery:
        nursery.start_soon(Link(connect).serve)
        await trio.sleep(10 * redis_link.PAUSE)
        nursery.cancel_scope.cancel()
    assert len(attempts) >= 10
    assert caplog.messages == ["Redis is away: refused"]


async def test_a_late_failure_of_an_earlier_client_does_no_harm() -> None:
    one, two = Client(1), Client(2)
    async with linked(one, two) as link:
        link._give_up(one, "it broke")
        await trio.testing.wait_all_tasks_blocked()
        link.is_back()
        link._give_up(one, "it broke")
        assert not link.is_away
