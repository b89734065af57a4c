"""Traces: what a task's spans say, when there are any, and what a collector and LangSmith get."""

from __future__ import annotations

import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from inference_trio.errors import ConfigurationError
from inference_trio.spans import Spans, _upstream_attributes
from inference_trio.tracing import traces_are_wanted
from tests import answers, harness
from tests.fakes import FakeModel, fail, finish, hang, sleep, text, tool_call
from tests.harness import KEY, PATIENCE
from tests.test_deploy import server_process
from tests.test_report import BROKE, BUSY, ToolOutcome, make_runner, running
from tests.upstream import open_upstream

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
OTHER_CALLER = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
SETTINGS = harness.settings("https://api.deepseek.com/v1")


class Trace:
    """The spans of one task, by name."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.observer = Spans(self.provider, _upstream_attributes(SETTINGS))

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self._exporter.get_finished_spans())

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.spans if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        (span,) = self.named(name)
        return span


def traced(*rounds: list[Any], traceparent: str | None = None, **options: Any) -> tuple[Any, Trace]:
    runner, trace = make_runner(FakeModel(*rounds), **options), Trace()
    runner.observers, runner.traceparent = [trace.observer], traceparent
    return runner, trace


async def trace_of(*rounds: list[Any], **options: Any) -> Trace:
    runner, trace = traced(*rounds, **options)
    await runner.run()
    return trace


def seconds(span: ReadableSpan) -> float:
    return round((span.end_time - span.start_time) / 1e9, 3)


# A task's spans


async def test_a_task_has_a_span_and_its_round_one_within(autojump_clock: trio.testing.MockClock) -> None:
    trace = await trace_of([sleep(2), text("Hi"), sleep(3), finish()])
    task, chat = trace.one("generate"), trace.one("chat fake")
    assert (task.kind, chat.kind) == (SpanKind.SERVER, SpanKind.CLIENT)
    assert chat.parent == task.context
    assert task.parent is None
    assert (seconds(task), seconds(chat)) == (5, 5)
    assert chat.attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "deepseek",
        "gen_ai.request.model": "fake",
        "gen_ai.request.stream": True,
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.response.time_to_first_chunk": 2,
        "gen_ai.usage.input_tokens": 10,
        "gen_ai.usage.output_tokens": 5,
        "server.address": "api.deepseek.com",
        "server.port": 443,
    }
    assert task.attributes == {
        "gen_ai.conversation.id": "s" * 8,
        "inference.task.id": "task_1",
        "inference.task.state": "done",
        "inference.task.retries": 0,
    }


async def test_rounds_and_tools_are_side_by_side_at_their_times(autojump_clock: trio.testing.MockClock) -> None:
    runner, trace = traced(
        [sleep(1), tool_call("c1", "look"), finish("tool_calls")], [sleep(4), text("done"), finish()]
    )
    async with running(runner):
        await trio.sleep(3)
        runner.give_results((ToolOutcome("c1", "seen"),))
    tool, (first, second) = trace.one("execute_tool look"), trace.named("chat fake")
    assert [seconds(span) for span in (first, tool, second)] == [1, 2, 4]
    assert first.start_time < first.end_time == tool.start_time < tool.end_time == second.start_time
    assert tool.attributes["gen_ai.tool.call.id"] == "c1"
    assert {span.parent.span_id for span in (first, tool, second)} == {trace.one("generate").context.span_id}


async def test_a_retry_is_an_event_of_its_round(autojump_clock: trio.testing.MockClock) -> None:
    trace = await trace_of([fail(BUSY)], [text("x"), finish()])
    chat = trace.one("chat fake")
    (event,) = chat.events
    assert (event.name, dict(event.attributes)) == ("retry", {"error.type": "upstream", "error.message": "busy"})
    assert event.timestamp == chat.start_time
    assert chat.status.status_code is StatusCode.UNSET


async def test_a_failure_marks_the_task_and_the_round_that_failed() -> None:
    trace = await trace_of([tool_call("c1", "nothing"), finish("tool_calls")], [fail(BROKE)])
    good, bad = trace.named("chat fake")
    for span in (trace.one("generate"), bad):
        assert span.status.status_code is StatusCode.ERROR
        assert span.attributes["error.type"] == "upstream"
    assert good.status.status_code is StatusCode.UNSET


async def test_a_tool_that_gave_no_result_in_time_is_marked(autojump_clock: trio.testing.MockClock) -> None:
    trace = await trace_of([tool_call("c1", "look"), finish("tool_calls")], tool_timeout=5.0)
    tool = trace.one("execute_tool look")
    assert (tool.attributes["error.type"], seconds(tool)) == ("tool_timeout", 5)


async def test_a_cancelled_task_is_no_error() -> None:
    runner, trace = traced([text("x"), hang])
    async with running(runner):
        runner.cancel()
    assert {span.status.status_code for span in trace.spans} == {StatusCode.UNSET}
    assert trace.one("generate").attributes["inference.task.state"] == "cancelled"


async def test_the_trace_goes_on_from_its_caller() -> None:
    trace = await trace_of([text("x"), finish()], traceparent=CALLER)
    task = trace.one("generate")
    assert f"{task.parent.trace_id:032x}-{task.parent.span_id:016x}" == CALLER[3:-3]
    assert {span.context.trace_id for span in trace.spans} == {task.parent.trace_id}


@pytest.mark.parametrize("traceparent", ["", "nonsense", "00-" + "0" * 32 + "-" + "0" * 16 + "-01"])
async def test_a_caller_that_cannot_be_makes_a_trace_of_its_own(traceparent: str) -> None:
    trace = await trace_of([text("x"), finish()], traceparent=traceparent)
    assert trace.one("generate").parent is None


async def test_a_caller_who_is_not_sampled_has_no_trace() -> None:
    trace = await trace_of([text("x"), finish()], traceparent=CALLER[:-2] + "00")
    assert trace.spans == []


async def test_neither_prompt_nor_answer_nor_a_whole_session_id_is_in_a_trace() -> None:
    trace = await trace_of([text("SECRET"), finish()], log_content=True)
    written = " ".join(span.to_json() for span in trace.spans)
    assert "SECRET" not in written
    assert "s" * 9 not in written


@pytest.mark.parametrize(
    ("changes", "name", "address"),
    [
        ({"base_url": "http://127.0.0.1:8080/v1"}, "openai", ("127.0.0.1", 8080)),
        ({"base_url": "http://models.example"}, "openai", ("models.example", 80)),
        ({"base_url": None, "provider": "anthropic"}, "anthropic", (None, None)),
    ],
)
def test_the_provider_is_named(changes: Any, name: str, address: Any) -> None:
    attributes = _upstream_attributes(attrs.evolve(SETTINGS, **changes))
    assert attributes["gen_ai.provider.name"] == name
    assert (attributes.get("server.address"), attributes.get("server.port")) == address


# When there are any


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        ({}, False),
        ({"OTEL_SERVICE_NAME": "x"}, False),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({"OTEL_TRACES_EXPORTER": "None", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": " "}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_SDK_DISABLED": "TRUE"}, False),
    ],
)
def test_traces_are_made_where_the_standard_variables_ask_for_them(environ: dict[str, str], wanted: bool) -> None:
    assert traces_are_wanted(environ) is wanted


def test_another_exporter_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"OTEL_TRACES_EXPORTER: expected otlp or none, got 'zipkin'"):
        traces_are_wanted({"OTEL_TRACES_EXPORTER": "zipkin"})


OPEN = """
import sys
from inference_trio.settings import Settings
from inference_trio.tracing import open_tracing
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("opentelemetry"):
            raise ModuleNotFoundError(name)
