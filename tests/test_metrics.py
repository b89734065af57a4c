"""What `/metrics` says, of tasks that a scripted model and a scripted upstream ran."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import httpx2
import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

from inference_trio.errors import InferenceError, UpstreamError
from inference_trio.metrics import LAG_PERIOD, Metrics
from inference_trio.report import Census, FailedAttempt
from inference_trio.task import TaskState
from inference_trio.variables import Secret
from tests import answers
from tests.fakes import FakeModel, fail, finish, text, tool_call
from tests.harness import KEY, PATIENCE, Server, reaching
from tests.processes import reserved_port
from tests.test_main import SERVE, run
from tests.test_report import BROKE, BUSY, make_runner
from tests.test_server import TOOL, serving

Samples = dict[tuple[str, ...], float]


def samples(exposed: str) -> Samples:
    """The samples by their name and the values of their labels."""
    families = text_string_to_metric_families(exposed)
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


async def scrape(server: Server) -> Samples:
    response = await server.get("/metrics")
    assert response.status_code == 200
    return samples(response.text)


def no_census() -> Census:
    return Census(sessions=0, connections=0, tasks={}, outbox_bytes=0, held_bytes=0)


async def after(*rounds: list[Any], **options: Any) -> Samples:
    """What is counted after one task."""
    runner, metrics = make_runner(FakeModel(*rounds), **options), Metrics(no_census)
    runner.observers = [metrics]
    await runner.run()
    return samples(metrics.render().decode())


# What happened


async def test_a_task_is_counted_with_its_model_its_tokens_and_its_times() -> None:
    counted = await after([text("Hi"), finish()])
    assert counted["inference_tasks_ended_total", "done", "fake"] == 1
    assert counted["inference_input_tokens_total", "fake"] == 10
    assert counted["inference_output_tokens_total", "fake"] == 5
    assert counted["inference_task_seconds_count", "fake"] == 1
    assert counted["inference_first_token_seconds_count", "fake"] == 1


async def test_failed_calls_are_counted_by_kind_and_status(autojump_clock: trio.testing.MockClock) -> None:
    counted = await after([fail(BUSY)], [fail(BROKE)])
    assert counted["inference_upstream_errors_total", "upstream", "fake", "5xx"] == 1
    assert counted["inference_upstream_errors_total", "upstream", "fake", "4xx"] == 1
    assert counted["inference_retries_total", "fake"] == 1
    assert counted["inference_tasks_ended_total", "upstream", "fake"] == 1
    assert ("inference_first_token_seconds_count", "fake") not in counted


async def test_tools_that_gave_no_result_do_not_count_as_answered(autojump_clock: trio.testing.MockClock) -> None:
    counted = await after([tool_call("c1", "look"), finish("tool_calls")], tool_timeout=5.0)
    assert counted["inference_tasks_ended_total", "tool_timeout", "fake"] == 1
    assert counted["inference_tool_seconds_count",] == 0
    assert counted["inference_input_tokens_total", "fake"] == 10, "the round before was paid for"


@pytest.mark.parametrize("status", [None, "503", True, 7, 10**9])
def test_a_status_that_is_none_makes_no_series_of_its_own(status: Any) -> None:
    metrics = Metrics(no_census)
    error = UpstreamError("no", status=status, type="", retryable=False, provider_message="")
    metrics.attempt_failed("m", FailedAttempt(0.0, error, is_retried=False))
    assert samples(metrics.render().decode())["inference_upstream_errors_total", "upstream", "m", ""] == 1


def test_whatever_fails_however_often_the_series_stay_few() -> None:
    metrics = Metrics(no_census)
    for kind in InferenceError.__subclasses__():
        for status in range(100, 600):
            error = kind.__new__(kind)
            error.data = {"status": status}
            metrics.attempt_failed("m", FailedAttempt(0.0, error, is_retried=True))
    totals = [key for key in samples(metrics.render().decode()) if key[0] == "inference_upstream_errors_total"]
    assert len(totals) == len(InferenceError.__subclasses__()) - 1 + 5


async def test_a_busy_event_loop_is_seen(mock_clock: trio.testing.MockClock) -> None:
    metrics = Metrics(no_census)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(metrics.watch_event_loop)
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(LAG_PERIOD + 0.2)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    counted = samples(metrics.render().decode())
    assert counted["inference_event_loop_lag_seconds_count",] == 1
    assert counted["inference_event_loop_lag_seconds_sum",] == pytest.approx(0.2)


# What is there now


async def test_sessions_connections_and_tasks_are_counted_while_they_are_there() -> None:
    script = [answers.calls(answers.tool_call(0, "c1", "get_weather", "{}")), (answers.text("x"), answers.hang())]
    async with serving(*script) as (server, _):
        await server.create_session()
        async with server.client(tools=[TOOL]) as client:
            await client.generate()
            await client.until("function_call_request")
            await client.generate()
            await client.until("text_chunk")
            counted = await scrape(server)
            assert counted["inference_sessions",] == 2
            assert counted["inference_connections",] == 1
            assert counted["inference_tasks", "awaiting_tools"] == counted["inference_tasks", "streaming"] == 1
            assert 0 < counted["inference_outbox_bytes",] < counted["inference_held_bytes",]
            assert counted["inference_threads",] >= 1
            await client.ask("cancel")
            frames = [await client.hear() for _ in ("an end", "an end", "the answer")]
            assert [frame.get("method") for frame in frames].count("end") == 2
        counted = await scrape(server)
        assert counted["inference_tasks_ended_total", "cancelled", "deepseek-chat"] == 2
        assert counted["inference_tasks", "awaiting_tools"] == counted["inference_tasks", "streaming"] == 0


async def test_a_census_names_states_without_tasks() -> None:
    async with serving() as (server, _):
        counted = await scrape(server)
        for state in (TaskState.STREAMING, TaskState.AWAITING_TOOLS):
            assert counted["inference_tasks", state.value] == 0


async def test_a_model_that_is_refused_leaves_no_series() -> None:
    async with serving(answers.reply("x"), allowed_models=frozenset({"other"})) as (server, _):
        async with server.client() as client:
            await client.ask_model(model="other")
            assert (await client.call("generate", {"message": "x", "model": "invented"}))["code"] == -32602
        models = {key[-1] for key in await scrape(server) if key[0] == "inference_tasks_ended_total"}
        assert models == {"other"}


async def test_whatever_is_refused_is_counted_by_its_code() -> None:
    limits = {"auth_tokens": {"a": Secret("t" * 16)}, "max_tasks_per_session": 0}
    async with serving(**limits) as (server, _):
        known = {"Authorization": f"Bearer {'t' * 16}"}
        assert (await server.post()).status_code == 401
        assert (await server.post(headers={"Origin": "https://elsewhere.example"})).status_code == 403
        assert (await server.post(headers=known, json={"tool": 1})).status_code == 422
        async with reaching(server.url) as other:  # a line of its own: it is closed after that
            assert (await other.shake_hands("/ws/nobody")).status_code == 401
        session_id = (await server.post(headers=known)).json()["session_id"]
        async with server.connect(session_id, **known) as client:
            assert (await client.call("generate", {"message": "x"}))["code"] == -32005
            assert (await client.call("generate", {"massage": "x"}))["code"] == -32602
            await client.say("{")
            await client.hear()
            assert (await client.call("nonesuch"))["code"] == -32601
        counted = samples((await server.get("/metrics", headers=known)).text)
    refused = {key[1:]: value for key, value in counted.items() if key[0] == "inference_refused_total"}
    assert refused == {("401", "http"): 2, ("403", "http"): 1, ("422", "http"): 1} | {
        (code, "websocket"): 1 for code in ("-32005", "-32602", "-32700", "-32601")
    }


async def test_what_is_arriving_is_counted_until_nobody_needs_it_any_more() -> None:
    begun = b"POST /create_session HTTP/1.1\r\nHost: localhost\r\nContent-Length: 40001\r\n\r\n" + b"{" * 40_000
    async with serving() as (server, _):

        async def comes_to(used: int) -> None:
            with trio.fail_after(PATIENCE):
                while (await scrape(server))["inference_arriving_bytes",] != used:
                    pass

        async with await trio.open_tcp_stream("127.0.0.1", server.port) as stream:
            await stream.send_all(begun)
            await comes_to(40_000)
            await stream.send_all(b"{")
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 415")
            await comes_to(0)


async def test_a_connection_beyond_the_limit_is_counted_as_refused() -> None:
    async with serving(max_connections=1) as (server, _):
        await server.get("/healthz")  # its connection is kept
        async with await trio.open_tcp_stream("127.0.0.1", server.port) as stream:
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 503")
        assert (await scrape(server))["inference_refused_total", "503", "http"] == 1


# Where it is


async def test_two_apps_in_one_process_count_apart() -> None:
    async with serving(answers.reply("x")) as (busy, _), serving() as (idle, _):
        async with busy.client() as client:
            await client.ask_model()
        assert (await scrape(busy))["inference_tasks_ended_total", "done", "deepseek-chat"] == 1
        assert ("inference_tasks_ended_total", "done", "deepseek-chat") not in await scrape(idle)


async def test_where_tokens_are_in_force_the_metrics_ask_for_one() -> None:
    token = "t" * 16
    async with serving(auth_tokens={"prometheus": Secret(token)}) as (server, _):
        assert (await server.get("/metrics")).status_code == 401
        response = await server.get("/metrics", headers={"Authorization": f"Bearer {token}"})
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4")


async def test_on_a_port_of_their_own_the_metrics_ask_for_none_and_are_all_there_is() -> None:
    with reserved_port() as port:
        async with (
            serving(metrics_port=port, auth_tokens={"a": Secret("t" * 16)}) as (server, _),
            httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE, verify=False) as http,
        ):
            assert samples((await http.get("/metrics")).text)["inference_sessions",] == 0
            assert (await http.get("/healthz")).status_code == 404
            headers = {"Authorization": f"Bearer {'t' * 16}"}
            assert (await server.get("/metrics", headers=headers)).status_code == 404


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = run(SERVE, tmp_path, DEEPSEEK_API_KEY=KEY, INFERENCE_METRICS_PORT=str(port))
    assert ended.returncode == 1
    assert f"INFERENCE_METRICS_PORT: 127.0.0.1:{port} cannot be had: Address already in use" in ended.stderr
