"""Many sessions at once, each on lines that break at random: every transcript is that of a line that never breaks.

A seed decides what the model says and what happens to each line. A failure names it, and
``RANDOM_LINES_SEED=7 pytest tests/test_random_lines.py`` runs that one alone.
"""

from __future__ import annotations

import itertools
import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import attrs
import pytest
import trio

from tests import answers
from tests.harness import Server, open_server, settings
from tests.proxy import Fate, open_proxy
from tests.transcripts import Transcript, check_that_no_number_had_two_meanings
from tests.upstream import Request, open_upstream

SESSIONS = 25
TOOL = {"name": "look", "parameters": {"type": "object"}}
VARIABLE = "RANDOM_LINES_SEED"
SEEDS = [os.environ[VARIABLE]] if VARIABLE in os.environ else ["1", "2"]


@attrs.frozen
class Generation:
    """What the upstream sends in each round, and what the client is told, pieces of text joined."""

    name: str
    rounds: list[answers.Answer]
    told: list[tuple[str, Any]]


def generation(chance: random.Random, name: str) -> Generation:
    rounds, told = [], []
    for number in range(count := chance.randint(1, 3)):
        steps = []
        for piece in range(chance.randint(0, 8)):
            words = chance.choice((f"{name}.{number}.{piece} ", "é" * chance.randint(1, 3000)))
            kind, say = chance.choice((("text_chunk", answers.text), ("reasoning_chunk", answers.reasoning)))
            told.append((kind, words))
            steps += [say(words), answers.sleep(chance.choice((0, 0, 0.001, 0.01)))]
        calls = [f"{name}.{number}.{call}" for call in range(chance.randint(1, 3))] if number + 1 < count else []
        told += [("function_call_request", {"call": call}) for call in calls]
        steps += [answers.tool_call(at, f"call_{at}", "look", {"call": call}) for at, call in enumerate(calls)]
        rounds.append((*steps, answers.finish("tool_calls" if calls else "stop"), answers.usage(), answers.done()))
    told.append(("end", "".join(words for kind, words in told if kind == "text_chunk")))
    return Generation(name, rounds, list(joined(told)))


def joined(told: list[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Text may come in other pieces than it was sent in."""
    for kind, run in itertools.groupby(told, lambda item: item[0]):
        if kind.endswith("_chunk"):
            yield kind, "".join(words for _, words in run)
        else:
            yield from run


def content(note: Any) -> tuple[str, Any]:
    params = note["params"]
    return note["method"], params.get("chunk") or params.get("parameters") or params.get("final_text")


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
            assert list(joined([content(note) for note in notes])) == each.told
            messages = notes[-1]["params"]["messages"]
            results = [json.loads(message["content"]) for message in messages if message["role"] == "tool"]
            assert results == [called for kind, called in each.told if kind == "function_call_request"]
        check_that_no_number_had_two_meanings(proxy)


@pytest.mark.parametrize("seed", SEEDS)
async def test_many_sessions_on_lines_that_break_at_random_are_told_what_the_model_says(seed: str) -> None:
    print(f"{VARIABLE}={seed}")  # pytest shows it with a failure
    sessions = [
        [generation(random.Random(f"{seed} {session} {number}"), f"{session}/{number}") for number in range(3)]
        for session in range(SESSIONS)
    ]
    said = {each.name: each.rounds for generations in sessions for each in generations}
    asked: Counter[str] = Counter()

    def answer(request: Request) -> answers.Answer:
        name = request.messages[0]["content"]
        asked[name] += 1
        return said[name][sum(message["role"] == "assistant" for message in request.messages)]

    async with (
        open_upstream(answer) as upstream,
        open_server(settings(upstream.base_url)) as server,
        trio.open_nursery() as nursery,
    ):
        for number, generations in enumerate(sessions):
            nursery.start_soon(check_session, server, generations, random.Random(f"{seed} line {number}"))
    assert asked == {name: len(rounds) for name, rounds in said.items()}
