"""Providers with a format of their own, shown with LangChain's package for Anthropic on a loopback socket."""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import AsyncIterator
from typing import Any

import attrs
import pytest
import trio
from langchain_core.language_models import FakeListChatModel

from inference_trio import providers
from inference_trio.deltas import Delta
from inference_trio.errors import (
    ConfigurationError,
    InferenceError,
    InvalidParamsError,
    RateLimitedError,
    UpstreamError,
)
from inference_trio.messages import ModelRequest, RoundAccumulator, to_langchain
from inference_trio.model import ChatModel, build_model
from inference_trio.protocol import Usage
from inference_trio.providers import open_provider
from inference_trio.settings import Settings
from inference_trio.task import RoundFinished, ToolCall, ToolCallsRequested
from inference_trio.variables import Secret

pytest.importorskip("langchain_anthropic")

KEY = "sk-ant-0123456789"
HELLO = to_langchain([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}])
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def event(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()


def block(index: int, start: dict[str, Any], *deltas: dict[str, Any]) -> bytes:
    pieces = [event("content_block_delta", index=index, delta=delta) for delta in deltas]
    begin = event("content_block_start", index=index, content_block=start)
    return begin + b"".join(pieces) + event("content_block_stop", index=index)


def answer(*blocks: bytes, stop_reason: str) -> bytes:
    message = {"id": "msg_1", "type": "message", "role": "assistant", "model": "claude", "content": []}
    usage = {"input_tokens": 7, "output_tokens": 1}
    start = event("message_start", message={**message, "stop_reason": None, "stop_sequence": None, "usage": usage})
    delta = {"stop_reason": stop_reason, "stop_sequence": None}
    end = event("message_delta", delta=delta, usage={"input_tokens": 7, "output_tokens": 3})
    return start + b"".join(blocks) + end + event("message_stop")


def text(index: int, *pieces: str) -> bytes:
    return block(index, {"type": "text", "text": ""}, *({"type": "text_delta", "text": piece} for piece in pieces))


THINKING = block(
    0,
    {"type": "thinking", "thinking": "", "signature": ""},
    {"type": "thinking_delta", "thinking": "They ask "},
    {"type": "thinking_delta", "thinking": "for weather."},
    {"type": "signature_delta", "signature": "S"},
)
TOOL_USE = block(
    2,
    {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {}},
    {"type": "input_json_delta", "partial_json": '{"city":'},
    {"type": "input_json_delta", "partial_json": ' "Berlin"}'},
)
ASKS = answer(THINKING, text(1, "Let me ", "see."), TOOL_USE, stop_reason="tool_use")
SAYS = answer(text(0, "Sun", "ny"), stop_reason="end_turn")


@attrs.define
class Endpoint:
    """Gives its answers in order, and keeps the bodies of the requests."""

    answers: list[tuple[int, bytes]]
    bodies: list[dict[str, Any]] = attrs.field(factory=list)

    async def serve(self, stream: trio.SocketStream) -> None:
        request = b""
        while b"\r\n\r\n" not in request:
            request += await stream.receive_some()
        head, _, body = request.partition(b"\r\n\r\n")
        [length] = [line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")]
        while len(body) < int(length):
            body += await stream.receive_some()
        self.bodies.append(json.loads(body))
        status, content = self.answers.pop(0)
        kind = b"text/event-stream" if status == 200 else b"application/json"
        fields = b"Content-Type: %b\r\nRetry-After: 3\r\nConnection: close\r\nContent-Length: %d" % (kind, len(content))
        await stream.send_all(b"HTTP/1.1 %d X\r\n%b\r\n\r\n%b" % (status, fields, content))


@contextlib.asynccontextmanager
async def anthropic(*answers: bytes | tuple[int, bytes]) -> AsyncIterator[tuple[ChatModel, Endpoint]]:
    endpoint = Endpoint([(200, each) if isinstance(each, bytes) else each for each in answers])
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, endpoint.serve, listeners)
        port = listeners[0].socket.getsockname()[1]
        with trio.fail_after(30):
            yield build_model(settings(base_url=f"http://127.0.0.1:{port}")), endpoint
        nursery.cancel_scope.cancel()


def settings(**fields: Any) -> Settings:
    return Settings(**{"provider": "anthropic", "model_name": "claude", "api_key": Secret(KEY)} | fields)


async def call(model: ChatModel, request: ModelRequest) -> tuple[list[Delta], RoundAccumulator]:
    deltas: list[Delta] = []
    accumulator = RoundAccumulator()

    async def receive(delta: Delta) -> None:
        deltas.append(delta)
        accumulator.add(delta)

    await model.stream(request, receive)
    return deltas, accumulator


async def test_text_thinking_and_tools_arrive_and_go_back_as_the_provider_wants_them() -> None:
    async with anthropic(ASKS, SAYS) as (model, endpoint):
        deltas, first = await call(model, ModelRequest(HELLO, [WEATHER]))
        assert "".join(delta.text for delta in deltas) == "Let me see."
        assert "".join(delta.reasoning for delta in deltas) == "They ask for weather."
        event = first.finish(["weather"])
        expected = ToolCall("toolu_1", "weather", {"city": "Berlin"})
        assert event == ToolCallsRequested((expected,), "tool_calls", Usage(7, 3, 10))

        said = first.provider_message("Let me see.", [expected])
        assert said is not None
        result = to_langchain([{"role": "tool", "tool_call_id": "toolu_1", "content": "sunny"}])
        deltas, second = await call(model, ModelRequest([*HELLO, said, *result], [WEATHER]))
        assert "".join(delta.text for delta in deltas) == "Sunny"
        assert second.finish(["weather"]) == RoundFinished("stop", Usage(7, 3, 10))
        assert second.provider_message("Sunny", []) is None
        await model.aclose()

    assert endpoint.bodies[1]["system"] == "Be brief."
    _, assistant, user = endpoint.bodies[1]["messages"]
    assert assistant["content"] == [
        {"type": "thinking", "thinking": "They ask for weather.", "signature": "S"},
        {"type": "text", "text": "Let me see."},
        {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Berlin"}},
    ]
    assert user["content"][0]["tool_use_id"] == "toolu_1"


async def test_without_tools_text_is_plain() -> None:
    async with anthropic(SAYS) as (model, _):
        deltas, _ = await call(model, ModelRequest(HELLO))
    assert [delta.text for delta in deltas if delta.text] == ["Sun", "ny"]
    assert all(delta.opaque is None for delta in deltas)


@pytest.mark.parametrize(
    ("parameters", "sent"),
    [
        ({"max_tokens": 5, "temperature": 0.5, "top_p": 0.5}, {"max_tokens": 5, "temperature": 0.5, "top_p": 0.5}),
        ({"stop": "x"}, {"stop_sequences": ["x"]}),
        ({"stop": ["x", "y"]}, {"stop_sequences": ["x", "y"]}),
        ({"tool_choice": "auto"}, {"tool_choice": None}),
        ({"tool_choice": "none"}, {"tool_choice": None, "tools": None}),
        ({"tool_choice": "required"}, {"tool_choice": {"type": "any"}}),
        (
            {"tool_choice": {"type": "function", "function": {"name": "weather"}}},
            {"tool_choice": {"type": "tool", "name": "weather"}},
        ),
        ({"parallel_tool_calls": False}, {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}),
    ],
)
async def test_parameters_are_sent_under_the_providers_names(parameters: dict[str, Any], sent: dict[str, Any]) -> None:
    async with anthropic(SAYS) as (model, endpoint):
        await call(model, ModelRequest(HELLO, [WEATHER], parameters))
    assert {name: endpoint.bodies[0].get(name) for name in sent} == sent


async def test_a_request_may_name_another_model() -> None:
    async with anthropic(SAYS, SAYS) as (model, endpoint):
        await call(model, ModelRequest(HELLO, model="other"))
        await call(model, ModelRequest(HELLO, model="claude"))
    assert [body["model"] for body in endpoint.bodies] == ["other", "claude"]


@pytest.mark.parametrize("name", ["seed", "logit_bias", "response_format", "presence_penalty"])
async def test_a_parameter_that_the_provider_does_not_take_is_refused(name: str) -> None:
    async with anthropic() as (model, _):
        with pytest.raises(InvalidParamsError, match=f"`params.{name}`"):
            await call(model, ModelRequest(HELLO, parameters={name: 1}))


async def test_a_value_that_the_provider_does_not_take_is_refused() -> None:
    async with anthropic() as (model, _):
        with pytest.raises(InvalidParamsError, match="effort"):
            await call(model, ModelRequest(HELLO, parameters={"reasoning_effort": "odd"}))


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ((429, b'{"error": {"type": "rate_limit_error", "message": "slow"}}'), RateLimitedError("", retry_after=3.0)),
        (
            (401, b'{"error": {"type": "authentication_error", "message": "bad sk-ant-0123456789"}}'),
            UpstreamError(
                "",
                status=401,
                type="authentication_error",
                retryable=False,
                provider_message="bad [hidden]",
                retry_after=3.0,
            ),
        ),
        (
            (200, event("error", error={"type": "overloaded_error", "message": "busy"})),
            UpstreamError(
                "", status=None, type="overloaded_error", retryable=True, provider_message="busy", retry_after=3.0
            ),
        ),
    ],
)
async def test_errors_of_the_provider_are_errors_of_ours(given: tuple[int, bytes], error: InferenceError) -> None:
    async with anthropic(given) as (model, endpoint):
        with pytest.raises(type(error)) as caught:
            await call(model, ModelRequest(HELLO))
    assert caught.value.data == error.data
    assert len(endpoint.bodies) == 1


