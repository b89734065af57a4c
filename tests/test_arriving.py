"""Who has to wait with what is large, and who gives way."""

from __future__ import annotations

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from inference_trio.arriving import SMALL, Arriving, Share
from inference_trio.logs import LOG_PERIOD

PATIENCE = 5.0
LONGEST_WAIT = 30.0
SIZE = 60_000


@attrs.define
class Crowd:
    arriving: Arriving = attrs.field(factory=lambda: Arriving(100_000, PATIENCE, LONGEST_WAIT))
    dropped: list[tuple[str, float]] = attrs.field(factory=list)
    through: list[str] = attrs.field(factory=list)

    def share(self, name: str) -> Share:
        return Share(self.arriving, lambda: self.dropped.append((name, trio.current_time())))

    async def send(self, name: str, seconds: float, size: int = SIZE) -> None:
        """Holds something large, and is through ``seconds`` after its turn."""
        share = self.share(name)
        share.hold(size)
        await share.wait_for_room()
        await trio.sleep(seconds)
        if not share.is_over:
            share.end()
            self.through.append(name)


async def test_of_many_only_those_give_way_that_hold_up_others_for_too_long(autojump_clock: MockClock) -> None:
    crowd, start = Crowd(), trio.current_time()
    crowd.share("stalls").hold(SIZE)
    async with trio.open_nursery() as nursery:
        for name in "abcde":
            nursery.start_soon(crowd.send, name, 1.0)
    assert crowd.dropped == [("stalls", start + PATIENCE)]
    assert sorted(crowd.through) == list("abcde")
    assert crowd.arriving.used == 0


async def test_each_that_stalls_has_its_time_as_the_first(autojump_clock: MockClock) -> None:
    crowd, start = Crowd(), trio.current_time()
    for name in ("one", "two"):
        crowd.share(name).hold(SIZE)
    await crowd.send("honest", 1.0)
    assert crowd.dropped == [("one", start + PATIENCE), ("two", start + 2 * PATIENCE)]
    assert crowd.through == ["honest"]


async def test_who_has_waited_for_too_long_gives_way_too(autojump_clock: MockClock) -> None:
    crowd, start = Crowd(), trio.current_time()
    for number in range(7):
        crowd.share(f"stalls {number}").hold(SIZE)
    await crowd.send("honest", 1.0)
    assert crowd.dropped[-1] == ("honest", start + LONGEST_WAIT)
    assert len(crowd.dropped) == 6, "five have had their time as the first"
    assert crowd.through == []


async def test_of_those_who_have_waited_too_long_only_as_many_give_way_as_have_to(autojump_clock: MockClock) -> None:
    crowd = Crowd()
    for number in range(6):
        crowd.share(f"stalls {number}").hold(SIZE)
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(crowd.send, "honest", 1.0, 20_000)
    # Then the last of those that stall has 60,000, and there is room for two.
    assert [name for name, _ in crowd.dropped].count("honest") == 3
    assert crowd.through == ["honest", "honest"]


async def test_who_waits_keeps_the_place_when_the_first_one_gives_way(autojump_clock: MockClock) -> None:
    for _ in range(10):  # all wait until the same moment, and Trio runs what is due at the same time in any order
        crowd = Crowd()
        crowd.share("stalls").hold(SIZE)
        async with trio.open_nursery() as nursery:
            for name in "abcde":
                nursery.start_soon(crowd.send, name, 0.0, 20_000)
                await wait_all_tasks_blocked()
        assert crowd.through == list("abcde")


async def test_who_does_not_hold_much_any_more_goes_on(autojump_clock: MockClock) -> None:
    crowd = Crowd()
    share = crowd.share("reads")
    for each in (crowd.share("first"), share):
        each.hold(SIZE)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(share.wait_for_room)
        await wait_all_tasks_blocked()
        share.hold(SMALL)
    assert crowd.dropped == []


async def test_of_hundreds_that_give_way_at_a_time_the_log_says_so_in_one_line(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    crowd = Crowd()
    shares = [crowd.share("") for _ in range(300)]
    for share in shares:
        crowd.arriving.drop(share)
    assert len(caplog.messages) == 1
    await trio.sleep(LOG_PERIOD)
    crowd.arriving.drop(crowd.share("another"))
    assert [int(line.rpartition(" ")[2]) for line in caplog.messages] == [1, 300]


async def test_who_is_alone_never_waits_and_never_gives_way(autojump_clock: MockClock) -> None:
    crowd = Crowd()
    share = crowd.share("alone")
    share.hold(2 * SIZE)
    await trio.sleep(2 * PATIENCE)
    await share.wait_for_room()
    assert crowd.dropped == []
