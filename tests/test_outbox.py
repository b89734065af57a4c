"""The outbox against a naive model of it: nothing lost, nothing twice, nothing out of order, and bounded."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from functools import partial
from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from inference_trio.errors import OverloadedError
from inference_trio.outbox import Budget, Outbox, Replay, _size_of
from inference_trio.protocol import End, Error, FunctionCallRequest, ReasoningChunk, TaskNotification, TextChunk

LARGE = 10**9


def text(chunk: str, task_id: str = "t") -> TextChunk:
    return TextChunk(task_id=task_id, chunk=chunk)


def reasoning(chunk: str, task_id: str = "t") -> ReasoningChunk:
    return ReasoningChunk(task_id=task_id, chunk=chunk)


def request(call_id: str, task_id: str = "t") -> FunctionCallRequest:
    return FunctionCallRequest(task_id=task_id, request_id=call_id, tool_name="f", parameters={}, timeout=1.0)


def failed(message: str, task_id: str = "t") -> Error:
    return Error(task_id=task_id, error={"code": -32603, "message": message})


def ended(final_text: str, task_id: str = "t") -> End:
    return End(
        task_id=task_id,
        status_message="completed",
        final_text=final_text,
        finish_reason="stop",
        usage=None,
        messages=[{"role": "assistant", "content": final_text}],
    )


def outbox_of(*notes: TaskNotification, limit: int = LARGE) -> Outbox:
    outbox = Outbox(limit, Budget(LARGE))
    for note in notes:
        outbox.append(note)
    return outbox


def taken(outbox: Outbox, count: int = LARGE) -> list[tuple[int, TaskNotification]]:
    """What is taken next, ``count`` notifications at most."""
    numbered: list[tuple[int, TaskNotification]] = []
    while len(numbered) < count and (entry := outbox.take()):
        numbered.append((entry.seq, entry.note))
    return numbered


# Numbers and order


def test_an_empty_outbox_has_nothing_to_take_and_nothing_to_miss() -> None:
    outbox = Outbox(LARGE, Budget(LARGE))
    assert outbox.take() is None
    assert not outbox.is_full
    assert outbox.rewind(0) == Replay(after=0, oldest_seq=1, latest_seq=0, gap=False)


def test_notifications_are_numbered_from_one_in_the_order_in_which_they_came() -> None:
    notes = [request("a"), text("Hi"), request("b"), ended("Hi"), failed("", "u")]
    assert taken(outbox_of(*notes)) == list(enumerate(notes, start=1))


# Merging


def test_text_that_waits_grows_in_place() -> None:
    outbox = outbox_of(text("Hel"), text("lo"), text(", you"))
    assert outbox.latest_seq == 1
    assert taken(outbox) == [(1, text("Hello, you"))]


def test_reasoning_grows_like_text_but_the_two_stay_apart() -> None:
    outbox = outbox_of(reasoning("2 "), reasoning("+ 2"), text("4"), reasoning("!"))
    assert taken(outbox) == [(1, reasoning("2 + 2")), (2, text("4")), (3, reasoning("!"))]


def test_text_of_two_tasks_stays_apart() -> None:
    notes = [text("a", "t"), text("b", "u"), text("c", "t")]
    assert taken(outbox_of(*notes)) == list(enumerate(notes, start=1))


def test_text_is_added_to_the_newest_notification_only() -> None:
    notes = [text("a"), request("c"), text("b")]
    assert taken(outbox_of(*notes)) == list(enumerate(notes, start=1))


def test_no_text_is_added_to_what_was_sent() -> None:
    outbox = outbox_of(text("a"))
    (first,) = taken(outbox)
    outbox.append(text("b"))
    assert taken(outbox) == [(2, text("b"))]
    assert first == (1, text("a"))


def test_no_text_is_added_to_what_was_sent_once_and_waits_to_be_sent_again() -> None:
    outbox = outbox_of(text("a"), text("b"))
    taken(outbox)
    outbox.rewind(0)
    outbox.append(text("c"))
    assert taken(outbox) == [(1, text("ab")), (2, text("c"))]


def test_no_text_is_added_to_what_was_passed_over() -> None:
    outbox = outbox_of(text("a"), text("b"))
    outbox.rewind(1)
    assert taken(outbox) == []
    outbox.rewind(0)
    outbox.append(text("c"))
    assert taken(outbox) == [(1, text("ab")), (2, text("c"))]


def test_much_text_is_joined_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Joining it at each piece would make the cost grow with the square of the length."""
    joined = []

    def counting(note: Any, **changes: Any) -> Any:
        joined.append(note)
        return msgspec_replace(note, **changes)

    msgspec_replace = msgspec.structs.replace
    monkeypatch.setattr(msgspec.structs, "replace", counting)
    outbox = outbox_of(*[text("x")] * 1000)
    assert taken(outbox) == [(1, text("x" * 1000))]
    outbox.rewind(0)
    assert taken(outbox) == [(1, text("x" * 1000))]
    assert len(joined) == 1