def test_a_silent_provider_cannot_keep_a_thread_for_ever_and_retries_are_not_its_own() -> None:
    made: Any = open_provider(settings(first_token_timeout=5.0, token_timeout=7.0))._model
    assert (made.default_request_timeout, made.max_retries) == (7.0, 0)


@pytest.mark.parametrize(
    ("provider", "packages"),
    [("google_genai", "langchain langchain-google-genai"), ("bedrock", "langchain langchain-aws")],
)
def test_a_missing_package_is_named(provider: str, packages: str) -> None:
    with pytest.raises(ConfigurationError, match=f"pip install {packages}$"):
        open_provider(settings(provider=provider))


def test_so_is_langchain_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def import_module(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named '{name}'")

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(ConfigurationError, match=r"pip install langchain langchain-google-genai$"):
        open_provider(settings(provider="google_genai"))


def test_a_provider_that_langchain_does_not_know_is_a_wrong_setting() -> None:
    with pytest.raises(ConfigurationError, match="LLM_PROVIDER=nobody"):
        open_provider(settings(provider="nobody"))


def test_a_wrong_setting_is_shown_without_its_value() -> None:
    with pytest.raises(ConfigurationError, match="timeout") as caught:
        open_provider(settings(token_timeout="soon", first_token_timeout="now"))
    assert "soon" not in str(caught.value)


class OtherNames(FakeListChatModel):
    """A class with other names for things, as some have, and without parallel calls."""

    num_predict: int | None = None
    client_kwargs: dict[str, Any] = {}  # noqa: RUF012 - a pydantic field

    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        return self.bind(**kwargs)


def test_other_classes_may_have_other_names(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def init_chat_model(model: str, model_provider: str, **arguments: Any) -> OtherNames:
        made.append(arguments)
        return OtherNames(responses=["Hi"])

    monkeypatch.setattr("langchain.chat_models.init_chat_model", init_chat_model)
    source = open_provider(settings(first_token_timeout=5.0, token_timeout=7.0, api_key=None))
    answer = source.deltas(ModelRequest(HELLO, [WEATHER], {"max_tokens": 3}))
    assert [delta.text for delta in answer][:2] == ["H", "i"]
    assert made == [{}, {"client_kwargs": {"timeout": 7.0}}, {"client_kwargs": {"timeout": 7.0}, "num_predict": 3}]
    with pytest.raises(InvalidParamsError, match="parallel_tool_calls"):
        list(source.deltas(ModelRequest(HELLO, [WEATHER], {"parallel_tool_calls": True})))


def test_usage_that_comes_in_parts_is_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counts(FakeListChatModel):
        def _stream(self, *args: Any, **kwargs: Any) -> Any:
            for chunk in super()._stream(*args, **kwargs):
                chunk.message.usage_metadata = {"input_tokens": 0, "output_tokens": 1, "total_tokens": 1}
                yield chunk

    source = providers.ProviderSource("m", lambda **_: pytest.fail("made another model"), Counts(responses=["abc"]))
    answer = source.deltas(ModelRequest(HELLO))
    assert [delta.usage and delta.usage.output_tokens for delta in answer if delta.text] == [1, 2, 3]
