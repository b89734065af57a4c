"""Frames become calls and errors become answers, as the JSON-RPC 2.0 specification has it.

Where a test names a section, it is one of that specification.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference_trio.errors import InvalidParamsError, NoSuchTaskError, ParseError, RateLimitedError
from inference_trio.jsonrpc import (
    MAX_BATCH,
    MAX_CONTAINERS,
    MAX_DEPTH,
    MAX_ID_CHARACTERS,
    Call,
    Frame,
    Invalid,
    convert,
    decode,
    encode,
    failure,
    loads,
    notification,
    response,
)
from inference_trio.protocol import (
    METHODS,
    Cancel,
    CreateSession,
    Discover,
    End,
    Generate,
    Resumed,
    TaskStatus,
    TextChunk,
    ToolResult,
    Usage,
)

EXAMPLES: dict[str, dict[str, Any]] = {
    "generate": {
        "history": [
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            {
                "role": "assistant",
                "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
            },
            {"role": "tool", "tool_call_id": "c", "content": "1"},
        ],
        "message": "And now?",
        "tools": [{"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "number"}}}}],
        "temperature": 0.5,
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "logit_bias": {"5": 1},
    },
    "tool_result": {"task_id": "t", "results": [{"tool_call_id": "c", "result": [1, None]}]},
    "cancel": {"task_id": "t"},
    "rpc.discover": {},
}
IDS = ["1", "0", "-7", '"a"', '""', "null", "1.5", "1e2", "9" * 40, "-" + "9" * 40, "0.1", "1e308"]
NO_REQUEST = "Expected an object with"


def request(method: str = "cancel", **members: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "method": method, **members}


def only(frame: Frame) -> Call | Invalid:
    assert not frame.is_batch
    (item,) = frame.items
    return item


def refused(data: str | bytes) -> Invalid:
    item = only(decode(data))
    assert isinstance(item, Invalid)
    return item


def told(item: Call | Invalid) -> tuple[Any, int]:
    """The id and the error code that are answered."""
    assert isinstance(item, Invalid)
    return item.id, item.error.code


# Requests and notifications


@pytest.mark.parametrize(("method", "params"), EXAMPLES.items())
def test_each_method_decodes_into_its_type(method: str, params: dict[str, Any]) -> None:
    item = only(decode(json.dumps(request(method, params=params, id=7))))
    assert isinstance(item, Call)
    assert type(item.params) is METHODS[method]
    assert (item.id, item.expects_answer) == (7, True)


@pytest.mark.parametrize("written", IDS)
def test_an_answer_has_the_very_id_of_the_request(written: str) -> None:
    item = only(decode(f'{{"jsonrpc": "2.0", "method": "cancel", "id": {written}}}'))
    assert isinstance(item, Call)
    assert item.expects_answer
    answered = json.loads(encode(response(item.id, "done")))["id"]
    assert (type(answered), answered) == (type(json.loads(written)), json.loads(written))


@pytest.mark.parametrize("written", ["true", "false", "[]", "[1]", "{}", '{"id": 1}'])
@pytest.mark.parametrize("method", ["cancel", "unknown"])
def test_an_id_that_is_none_is_answered_with_null(written: str, method: str) -> None:
    invalid = refused(f'{{"jsonrpc": "2.0", "method": "{method}", "id": {written}}}')
    assert told(invalid) == (None, -32600)
    assert invalid.error.message.endswith("- at `id`")


def test_a_request_without_id_is_a_notification_and_expects_no_answer() -> None:
    item = only(decode(json.dumps(request())))
    assert item == Call(None, expects_answer=False, params=Cancel(), conversation=[])


@pytest.mark.parametrize(
    "members",
    [
        {"method": "unknown"},
        {"method": "cancel", "params": {"task_id": 5}},
        {"method": "cancel", "params": {"unknown": 1}},
        {"method": "cancel", "params": ["t"]},
        {"method": "generate"},
    ],
)
def test_a_notification_is_never_answered_whatever_is_wrong_with_it(members: dict[str, Any]) -> None:
    """Section 4.1."""
    assert decode(json.dumps(request(**members))) == Frame(is_batch=False, items=())


@pytest.mark.parametrize("params", [{}, {"params": {}}])
def test_params_may_be_left_out(params: dict[str, Any]) -> None:
    item = only(decode(json.dumps(request("rpc.discover", id=1, **params))))
    assert isinstance(item, Call)
    assert item.params == Discover()


def test_a_member_that_the_specification_does_not_name_is_passed_over() -> None:
    assert isinstance(only(decode(json.dumps(request(id=1, trace="abc")))), Call)


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ({"method": "cancel"}, "jsonrpc"),
        ({"jsonrpc": "1.0", "method": "cancel"}, "jsonrpc"),
        ({"jsonrpc": 2.0, "method": "cancel"}, "jsonrpc"),
        ({"jsonrpc": "2.0"}, "method"),
        ({"jsonrpc": "2.0", "method": None}, "method"),
        ({"jsonrpc": "2.0", "method": 1}, "method"),
        ({"jsonrpc": "2.0", "method": ["cancel"]}, "method"),
        ({"jsonrpc": "2.0", "result": 1}, "method"),
        (request(params="bar"), "params"),
        (request(params=5), "params"),
        (request(params=None), "params"),
    ],
)
def test_an_invalid_envelope_is_answered_with_the_id_where_there_is_one(value: dict[str, Any], field: str) -> None:
    """Section 5: without an id it is no notification, because it is no request; the answer has the id null."""
    for members, expected in (({}, None), ({"id": 5}, 5), ({"id": "x"}, "x"), ({"id": None}, None)):
        invalid = refused(json.dumps({**value, **members}))
        assert told(invalid) == (expected, -32600)
        assert invalid.error.message.endswith(f"- at `{field}`")


@pytest.mark.parametrize("written", ["{}", "1", "1.5", '"cancel"', "true", "null"])
def test_what_is_no_request_at_all_is_answered_with_null(written: str) -> None:
    invalid = refused(written)
    assert told(invalid) == (None, -32600)
    assert invalid.error.message.startswith(NO_REQUEST)


def test_an_unknown_method_is_told_with_those_there_are() -> None:
    invalid = refused(json.dumps(request("chat", id=1)))
    assert told(invalid) == (1, -32601)
    assert invalid.error.message == "There is no method `chat`; there are generate, tool_result, cancel, rpc.discover"


def test_a_long_method_name_is_not_sent_back_whole() -> None:
    assert len(refused(json.dumps(request("x" * 100_000, id=1))).error.message) < 200


def test_params_by_position_are_refused() -> None:
    invalid = refused(json.dumps(request(params=["t"], id=1)))
    assert told(invalid) == (1, -32602)
    assert "got an array - at `params`" in invalid.error.message


# Batches


def test_a_batch_keeps_its_order_and_leaves_out_what_is_never_answered() -> None:
    batch = [
        request("cancel", id="1"),
        request("cancel"),
        request("unknown"),
        {"foo": "boo"},
        request("unknown", id="5"),
        request("rpc.discover", id="9"),
    ]
    frame = decode(json.dumps(batch))
    assert frame.is_batch
    first, notified, *errors, last = frame.items
    assert first == Call("1", expects_answer=True, params=Cancel(), conversation=[])
    assert notified == Call(None, expects_answer=False, params=Cancel(), conversation=[])
    assert [told(item) for item in errors] == [(None, -32600), ("5", -32601)]
    assert last == Call("9", expects_answer=True, params=Discover(), conversation=[])


def test_a_batch_of_notifications_expects_no_answer() -> None:
    frame = decode(json.dumps([request(), request("unknown"), request(params={"task_id": "t"})]))
    assert frame.is_batch
    assert [item.params for item in frame.items if isinstance(item, Call) and not item.expects_answer] == [
        Cancel(),
        Cancel(task_id="t"),
    ]
    assert len(frame.items) == 2


def test_each_invalid_member_of_a_batch_has_an_answer_of_its_own() -> None:
    """Section 7."""
    frame = decode("[1, [], {}, null]")
    assert frame.is_batch
    assert [told(item) for item in frame.items] == [(None, -32600)] * 4


def test_an_empty_batch_is_one_invalid_request() -> None:
    assert told(refused("[]")) == (None, -32600)


def test_a_batch_has_a_limit() -> None:
    largest = decode(encode([request(id=i) for i in range(MAX_BATCH)]))
    assert [item.id for item in largest.items] == list(range(MAX_BATCH))
    too_large = refused(encode([request(id=i) for i in range(MAX_BATCH + 1)]))
    assert told(too_large) == (None, -32600)
    assert str(MAX_BATCH) in too_large.error.message


# JSON


@pytest.mark.parametrize(
    "data",
    [
        "",
        b"",
        "{",
        "nonsense",
        '{"jsonrpc": "2.0", "method": "cancel, "params": "bar", "baz]',
        '[{"jsonrpc": "2.0", "method": "cancel", "id": "1"},{"jsonrpc": "2.0", "method"]',
        "{} {}",
        "NaN",
        "[Infinity]",
        "-Infinity",
        "1e999",
        "[-1e999]",
        '"\\ud800"',
        '"\\udc00x"',
        '"\ud800"',
        "'a'",
        "[1,]",
        "01",
        "\ufeff{}",
        "9" * 5000,
        b"\xff",
        b'"\xed\xa0\x80"',
        b'"\xc0\xaf"',
        b'{"jsonrpc": "2.0", "id": 1, "method": "\xff"}',
        '{"jsonrpc": "2.0", "id": 1, "method": "cancel", "params": {"task_id": NaN}}',
    ],
    ids=lambda data: repr(data)[:30],
)
def test_what_is_not_json_is_one_parse_error_with_the_id_null(data: str | bytes) -> None:
    invalid = refused(data)
    assert told(invalid) == (None, -32700)
    assert invalid.error.message.startswith("Expected JSON")
    assert json.loads(encode(failure(invalid.id, invalid.error)))["error"]["code"] == -32700


def test_a_binary_frame_with_json_is_taken_as_text() -> None:
    text = json.dumps(request("cancel", id="ä€😀", params={"task_id": "ü"}), ensure_ascii=False)
    assert decode(text.encode()) == decode(text)
    assert only(decode(text)).id == "ä€😀"


@pytest.mark.parametrize(("opening", "inner", "closing"), [("[", "", "]"), ("[", "1", "]"), ('{"a":', "{}", "}")])
def test_json_is_nested_at_most_so_deep(opening: str, inner: str, closing: str) -> None:
    own = 1 if inner == "{}" else 0
    allowed, beyond = (opening * depth + inner + closing * depth for depth in (MAX_DEPTH - own, MAX_DEPTH + 1 - own))
    loads(allowed)
    with pytest.raises(ParseError, match=f"nested at most {MAX_DEPTH} deep"):
        loads(beyond)


@pytest.mark.parametrize("depth", [10_000, 1_000_000])
def test_no_depth_of_nesting_can_do_harm(depth: int) -> None:
    assert told(refused("[" * depth + "]" * depth)) == (None, -32700)
    assert told(refused("[" * depth)) == (None, -32700)


def test_of_equal_names_the_last_one_counts() -> None:
    assert loads('{"a": 1, "a": 2}') == {"a": 2}


# Parameters


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"tools": 5}, "Expected `array | null`, got `int` - at `body.tools`"),
        ({"tools": [{"name": 5}]}, "Expected `str | null`, got `int` - at `body.tools[0].name`"),
        ({"key": 1}, "Object contains unknown field `key` - at `body`"),
        ({"$key": 1}, "Object contains unknown field `$key` - at `body`"),
        ({"tools": [{"name": "f", "$key": 1}]}, "Object contains unknown field `$key` - at `body.tools[0]`"),
        ([], "Expected `object`, got `array` - at `body`"),
    ],
)
def test_what_has_the_wrong_shape_is_refused_with_the_path_of_the_field(value: Any, message: str) -> None:
    with pytest.raises(InvalidParamsError) as caught:
        convert(value, CreateSession, "body")
    assert caught.value.message == message


def test_the_conversation_is_the_history_as_it_came_and_the_message() -> None:
    history = [{"role": "user", "content": "Hi", "cache_control": {"type": "ephemeral"}}]
    parts = [{"type": "text", "text": "?", "extra": 1}]
    for params, expected in (
        ({"history": history}, history),
        ({"history": history, "message": ""}, history),
        ({"history": history, "message": []}, history),
        ({"message": "Hi"}, [{"role": "user", "content": "Hi"}]),
        ({"history": None, "message": parts}, [{"role": "user", "content": parts}]),
        ({"history": history, "message": parts}, [*history, {"role": "user", "content": parts}]),
    ):
        item = only(decode(json.dumps(request("generate", params=params))))
        assert isinstance(item, Call)
        assert item.conversation == expected


# What goes out


def test_an_answer_has_the_members_that_the_specification_names() -> None:
    """Section 5."""
    assert response("a", {"x": 1}) == {"jsonrpc": "2.0", "id": "a", "result": {"x": 1}}
    error = RateLimitedError("Slow down", retry_after=1.0)
    assert failure(None, error) == {"jsonrpc": "2.0", "id": None, "error": error.to_wire()}
    assert failure(2**70, NoSuchTaskError("None"))["error"] == {"code": -32004, "message": "None"}


def test_a_notification_of_a_task_has_the_session_the_task_and_its_number() -> None:
    assert notification("s", TextChunk(task_id="t", chunk="Hi"), 3) == {
        "jsonrpc": "2.0",
        "method": "text_chunk",
        "params": {"session_id": "s", "task_id": "t", "chunk": "Hi", "seq": 3},
    }


def test_a_notification_that_speaks_of_the_connection_has_no_number() -> None:
    resumed = Resumed(after=1, oldest_seq=2, latest_seq=3, gap=False, tasks=[TaskStatus("t", "streaming", [])])
    assert loads(encode(notification("s", resumed)))["params"] == {
        "session_id": "s",
        "after": 1,
        "oldest_seq": 2,
        "latest_seq": 3,
        "gap": False,
        "tasks": [{"task_id": "t", "state": "streaming", "outstanding": []}],
    }


@pytest.mark.parametrize("usage", [None, Usage(1, 2, 3)])
def test_what_a_notification_holds_is_written_with_all_its_fields(usage: Usage | None) -> None:
    end = End(
        task_id="t",
        status_message="cancelled",
        final_text="",
        finish_reason=None,
        usage=usage,
        messages=[{"role": "user", "content": None}],
    )
    params = loads(encode(notification("s", end, 1)))["params"]
    assert params["usage"] == (usage and {"input_tokens": 1, "output_tokens": 2, "total_tokens": 3})
    assert params["finish_reason"] is None
    assert params["messages"] == [{"role": "user", "content": None}]


# Whatever comes

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
NAMES = ["jsonrpc", "method", "params", "id", "tools", "history", "message", "$schema", "type", "role", "content"]


def places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Each container in the value, with each key or index in it."""
    keys = list(node) if isinstance(node, dict) else list(range(len(node))) if isinstance(node, list) else []
    for key in keys:
        yield node, key
        yield from places(node[key])


