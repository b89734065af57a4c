"""What a chat shows: as text on a terminal, plain in a pipe, or as lines of JSON."""

from __future__ import annotations

import re
import sys
from typing import Any, Protocol, TextIO

import attrs
from markdown_it import MarkdownIt
from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown
from rich.text import Text

from .client import (
    Disconnected,
    Draining,
    Event,
    InferenceError,
    ReasoningChunk,
    Result,
    Resumed,
    TextChunk,
    ToolCall,
    ToolResult,
)
from .client.wire import as_json

LONGEST_NOTICE = 300
"""Characters of a tool's arguments or result that are shown."""

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_NAMES = {
    TextChunk: "text",
    ReasoningChunk: "reasoning",
    ToolCall: "tool_call",
    ToolResult: "tool_result",
    Disconnected: "disconnected",
    Resumed: "resumed",
    Draining: "draining",
}
_CUT_SHORT = {
    "cancelled": "cancelled",
    "length": "cut short by the limit of tokens",
    "content_filter": "cut short by the provider's filter",
}


class Display(Protocol):
    """One generation after the other, each ending with `end` or `error`."""

    def show(self, event: Event) -> None: ...

    def end(self, result: Result) -> None: ...

    def error(self, error: InferenceError) -> None: ...


def harmless(text: str) -> str:
    """The text without what could steer a terminal."""
    return _CONTROLS.sub("", text)


def notice_of(event: Event) -> str | None:
    """A line on what is no text."""
    match event:
        case ToolCall():
            return _short(f"{event.name}({', '.join(f'{name}={value!r}' for name, value in event.arguments.items())})")
        case ToolResult(error=None):
            return _short(f"{event.name}: {_json(event.result)}")
        case ToolResult():
            return _short(f"{event.name} has failed: {event.error}")
        case Disconnected():
            return "the connection is lost, connecting again"
        case Resumed():
            return "connected again, with a gap" if event.gap else "connected again"
        case Draining():
            return f"the server stops in {event.deadline:.0f} s"
    return None


def _short(text: str) -> str:
    text = harmless(" ".join(text.split()))
    return text if len(text) <= LONGEST_NOTICE else f"{text[: LONGEST_NOTICE - 1]}…"


def _json(value: Any) -> str:
    return value if isinstance(value, str) else bytes(as_json(value)).decode()


@attrs.define
class Plain:
    """The text of the answers as it comes; everything else on standard error."""

    out: TextIO = attrs.field(factory=lambda: sys.stdout)
    notices: TextIO = attrs.field(factory=lambda: sys.stderr)
    _ends_with_newline: bool = True

    def show(self, event: Event) -> None:
        if isinstance(event, TextChunk):
            self.out.write(event.text)
            self.out.flush()
            self._ends_with_newline = event.text.endswith("\n")
        elif notice := notice_of(event):
            self._say(notice)

    def end(self, result: Result) -> None:
        self._end_line()
        if result.status in _CUT_SHORT:
            self._say(_CUT_SHORT[result.status])

    def error(self, error: InferenceError) -> None:
        self._end_line()
        self._say(f"{error.message} ({error.code})")

    def _end_line(self) -> None:
        if not self._ends_with_newline:
            self.out.write("\n")
            self.out.flush()
        self._ends_with_newline = True

    def _say(self, text: str) -> None:
        print(f"inference-trio: {text}", file=self.notices, flush=True)


@attrs.define
class JsonLines:
    """Everything that happens, one JSON object a line; `type` says what it is."""

    out: TextIO = attrs.field(factory=lambda: sys.stdout)

    def show(self, event: Event) -> None:
        fields = attrs.asdict(event, recurse=False, filter=lambda field, _: not field.name.startswith("_"))
        self._write(_NAMES[type(event)], fields)

    def end(self, result: Result) -> None:
        fields = attrs.asdict(result, recurse=False)
        if usage := result.usage:
            names = ("input_tokens", "output_tokens", "total_tokens")
            fields["usage"] = {name: getattr(usage, name) for name in names}
        self._write("end", fields)

    def error(self, error: InferenceError) -> None:
        self._write("error", {"code": error.code, "message": error.message, "data": error.data})

    def _write(self, kind: str, fields: dict[str, Any]) -> None:
        self.out.write(_json({"type": kind, **fields}) + "\n")
        self.out.flush()


class OnTerminal:
    """Markdown as it comes: finished blocks stand, the last one is drawn anew as it grows."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._live: Live | None = None
        self._block = ""
        self._is_reasoning = False

    def show(self, event: Event) -> None:
        if isinstance(event, ReasoningChunk):
            self._finish_block()
            self._console.print(Text(harmless(event.text), style="dim italic"), end="")
            self._is_reasoning = True
        elif isinstance(event, TextChunk):
            self._end_reasoning()
            self._add(harmless(event.text))
        elif notice := notice_of(event):
            self._say(notice, "yellow" if isinstance(event, ToolCall | ToolResult) else "dim")

    def end(self, result: Result) -> None:
        self._finish_block()
        said = [_CUT_SHORT[result.status]] if result.status in _CUT_SHORT else []
        if result.usage:
            said.append(f"{result.usage.input_tokens} tokens in, {result.usage.output_tokens} out")
        self._say(", ".join(said), "dim")

    def error(self, error: InferenceError) -> None:
        self._say(f"{error.message} ({error.code})", "red")

    def _say(self, text: str, style: str) -> None:
        self._finish_block()
        self._end_reasoning()
        if text:
            self._console.print(Text(harmless(text), style=style))

    def _add(self, text: str) -> None:
        if self._live is None:
            self._live = Live(console=self._console, transient=True, refresh_per_second=12)
            self._live.start()
        self._block += text
        size = finished(self._block)
        if size:
            self._live.console.print(_markdown(self._block[:size]))
            self._block = self._block[size:]
        self._live.update(_markdown(self._block))

    def _finish_block(self) -> None:
        if self._live:
            self._live.update(Text(""))
            self._live.stop()
            self._live = None
            self._console.print(_markdown(self._block))
            self._block = ""

    def _end_reasoning(self) -> None:
        if self._is_reasoning:
            self._console.print()
            self._is_reasoning = False


def _markdown(text: str) -> Markdown:
    """HTML shows as it is written: Rich would leave it out, and with it half of ``Vec<String>``."""
    markdown = Markdown(text, hyperlinks=False)
    markdown.parsed = MarkdownIt(options_update={"html": False}).enable(["strikethrough", "table"]).parse(text)
    return markdown


def finished(text: str) -> int:
    """How much of this Markdown nothing more is added to: up to the last empty line outside of code."""
    size = end = 0
    fence = ""
    for line in text.splitlines(keepends=True):
        size += len(line)
        mark = line.strip()[:3]
        if mark in ("```", "~~~") and fence in ("", mark):
            fence = "" if fence else mark
        elif not line.strip() and line.endswith("\n") and not fence:
            end = size
    return end