if "absent" in sys.argv:
    sys.meta_path.insert(0, Absent())
opened = open_tracing(Settings.load({"LLM_PROVIDER": "local"}, None), {"OTEL_TRACES_EXPORTER": sys.argv[1]})
print(opened is not None, any(name.startswith("opentelemetry") for name in sys.modules))
"""


@pytest.mark.parametrize(
    ("arguments", "printed"), [(["none"], "False False"), (["otlp", "absent"], "False False"), (["otlp"], "True True")]
)
def test_without_the_extra_or_the_wish_nothing_is_imported(arguments: list[str], printed: str) -> None:
    command = [sys.executable, "-c", OPEN, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.stdout.strip() == printed, ended.stderr
    assert ("pip install inference-trio[otel]" in ended.stderr) is ("absent" in arguments)


# What arrives


@attrs.frozen
class Recorder:
    """An HTTP server that takes everything, and keeps what was sent to it."""

    url: str
    requests: queue.Queue[tuple[str, dict[str, str], bytes]]

    def next(self) -> tuple[str, dict[str, str], bytes]:
        return self.requests.get(timeout=PATIENCE)


@contextmanager
def recording() -> Iterator[Recorder]:
    requests: queue.Queue[tuple[str, dict[str, str], bytes]] = queue.Queue()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            requests.put((self.path, dict(self.headers), body))
            self.do_GET()

        do_PATCH = do_POST  # noqa: N815

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *args: Any) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield Recorder(f"http://127.0.0.1:{server.server_port}", requests)
        finally:
            server.shutdown()
            thread.join()


async def test_a_server_that_stops_has_sent_its_traces(tmp_path: Path) -> None:
    """Of two tasks, one in the trace that the handshake named, one in that of its own request."""
    with recording() as collector:
        variables = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
            "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test",
            "OTEL_BSP_SCHEDULE_DELAY": "600000",
        }
        async with (
            open_upstream(lambda _: answers.reply("the answer")) as upstream,
            server_process(tmp_path / "server", upstream, **variables) as url,
            harness.reaching(url) as server,
            server.connect(await server.create_session(), traceparent=CALLER) as client,
        ):
            await client.ask_model("the prompt")
            await client.ask_model("the prompt", traceparent=OTHER_CALLER)
        path, _, body = collector.next()
    assert path == "/v1/traces"
    (resource,) = ExportTraceServiceRequest.FromString(body).resource_spans
    about = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
    assert (about["service.name"], about["deployment.environment.name"]) == ("inference_trio", "test")
    spans = [(span.name, span.trace_id.hex()) for span in resource.scope_spans[0].spans]
    names = ["chat deepseek-chat", "generate"]
    assert sorted(spans) == sorted((name, caller[3:35]) for name in names for caller in (CALLER, OTHER_CALLER))
    assert b"the prompt" not in body
    assert b"the answer" not in body


async def test_langsmith_gets_each_call_of_the_model_as_langchain_tells_it_and_the_log_says_so(tmp_path: Path) -> None:
    with recording() as langsmith:
        variables = {"LANGSMITH_TRACING": "true", "LANGSMITH_API_KEY": "lsv2-x", "LANGSMITH_ENDPOINT": langsmith.url}
        async with (
            open_upstream(answers.reply("the answer")) as upstream,
            server_process(tmp_path / "server", upstream, **variables) as url,
            harness.reaching(url) as server,
            server.client() as client,
        ):
            assert (await client.ask_model("the prompt"))["final_text"] == "the answer"
        sent = [langsmith.next()]
        sent += [langsmith.next() for _ in range(langsmith.requests.qsize())]
    path, headers, _ = sent[0]
    assert (path, headers["x-api-key"]) == ("/runs/multipart", "lsv2-x")
    assert "LANGSMITH_TRACING is on" in (tmp_path / "server" / "inference_server.log").read_text()
    text = b"".join(body for _, _, body in sent)
    for part in (
        b'"run_type":"llm"',
        b"the prompt",
        b"the answer",
        b'"ls_model_name":"deepseek-chat"',
        b'"input_tokens":7',
    ):
        assert part in text
    assert KEY.encode() not in text
