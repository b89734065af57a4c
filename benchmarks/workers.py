"""Several workers on one Redis: how much more they can do than one, and what Redis costs for each token.

Workers, Redis, the load and the mock have to share the cores of this machine, so the time that all takes says little
of workers that have a core each. What is compared is the CPU time of the busiest worker for the same streams: where a
worker is bound by its core, that is the time it needs.
"""

from __future__ import annotations

import asyncio
import shutil
import statistics
import tempfile
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from importlib.util import find_spec

from benchmarks import load, servers
from benchmarks.plan import Plan
from benchmarks.servers import OTHER_CORES, OURS, Server


@dataclass
class Costs:
    """µs of CPU per token: of the busiest worker, of all workers, and of Redis. Infinite where a stream was wrong."""

    busiest: float
    workers: float
    redis: float

    def __str__(self) -> str:
        return f"{self.workers:.3g} + {self.redis:.2g} µs"


def can_be_measured() -> bool:
    if shutil.which("redis-server") and find_spec("coredis"):
        return True
    print("!!! WORKERS ARE LEFT OUT: `redis-server` or the package `coredis` is not installed", flush=True)
    return False


async def measure(upstream_port: int, plan: Plan, count: int, repeats: int) -> tuple[Costs, Costs, Costs]:
    """One worker in memory, one with Redis, two with Redis; each has the median of its runs."""
    async with _redis() as (url, pid):
        memory = await _costs(upstream_port, ["memory://"], plan, count, repeats, pid)
        one = await _costs(upstream_port, [url], plan, count, repeats, pid)
        two = await _costs(upstream_port, [url, url], plan, count, repeats, pid)
    return memory, one, two


@asynccontextmanager
async def _redis() -> AsyncIterator[tuple[str, int]]:
    """Its URL and the id of its process."""
    port = servers.free_port()
    with tempfile.TemporaryDirectory() as folder:
        command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", folder, "--save", ""]
        with servers.running([*command, "--appendonly", "yes", "--appendfsync", "no"], OTHER_CORES) as process:
            await _wait_until_open(port)
            yield f"redis://127.0.0.1:{port}/0", process.pid


async def _wait_until_open(port: int) -> None:
    async with asyncio.timeout(20):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.02)
            else:
                writer.close()
                return


async def _costs(upstream_port: int, stores: list[str], plan: Plan, count: int, repeats: int, redis_pid: int) -> Costs:
    """``count`` streams spread evenly over one worker for each of ``stores``."""
    with ExitStack() as stack:
        workers: list[Server] = []
        for store in stores:
            worker = stack.enter_context(servers.server(OURS, upstream_port, INFERENCE_STORE=store))
            await servers.wait_until_ready(worker.port, OURS.ready, worker.process)
            await load.run(worker, Plan(20), 10)
            workers.append(worker)
        runs = [await _once(workers, plan, count, redis_pid) for _ in range(repeats)]
    costs = Costs(*(statistics.median(values) for values in zip(*runs, strict=True)))
    print(
        f"  {len(stores)} × {stores[0].partition(':')[0]}: {costs}/token, busiest worker {costs.busiest:.3g}",
        flush=True,
    )
    return costs


async def _once(workers: list[Server], plan: Plan, count: int, redis_pid: int) -> tuple[float, float, float]:
    share, before = count // len(workers), servers.cpu_of(redis_pid)
    outcomes = await asyncio.gather(*(load.run(worker, plan, share) for worker in workers))
    redis = servers.cpu_of(redis_pid) - before
    if any(outcome.errors for outcome in outcomes):
        print(f"  WRONG: {[outcome.errors[:1] for outcome in outcomes]}", flush=True)
        return (float("inf"),) * 3
    cpu, tokens = [outcome.cpu for outcome in outcomes], sum(outcome.tokens for outcome in outcomes)
    return max(cpu) / tokens * 1e6, sum(cpu) / tokens * 1e6, redis / tokens * 1e6
