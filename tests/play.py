"""Sessions on fakes, driven step by step, beside a simple model of what must hold.

A `Play` has a few guests, the clients of a session each, and knows of every generation what it should be doing: what
the model has said, which calls are open, how it must have ended. Time is the test's, so it also knows when. After every
step the server is compared with that, and whatever a guest hears is checked when it is heard.
"""

from __future__ import annotations

import json
import math
from collections import deque
from typing import Any

import attrs
import trio
import trio.testing

from inference_trio.deltas import Delta, ToolCallDelta
from inference_trio.errors import UpstreamError
from inference_trio.messages import ModelRequest
from inference_trio.outbox import BYTES_PER_BYTE_OF_JSON
from inference_trio.protocol import CreateSession
from inference_trio.session import TAKEN_OVER, Session
from inference_trio.settings import Settings
from inference_trio.store import SessionStore

from . import fakes
from .fakes import FakeWebSocket, Receive, at_once
from .test_connection import Bench
from .transcripts import content, joined

TOOL = {"name": "look", "parameters": {"type": "object"}}
NEVER = math.inf


@attrs.define(eq=False)
class Story:
    """A generation as it should be. ``told`` is what the model has said, ``ending`` what the last note must be."""

    name: str
    size: int
    task_id: str = ""
    told: list[tuple[str, Any]] = attrs.field(factory=list)
    outstanding: list[str] = attrs.field(factory=list)
    deadline: float = NEVER
    ending: tuple[str, Any] | None = None
    is_speaking: bool = False
    orders: deque[tuple[str, Any]] = attrs.field(factory=deque)
    ordered: trio.Event = attrs.field(factory=trio.Event)

    @property
    def is_waiting(self) -> bool:
        return bool(self.outstanding)

    @property
    def text(self) -> str:
        return "".join(words for kind, words in self.told if kind == "text_chunk")

    def order(self, what: str, how: Any) -> None:
        """Has the model say this next."""
        self.orders.append((what, how))
        self.ordered.set()

    async def next_order(self) -> tuple[str, Any]:
        while not self.orders:
            self.ordered = trio.Event()
            await self.ordered.wait()
        return self.orders.popleft()

    def end(self, method: str, how: Any) -> None:
        self.ending = (method, how)
        self.outstanding, self.deadline = [], NEVER


@attrs.define(eq=False)
class Puppets:
    """The model: says what the stories order."""

    settings: Settings
    stories: dict[str, Story] = attrs.field(factory=dict)

    async def stream(self, request: ModelRequest, receive: Receive) -> None:
        story = self.stories[str(request.messages[0]["content"])]
        is_over = False
        while not is_over:
            what, how = await story.next_order()
            story.is_speaking = True
            is_over = await self._speak(story, what, how, receive)
            story.is_speaking = False

    async def _speak(self, story: Story, what: str, how: Any, receive: Receive) -> bool:
        """Whether that was all of this round."""
        match what:
            case "text_chunk":
                story.told.append((what, how))
                await receive(Delta(text=how))
                return False
            case "reasoning_chunk":
                story.told.append((what, how))
                await receive(Delta(reasoning=how, reasoning_field="reasoning"))
                return False
            case "calls":
                first = len(story.told)
                calls = [f"call_{first}_{number}" for number in range(how)]
                for index, call in enumerate(calls):
                    await receive(Delta(tool_calls=(ToolCallDelta(index, call, "look", f'{{"call": "{call}"}}'),)))
                await receive(Delta(finish_reason="tool_calls"))
                story.told += [("function_call_request", {"call": call}) for call in calls]
                story.outstanding = calls
                story.deadline = trio.current_time() + self.settings.tool_timeout
            case "finish":
                await receive(Delta(finish_reason=how))
                story.end("end", "length" if how == "length" else "completed")
            case "fail":
                story.end("error", -32000)
                raise UpstreamError("It does not work", retryable=False)
        return True