@st.composite
def damaged_requests(draw: st.DrawFn) -> Any:
    """A valid request in which a few places were replaced, taken away or added to."""
    method = draw(st.sampled_from(list(EXAMPLES)))
    value = copy.deepcopy(request(method, params=EXAMPLES[method], id=draw(SCALARS)))
    for _ in range(draw(st.integers(0, 3))):
        all_places = list(places(value))
        container, key = all_places[draw(st.integers(0, len(all_places) - 1))]
        action = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if action == "add" and isinstance(container, dict):
            container[draw(st.sampled_from(NAMES) | st.text())] = draw(JSON)
        elif action == "remove" and len(all_places) > 1:
            del container[key]
        else:
            container[key] = draw(JSON)
    return value


def check_items(value: Any, items: tuple[Call | Invalid, ...]) -> None:
    """Holds what section 4 and 5 say of one request, taken straight from its members."""
    has_id = isinstance(value, dict) and "id" in value
    request_id = value["id"] if has_id else None
    is_usable = request_id is None or type(request_id) in (str, int, float)
    assert len(items) == 1 if has_id or not isinstance(value, dict) else len(items) <= 1
    for item in items:
        assert (type(item.id), item.id) == ((type(request_id), request_id) if is_usable else (type(None), None))
        if isinstance(item, Call):
            assert item.expects_answer == has_id
            assert type(item.params) is METHODS[value["method"]]
        else:
            assert has_id or item.error.code == -32600


