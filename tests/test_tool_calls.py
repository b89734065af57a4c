"""Calls are put together from pieces as providers send them, and their arguments parsed strictly."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference_trio.deltas import ToolCallDelta
from inference_trio.jsonrpc import MAX_DEPTH
from inference_trio.task import ToolCall
from inference_trio.tool_calls import ToolCallAssembler, parse_arguments

Piece = ToolCallDelta
OFFERED = ("weather", "time")


def complete(*pieces: ToolCallDelta, used_ids: tuple[str, ...] = ()) -> list[ToolCall]:
    assembler = ToolCallAssembler()
    for piece in pieces:
        assembler.add(piece)
    return list(assembler.complete(OFFERED, used_ids))


def summary(*pieces: ToolCallDelta) -> list[tuple[str, dict[str, int]]]:
    calls = complete(*pieces)
    assert [call.problem for call in calls] == [None] * len(calls)
    assert len({call.id for call in calls}) == len(calls)
    return [(call.name, call.parameters) for call in calls]


A, B = {"a": 1}, {"b": 2}
A_JSON, B_JSON = '{"a": 1}', '{"b": 2}'
WEATHER_AND_TIME = [("weather", A), ("time", B)]
TWICE = [("weather", A), ("weather", B)]


@pytest.mark.parametrize(
    ("expected", "pieces"),
    [
        pytest.param([("weather", A)], [Piece(0, "x", "weather"), Piece(0, "", "", A_JSON)], id="as OpenAI does"),
        pytest.param(
            WEATHER_AND_TIME,
            [
                Piece(0, "x", "weather"),
                Piece(1, "y", "time"),
                Piece(0, arguments='{"a":'),
                Piece(1, arguments=B_JSON),
                Piece(0, arguments=" 1}"),
            ],
            id="interleaved by index",
        ),
        pytest.param(
            WEATHER_AND_TIME,
            [
                Piece(None, "x", "weather", '{"a"'),
                Piece(None, "y", "time", '{"b"'),
                Piece(None, "x", "", ": 1}"),
                Piece(None, "y", "", ": 2}"),
            ],
            id="interleaved by id",
        ),
        pytest.param(
            WEATHER_AND_TIME,
            [
                Piece(0, "x", "weather", '{"a"'),
                Piece(0, "y", "time", '{"b"'),
                Piece(0, "x", "weather", ": 1}"),
                Piece(0, "y", "time", ": 2}"),
            ],
            id="interleaved by id, all with index 0",
        ),
        pytest.param(
            WEATHER_AND_TIME,
            [Piece(None, "", "weather", A_JSON), Piece(None, "", "time", B_JSON)],
            id="neither index nor id",
        ),
        pytest.param(
            WEATHER_AND_TIME, [Piece(0, "", "weather", A_JSON), Piece(0, "", "time", B_JSON)], id="all index 0, no id"
        ),
        pytest.param(TWICE, [Piece(0, "", "weather", A_JSON), Piece(0, "", "weather", B_JSON)], id="one tool twice"),
        pytest.param(
            TWICE,
            [Piece(0, "", "weather", A_JSON), Piece(0, "", "weather"), Piece(0, "", "", B_JSON)],
            id="one tool twice, no id, the second in pieces",
        ),
        pytest.param(
            TWICE,
            [Piece(0, "call", "weather", A_JSON), Piece(0, "call", "weather", B_JSON)],
            id="one tool twice under one id",
        ),
        pytest.param(
            [("weather", {}), ("weather", {})],
            [Piece(0, "x", "weather"), Piece(0, "y", "weather")],
            id="one tool twice without arguments, ids differ",
        ),
        pytest.param(
            [("weather", A)],
            [Piece(0, "x", "weather", '{"a"'), Piece(0, "y", "", ": 1}")],
            id="an id made up for each piece",
        ),
        pytest.param(
            [("weather", A)],
            [Piece(0, "x", "weather", '{"a"'), Piece(0, "x", "weather", ": 1}"), Piece(0, "x", "weather")],
            id="name and id repeated, also after the end",
        ),
        pytest.param(
            WEATHER_AND_TIME,
            [
                Piece(0, "x", "weather", A_JSON),
                Piece(1, "y", "time", B_JSON),
                Piece(0, "x", "weather"),
                Piece(1, "y", "time", "\n"),
            ],
            id="names and ids repeated after all calls",
        ),
        pytest.param(
            [("weather", {"a": {}, "b": 2})],
            [Piece(0, "x", "weather", '{"a": {}'), Piece(0, "x", "weather", ', "b": 2}')],
            id="name and id repeated after an inner object",
        ),
        pytest.param([("weather", A)], [Piece(0, "x"), Piece(0, "", "weather", A_JSON)], id="the name late"),
        pytest.param([], [Piece(0, "x")], id="an id and nothing more"),
        pytest.param([], [Piece(), Piece(None, "", "", " ")], id="nothing"),
    ],
)
def test_pieces_come_together(expected: list[tuple[str, dict[str, int]]], pieces: list[ToolCallDelta]) -> None:
    assert summary(*pieces) == expected


@settings(max_examples=200)
@given(
    parameters=st.dictionaries(st.text(max_size=5), st.one_of(st.integers(), st.text(), st.booleans()), max_size=4),
    cuts=st.lists(st.integers(0, 60), max_size=6),
    escape=st.booleans(),
)
def test_it_does_not_matter_where_the_arguments_are_cut(
    parameters: dict[str, object], cuts: list[int], escape: bool
) -> None:
    text = json.dumps(parameters, ensure_ascii=escape)
    edges = [0, *sorted(cuts), len(text)]
    pieces = [Piece(0, "", "", text[start:end]) for start, end in itertools.pairwise(edges)]
    assert summary(Piece(0, "x", "weather"), *pieces) == [("weather", parameters)]


def test_an_id_is_kept_where_it_can_be_and_replaced_where_it_cannot() -> None:
    pieces = [Piece(i, call_id, "weather", A_JSON) for i, call_id in enumerate(["x", "x", "old", "", "\ud800"])]
    calls = complete(*pieces, used_ids=("old",))
    ids = [call.id for call in calls]
    assert ids[0] == "x"
    assert len(set(ids)) == 5
    assert all(call_id.startswith("call_") and len(call_id) == 29 for call_id in ids[1:])


def test_a_tool_that_was_not_offered_is_a_problem_that_names_those_that_were() -> None:
    [call] = complete(Piece(0, "x", "wether", A_JSON))
    assert (call.name, call.parameters) == ("wether", {})
    assert call.problem == "There is no tool of this name; the tools are: weather, time."


def test_arguments_without_a_name_are_a_problem_and_not_lost() -> None:
    [call] = complete(Piece(0, "x", "", A_JSON))
    assert call.problem


def test_a_name_that_cannot_be_encoded_does_not_get_through() -> None:
    [call] = complete(Piece(0, "x", "we\ud800"))
    assert call.name == "we\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    "arguments",
    [
        '{"a": ',
        '{"a": 1} {"a": 1}',
        "[1]",
        "null",
        '"text"',
        "a=1",
        '{"a": NaN}',
        '{"a": Infinity}',
        '{"a": 1e999}',
        '{"a": "\\ud800"}',
        '{"a": "\ud800"}',
        "\ufeff{}",
        '{"a":' * (MAX_DEPTH + 1) + "1" + "}" * (MAX_DEPTH + 1),
        '{"a":' + "[" * MAX_DEPTH + "]" * MAX_DEPTH + "}",
        "[" * 100_000 + "]" * 100_000,
    ],
)
def test_what_is_not_a_json_object_is_a_problem_for_the_model(arguments: str) -> None:
    [call] = complete(Piece(0, "x", "weather", arguments))
    assert call.parameters == {}
    assert call.problem
    assert call.problem.startswith("The arguments have to be a JSON object, but ")


@pytest.mark.parametrize(
    ("arguments", "parsed"),
    [
        ("", {}),
        (" \r\n\t", {}),
        ("{}", {}),
        (' \n{"a": 1}\n', {"a": 1}),
        ('{"a": "\\ud83d\\ude00"}', {"a": "😀"}),
        ('{"a": "\ud83d\ude00"}', {"a": "😀"}),
        ('{"a": 123456789012345678901234567890}', {"a": 123456789012345678901234567890}),
        ('{"a":' * 3 + "1" + "}" * 3, {"a": {"a": {"a": 1}}}),
    ],
)
def test_a_json_object_is_taken(arguments: str, parsed: dict[str, object]) -> None:
    assert parse_arguments(arguments) == parsed


def test_arguments_may_be_nested_up_to_the_limit() -> None:
    text = '{"a":' + "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1) + "}"
    assert parse_arguments(text)