@attrs.define(eq=False)
class Guest:
    """The client of a session. ``said`` is all that was ever heard, ``missed`` what it was told it would not hear."""

    session: Session
    last_used: float
    stories: list[Story] = attrs.field(factory=list)
    socket: FakeWebSocket | None = None
    reads: bool = True
    is_roomy: bool = True
    window_ends: float = NEVER
    left: list[tuple[FakeWebSocket, bool]] = attrs.field(factory=list)
    """Connections that newer ones have taken over from, and whether they read."""
    said: dict[int, Any] = attrs.field(factory=dict)
    missed: set[int] = attrs.field(factory=set)
    last: int = 0
    _ran: int = 0
    _next: int = 1
    _resuming: Any = None
    _calls: int = 0
    _answers: dict[int, Any] = attrs.field(factory=dict)

    @property
    def running(self) -> list[Story]:
        return [story for story in self.stories if story.ending is None]

    def ask(self, method: str, params: Any, answer: Any) -> None:
        """``answer`` is the result that must come, or the code of the error, or ``None`` where it may be any."""
        assert self.socket
        self._calls += 1
        self._answers[self._calls] = answer
        self.socket.call(method, params, request_id=self._calls)

    def expect_resumed(self, after: int) -> None:
        tasks = [
            {
                "task_id": story.task_id,
                "state": "awaiting_tools" if story.is_waiting else "streaming",
                "outstanding": story.outstanding,
            }
            for story in self.running
        ]
        self._resuming = {"session_id": self.session.id, "after": after, "tasks": tasks}

    def expect_only_what_is_new(self) -> None:
        latest = self.session.outbox.latest_seq
        self._pass_over(latest + 1)
        self.last = latest

    def _pass_over(self, until: int) -> None:
        self.missed |= set(range(self.last + 1, until)) - self.said.keys()
        self._next = until

    def disconnect(self) -> FakeWebSocket | None:
        socket, self.socket = self.socket, None
        self._answers.clear()
        self._resuming = None
        return socket

    def note_use(self) -> None:
        """A task that has ended was use of the session until now."""
        running = len(self.running)
        if running < self._ran:
            self.last_used = trio.current_time()
        self._ran = running

    def listen(self) -> None:
        for frame in self.socket.heard() if self.socket else ():
            self._take(frame)

    def _take(self, frame: Any) -> None:
        if "id" in frame:
            expected = self._answers.pop(frame["id"])
            got = frame["result"] if "result" in frame else frame["error"]["code"]
            assert expected in (None, got), (expected, frame)
        elif frame["method"] == "resumed":
            self._settle(frame["params"])
        else:
            assert self._resuming is None, "`resumed` comes first"
            self._note(frame)

    def _settle(self, state: Any) -> None:
        expected, self._resuming = self._resuming, None
        assert {name: state[name] for name in expected} == expected
        after, oldest = state["after"], state["oldest_seq"]
        assert state["gap"] == (oldest > after + 1)
        assert not (state["gap"] and self.is_roomy)
        self._pass_over(max(after + 1, oldest))

    def _note(self, frame: Any) -> None:
        seq = frame["params"]["seq"]
        assert seq == self._next, frame
        assert self.said.setdefault(seq, frame) == frame
        self._next = seq + 1
        self.last = max(self.last, seq)

    def check_all_was_told(self) -> None:
        """Every note there was, except for those that were announced as missing; each story to its end and no more."""
        for socket, reads in self.left:
            assert socket.close_code == TAKEN_OVER or not reads, "without a reader it may be stuck in a frame"
            self._check_left(socket.heard())
        self.missed -= self.said.keys()
        assert {*self.said, *self.missed} == set(range(1, self.session.outbox.latest_seq + 1))
        for story in self.stories:
            notes = [note for _, note in sorted(self.said.items()) if note["params"]["task_id"] == story.task_id]
            check_story(story, notes, is_whole=not self.missed)

    def _check_left(self, frames: list[Any]) -> None:
        """Nothing was sent there after the newer connection came, but for what was on its way."""
        notes = [frame for frame in frames if "seq" in frame.get("params", {})]
        assert len(notes) <= 1
        for note in notes:
            assert self.said.get(note["params"]["seq"], note) == note


def check_story(story: Story, notes: list[Any], *, is_whole: bool) -> None:
    ends = [number for number, note in enumerate(notes) if note["method"] in ("end", "error")]
    assert ends == [len(notes) - 1] or (not is_whole and ends == [])
    if ends:
        last = notes[-1]["params"]
        how = last["status_message"] if "status_message" in last else last["error"]["code"]
        text = last["final_text"] if "final_text" in last else last["error"].get("data", {}).get("partial_text", "")
        assert ((notes[-1]["method"], how), text) == (story.ending, story.text)
    if is_whole:
        assert list(joined(map(content, notes[:-1]))) == list(joined(story.told))


