"""The published document is well formed, and what it says of the types is what the decoder holds them to."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference_trio import __version__
from inference_trio.errors import InferenceError, UpstreamError
from inference_trio.jsonrpc import Call, decode, encode, loads, notification
from inference_trio.openrpc import document
from inference_trio.protocol import (
    METHODS,
    NOTIFICATIONS,
    Accepted,
    Cancelled,
    Draining,
    End,
    Error,
    FunctionCallRequest,
    Notification,
    ReasoningChunk,
    Resumed,
    Started,
    TaskStatus,
    TextChunk,
    Usage,
)
from tests.test_chat import MESSAGES, with_extras
from tests.test_protocol import GOOD

FIELDS: dict[str, tuple[set[str], set[str]]] = {
    "document": ({"openrpc", "info", "methods"}, {"components", "servers", "externalDocs"}),
    "info": ({"title", "version"}, {"description", "termsOfService", "contact", "license"}),
    "method": (
        {"name", "params", "result"},
        {"summary", "description", "paramStructure", "errors", "tags", "deprecated", "examples", "links", "servers"},
    ),
    "notification": ({"name", "params"}, {"summary", "description", "paramStructure"}),
    "descriptor": ({"name", "schema"}, {"summary", "description", "required", "deprecated"}),
    "error": ({"code", "message"}, {"data"}),
    "reference": ({"$ref"}, set()),
}
"""The fields that OpenRPC 1.3 requires of each of its objects, and those it also allows."""


def check_fields(kind: str, value: dict[str, Any]) -> None:
    required, allowed = FIELDS[kind]
    named = {name for name in value if not name.startswith("x-")}
    assert required <= named <= required | allowed


def descriptors() -> Iterator[dict[str, Any]]:
    for method in document()["methods"]:
        yield from method["params"]
        yield method["result"]
    for kind in document()["x-notifications"]:
        yield from kind["params"]


def references(node: Any) -> Iterator[str]:
    """Every reference below this node, in `$ref` and in the mappings of OpenAPI's discriminators."""
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        yield from node.get("mapping", {}).values()
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from references(child)


def validator_of(schema: dict[str, Any]) -> jsonschema_rs.Draft202012Validator:
    """A validator for a schema of the document, with the components that it may refer to."""
    return jsonschema_rs.Draft202012Validator({**schema, "components": document()["components"]})


def validator_of_params(described: dict[str, Any]) -> jsonschema_rs.Draft202012Validator:
    """What a client would make of a method's params: an object that has these names and no others."""
    return validator_of(
        {
            "type": "object",
            "properties": {param["name"]: param["schema"] for param in described["params"]},
            "required": [param["name"] for param in described["params"] if param["required"]],
            "additionalProperties": False,
        }
    )


# The document


def test_every_object_has_the_fields_that_openrpc_requires_and_no_others() -> None:
    whole = document()
    check_fields("document", whole)
    check_fields("info", whole["info"])
    assert whole["openrpc"].startswith("1.3.")
    assert whole["info"]["version"] == __version__
    for method in whole["methods"]:
        check_fields("method", method)
        for error in method["errors"]:
            check_fields("reference", error)
    for kind in whole["x-notifications"]:
        check_fields("notification", kind)
    for descriptor in descriptors():
        check_fields("descriptor", descriptor)
    for error in whole["components"]["errors"].values():
        check_fields("error", error)


def test_every_reference_leads_somewhere() -> None:
    found = set(references(document()))
    assert found
    for reference in found:
        node = document()
        for step in reference.removeprefix("#/").split("/"):
            node = node[step]
        assert isinstance(node, dict)


def test_the_document_can_be_written_as_json_and_read_again() -> None:
    assert loads(encode(document())) == document()
    assert json.loads(json.dumps(document(), allow_nan=False)) == document()


def test_every_schema_is_a_json_schema() -> None:
    schemas = [*document()["components"]["schemas"].values(), *(descriptor["schema"] for descriptor in descriptors())]
    for schema in schemas:
        jsonschema_rs.meta.validate({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema})
        jsonschema_rs.meta.validate({"$schema": "http://json-schema.org/draft-07/schema", **schema})


def test_each_method_is_described_by_name_with_a_summary() -> None:
    methods = document()["methods"]
    assert [method["name"] for method in methods] == list(METHODS)
    for described in (*methods, *document()["x-notifications"]):
        assert described["paramStructure"] == "by-name"
        assert described["summary"]


def test_no_optional_param_stands_before_a_required_one() -> None:
    for described in (*document()["methods"], *document()["x-notifications"]):
        required = [param["required"] for param in described["params"]]
        assert required == sorted(required, reverse=True)


def test_names_are_given_once() -> None:
    for named in (document()["methods"], document()["x-notifications"], *(m["params"] for m in document()["methods"])):
        names = [each["name"] for each in named]
        assert len(set(names)) == len(names)


def test_the_errors_are_those_of_the_code() -> None:
    described = {error["code"] for error in document()["components"]["errors"].values()}
    assert described == {kind.code for kind in InferenceError.__subclasses__()}


# Agreement with the types


@pytest.mark.parametrize("method", METHODS)
def test_the_params_are_the_fields_of_the_type(method: str) -> None:
    described = {each["name"]: each for each in document()["methods"]}[method]
    fields = msgspec.structs.fields(METHODS[method])
    assert {param["name"]: param["required"] for param in described["params"]} == {
        field.name: field.required for field in fields
    }