def check_frame(data: str | bytes) -> None:
    frame = decode(data)
    if not frame.is_batch:
        assert len(frame.items) <= 1
    for item in frame.items:
        if isinstance(item, Invalid):
            assert loads(encode(failure(item.id, item.error)))["error"] == item.error.to_wire()


FAST = settings(max_examples=100)


@FAST
@given(st.binary())
def test_no_bytes_make_the_decoder_raise(data: bytes) -> None:
    check_frame(data)


@FAST
@given(st.text(st.characters(exclude_categories=())) | st.text('[]{}",:\\ud8EeNa+-.123 ntrueflsI'))
def test_no_text_makes_the_decoder_raise(data: str) -> None:
    check_frame(data)


@FAST
@given(JSON)
def test_any_json_is_answered_as_the_specification_says(value: Any) -> None:
    frame = decode(json.dumps(value))
    check_frame(json.dumps(value))
    if not isinstance(value, list):
        check_items(value, frame.items)


@settings(FAST, max_examples=300)
@given(damaged_requests())
def test_a_damaged_request_with_a_usable_id_is_still_answered_once(value: Any) -> None:
    check_frame(json.dumps(value))
    check_items(value, decode(json.dumps(value)).items)


@settings(FAST, max_examples=50)
@given(st.lists(damaged_requests(), min_size=1, max_size=5))
def test_a_batch_is_answered_as_its_members_are(values: list[Any]) -> None:
    frame = decode(json.dumps(values))
    assert frame.is_batch
    alone = [item for value in values for item in decode(json.dumps(value)).items]
    assert [repr(item) for item in frame.items] == [repr(item) for item in alone]


