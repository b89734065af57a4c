"""Many sessions at once, each on lines that break at random: every transcript is that of a line that never breaks.

A seed decides what the model says and what happens to each line. A failure names it, and
``RANDOM_LINES_SEED=7 pytest tests/test_random_lines.py`` runs that one alone.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from functools import partial

import pytest
import trio

from tests.generations import TOOL, Generation, Script, generation
from tests.harness import Server, open_server, settings
from tests.proxy import Fate, open_proxy
from tests.transcripts import Transcript, check_that_no_number_had_two_meanings, content, joined
from tests.upstream import open_upstream

SESSIONS = 25
VARIABLE = "RANDOM_LINES_SEED"
SEEDS = [os.environ[VARIABLE]] if VARIABLE in os.environ else ["1", "2"]


def fates(chance: random.Random) -> Iterator[Fate]:
    """A third of the lines is left whole; the others are cut anywhere, the handshake included."""
    while True:
        where = chance.choice(({}, {"frames": chance.randint(0, 5)}, {"size": chance.randint(0, 4000)}))
        yield Fate(
            direction=chance.choice(("down", "up")),
            how=chance.choice(("closed", "reset", "half-open")),
            whims=chance.choice((None, chance)),
            **where,
        )


async def check_session(server: Server, generations: list[Generation], chance: random.Random) -> None:
    async with open_proxy(server.port, partial(fates, chance)) as proxy:
        transcript = Transcript(await server.create_session(tools=[TOOL]), proxy)
        for each in generations:
            notes = await transcript.generate(message=each.name)
            assert list(joined(map(content, notes))) == each.told
            messages = notes[-1]["params"]["messages"]
            results = [json.loads(message["content"]) for message in messages if message["role"] == "tool"]
            assert results == [called for kind, called in each.told if kind == "function_call_request"]
        check_that_no_number_had_two_meanings(proxy)


@pytest.mark.parametrize("seed", SEEDS)
async def test_many_sessions_on_lines_that_break_at_random_are_told_what_the_model_says(seed: str) -> None:
    print(f"{VARIABLE}={seed}")  # pytest shows it with a failure
    script = Script()
    async with (
        open_upstream(script.answer) as upstream,
        open_server(settings(upstream.base_url)) as server,
        trio.open_nursery() as nursery,
    ):
        for session in range(SESSIONS):
            chance = random.Random(f"{seed} {session}")
            generations = [script.add(generation(chance, f"{session}/{number}")) for number in range(3)]
            nursery.start_soon(check_session, server, generations, chance)
    assert script.asked == {asked: 1 for name in script.generations for asked in script.expected(name)}
