"""The whole way of a model call, from the request to deltas or an error, over real sockets."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import attrs
import httpx2
import pytest
import trio
from langchain_core.tracers.context import collect_runs

from inference_trio.deltas import Delta
from inference_trio.errors import (
    BrokenStreamError,
    InferenceError,
    RateLimitedError,
    UpstreamError,
    UpstreamTimeoutError,
)
from inference_trio.messages import ModelRequest, RoundAccumulator, to_langchain
from inference_trio.model import ChatModel, build_model
from inference_trio.settings import Settings
from inference_trio.task import RoundFinished, ToolCallsRequested
from inference_trio.variables import Secret
from tests.answers import drop, hang, reasoning, reply, status, text
from tests.quirks import QUIRKS, STREAMS, ExpectedCall, Quirk, Stream
from tests.upstream import Upstream, open_upstream

KEY = "sk-0123456789"
HELLO = to_langchain([{"role": "user", "content": "Hello"}])


@contextlib.asynccontextmanager
async def open_model(upstream: Upstream, **fields: Any) -> AsyncIterator[ChatModel]:
    settings = Settings(base_url=upstream.base_url, api_key=Secret(KEY), model_name="m", **fields)
    model = build_model(settings)
    try:
        yield model
    finally:
        await model.aclose()


@attrs.define
class Round:
    """What the runner sees of one call of a model."""

    deltas: list[Delta] = attrs.field(factory=list)
    accumulator: RoundAccumulator = attrs.field(factory=RoundAccumulator)
    arrived: trio.Event = attrs.field(factory=trio.Event)

    async def receive(self, delta: Delta) -> None:
        self.deltas.append(delta)
        self.accumulator.add(delta)
        self.arrived.set()

    async def run(self, model: ChatModel, /, **request: Any) -> RoundFinished | ToolCallsRequested:
        with trio.fail_after(30):
            await model.stream(ModelRequest(HELLO, **request), self.receive)
        return self.accumulator.finish(["weather", "time"])

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)


async def failure(upstream: Upstream, *answers: Any) -> Any:
    """The error of a call that gets this answer."""
    upstream.script(*answers)
    async with open_model(upstream) as model:
        with pytest.raises(InferenceError) as caught:
            await Round().run(model)
    assert KEY not in str(caught.value.to_wire())
    return caught.value


@pytest.mark.parametrize("name", STREAMS)
async def test_a_stream_comes_to_its_end_or_to_an_error_and_never_to_a_false_end(name: str) -> None:
    stream: Stream = STREAMS[name]
    round_ = Round()
    async with open_upstream(stream.answer) as upstream, open_model(upstream) as model:
        try:
            event = await round_.run(model)
        except (BrokenStreamError, UpstreamError, RateLimitedError):
            outcome = "broken"
        else:
            outcome = "completed"
            assert isinstance(event, RoundFinished)
            assert event.finish_reason == "stop"
    assert stream.outcome in (outcome, "either")
    round_.text.encode()
    if stream.outcome != "either" and stream.text is not None:
        assert round_.text == stream.text


def agrees(call: Any, expected: ExpectedCall) -> bool:
    same = (call.name, call.parameters, bool(call.problem)) == (expected.name, expected.parameters, expected.problem)
    return same and (expected.id is None or call.id == expected.id)


@pytest.mark.parametrize("name", QUIRKS)
async def test_tool_calls_are_understood_however_they_are_sent(name: str) -> None:
    quirk: Quirk = QUIRKS[name]
    async with open_upstream(quirk.answer) as upstream, open_model(upstream) as model:
        event = await Round().run(model)
    assert event.finish_reason == quirk.finish_reason
    assert event.usage is not None
    if quirk.finish_reason == "length":
        assert isinstance(event, RoundFinished)
        return
    assert isinstance(event, ToolCallsRequested)
    assert all(agrees(call, expected) for call, expected in zip(event.calls, quirk.calls, strict=True)), event.calls
    assert len({call.id for call in event.calls}) == len(event.calls)


async def test_reasoning_arrives_beside_the_text() -> None:
    answer, round_ = (reasoning("hm", field="reasoning"), reply("Hello")), Round()
    async with open_upstream(answer) as upstream, open_model(upstream) as model:
        await round_.run(model)
    assert "".join(delta.reasoning for delta in round_.deltas) == "hm"
    assert round_.deltas[0].reasoning_field == "reasoning"
    assert round_.text == "Hello"


async def test_those_who_trace_see_the_run_from_the_thread_too() -> None:
    round_ = Round()
    async with open_upstream(reply("Hel", "lo")) as upstream, open_model(upstream) as model:
        with collect_runs() as runs:
            await round_.run(model)
    assert len(runs.traced_runs) == 1
    assert round_.text == "Hello"


async def test_no_thread_is_held_while_text_streams_unless_somebody_traces() -> None:
    held: list[int] = []
    async with open_upstream(reply("a"), reply("b")) as upstream, open_model(upstream) as model:

        async def receive(delta: Delta) -> None:
            held.append(model._limiter.borrowed_tokens)

        with trio.fail_after(30):
            await model.stream(ModelRequest(HELLO), receive)
            assert set(held) == {0}
            held.clear()
            with collect_runs():
                await model.stream(ModelRequest(HELLO), receive)
            assert set(held) == {1}


async def test_calls_one_after_the_other_share_a_connection_until_the_model_is_closed() -> None:
    async with open_upstream(reply("a"), reply("b")) as upstream:
        async with open_model(upstream) as model:
            await Round().run(model)
            await Round().run(model)
            assert len(upstream.connections) == 1
            assert not upstream.connections[0].closed.is_set()
        with trio.fail_after(30):
            await upstream.connections[0].closed.wait()


async def test_the_model_is_called_by_its_name_unless_the_request_names_another() -> None:
    async with open_upstream(reply("a"), reply("b")) as upstream, open_model(upstream) as model:
        assert model.name == "m"
        await Round().run(model)
        await Round().run(model, model="other")
    assert [request.body["model"] for request in upstream.requests] == ["m", "other"]


@pytest.mark.parametrize("answer", [[hang()], [text("Hel"), hang()]])
async def test_a_cancel_closes_the_request_wherever_it_is(answer: Any) -> None:
    round_ = Round()
    async with open_upstream(answer) as upstream, open_model(upstream) as model, trio.open_nursery() as nursery:
        nursery.start_soon(round_.run, model)
        with trio.fail_after(30):
            request = await upstream.wait_for_requests(1)
            if len(answer) > 1:
                await round_.arrived.wait()
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await request.closed.wait()


async def test_an_error_status_is_an_upstream_error_with_what_the_provider_said() -> None:
    body = {"error": {"message": f"Incorrect key {KEY}", "type": "auth", "code": "invalid_api_key"}}
    async with open_upstream() as upstream:
        error = await failure(upstream, status(401, body))
        assert type(error) is UpstreamError
        assert error.data == {
            "status": 401,
            "type": "auth",
            "retryable": False,
            "provider_message": "Incorrect key [hidden]",
        }
        error = await failure(
            upstream, status(502, "<html><title>Bad Gateway</title></html>", content_type="text/html")
        )
        assert (error.retryable, error.data["provider_message"]) == (True, "An HTML page: Bad Gateway")


async def test_a_429_says_how_long_to_wait() -> None:
    async with open_upstream() as upstream:
        error = await failure(upstream, status(429, {"error": {"message": "slow"}}, headers={"Retry-After": "2"}))
    assert type(error) is RateLimitedError
    assert error.data == {"retry_after": 2.0}


async def test_a_connection_lost_before_the_first_chunk_may_be_tried_again_and_later_not() -> None:
    async with open_upstream() as upstream:
        before = await failure(upstream, drop())
        after = await failure(upstream, [text("Hel"), drop()])
    assert (type(before), before.data["type"], before.retryable) == (UpstreamError, "connection", True)
    assert (type(after), after.retryable) == (BrokenStreamError, False)


async def test_nobody_there_is_a_connection_error() -> None:
    async with open_upstream() as upstream:
        pass
    error = await failure(upstream)
    assert (type(error), error.data["type"], error.retryable) == (UpstreamError, "connection", True)


async def test_a_timeout_while_connecting_says_so() -> None:
    limits = []

    async def handle_async_request(request: httpx2.Request) -> httpx2.Response:
        limits.append(request.extensions["timeout"])
        raise httpx2.ConnectTimeout("", request=request)

    async with open_upstream() as upstream, open_model(upstream, connect_timeout=3.0) as model:
        model._source._transport.handle_async_request = handle_async_request  # type: ignore[attr-defined]
        with pytest.raises(UpstreamTimeoutError) as caught:
            await Round().run(model)
    assert caught.value.data == {"phase": "connect"}
    assert limits == [{"connect": 3.0, "read": None, "write": None, "pool": None}]


async def test_a_defect_of_ours_is_not_taken_for_the_providers() -> None:
    class Broken:
        def deltas(self, request: ModelRequest) -> Any:
            raise LookupError("a defect")

    model = ChatModel("m", Broken(), trio.CapacityLimiter(1))  # type: ignore[arg-type]
    with pytest.raises(LookupError, match="a defect"):
        await Round().run(model)


def test_langchain_openai_is_imported_at_the_start_and_langchain_is_not() -> None:
    code = "import sys, inference_trio.model; print('langchain_openai' in sys.modules, 'langchain' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert output.stdout.split() == ["True", "False"]
