"""Every state meets every event; the stories of a task; and what holds after any events whatever."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference_trio.chat import JsonObject
from inference_trio.errors import InvalidParamsError, ToolTimeoutError, UpstreamError
from inference_trio.jsonrpc import encode, loads
from inference_trio.protocol import (
    End,
    Error,
    FunctionCallRequest,
    Generate,
    ReasoningChunk,
    ResultOfTool,
    TaskNotification,
    TextChunk,
    Usage,
)
from inference_trio.task import (
    TRANSITIONS,
    CancelRequested,
    Event,
    IllegalTransitionError,
    ReasoningReceived,
    RoundFinished,
    Task,
    TaskFailed,
    TaskState,
    TextReceived,
    ToolCall,
    ToolCallsRequested,
    ToolOutcome,
    ToolResultsReceived,
    outcome_of,
)

A = ToolCall("a", "weather", {"city": "Bern"})
B = ToolCall("b", "clock", {})
BAD = ToolCall("x", "nuke", {}, problem="There is no tool `nuke`.")
FAILURE = UpstreamError("It failed", status=500, retryable=True)
S = TaskState


def task_after(*events: Event, max_tool_rounds: int = 32) -> Task:
    task = Task("t", tool_timeout=300.0, max_tool_rounds=max_tool_rounds)
    for event in events:
        task.apply(event)
    return task


def told(task: Task, *events: Event) -> list[TaskNotification]:
    return [note for event in events for note in task.apply(event)]


def results(*call_ids: str) -> ToolResultsReceived:
    return ToolResultsReceived(tuple(ToolOutcome(call_id, f"result of {call_id}") for call_id in call_ids))


def calls(*requested: ToolCall, usage: Usage | None = None) -> ToolCallsRequested:
    return ToolCallsRequested(requested, "tool_calls", usage)


def the_end(notes: list[TaskNotification]) -> End:
    """The one notification there is, an `End`."""
    (end,) = notes
    assert isinstance(end, End)
    return end


# Each state and each event

REACHED: dict[TaskState, tuple[Event, ...]] = {
    S.STREAMING: (TextReceived("Hi"), ReasoningReceived("Hm")),
    S.AWAITING_TOOLS: (TextReceived("Hi"), calls(A, B, BAD), results("b")),
    S.DONE: (TextReceived("Hi"), RoundFinished("stop")),
    S.CANCELLED: (TextReceived("Hi"), CancelRequested()),
    S.FAILED: (TextReceived("Hi"), TaskFailed(FAILURE)),
}
EVENTS: list[Event] = [
    TextReceived("more"),
    ReasoningReceived("more"),
    RoundFinished("stop", Usage(1, 2, 3)),
    calls(ToolCall("c", "f", {})),
    calls(BAD),
    results("a"),
    CancelRequested(),
    TaskFailed(FAILURE),
]


def test_the_events_walked_are_all_there_are() -> None:
    assert set(REACHED) == set(TRANSITIONS) == set(TaskState)
    assert {type(event) for event in EVENTS} == set(Event.__args__)
    assert {kind for allowed in TRANSITIONS.values() for kind in allowed} == set(Event.__args__)


@pytest.mark.parametrize("state", TaskState)
@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_an_event_leads_where_the_table_says_or_raises_and_changes_nothing(state: TaskState, event: Event) -> None:
    task = task_after(*REACHED[state])
    assert task.state is state
    if type(event) in TRANSITIONS[state]:
        task.apply(event)
        assert task.state in TRANSITIONS[state][type(event)]
    else:
        before = copy.deepcopy(task)
        with pytest.raises(IllegalTransitionError, match=f"{type(event).__name__} in state {state.value}"):
            task.apply(event)
        assert task == before


@pytest.mark.parametrize(
    ("state", "events", "expected"),
    [
        (S.STREAMING, [calls(A)], S.AWAITING_TOOLS),
        (S.STREAMING, [calls(BAD)], S.STREAMING),
        (S.STREAMING, [calls(BAD), calls(BAD), calls(BAD)], S.FAILED),
        (S.AWAITING_TOOLS, [results("a")], S.STREAMING),
        (S.STREAMING, [calls(A, B), results("a")], S.AWAITING_TOOLS),
    ],
)
def test_every_state_of_the_table_is_reached(state: TaskState, events: list[Event], expected: TaskState) -> None:
    assert task_after(*REACHED[state], *events, max_tool_rounds=2).state is expected


@pytest.mark.parametrize("state", TaskState)
def test_a_task_has_ended_in_the_states_that_have_no_way_out(state: TaskState) -> None:
    assert task_after(*REACHED[state]).has_ended is (state in (S.DONE, S.CANCELLED, S.FAILED))


# Stories


def test_an_answer_in_text_is_told_chunk_by_chunk_and_whole_at_the_end() -> None:
    task = task_after()
    usage = Usage(input_tokens=10, output_tokens=2, total_tokens=12)
    assert told(task, TextReceived("Hel"), TextReceived("lo"), RoundFinished("stop", usage)) == [
        TextChunk(task_id="t", chunk="Hel"),
        TextChunk(task_id="t", chunk="lo"),
        End(
            task_id="t",
            status_message="completed",
            final_text="Hello",
            finish_reason="stop",
            usage=Usage(input_tokens=10, output_tokens=2, total_tokens=12),
            messages=[{"role": "assistant", "content": "Hello"}],
        ),
    ]


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_reasoning_is_told_and_goes_back_under_the_name_it_came_with(field: str) -> None:
    task = task_after()
    notes = told(task, ReasoningReceived("2 +", field), ReasoningReceived(" 2", field), TextReceived("4"))
    assert notes == [
        ReasoningChunk(task_id="t", chunk="2 +"),
        ReasoningChunk(task_id="t", chunk=" 2"),
        TextChunk(task_id="t", chunk="4"),
    ]
    end = the_end(told(task, RoundFinished("stop")))
    assert end.final_text == "4"
    assert end.messages == [{"role": "assistant", "content": "4", field: "2 + 2"}]


def test_reasoning_alone_adds_no_message() -> None:
    end = the_end(told(task_after(ReasoningReceived("Hm")), RoundFinished("stop")))
    assert (end.final_text, end.messages) == ("", [])


def test_a_model_that_says_nothing_ends_with_no_text_and_no_message() -> None:
    end = the_end(told(task_after(), RoundFinished("stop")))
    assert (end.status_message, end.final_text, end.messages) == ("completed", "", [])


def test_two_rounds_with_parallel_tools_whose_results_come_in_any_order() -> None:
    task = task_after(ReasoningReceived("first"), TextReceived("Let me see. "))
    assert told(task, calls(A, B)) == [
        FunctionCallRequest(
            task_id="t", request_id="a", tool_name="weather", parameters={"city": "Bern"}, timeout=300.0
        ),
        FunctionCallRequest(task_id="t", request_id="b", tool_name="clock", parameters={}, timeout=300.0),
    ]
    assert (task.state, task.outstanding, task.rounds) == (S.AWAITING_TOOLS, ["a", "b"], 1)
    assert told(task, results("b")) == []
    assert (task.state, task.outstanding, task.rounds) == (S.AWAITING_TOOLS, ["a"], 1)
    assert told(task, results("a")) == []
    assert (task.state, task.outstanding, task.rounds) == (S.STREAMING, [], 2)
    told(task, calls(ToolCall("c", "clock", {}), ToolCall("d", "clock", {"tz": "Zürich"})), results("d", "c"))
    assert (task.state, task.rounds) == (S.STREAMING, 3)
    end = the_end(told(task, TextReceived("Done."), RoundFinished("stop"))[1:])
    assert end.final_text == "Let me see. Done."
    assert end.messages == [
        {
            "role": "assistant",
            "content": "Let me see. ",
            "reasoning_content": "first",
            "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Bern"}'}},
                {"id": "b", "type": "function", "function": {"name": "clock", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "tool_call_id": "a", "content": "result of a"},
        {"role": "tool", "tool_call_id": "b", "content": "result of b"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "clock", "arguments": "{}"}},
                {"id": "d", "type": "function", "function": {"name": "clock", "arguments": '{"tz":"Zürich"}'}},
            ],
        },
        {"role": "tool", "tool_call_id": "c", "content": "result of c"},
        {"role": "tool", "tool_call_id": "d", "content": "result of d"},
        {"role": "assistant", "content": "Done."},
    ]


def test_all_results_may_come_at_once() -> None:
    task = task_after(calls(A, B), results("b", "a"))
    assert (task.state, task.rounds) == (S.STREAMING, 2)


def test_when_every_call_is_refused_the_next_round_begins_at_once() -> None:
    task = task_after(TextReceived("Hi"))
    assert told(task, calls(BAD)) == []
    assert (task.state, task.outstanding, task.rounds) == (S.STREAMING, [], 2)
    assert task.messages[-1] == {"role": "tool", "tool_call_id": "x", "content": "Error: There is no tool `nuke`."}


def test_a_refused_call_is_not_told_and_the_others_are_waited_for() -> None:
    task = task_after()
    notes = told(task, calls(A, BAD, B))
    assert [note.request_id for note in notes if isinstance(note, FunctionCallRequest)] == ["a", "b"]
    assert task.outstanding == ["a", "b"]
    told(task, results("b"), results("a"))
    assert [message["content"] for message in task.messages[1:]] == [
        "result of a",
        "Error: There is no tool `nuke`.",
        "result of b",
    ]


@pytest.mark.parametrize(
    "outcomes",
    [
        results("unknown"),
        results("a"),
        results("x"),
        results("b", "b"),
        results("b", "a"),
        results("b", "unknown"),
        ToolResultsReceived((ToolOutcome("b", "1"), ToolOutcome("b", "2"))),
    ],
    ids=["unknown", "answered", "refused", "twice", "one answered", "one unknown", "two for one"],
)
def test_a_result_for_a_call_that_is_not_outstanding_changes_nothing(outcomes: ToolResultsReceived) -> None:
    task = task_after(calls(A, B, BAD), results("a"))
    before = copy.deepcopy(task)
    with pytest.raises(InvalidParamsError) as caught:
        task.apply(outcomes)
    assert task == before
    assert caught.value.message.startswith("Expected each of ['b'] at most once, got [")
    assert caught.value.message.endswith("- at `params.results`")


def test_many_long_ids_are_not_sent_back_whole() -> None:
    unknown = results(*(f"{number}{'x' * 1000}" for number in range(1000)))
    with pytest.raises(InvalidParamsError) as caught:
        task_after(calls(A)).apply(unknown)
    assert len(caught.value.message) < 5000


def test_ids_of_an_earlier_round_are_no_longer_outstanding() -> None:
    task = task_after(calls(A), results("a"), calls(B))
    with pytest.raises(InvalidParamsError):
        task.apply(results("a"))
    assert task.outstanding == ["b"]


@pytest.mark.parametrize("call", [A, BAD])
def test_one_round_of_tools_too_many_fails_the_task(call: ToolCall) -> None:
    def events_of(number: int) -> list[Event]:
        asked = ToolCall(f"c{number}", call.name, {}, call.problem)
        return [TextReceived(f"{number}. "), calls(asked), *([] if call.problem else [results(asked.id)])]

    task = task_after(*events_of(1), *events_of(2), max_tool_rounds=2)
    assert (task.state, task.rounds) == (S.STREAMING, 3)
    (_, error) = told(task, *events_of(3)[:2])
    assert isinstance(error, Error)
    assert error.error["code"] == -32007
    assert error.error["data"] == {"partial_text": "1. 2. 3. "}
    assert task.state is S.FAILED


def test_the_round_after_the_last_one_with_tools_may_still_answer() -> None:
    task = task_after(calls(A), results("a"), TextReceived("Done."), max_tool_rounds=1)
    assert the_end(told(task, RoundFinished("stop"))).status_message == "completed"


@pytest.mark.parametrize(
    ("reason", "status"),
    [
        ("stop", "completed"),
        ("length", "length"),
        ("content_filter", "content_filter"),
        ("tool_calls", "completed"),
        ("end_turn", "completed"),
        ("", "completed"),
    ],
)
def test_the_finish_reason_is_passed_on_and_becomes_a_status(reason: str, status: str) -> None:
    end = the_end(told(task_after(TextReceived("Hi")), RoundFinished(reason)))
    assert (end.status_message, end.finish_reason) == (status, reason)
    assert end.messages == [{"role": "assistant", "content": "Hi"}]


# Cancelling


def test_a_cancel_before_anything_came_leaves_nothing_behind() -> None:
    end = the_end(told(task_after(), CancelRequested()))
    assert end == End(
        task_id="t", status_message="cancelled", final_text="", finish_reason=None, usage=None, messages=[]
    )


def test_a_cancel_keeps_the_text_that_came() -> None:
    task = task_after(ReasoningReceived("Hm"), TextReceived("Hel"))
    end = the_end(told(task, CancelRequested()))
    assert (end.status_message, end.final_text, end.finish_reason) == ("cancelled", "Hel", None)
    assert end.messages == [{"role": "assistant", "content": "Hel", "reasoning_content": "Hm"}]


def test_a_cancel_while_tools_are_awaited_answers_each_call() -> None:
    task = task_after(TextReceived("Let me see."), calls(A, BAD, B), results("b"))
    end = the_end(told(task, CancelRequested()))
    assert end.final_text == "Let me see."
    assert end.messages[1:] == [
        {
            "role": "tool",
            "tool_call_id": "a",
            "content": "Error: the call was cancelled before it had a result.",
        },
        {"role": "tool", "tool_call_id": "x", "content": "Error: There is no tool `nuke`."},
        {"role": "tool", "tool_call_id": "b", "content": "result of b"},
    ]


def test_a_cancel_in_a_later_round_keeps_the_text_of_all() -> None:
    task = task_after(TextReceived("One. "), calls(A), results("a"), TextReceived("Tw"))
    end = the_end(told(task, CancelRequested()))
    assert end.final_text == "One. Tw"
    assert [message["role"] for message in end.messages] == ["assistant", "tool", "assistant"]
    assert end.messages[-1] == {"role": "assistant", "content": "Tw"}


# Failing


def test_a_failure_before_any_text_is_the_error_as_it_is() -> None:
    assert told(task_after(ReasoningReceived("Hm")), TaskFailed(FAILURE)) == [
        Error(task_id="t", error=FAILURE.to_wire())
    ]


def test_a_failure_after_text_has_that_text_and_leaves_the_error_itself_alone() -> None:
    before = copy.deepcopy(FAILURE.to_wire())
    task = task_after(TextReceived("One. "), calls(A), results("a"), TextReceived("Tw"))
    (error,) = told(task, TaskFailed(FAILURE))
    assert isinstance(error, Error)
    assert error.error == {**before, "data": {**before["data"], "partial_text": "One. Tw"}}
    assert FAILURE.to_wire() == before


def test_a_failure_while_tools_are_awaited_ends_the_task() -> None:
    task = task_after(calls(A))
    (error,) = told(task, TaskFailed(ToolTimeoutError("No result came", outstanding=["a"])))
    assert isinstance(error, Error)
    assert error.error == {"code": -32003, "message": "No result came", "data": {"outstanding": ["a"]}}
    assert task.state is S.FAILED


# Usage


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (Usage(10, 2, 12), Usage(20, 3, 25), Usage(30, 5, 37)),
        (Usage(0, 0, 0), Usage(0, 0, 0), Usage(0, 0, 0)),
        (Usage(10, 2, 12), None, None),
        (None, Usage(10, 2, 12), None),
        (None, None, None),
    ],
)
def test_usage_is_the_sum_over_all_rounds_or_null(
    first: Usage | None, second: Usage | None, expected: Usage | None
) -> None:
    task = task_after(calls(A, usage=first), results("a"))
    assert the_end(told(task, RoundFinished("stop", second))).usage == expected


def test_usage_after_a_cancel_is_null_unless_every_round_was_complete() -> None:
    complete = task_after(calls(A, usage=Usage(10, 2, 12)))
    assert the_end(told(complete, CancelRequested())).usage == Usage(10, 2, 12)
    cut_off = task_after(calls(A, usage=Usage(10, 2, 12)), results("a"))
    assert the_end(told(cut_off, CancelRequested())).usage is None


def test_usage_before_any_round_is_complete_is_unknown() -> None:
    assert task_after().usage is None


# Results


@pytest.mark.parametrize(
    ("result", "content"),
    [
        ("21 °C", "21 °C"),
        ("", ""),
        (None, "null"),
        (True, "true"),
        (2**70, str(2**70)),
        ({"temp": [1.5, None, "ü"]}, '{"temp":[1.5,null,"ü"]}'),
    ],
)
def test_the_model_gets_text_as_it_is_and_anything_else_as_json(result: Any, content: str) -> None:
    assert outcome_of(ResultOfTool(tool_call_id="c", result=result)) == ToolOutcome("c", content)


def test_the_model_gets_an_error_as_such() -> None:
    failed = ResultOfTool(tool_call_id="c", is_error=True, error_message="it broke")
    assert outcome_of(failed) == ToolOutcome("c", "Error: it broke")


# Whatever happens

TEXTS = st.text(min_size=1, max_size=5)
USAGES = st.none() | st.builds(Usage, *[st.integers(0, 9)] * 3)
PARAMETERS = st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3), max_size=2)


@st.composite
def next_events(draw: st.DrawFn, task: Task) -> Event:
    """An event that the task's state allows."""
    kind = draw(st.sampled_from(sorted(TRANSITIONS[task.state], key=lambda kind: kind.__name__)))
    if kind is ToolCallsRequested:
        count = draw(st.integers(1, 3))
        problems = draw(st.lists(st.none() | st.just("No."), min_size=count, max_size=count))
        requested = [
            ToolCall(f"{task.rounds}-{number}", "f", draw(PARAMETERS), problem)
            for number, problem in enumerate(problems)
        ]
        return calls(*requested, usage=draw(USAGES))
    if kind is ToolResultsReceived:
        answered = draw(st.lists(st.sampled_from(task.outstanding), min_size=1, unique=True))
        return ToolResultsReceived(tuple(ToolOutcome(call_id, draw(st.text(max_size=3))) for call_id in answered))
    simple: dict[type[Any], st.SearchStrategy[Any]] = {
        TextReceived: st.builds(TextReceived, TEXTS),
        ReasoningReceived: st.builds(ReasoningReceived, TEXTS, st.sampled_from(["reasoning", "reasoning_content"])),
        RoundFinished: st.builds(RoundFinished, st.sampled_from(["stop", "length", "content_filter"]), USAGES),
        CancelRequested: st.just(CancelRequested()),
        TaskFailed: st.just(TaskFailed(FAILURE)),
    }
    event: Event = draw(simple[kind])
    return event


