"""The runner, with a model that plays a script and a clock that jumps."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from inference_trio.deltas import Delta
from inference_trio.errors import (
    BrokenStreamError,
    InvalidParamsError,
    NoSuchTaskError,
    RateLimitedError,
    UpstreamError,
    UpstreamTimeoutError,
)
from inference_trio.protocol import End, Error, FunctionCallRequest, ReasoningChunk, TextChunk
from inference_trio.runner import Runner
from inference_trio.task import Task, TaskState, ToolOutcome

from . import fakes
from .fakes import FakeModel, FakeSink, fail, finish, hang, reasoning, sleep, text, tool_call

TOOLS = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("look", "go")]
RETRYABLE = UpstreamError("busy", status=503, type="overloaded", retryable=True, provider_message="busy")


def make_runner(model: FakeModel, *, parameters: Any = None, tools: Any = TOOLS, **changes: Any) -> Runner:
    settings = fakes.settings(**changes)
    return Runner(
        task=Task("task_1", settings.tool_timeout, settings.max_tool_rounds),
        session_id="s" * 32,
        model=model,
        model_name="fake",
        settings=settings,
        sink=FakeSink(),
        conversation=[{"role": "user", "content": "hi"}],
        tools=tools,
        parameters=parameters or {},
    )


async def run(*rounds: list[Any], **options: Any) -> Runner:
    runner = make_runner(FakeModel(*rounds), **options)
    await runner.run()
    return runner


@asynccontextmanager
async def running(runner: Runner) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(runner.run)
        await trio.testing.wait_all_tasks_blocked()
        yield
        await runner.ended.wait()


def last(runner: Runner) -> Any:
    return runner.sink.notes[-1]


def kinds(runner: Runner) -> list[type]:
    return [type(note) for note in runner.sink.notes]


async def test_text_streams_and_the_task_ends_completed() -> None:
    runner = await run([text("Hel"), text("lo"), finish()])
    assert kinds(runner) == [TextChunk, TextChunk, End]
    assert last(runner).final_text == "Hello"
    assert last(runner).usage.total_tokens == 15
    assert runner.ended.is_set()


async def test_text_and_reasoning_are_told_in_order() -> None:
    batch = [Delta(reasoning="a"), Delta(text="b"), Delta(reasoning="c", text="d")]
    runner = await run([fakes.deltas(*batch), finish()])
    assert [(type(note), note.chunk) for note in runner.sink.notes[:-1]] == [
        (ReasoningChunk, "a"),
        (TextChunk, "b"),
        (ReasoningChunk, "c"),
        (TextChunk, "d"),
    ]


async def test_a_tool_round_goes_on_with_the_results() -> None:
    model = FakeModel(
        [reasoning("hm"), text("wait"), tool_call("c1", "look", '{"at": "it"}'), finish("tool_calls")],
        [text("done"), finish()],
    )
    runner = make_runner(model)
    async with running(runner):
        assert runner.task.state is TaskState.AWAITING_TOOLS
        assert isinstance(last(runner), FunctionCallRequest)
        runner.give_results((ToolOutcome("c1", "seen"),))
    assert last(runner).final_text == "waitdone"
    assert last(runner).usage.total_tokens == 30
    assert [message["role"] for message in last(runner).messages] == ["assistant", "tool", "assistant"]
    first, second = model.requests
    assert [message["role"] for message in first.messages] == ["user"]
    assert [message["role"] for message in second.messages] == ["user", "assistant", "tool"]
    assert second.messages[1]["reasoning_content"] == "hm"
    assert second.messages[1]["tool_calls"][0]["function"]["arguments"] == '{"at":"it"}'


async def test_a_call_that_cannot_be_carried_out_never_reaches_the_client() -> None:
    model = FakeModel(
        [tool_call("c1", "nothing"), tool_call("c2", "look", "{"), finish("tool_calls")], [text("sorry"), finish()]
    )
    runner = make_runner(model)
    await runner.run()
    assert kinds(runner) == [TextChunk, End]
    messages = model.requests[1].messages
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "tool"]
    assert all(message["content"].startswith("Error: ") for message in messages[2:])


async def test_a_forced_tool_choice_is_for_the_first_round() -> None:
    model = FakeModel([tool_call("c1", "look"), finish("tool_calls")], [text("done"), finish()])
    runner = make_runner(model, parameters={"tool_choice": "required", "seed": 1})
    async with running(runner):
        runner.give_results((ToolOutcome("c1", "x"),))
    assert [request.parameters for request in model.requests] == [{"tool_choice": "required", "seed": 1}, {"seed": 1}]


@pytest.mark.parametrize("choice", ["none", "auto"])
async def test_a_free_tool_choice_stays(choice: str) -> None:
    model = FakeModel([tool_call("c1", "look"), finish("tool_calls")], [text("done"), finish()])
    runner = make_runner(model, parameters={"tool_choice": choice})
    async with running(runner):
        runner.give_results((ToolOutcome("c1", "x"),))
    assert [request.parameters for request in model.requests] == [{"tool_choice": choice}] * 2


async def test_ids_that_come_again_in_a_later_round_are_replaced() -> None:
    calls = [tool_call("same", "look"), finish("tool_calls")]
    runner = make_runner(FakeModel(calls, calls, [text("done"), finish()]))
    async with running(runner):
        runner.give_results((ToolOutcome("same", "1"),))
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(InvalidParamsError):
            runner.give_results((ToolOutcome("same", "again"),))
        runner.give_results((ToolOutcome(runner.task.outstanding[0], "2"),))
    assert last(runner).status_message == "completed"


async def test_the_limit_on_rounds_is_an_error(autojump_clock: Any) -> None:
    calls = [tool_call("", "nothing"), finish("tool_calls")]
    runner = await run(calls, max_tool_rounds=3)
    assert last(runner).error["code"] == -32007
    assert len(runner.model.requests) == 4


# Retries


async def test_what_may_succeed_is_tried_again_before_the_first_chunk(autojump_clock: Any) -> None:
    runner = await run([fail(RETRYABLE)], [fail(RETRYABLE)], [text("ok"), finish()])
    assert last(runner).final_text == "ok"
    assert len(runner.model.requests) == 3


async def test_retries_end_with_the_last_error(autojump_clock: Any) -> None:
    runner = await run([fail(RETRYABLE)], max_retries=2)
    assert last(runner).error["data"]["status"] == 503
    assert len(runner.model.requests) == 3


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param([fail(UpstreamError("no", status=400, type="x", retryable=False))], id="refused"),
        pytest.param([fakes.deltas(Delta()), fail(RETRYABLE)], id="after the first chunk"),
        pytest.param([fail(RateLimitedError("wait", retry_after=61.0))], id="asked to wait too long"),
        pytest.param([fail(BrokenStreamError("cut"))], id="broken"),
    ],
)
async def test_what_makes_no_sense_to_try_again_is_not(steps: list[Any], autojump_clock: Any) -> None:
    runner = await run(steps)
    assert isinstance(last(runner), Error)
    assert len(runner.model.requests) == 1


async def test_retry_after_is_kept(autojump_clock: Any) -> None:
    before = trio.current_time()
    runner = await run([fail(RateLimitedError("wait", retry_after=42.0))], [text("ok"), finish()])
    assert trio.current_time() - before >= 42
    assert last(runner).final_text == "ok"


async def test_the_backoff_grows_and_is_bounded(autojump_clock: Any) -> None:
    times: list[float] = []

    async def note_time(_: Any) -> None:
        times.append(trio.current_time())

    await run([note_time, fail(RETRYABLE)], max_retries=8)
    waits = [later - earlier for earlier, later in itertools.pairwise(times)]
    bounds = [min(8.0, 0.5 * 2**attempt) for attempt in range(8)]
    assert all(bound / 2 <= pause <= bound for pause, bound in zip(waits, bounds, strict=True))


# Time limits


async def test_a_silent_model_is_given_up_before_its_first_token(autojump_clock: Any) -> None:
    runner = await run([sleep(11), text("late"), finish()], first_token_timeout=10)
    assert last(runner).error["code"] == -32002
    assert last(runner).error["data"] == {"phase": "first_token"}


async def test_a_model_that_falls_silent_is_given_up_with_its_text_kept(autojump_clock: Any) -> None:
    runner = await run([text("Hel"), sleep(6), text("lo"), finish()], token_timeout=5)
    assert last(runner).error["data"] == {"phase": "token", "partial_text": "Hel"}


async def test_chunks_that_say_nothing_show_that_the_stream_lives(autojump_clock: Any) -> None:
    runner = await run(
        [fakes.deltas(Delta()), sleep(4), fakes.deltas(Delta()), sleep(4), text("x"), finish()], token_timeout=5
    )
    assert last(runner).final_text == "x"


async def test_connecting_too_slowly_is_tried_again(autojump_clock: Any) -> None:
    slow = UpstreamTimeoutError("slow", phase="connect")
    runner = await run([fail(slow)], [text("ok"), finish()])
    assert last(runner).final_text == "ok"


async def test_a_task_ends_at_its_time_limit(autojump_clock: Any) -> None:
    runner = await run([text("a"), sleep(4), text("b"), sleep(4), text("c"), finish()], task_timeout=7)
    assert last(runner).error["data"] == {"phase": "task", "partial_text": "ab"}


async def test_tool_results_that_do_not_come_end_the_task(autojump_clock: Any) -> None:
    runner = await run([tool_call("c1", "look"), finish("tool_calls")], tool_timeout=30)
    assert last(runner).error == {
        "code": -32003,
        "message": "No result came within 30 s",
        "data": {"outstanding": ["c1"]},
    }


async def test_waiting_for_the_client_does_not_count_as_the_models_silence(autojump_clock: Any) -> None:
    runner = make_runner(FakeModel([text("a"), text("b"), finish()]), token_timeout=5)
    runner.sink.room = trio.Event()
    async with running(runner):
        assert kinds(runner) == [TextChunk]
        await trio.sleep(100)
        runner.sink.room.set()
    assert last(runner).final_text == "ab"


# The end of a stream


async def test_what_breaks_after_the_finish_reason_is_no_error(autojump_clock: Any) -> None:
    for broken in (fail(BrokenStreamError("cut")), hang):
        runner = await run([text("all"), finish(usage=None), broken])
        assert (last(runner).final_text, last(runner).usage) == ("all", None)


async def test_a_stream_without_a_finish_reason_is_an_error_with_its_text() -> None:
    runner = await run([text("half")])
    assert (last(runner).error["code"], last(runner).error["data"]["partial_text"]) == (-32006, "half")


async def test_a_defect_is_told_without_its_details(caplog: pytest.LogCaptureFixture) -> None:
    runner = await run([text("x"), fail(RuntimeError("/secret/path"))])
    assert last(runner).error["code"] == -32603
    assert "/secret" not in str(last(runner).error)
    assert "/secret" in caplog.text


# Cancelling


async def cancel_when(condition: Callable[[Runner], bool], *rounds: list[Any], **options: Any) -> Runner:
    runner = make_runner(FakeModel(*rounds), **options)
    async with running(runner):
        assert condition(runner)
        runner.cancel()
    assert runner.model.streaming == 0
    assert runner.task.state is TaskState.CANCELLED
    assert last(runner).status_message == "cancelled"
    return runner


async def test_cancel_before_the_first_token() -> None:
    runner = await cancel_when(lambda runner: not runner.sink.notes, [hang])
    assert last(runner).messages == []


async def test_cancel_in_mid_stream_keeps_the_text() -> None:
    runner = await cancel_when(lambda runner: bool(runner.sink.notes), [text("Hel"), hang])
    assert last(runner).messages == [{"role": "assistant", "content": "Hel"}]
    assert last(runner).usage is None


async def test_cancel_while_waiting_to_try_again(mock_clock: Any) -> None:
    await cancel_when(lambda runner: len(runner.model.requests) == 1, [fail(RETRYABLE)])


async def test_cancel_while_waiting_for_tools_leaves_no_call_without_a_result() -> None:
    runner = await cancel_when(
        lambda runner: runner.task.state is TaskState.AWAITING_TOOLS, [tool_call("c1", "look"), finish("tool_calls")]
    )
    assert [message["role"] for message in last(runner).messages] == ["assistant", "tool"]


async def test_cancel_while_the_client_does_not_read() -> None:
    runner = make_runner(FakeModel([text("a"), text("b"), finish()]))
    runner.sink.room = trio.Event()
    async with running(runner):
        runner.cancel()
    assert [note.method for note in runner.sink.notes] == ["text_chunk", "end"]


async def test_cancel_after_the_end_changes_nothing() -> None:
    runner = await run([text("x"), finish()])
    runner.cancel()
    assert (runner.task.state, len(runner.sink.notes)) == (TaskState.DONE, 2)


async def test_cancel_before_the_task_has_run_ends_it_too() -> None:
    runner = make_runner(FakeModel([text("x"), finish()]))
    runner.cancel()
    await runner.run()
    assert kinds(runner) == [End]


async def test_the_end_of_the_server_ends_the_task_as_cancelled() -> None:
    runner = make_runner(FakeModel([text("x"), hang]))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(runner.run)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert last(runner).status_message == "cancelled"


# Results at the wrong time


async def test_results_for_a_task_that_waits_for_none_are_refused() -> None:
    runner = make_runner(FakeModel([text("x"), hang]))
    async with running(runner):
        with pytest.raises(NoSuchTaskError):
            runner.give_results((ToolOutcome("c1", "x"),))
        runner.cancel()


async def test_results_in_several_calls_and_any_order() -> None:
    model = FakeModel(
        [tool_call("c1", "look", index=0), tool_call("c2", "go", index=1), finish("tool_calls")], [text("k"), finish()]
    )
    runner = make_runner(model)
    async with running(runner):
        runner.give_results((ToolOutcome("c2", "two"),))
        await trio.testing.wait_all_tasks_blocked()
        assert runner.task.outstanding == ["c1"]
        runner.give_results((ToolOutcome("c1", "one"),))
    assert [message["content"] for message in last(runner).messages[1:3]] == ["one", "two"]


async def test_one_line_tells_how_the_task_ended(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="inference_trio")
    await run([text("secret answer"), finish()])
    (record,) = [record for record in caplog.records if record.getMessage().startswith("task ended")]
    assert (record.model, record.state, record.rounds, record.output_tokens) == ("fake", "done", 1, 5)
    assert "secret answer" not in caplog.text


async def test_prompt_and_answer_are_logged_only_when_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="inference_trio")
    await run([text("the answer"), finish()], log_content=True)
    (record,) = [record for record in caplog.records if record.getMessage().startswith("task ended")]
    assert (record.conversation, record.answer) == ([{"role": "user", "content": "hi"}], "the answer")


async def test_an_end_that_cannot_be_told_becomes_an_error(caplog: pytest.LogCaptureFixture) -> None:
    class Sink(FakeSink):
        def append(self, note: Any) -> None:
            if isinstance(note, End):
                raise UnicodeEncodeError("utf-8", "x", 0, 1, "surrogates not allowed")
            super().append(note)

    runner = make_runner(FakeModel([text("x"), finish()]))
    runner.sink = Sink()
    await runner.run()
    assert last(runner).error["code"] == -32603
    assert "defect" in caplog.text


async def test_usage_that_does_not_come_is_not_waited_for_long(autojump_clock: Any) -> None:
    before = trio.current_time()
    runner = await run([text("all"), finish(usage=None), hang])
    assert last(runner).final_text == "all"
    assert 5.0 <= trio.current_time() - before <= 5.5


async def test_parameters_of_tools_need_tools() -> None:
    parameters = {"tool_choice": "auto", "parallel_tool_calls": False, "seed": 1}
    runner = await run([text("x"), finish()], tools=[], parameters=parameters)
    assert runner.model.requests[0].parameters == {"seed": 1}


# How much a task may gather


async def test_a_model_that_does_not_stop_is_stopped() -> None:
    model = FakeModel([text("x" * 1000), reasoning("y" * 2999), text("z"), text("!"), hang])
    runner = make_runner(model, max_message_bytes=1000)
    with trio.fail_after(5):
        await runner.run()
    assert (last(runner).status_message, last(runner).finish_reason) == ("length", "length")
    assert last(runner).final_text == "x" * 1000 + "z!"
    assert model.streaming == 0
    assert runner.sink.budget.used == 0


async def test_a_call_that_does_not_end_is_none() -> None:
    model = FakeModel([text("so"), tool_call("c1", "look", '{"at": "' + "x" * 4000), hang])
    runner = make_runner(model, max_message_bytes=1000)
    with trio.fail_after(5):
        await runner.run()
    assert (kinds(runner), last(runner).status_message) == ([TextChunk, End], "length")


async def test_results_that_are_too_much_are_refused_and_smaller_ones_taken() -> None:
    model = FakeModel([tool_call("c1", "look", "{}"), finish("tool_calls")], [text("done"), finish()])
    runner = make_runner(model, max_message_bytes=1000)
    async with running(runner):
        with pytest.raises(InvalidParamsError, match="at most 3998 characters, as the task has 2 already, got 3999"):
            runner.give_results((ToolOutcome("c1", "r" * 3999),))
        assert runner.task.outstanding == ["c1"]
        runner.give_results((ToolOutcome("c1", "r" * 3000),))
    assert last(runner).final_text == "done"
    assert runner.sink.budget.used == 0
