"""What a generation tells while it runs, and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import attrs
import trio

from ..protocol import Usage

JsonObject: TypeAlias = dict[str, Any]


@attrs.frozen
class TextChunk:
    """Text of the answer, as it comes."""

    text: str


@attrs.frozen
class ReasoningChunk:
    """Reasoning, of models that show it."""

    text: str


@attrs.frozen
class ToolCall:
    """The model calls a tool. One that is a function is being run already; any other is to be answered.

    Attributes:
        arguments: as the model gave them, not converted
        timeout: seconds until the server no longer waits and the generation fails
    """

    id: str
    name: str
    arguments: JsonObject
    timeout: float
    _answer: Callable[[Any, str | None], None] = attrs.field(repr=False, eq=False)

    async def reply(self, result: Any) -> None:
        """Gives the result: text goes to the model as it is, anything else as JSON.

        The first answer counts, also before that of the function; one that comes after the end is dropped.
        Raises TypeError for what cannot be written as JSON.
        """
        self._answer(result, None)
        await trio.lowlevel.checkpoint()

    async def fail(self, message: str) -> None:
        """Tells the model that the call has failed, and why."""
        self._answer(None, message)
        await trio.lowlevel.checkpoint()


@attrs.frozen
class ToolResult:
    """A call was answered: with a `result`, or with an `error` where it has failed."""

    id: str
    name: str
    result: Any = None
    error: str | None = None


@attrs.frozen
class Disconnected:
    """The connection is lost. It is made anew; the generation goes on meanwhile."""


@attrs.frozen
class Resumed:
    """There is a connection again. With a `gap` some events are lost; the result is whole all the same."""

    gap: bool


@attrs.frozen
class Draining:
    """The server stops: what has not ended in so many seconds is cancelled."""

    deadline: float


Event: TypeAlias = TextChunk | ReasoningChunk | ToolCall | ToolResult | Disconnected | Resumed | Draining


@attrs.frozen
class Result:
    """What a generation gave. As a string it is its text.

    Attributes:
        task_id: the server's id; None where it was cancelled before the server had it
        status: how it ended
        finish_reason: the provider's own word
        usage: tokens over all rounds; None where the provider did not say
        messages: what it adds to the history, valid to be sent back as it is
    """

    final_text: str
    status: Literal["completed", "cancelled", "length", "content_filter"]
    task_id: str | None = None
    finish_reason: str | None = None
    usage: Usage | None = None
    messages: Sequence[JsonObject] = ()

    def __str__(self) -> str:
        return self.final_text
