"""Tools and messages are checked, each mistake is named by its path, and what is valid goes on as it came."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from inference_trio.chat import DIALECTS, Tool
from inference_trio.errors import InvalidParamsError
from inference_trio.jsonrpc import Call, Invalid, convert, decode
from inference_trio.protocol import CreateSession, Generate

OBJECT = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
BARE = {"type": "object", "properties": {}}
TOOL_CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}


def generate(**params: Any) -> Call | Invalid:
    frame = decode(json.dumps({"jsonrpc": "2.0", "id": 1, "method": "generate", "params": params}))
    return frame.items[0]


def refusal(**params: Any) -> str:
    """The message with which `generate` is refused."""
    item = generate(**params)
    assert isinstance(item, Invalid), "was not refused"
    assert item.error.code == -32602
    return item.error.message


def refusal_of_tool(tool: Any) -> str:
    message = refusal(message="Hi", tools=[{"name": "first"}, tool])
    with pytest.raises(InvalidParamsError) as caught:
        convert({"tools": [{"name": "first"}, tool]}, CreateSession, "params")
    assert caught.value.message == message, "generate and create_session check tools alike"
    return message


def accepted_tool(tool: dict[str, Any]) -> Tool:
    item = generate(message="Hi", tools=[tool])
    assert isinstance(item, Call), item
    assert isinstance(item.params, Generate)
    assert item.params.tools
    return item.params.tools[0]


# Tools


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"name": "f"}, {"name": "f", "parameters": BARE}),
        ({"name": "f", "description": None, "parameters": None, "strict": None}, {"name": "f", "parameters": BARE}),
        ({"name": "f", "parameters": {}}, {"name": "f", "parameters": BARE}),
        ({"name": "f", "description": ""}, {"name": "f", "description": "", "parameters": BARE}),
        (
            {"name": "a-B_9", "description": "Weather", "parameters": OBJECT, "strict": False},
            {"name": "a-B_9", "description": "Weather", "parameters": OBJECT, "strict": False},
        ),
    ],
)
def test_both_forms_of_a_tool_mean_the_same(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    forms: list[dict[str, Any]] = [
        fields,
        {"type": "function", **fields},
        {"type": "function", "function": fields},
        {"function": fields},
        {"type": None, "function": fields, "name": None},
    ]
    assert [accepted_tool(form).to_openai() for form in forms] == [{"type": "function", "function": expected}] * 5


@pytest.mark.parametrize("name", ["a", "A" * 64, "0", "_", "-", "get_weather-2"])
def test_these_are_names_of_tools(name: str) -> None:
    assert accepted_tool({"name": name}).definition.name == name
    assert accepted_tool({"function": {"name": name}}).definition.name == name


@pytest.mark.parametrize("name", ["", "a" * 65, "a b", "a.b", "ä", "a\n", "\na", "a\n\n", "a\x00", "٣"])
def test_these_are_not(name: str) -> None:
    assert refusal_of_tool({"name": name}).endswith("- at `params.tools[1].name`")
    assert refusal_of_tool({"function": {"name": name}}).endswith("- at `params.tools[1].function.name`")


@pytest.mark.parametrize(
    ("tool", "path", "expected"),
    [
        ("f", "params.tools[1]", "Expected `object`"),
        ({}, "params.tools[1]", "either `name` or"),
        ({"type": "function"}, "params.tools[1]", "either `name` or"),
        ({"name": "f", "function": {"name": "f"}}, "params.tools[1]", "either `name` or"),
        ({"function": {"name": "f"}, "description": "d"}, "params.tools[1]", "within `function`"),
        ({"function": {"name": "f"}, "parameters": {}}, "params.tools[1]", "within `function`"),
        ({"function": {"name": "f"}, "strict": False}, "params.tools[1]", "within `function`"),
        ({"function": {}}, "params.tools[1].function", "required field `name`"),
        ({"function": "f"}, "params.tools[1].function", "Expected `object | null`"),
        ({"name": 5}, "params.tools[1].name", "Expected `str | null`"),
        ({"name": "f", "description": 5}, "params.tools[1].description", "Expected `str | null`"),
        ({"name": "f", "parameters": []}, "params.tools[1].parameters", "Expected `object | null`"),
        ({"name": "f", "parameters": "{}"}, "params.tools[1].parameters", "Expected `object | null`"),
        ({"name": "f", "strict": 1}, "params.tools[1].strict", "Expected `bool | null`"),
        ({"name": "f", "schema": {}}, "params.tools[1]", "unknown field `schema`"),
        ({"function": {"name": "f", "schema": {}}}, "params.tools[1].function", "unknown field `schema`"),
        ({"name": "f", "$schema": ""}, "params.tools[1]", "unknown field `$schema`"),
    ],
)
def test_a_tool_of_the_wrong_shape_is_refused(tool: Any, path: str, expected: str) -> None:
    message = refusal_of_tool(tool)
    assert message.endswith(f"- at `{path}`")
    assert expected in message


@pytest.mark.parametrize("kind", ["retrieval", "Function", ""])
def test_the_type_of_a_tool_can_only_be_function(kind: str) -> None:
    message = refusal_of_tool({"type": kind, "name": "f"})
    assert message.endswith("expected function - at `params.tools[1].type`")


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "objekt"}, 'in `parameters.type` "objekt" is not valid'),
        ({"properties": 5}, 'in `parameters.properties` 5 is not of type "object"'),
        ({"properties": {"city": {"type": "text"}}}, 'in `parameters.properties.city.type` "text" is not valid'),
        ({"properties": {"n": {"minLength": -1}}}, "in `parameters.properties.n.minLength` -1 is less than"),
        ({"allOf": [{}, {"required": "city"}]}, 'in `parameters.allOf.1.required` "city" is not of type "array"'),
        ({"required": ["a", "a"]}, "in `parameters.required`"),
        ({"$defs": {"x": {"$ref": 5}}}, "in `parameters.$defs.x.$ref` 5 is not of type"),
    ],
)
def test_what_is_no_json_schema_is_refused_with_the_path_in_it(schema: dict[str, Any], expected: str) -> None:
    for tool in ({"name": "f", "parameters": schema}, {"function": {"name": "f", "parameters": schema}}):
        message = refusal_of_tool(tool)
        assert message.startswith("Expected a JSON Schema, but ")
        assert expected in message
        assert message.endswith("- at `params.tools[1]`")


@pytest.mark.parametrize("kind", ["array", "string", ["object", "null"], None])
def test_parameters_are_an_object(kind: Any) -> None:
    assert refusal_of_tool({"name": "f", "parameters": {"type": kind}}).endswith("- at `params.tools[1]`")


@pytest.mark.parametrize("schema", [{"properties": {"a": {"$ref": "#/$defs/x"}}, "$defs": {"x": True}}, OBJECT])
def test_a_json_schema_goes_on_as_it_came(schema: dict[str, Any]) -> None:
    assert accepted_tool({"name": "f", "parameters": schema}).to_openai()["function"]["parameters"] == schema


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("end", ["", "#"])
def test_older_dialects_are_known(dialect: str, end: str) -> None:
    accepted_tool({"name": "f", "parameters": {"$schema": dialect + end, **OBJECT}})
    message = refusal_of_tool({"name": "f", "parameters": {"$schema": dialect + end, "type": "objekt"}})
    assert "in `parameters.type`" in message


def test_each_dialect_is_checked_by_its_own_rules() -> None:
    exclusive = {"type": "object", "properties": {"n": {"minimum": 1, "exclusiveMinimum": True}}}
    accepted_tool({"name": "f", "parameters": {"$schema": "http://json-schema.org/draft-04/schema#", **exclusive}})
    for newer in ({}, {"$schema": "http://json-schema.org/draft-07/schema#"}):
        message = refusal_of_tool({"name": "f", "parameters": {**newer, **exclusive}})
        assert "`parameters.properties.n.exclusiveMinimum`" in message


@pytest.mark.parametrize("dialect", ["https://example.invalid/x", "draft-07", "", 5, None, ["x"], {"x": 1}])
def test_a_dialect_that_is_not_known_is_passed_over(dialect: Any) -> None:
    schema = {"$schema": dialect, **OBJECT}
    assert accepted_tool({"name": "f", "parameters": schema}).to_openai()["function"]["parameters"] == schema
    assert "`parameters.type`" in refusal_of_tool({"name": "f", "parameters": {**schema, "type": "objekt"}})


DECODE_SCHEMAS = """
import json, sys
from inference_trio.jsonrpc import Call, decode
for schema in json.loads(sys.argv[1]):
    params = {"message": "Hi", "tools": [{"name": "f", "parameters": schema}]}
    (item,) = decode(json.dumps({"jsonrpc": "2.0", "id": 1, "method": "generate", "params": params})).items
    assert isinstance(item, Call), item
