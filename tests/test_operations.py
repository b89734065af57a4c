"""The page for whoever runs the server names every setting, every metric and every line of the log."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from inference_trio.metrics import Metrics
from inference_trio.report import Census
from inference_trio.settings import Settings

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "operations.md").read_text()


def rows(section: str) -> str:
    """The first columns of the tables in a section."""
    text = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return "\n".join(re.findall(r"^\| (`.*?) \| ", text, re.MULTILINE))


def test_every_setting_says_when_to_change_it() -> None:
    assert {variable.name for variable in Settings.variables().values()} <= set(re.findall("[A-Z_]+", rows("Settings")))


def metrics() -> Iterator[str]:
    census = Census(sessions=0, connections=0, tasks={}, outbox_bytes=0, held_bytes=0)
    for family in Metrics(lambda: census).registry.collect():
        yield family.name + "_total" * (family.type == "counter")


def test_the_metrics_that_are_explained_are_those_there_are() -> None:
    assert set(re.findall("`([a-z_]+)", rows("Metrics"))) == set(metrics())


def log_lines() -> Iterator[str]:
    """The constant parts of what the modules give to their loggers."""
    for path in (ROOT / "inference_trio").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("logger."):
                text = node.args[0]
                assert isinstance(text, ast.Constant)
                yield from (part.strip() for part in re.split("%[0-9.]*[sdf]", text.value))


@pytest.mark.parametrize("part", sorted({part for part in log_lines() if len(part) > 8}))
def test_every_line_of_the_log_is_explained(part: str) -> None:
    assert part in rows("Log lines")


@pytest.mark.parametrize("page", ["README.md", "docs/operations.md", "docs/protocol.md"])
def test_what_a_page_links_to_is_there(page: str) -> None:
    text = (ROOT / page).read_text()
    targets = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text)
    assert targets
    assert [target for target in targets if not ((ROOT / page).parent / target).exists()] == []
