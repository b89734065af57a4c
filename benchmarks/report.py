"""The table and the picture."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Sequence
from pathlib import Path

from benchmarks.scenarios import Curve, Row
from benchmarks.servers import Kind

_INTRODUCTION = """# Benchmarks

Made on {date} by `uv run python -m benchmarks`: {machine}, Python {python}. The server under test has one core to
itself (the two workers share it, which is why their CPU time is compared); the load and a mock of the provider, which
tells when it sent each token, share the others. All numbers are from one run. Streams all at once ran three times and
generations started together five times, the servers taking turns, everything else once; LiteLLM and LangServe always
once, and with two thirds of the tokens where those are paced, as have the others than ours of 1000 streams. Lag is that
of tokens sent after all streams had started. Every transcript was checked, token by token. CPU time is that of all the
server's processes, from the operating system.

![CPU per token](benchmarks.svg)

"""


def markdown(rows: Sequence[Row], curves: Sequence[Curve], kinds: Sequence[Kind]) -> str:
    text = _INTRODUCTION.format(
        date=datetime.datetime.now(datetime.UTC).date(), machine=_machine(), python=platform.python_version()
    )
    text += _table(["", "ratios, and what they must be", *(kind.title for kind in kinds)])
    for row in rows:
        cells = [row.cells.get(kind.name, "") for kind in kinds]
        text += _line([row.title, "; ".join(row.ratios), *cells])
    if curves:
        text += "\n## Growth\n\n" + _GROWTH
    for curve in curves:
        text += f"\n{curve.title}:\n\n" + _table([curve.size, *curve.values])
        for size, values in curve.points:
            text += _line([f"{size:,}", *(f"{value:,.3g}" if value < 1000 else f"{value:,.0f}" for value in values)])
    text += "\n## Versions\n\n"
    return text + "".join(f"- {kind.title}: {kind.versions()}\n" for kind in kinds)


_GROWTH = """\
Text that waits is merged, so a token costs less where there are more of them. Lag is that of a core with time to
spare as long as µs/token × tokens/s is less than a second; beyond that each round of the event loop takes as long as
all its streams together. The longest stream is a single one, whose `end` has the whole text twice.
"""


def _machine() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(models)} cores ({models[0]})" if models else platform.machine()


def _table(names: Sequence[str]) -> str:
    return _line(names) + _line(["---"] * len(names))


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |\n"


_BAR, _LEFT, _WIDTH, _RIGHT = 22, 240, 420, 100
_COLOURS = ("#0a7d5a", "#8a94a6")


def svg(rows: Sequence[Row], kinds: Sequence[Kind]) -> str:
    """Bars of CPU per token, a group for each row that has them."""
    parts, y = [], 10
    for row in (row for row in rows if row.numbers):
        parts.append(f'<text x="10" y="{y + 16}" font-weight="bold">{row.title}</text>')
        y += 28
        largest = max(row.numbers.values())
        for kind in (kind for kind in kinds if kind.name in row.numbers):
            value = row.numbers[kind.name]
            width = max(2, round(value / largest * _WIDTH))
            colour = _COLOURS[kind is not kinds[0]]
            parts.append(f'<text x="{_LEFT - 8}" y="{y + 15}" text-anchor="end">{kind.title}</text>')
            parts.append(f'<rect x="{_LEFT}" y="{y + 2}" width="{width}" height="{_BAR - 5}" rx="2" fill="{colour}"/>')
            parts.append(f'<text x="{_LEFT + width + 6}" y="{y + 15}">{value:.0f} µs</text>')
            y += _BAR
        y += 14
    width = _LEFT + _WIDTH + _RIGHT
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}" width="{width}" height="{y}" '
        'font-family="system-ui, sans-serif" font-size="13" fill="#222">\n'
        f'<title>CPU per token</title>\n<rect width="{width}" height="{y}" fill="#fff"/>\n'
    )
    return head + "\n".join(parts) + "\n</svg>\n"
