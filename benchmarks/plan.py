"""What a stream of the mock upstream is to be: told to it in the prompt, and checked in the transcript.

Token ``i`` is ``iiiiii@stamp`` and a space: its number, and when it was sent (µs of the monotonic clock that all
processes share; 0 in a stream that comes all at once). So a transcript shows what is missing, twice or out of order,
and how long each token was under way.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_PROMPT = re.compile(rb"plan (\d+) (\d+) ([\d.]+) ([\d.]+) (\d+) #")


@dataclass(frozen=True)
class Plan:
    """``rate``: tokens per second, 0 for all at once. ``ttft``: seconds until the first token.

    ``per_chunk``: how many tokens share an HTTP chunk (and where they are paced, a write).
    """

    tokens: int
    rate: float = 0.0
    ttft: float = 0.0
    per_chunk: int = 1

    def prompt(self, stream: int) -> str:
        return f"plan {stream} {self.tokens} {self.rate} {self.ttft} {self.per_chunk} #"


def parse_prompt(body: bytes) -> tuple[int, Plan]:
    """The stream's number and its plan, found anywhere in the body of a request; the last one counts."""
    stream, tokens, rate, ttft, per_chunk = _PROMPT.findall(body)[-1]
    return int(stream), Plan(int(tokens), float(rate), float(ttft), int(per_chunk))


def token(index: int, stamp: int) -> str:
    return f"{index:06d}@{stamp} "


def stamps_of(transcript: str, plan: Plan) -> list[int]:
    """The stamps of all tokens. Raises ValueError unless the transcript is exactly the plan's."""
    pieces = [piece.split("@") for piece in transcript.split(" ")[:-1]]
    if [int(index) for index, _ in pieces] != list(range(plan.tokens)) or not transcript.endswith(" "):
        raise ValueError(f"expected tokens 0 to {plan.tokens - 1}, got {len(pieces)}: {transcript[:80]!r}")
    return [int(stamp) for _, stamp in pieces]
