"""The whole server over real sockets: HTTP, WebSocket, ChatOpenAI, and an upstream that does what it is told."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
import trio_websocket

from inference_trio import bridge
from inference_trio.variables import Secret
from tests import answers, quirks
from tests.harness import KEY, PATIENCE, Client, Server, open_server, settings
from tests.upstream import Upstream, open_upstream

TOOL = {"name": "get_weather", "description": "The weather.", "parameters": {"type": "object", "properties": {}}}


@asynccontextmanager
async def serving(*script: Any, **changes: Any) -> AsyncIterator[tuple[Server, Upstream]]:
    async with open_upstream(*script) as upstream, open_server(settings(upstream.base_url, **changes)) as server:
        yield server, upstream


@asynccontextmanager
async def chatting(*script: Any, tools: Any = (), **changes: Any) -> AsyncIterator[tuple[Client, Upstream]]:
    async with serving(*script, **changes) as (server, upstream), server.client(tools=list(tools)) as client:
        yield client, upstream


# HTTP


async def test_the_routes_of_a_deployment_answer() -> None:
    async with serving() as (server, _):
        assert (await server.get("/healthz")).status_code == 200
        assert (await server.get("/readyz")).status_code == 200
        assert (await server.get("/openrpc.json")).json()["openrpc"] == "1.3.2"


@pytest.mark.parametrize(
    ("options", "status", "named"),
    [
        pytest.param({"content": b"{", "headers": {"content-type": "application/json"}}, 400, "JSON", id="not JSON"),
        pytest.param(
            {"content": b"\xff\xff", "headers": {"content-type": "application/json"}}, 400, "JSON", id="UTF-8"
        ),
        pytest.param({"content": b"{}", "headers": {"content-type": "text/plain"}}, 415, "text/plain", id="type"),
        pytest.param({"content": b"{}"}, 415, "application/json", id="no type"),
        pytest.param({"json": {"tool": []}}, 422, "`tool`", id="unknown field"),
        pytest.param({"json": {"tools": [{"name": "a b"}]}}, 422, "`body.tools[0].name`", id="wrong name"),
        pytest.param({"json": {"tools": [{"name": "a"}, {"name": "a"}]}}, 422, "'a'", id="same name"),
        pytest.param({"json": []}, 422, "`body`", id="not an object"),
        pytest.param({"json": {"tools": ["x" * 5000]}}, 413, "", id="too large"),
    ],
)
async def test_a_wrong_body_is_refused_with_its_reason(options: Any, status: int, named: str) -> None:
    async with serving(max_message_bytes=4000) as (server, _):
        response = await server.post(**options)
        assert response.status_code == status
        error = response.json()["error"]
        assert named in error["message"]
        assert isinstance(error["code"], int)


async def test_what_is_not_there_is_refused_as_json() -> None:
    async with serving() as (server, _):
        for response, status in ((await server.get("/nothing"), 404), (await server.get("/create_session"), 405)):
            assert response.status_code == status
            assert response.json()["error"]["message"]


async def test_too_many_sessions_are_refused_with_a_time_to_come_back() -> None:
    async with serving(max_sessions=1) as (server, _):
        await server.create_session()
        response = await server.post()
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        assert response.json()["error"]["code"] == -32005


@pytest.mark.parametrize("query", ["", "?after=1"])
async def test_an_unknown_session_is_refused_at_the_handshake(query: str) -> None:
    async with serving() as (server, _):
        response = await server.shake_hands(f"/ws/nobody{query}")
        assert response.status_code == 404
        assert "session" in response.json()["error"]["message"]


@pytest.mark.parametrize("after", ["x", "-1", "1", "%C2%B2", "9" * 5000, ""])
async def test_an_after_that_cannot_be_is_refused_at_the_handshake(after: str) -> None:
    async with serving() as (server, _):
        response = await server.shake_hands(f"/ws/{await server.create_session()}?after={after}")
        assert response.status_code == 422
        assert "`after`" in response.json()["error"]["message"]


# A generation


async def test_text_streams_as_it_comes() -> None:
    script = [answers.text("Hel"), answers.pause("go on"), answers.text("lo"), answers.finish(), answers.done()]
    async with chatting(script) as (client, upstream):
        await client.generate()
        assert (await client.hear())["params"]["chunk"] == "Hel"
        upstream.gate("go on").set()
        *_, end = await client.until_end()
        assert end["params"]["final_text"] == "Hello"
        assert end["params"]["status_message"] == "completed"
        assert end["params"]["usage"] is None


async def test_the_request_that_goes_upstream() -> None:
    async with chatting(answers.reply("x"), tools=[TOOL]) as (client, upstream):
        history = [
            {"role": "system", "content": "Be brief."},
            {"role": "developer", "content": "Rhyme."},
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}]},
            {"role": "assistant", "content": None, "tool_calls": [_call("c1", "{}")], "reasoning_content": "hm"},
            {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
        ]
        await client.ask_model("And now?", history=history, max_new_tokens=9, temperature=0, seed=1)
        (request,) = upstream.requests
        assert request.headers["authorization"] == f"Bearer {KEY}"
        assert request.path == "/v1/chat/completions"
        assert request.body == {
            "model": "deepseek-chat",
            "stream": True,
            "stream_options": {"include_usage": True},
            "messages": [*history, {"role": "user", "content": "And now?"}],
            "tools": [{"type": "function", "function": TOOL}],
            "max_tokens": 9,
            "temperature": 0,
            "seed": 1,
        }


def _call(call_id: str, arguments: str) -> Any:
    return {"id": call_id, "type": "function", "function": {"name": "get_weather", "arguments": arguments}}


async def test_usage_need_not_be_asked_for() -> None:
    async with chatting(answers.reply("x"), stream_usage=False) as (client, upstream):
        await client.ask_model()
        assert "stream_options" not in upstream.requests[0].body


async def test_three_turns_with_tools_go_on_from_the_messages_of_the_one_before() -> None:
    def answer(request: Any) -> Any:
        if request.messages[-1]["role"] == "tool":
            return [answers.reasoning("so"), answers.reply(f"It is {request.messages[-1]['content']}.")]
        call = answers.tool_call(0, "again", "get_weather", '{"turn":', f"{len(request.messages)}}}")
        return [answers.reasoning("hm"), answers.text("Wait. "), answers.calls(call)]

    async with chatting(answer, tools=[TOOL]) as (client, upstream):
        history: list[Any] = []
        for turn in range(3):
            question = {"role": "user", "content": f"question {turn}"}
            task_id = (await client.call("generate", {"history": [*history, question]}))["task_id"]
            request = await client.until("function_call_request")
            assert request["parameters"] == {"turn": len(history) + 1}
            result = {"tool_call_id": request["request_id"], "result": f"weather {turn}"}
            await client.ask("tool_result", {"task_id": task_id, "results": [result]})
            end = await client.until("end")
            assert end["final_text"] == f"Wait. It is weather {turn}."
            history += [question, *end["messages"]]
            assert upstream.requests[-1].messages == history[:-1]
        assert [message["role"] for message in history] == ["user", "assistant", "tool", "assistant"] * 3
        assert history[1]["reasoning_content"] == "hm"


# How models send things is taken apart by the chat model, whose tests have every way. Here are those that end
# differently, or whose text is hard to pass on.
QUIRKS = (
    "as OpenAI does",
    "finish reason stop",
    "two, interleaved by index",
    "no id",
    "arguments not JSON",
    "second call cut off by the length",
)
STREAMS = (
    "plain",
    "a byte at a time",
    "a huge chunk",
    "NUL characters",
    "lone surrogate",
    "surrogate pair over two chunks",
    "error in mid-stream",
    "HTML",
    "reset before the headers",
    "dropped between events",
    "dropped after the finish reason",
)


@pytest.mark.parametrize("name", QUIRKS)
async def test_tool_calls_of_all_kinds_of_providers(name: str) -> None:
    quirk = quirks.QUIRKS[name]
    wanted = [] if quirk.finish_reason == "length" else quirk.calls
    tools = [{"name": "weather"}, {"name": "time"}]
    async with chatting(quirk.answer, answers.reply("done"), tools=tools) as (client, upstream):
        task_id = await client.generate()
        good = [call for call in wanted if not call.problem]
        requests = [await client.until("function_call_request") for _ in good]
        assert [(request["tool_name"], request["parameters"]) for request in requests] == [
            (call.name, call.parameters) for call in good
        ]
        assert all(call.id in (None, request["request_id"]) for call, request in zip(good, requests, strict=True))
        results = [{"tool_call_id": request["request_id"], "result": "ok"} for request in requests]
        if results:
            await client.ask("tool_result", {"task_id": task_id, "results": results})
        end = await client.until("end")
        assert end["status_message"] == ("length" if quirk.finish_reason == "length" else "completed")
        if wanted:
            *_, said = [message for message in upstream.requests[1].messages if message["role"] == "assistant"]
            told = [message for message in upstream.requests[1].messages if message["role"] == "tool"]
            assert [call["id"] for call in said["tool_calls"]] == [message["tool_call_id"] for message in told]
            assert [message["content"].startswith("Error:") for message in told] == [call.problem for call in wanted]


@pytest.mark.parametrize("name", STREAMS)
async def test_streams_of_all_kinds(name: str) -> None:
    stream = quirks.STREAMS[name]
    async with chatting(stream.answer, max_retries=0) as (client, _):
        await client.generate()
        *chunks, last = await client.until_end()
        text = "".join(frame["params"]["chunk"] for frame in chunks)
        if last["method"] == "end":
            assert stream.outcome in ("completed", "either")
            assert last["params"]["final_text"] == text
            assert stream.text in (None, text)
        else:
            assert stream.outcome in ("broken", "either")
            assert last["params"]["error"]["code"] in (-32000, -32001, -32006)
            assert last["params"]["error"].get("data", {}).get("partial_text", "") == text


async def test_reasoning_is_told_apart_and_sent_back() -> None:
    call = answers.calls(answers.tool_call(0, "c1", "get_weather", "{}"))
    for field in ("reasoning_content", "reasoning"):
        script = ([answers.reasoning("hm", field=field), call], answers.reply("done"))
        async with chatting(*script, tools=[TOOL]) as (client, upstream):
            task_id = await client.generate()
            assert (await client.hear())["params"]["chunk"] == "hm"
            await client.until("function_call_request")
            result = {"tool_call_id": "c1", "result": 1}
            await client.ask("tool_result", {"task_id": task_id, "results": [result]})
            end = await client.until("end")
            assert end["messages"][0][field] == "hm"
            assert upstream.requests[1].messages[1][field] == "hm"


# What the provider does wrong


REFUSALS = {
    400: (-32000, False),
    401: (-32000, False),
    403: (-32000, False),
    404: (-32000, False),
    408: (-32000, True),
    409: (-32000, True),
    422: (-32000, False),
    429: (-32001, True),
    500: (-32000, True),
    503: (-32000, True),
}


@pytest.mark.parametrize("status", REFUSALS)
async def test_refusals_of_the_provider(status: int) -> None:
    code, retryable = REFUSALS[status]
    body = {"error": {"message": f"No, not with {KEY}", "type": "refused", "code": None}}
    async with chatting(answers.status(status, body), max_retries=0) as (client, upstream):
        await client.generate()
        (note,) = await client.until_end()
        error = note["params"]["error"]
        assert error["code"] == code
        if code == -32000:
            assert (error["data"]["status"], error["data"]["retryable"]) == (status, retryable)
            assert error["data"]["type"] == "refused"
        assert KEY not in json.dumps(note)
        assert len(upstream.requests) == 1


async def test_another_attempt_is_made_when_the_provider_says_when() -> None:
    refusals = [
        answers.status(429, {"error": {"message": "busy"}}, headers={"Retry-After": "0"}),
        answers.status(503, "<html>busy</html>", headers={"Retry-After-Ms": "1"}, content_type="text/html"),
        answers.reset(),
    ]
    async with chatting(*refusals, answers.reply("at last")) as (client, upstream):
        assert (await client.ask_model())["final_text"] == "at last"
        assert len(upstream.requests) == 4


async def test_a_provider_that_asks_to_wait_too_long_is_not_waited_for() -> None:
    refusal = answers.status(429, {"error": {"message": "busy"}}, headers={"Retry-After": "61"})
    async with chatting(refusal) as (client, _):
        error = (await client.ask_model())["error"]
        assert (error["code"], error["data"]["retry_after"]) == (-32001, 61)


async def test_nobody_listens_upstream() -> None:
    async with open_upstream() as upstream:
        url = upstream.base_url
    async with open_server(settings(url, max_retries=0)) as server, server.client() as client:
        error = (await client.ask_model())["error"]
        assert (error["code"], error["data"]["status"], error["data"]["type"]) == (-32000, None, "connection")


@pytest.mark.parametrize(
    ("script", "limits", "phase"),
    [
        ((answers.hang(),), {"first_token_timeout": 0.05}, "first_token"),
        ((answers.head(), answers.comment(), answers.hang()), {"first_token_timeout": 0.05}, "first_token"),
        ((answers.text("x"), answers.hang()), {"token_timeout": 0.05}, "token"),
        ((answers.text("x"), answers.hang()), {"task_timeout": 0.05}, "task"),
    ],
)
async def test_a_silent_provider_is_given_up_and_its_connection_closed(
    script: Any, limits: Any, phase: str, mock_clock: trio.testing.MockClock
) -> None:
    """Time stands still until the provider has been reached, and has said what it says."""
    async with chatting(script, **limits) as (client, upstream):
        await client.generate()
        await upstream.wait_for_requests(1)
        if phase != "first_token":
            await client.until("text_chunk")
        mock_clock.rate = 1
        error = (await client.until("error"))["error"]
        assert (error["code"], error["data"]["phase"]) == (-32002, phase)
        with trio.fail_after(PATIENCE):
            await upstream.requests[0].closed.wait()


# Cancelling

HANGING = {
    "before the headers": (answers.hang(),),
    "before the first token": (answers.head(), answers.hang()),
    "in mid-stream": (answers.text("x"), answers.hang()),
}


@pytest.mark.parametrize("when", HANGING)
async def test_a_cancel_closes_the_upstream_before_it_is_answered(when: str) -> None:
    async with chatting(HANGING[when]) as (client, upstream):
        task_id = await client.generate()
        await upstream.wait_for_requests(1)
        if when == "in mid-stream":
            await client.hear()
        await client.ask("cancel")
        frames = [await client.hear(), await client.hear()]
        (answer,) = [frame for frame in frames if "result" in frame]
        (end,) = [frame for frame in frames if frame.get("method") == "end"]
        assert answer["result"] == {"cancelled": [task_id]}
        assert end["params"]["status_message"] == "cancelled"
        with trio.fail_after(PATIENCE):
            await upstream.requests[0].closed.wait()


async def test_a_cancel_while_waiting_to_try_again() -> None:
    refusal = answers.status(429, {"error": {"message": "busy"}}, headers={"Retry-After": "50"})
    async with chatting(refusal) as (client, upstream):
        await client.generate()
        await upstream.wait_for_requests(1)
        await upstream.requests[0].finished.wait()
        await client.ask("cancel")
        assert {(await client.hear()).get("method"), (await client.hear()).get("method")} == {"end", None}


async def test_two_hundred_sessions_do_not_wait_for_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bridge, "END_OF_BODY_GRACE", math.inf)  # the upstream shares this loop, and is as busy
    script = [answers.text("x"), answers.pause("all are there"), answers.reply("y")]
    async with serving(lambda _: script) as (server, upstream):
        async with trio.open_nursery() as nursery:
            ended = []

            async def one() -> None:
                async with server.client() as client:
                    ended.append(await client.ask_model())

            for _ in range(200):
                nursery.start_soon(one)
            with trio.fail_after(60):
                await upstream.wait_for_requests(200)
            upstream.gate("all are there").set()
        assert [end["final_text"] for end in ended] == ["xy"] * 200
    assert all(request.complete for request in upstream.requests)


async def test_when_all_places_are_taken_the_answer_comes_at_once() -> None:
    async with serving(lambda _: answers.hang(), max_tasks=2) as (server, _), server.client() as client:
        await client.generate()
        await client.generate()
        refused = await client.call("generate", {"message": "hi"})
        assert refused["code"] == -32005
        assert refused["data"]["retry_after"] > 0


# The connection


async def test_frames_of_both_kinds_are_taken_and_one_too_large_closes_with_1009() -> None:
    async with chatting(max_message_bytes=1000) as (client, _):
        await client.say(b'{"jsonrpc": "2.0", "id": 1, "method": "cancel"}')
        assert (await client.hear())["result"] == {"cancelled": []}
        await client.say('{"jsonrpc": "2.0", "id": 1, "method": "' + "ü" * 600 + '"}')
        with pytest.raises(trio_websocket.ConnectionClosed) as closed:
            await client.hear()
        assert closed.value.reason.code == 1009


async def test_a_connection_that_is_cut_is_resumed() -> None:
    script = [answers.text("Hel"), answers.pause("cut"), answers.text("lo"), answers.finish(), answers.done()]
    async with serving(script) as (server, upstream):
        session_id = await server.create_session()
        async with server.connect(session_id) as client:
            await client.generate()
            first = await client.hear()
            await client.socket._stream.aclose()
        upstream.gate("cut").set()
        async with server.connect(session_id, f"?after={first['params']['seq']}") as client:
            resumed, *rest = await client.until_end()
            assert resumed["params"]["gap"] is False
            assert rest[-1]["params"]["final_text"] == "Hello"


async def test_a_newer_connection_takes_over() -> None:
    async with serving() as (server, _):
        session_id = await server.create_session()
        async with server.connect(session_id) as older, server.connect(session_id):
            with pytest.raises(trio_websocket.ConnectionClosed) as closed:
                await older.hear()
            assert closed.value.reason.code == 4409


async def test_the_log_has_one_line_a_task_and_neither_prompt_nor_answer_nor_key(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("DEBUG")
    async with chatting(answers.reply("the answer")) as (client, _):
        await client.ask_model("the prompt")
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("inference_trio")]
    assert sum("task ended" in line for line in lines) == 1
    assert not any(word in line for line in lines for word in ("the prompt", "the answer", KEY))


async def test_a_server_that_stops_refuses_what_is_new_and_ends_what_runs() -> None:
    script = [answers.text("Hel"), answers.pause("go on"), answers.text("lo"), answers.finish(), answers.done()]
    async with serving(script, drain_seconds=30.0) as (server, upstream), server.client() as client:
        await client.generate()
        await client.hear()
        server.shutdown.set()
        assert (await client.hear())["params"]["deadline"] == 30.0
        assert (await server.get("/readyz")).status_code == 503
        assert (await server.get("/healthz")).status_code == 200
        assert (await server.post()).status_code == 503
        upstream.gate("go on").set()
        assert (await client.until("end"))["final_text"] == "Hello"
        with pytest.raises(trio_websocket.ConnectionClosed) as closed:
            await client.hear()
        assert closed.value.reason.code == 1012


async def test_half_a_character_anywhere_in_the_stream_breaks_nothing() -> None:
    half = "\ud83d"
    script = [
        answers.text(f"a{half}"),
        answers.reasoning(half),
        answers.tool_call(0, half, half, f'{{"{half}": 1}}'),
        answers.finish(half),
        answers.done(),
    ]
    async with chatting(script, answers.reply("x"), answers.reply("y")) as (client, _):
        assert (await client.ask_model())["task_id"]
        assert (await client.ask_model())["final_text"] in ("x", "y")


def _choice(**fields: Any) -> Any:
    return answers.sse({"choices": [{"finish_reason": "stop", **fields}]})


@pytest.mark.parametrize(
    ("script", "text"),
    [
        ((_choice(delta=None, message={"content": "whole"}), answers.done()), "whole"),
        ((_choice(text="legacy"), answers.done()), "legacy"),
        (
            (
                answers.sse(
                    {"choices": [{"index": 1, "delta": {"content": "B"}}, {"index": 0, "delta": {"content": "a"}}]}
                ),
                answers.finish(),
                answers.done(),
            ),
            "a",
        ),
    ],
)
async def test_text_in_other_places_is_found_and_other_choices_are_not_mixed_in(script: Any, text: str) -> None:
    async with chatting(script) as (client, _):
        assert (await client.ask_model())["final_text"] == text


@pytest.mark.parametrize("usage", ["", [], {"prompt_tokens": "3"}, {"prompt_tokens": 1.5, "completion_tokens": 1}])
async def test_a_count_that_is_none_does_not_break_an_answer(usage: Any) -> None:
    script = (answers.text("a"), answers.sse({"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": usage}))
    async with chatting((*script, answers.done())) as (client, _):
        end = await client.ask_model()
        assert (end["final_text"], end["usage"]) == ("a", None)


async def test_a_legacy_function_call_is_a_call_and_calls_that_are_not_there_are_an_error() -> None:
    call = answers.chunk({"function_call": {"name": "get_weather", "arguments": "{}"}}, "function_call")
    nothing = (answers.text("x"), answers.finish("tool_calls"), answers.done())
    async with chatting((answers.sse(call), answers.done()), nothing, tools=[TOOL]) as (client, _):
        await client.generate()
        assert (await client.until("function_call_request"))["tool_name"] == "get_weather"
        await client.ask("generate", {"message": "hi"})
        assert (await client.until("error"))["error"]["code"] == -32006


async def test_parts_of_the_key_are_hidden_too() -> None:
    key = "sk-0123456789abcdefghij"
    said = f"No: {key[:11]}...{key[-8:]}, not {key}; but none of that."
    script = answers.status(401, {"error": {"message": said}})
    async with chatting(script, api_key=Secret(key)) as (client, _):
        message = (await client.ask_model())["error"]["data"]["provider_message"]
        assert key[:8] not in message
        assert "none of that." in message


async def test_a_wrong_method_says_which_are_right() -> None:
    async with serving() as (server, _):
        assert "POST" in (await server.get("/create_session")).headers["allow"]
