"""A trace of each task, made from its report when it has ended.

Spans get the times at which things happened, so nothing has to be kept open or handed around meanwhile::

    generate                          the task, within the caller's trace if there is one
    ├── chat deepseek-chat            a round; failed attempts that were retried are its events
    ├── execute_tool get_weather      a call that the client carries out
    └── chat deepseek-chat

Names are those of OpenTelemetry's semantic conventions for generative AI, which are still in development. Usage is on
rounds only, so that whoever adds it up counts it once. Neither prompts nor answers are in a trace.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import attrs
import trio
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from . import __version__
from .errors import InferenceError, ToolTimeoutError
from .report import FailedAttempt, Round, TaskReport, ToolWait
from .settings import Settings

CLOSING_TIME = 0.5
"""Seconds for sending what is left when the server stops."""

_SCOPE = "inference_trio"
_SESSION_CHARACTERS = 8  # as in the log: a whole id is a credential
_PROVIDERS = {
    "api.deepseek.com": "deepseek",
    "api.groq.com": "groq",
    "api.mistral.ai": "mistral_ai",
    "api.perplexity.ai": "perplexity",
    "api.x.ai": "x_ai",
}
"""The conventions' names for what speaks OpenAI's format."""


def open_spans(settings: Settings, environ: Mapping[str, str]) -> Spans:
    """Spans that are sent by OTLP over HTTP, in batches and from a thread of the exporter's."""
    is_named = environ.get("OTEL_SERVICE_NAME") or "service.name=" in environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    named = {} if is_named else {"service.name": _SCOPE}
    resource = Resource.create({"service.version": __version__, **named})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Spans(provider, _upstream_attributes(settings))


@attrs.frozen
class Spans:
    """An observer of tasks. ``upstream`` are the attributes that all rounds share."""

    _provider: TracerProvider
    _upstream: Mapping[str, Any]

    def attempt_failed(self, model: str, failure: FailedAttempt) -> None:
        """Nothing yet: it is in the report."""

    def task_lost(self, model: str) -> None:
        """Nothing: what there was of it is lost, too."""

    def task_ended(self, report: TaskReport) -> None:
        parent = TraceContextTextMapPropagator().extract({"traceparent": report.traceparent or ""}, Context())
        trace = _Trace(report, self._provider, time.time_ns())
        with_task = trace.add_task(parent)
        for round_ in report.rounds:
            trace.add_round(with_task, round_, self._upstream)
        for wait in report.tool_waits:
            trace.add_tool(with_task, wait)

    async def aclose(self) -> None:
        """Sends what is left, in bounded time."""
        with trio.move_on_after(CLOSING_TIME, shield=True):  # all that the app runs is cancelled by now
            await trio.to_thread.run_sync(self._provider.shutdown, abandon_on_cancel=True)


@attrs.frozen
class _Trace:
    """``now`` is when the task has ended, in nanoseconds since the epoch."""

    report: TaskReport
    provider: TracerProvider
    now: int

    def add_task(self, parent: Context) -> Context:
        """The span of the whole task. Returns the context of what happened within."""
        report = self.report
        attributes = {
            "gen_ai.conversation.id": report.session_id[:_SESSION_CHARACTERS],
            "inference.task.id": report.task_id,
            "inference.task.state": report.state.value,
            "inference.task.retries": report.retries,
        }
        span = self._start("generate", parent, SpanKind.SERVER, attributes, report.started_at)
        return self._end(span, report.ended_at, report.error)

    def add_round(self, parent: Context, round_: Round, upstream: Mapping[str, Any]) -> None:
        model = self.report.model
        attributes = {"gen_ai.operation.name": "chat", "gen_ai.request.model": model, "gen_ai.request.stream": True}
        span = self._start(f"chat {model}", parent, SpanKind.CLIENT, {**upstream, **attributes}, round_.started_at)
        if round_.first_delta_at is not None:
            span.set_attribute("gen_ai.response.time_to_first_chunk", round_.first_delta_at - round_.started_at)
        if round_.finish_reason is not None:
            span.set_attribute("gen_ai.response.finish_reasons", [round_.finish_reason])
        if round_.usage:
            span.set_attribute("gen_ai.usage.input_tokens", round_.usage.input_tokens)
            span.set_attribute("gen_ai.usage.output_tokens", round_.usage.output_tokens)
        for failure in round_.failures:
            if failure.is_retried:
                span.add_event("retry", _of_error(failure.error), self._ns(failure.at))
        self._end(span, round_.ended_at, self.report.error if round_.ended_at is None else None)

    def add_tool(self, parent: Context, wait: ToolWait) -> None:
        attributes = {
            "gen_ai.operation.name": "execute_tool",
            "gen_ai.tool.name": wait.tool_name,
            "gen_ai.tool.type": "function",
            "gen_ai.tool.call.id": wait.call_id,
        }
        span = self._start(f"execute_tool {wait.tool_name}", parent, SpanKind.INTERNAL, attributes, wait.started_at)
        is_late = wait.ended_at is None and isinstance(self.report.error, ToolTimeoutError)
        self._end(span, wait.ended_at, self.report.error if is_late else None)

    def _start(self, name: str, parent: Context, kind: SpanKind, attributes: Mapping[str, Any], at: float) -> Span:
        tracer = self.provider.get_tracer(_SCOPE, __version__)
        return tracer.start_span(name, parent, kind, attributes, start_time=self._ns(at))

    def _end(self, span: Span, at: float | None, error: InferenceError | None) -> Context:
        """Ends it, with the task where ``at`` is ``None``."""
        if error:
            span.set_attribute("error.type", error.kind)
            span.set_status(StatusCode.ERROR, error.message)
        span.end(self._ns(self.report.ended_at if at is None else at))
        return set_span_in_context(span, Context())

    def _ns(self, at: float) -> int:
        return self.now - round((self.report.ended_at - at) * 1e9)


def _of_error(error: InferenceError) -> dict[str, str]:
    return {"error.type": error.kind, "error.message": error.message}


def _upstream_attributes(settings: Settings) -> dict[str, Any]:
    url = urlsplit(settings.base_url or "")
    known = _PROVIDERS.get(url.hostname or "") if settings.provider == "openai" else None
    attributes: dict[str, Any] = {"gen_ai.provider.name": known or settings.provider}
    if url.hostname:
        attributes["server.address"] = url.hostname
        attributes["server.port"] = url.port or (443 if url.scheme == "https" else 80)
    return attributes
