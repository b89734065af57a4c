"""The protocol's page names everything that the types have."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from inference_trio import errors, protocol
from inference_trio.jsonrpc import MAX_BATCH, MAX_CONTAINERS, MAX_DEPTH

PAGE = (Path(__file__).parent.parent / "docs" / "protocol.md").read_text()
CODE = set(re.findall(r"`([^`]+)`", PAGE))
NAMED = {word for code in CODE for word in re.findall(r"[a-z_.]+", code)}

TYPES = [
    *protocol.METHODS.values(),
    *protocol.NOTIFICATIONS,
    protocol.ResultOfTool,
    protocol.CreateSession,
    protocol.Created,
    protocol.NewTicket,
    protocol.Usage,
    protocol.TaskStatus,
    protocol.Started,
    protocol.Accepted,
    protocol.Cancelled,
]


@pytest.mark.parametrize("kind", TYPES)
def test_every_field_is_named(kind: type) -> None:
    assert set(kind.__struct_fields__) <= NAMED  # type: ignore[attr-defined]


def test_every_method_and_notification_is_named() -> None:
    assert {*protocol.METHODS, *(kind.method for kind in protocol.NOTIFICATIONS)} <= NAMED


def test_every_error_code_has_its_line() -> None:
    lines = {int(code) for code in re.findall(r"^\| (-\d+) \|", PAGE, re.MULTILINE)}
    assert lines == {kind.code for kind in errors.InferenceError.__subclasses__()}


def test_the_limits_are_those_of_the_code() -> None:
    assert f"more than {MAX_DEPTH} deep" in PAGE
    assert f"more than {MAX_CONTAINERS:,} arrays and objects" in PAGE
    assert f"at most {MAX_BATCH}" in PAGE
