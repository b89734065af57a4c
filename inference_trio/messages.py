"""Between the chat format of OpenAI, LangChain's messages and what a provider really streams.

`Delta` is the one shape in which anything a model streams reaches the runner, whatever the provider.
"""

from __future__ import annotations

import attrs
from langchain_core.messages import AIMessageChunk

from .task import Usage


@attrs.frozen
class ToolCallDelta:
    """A piece of a tool call. An ``index`` of ``None`` and empty strings are what did not come."""

    index: int | None = None
    id: str = ""
    name: str = ""
    arguments: str = ""


@attrs.frozen
class Delta:
    """What one chunk of a model's stream says. It may say nothing: then it only shows that the stream lives.

    ``opaque`` is the chunk itself where it carries what the provider wants back in the next round and what has
    no field here (signatures, content blocks).
    """

    text: str = ""
    reasoning: str = ""
    reasoning_field: str = "reasoning_content"
    tool_calls: tuple[ToolCallDelta, ...] = ()
    finish_reason: str | None = None
    usage: Usage | None = None
    opaque: AIMessageChunk | None = None