def check_messages(messages: list[JsonObject]) -> None:
    """They are valid to be sent back: they decode, and every call has its result, after it and before the next."""
    history = loads(encode(messages))
    assert history == messages
    msgspec.convert({"history": history, "message": "Hi"}, Generate)
    awaited: list[str] = []
    for message in messages:
        if message["role"] == "tool":
            awaited.remove(message["tool_call_id"])
        else:
            assert not awaited
            assert message["content"] or message.get("tool_calls")
            awaited = [call["id"] for call in message.get("tool_calls", ())]
    assert not awaited


def check_notes(task: Task, notes: Iterable[TaskNotification]) -> None:
    """What a client was told is whole: one end at most, as the last thing, and all of the text."""
    kinds = [type(note) for note in notes]
    endings = [note for note in notes if isinstance(note, End | Error)]
    assert len(endings) == (1 if task.has_ended else 0)
    assert not endings or kinds[-1] in (End, Error)
    text = "".join(note.chunk for note in notes if isinstance(note, TextChunk))
    assert task.text == text
    for ending in endings:
        if isinstance(ending, End):
            assert (ending.final_text, ending.messages) == (text, task.messages)
            assert "".join(each["content"] or "" for each in task.messages if each["role"] == "assistant") == text
        else:
            assert ending.error.get("data", {}).get("partial_text", "") == text