# Replay


@pytest.mark.parametrize("after", range(5))
def test_a_replay_has_everything_above_a_number_once(after: int) -> None:
    outbox = outbox_of(*map(request, "abcd"))
    before = taken(outbox, 2)
    assert outbox.rewind(after) == Replay(after=after, oldest_seq=1, latest_seq=4, gap=False)
    everything = list(enumerate(map(request, "abcd"), start=1))
    assert taken(outbox) == everything[after:]
    assert before == everything[:2]


@pytest.mark.parametrize("after", [-1, 4, 10**30])
def test_a_number_that_was_never_given_out_is_refused_and_changes_nothing(after: int) -> None:
    outbox = outbox_of(*map(request, "abc"))
    taken(outbox, 2)
    before = copy.deepcopy(outbox)
    with pytest.raises(ValueError, match="Expected a number from 0 to 3"):
        outbox.rewind(after)
    assert outbox == before


def test_what_was_sent_is_kept_up_to_half_of_the_limit_and_a_gap_is_told() -> None:
    size = _size_of(request("a"))
    outbox = outbox_of(*map(request, "abcdef"), limit=2 * 3 * size)
    taken(outbox)
    assert outbox.rewind(6) == Replay(after=6, oldest_seq=4, latest_seq=6, gap=False)
    assert outbox.rewind(3) == Replay(after=3, oldest_seq=4, latest_seq=6, gap=False)
    assert outbox.rewind(2) == Replay(after=2, oldest_seq=4, latest_seq=6, gap=True)
    assert [seq for seq, _ in taken(outbox)] == [4, 5, 6]


def test_what_is_unsent_is_never_forgotten() -> None:
    notes = [request(str(number)) for number in range(100)]
    assert taken(outbox_of(*notes, limit=1)) == list(enumerate(notes, start=1))


# Bounds


def test_it_is_full_while_half_of_the_limit_is_unsent() -> None:
    size = _size_of(request("a"))
    outbox = outbox_of(request("a"), limit=4 * size)
    assert not outbox.is_full
    outbox.append(request("b"))
    assert outbox.is_full
    taken(outbox, 1)
    assert not outbox.is_full
    outbox.rewind(0)
    assert outbox.is_full


def test_text_counts_in_bytes_and_a_piece_of_it_less_than_a_notification() -> None:
    outbox = outbox_of(text("€"), limit=2 * (_size_of(text("€")) + 3))
    assert not outbox.is_full
    outbox.append(text("€"))
    assert outbox.is_full


def test_the_newest_notification_is_kept_whatever_its_size() -> None:
    outbox = outbox_of(request("a"), ended("x" * 5000), limit=1000)
    taken(outbox)
    assert outbox.rewind(0) == Replay(after=0, oldest_seq=2, latest_seq=2, gap=True)
    assert taken(outbox) == [(2, ended("x" * 5000))]


def test_a_large_one_that_was_sent_is_kept_no_longer_than_it_is_the_newest() -> None:
    outbox = outbox_of(text("x" * 5000), limit=1000)
    taken(outbox)
    outbox.append(text("y" * 5000))
    assert outbox.oldest_seq == 2


# The model

TASKS = st.sampled_from(["t", "u"])
CHUNKS = st.text(min_size=1, max_size=5) | st.sampled_from(["x" * 50, "€" * 200, "y" * 3000])
CHUNK_NOTES = st.builds(text, CHUNKS, TASKS) | st.builds(reasoning, CHUNKS, TASKS)
OTHER_NOTES = st.builds(request, CHUNKS, TASKS) | st.builds(ended, CHUNKS, TASKS) | st.builds(failed, CHUNKS, TASKS)