@FAST
@given(st.none() | st.text() | st.integers() | st.floats(allow_nan=False, allow_infinity=False), JSON)
def test_what_is_written_can_be_read_again(request_id: Any, result: Any) -> None:
    text = encode(response(request_id, result))
    for answer in (loads(text), loads(text.encode()), json.loads(text)):
        assert answer == {"jsonrpc": "2.0", "id": request_id, "result": result}
        assert type(answer["id"]) is type(request_id)


def test_numbers_are_finite() -> None:
    assert math.isfinite(loads("1e308"))
    assert loads("9" * 40) == int("9" * 40)


def test_the_examples_are_of_all_methods() -> None:
    assert list(EXAMPLES) == list(METHODS)
    assert {Generate, ToolResult, Cancel, Discover} == set(METHODS.values())


def test_containers_are_counted_before_they_are_made() -> None:
    allowed = "[" + "{}," * (MAX_CONTAINERS - 2) + "{}]"
    assert len(loads(allowed)) == MAX_CONTAINERS - 1
    for data in (allowed[:-1] + ",[]]", (allowed[:-1] + ",{}]").encode(), "[" * (MAX_CONTAINERS + 1)):
        with pytest.raises(ParseError, match=f"at most {MAX_CONTAINERS} arrays and objects"):
            loads(data)


@pytest.mark.parametrize(
    "text", ["{" * MAX_CONTAINERS, '"[' * MAX_CONTAINERS, "\\[" * MAX_CONTAINERS, '\\\\"{\\' * MAX_CONTAINERS]
)
def test_text_may_have_any_number_of_brackets(text: str) -> None:
    assert loads(json.dumps({"text": text})) == {"text": text}
    assert loads(json.dumps([text, "[", text])) == [text, "[", text]


def test_an_id_may_be_long_but_not_without_end() -> None:
    for length, code in ((MAX_ID_CHARACTERS, -32601), (MAX_ID_CHARACTERS + 1, -32600)):
        (item,) = decode(json.dumps({"jsonrpc": "2.0", "id": "i" * length, "method": "nothing"})).items
        assert isinstance(item, Invalid)
        assert item.error.code == code
        assert item.id == ("i" * length if code == -32601 else None)
