"""Whatever clients and models do, in whatever order: what a session must keep, it keeps.

Hypothesis draws the steps; `tests.play` carries them out and knows what must hold.
"""

from __future__ import annotations

import itertools
from typing import Any

import attrs
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from inference_trio.store import SessionStore

from . import fakes
from .play import Play, Puppets
from .test_connection import Bench

LIMITS = {"max_tasks_per_session": 3, "max_tasks": 4, "tool_timeout": 50.5, "session_ttl": 100.25}
NO_LIMITS = dict.fromkeys(("first_token_timeout", "token_timeout", "task_timeout"), 1e9)
ROOMY: dict[str, Any] = {}
TIGHT = {"outbox_bytes": 1800}
SCARCE = {"memory_bytes": 25_000, "session_ttl": 1e9}


@attrs.frozen
class Connect:
    at: int
    back: int | None
    reads: bool = True

    async def run(self, play: Play) -> None:
        play.connect(self.at, self.back, reads=self.reads)


@attrs.frozen
class Drop:
    at: int

    async def run(self, play: Play) -> None:
        await play.drop(self.at)


@attrs.frozen
class Read:
    """Of a client that reads nothing by itself."""

    at: int
    count: int

    async def run(self, play: Play) -> None:
        for _ in range(self.count):
            play.guests[self.at].listen()
            await trio.testing.wait_all_tasks_blocked()


@attrs.frozen
class Generate:
    at: int
    padding: int

    async def run(self, play: Play) -> None:
        await play.generate(self.at, self.padding)


@attrs.frozen
class Say:
    """What a model says next: ``how`` is the text, the number of calls or the finish reason."""

    pick: int
    what: str
    how: Any = None

    async def run(self, play: Play) -> None:
        play.order(self.pick, self.what, self.how)


@attrs.frozen
class GiveResult:
    at: int
    pick: int
    count: int

    async def run(self, play: Play) -> None:
        play.give_result(self.at, self.pick, self.count)


@attrs.frozen
class GiveWrongResult:
    at: int
    pick: int

    async def run(self, play: Play) -> None:
        play.give_wrong_result(self.at, self.pick)


@attrs.frozen
class Cancel:
    at: int
    pick: int | None

    async def run(self, play: Play) -> None:
        play.cancel(self.at, self.pick)


@attrs.frozen
class Pass:
    seconds: float

    async def run(self, play: Play) -> None:
        await play.pass_time(self.seconds)


AT = st.integers(0, 1)
PICK = st.integers(0, 7)
BACK = st.sampled_from([0, 0, 0, 1, 4, 1000, None])
CHUNK = st.sampled_from(["a", "bc", "d" * 500])
TEXT = st.builds(Say, PICK, st.sampled_from(["text_chunk", "text_chunk", "reasoning_chunk"]), CHUNK)
CALLS = st.builds(Say, PICK, st.just("calls"), st.integers(1, 3))
LAST = st.builds(Say, PICK, st.just("finish"), st.sampled_from(["stop", "length"])) | st.builds(
    Say, PICK, st.just("fail")
)
GENERATE = st.builds(Generate, AT, st.sampled_from([0, 0, 3000]))
CONNECT = st.builds(Connect, AT, BACK, st.booleans())
WEIGHTS = {
    GENERATE: 5,
    TEXT: 8,
    CALLS: 3,
    LAST: 1,
    CONNECT: 4,
    st.builds(GiveResult, AT, PICK, st.integers(1, 3)): 3,
    st.builds(GiveWrongResult, AT, PICK): 1,
    st.builds(Cancel, AT, st.none() | PICK): 1,
    st.builds(Drop, AT): 2,
    st.builds(Read, AT, st.integers(1, 5)): 2,
    st.builds(Pass, st.sampled_from([1.0, 1.0, 29.0, 31.0, 60.0, 102.0])): 1,
}
STEP = st.sampled_from(list(itertools.chain(*([step] * weight for step, weight in WEIGHTS.items())))).flatmap(
    lambda step: step
)
STEPS = st.lists(st.lists(STEP, max_size=12), max_size=12).map(lambda parts: list(itertools.chain(*parts)))
"""In parts, because a list of Hypothesis has five items on average, whatever is the most; this is still shrunk well."""


async def perform(steps: list[Any], room: dict[str, Any], window: float) -> None:
    changes = LIMITS | NO_LIMITS | {"resume_window": window} | room
    server_settings = fakes.settings(**changes)
    model = Puppets(server_settings)
    before = trio.lowlevel.current_statistics().tasks_living
    async with trio.open_nursery() as nursery:
        bench = Bench(SessionStore(server_settings, model, nursery), nursery)
        play = Play(bench, model, is_roomy=room is ROOMY)
        bench.store.observers = [play]
        play.guests = [play.arrive(), play.arrive()]
        for at in (0, 1):
            play.connect(at, None, reads=True)
        for step in steps:
            await step.run(play)
            await play.settle()
        await play.finish()
    assert trio.lowlevel.current_statistics().tasks_living == before


@settings(max_examples=200)
@given(steps=STEPS, room=st.sampled_from([ROOMY, TIGHT, SCARCE]), window=st.sampled_from([30.0, 30.0, 0.0]))
def test_whatever_happens_in_whatever_order(steps: list[Any], room: dict[str, Any], window: float) -> None:
    trio.run(perform, steps, room, window, clock=trio.testing.MockClock(autojump_threshold=0))
