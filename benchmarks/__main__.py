"""``uv run python -m benchmarks``: measures, in under ten minutes, and writes ``docs/benchmarks.{md,svg}``."""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import time

from benchmarks import report, servers
from benchmarks.scenarios import CURVES, ROWS, Bench


def main() -> None:
    names = [*ROWS, *CURVES]
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="shorter and once: to try it out, not to quote")
    parser.add_argument(
        "--servers", nargs="+", choices=[kind.name for kind in servers.KINDS], help="only these and ours"
    )
    parser.add_argument("--write", action="store_true", help="write what was measured, although it is not all")
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=f"of {', '.join(names)}; all without one")
    options = parser.parse_args()
    if unknown := set(options.scenarios) - set(names):
        parser.error(f"no such scenario: {', '.join(sorted(unknown))}")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    os.sched_setaffinity(0, servers.OTHER_CORES)
    wanted = {servers.OURS.name, *(options.servers or (kind.name for kind in servers.KINDS))}
    kinds = tuple(kind for kind in servers.KINDS if kind.name in wanted and servers.install(kind))
    write = options.write or not (options.quick or options.scenarios or options.servers)
    asyncio.run(measure(kinds, options.scenarios or names, quick=options.quick, write=write))


async def measure(kinds: tuple[servers.Kind, ...], names: list[str], *, quick: bool, write: bool) -> None:
    """Measures these scenarios, shows the outcome, and writes it to ``docs/`` if asked."""
    began, port = time.monotonic(), servers.free_port()
    rows, curves = [], []
    with servers.upstream(port) as process:
        await servers.wait_until_ready(port, "/closed", process)
        bench = Bench(port, kinds, quick)
        for name in names:
            print(f"{name} ({time.monotonic() - began:.0f} s)", flush=True)
            if name in ROWS:
                rows.append(await ROWS[name](bench))
            else:
                curves.append(await CURVES[name](bench))
    text = report.markdown(rows, curves, kinds)
    print(f"\n{text}\n{time.monotonic() - began:.0f} s")
    if write:
        docs = servers.ROOT / "docs"
        docs.mkdir(exist_ok=True)
        (docs / "benchmarks.md").write_text(text, encoding="utf-8")
        (docs / "benchmarks.svg").write_text(report.svg(rows, kinds), encoding="utf-8")


if __name__ == "__main__":
    main()