"""


def test_no_schema_makes_the_server_fetch_anything() -> None:
    """A process of its own: a validator that fetched would hold this one up for good."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        schemas = [
            {"$schema": f"{url}/dialect"},
            {"$id": f"{url}/id", "properties": {"x": {"$ref": f"{url}/ref"}}},
            {"properties": {"x": {"$schema": f"{url}/inner", "$id": f"{url}/id"}}},
            {"$schema": DIALECTS[0], "$defs": {"x": {"$schema": f"{url}/inner", "$id": f"{url}/id"}}},
            {"$schema": DIALECTS[0], "$vocabulary": {f"{url}/vocabulary": True}},
        ]
        subprocess.run([sys.executable, "-c", DECODE_SCHEMAS, json.dumps(schemas)], check=True, timeout=60)
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


@pytest.mark.parametrize("second", [{"name": "f"}, {"type": "function", "function": {"name": "f"}}])
def test_a_name_may_be_given_to_one_tool_only(second: dict[str, Any]) -> None:
    tools = [{"name": "g"}, {"name": "f", "description": "one"}, second]
    assert refusal(message="Hi", tools=tools) == (
        "Expected every tool to have a name of its own, but ['f'] stand twice in `tools` - at `params`"
    )
    with pytest.raises(InvalidParamsError, match=r"\['f'\] stand twice in `tools` - at `body`"):
        convert({"tools": tools}, CreateSession, "body")


