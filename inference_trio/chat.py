"""Tools and chat messages, in the format of OpenAI's chat completions.

These types check; they do not carry. A message goes upstream as it came, with fields that are not named here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import jsonschema_rs
from msgspec import Meta, Struct

ToolName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}$(?!\n)")]
NonEmpty = Annotated[str, Meta(min_length=1)]
JsonObject = dict[str, Any]


class Params(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Parameters of a method. An optional field may be left out or be ``null``."""


# Tools


class Function(Params, frozen=True):
    """A function as OpenAI's chat completions describe it."""

    name: ToolName
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class Tool(Params, frozen=True):
    """A tool, flat or in OpenAI's form, where the fields stand under ``function``."""

    type: Literal["function"] | None = None
    function: Function | None = None
    name: ToolName | None = None
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None

    def __post_init__(self) -> None:
        flat = (self.name, self.description, self.parameters, self.strict)
        if (self.function is None) == (self.name is None):
            raise ValueError('Expected either `name` or {"type": "function", "function": {…}}')
        if self.function and any(field is not None for field in flat):
            raise ValueError("Expected all fields of the tool within `function`")
        _check_schema(self.definition.parameters)

    @property
    def definition(self) -> Function:
        """What the tool is, whichever form it came in."""
        return self.function or Function(
            name=self.name or "",
            description=self.description,
            parameters=self.parameters,
            strict=self.strict,
        )

    def to_openai(self) -> JsonObject:
        """The tool in OpenAI's form. One without parameters takes none."""
        definition = self.definition
        function: JsonObject = {
            "name": definition.name,
            "description": definition.description,
            "parameters": definition.parameters or {"type": "object", "properties": {}},
            "strict": definition.strict,
        }
        return {"type": "function", "function": {k: v for k, v in function.items() if v is not None}}


DIALECTS = (
    "https://json-schema.org/draft/2020-12/schema",
    "https://json-schema.org/draft/2019-09/schema",
    "http://json-schema.org/draft-07/schema",
    "http://json-schema.org/draft-06/schema",
    "http://json-schema.org/draft-04/schema",
)


def _check_schema(schema: JsonObject | None) -> None:
    if schema is None:
        return
    known = str(schema.get("$schema")).removesuffix("#") in DIALECTS
    # The validator would fetch a dialect it does not know from the network: such a name is passed over.
    checked = schema if known else {name: value for name, value in schema.items() if name != "$schema"}
    try:
        jsonschema_rs.meta.validate(checked)
    except jsonschema_rs.ValidationError as error:
        path = ".".join(str(step) for step in ("parameters", *error.instance_path))
        raise ValueError(f"Expected a JSON Schema, but in `{path}` {error.message}") from error
    if schema.get("type", "object") != "object":
        raise ValueError('Expected a JSON Schema of `"type": "object"` in `parameters`')


def check_tools(tools: Sequence[Tool] | None) -> None:
    """Raises ValueError where two tools have one name."""
    count = Counter(tool.definition.name for tool in tools or ())
    if twice := {name for name in count if count[name] > 1}:
        raise ValueError(f"Expected every tool to have a name of its own, but {sorted(twice)} stand twice in `tools`")


# Chat messages


class Part(Struct, frozen=True, tag_field="type"):
    """A part of a message's content."""


class TextPart(Part, frozen=True, tag="text"):
    text: str


class RefusalPart(Part, frozen=True, tag="refusal"):
    refusal: str


class ImageUrl(Struct, frozen=True):
    url: NonEmpty


class ImagePart(Part, frozen=True, tag="image_url"):
    image_url: ImageUrl


class Audio(Struct, frozen=True):
    data: NonEmpty
    format: NonEmpty


class AudioPart(Part, frozen=True, tag="input_audio"):
    input_audio: Audio


class FilePart(Part, frozen=True, tag="file"):
    file: JsonObject


Content = str | list[TextPart | ImagePart | AudioPart | FilePart | RefusalPart]


class FunctionOfCall(Struct, frozen=True):
    name: NonEmpty
    arguments: str


class ToolCallOfMessage(Struct, frozen=True):
    id: NonEmpty
    function: FunctionOfCall
    type: Literal["function"] = "function"


class ChatMessage(Struct, frozen=True, tag_field="role"):
    """A message of the conversation."""


class SystemMessage(ChatMessage, frozen=True, tag="system"):
    content: Content
    name: str | None = None


class DeveloperMessage(ChatMessage, frozen=True, tag="developer"):
    content: Content
    name: str | None = None


class UserMessage(ChatMessage, frozen=True, tag="user"):
    content: Content
    name: str | None = None


class AssistantMessage(ChatMessage, frozen=True, tag="assistant"):
    content: Content | None = None
    tool_calls: list[ToolCallOfMessage] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    name: str | None = None


class ToolMessage(ChatMessage, frozen=True, tag="tool"):
    tool_call_id: NonEmpty
    content: Content


Message = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage
