"""A task's report: what the log, the metrics and the trace are made from."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from inference_trio import errors
from inference_trio.errors import UpstreamError, UpstreamTimeoutError
from inference_trio.report import FailedAttempt, TaskReport
from inference_trio.runner import Runner
from inference_trio.task import TaskState, ToolOutcome
from tests.fakes import USAGE, FakeModel, fail, finish, hang, sleep, text, tool_call
from tests.test_runner import make_runner, running

BUSY = UpstreamError("busy", status=503, type="overloaded", retryable=True, provider_message="", retry_after=2.0)
BROKE = UpstreamError("no", status=401, type="auth", retryable=False, provider_message="")


class Notebook:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.failures: list[FailedAttempt] = []
        self.reports: list[TaskReport] = []
        self.lost: list[str] = []

    def attempt_failed(self, model: str, failure: FailedAttempt) -> None:
        self.failures.append(failure)

    def task_ended(self, report: TaskReport) -> None:
        self.reports.append(report)

    def task_lost(self, model: str) -> None:
        self.lost.append(model)


def observed(*rounds: list[Any], **options: Any) -> tuple[Runner, Notebook]:
    runner, notebook = make_runner(FakeModel(*rounds), **options), Notebook()
    runner.observers = [notebook]
    return runner, notebook


async def report_of(*rounds: list[Any], **options: Any) -> TaskReport:
    runner, notebook = observed(*rounds, **options)
    await runner.run()
    (report,) = notebook.reports
    return report


async def test_a_task_is_reported_with_its_times_and_usage(autojump_clock: trio.testing.MockClock) -> None:
    report = await report_of([sleep(2), text("Hi"), sleep(3), finish()])
    assert (report.task_id, report.model, report.state, report.end) == ("task_1", "fake", TaskState.DONE, "done")
    assert (report.first_token_after, report.duration) == (2, 5)
    assert report.usage == USAGE
    (round_,) = report.rounds
    assert (round_.finish_reason, round_.usage) == ("stop", USAGE)
    assert (round_.started_at, round_.ended_at) == (report.started_at, report.ended_at)


async def test_retries_are_told_at_once_and_reported(autojump_clock: trio.testing.MockClock) -> None:
    runner, notebook = observed([fail(BUSY)], [hang])
    async with running(runner):
        assert [(failure.error, failure.is_retried) for failure in notebook.failures] == [(BUSY, True)]
        assert notebook.reports == []
        runner.cancel()
    (report,) = notebook.reports
    assert report.retries == 1
    assert report.rounds[0].failures == tuple(notebook.failures)
    assert (report.end, report.first_token_after) == ("cancelled", None)
    assert report.rounds[0].ended_at is None


async def test_what_is_not_retried_is_told_as_such(autojump_clock: trio.testing.MockClock) -> None:
    runner, notebook = observed([fail(BROKE)])
    await runner.run()
    assert [failure.is_retried for failure in notebook.failures] == [False]
    assert notebook.reports[0].error is BROKE
    assert notebook.reports[0].end == "upstream"
    assert notebook.reports[0].retries == 0


async def test_the_last_of_the_attempts_is_no_retry(autojump_clock: trio.testing.MockClock) -> None:
    report = await report_of([fail(BUSY)], max_retries=2)
    assert [failure.is_retried for failure in report.rounds[0].failures] == [True, True, False]
    assert report.retries == 2


async def test_each_tool_call_is_reported_until_its_result(autojump_clock: trio.testing.MockClock) -> None:
    runner, notebook = observed(
        [tool_call("c1", "look"), tool_call("c2", "go"), tool_call("c3", "nothing"), finish("tool_calls")],
        [text("done"), finish()],
    )
    async with running(runner):
        start = trio.current_time()
        await trio.sleep(1)
        runner.give_results((ToolOutcome("c2", "went"),))
        await trio.sleep(1)
        runner.give_results((ToolOutcome("c1", "seen"),))
    (report,) = notebook.reports
    assert [(wait.call_id, wait.tool_name) for wait in report.tool_waits] == [("c1", "look"), ("c2", "go")]
    assert [wait.ended_at - start for wait in report.tool_waits] == [2, 1]
    assert [round_.finish_reason for round_ in report.rounds] == ["tool_calls", "stop"]


async def test_a_result_that_does_not_come_leaves_the_wait_open(autojump_clock: trio.testing.MockClock) -> None:
    report = await report_of([tool_call("c1", "look"), finish("tool_calls")], tool_timeout=7.0)
    (wait,) = report.tool_waits
    assert wait.ended_at is None
    assert (report.end, report.duration) == ("tool_timeout", 7)


async def test_too_many_rounds_are_an_error_of_the_report_too() -> None:
    report = await report_of([tool_call("c1", "nothing"), finish("tool_calls")], max_tool_rounds=1)
    assert (report.state, report.end) == (TaskState.FAILED, "too_many_rounds")


async def test_a_silent_model_is_reported_as_a_failed_attempt(autojump_clock: trio.testing.MockClock) -> None:
    report = await report_of([hang], first_token_timeout=3.0)
    (failure,) = report.rounds[0].failures
    assert isinstance(failure.error, UpstreamTimeoutError)
    assert (report.end, report.retries) == ("upstream_timeout", 0)


@pytest.mark.parametrize("kind", errors.InferenceError.__subclasses__())
def test_every_error_has_a_kind_of_its_own(kind: type[errors.InferenceError]) -> None:
    words = {other: _kind(other) for other in errors.InferenceError.__subclasses__()}
    assert sum(word == words[kind] for word in words.values()) == 1
    assert words[kind].replace("_", "").isalpha()


def _kind(error: type[errors.InferenceError]) -> str:
    return error.__new__(error).kind
