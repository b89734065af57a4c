"""Chunks of any provider become deltas, and no surrogate gets through."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.messages import AIMessageChunk

from inference_trio.deltas import Delta, ToolCallDelta, delta_of, mended
from inference_trio.protocol import Usage


def chunk(content: Any = "", **fields: Any) -> AIMessageChunk:
    return AIMessageChunk(content=content, **fields)


def test_text_is_text() -> None:
    assert delta_of(chunk("Hello"), {}) == Delta(text="Hello")


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_reasoning_beside_the_text_keeps_the_name_of_its_field(field: str) -> None:
    delta = delta_of(chunk(additional_kwargs={field: "hm"}), {})
    assert (delta.reasoning, delta.reasoning_field, delta.opaque) == ("hm", field, None)


def test_anthropics_blocks_are_text_and_reasoning_and_kept_whole() -> None:
    said = chunk(
        [
            {"type": "thinking", "thinking": "hm", "signature": "S", "index": 0},
            {"type": "text", "text": "Hello", "index": 1},
        ],
        response_metadata={"model_provider": "anthropic"},
    )
    delta = delta_of(said, {})
    assert (delta.text, delta.reasoning, delta.reasoning_field) == ("Hello", "hm", "reasoning_content")
    assert delta.opaque is said


def test_blocks_of_the_responses_api_are_text_reasoning_and_refusals() -> None:
    said = chunk(
        [
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm", "index": 0}], "index": 0},
            {"type": "text", "text": "Hello ", "index": 1},
            {"type": "refusal", "refusal": "No."},
        ],
        response_metadata={"model_provider": "openai"},
    )
    delta = delta_of(said, {})
    assert (delta.text, delta.reasoning) == ("Hello No.", "hm")


def test_what_has_no_field_of_its_own_is_opaque() -> None:
    said = chunk("Hello", additional_kwargs={"signatures": ["S"]})
    assert delta_of(said, {}).opaque is said


def test_tool_call_chunks_keep_what_came_and_leave_the_rest_blank() -> None:
    said = chunk(
        tool_call_chunks=[
            {"name": "f", "args": "{", "id": "x", "index": 0},
            {"name": None, "args": None, "id": None, "index": None},
        ]
    )
    assert delta_of(said, {}).tool_calls == (ToolCallDelta(0, "x", "f", "{"), ToolCallDelta())


def test_calls_of_providers_that_send_them_whole_come_as_one_piece() -> None:
    said = chunk(tool_calls=[{"name": "f", "args": {"a": 1}, "id": "x"}])
    assert delta_of(said, {}).tool_calls == (ToolCallDelta(None, "x", "f", '{"a": 1}'),)


def test_usage_is_taken_over() -> None:
    said = chunk(usage_metadata={"input_tokens": 7, "output_tokens": 3, "total_tokens": 10})
    assert delta_of(said, {}).usage == Usage(7, 3, 10)


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({}, None),
        ({"finish_reason": None}, None),
        ({"finish_reason": "stop"}, "stop"),
        ({"finish_reason": "STOP"}, "stop"),
        ({"finish_reason": "MAX_TOKENS"}, "length"),
        ({"finish_reason": "SAFETY"}, "content_filter"),
        ({"finish_reason": "insufficient_system_resource"}, "insufficient_system_resource"),
        ({"finish_reason": "Odd"}, "Odd"),
        ({"stop_reason": "tool_use"}, "tool_calls"),
        ({"stop_reason": "end_turn"}, "stop"),
        ({"stop_reason": "refusal"}, "content_filter"),
        ({"done_reason": "length"}, "length"),
        ({"stopReason": "guardrail_intervened"}, "content_filter"),
        ({"status": "completed"}, "stop"),
        ({"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}, "length"),
        ({"status": "incomplete", "incomplete_details": {"reason": "content_filter"}}, "content_filter"),
        ({"status": "incomplete", "incomplete_details": None}, None),
        ({"status": "failed"}, "error"),
        ({"status": "in_progress"}, None),
        ({"status": 200}, None),
    ],
)
def test_finish_reasons_are_in_openais_words(metadata: dict[str, Any], reason: str | None) -> None:
    assert delta_of(chunk(), metadata).finish_reason == reason
    assert delta_of(chunk(response_metadata=metadata), {}).finish_reason == reason


def texts(*pieces: str) -> list[str]:
    return [delta.text for delta in mended(delta_of(chunk(piece), {}) for piece in pieces)]


def test_a_surrogate_pair_cut_in_two_comes_out_whole() -> None:
    assert texts("a\ud83d", "\ude00b") == ["a", "😀b"]


def test_half_a_pair_waits_while_other_things_come() -> None:
    said = [chunk("\ud83d"), chunk(additional_kwargs={"reasoning": "hm"}), chunk("\ude00")]
    deltas = list(mended(delta_of(message, {}) for message in said))
    assert [delta.text for delta in deltas] == ["", "", "😀"]
    assert [delta.reasoning for delta in deltas] == ["", "hm", ""]


def test_lone_surrogates_are_replaced() -> None:
    assert texts("a\ud83db", "\ude00", "c") == ["a\ufffdb", "\ufffd", "c"]


def test_half_a_pair_at_the_end_is_not_swallowed() -> None:
    assert texts("a\ud83d") == ["a", "\ufffd"]


def test_reasoning_is_mended_as_well() -> None:
    said = [chunk(additional_kwargs={"reasoning": half}) for half in ("\ud83d", "\ude00\ud83d")]
    assert [delta.reasoning for delta in mended(delta_of(message, {}) for message in said)] == ["", "😀", "\ufffd"]


@settings(max_examples=200)
@given(st.lists(st.text(st.characters(), max_size=4), max_size=6))
def test_whatever_comes_in_what_comes_out_can_be_encoded_and_is_the_same_text(pieces: list[str]) -> None:
    expected = "".join(pieces).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert "".join(texts(*pieces)) == expected
