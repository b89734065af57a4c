"""Modules import upwards only, what decides knows no I/O, and no module is too long to be read at once."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import inference_trio

PACKAGE = Path(inference_trio.__file__).parent
PURE = (
    "errors",
    "variables",
    "settings",
    "access",
    "chat",
    "protocol",
    "jsonrpc",
    "openrpc",
    "task",
    "outbox",
    "report",
)
ORDER = (
    "__init__",
    "errors",
    "chat",
    "protocol",
    "jsonrpc",
    "openrpc",
    "variables",
    "settings",
    "access",
    "logs",
    "task",
    "outbox",
    "report",
    "deltas",
    "tool_calls",
    "messages",
    "bridge",
    "upstream_http",
    "sse",
    "upstream_errors",
    "chunks",
    "openai_model",
    "providers",
    "local_model",
    "model",
    "runner",
    "running",
    "session",
    "store",
    "connection",
    "browsers",
    "hypercorn_fixes",
    "playground",
    "server",
    "app",
    "__main__",
)
"""A module imports only from those above it."""

FOREIGN = ("trio", "quart", "quart_trio", "hypercorn", "langchain", "langchain_core", "langchain_openai", "openai")
LONGEST = 350


def modules() -> list[str]:
    return sorted(path.stem for path in PACKAGE.glob("*.py"))


def source(module: str) -> str:
    return (PACKAGE / f"{module}.py").read_text(encoding="utf-8")


def imports_of(module: str) -> Iterator[str]:
    """The package's own modules that this one imports, in functions too; a name of the package is ``__init__``."""
    for node in ast.walk(ast.parse(source(module))):
        if isinstance(node, ast.ImportFrom):
            path = ["inference_trio"] * (node.level == 1) + (node.module or "").split(".")
            path = [step for step in path if step]
            if path == ["inference_trio"]:
                yield from (name.name if name.name in modules() else "__init__" for name in node.names)
            elif path[0] == "inference_trio":
                yield path[1]
        elif isinstance(node, ast.Import):
            paths = [name.name.split(".") for name in node.names]
            yield from ([*path, "__init__"][1] for path in paths if path[0] == "inference_trio")


def test_every_module_has_its_place_in_the_order() -> None:
    assert modules() == sorted(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_from_those_above_it(module: str) -> None:
    above = set(ORDER[: ORDER.index(module)])
    assert set(imports_of(module)) <= above


def test_the_imports_are_seen_in_every_form() -> None:
    """Else the test above could not fail."""
    assert set(imports_of("openrpc")) == {"__init__", "errors", "chat", "protocol"}
    assert "server" in set(imports_of("__main__")), "an import within a function"


IMPORT_ONE = """
import importlib, sys
importlib.import_module(f"inference_trio.{sys.argv[1]}")
print(*sorted({name.partition(".")[0] for name in sys.modules} & set(sys.argv[2:])))
"""


def foreign_to(module: str) -> list[str]:
    """Which of the foreign packages a fresh process has loaded once this module is imported."""
    command = [sys.executable, "-c", IMPORT_ONE, module, *FOREIGN]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.split()


@pytest.mark.parametrize("module", PURE)
def test_what_decides_knows_neither_trio_nor_the_network_nor_langchain(module: str) -> None:
    assert foreign_to(module) == []


def test_a_foreign_import_would_be_seen() -> None:
    assert foreign_to("bridge") == ["trio"]


@pytest.mark.parametrize("module", ORDER)
def test_a_module_can_be_read_at_once(module: str) -> None:
    assert len(source(module).splitlines()) <= LONGEST