@attrs.define(eq=False)
class Play:
    """``is_roomy``: nothing is ever full, so nothing may be missing."""

    bench: Bench
    model: Puppets
    is_roomy: bool
    guests: list[Guest] = attrs.field(factory=list)
    ended: list[str] = attrs.field(factory=list)
    """The ids of the tasks whose end was reported."""
    _named: int = 0
    _held_up: Story | None = None
    """Who was told to speak while there was no room."""

    def attempt_failed(self, *_: Any) -> None: ...

    def task_lost(self, _: str) -> None: ...

    def task_ended(self, report: Any) -> None:
        self.ended.append(report.task_id)

    @property
    def store(self) -> SessionStore:
        return self.bench.store

    @property
    def running(self) -> list[tuple[Guest, Story]]:
        return [(guest, story) for guest in self.guests for story in guest.running]

    def arrive(self) -> Guest:
        """A guest with a new session."""
        session = at_once(self.store.create(CreateSession(tools=[fakes.tool(TOOL)]), self.bench.owner))
        return Guest(session, trio.current_time(), is_roomy=self.is_roomy)

    # What guests do

    def connect(self, at: int, back: int | None, *, reads: bool) -> None:
        """Connects to hear what comes after the last but ``back`` that was heard, or with ``None`` what is new."""
        guest = self._found(at)
        if older := guest.disconnect():
            guest.left.append((older, guest.reads))
        if back is None:
            guest.expect_only_what_is_new()
            after = None
        else:
            after = max(guest.last - back, 0)
            guest.expect_resumed(after)
        guest.socket = self.bench.connect(guest.session, after, outgoing=math.inf if reads else 0)
        guest.reads, guest.window_ends = reads, NEVER

    def _found(self, at: int) -> Guest:
        """The guest, with a new session where the old one has expired."""
        guest, now = self.guests[at], trio.current_time()
        is_kept = guest.socket or guest.running or now - guest.last_used < self.store.settings.session_ttl
        assert at_once(self.store.get(guest.session.id)) is (guest.session if is_kept else None)
        if not is_kept:
            guest.expect_only_what_is_new()  # the rest has gone with the session
            guest.check_all_was_told()
            guest = self.guests[at] = self.arrive()
        guest.last_used = now
        return guest

    async def drop(self, at: int) -> None:
        guest = self.guests[at]
        if socket := guest.disconnect():
            await socket.drop()
            guest.last_used = trio.current_time()
            guest.window_ends = guest.last_used + guest.session.resume_window if guest.running else NEVER

    async def generate(self, at: int, padding: int) -> None:
        guest = self.guests[at]
        if not guest.socket:
            return
        self._named += 1
        story = Story(f"{self._named}" + "x" * padding, 0)
        params = {"message": story.name}
        frame = {"jsonrpc": "2.0", "method": "generate", "id": guest._calls + 1, "params": params}
        story.size = BYTES_PER_BYTE_OF_JSON * len(json.dumps(frame))
        refused = self._is_refused(guest, story.size)
        self.model.stories[story.name] = story
        before = set(guest.session.runners)
        guest.ask("generate", params, -32005 if refused else None)
        await trio.testing.wait_all_tasks_blocked()
        new = set(guest.session.runners) - before
        assert len(new) == 1 or refused or (refused is None and not new)
        if new and not refused:
            story.task_id = new.pop()
            guest.stories.append(story)

    def _is_refused(self, guest: Guest, size: int) -> bool | None:
        """``None`` where that depends on what others can give up."""
        settings, budget = self.store.settings, self.store.budget
        too_many = len(guest.running) >= settings.max_tasks_per_session or len(self.running) >= settings.max_tasks
        if too_many or guest.session.outbox.is_full:
            return True
        return False if budget.used + size <= budget.limit else None

    def give_result(self, at: int, pick: int, count: int) -> None:
        guest = self.guests[at]
        waiting = [story for story in guest.running if story.is_waiting]
        if not guest.socket or not waiting:
            return
        story = waiting[pick % len(waiting)]
        calls = story.outstanding[:count]
        left = story.outstanding[count:]
        results = [{"tool_call_id": call, "result": call} for call in calls]
        state = "awaiting_tools" if left else "streaming"
        answer = {"task_id": story.task_id, "accepted": calls, "outstanding": left, "state": state}
        guest.ask("tool_result", {"task_id": story.task_id, "results": results}, answer)
        story.outstanding = left
        if not left:
            story.deadline = NEVER

    def give_wrong_result(self, at: int, pick: int) -> None:
        guest = self.guests[at]
        if not guest.socket or not guest.stories:
            return
        story = guest.stories[pick % len(guest.stories)]
        results = [{"tool_call_id": call, "result": 1} for call in [*story.outstanding, "nobody"]]
        guest.ask("tool_result", {"task_id": story.task_id, "results": results}, -32602 if story.is_waiting else -32004)

    def cancel(self, at: int, pick: int | None) -> None:
        guest = self.guests[at]
        if not guest.socket or not guest.stories:
            return
        story = None if pick is None else guest.stories[pick % len(guest.stories)]
        cancelled = guest.running if story is None else [story] * (story.ending is None)
        params = {} if story is None else {"task_id": story.task_id}
        guest.ask("cancel", params, {"cancelled": [each.task_id for each in cancelled]})
        for each in cancelled:
            each.end("end", "cancelled")

    def order(self, pick: int, what: str, how: Any) -> None:
        """Has one of the models say something next."""
        if running := self.running:
            guest, story = running[pick % len(running)]
            story.order(what, how)
            self._held_up = story if guest.session.outbox.is_full and not story.is_waiting else None

    # Time

    async def pass_time(self, seconds: float) -> None:
        """What is due happens at its time, not earlier."""
        until = trio.current_time() + seconds
        while (due := self._next_due()) <= until:
            await trio.sleep_until(due - 0.001)
            await self.settle()
            await trio.sleep_until(due)
            self._happen(due)
            await self.settle()
        await trio.sleep_until(until)

    def _next_due(self) -> float:
        return min(
            [guest.window_ends for guest in self.guests] + [story.deadline for _, story in self.running],
            default=NEVER,
        )

    def _happen(self, now: float) -> None:
        for _, story in self.running:
            if story.deadline <= now:
                story.end("error", -32003)
        for guest in self.guests:
            if guest.window_ends <= now:
                guest.window_ends = NEVER
                for story in guest.running:
                    story.end("end", "cancelled")

    # What must hold

    async def settle(self) -> None:
        """Lets the server do all it can, hears it, and compares."""
        await trio.testing.wait_all_tasks_blocked()
        self._happen(trio.current_time())
        for guest in self.guests:
            if guest.reads:
                guest.listen()
            guest.note_use()
            self._check(guest)
            if self._held_up and self._held_up in guest.running and guest.session.outbox.is_full:
                assert self._held_up.is_speaking, "what it says next has to wait"
        self._held_up = None
        self._check_counts()

    def _check(self, guest: Guest) -> None:
        runners = guest.session.runners
        assert {story.task_id: story.outstanding for story in guest.running} == {
            task_id: runner.task.outstanding for task_id, runner in runners.items()
        }
        assert (guest.session.attached is None) == (guest.socket is None)
        if guest.socket and guest.reads:
            stuck = [story for story in guest.running if story.is_speaking or (story.orders and not story.is_waiting)]
            assert stuck == [], "whoever reads holds up nobody"

    def _check_counts(self) -> None:
        sessions = self.store._sessions.values()
        held = sum(session.size + session.outbox.size for session in sessions)
        runners = [runner for session in sessions for runner in session.runners.values()]
        held += BYTES_PER_BYTE_OF_JSON * sum(runner._gathered.size for runner in runners)
        assert self.store.budget.used == held + sum(story.size for _, story in self.running)
        assert self.store.running == self.bench.owner.running == len(self.running)
        assert self.bench.owner.sessions == len(self.store)
        ended = [story.task_id for guest in self.guests for story in guest.stories if story.ending]
        assert set(ended) <= set(self.ended)
        assert len(set(self.ended)) == len(self.ended)

    async def finish(self) -> None:
        """Everybody comes back for what is missing, ends what still runs, and leaves."""
        for at in range(len(self.guests)):
            self.connect(at, 0, reads=True)
            await self.settle()
            self.cancel(at, None)
            await self.settle()
            self.guests[at].check_all_was_told()
            await self.drop(at)
        await trio.sleep(self.store.settings.session_ttl)
        assert at_once(self.store.get(self.guests[0].session.id)) is None
        assert (len(self.store), self.store.budget.used, self.bench.owner.sessions) == (0, 0, 0)
        self.bench.nursery.cancel_scope.cancel()  # connections that were taken over and never left
