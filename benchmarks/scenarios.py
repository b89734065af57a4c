"""What is measured, one function a row of the table. Each gives a `Row`, or for growth a `Curve`."""

from __future__ import annotations

import asyncio
import json
import math
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

from benchmarks import clients, load, servers, workers
from benchmarks.load import Outcome, percentile
from benchmarks.plan import Plan
from benchmarks.servers import FLOOR, LANGSERVE, LITELLM, OURS, SERVER_CORES, USUAL, Kind, Server


@dataclass
class Row:
    """``ratios``: what counts, with what it should be. ``cells``: what was measured, by the name of the server."""

    title: str
    ratios: list[str]
    cells: dict[str, str]
    numbers: dict[str, float] = field(default_factory=dict)
    """For the picture: µs of CPU per token, by the name of the server."""


@dataclass
class Curve:
    """How something grows: ``points`` has a list of values for each size."""

    title: str
    size: str
    values: tuple[str, ...]
    points: list[tuple[int, list[float]]]


@dataclass
class Bench:
    upstream_port: int
    kinds: tuple[Kind, ...]
    quick: bool = False

    @asynccontextmanager
    async def servers(self, *kinds: Kind) -> AsyncIterator[list[Server]]:
        """Fresh and warmed up, those of ``kinds`` that there are. All but the one in use stand still."""
        with ExitStack() as stack:
            yield [await self._started(stack, kind) for kind in self.present(*kinds)]

    def present(self, *kinds: Kind) -> list[Kind]:
        return [kind for kind in kinds if kind in self.kinds]

    async def _started(self, stack: ExitStack, kind: Kind) -> Server:
        began = time.monotonic()
        server = stack.enter_context(servers.server(kind, self.upstream_port))
        await servers.wait_until_ready(server.port, kind.ready, server.process)
        server.start_seconds = time.monotonic() - began
        await load.run(server, Plan(20), 10)
        server.pause()
        return server

    async def run(self, server: Server, plan: Plan, count: int, **options: Any) -> Outcome:
        with server.awake():
            outcome = await load.run(server, plan, count, **options)
        wrong = f", {len(outcome.errors)} WRONG: {outcome.errors[0][:200]}" if outcome.errors else ""
        if outcome.errors:
            outcome.spoil()
        print(f"  {server.kind.name}: {count} × {plan}: {outcome.cpu_per_token:.1f} µs/token{wrong}", flush=True)
        return outcome

    async def alternate(
        self, plan: Plan, count: int, repeats: int, *kinds: Kind, shorter: Collection[Kind] = ()
    ) -> dict[str, list[Outcome]]:
        """The servers take turns, so that what disturbs one disturbs the others too.

        ``shorter`` have two thirds of the tokens: where no ratio is taken, or one that is far from its limit.
        """
        outcomes: dict[str, list[Outcome]] = {}
        async with self.servers(*kinds) as running:
            for _ in range(1 if self.quick else repeats):
                for server in running:
                    if server.kind in (LITELLM, LANGSERVE) and server.kind.name in outcomes:
                        continue  # their runs take the longest
                    its_plan = replace(plan, tokens=plan.tokens * 2 // 3) if server.kind in shorter else plan
                    outcomes.setdefault(server.kind.name, []).append(await self.run(server, its_plan, count))
        return outcomes


def _median(outcomes: dict[str, list[Outcome]], value: Callable[[Outcome], float]) -> dict[str, float]:
    return {name: statistics.median(map(value, several)) for name, several in outcomes.items()}


def _part(values: dict[str, float], other: Kind, goal: float) -> list[str]:
    """Ours as a part of another one's."""
    if OURS.name not in values or other.name not in values:
        return []
    if not all(map(math.isfinite, (values[OURS.name], values[other.name]))):
        return [f"not to be compared with {other.title}: streams were wrong"]
    ratio = values[OURS.name] / values[other.name]
    shown, wanted = (f"1/{1 / ratio:.1f}", f"1/{1 / goal:g}") if ratio < 0.4 else (f"{ratio:.2f}", f"{goal:g}")
    return [f"**{shown}** of {other.title} (at most {wanted}){_verdict(ratio <= goal)}"]


def _verdict(met: bool) -> str:
    return "" if met else " **missed**"


def _at_most(what: str, value: float, limit: float, unit: str) -> str:
    return f"{what} **{value:.3g} {unit}** (at most {limit:g}){_verdict(value <= limit)}"


def _cells(values: dict[str, float], unit: str) -> dict[str, str]:
    return {name: f"{value:.3g} {unit}" if math.isfinite(value) else "too late" for name, value in values.items()}


async def burst(bench: Bench) -> Row:
    outcomes = await bench.alternate(Plan(500), 50, 3, *servers.KINDS)
    costs = _median(outcomes, lambda outcome: outcome.cpu_per_token)
    ratios = _part(costs, USUAL, 1 / 12) + _part(costs, LITELLM, 1 / 30)
    return Row("50 streams × 500 tokens, all at once: CPU per token", ratios, _cells(costs, "µs"), costs)


async def paced(bench: Bench) -> Row:
    outcomes = await bench.alternate(
        Plan(100 if bench.quick else 200, rate=20), 100, 1, *servers.KINDS, shorter=(LITELLM, LANGSERVE)
    )
    costs = _median(outcomes, lambda outcome: outcome.cpu_per_token)
    ratios = _part(costs, USUAL, 0.6) + _part(costs, FLOOR, 1.25)
    return Row("100 streams × 20 tokens/s, each token a read: CPU per token", ratios, _cells(costs, "µs"), costs)


async def thousand(bench: Bench) -> Row:
    plan = Plan(100 if bench.quick else 150, rate=20)
    outcomes = await bench.alternate(plan, 1000, 1, OURS, USUAL, FLOOR, shorter=(USUAL, FLOOR))
    cells = {name: _described(several[0]) for name, several in outcomes.items()}
    lag = percentile(outcomes[OURS.name][0].lags, 0.99)
    return Row("1000 streams × 20 tokens/s, started together", [_at_most("lag p99", lag * 1e3, 500, "ms")], cells)


def _described(outcome: Outcome) -> str:
    if outcome.errors:
        return f"{len(outcome.errors)} streams wrong"
    lags = [percentile(outcome.lags, share) * 1e3 for share in (0.5, 0.99)]
    lag = f"lag p50 {lags[0]:.0f}, p99 {lags[1]:.0f} ms" if outcome.lags else "never all at a time"
    return f"{outcome.rate:,.0f} tokens/s, {lag}"


async def start(bench: Bench) -> Row:
    outcomes = await bench.alternate(Plan(20, rate=20), 200, 5, OURS, USUAL, FLOOR)
    late = _median(outcomes, lambda outcome: percentile(outcome.first, 0.99) * 1e3)
    return Row("200 generations started together: p99 time to first token", _part(late, USUAL, 0.5), _cells(late, "ms"))


async def memory(bench: Bench) -> Row:
    tokens, idle = (500, 200) if bench.quick else (2000, 1000)
    grown: dict[str, float] = {}
    cells: dict[str, str] = {}
    for kind in bench.present(OURS, USUAL):
        name = kind.name
        async with bench.servers(kind) as (server,):
            with server.awake():
                session, connection = await _idle_costs(server, idle)
        async with bench.servers(kind) as (server,):
            grown[name] = (await bench.run(server, Plan(tokens, rate=100), 100)).peak
            cells[name] = f"{grown[name]:.0f} MB; connection {connection:.0f} kB, session {session:.1f} kB"
            if kind is OURS:
                ours = [
                    _at_most("growth", grown[name], 40, "MB"),
                    _at_most("idle connection", connection, 60, "kB"),
                    _at_most("session", session, 8, "kB"),
                ]
    return Row(f"100 streams × {tokens} tokens at 100/s: memory", ours, cells)


async def _idle_costs(server: Server, count: int) -> tuple[float, float]:
    """kB of a session without a connection, and of an open connection with its session."""
    before = server.memory()
    for _ in range(count):
        await clients.create_session(server.port)
    between = server.memory()
    opened = await load.open_clients(server, count)
    after = server.memory()
    for client in opened:
        client.close()
    return (between - before) / count * 1024, (after - between) / count * 1024


async def cancel(bench: Bench) -> Row:
    late: dict[str, float] = {}
    async with bench.servers(OURS, USUAL) as running:
        for server in running:
            with server.awake():
                delays = await _cancel_delays(server, bench.upstream_port)
            late[server.kind.name] = percentile(delays, 0.99) * 1e3
    ratio = _at_most("p99", late[OURS.name], 50, "ms")
    return Row("cancel with 100 streams running: until the upstream is closed, p99", [ratio], _cells(late, "ms"))


async def _cancel_delays(server: Server, upstream_port: int) -> list[float]:
    """Seconds; infinite where the upstream was still open a second after the last cancel, or closed before its own."""
    opened = {load.next_number(): client for client in await load.open_clients(server, 100)}
    for number, client in opened.items():
        client.start(number, Plan(100_000, rate=20))
    await asyncio.sleep(3)
    asked = {}
    for number, client in opened.items():
        asked[number] = time.monotonic()
        client.call("cancel", {})  # type: ignore[attr-defined]
        await asyncio.sleep(0.01)
    await asyncio.sleep(1)
    closed = json.loads(await clients.request(upstream_port, "GET", "/closed"))
    for client in opened.values():
        client.close()
    delays = [closed.get(str(number), math.inf) / 1e6 - at for number, at in asked.items()]
    return [delay if delay >= 0 else math.inf for delay in delays]


async def startup(bench: Bench) -> Row:
    started: dict[str, list[float]] = {}
    for _ in range(1 if bench.quick else 3):
        for kind in bench.present(OURS, USUAL):
            async with bench.servers(kind) as (server,):
                started.setdefault(kind.name, []).append(server.start_seconds)
    seconds = {name: statistics.median(several) for name, several in started.items()}
    library = _import_seconds("langchain_openai")
    cells = _cells(seconds, "s") | {OURS.name: f"{seconds[OURS.name]:.2f} s, the library alone {library:.2f} s"}
    ratios = [_at_most("more than `import langchain_openai`:", seconds[OURS.name] - library, 0.7, "s")]
    if find_spec("inference_trio.client"):
        ratios.append(_at_most("`import inference_trio.client`", _import_seconds("inference_trio.client"), 0.4, "s"))
    return Row("start to ready", ratios, cells)


def _import_seconds(module: str) -> float:
    def once() -> float:
        began = time.monotonic()
        with servers.running([sys.executable, "-c", f"import {module}"], SERVER_CORES) as process:
            process.wait()
        return time.monotonic() - began

    return statistics.median(once() for _ in range(3))


async def workers_at_once(bench: Bench) -> Row:
    return await _workers(bench, "50 streams × 2000 tokens, all at once", Plan(2000), 50)


async def workers_paced(bench: Bench) -> Row:
    return await _workers(bench, "100 streams × 20 tokens/s", Plan(100 if bench.quick else 200, rate=20), 100)


async def _workers(bench: Bench, what: str, plan: Plan, count: int) -> Row:
    title = f"2 workers with Redis, {what}: CPU per token, of the workers + of Redis"
    if not workers.can_be_measured():
        return Row(title, ["not measured: no Redis"], {})
    memory, one, two = await workers.measure(bench.upstream_port, plan, count, 1 if bench.quick or plan.rate else 3)
    more = one.busiest / two.busiest
    ratios = [f"**{more:.2f}** × what one can do, by the busiest worker's CPU (at least 1.7){_verdict(more >= 1.7)}"]
    return Row(title, ratios, {OURS.name: f"2 workers {two}, 1 worker {one}, 1 in memory {memory.workers:.3g} µs"})


ROWS: dict[str, Callable[[Bench], Awaitable[Row]]] = {
    "burst": burst,
    "paced": paced,
    "thousand": thousand,
    "start": start,
    "memory": memory,
    "cancel": cancel,
    "startup": startup,
    "workers": workers_at_once,
    "workers-paced": workers_paced,
}


# Growth, of our own server


async def growth_in_streams(bench: Bench) -> Curve:
    points = []
    for count in (1, 10, 100) if bench.quick else (1, 10, 100, 1000, 2000):
        outcome = await _alone(bench, Plan(40 if count > 100 else 25, rate=5), count)
        lag = percentile(outcome.lags, 0.99) * 1e3
        points.append((count, [outcome.cpu_per_token, outcome.peak * 1024 / count, lag]))
    return Curve("Streams of 5 tokens/s", "streams", ("µs/token", "kB/stream", "lag p99, ms"), points)


async def growth_in_tokens(bench: Bench) -> Curve:
    points = []
    for tokens in (10, 100, 1000, 10_000) if bench.quick else (10, 100, 1000, 10_000, 100_000):
        count = max(1, min(100, 100_000 // tokens))
        outcome = await _alone(bench, Plan(tokens), count)
        points.append((tokens, [outcome.cpu_per_token, outcome.peak * 1024 / count]))
    return Curve("Tokens in a stream, all at once", "tokens", ("µs/token", "kB/stream"), points)


async def growth_in_history(bench: Bench) -> Curve:
    points = []
    message = {"role": "user", "content": "A message of the length that people write. " * 3}
    async with bench.servers(OURS) as (server,):
        for count in (1, 10, 100, 1000, 2000):
            outcome = await bench.run(server, Plan(10), 20, history=[message] * (count - 1))
            points.append((count, [outcome.cpu / 20 * 1e3, outcome.cpu / 20 / count * 1e6]))
    return Curve("Messages in the history", "messages", ("ms/generation", "µs/message"), points)


async def growth_in_tools(bench: Bench) -> Curve:
    points = []
    parameters = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(5)}}
    async with bench.servers(OURS) as (server,):
        for count in (1, 10, 50, 200):
            tools = [{"name": f"tool_{i}", "description": "Does it", "parameters": parameters} for i in range(count)]
            outcome = await bench.run(server, Plan(10), 20, tools=tools)
            points.append((count, [outcome.cpu / 20 * 1e3, outcome.cpu / 20 / count * 1e6]))
    return Curve("Tools", "tools", ("ms/generation", "µs/tool"), points)


async def _alone(bench: Bench, plan: Plan, count: int) -> Outcome:
    async with bench.servers(OURS) as (server,):
        return await bench.run(server, plan, count)


CURVES: dict[str, Callable[[Bench], Awaitable[Curve]]] = {
    "streams": growth_in_streams,
    "tokens": growth_in_tokens,
    "history": growth_in_history,
    "tools": growth_in_tools,
}
