"""A load on one server, and what came of it. Every transcript is checked, token by token."""

from __future__ import annotations

import asyncio
import gc
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.clients import Client
from benchmarks.plan import Plan, stamps_of
from benchmarks.servers import Server

_numbers = itertools.count(1)
_OPENING_AT_A_TIME = 50


@dataclass
class Outcome:
    """Times in seconds. ``cpu`` is the server's over the whole run; ``peak`` its memory's growth, in MB."""

    tokens: int = 0
    cpu: float = 0.0
    seconds: float = 0.0
    peak: float = 0.0
    errors: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    """Until the first text, by stream."""
    lags: list[float] = field(default_factory=list)
    """From the upstream's write to the client's read, of each token sent after all streams had started."""

    @property
    def cpu_per_token(self) -> float:
        """Microseconds; infinite where not every stream was right."""
        return self.cpu / self.tokens * 1e6 if self.tokens else math.inf

    def spoil(self) -> None:
        """Makes all that was measured worthless, as not every stream was right."""
        self.cpu = self.peak = math.inf
        self.first, self.lags = [math.inf], [math.inf]

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else float("nan")


async def open_clients(server: Server, count: int) -> list[Client]:
    clients: list[Client] = []
    while len(clients) < count:
        batch = min(_OPENING_AT_A_TIME, count - len(clients))
        clients += await asyncio.gather(*(server.open() for _ in range(batch)))
    return clients


async def run(server: Server, plan: Plan, count: int, limit: float = 150.0, **options: Any) -> Outcome:
    """``count`` streams, on connections opened before, started together."""
    clients = await open_clients(server, count)
    try:
        await asyncio.sleep(0.1)
        server.forget_peak()
        outcome, memory, cpu, began = Outcome(), server.memory(), server.cpu(), time.monotonic()
        gc.disable()
        for client in clients:
            client.start(next(_numbers), plan, **options)
        await asyncio.wait([client.done for client in clients], timeout=limit)
        gc.enable()
        outcome.seconds = time.monotonic() - began
        outcome.cpu = server.cpu() - cpu
        outcome.peak = server.memory("VmHWM") - memory
        _check(clients, plan, outcome)
        return outcome
    finally:
        for client in clients:
            client.close()


def _check(clients: list[Client], plan: Plan, outcome: Outcome) -> None:
    arrivals: list[tuple[float, list[int]]] = []
    for client in clients:
        try:
            if not client.done.done():
                raise ValueError("not complete in time")  # noqa: TRY301
            client.done.result()
            pieces = client.pieces()
            stamps = stamps_of("".join(text for _, text in pieces), plan)
        except (ValueError, ConnectionError) as error:
            outcome.errors.append(str(error) or type(error).__name__)
            continue
        outcome.tokens += len(stamps)
        outcome.first.append(pieces[0][0] - client.started_at)
        position = iter(stamps)
        arrivals += [(at, list(itertools.islice(position, text.count("@")))) for at, text in pieces]
    if plan.rate and not outcome.errors:
        all_started = max(client.started_at + first for client, first in zip(clients, outcome.first, strict=True)) * 1e6
        outcome.lags = [at - stamp / 1e6 for at, stamps in arrivals for stamp in stamps if stamp > all_started]


def next_number() -> int:
    return next(_numbers)
