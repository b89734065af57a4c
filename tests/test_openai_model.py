"""What goes to an endpoint of OpenAI's format and what comes back, nothing renamed, rerouted or lost on the way.

Here the model runs in the test's own thread, on a transport in memory. The tests also hold the names of LangChain
and OpenAI's client that are not public, or not promised: they fail when an upgrade changes one.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from typing import Any

import attrs
import httpx2
import openai
import pytest
from langchain_core.messages import AIMessageChunk
from langchain_core.tracers.context import collect_runs
from langchain_openai import ChatOpenAI
from langchain_openai.chat_models.base import BaseChatOpenAI

from inference_trio import openai_model
from inference_trio.chunks import Plain, read_chunks
from inference_trio.deltas import Delta, ToolCallDelta, delta_of, mended
from inference_trio.errors import BrokenStreamError, ConfigurationError, InvalidParamsError
from inference_trio.messages import ModelRequest, to_langchain
from inference_trio.openai_model import OpenAISource, open_openai
from inference_trio.protocol import Usage
from inference_trio.settings import Settings
from inference_trio.variables import Secret

KEY = "sk-0123456789"
HELLO = to_langchain([{"role": "user", "content": "Hello"}])
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


def stream(*events: Any) -> bytes:
    return b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + b"data: [DONE]\n\n"


def says(finish_reason: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}


REPLY = stream(says(content="Hello"), says("stop"))


@attrs.define
class Endpoint(httpx2.BaseTransport):
    """Answers every request with the same bytes, and keeps the requests."""

    answer: bytes = REPLY
    status: int = 200
    requests: list[httpx2.Request] = attrs.field(factory=list)
    response: httpx2.Response | None = None

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        headers = {"Content-Type": "text/event-stream"}
        self.response = httpx2.Response(self.status, headers=headers, content=self.answer, request=request)
        return self.response

    @property
    def body(self) -> dict[str, Any]:
        body: dict[str, Any] = json.loads(self.requests[-1].content)
        return body


def source(endpoint: Endpoint, **settings: Any) -> OpenAISource:
    chosen = {"base_url": "http://upstream.test/v1", "api_key": Secret(KEY), "model_name": "m"} | settings
    made = Settings(**chosen)
    return OpenAISource(
        openai_model._chat_openai(made, openai_model._openai_client(made, endpoint)), httpx2.AsyncHTTPTransport()
    )


def deltas(endpoint: Endpoint, request: ModelRequest | None = None, **settings: Any) -> list[Delta]:
    request = request or ModelRequest(HELLO)
    return [delta for delta in mended(source(endpoint, **settings).deltas(request)) if delta]


def body(request: ModelRequest | None = None, **settings: Any) -> dict[str, Any]:
    """What goes upstream."""
    deltas(endpoint := Endpoint(), request, **settings)
    return endpoint.body


# Sending


def test_a_request_has_nothing_in_it_that_nobody_asked_for() -> None:
    assert body(stream_usage=False) == {
        "messages": [{"role": "user", "content": "Hello"}],
        "model": "m",
        "stream": True,
    }


def test_usage_is_asked_for_if_the_settings_say_so() -> None:
    assert body()["stream_options"] == {"include_usage": True}
    assert "stream_options" not in body(stream_usage=False)


PARAMETERS = {
    "max_tokens": 5,
    "temperature": 0.5,
    "top_p": 0.5,
    "stop": ["x"],
    "seed": 1,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "parallel_tool_calls": False,
    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
    "reasoning_effort": "low",
    "logit_bias": {"5": -100},
}


@pytest.mark.parametrize("model", ["m", "o1", "o3-mini", "gpt-5", "gpt-5-pro", "gpt-6", "codex-mini"])
@pytest.mark.parametrize("base_url", ["http://upstream.test/v1", "https://api.deepseek.com/v1"])
def test_parameters_and_tools_are_sent_as_they_are_whatever_the_model_is_called(model: str, base_url: str) -> None:
    request = ModelRequest(HELLO, [TOOL], PARAMETERS)
    deltas(endpoint := Endpoint(), request, model_name=model, base_url=base_url, stream_usage=False)
    assert str(endpoint.requests[0].url) == f"{base_url}/chat/completions"
    messages = [{"role": "user", "content": "Hello"}]
    assert endpoint.body == {"messages": messages, "model": model, "stream": True, "tools": [TOOL], **PARAMETERS}


@pytest.mark.parametrize("host", ["api.openai.com", "eu.api.openai.com"])
def test_openais_own_endpoint_gets_its_own_name_for_max_tokens(host: str) -> None:
    sent = body(ModelRequest(HELLO, parameters={"max_tokens": 5}), base_url=f"https://{host}/v1")
    assert (sent.get("max_completion_tokens"), "max_tokens" in sent) == (5, False)


def test_a_request_may_name_another_model_and_one_stop_sequence() -> None:
    sent = body(ModelRequest(HELLO, parameters={"stop": "x"}, model="other"))
    assert (sent["model"], sent["stop"]) == ("other", "x")


def test_messages_are_sent_as_they_came() -> None:
    said = {"role": "assistant", "content": None, "reasoning_content": "hm", "refusal": None, "odd": {"a": 1}}
    assert body(ModelRequest(to_langchain([said])))["messages"] == [said]


def test_the_environment_does_not_reroute(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_BASE_URL", "OPENAI_API_BASE", "OPENAI_PROXY", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://elsewhere.test:1")
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_ORGANIZATION", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "from-the-environment")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "Authorization: from-the-environment")
    monkeypatch.setenv("LANGSMITH_GATEWAY", "true")
    monkeypatch.setenv("LC_OUTPUT_VERSION", "responses/v1")
    deltas(endpoint := Endpoint())
    [request] = endpoint.requests
    assert str(request.url) == "http://upstream.test/v1/chat/completions"
    assert request.headers["Authorization"] == f"Bearer {KEY}"
    assert not [value for value in request.headers.values() if "from-the-environment" in value]


def test_without_a_key_no_other_one_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    deltas(endpoint := Endpoint(), api_key=None)
    assert endpoint.requests[0].headers["Authorization"] == "Bearer none"


def test_the_model_object_does_not_know_the_key() -> None:
    model = source(Endpoint())._model
    assert KEY not in f"{model!r}{model.model_dump()}{model.to_json()}"


def test_only_connecting_has_a_time_limit() -> None:
    deltas(endpoint := Endpoint(), connect_timeout=3.0)
    limits = {"connect": 3.0, "read": None, "write": None, "pool": None}
    assert endpoint.requests[0].extensions["timeout"] == limits


def test_the_client_does_not_try_again() -> None:
    with pytest.raises(openai.InternalServerError):
        deltas(endpoint := Endpoint(b'{"error": {"message": "down"}}', status=500))
    assert len(endpoint.requests) == 1


def test_without_an_endpoint_there_is_no_model() -> None:
    with pytest.raises(ConfigurationError, match="LLM_BASE_URL"):
        open_openai(Settings(provider="local"))


# Receiving


def test_everything_in_a_stream_arrives() -> None:
    usage = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}}
    call = {"id": "x", "function": {"name": "f", "arguments": {"a": 1}}}
    events = [says(reasoning="hm"), says(content="Hello"), says(tool_calls=[call]), says("tool_calls"), usage]
    assert deltas(Endpoint(stream(*events))) == [
        Delta(reasoning="hm", reasoning_field="reasoning"),
        Delta(text="Hello"),
        Delta(tool_calls=(ToolCallDelta(None, "x", "f", '{"a":1}'),)),
        Delta(finish_reason="tool_calls"),
        Delta(usage=Usage(7, 3, 10)),
    ]


def test_usage_in_every_chunk_is_not_added_up() -> None:
    events = [
        {**says(content=text), "usage": {"prompt_tokens": 7, "completion_tokens": count}}
        for count, text in enumerate("abc", start=1)
    ]
    assert [delta.usage for delta in deltas(Endpoint(stream(*events)))] == [Usage(7, n, 7 + n) for n in (1, 2, 3)]


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_reasoning_arrives_under_its_name(field: str) -> None:
    [delta] = deltas(Endpoint(stream(says(**{field: "hm"}))))
    assert delta == Delta(reasoning="hm", reasoning_field=field)


def test_a_structured_answer_streams_like_any_other() -> None:
    request = ModelRequest(HELLO, parameters={"response_format": {"type": "json_object"}})
    answer = stream(says(content="not "), says(content="JSON"), says("stop"))
    assert deltas(Endpoint(answer), request) == [Delta(text="not JSON"), Delta(finish_reason="stop")]


def test_leaving_the_stream_closes_the_response() -> None:
    chunks = source(endpoint := Endpoint()).deltas(ModelRequest(HELLO))
    next(chunks)
    assert isinstance(chunks, Iterator)
    chunks.close()  # type: ignore[attr-defined]
    assert endpoint.response is not None
    assert endpoint.response.is_closed


def test_those_who_trace_see_the_run_and_the_stream_is_the_same() -> None:
    with collect_runs() as runs:
        observed = deltas(Endpoint())
    assert [delta for delta in observed if delta != Delta()] == deltas(Endpoint())
    [run] = runs.traced_runs
    assert run.outputs is not None
    assert run.outputs["generations"][0][0]["text"] == "Hello"
    assert KEY not in str(run.serialized) + str(run.extra)


def test_without_anybody_to_call_back_no_chunk_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ChatOpenAI, "stream", lambda *_: pytest.fail("the public stream was used"))
    assert deltas(Endpoint())


def test_an_empty_stream_is_broken_for_those_who_trace_too() -> None:
    with collect_runs(), pytest.raises(BrokenStreamError):
        deltas(Endpoint(b""))


# OpenAI's Responses API

ITEM = {"type": "function_call", "id": "fc_1", "call_id": "x", "name": "f", "arguments": "", "status": "in_progress"}
RESPONSE = {
    "id": "resp_1",
    "object": "response",
    "created_at": 1,
    "model": "m",
    "status": "completed",
    "output": [],
    "parallel_tool_calls": True,
    "tool_choice": "auto",
    "tools": [],
    "usage": {
        "input_tokens": 7,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 3,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 10,
    },
}


def response_stream(**final: Any) -> bytes:
    events: list[dict[str, Any]] = [
        {"type": "response.created", "response": {**RESPONSE, "status": "in_progress", "usage": None}},
        {
            "type": "response.output_text.delta",
            "item_id": "msg_1",
            "output_index": 0,
            "content_index": 0,
            "delta": "Hello",
            "logprobs": [],
        },
        {"type": "response.output_item.added", "output_index": 1, "item": ITEM},
        {"type": "response.function_call_arguments.delta", "item_id": "fc_1", "output_index": 1, "delta": '{"a": 1}'},
        {"type": f"response.{final.get('status', 'completed')}", "response": {**RESPONSE, **final}},
    ]
    lines = [
        f"event: {event['type']}\ndata: {json.dumps(event | {'sequence_number': i})}\n\n"
        for i, event in enumerate(events)
    ]
    return "".join(lines).encode()


def test_the_responses_api_is_used_if_the_settings_say_so() -> None:
    endpoint = Endpoint(response_stream())
    request = ModelRequest(HELLO, [TOOL], {"max_tokens": 50})
    said = deltas(endpoint, request, responses_api=True)
    assert endpoint.requests[0].url.path == "/v1/responses"
    assert endpoint.body["max_output_tokens"] == 50
    assert "".join(delta.text for delta in said) == "Hello"
    assert [piece for delta in said for piece in delta.tool_calls] == [
        ToolCallDelta(1, "x", "f"),
        ToolCallDelta(1, "", "", '{"a": 1}'),
    ]
    assert (said[-1].finish_reason, said[-1].usage) == ("stop", Usage(7, 3, 10))


def test_an_incomplete_response_says_why() -> None:
    answer = response_stream(status="incomplete", incomplete_details={"reason": "max_output_tokens"})
    assert deltas(Endpoint(answer), responses_api=True)[-1].finish_reason == "length"


@pytest.mark.parametrize("name", ["stop", "seed", "presence_penalty", "frequency_penalty", "logit_bias"])
def test_what_the_responses_api_does_not_take_is_refused(name: str) -> None:
    request = ModelRequest(HELLO, parameters={name: PARAMETERS[name]})
    with pytest.raises(InvalidParamsError, match=f"`params.{name}`"):
        deltas(Endpoint(), request, responses_api=True)


# What is not promised


@pytest.mark.parametrize("field", ["content", "reasoning_content", "reasoning"])
def test_what_is_passed_langchain_by_is_what_it_would_make_of_it(field: str) -> None:
    [chunk] = read_chunks([stream(says(**{field: "Hel"}), says(**{field: "lo"}))])
    assert isinstance(chunk, Plain)
    made = source(Endpoint())._model._convert_chunk_to_generation_chunk(dict(chunk), AIMessageChunk, {})
    assert made
    assert isinstance(made.message, AIMessageChunk)
    assert delta_of(made.message, made.generation_info or {}) == chunk.delta
    assert (chunk.delta.text or chunk.delta.reasoning) == "Hello"


def test_text_is_passed_langchain_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BaseChatOpenAI, "_convert_chunk_to_generation_chunk", None)
    assert [delta.text for delta in deltas(Endpoint(stream(says(content="Hello"))))] == ["Hello"]


def test_langchain_may_ask_more_of_what_is_passed_by_its_conversion() -> None:
    passed = openai_model._Passed(Delta("hi"))
    assert (passed.text, passed.type, passed.message.content) == ("", "ChatGenerationChunk", "")
    with pytest.raises(AttributeError):
        passed.no_such_thing  # noqa: B018


def test_the_hooks_of_langchain_have_the_shape_we_override() -> None:
    overridden = openai_model.CompatibleChatOpenAI
    for name in ("_get_request_payload", "_convert_chunk_to_generation_chunk"):
        theirs, own = getattr(BaseChatOpenAI, name), getattr(overridden, name)
        assert list(inspect.signature(theirs).parameters) == list(inspect.signature(own).parameters)
    assert callable(ChatOpenAI._stream)
    assert callable(ChatOpenAI._convert_input)


@pytest.mark.parametrize("name", ["client", "root_client", "async_client", "use_responses_api", "output_version"])
def test_the_fields_of_chat_openai_that_we_set_are_there(name: str) -> None:
    assert name in ChatOpenAI.model_fields