class OutboxMachine(RuleBasedStateMachine):
    """``log`` has every notification that was ever appended, under its number less one."""

    log: list[TaskNotification]

    @initialize(limit=st.sampled_from([0, 1, 700, 2000, 2001, 20_000]))
    def start(self, limit: int) -> None:
        self.limit = limit
        self.outbox = Outbox(limit, Budget(LARGE))
        self.log = []
        self.fixed: dict[int, TaskNotification] = {}
        self.cursor = 0
        self.forgotten = 0
        self.has_waited = True

    @property
    def is_growing(self) -> bool:
        return len(self.log) > self.cursor and len(self.log) not in self.fixed

    def sizes(self, start: int, end: int) -> int:
        return sum(map(_size_of, self.log[start:end]))

    def forget(self) -> None:
        while self.sizes(self.forgotten, self.cursor) > self.limit // 2 and self.forgotten < len(self.log) - 1:
            self.forgotten += 1

    def advance(self) -> None:
        note = self.log[self.cursor]
        self.cursor += 1
        assert self.fixed.setdefault(self.cursor, note) == note
        self.forget()

    @rule(note=CHUNK_NOTES)
    def append_text(self, note: TextChunk | ReasoningChunk) -> None:
        newest = self.log[-1] if self.is_growing else None
        self.has_waited &= not self.outbox.is_full
        self.outbox.append(note)
        if newest and type(newest) is type(note) and newest.task_id == note.task_id:
            self.log[-1] = msgspec.structs.replace(note, chunk=newest.chunk + note.chunk)
        else:
            self.log.append(note)
        self.forget()

    @rule(note=OTHER_NOTES)
    def append_another(self, note: TaskNotification) -> None:
        self.has_waited &= not self.outbox.is_full
        self.outbox.append(note)
        self.log.append(note)
        self.forget()

    @precondition(lambda self: not self.outbox.is_full)
    @rule(note=CHUNK_NOTES)
    def append_text_where_there_is_room(self, note: TextChunk | ReasoningChunk) -> None:
        self.append_text(note)

    @rule(count=st.integers(1, 5))
    def take(self, count: int) -> None:
        for _ in range(count):
            entry = self.outbox.take()
            if self.cursor == len(self.log):
                assert entry is None
                continue
            assert entry
            assert (entry.seq, entry.note) == (self.cursor + 1, self.log[self.cursor])
            self.advance()
            assert self.fixed[entry.seq] == entry.note

    @rule(data=st.data())
    def rewind(self, data: st.DataObject) -> None:
        after = data.draw(st.integers(0, len(self.log)))
        is_missing = any(seq <= self.forgotten for seq in range(after + 1, len(self.log) + 1))
        assert self.outbox.rewind(after) == Replay(after, self.forgotten + 1, len(self.log), gap=is_missing)
        if after < self.cursor:
            self.cursor = max(after, self.forgotten)
        while self.cursor < after:
            self.advance()

    @rule()
    def connect_anew(self) -> None:
        self.outbox.rewind(self.outbox.latest_seq)
        while self.cursor < len(self.log):
            self.advance()

    @rule(beyond=st.integers(1, 3), is_negative=st.booleans())
    def rewind_to_a_number_never_given_out(self, beyond: int, is_negative: bool) -> None:
        before = copy.deepcopy(self.outbox)
        with pytest.raises(ValueError, match="Expected a number"):
            self.outbox.rewind(-beyond if is_negative else len(self.log) + beyond)
        assert self.outbox == before

    @invariant()
    def numbers_agree(self) -> None:
        assert self.outbox.latest_seq == len(self.log)
        assert self.outbox.oldest_seq == self.forgotten + 1

    @invariant()
    def it_is_full_when_half_the_limit_is_unsent(self) -> None:
        assert self.outbox.is_full == (self.sizes(self.cursor, len(self.log)) >= self.limit // 2)

    @invariant()
    def memory_is_bounded_where_producers_wait(self) -> None:
        kept = [*self.outbox._sent, *(entry.note for entry in self.outbox._unsent)]
        assert len(kept) == len(self.log) - self.forgotten
        assert self.outbox.size == self.sizes(self.forgotten, len(self.log))
        if self.has_waited and kept:
            assert self.outbox.size <= self.limit + _size_of(self.log[-1])


OutboxMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40)
TestOutboxMachine = OutboxMachine.TestCase


# The budget


