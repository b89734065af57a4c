"""What a chat shows of the events."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from inference_trio.client import (
    Disconnected,
    Draining,
    InferenceError,
    ReasoningChunk,
    Result,
    Resumed,
    TextChunk,
    ToolCall,
    ToolResult,
    Usage,
)
from inference_trio.display import LONGEST_NOTICE, OnTerminal, Plain, _markdown, finished, notice_of


def call(**arguments: Any) -> ToolCall:
    return ToolCall("c1", "look", arguments, 300.0, lambda result, error: None)


@pytest.mark.parametrize(
    ("text", "done"),
    [
        ("", ""),
        ("one", ""),
        ("one\n", ""),
        ("one\n\n", "one\n\n"),
        ("one\n\ntwo", "one\n\n"),
        ("one\n\ntwo\n\nthree", "one\n\ntwo\n\n"),
        ("```\ncode\n\nmore", ""),
        ("```\ncode\n\nmore\n```\n\nrest", "```\ncode\n\nmore\n```\n\n"),
        ("```\n~~~\n\nmore", ""),
        ("one\n \ntwo", "one\n \n"),
        ("one\n ", ""),
    ],
)
def test_markdown_is_finished_up_to_the_last_empty_line_outside_of_code(text: str, done: str) -> None:
    assert text[: finished(text)] == done


@pytest.mark.parametrize(
    ("event", "said"),
    [
        (call(at="sea", deep=True), "look(at='sea', deep=True)"),
        (ToolResult("c1", "look", result={"saw": "é"}), 'look: {"saw":"é"}'),
        (ToolResult("c1", "look", error="no\nsea\x1b[2J"), "look has failed: no sea[2J"),
        (Disconnected(), "the connection is lost, connecting again"),
        (Resumed(gap=False), "connected again"),
        (Resumed(gap=True), "connected again, with a gap"),
        (Draining(30.0), "the server stops in 30 s"),
        (TextChunk("x"), None),
    ],
)
def test_what_is_no_text_is_a_line(event: Any, said: str | None) -> None:
    assert notice_of(event) == said


def test_a_long_line_is_cut() -> None:
    said = notice_of(call(at="x" * 1000))
    assert said is not None
    assert len(said) == LONGEST_NOTICE
    assert said.endswith("…")


def test_plain_text_goes_out_as_it_comes_and_all_else_beside_it() -> None:
    out, notices = io.StringIO(), io.StringIO()
    display = Plain(out, notices)
    for event in [ReasoningChunk("Hm"), TextChunk("Hel\x1b"), call(at="sea"), TextChunk("lo")]:
        display.show(event)
    display.end(Result("Hello", "length"))
    display.show(TextChunk("a\n"))
    display.end(Result("a\n", "completed"))
    assert out.getvalue() == "Hel\x1blo\na\n"
    assert notices.getvalue().splitlines() == [
        "inference-trio: look(at='sea')",
        "inference-trio: cut short by the limit of tokens",
    ]


def on_terminal(*events: Any, end: Result | InferenceError) -> str:
    """All that is left on the terminal, without its colours."""
    console = Console(file=io.StringIO(), width=60, record=True, force_terminal=False)
    display = OnTerminal(console)
    for event in events:
        display.show(event)
    if isinstance(end, Result):
        display.end(end)
    else:
        display.error(end)
    return "\n".join(line.rstrip() for line in console.export_text().splitlines() if line.strip())


def test_markdown_is_shown_block_by_block_with_the_usage_under_it() -> None:
    pieces = [TextChunk(piece) for piece in ("# Ti", "tle\n\nSome **bo", "ld** text\n\n- one\n- two\n")]
    shown = on_terminal(ReasoningChunk("Hm"), *pieces, end=Result("", "completed", usage=Usage(7, 3, 10)))
    assert "**" not in shown
    assert [line.strip(" ┃│•") for line in shown.splitlines() if line.strip(" ┏━┓┗┛┃")] == [
        "Hm",
        "Title",
        "Some bold text",
        "one",
        "two",
        "7 tokens in, 3 out",
    ]


def test_an_error_stands_under_what_came_before_it() -> None:
    shown = on_terminal(TextChunk("Hel"), end=InferenceError("it broke", -32006))
    assert shown.splitlines() == ["Hel", "it broke (-32006)"]


def test_no_markup_of_the_terminal_is_taken_from_a_model() -> None:
    shown = on_terminal(call(at="[red]x[/red]"), TextChunk("[bold]y[/bold] \x1b[31mz"), end=Result("", "completed"))
    assert "[red]x[/red]" in shown
    assert "[bold]y[/bold] [31mz" in shown


def test_html_in_an_answer_is_shown_as_it_is_written() -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(_markdown("use Vec<String> or <your-key> **here**\n\n<div>x</div>"))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "use Vec<String> or <your-key> here" in shown
    assert "<div>x</div>" in shown
