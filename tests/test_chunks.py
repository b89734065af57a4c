"""A provider's events become chunks that LangChain takes, or one clear error."""

from __future__ import annotations

import json
from typing import Any

import pytest

from inference_trio.chunks import read_chunks
from inference_trio.errors import BrokenStreamError
from inference_trio.upstream_errors import ErrorInStreamError


def event(data: Any) -> bytes:
    return b"data: " + (data if isinstance(data, bytes) else json.dumps(data).encode()) + b"\n\n"


def says(delta: Any, finish_reason: Any = None, **fields: Any) -> bytes:
    return event({"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}], **fields})


def deltas(*reads: bytes) -> list[Any]:
    return [chunk["choices"][0]["delta"] for chunk in read_chunks(reads)]


def test_chunks_carry_text_finish_reason_usage_and_model() -> None:
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    [chunk] = read_chunks([says({"role": "odd", "content": "a"}, "stop", usage=usage, model="m")])
    assert chunk == {"choices": [{"delta": {"content": "a"}, "finish_reason": "stop"}], "usage": usage, "model": "m"}


def test_text_that_came_together_is_one_chunk_and_its_order_is_kept() -> None:
    read = says({"content": "a"}) + says({"content": "b"}) + says({"reasoning": "c"}) + says({"reasoning": "d"})
    assert deltas(read + says({"content": "e"}), says({"content": "f"})) == [
        {"content": "ab"},
        {"reasoning": "cd"},
        {"content": "e"},
        {"content": "f"},
    ]


def test_a_chunk_with_more_than_text_is_not_joined_to_others() -> None:
    both = says({"content": "b", "reasoning": "c"})
    assert len(deltas(says({"content": "a"}) + both + says({"content": "d"}, "stop") + says({"content": "e"}))) == 4


def test_nothing_is_read_after_done() -> None:
    def reads() -> Any:
        yield says({"content": "a"}) + event(b"[DONE]") + says({"content": "b"})
        pytest.fail("read on after [DONE]")

    assert next(iter(read_chunks(reads())))["choices"][0]["delta"] == {"content": "a"}


@pytest.mark.parametrize("chunk", [{}, {"choices": None}, {"choices": []}, {"choices": [], "error": None}])
def test_a_chunk_without_choices_says_nothing(chunk: dict[str, Any]) -> None:
    assert list(read_chunks([event(chunk)])) == [{"choices": [], "usage": None}]


@pytest.mark.parametrize(
    "delta",
    [
        None,
        {},
        {"content": None},
        {"content": ""},
        {"tool_calls": None},
        {"tool_calls": []},
        {"reasoning_content": None},
        {"reasoning": {"effort": "low"}},
    ],
)
def test_a_delta_may_be_empty(delta: Any) -> None:
    assert deltas(says(delta)) == [{}]


def test_a_choice_need_not_have_a_delta() -> None:
    assert deltas(event({"choices": [{}]})) == [{}]


def test_a_finish_reason_may_be_empty() -> None:
    assert deltas(says({"content": "a"}, "") + says({"content": "b"}, None)) == [{"content": "ab"}]


def test_a_refusal_is_text() -> None:
    assert deltas(says({"content": None, "refusal": "No."})) == [{"content": "No."}]


def test_content_may_be_a_list() -> None:
    parts = [{"type": "text", "text": "a"}]
    assert deltas(says({"content": parts}) + says({"content": parts})) == [{"content": parts}] * 2


def test_reasoning_under_both_names_counts_once() -> None:
    assert deltas(says({"reasoning": "a", "reasoning_content": "a"})) == [{"reasoning_content": "a"}]


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ({}, (None, None, None, "")),
        ({"function": None}, (None, None, None, "")),
        ({"index": "1", "id": 5, "function": {"name": "f", "arguments": None}}, (1, "5", "f", "")),
        ({"index": "x", "id": "", "function": {"arguments": {"a": 1}}}, (None, "", None, '{"a":1}')),
        ({"index": 0, "id": "x", "function": {"arguments": {}}}, (0, "x", None, "{}")),
        ({"index": 0, "id": "x", "function": {"arguments": '{"a'}}, (0, "x", None, '{"a')),
    ],
)
def test_tool_calls_are_made_fit_for_langchain(call: dict[str, Any], expected: tuple[Any, ...]) -> None:
    [delta] = deltas(says({"tool_calls": [call]}))
    [made] = delta["tool_calls"]
    assert (made["index"], made["id"], made["function"]["name"], made["function"]["arguments"]) == expected


