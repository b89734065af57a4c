"""The metrics, for Prometheus: nothing else knows its client library.

What there is *now* is counted when somebody asks, by whoever has it; what *happened* is counted when a task ends or an
attempt fails, from what the runner reports. So a token costs nothing. Each app has a registry of its own.

The number of series is bounded: a model's name is one that the settings allow, all other labels are words of this
program.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import attrs
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config, Sockets
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from quart import Response
from quart_trio import QuartTrio

from .arriving import Arriving
from .errors import OverloadedError, UpstreamError
from .hypercorn_fixes import plain_worker_serve
from .report import Census, FailedAttempt, TaskReport

LAG_PERIOD = 0.5
"""Seconds between two looks at how late the event loop is."""

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Of Prometheus' text format, which every version of it reads."""

_FIRST_TOKEN = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TASK = (0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
_TOOL = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_LAG = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


@attrs.frozen(eq=False)
class _Now:
    """What is there when it is asked for. ``census`` raises OverloadedError before the server is ready."""

    census: Callable[[], Census]

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "inference_threads", "Threads of the process, those that wait for work included", threading.active_count()
        )
        try:
            census = self.census()
        except OverloadedError:
            return
        yield GaugeMetricFamily("inference_sessions", "Sessions kept; with Redis, those in use here", census.sessions)
        yield GaugeMetricFamily("inference_connections", "Sessions with a WebSocket", census.connections)
        tasks = GaugeMetricFamily("inference_tasks", "Tasks running, by their state", labels=["state"])
        for state, count in census.tasks.items():
            tasks.add_metric([state.value], count)
        yield tasks
        yield GaugeMetricFamily("inference_outbox_bytes", "Notifications kept for all sessions", census.outbox_bytes)
        yield GaugeMetricFamily(
            "inference_held_bytes", "All that sessions hold, as INFERENCE_MEMORY_BYTES counts it", census.held_bytes
        )


class Metrics:
    """An observer of tasks."""

    def __init__(self, census: Callable[[], Census]) -> None:
        self._port: tuple[Config, Sockets] | None = None
        self.registry = registry = CollectorRegistry()
        registry.register(_Now(census))
        ProcessCollector(registry=registry)
        model = ("model",)
        self._tasks = Counter(
            "inference_tasks_ended", "Tasks that have ended, by how", ("model", "end"), registry=registry
        )
        self._seconds = Histogram(
            "inference_task_seconds", "From the request to the end of a task", model, buckets=_TASK, registry=registry
        )
        self._first_token = Histogram(
            "inference_first_token_seconds",
            "From the request to the first that the model said",
            model,
            buckets=_FIRST_TOKEN,
            registry=registry,
        )
        self._input = Counter("inference_input_tokens", "As the provider counts them", model, registry=registry)
        self._output = Counter("inference_output_tokens", "As the provider counts them", model, registry=registry)
        self._failures = Counter(
            "inference_upstream_errors",
            "Calls of the model that failed, by the kind of error and the class of its HTTP status",
            ("model", "kind", "status"),
            registry=registry,
        )
        self._retries = Counter("inference_retries", "Failed calls that were tried again", model, registry=registry)
        self._refused = Counter(
            "inference_refused",
            "Requests refused: over HTTP by status, over a WebSocket by the error's code, or by that of its close",
            ("over", "code"),
            registry=registry,
        )
        self._arriving = Gauge(
            "inference_arriving_bytes", "Messages and bodies of clients that nobody is through with", registry=registry
        )
        self._tools = Histogram(
            "inference_tool_seconds", "From a tool call to its result", buckets=_TOOL, registry=registry
        )
        self._lag = Histogram(
            "inference_event_loop_lag_seconds",
            f"How late the event loop is, looked at every {LAG_PERIOD:g} s",
            buckets=_LAG,
            registry=registry,
        )

    def render(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self.registry)

    def request_refused(self, over: str, code: int) -> None:
        """``over`` is ``http`` or ``websocket``."""
        self._refused.labels(over, code).inc()

    def show_arriving(self, arriving: Arriving) -> None:
        """From now on."""
        self._arriving.set_function(lambda: arriving.used)

    def attempt_failed(self, model: str, failure: FailedAttempt) -> None:
        self._failures.labels(model, failure.error.kind, _status_class(failure.error)).inc()
        if failure.is_retried:
            self._retries.labels(model).inc()

    def task_ended(self, report: TaskReport) -> None:
        self._tasks.labels(report.model, report.end).inc()
        self._seconds.labels(report.model).observe(report.duration)
        if report.first_token_after is not None:
            self._first_token.labels(report.model).observe(report.first_token_after)
        for usage in (round_.usage for round_ in report.rounds if round_.usage):
            self._input.labels(report.model).inc(usage.input_tokens)
            self._output.labels(report.model).inc(usage.output_tokens)
        for wait in report.tool_waits:
            if wait.ended_at is not None:
                self._tools.observe(wait.ended_at - wait.started_at)

    def task_lost(self, model: str) -> None:
        self._tasks.labels(model, "worker_lost").inc()

    async def watch_event_loop(self) -> None:
        """Never returns."""
        while True:
            due = trio.current_time() + LAG_PERIOD
            await trio.sleep_until(due)
            self._lag.observe(trio.current_time() - due)

    async def respond(self) -> Response:
        return Response(self.render(), content_type=CONTENT_TYPE)

    def listen(self, host: str, port: int) -> None:
        """Takes a port of their own. Raises OSError where it cannot be had."""
        config = Config()
        config.bind = [f"[{host}]:{port}" if ":" in host else f"{host}:{port}"]
        config.errorlog = None
        try:
            sockets = config.create_sockets()
        except OSError as error:
            raise OSError(f"INFERENCE_METRICS_PORT: {config.bind[0]} cannot be had: {error.strerror}") from error
        for socket in sockets.insecure_sockets:
            socket.listen(config.backlog)
        self._port = config, sockets

    async def serve(self) -> None:
        """Serves them, and nothing else, on that port. Returns when it is cancelled, at once where there is none."""
        if self._port:
            app = QuartTrio(__name__, static_folder=None)
            app.get("/metrics")(self.respond)
            config, sockets = self._port
            await plain_worker_serve(ASGIWrapper(app), config, sockets=sockets)


def _status_class(error: Exception) -> str:
    """``5xx`` and such; empty where there was no HTTP status."""
    status = error.data.get("status") if isinstance(error, UpstreamError) else None
    return f"{status // 100}xx" if isinstance(status, int) and 100 <= status < 600 else ""
