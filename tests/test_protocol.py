"""What each method takes: every field with values that are good and values that are refused, with their path."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from inference_trio.chat import Params
from inference_trio.errors import InvalidParamsError
from inference_trio.jsonrpc import Call, Invalid, convert, decode, encode, loads
from inference_trio.protocol import (
    METHODS,
    NOTIFICATIONS,
    Cancel,
    CreateSession,
    Discover,
    Generate,
    NamedToolChoice,
    ResultOfTool,
    TaskNotification,
    ToolResult,
)

HI = {"role": "user", "content": "Hi"}
NAMED = {"type": "function", "function": {"name": "f"}}


def decoded(method: str, params: dict[str, Any]) -> Params:
    (item,) = decode(json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params})).items
    assert isinstance(item, Call), item
    return item.params


def refusal(method: str, params: dict[str, Any]) -> str:
    (item,) = decode(json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params})).items
    assert isinstance(item, Invalid), "was not refused"
    assert (item.id, item.error.code) == (1, -32602)
    return item.error.message


# generate

GOOD: dict[str, list[Any]] = {
    "history": [[], [HI], [HI, {"role": "assistant", "content": "Hello"}, HI]],
    "message": ["Hi", "", [{"type": "text", "text": "Hi"}]],
    "tools": [[], [{"name": "f"}, {"type": "function", "function": {"name": "g"}}]],
    "model": ["m"],
    "max_new_tokens": [1, 2**70],
    "temperature": [0, 0.0, 1.5, 2],
    "top_p": [0, 0.5, 1],
    "stop": ["x", "", [], ["x", "y"]],
    "seed": [0, -1, 2**70],
    "presence_penalty": [-2, 0, 2.0],
    "frequency_penalty": [-2.0, 0, 2],
    "tool_choice": ["none", "auto", "required", NAMED],
    "parallel_tool_calls": [True, False],
    "response_format": [{}, {"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "x"}}],
    "reasoning_effort": ["high", "of the next model"],
    "logit_bias": [{}, {"50256": -100, "5": 100, "6": 0.5}],
    "traceparent": ["00-" + "a" * 32 + "-" + "b" * 16 + "-01"],
}

BAD: dict[str, list[tuple[Any, str, str]]] = {
    "history": [({}, "", "array | null"), (HI, "", "array | null"), ([HI, 5], "[1]", "`object`")],
    "message": [(5, "", "str | array | null"), ({}, "", "str | array | null"), (["Hi"], "[0]", "`object`")],
    "tools": [({}, "", "array | null"), ([5], "[0]", "`object`"), ([None], "[0]", "`object`")],
    "model": [("", "", "length >= 1"), (5, "", "str | null")],
    "max_new_tokens": [
        (0, "", ">= 1"),
        (-1, "", ">= 1"),
        (1.5, "", "int | null"),
        ("5", "", "int | null"),
        (True, "", "int | null"),
    ],
    "temperature": [
        (-0.1, "", ">= 0"),
        (2.1, "", "<= 2"),
        (3, "", "<= 2"),
        ("1", "", "float | null"),
        (False, "", "float | null"),
        (10**400, "", "out of range"),
    ],
    "top_p": [(-0.1, "", ">= 0"), (1.1, "", "<= 1"), ([], "", "float | null")],
    "stop": [(5, "", "str | array | null"), (["x", None], "[1]", "`str`")],
    "seed": [(1.5, "", "int | null"), ("1", "", "int | null")],
    "presence_penalty": [(-2.1, "", ">= -2"), (2.1, "", "<= 2"), ("", "", "float | null")],
    "frequency_penalty": [(-2.1, "", ">= -2"), (2.1, "", "<= 2"), ({}, "", "float | null")],
    "tool_choice": [
        ("any", "", "expected none, auto, required or an object that names a function"),
        (5, "", "str | object | null"),
        ({}, "", "required field `function`"),
        ({"function": {"name": "f"}}, "", "required field `type`"),
        ({"type": "tool", "function": {"name": "f"}}, ".type", "expected function"),
        ({"type": "function", "function": {}}, ".function", "required field `name`"),
        ({"type": "function", "function": {"name": "a b"}}, ".function.name", "matching regex"),
        (NAMED | {"name": "f"}, "", "unknown field `name`"),
        ({"type": "function", "function": {"name": "f", "x": 1}}, ".function", "unknown field `x`"),
    ],
    "parallel_tool_calls": [(1, "", "bool | null"), ("true", "", "bool | null")],
    "response_format": [("json_object", "", "object | null"), ([], "", "object | null")],
    "reasoning_effort": [("", "", "length >= 1"), (5, "", "str | null")],
    "logit_bias": [
        ([], "", "object | null"),
        ({"5": "1"}, "[...]", "`float`"),
        ({"5": 101}, "[...]", "<= 100"),
        ({"5": -101}, "[...]", ">= -100"),
        ({"5": None}, "[...]", "`float`"),
    ],
    "traceparent": [("", "", "regex"), ("00-" + "A" * 32 + "-" + "b" * 16 + "-01", "", "regex"), (5, "", "str | null")],
}


def test_the_tables_name_every_field_of_generate() -> None:
    assert tuple(GOOD) == tuple(BAD) == Generate.__struct_fields__


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in GOOD for value in GOOD[field]])
def test_generate_takes(field: str, value: Any) -> None:
    params = decoded("generate", {"history": [HI], "message": "Hi", field: value})
    if field not in ("history", "tools"):
        assert msgspec.to_builtins(getattr(params, field)) == value


@pytest.mark.parametrize(
    ("field", "value", "path", "expected"), [(field, *case) for field, cases in BAD.items() for case in cases]
)
def test_generate_refuses_and_names_the_field(field: str, value: Any, path: str, expected: str) -> None:
    message = refusal("generate", {"history": [HI], "message": "Hi", field: value})
    assert message.endswith(f" - at `params.{field}{path}`")
    assert expected in message


@pytest.mark.parametrize("field", Generate.__struct_fields__)
def test_null_means_not_given(field: str) -> None:
    others = {"message": "Hi"} if field == "history" else {"history": [HI]}
    assert decoded("generate", {**others, field: None}) == decoded("generate", others)


def test_without_tools_is_not_the_same_as_with_no_tools() -> None:
    without, none = decoded("generate", {"message": "Hi"}), decoded("generate", {"message": "Hi", "tools": []})
    assert isinstance(without, Generate)
    assert isinstance(none, Generate)
    assert (without.tools, none.tools) == (None, [])


@pytest.mark.parametrize("history", [{}, {"history": []}, {"history": None}])
@pytest.mark.parametrize("message", [{}, {"message": ""}, {"message": []}, {"message": None}])
def test_generate_needs_a_history_or_a_message(history: dict[str, Any], message: dict[str, Any]) -> None:
    expected = "Expected `history` or `message`, at least one of them not empty - at `params`"
    assert refusal("generate", {**history, **message}) == expected


def test_a_named_tool_choice_is_decoded_as_such() -> None:
    params = decoded("generate", {"message": "Hi", "tool_choice": NAMED})
    assert isinstance(params, Generate)
    assert isinstance(params.tool_choice, NamedToolChoice)
    assert params.tool_choice.function.name == "f"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("field", ["max_tokens", "Message", "", "$schema", "`$.x`"])
def test_a_field_that_is_not_named_is_refused_and_never_ignored(method: str, field: str) -> None:
    needed: dict[str, dict[str, Any]] = {
        "generate": {"message": "Hi"},
        "tool_result": {"task_id": "t", "results": [{"tool_call_id": "c", "result": 1}]},
    }
    params = needed.get(method, {})
    assert decoded(method, params)
    expected = f"Object contains unknown field `{field}` - at `params`"
    assert refusal(method, {**params, field: 1}) == expected
    assert refusal(method, {**params, field: None}) == expected


# tool_result


def one_result(**result: Any) -> ResultOfTool:
    params = decoded("tool_result", {"task_id": "t", "results": [{"tool_call_id": "c", **result}]})
    assert isinstance(params, ToolResult)
    return params.results[0]


@pytest.mark.parametrize("value", ["", "21 °C", 0, None, False, [], {"a": [1]}, 2**70, 1.5])
def test_a_result_is_any_json(value: Any) -> None:
    for result in (
        one_result(result=value),
        one_result(result=value, is_error=False, error_message=None, tool_name=None),
        one_result(result=value, is_error=None, tool_name="f"),
    ):
        assert (result.tool_call_id, result.result) == ("c", value)
        assert not result.is_error


@pytest.mark.parametrize("message", ["it broke", ""])
def test_an_error_has_a_message_in_place_of_a_result(message: str) -> None:
    result = one_result(is_error=True, error_message=message)
    assert (result.is_error, result.error_message, result.result) == (True, message, msgspec.UNSET)


@pytest.mark.parametrize(
    ("fields", "path", "expected"),
    [
        ({}, "", "Expected `result`, or"),
        ({"is_error": False}, "", "Expected `result`, or"),
        ({"error_message": "it broke"}, "", "Expected `result`, or"),
        ({"result": 1, "error_message": "it broke"}, "", "Expected `result`, or"),
        ({"is_error": False, "error_message": "it broke"}, "", "Expected `result`, or"),
        ({"is_error": True}, "", "Expected `error_message`"),
        ({"is_error": True, "error_message": None}, "", "Expected `error_message`"),
        ({"is_error": True, "error_message": "it broke", "result": 1}, "", "Expected `error_message`"),
        ({"is_error": 1, "error_message": "it broke"}, ".is_error", "Expected `bool | null`"),
        ({"is_error": True, "error_message": 5}, ".error_message", "Expected `str | null`"),
        ({"result": 1, "tool_name": 5}, ".tool_name", "Expected `str | null`"),
        ({"result": 1, "tool_call_id": ""}, ".tool_call_id", "length >= 1"),
        ({"result": 1, "tool_call_id": 5}, ".tool_call_id", "Expected `str`"),
        ({"result": 1, "tool_call_id": None}, ".tool_call_id", "Expected `str`"),
        ({"result": 1, "name": "f"}, "", "unknown field `name`"),
        ({"result": 1, "$name": "f"}, "", "unknown field `$name`"),
    ],
)
def test_what_is_no_result_is_refused(fields: dict[str, Any], path: str, expected: str) -> None:
    results = [{"tool_call_id": "b", "result": 1}, {"tool_call_id": "c", **fields}]
    message = refusal("tool_result", {"task_id": "t", "results": results})
    assert message.endswith(f" - at `params.results[1]{path}`")
    assert expected in message


RESULTS = [{"tool_call_id": "c", "result": 1}]


@pytest.mark.parametrize(
    ("params", "path", "expected"),
    [
        ({}, "", "required field `task_id`"),
        ({"task_id": "t"}, "", "required field `results`"),
        ({"results": RESULTS}, "", "required field `task_id`"),
        ({"task_id": "", "results": RESULTS}, ".task_id", "length >= 1"),
        ({"task_id": None, "results": RESULTS}, ".task_id", "Expected `str`"),
        ({"task_id": 5, "results": RESULTS}, ".task_id", "Expected `str`"),
        ({"task_id": "t", "results": []}, ".results", "length >= 1"),
        ({"task_id": "t", "results": None}, ".results", "Expected `array`"),
        ({"task_id": "t", "results": RESULTS[0]}, ".results", "Expected `array`"),
        ({"task_id": "t", "results": [5]}, ".results[0]", "Expected `object`"),
        ({"task_id": "t", "results": [{"result": 1}]}, ".results[0]", "required field `tool_call_id`"),
    ],
)
def test_tool_result_refuses_and_names_the_field(params: dict[str, Any], path: str, expected: str) -> None:
    message = refusal("tool_result", params)
    assert message.endswith(f" - at `params{path}`")
    assert expected in message


# cancel, rpc.discover


@pytest.mark.parametrize(("params", "task_id"), [({}, None), ({"task_id": None}, None), ({"task_id": "t"}, "t")])
def test_cancel_is_for_one_task_or_for_all(params: dict[str, Any], task_id: str | None) -> None:
    assert decoded("cancel", params) == Cancel(task_id=task_id)


@pytest.mark.parametrize(("value", "expected"), [("", "length >= 1"), (5, "str | null"), (["t"], "str | null")])
def test_cancel_refuses(value: Any, expected: str) -> None:
    message = refusal("cancel", {"task_id": value})
    assert message.endswith(" - at `params.task_id`")
    assert expected in message


def test_discover_takes_nothing() -> None:
    assert decoded("rpc.discover", {}) == Discover()


# The body of POST /create_session


@pytest.mark.parametrize(
    ("body", "window", "tools"),
    [
        ({}, None, []),
        ({"tools": None, "resume_window": None}, None, []),
        ({"tools": []}, None, []),
        ({"resume_window": 0}, 0, []),
        ({"resume_window": 1e9}, 1e9, []),
        ({"tools": [{"name": "f"}, {"function": {"name": "g"}}], "resume_window": 2.5}, 2.5, ["f", "g"]),
    ],
)
def test_create_session_takes(body: dict[str, Any], window: float | None, tools: list[str]) -> None:
    params = convert(body, CreateSession, "body")
    assert params.resume_window == window
    assert [tool.definition.name for tool in params.tools or ()] == tools


@pytest.mark.parametrize(
    ("body", "path", "expected"),
    [
        ([], "", "Expected `object`"),
        (None, "", "Expected `object`"),
        ({"tools": {}}, ".tools", "Expected `array | null`"),
        ({"tools": [{"name": "a b"}]}, ".tools[0].name", "matching regex"),
        ({"resume_window": -1}, ".resume_window", ">= 0"),
        ({"resume_window": "30"}, ".resume_window", "Expected `float | null`"),
        ({"resume_window": True}, ".resume_window", "Expected `float | null`"),
        ({"resume_window": 10**400}, ".resume_window", "out of range"),
        ({"session_id": "s"}, "", "unknown field `session_id`"),
    ],
)
def test_create_session_refuses_and_names_the_field(body: Any, path: str, expected: str) -> None:
    with pytest.raises(InvalidParamsError) as caught:
        convert(body, CreateSession, "body")
    assert caught.value.message.endswith(f" - at `body{path}`")
    assert expected in caught.value.message


# What goes out


def test_the_methods_and_notifications_have_the_names_of_the_protocol() -> None:
    assert list(METHODS) == ["generate", "tool_result", "cancel", "rpc.discover"]
    of_tasks = [kind.method for kind in NOTIFICATIONS if issubclass(kind, TaskNotification)]
    assert of_tasks == ["text_chunk", "reasoning_chunk", "function_call_request", "end", "error"]
    assert [kind.method for kind in NOTIFICATIONS if kind.method not in of_tasks] == ["resumed", "draining"]


def test_params_are_immutable() -> None:
    params = decoded("generate", {"message": "Hi"})
    with pytest.raises(AttributeError):
        params.message = "Bye"  # type: ignore[attr-defined]


def test_a_decoded_value_is_not_changed_by_writing_it_again() -> None:
    value = {"result": [2**70, 0.1, "ü", None, {"a": True}]}
    assert loads(encode(value)) == value