# Messages

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief"},
    {"role": "system", "content": [{"type": "text", "text": "Be brief"}], "name": "operator"},
    {"role": "developer", "content": "Be brief", "name": None},
    {"role": "user", "content": ""},
    {"role": "user", "content": [], "name": "ann"},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": ""},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA==", "detail": "low"}},
            {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}},
            {"type": "file", "file": {"file_id": "file-1"}},
            {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,AA=="}},
        ],
    },
    {"role": "assistant", "content": "Hello"},
    {"role": "assistant", "content": [{"type": "text", "text": "No"}, {"type": "refusal", "refusal": "I won't"}]},
    {"role": "assistant", "content": None, "tool_calls": [TOOL_CALL]},
    {"role": "assistant", "tool_calls": [{"id": "c1", "function": {"name": "f", "arguments": "not JSON"}}]},
    {"role": "assistant", "content": "Hello", "tool_calls": None, "name": "bot"},
    {"role": "assistant", "content": "4", "reasoning_content": "2 + 2"},
    {"role": "assistant", "content": "4", "reasoning": "2 + 2", "reasoning_content": None},
    {"role": "tool", "tool_call_id": "c1", "content": "21 °C"},
    {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "21 °C"}]},
]


def with_extras(node: Any) -> Any:
    """The value with a field that nobody knows in each object of it."""
    if isinstance(node, dict):
        return {"x_vendor": {"keep": [1, None]}} | {key: with_extras(value) for key, value in node.items()}
    return [with_extras(value) for value in node] if isinstance(node, list) else node


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message["role"])
def test_a_message_goes_on_as_it_came_also_with_fields_that_nobody_knows(message: dict[str, Any]) -> None:
    for form in (message, with_extras(message)):
        item = generate(history=[form])
        assert isinstance(item, Call), item
        assert item.conversation == [form]


def test_a_history_goes_on_in_its_order_with_the_message_after_it() -> None:
    history = [with_extras(message) for message in MESSAGES]
    item = generate(history=history, message=with_extras(MESSAGES[5]["content"]))
    assert isinstance(item, Call)
    assert item.conversation == [*history, {"role": "user", "content": with_extras(MESSAGES[5]["content"])}]


ROLES = "expected system, developer, user, assistant or tool"
PARTS = "expected text, image_url, input_audio"