@pytest.mark.parametrize(
    ("usage", "total"),
    [
        ({"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10, "details": None}, 10),
        ({"prompt_tokens": 7, "completion_tokens": 3}, 10),
        ({"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 0}, 0),
        ({"prompt_tokens": 7, "total_tokens": 7}, None),
        ({"completion_tokens": 7, "prompt_tokens": None}, None),
        ({}, None),
        (None, None),
    ],
)
def test_usage_is_complete_or_not_there(usage: Any, total: int | None) -> None:
    in_chunk = event({"choices": [], "usage": usage})
    in_choice = event({"choices": [{"delta": {}, "usage": usage}]})
    for chunk in read_chunks([in_chunk, in_choice]):
        assert (chunk["usage"] or {}).get("total_tokens") == total


@pytest.mark.parametrize(
    "bad",
    [
        b"null",
        b"[]",
        b'"text"',
        b"{nonsense",
        b'{"choices": ',
        b'{"choices": "x"}',
        b'{"choices": [null]}',
        b'{"choices": [{"delta": "x"}]}',
        b'{"choices": [{"delta": {"content": 1}}]}',
        b'{"choices": [{"delta": {"tool_calls": {}}}]}',
        b'{"choices": [{"delta": {"content": "\\ud800"}, "logprobs": NaN}]}',
        b'{"choices": "\xff\xfe"}',
        b"[" * 100_000 + b"]" * 100_000,
    ],
)
def test_what_is_no_chunk_breaks_the_stream_after_all_before_it_is_through(bad: bytes) -> None:
    chunks = read_chunks([says({"content": "a"}) + says({"content": "b"}) + event(bad)])
    assert next(chunks)["choices"][0]["delta"] == {"content": "ab"}
    with pytest.raises(BrokenStreamError):
        next(chunks)


def test_half_a_surrogate_pair_is_let_through_to_be_mended_later() -> None:
    assert deltas(event(b'{"choices": [{"delta": {"content": "a\\ud83d"}}]}')) == [{"content": "a\ud83d"}]


def test_bytes_that_are_not_utf8_are_replaced() -> None:
    assert deltas(event(b'{"choices": [{"delta": {"content": "a\xff"}}]}')) == [{"content": "a\ufffd"}]


@pytest.mark.parametrize(
    ("chunk", "error"),
    [
        ({"error": {"message": "down"}}, {"message": "down"}),
        ({"error": "down", "choices": None}, "down"),
        ({"error": {"code": 429}, "choices": [{"delta": {}, "finish_reason": "error"}]}, {"code": 429}),
        ({"object": "error", "message": "down"}, {"object": "error", "message": "down"}),
    ],
)
def test_an_error_in_the_stream_is_raised_as_the_provider_gave_it(chunk: dict[str, Any], error: Any) -> None:
    chunks = read_chunks([says({"content": "a"}) + event(chunk)])
    assert next(chunks)
    with pytest.raises(ErrorInStreamError) as caught:
        next(chunks)
    assert caught.value.error == error


def test_an_error_may_come_in_place_of_the_stream() -> None:
    with pytest.raises(ErrorInStreamError) as caught:
        list(read_chunks([b'{"error":\n {"message": "down"}}']))
    assert caught.value.error == {"message": "down"}


@pytest.mark.parametrize(
    "answer", [b"", b" \n", b"<html>Welcome</html>", b'{"choices": []}', b"[]", b": comment\n\n", b"[" * 100_000]
)
def test_an_answer_without_events_is_broken(answer: bytes) -> None:
    with pytest.raises(BrokenStreamError, match="empty" if not answer.strip() else "not a stream of events"):
        list(read_chunks([answer]))
