"""Generations at random, by a seed: what the upstream says, faults included, and what a client must be told of it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeAlias

import attrs

from tests import answers
from tests.transcripts import joined
from tests.upstream import Request

TOOL = {"name": "look", "parameters": {"type": "object"}}
ATTEMPTS = 4
"""How often a round is asked for that fails and may be tried again (INFERENCE_MAX_RETRIES and the first time)."""

Fault: TypeAlias = Callable[[answers.Answer, answers.Answer], list[answers.Answer]]
"""Makes of a whole answer and a part of it what each attempt gets."""

MENDED: dict[str, Fault] = {
    "limited": lambda whole, _: [answers.status(429, {"error": {}}, headers={"Retry-After": "0"}), whole],
    "failed": lambda whole, _: [answers.status(500), whole],
}
ENDING: dict[str, Fault] = {
    "down": lambda _, __: [answers.status(500)] * ATTEMPTS,
    "stalled": lambda _, part: [(part, answers.hang())],
    "truncated": lambda _, part: [(part, answers.drop())],
    "reset": lambda _, part: [(part, answers.reset())],
    "error in the stream": lambda _, part: [(part, answers.error())],
}


@attrs.frozen
class Generation:
    """``rounds`` has for each round what each attempt gets; ``told`` is what the client is, pieces of text joined."""

    name: str
    rounds: list[list[answers.Answer]]
    told: list[tuple[str, Any]]


def generation(chance: random.Random, name: str, fault: str | None = None) -> Generation:
    """With a fault of `MENDED` the client must not notice; one of `ENDING` ends it with an error in its last round."""
    rounds: list[list[answers.Answer]] = []
    told: list[tuple[str, Any]] = []
    for number in range(count := chance.randint(1, 3)):
        is_last = number + 1 == count
        said = _pieces(chance, f"{name}.{number}")
        calls = [] if is_last else [f"{name}.{number}.{call}" for call in range(chance.randint(1, 3))]
        asked = [answers.tool_call(at, f"call_{at}", "look", {"call": call}) for at, call in enumerate(calls)]
        part = [step for kind, words in said for step in (_say(kind, words), answers.sleep(chance.choice(_PAUSES)))]
        whole = (*part, *asked, answers.finish("tool_calls" if calls else "stop"), answers.usage(), answers.done())
        rounds.append(FAULTS[fault](whole, tuple(part)) if fault and is_last else [whole])
        if not (is_last and fault == "down"):
            told += said
        told += [("function_call_request", {"call": call}) for call in calls]
    told.append(("error" if fault in ENDING else "end", "".join(words for kind, words in told if kind == "text_chunk")))
    return Generation(name, rounds, list(joined(told)))


FAULTS = MENDED | ENDING
_PAUSES = (0, 0, 0.001, 0.01)


def _pieces(chance: random.Random, name: str) -> list[tuple[str, str]]:
    """At least one, so that what breaks after them has begun."""
    return [
        (
            chance.choice(("text_chunk", "reasoning_chunk")),
            chance.choice((f"{name}.{piece} ", "é" * chance.randint(1, 3000))),
        )
        for piece in range(chance.randint(1, 8))
    ]


def _say(kind: str, words: str) -> answers.Answer:
    return answers.text(words) if kind == "text_chunk" else answers.reasoning(words)


@attrs.define
class Script:
    """What the upstream answers: generations by the first message, rounds by how often the model has spoken."""

    generations: dict[str, Generation] = attrs.field(factory=dict)
    asked: Counter[tuple[str, int]] = attrs.field(factory=Counter)
    """How often each round of each generation was."""
    forgotten: set[str] = attrs.field(factory=set)
    """A request for one of these was on its way when its task was cancelled. Nobody hears the answer."""

    def add(self, generation: Generation) -> Generation:
        self.generations[generation.name] = generation
        self.forgotten.discard(generation.name)
        return generation

    def answer(self, request: Request) -> answers.Answer:
        name = request.messages[0]["content"]
        if name in self.forgotten:
            return answers.drop()
        number = sum(message["role"] == "assistant" for message in request.messages)
        attempts = self.generations[name].rounds[number]
        attempt = self.asked[name, number]
        self.asked[name, number] += 1
        return attempts[min(attempt, len(attempts) - 1)]

    def expected(self, name: str) -> dict[tuple[str, int], int]:
        """How often each round must have been asked for in the end."""
        return {(name, number): len(attempts) for number, attempts in enumerate(self.generations[name].rounds)}

    def forget(self, name: str) -> dict[tuple[str, int], int]:
        """How often each round was asked for."""
        count = len(self.generations.pop(name).rounds)
        self.forgotten.add(name)
        return {(name, number): times for number in range(count) if (times := self.asked.pop((name, number), 0))}