@settings(max_examples=150)
@given(st.data())
def test_after_any_events_a_task_is_whole_and_a_cancel_leaves_a_valid_history(data: st.DataObject) -> None:
    task = task_after(max_tool_rounds=3)
    notes: list[TaskNotification] = []
    valid_calls: list[str] = []
    for _ in range(data.draw(st.integers(1, 12))):
        if task.has_ended:
            break
        calls_are_open = task.state is S.AWAITING_TOOLS
        event = data.draw(next_events(task))
        notes += task.apply(event)
        check_notes(task, notes)
        if isinstance(event, ToolCallsRequested) and not task.has_ended:
            valid_calls += [call.id for call in event.calls if call.problem is None]
        assert [note.request_id for note in notes if isinstance(note, FunctionCallRequest)] == valid_calls
        if task.has_ended:
            calls_are_open &= task.state is S.FAILED
        else:
            calls_are_open = task.state is S.AWAITING_TOOLS
            cancelled = copy.deepcopy(task)
            check_notes(cancelled, [*notes, *cancelled.apply(CancelRequested())])
            check_messages(cancelled.messages)
        if not calls_are_open:
            check_messages(task.messages)


@pytest.mark.parametrize("state", [S.STREAMING, S.AWAITING_TOOLS])
def test_a_cancel_in_each_state_leaves_every_call_with_one_result(state: TaskState) -> None:
    end = the_end(told(task_after(*REACHED[state]), CancelRequested()))
    requested = [call["id"] for message in end.messages for call in message.get("tool_calls", ())]
    assert requested == [message["tool_call_id"] for message in end.messages if message["role"] == "tool"]
    check_messages(end.messages)
