"""Who has to wait with what is large, and who gives way."""

from __future__ import annotations

import attrs
import trio
from trio.testing import MockClock

from inference_trio.arriving import Arriving, Share

PATIENCE = 5.0
SIZE = 60_000


@attrs.define
class Crowd:
    arriving: Arriving = attrs.field(factory=lambda: Arriving(100_000, PATIENCE))
    dropped: list[tuple[str, float]] = attrs.field(factory=list)
    through: list[str] = attrs.field(factory=list)

    def share(self, name: str) -> Share:
        return Share(self.arriving, lambda: self.dropped.append((name, trio.current_time())))

    async def send(self, name: str, seconds: float) -> None:
        """Holds something large, and is through ``seconds`` after its turn."""
        share = self.share(name)
        share.hold(SIZE)
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
    assert crowd.arriving.budget.used == 0


async def test_each_that_stalls_has_its_time_as_the_first(autojump_clock: MockClock) -> None:
    crowd, start = Crowd(), trio.current_time()
    for name in ("one", "two"):
        crowd.share(name).hold(SIZE)
    await crowd.send("honest", 1.0)
    assert crowd.dropped == [("one", start + PATIENCE), ("two", start + 2 * PATIENCE)]
    assert crowd.through == ["honest"]


async def test_who_is_alone_never_waits_and_never_gives_way(autojump_clock: MockClock) -> None:
    crowd = Crowd()
    share = crowd.share("alone")
    share.hold(2 * SIZE)
    await trio.sleep(2 * PATIENCE)
    await share.wait_for_room()
    assert crowd.dropped == []
