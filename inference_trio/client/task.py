"""One generation as the client knows it: what it asks for, what has come and was not read yet, how it ended."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import attrs
import msgspec

from .errors import InferenceError
from .events import Event, JsonObject, ReasoningChunk, Result, TextChunk, ToolCall


@attrs.frozen
class _Text:
    """Text that nobody has read yet; what follows is added to it, so that it costs little when nobody reads."""

    kind: type[TextChunk | ReasoningChunk]
    pieces: list[str]

    def read(self) -> Event:
        return self.kind("".join(self.pieces))


@attrs.define(eq=False)
class Task:
    """`changed` is called when there is something to read, or the end; `called` when a tool is to be run.

    `calls` has the tool calls that the server waits for, as far as is known here, with the answers that it has not
    confirmed.
    """

    params: msgspec.Raw
    changed: Callable[[], None]
    called: Callable[[ToolCall], None]
    id: str | None = None
    is_asked: bool = False
    """Whether the request went out, on this connection or on one whose fate is not yet settled."""
    is_cancelled: bool = False
    calls: dict[str, JsonObject | None] = attrs.field(factory=dict)
    result: Result | None = None
    error: InferenceError | None = None
    _text: list[str] = attrs.field(factory=list)
    _events: deque[Event | _Text] = attrs.field(factory=deque)

    @property
    def is_over(self) -> bool:
        return self.result is not None or self.error is not None

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._text)

    def next_event(self) -> Event | None:
        """What has come and was not read yet, in order."""
        if not self._events:
            return None
        event = self._events.popleft()
        return event.read() if isinstance(event, _Text) else event

    def emit(self, event: Event) -> None:
        if self.is_over:
            return
        if isinstance(event, TextChunk):
            self._text.append(event.text)
        if isinstance(event, TextChunk | ReasoningChunk):
            self._append(type(event), event.text)
        else:
            self._events.append(event)
        self.changed()

    def _append(self, kind: type[TextChunk | ReasoningChunk], text: str) -> None:
        last = self._events[-1] if self._events else None
        if isinstance(last, _Text) and last.kind is kind:
            last.pieces.append(text)
        else:
            self._events.append(_Text(kind, [text]))

    def finish(self, result: Result) -> None:
        if not self.is_over:
            self.result = result
            self.changed()

    def leave(self) -> None:
        """Ends it here, with the text so far; the server is still to be told, or has yet to confirm it."""
        messages = [{"role": "assistant", "content": self.text}] if self._text else []
        self.finish(Result(self.text, "cancelled", self.id, messages=messages))

    def fail(self, error: InferenceError) -> None:
        if not self.is_over:
            if self._text:
                error.data.setdefault("partial_text", self.text)
            self.error = error
            self.changed()