def test_all_that_is_kept_is_counted() -> None:
    budget = Budget(LARGE)
    boxes = [Outbox(LARGE, budget), Outbox(LARGE, budget)]
    for box in boxes:
        box.append(text("a" * 100))
        box.append(text("b" * 100))
        box.append(request("c"))
    assert budget.used == sum(box.size for box in boxes) > 0
    taken(boxes[0])
    boxes[0].rewind(0)
    assert budget.used == sum(box.size for box in boxes)
    boxes[1].shrink()
    assert budget.used == sum(box.size for box in boxes)
    assert [entry.seq for entry in boxes[1]._unsent] == [2]


def test_over_the_budget_nothing_is_kept_for_replay_and_whatever_is_unsent_makes_it_full() -> None:
    budget = Budget(limit=1000)
    box = Outbox(LARGE, budget)
    box.append(text("a"))
    box.append(request("b"))
    taken(box)
    assert (box.oldest_seq, box.is_full) == (1, False)
    budget.used += 1000
    box.append(text("c"))
    assert (box.oldest_seq, box.is_full) == (3, True)
    assert taken(box) == [(3, text("c"))]
    assert (box.oldest_seq, box.is_full) == (3, False)
    box.append(ended("c"))
    assert (box.oldest_seq, box.rewind(0).gap) == (4, True)
    budget.used -= 1000
    assert not box.is_full


def test_who_waits_for_room_is_woken_in_order_and_one_at_a_time() -> None:
    budget, woken = Budget(limit=100), []
    budget.add(101)
    with ExitStack() as first, ExitStack() as others:
        first.enter_context(budget.queueing(partial(woken.append, 0)))
        for number in range(1, 4):
            others.enter_context(budget.queueing(partial(woken.append, number)))
        budget.release(0)
        assert woken == [], "there is no room yet"
        budget.release(1)
        assert woken == [0]
        budget.add(1)
        first.close()
        assert woken == [0], "it has taken the room"
        budget.release(1)
        assert woken == [0, 1]
    assert woken == [0, 1, 2], "the last one gave up, and that wakes the next one"
    budget.release(1)


def test_who_gives_up_waiting_is_not_woken() -> None:
    budget, woken = Budget(limit=0, used=1), []
    with budget.queueing(partial(woken.append, "gave up")):
        pass
    budget.release(1)
    assert woken == []


def test_what_is_counted_in_a_part_is_counted_in_the_whole() -> None:
    whole = Budget(limit=100)
    one, other = Budget(limit=50, whole=whole), Budget(limit=50, whole=whole)
    one.add(51)
    assert (whole.used, one.is_exceeded, other.is_exceeded, whole.is_exceeded) == (51, True, False, False)
    with pytest.raises(OverloadedError, match="sessions of this token hold"):
        one.hold(1)
    other.hold(49)
    with pytest.raises(OverloadedError, match="sessions of this server hold"):
        other.hold(1)
    assert (one.used, other.used, whole.used) == (51, 49, 100)
    other.add(1)
    assert other.is_exceeded, "as the whole is"
    one.release(51)
    assert (other.is_exceeded, whole.used) == (False, 50)


def test_whose_own_part_is_exceeded_waits_on_without_holding_up_others() -> None:
    whole, woken = Budget(limit=100), []
    one, other = Budget(limit=50, whole=whole), Budget(limit=50, whole=whole)
    one.add(60)
    other.add(41)
    with one.queueing(partial(woken.append, "one")), other.queueing(partial(woken.append, "other")):
        whole.release(0)
        assert woken == [], "the whole is exceeded"
        other.release(1)
        assert woken == ["other"]
        one.release(9)
        assert woken == ["other"]
        one.release(1)
        assert woken == ["other", "one"]


def test_a_part_makes_room_only_for_itself() -> None:
    made = []
    whole = Budget(limit=100, make_room=partial(made.append, "whole"))
    part = Budget(limit=50, make_room=partial(made.append, "part"), whole=whole)
    part.add(50)
    assert made == []
    part.add(1)
    assert made == ["part"]
    whole.add(50)
    assert made == ["part", "whole"]


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_a_shrunk_outbox_has_its_newest_notification_and_says_that_there_is_a_gap(count: int) -> None:
    box = outbox_of(text("a"), request("b"), ended("a"))
    taken(box, count)
    box.shrink()
    assert box.rewind(1) == Replay(1, 3, 3, gap=True)
    assert taken(box) == [(3, ended("a"))]


def test_an_empty_outbox_can_be_shrunk() -> None:
    box = outbox_of()
    box.shrink()
    assert (box.size, box.rewind(0)) == (0, Replay(0, 1, 0, gap=False))
