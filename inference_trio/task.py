"""One generation as a table-driven state machine (types first)."""

from __future__ import annotations

from typing import Any

import attrs


@attrs.frozen
class Usage:
    """Tokens as the provider counted them."""

    input_tokens: int
    output_tokens: int
    total_tokens: int

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            self.total_tokens + other.total_tokens,
        )


@attrs.frozen
class ToolCall:
    """A complete tool call of the model.

    ``parameters`` are its arguments as a JSON object. Where ``problem`` is not ``None`` the arguments were
    not one; ``parameters`` is empty then and the problem, one sentence, is what the model is told.
    """

    id: str
    name: str
    parameters: dict[str, Any]
    problem: str | None = None


# Events: facts, told by whoever saw them happen.


@attrs.frozen
class TextReceived:
    text: str


@attrs.frozen
class ReasoningReceived:
    """``field`` is the name under which the provider sent it (``reasoning_content`` or ``reasoning``)."""

    text: str
    field: str = "reasoning_content"


@attrs.frozen
class RoundFinished:
    """The model's message is complete and calls no tool (or was cut off before its calls were complete)."""

    finish_reason: str
    usage: Usage | None = None


@attrs.frozen
class ToolCallsRequested:
    """The model's message is complete and calls tools."""

    calls: tuple[ToolCall, ...]
    finish_reason: str
    usage: Usage | None = None