@pytest.mark.parametrize(
    ("method", "result"),
    [
        ("generate", Started("s", "t", "streaming")),
        ("tool_result", Accepted("t", ["c"], [], "streaming")),
        ("cancel", Cancelled(["t"])),
        ("rpc.discover", document()),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_answer_is_what_the_result_says(method: str, result: Any) -> None:
    described = {each["name"]: each for each in document()["methods"]}[method]
    validator = validator_of(described["result"]["schema"])
    validator.validate(msgspec.to_builtins(result))
    assert not validator.is_valid([])


USAGE = Usage(input_tokens=1, output_tokens=2, total_tokens=3)
CALL = FunctionCallRequest(task_id="t", request_id="c", tool_name="f", parameters={"a": 1}, timeout=300.0)
NOTES: list[Notification] = [
    TextChunk(task_id="t", chunk="Hi"),
    ReasoningChunk(task_id="t", chunk="Hm"),
    CALL,
    End(task_id="t", status_message="completed", final_text="Hi", finish_reason="stop", usage=USAGE, messages=MESSAGES),
    End(task_id="t", status_message="cancelled", final_text="", finish_reason=None, usage=None, messages=[]),
    Error(task_id="t", error=UpstreamError("It failed", status=500).to_wire()),
    Resumed(after=0, oldest_seq=1, latest_seq=0, gap=False, tasks=[]),
    Resumed(after=0, oldest_seq=3, latest_seq=9, gap=True, tasks=[TaskStatus("t", "awaiting_tools", ["c"])]),
    Draining(deadline=3.5),
]


@pytest.mark.parametrize("note", NOTES, ids=lambda note: note.method)
def test_a_notification_has_the_params_that_are_published(note: Notification) -> None:
    described = {each["name"]: each for each in document()["x-notifications"]}[note.method]
    seq = 1 if "task_id" in note.__struct_fields__ else None
    params = loads(encode(notification("s", note, seq)))["params"]
    validator = validator_of_params(described)
    validator.validate(params)
    assert set(params) == {param["name"] for param in described["params"]}
    assert not validator.is_valid({**params, "more": 1})
    for name in params:
        assert not validator.is_valid({key: value for key, value in params.items() if key != name})


def test_every_notification_is_described() -> None:
    assert [each["name"] for each in document()["x-notifications"]] == [kind.method for kind in NOTIFICATIONS]
    assert {type(note) for note in NOTES} == set(NOTIFICATIONS)


# Agreement with the decoder


@functools.cache
def described_params(method: str) -> jsonschema_rs.Draft202012Validator:
    return validator_of_params({each["name"]: each for each in document()["methods"]}[method])


def is_accepted(method: str, params: Any) -> bool:
    (item,) = decode(encode({"jsonrpc": "2.0", "id": 1, "method": method, "params": params})).items
    return isinstance(item, Call)


@pytest.mark.parametrize("message", [*MESSAGES, *map(with_extras, MESSAGES)], ids=lambda message: message["role"])
def test_a_message_that_is_accepted_is_one_that_was_published(message: dict[str, Any]) -> None:
    assert is_accepted("generate", {"history": [message]})
    described_params("generate").validate({"history": [message]})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([0.5, -150.5, "", "f", "c 1", "function"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["name", "x"]), inner, max_size=2),
    max_leaves=4,
)


def values_of(good: list[Any]) -> st.SearchStrategy[Any]:
    """Values of which most are good ones, some ``null``, and some anything at all."""
    return st.sampled_from(good) | st.sampled_from(good) | st.none() | JSON


PARAMS = {
    "generate": st.fixed_dictionaries({}, optional={name: values_of(good) for name, good in GOOD.items()}),
    "tool_result": st.fixed_dictionaries(
        {
            "task_id": values_of(["t"]),
            "results": st.lists(
                st.fixed_dictionaries(
                    {"tool_call_id": values_of(["c"])},
                    optional={
                        "tool_name": values_of(["f"]),
                        "result": JSON,
                        "is_error": values_of([True, False]),
                        "error_message": values_of(["it broke"]),
                        "x": JSON,
                    },
                ),
                max_size=2,
            ),
        }
    ),
    "cancel": st.fixed_dictionaries({}, optional={"task_id": values_of(["t"]), "x": JSON}),
    "rpc.discover": st.fixed_dictionaries({}, optional={"x": JSON}),
}
CROSS_FIELD = (
    "Expected `history` or",
    "Expected either",
    "Expected all fields",
    "Expected a JSON Schema",
    "Expected every tool",
    "Expected `error_message`, and",
    "Expected `result`, or",
)
"""How refusals begin that no schema can tell: they are about more than one field."""


@settings(max_examples=250)
@given(st.sampled_from(list(PARAMS)).flatmap(lambda method: st.tuples(st.just(method), PARAMS[method])))
def test_the_published_schema_and_the_decoder_agree(example: tuple[str, Any]) -> None:
    """But for rules over several fields, and for 1.0, which JSON Schema takes for an integer."""
    method, params = example
    (item,) = decode(encode({"jsonrpc": "2.0", "id": 1, "method": method, "params": params})).items
    if isinstance(item, Call):
        described_params(method).validate(params)
    elif not item.error.message.startswith(CROSS_FIELD):
        assert not described_params(method).is_valid(params), item.error.message
