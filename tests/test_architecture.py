"""Modules import upwards only, what decides knows no I/O, and no module is too long to be read at once."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
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
    "client.errors",
    "client.events",
    "client.wire",
    "client.schemas",
    "client.tools",
    "client.task",
    "client.conversation",
    "client.transport",
    "client.generation",
    "client.session",
    "client",
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
    "redis_scripts",
    "redis_link",
    "redis_delivery",
    "redis_worker",
    "redis_producer",
    "redis_limits",
    "redis_calls",
    "redis_session",
    "redis_store",
    "connection",
    "stores",
    "browsers",
    "arriving",
    "hypercorn_streams",
    "hypercorn_fixes",
    "metrics",
    "spans",
    "tracing",
    "process",
    "playground",
    "server",
    "app",
    "serving",
    "workers",
    "own_server",
    "display",
    "terminal",
    "__main__",
)
"""A module imports only from those above it."""

FOREIGN = (
    "trio",
    "quart",
    "quart_trio",
    "hypercorn",
    "langchain",
    "langchain_core",
    "langchain_openai",
    "openai",
    "prometheus_client",
    "opentelemetry",
)
LONGEST = 350


@cache
def modules() -> list[str]:
    """By their names within the package; of packages in it, the name stands for their ``__init__``."""
    paths = (path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py"))
    return sorted(".".join(path.parts).removesuffix(".__init__") for path in paths)


def source(module: str) -> str:
    path = PACKAGE.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return file.read_text(encoding="utf-8")


def imports_of(module: str) -> Iterator[str]:
    """The package's own modules that this one imports, in functions too; a name of the package is ``__init__``."""
    home = ["inference_trio", *module.split(".")]
    if not PACKAGE.joinpath(*home[1:]).is_dir():
        home.pop()
    for node in ast.walk(ast.parse(source(module))):
        if isinstance(node, ast.ImportFrom):
            base = home[: len(home) + 1 - node.level] if node.level else []
            path = [*base, *(node.module or "").split(".")]
            for name in node.names:
                yield from named([step for step in [*path, name.name] if step])
        elif isinstance(node, ast.Import):
            for name in node.names:
                yield from named(name.name.split("."))


def named(path: list[str]) -> Iterator[str]:
    """The module that this path leads to, perhaps by way of a name in it."""
    if path[0] == "inference_trio":
        inner = path[1:]
        while inner and ".".join(inner) not in modules():
            inner.pop()
        yield ".".join(inner) or "__init__"


def test_every_module_has_its_place_in_the_order() -> None:
    assert modules() == sorted(ORDER)


def test_a_module_imports_only_from_those_above_it() -> None:
    wrong = {module: set(imports_of(module)) - set(ORDER[:place]) for place, module in enumerate(ORDER)}
    assert {module: names for module, names in wrong.items() if names} == {}


def test_the_imports_are_seen_in_every_form() -> None:
    """Else the test above could not fail."""
    assert set(imports_of("openrpc")) == {"__init__", "errors", "chat", "protocol"}
    assert "serving" in set(imports_of("__main__")), "an import within a function"
    assert {"protocol", "client.task"} <= set(imports_of("client.conversation"))
    assert "client.errors" in set(imports_of("client"))


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


@pytest.mark.parametrize("module", ["client", "terminal"])
def test_the_client_and_the_chat_are_light(module: str) -> None:
    assert foreign_to(module) == ["trio"]


def test_what_a_command_needs_is_imported_when_it_runs() -> None:
    assert foreign_to("__main__") == []


def test_a_module_can_be_read_at_once() -> None:
    lengths = {module: len(source(module).splitlines()) for module in ORDER}
    assert {module: length for module, length in lengths.items() if length > LONGEST} == {}
