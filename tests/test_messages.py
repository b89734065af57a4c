"""Messages reach an upstream of OpenAI's format as they came, and a round's deltas come to the right end."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import msgspec
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage, ToolMessage

from inference_trio.chat import Message
from inference_trio.deltas import Delta, ToolCallDelta
from inference_trio.errors import BrokenStreamError, UpstreamError
from inference_trio.messages import RoundAccumulator, to_langchain
from inference_trio.openai_model import CompatibleChatOpenAI
from inference_trio.protocol import Usage
from inference_trio.task import RoundFinished, ToolCall, ToolCallsRequested

CLIENT = openai.OpenAI(api_key="none", base_url="http://upstream.test/v1", http_client=httpx2.Client())


def sent(messages: list[dict[str, Any]], model: str = "m") -> list[dict[str, Any]]:
    """What goes upstream for these messages."""
    chat = CompatibleChatOpenAI(model=model, client=CLIENT.chat.completions, root_client=CLIENT, async_client=CLIENT)
    payload = chat._get_request_payload(to_langchain(messages))
    return payload["messages"]


def call(arguments: str, **fields: Any) -> dict[str, Any]:
    return {"id": "x", "type": "function", "function": {"name": "f", "arguments": arguments}, **fields}


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "developer", "content": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]},
    {"role": "user", "content": "Hello", "name": "anna"},
    {"role": "user", "content": ""},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "What is this?"},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA==", "detail": "low"}},
            {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}},
            {"type": "file", "file": {"file_id": "file-1"}},
            {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,AA=="}},
        ],
    },
    {"role": "assistant", "content": None, "tool_calls": [call('{"a":1}')]},
    {"role": "assistant", "content": "", "tool_calls": [call('{"a":1}')]},
    {"role": "assistant", "tool_calls": [call("")]},
    {
        "role": "assistant",
        "content": "Hm.",
        "tool_calls": [call('{"a": ', id="y"), call('{"a":1}'), call("[1]", id="z")],
    },
    {"role": "assistant", "content": "Hello", "reasoning_content": "They greet me."},
    {"role": "assistant", "content": "Hello", "reasoning": "They greet me.", "name": "bot"},
    {
        "role": "assistant",
        "content": "Hello",
        "reasoning_content": None,
        "tool_calls": None,
        "refusal": None,
        "audio": None,
    },
    {"role": "assistant", "content": None, "refusal": "No."},
    {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
    {"role": "assistant", "content": None, "audio": {"id": "audio_1", "data": "AA==", "expires_at": 1}},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [call('{"a":1}', extra_content={"google": {"signature": "S"}})],
    },
    {"role": "tool", "tool_call_id": "x", "content": "2"},
    {"role": "tool", "tool_call_id": "x", "content": [{"type": "text", "text": "2", "odd": 1}], "name": "f"},
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: json.dumps(message)[:80])
@pytest.mark.parametrize("model", ["m", "o1"])
def test_a_message_is_sent_as_it_came_whatever_the_model_is_called(message: dict[str, Any], model: str) -> None:
    msgspec.convert(message, Message)  # it is one that a client may send
    assert sent([message], model) == [message]


text = st.text(max_size=5)
content = text | st.lists(st.builds(lambda text: {"type": "text", "text": text}, text), max_size=2)
calls = st.lists(st.builds(call, text | st.just('{"a": 1}'), id=st.text(min_size=1, max_size=3)), max_size=3)
messages = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "developer", "user"]), "content": content}),
    st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": content | st.none()},
        optional={"tool_calls": calls, "reasoning_content": text, "name": text, "refusal": text},
    ),
    st.fixed_dictionaries({"role": st.just("tool"), "tool_call_id": text, "content": content}),
)


@settings(max_examples=200)
@given(st.lists(messages, max_size=4))
def test_any_conversation_is_sent_as_it_came(conversation: list[dict[str, Any]]) -> None:
    assert sent(conversation) == conversation


def test_other_providers_get_langchains_messages() -> None:
    system, developer, user, assistant, tool = to_langchain(
        [
            {"role": "system", "content": "S"},
            {"role": "developer", "content": "D"},
            {"role": "user", "content": [{"type": "text", "text": "U"}], "name": "anna"},
            {
                "role": "assistant",
                "content": None,
                "reasoning": "hm",
                "tool_calls": [call('{"a":1}'), call("{", id="y")],
            },
            {"role": "tool", "tool_call_id": "x", "content": "2"},
        ]
    )
    assert isinstance(system, SystemMessage)
    assert isinstance(developer, SystemMessage)
    assert developer.additional_kwargs["__openai_role__"] == "developer"
    assert isinstance(user, HumanMessage)
    assert (user.content, user.name) == ([{"type": "text", "text": "U"}], "anna")
    assert isinstance(assistant, AIMessage)
    assert (assistant.content, assistant.additional_kwargs["reasoning"]) == ("", "hm")
    assert assistant.tool_calls == [{"name": "f", "args": {"a": 1}, "id": "x", "type": "tool_call"}]
    [invalid] = assistant.invalid_tool_calls
    assert (invalid["name"], invalid["args"], invalid["id"]) == ("f", "{", "y")
    assert isinstance(tool, ToolMessage)
    assert (tool.content, tool.tool_call_id) == ("2", "x")


# Rounds


def accumulated(*deltas: Delta) -> RoundAccumulator:
    accumulator = RoundAccumulator()
    for delta in deltas:
        accumulator.add(delta)
    return accumulator


CALL = Delta(tool_calls=(ToolCallDelta(0, "x", "f", '{"a": 1}'),))


def test_a_round_of_text_is_finished_with_the_last_usage() -> None:
    deltas = [Delta(text="a", usage=Usage(7, 1, 8)), Delta(text="b", usage=Usage(7, 2, 9)), Delta(finish_reason="stop")]
    assert accumulated(*deltas).finish([]) == RoundFinished("stop", Usage(7, 2, 9))


@pytest.mark.parametrize("reason", ["tool_calls", "stop", "odd"])
def test_a_round_with_calls_asks_for_them_whatever_its_finish_reason(reason: str) -> None:
    expected = ToolCallsRequested((ToolCall("x", "f", {"a": 1}),), reason)
    assert accumulated(CALL, Delta(finish_reason=reason)).finish(["f"]) == expected


@pytest.mark.parametrize("reason", ["length", "content_filter"])
def test_calls_of_a_message_that_was_cut_off_are_dropped(reason: str) -> None:
    assert accumulated(CALL, Delta(finish_reason=reason)).finish(["f"]) == RoundFinished(reason)


def test_an_id_of_an_earlier_round_is_not_used_again() -> None:
    event = accumulated(CALL, Delta(finish_reason="stop")).finish(["f"], used_ids={"x"})
    assert isinstance(event, ToolCallsRequested)
    assert event.calls[0].id != "x"


@pytest.mark.parametrize("deltas", [(), (Delta(text="a"),), (CALL,)])
def test_without_a_finish_reason_the_stream_is_broken(deltas: tuple[Delta, ...]) -> None:
    with pytest.raises(BrokenStreamError):
        accumulated(*deltas).finish(["f"])


@pytest.mark.parametrize("reason", ["error", "insufficient_system_resource", "network_error", "abort"])
def test_a_finish_reason_that_says_the_provider_failed_is_an_upstream_error(reason: str) -> None:
    with pytest.raises(UpstreamError) as caught:
        accumulated(CALL, Delta(finish_reason=reason)).finish(["f"])
    assert caught.value.data == {"status": None, "type": reason, "retryable": True, "provider_message": ""}


def opaque(content: Any, **fields: Any) -> Delta:
    metadata = {"model_provider": "anthropic"}
    return Delta(opaque=AIMessageChunk(content=content, response_metadata=metadata, **fields))


THINKING = opaque([{"type": "thinking", "thinking": "hm", "signature": "S", "index": 0}])


def test_there_is_no_provider_message_without_anything_opaque() -> None:
    assert accumulated(Delta(text="a")).provider_message("a", []) is None
    assert (
        accumulated(opaque([]), opaque([{"type": "text", "text": "a", "index": 0}])).provider_message("a", []) is None
    )


def test_the_provider_message_keeps_the_blocks_and_takes_our_calls() -> None:
    accumulator = accumulated(
        THINKING,
        opaque([{"type": "text", "text": "I ", "index": 1}]),
        opaque([{"type": "text", "text": "look", "index": 1}]),
        opaque([{"type": "tool_use", "id": "old", "name": "f", "input": {}, "index": 2}]),
        opaque([{"type": "input_json_delta", "partial_json": '{"a": 1}', "index": 2}]),
    )
    message = accumulator.provider_message("I look", [ToolCall("new", "f", {"a": 1})])
    assert message is not None
    assert message.content == [
        {"type": "thinking", "thinking": "hm", "signature": "S", "index": 0},
        {"type": "text", "text": "I look", "index": 1},
    ]
    assert message.tool_calls == [{"name": "f", "args": {"a": 1}, "id": "new", "type": "tool_call"}]
    assert message.response_metadata["model_provider"] == "anthropic"


def test_where_the_content_is_text_the_provider_message_has_all_of_it() -> None:
    accumulator = accumulated(Delta(text="I "), opaque("look", additional_kwargs={"signatures": {"x": "S"}}))
    message = accumulator.provider_message("I look", [])
    assert message is not None
    assert (message.content, message.additional_kwargs) == ("I look", {"signatures": {"x": "S"}})