def refused_messages() -> Iterator[tuple[Any, str, str]]:
    """Messages, each with the path of what is wrong in it and with what was expected there."""
    yield "Hi", "", "Expected `object`"
    yield {}, "", "required field `role`"
    yield {"content": "Hi"}, "", "required field `role`"
    yield {"role": "model", "content": "Hi"}, ".role", ROLES
    yield {"role": None, "content": "Hi"}, ".role", "Expected `str`"
    for role in ("system", "developer", "user", "tool"):
        tool = {"tool_call_id": "c"} if role == "tool" else {}
        yield {"role": role, **tool}, "", "required field `content`"
        yield {"role": role, "content": None, **tool}, ".content", "Expected `str | array`"
        yield {"role": role, "content": {"type": "text", "text": "Hi"}, **tool}, ".content", "Expected `str | array`"
    yield {"role": "user", "content": "Hi", "name": 5}, ".name", "Expected `str | null`"
    yield {"role": "user", "content": ["Hi"]}, ".content[0]", "Expected `object`"
    yield {"role": "user", "content": [{"text": "Hi"}]}, ".content[0]", "required field `type`"
    yield {"role": "user", "content": [{"type": "video", "video": {}}]}, ".content[0].type", PARTS
    yield {"role": "user", "content": [{"type": "text"}]}, ".content[0]", "required field `text`"
    yield {"role": "user", "content": [{"type": "text", "text": 5}]}, ".content[0].text", "Expected `str`"
    yield {"role": "user", "content": [{"type": "refusal"}]}, ".content[0]", "required field `refusal`"
    for part, inner in (("image_url", ("url",)), ("input_audio", ("data", "format"))):
        whole = dict.fromkeys(inner, "x")
        yield {"role": "user", "content": [{"type": part}]}, ".content[0]", f"required field `{part}`"
        yield {"role": "user", "content": [{"type": part, part: "x"}]}, f".content[0].{part}", "Expected `object`"
        for field in inner:
            path = f".content[0].{part}.{field}"
            yield {"role": "user", "content": [{"type": part, part: whole | {field: ""}}]}, path, "length >= 1"
            missing = {name: "x" for name in inner if name != field}
            yield {"role": "user", "content": [{"type": part, part: missing}]}, f".content[0].{part}", f"`{field}`"
    yield {"role": "user", "content": [{"type": "file"}]}, ".content[0]", "required field `file`"
    yield {"role": "user", "content": [{"type": "file", "file": "x"}]}, ".content[0].file", "Expected `object`"
    yield {"role": "assistant", "content": 5}, ".content", "Expected `str | array | null`"
    yield {"role": "assistant", "reasoning_content": 5}, ".reasoning_content", "Expected `str | null`"
    yield {"role": "assistant", "reasoning": []}, ".reasoning", "Expected `str | null`"
    yield {"role": "assistant", "tool_calls": TOOL_CALL}, ".tool_calls", "Expected `array | null`"
    yield {"role": "tool", "content": "x"}, "", "required field `tool_call_id`"
    yield {"role": "tool", "content": "x", "tool_call_id": ""}, ".tool_call_id", "length >= 1"
    for change, path, expected in (
        ({"id": ""}, ".id", "length >= 1"),
        ({"id": None}, ".id", "Expected `str`"),
        ({"type": "custom"}, ".type", "expected function"),
        ({"function": "f"}, ".function", "Expected `object`"),
        ({"function": {"arguments": "{}"}}, ".function", "required field `name`"),
        ({"function": {"name": "", "arguments": "{}"}}, ".function.name", "length >= 1"),
        ({"function": {"name": "f"}}, ".function", "required field `arguments`"),
        ({"function": {"name": "f", "arguments": {}}}, ".function.arguments", "Expected `str`"),
    ):
        calls = [TOOL_CALL, TOOL_CALL | change]
        yield {"role": "assistant", "tool_calls": calls}, f".tool_calls[1]{path}", expected


@pytest.mark.parametrize(("message", "path", "expected"), list(refused_messages()))
def test_what_is_no_message_is_refused_with_its_path(message: Any, path: str, expected: str) -> None:
    told = refusal(history=[MESSAGES[0], message])
    assert told.endswith(f"- at `params.history[1]{path}`")
    assert expected in told


def test_the_parts_of_the_message_are_checked_like_those_of_the_history() -> None:
    told = refusal(message=[{"type": "text", "text": "Hi"}, {"type": "video"}])
    assert PARTS in told
    assert told.endswith("- at `params.message[1].type`")
    assert refusal(message=5) == "Expected `str | array | null`, got `int` - at `params.message`"
