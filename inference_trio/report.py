"""What became of a task, as facts: when its rounds ran, which attempts failed, how long its tools took.

The runner tells a `Timeline` what happens. At the end one `TaskReport` comes of it, and from that everything that is
told about a task: its line in the log, the metrics, the trace. Nothing here is called per token.

Times are in seconds, all on the clock of whoever tells them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import attrs

from .errors import InferenceError
from .protocol import Usage
from .task import RoundFinished, TaskState, ToolCallsRequested


@attrs.frozen
class FailedAttempt:
    """A call of the model that failed. ``is_retried`` is false where the task failed with it."""

    at: float
    error: InferenceError
    is_retried: bool


@attrs.frozen
class Round:
    """One answer of the model. Where it was never complete, ``finish_reason`` is ``None``."""

    started_at: float
    ended_at: float | None = None
    first_delta_at: float | None = None
    failures: tuple[FailedAttempt, ...] = ()
    finish_reason: str | None = None
    usage: Usage | None = None


@attrs.frozen
class ToolWait:
    """A call that the client was asked to carry out. ``ended_at`` is when its result came, if one did."""

    call_id: str
    tool_name: str
    started_at: float
    ended_at: float | None = None


@attrs.frozen(kw_only=True)
class TaskReport:
    """``traceparent`` is the caller's place in a trace, in the form of W3C's Trace Context, if it gave one."""

    task_id: str
    session_id: str
    model: str
    state: TaskState
    error: InferenceError | None
    usage: Usage | None
    started_at: float
    ended_at: float
    rounds: Sequence[Round]
    tool_waits: Sequence[ToolWait]
    traceparent: str | None = None

    @property
    def end(self) -> str:
        """``done``, ``cancelled``, or the kind of the error: one of few words, whatever happens."""
        return self.error.kind if self.error else self.state.value

    @property
    def duration(self) -> float:
        return self.ended_at - self.started_at

    @property
    def first_token_after(self) -> float | None:
        came = (round_.first_delta_at for round_ in self.rounds if round_.first_delta_at is not None)
        first = next(came, None)
        return None if first is None else first - self.started_at

    @property
    def retries(self) -> int:
        return sum(failure.is_retried for round_ in self.rounds for failure in round_.failures)


@attrs.frozen(kw_only=True)
class Census:
    """What a process has of everything now. ``held_bytes`` are those of `outbox.Budget`."""

    sessions: int
    connections: int
    tasks: Mapping[TaskState, int]
    """Those that run, by their state; a state without any is there too."""
    outbox_bytes: int
    held_bytes: int


class Observer(Protocol):
    """Whoever wants to know. It neither waits nor raises."""

    def attempt_failed(self, model: str, failure: FailedAttempt) -> None:
        """Told at once: a task may go on for minutes."""

    def task_ended(self, report: TaskReport) -> None: ...

    def task_lost(self, model: str) -> None:
        """Told of a task that another worker ran, which is gone: of all that are left, to one."""


@attrs.define
class Timeline:
    """What has happened in a task so far."""

    started_at: float
    rounds: list[Round] = attrs.field(factory=list)
    tool_waits: dict[str, ToolWait] = attrs.field(factory=dict)

    def begin_round(self, now: float) -> None:
        self.rounds.append(Round(now))

    def begin_answer(self, now: float) -> None:
        """The first that the model has said in this round."""
        self._change_round(first_delta_at=now)

    def fail_attempt(self, failure: FailedAttempt) -> None:
        self._change_round(failures=(*self.rounds[-1].failures, failure))

    def end_round(self, now: float, event: RoundFinished | ToolCallsRequested) -> None:
        self._change_round(ended_at=now, finish_reason=event.finish_reason, usage=event.usage)
        if isinstance(event, ToolCallsRequested):
            self.tool_waits |= {call.id: ToolWait(call.id, call.name, now) for call in event.calls if not call.problem}

    def end_tool_waits(self, now: float, call_ids: Iterable[str]) -> None:
        for call_id in call_ids:
            self.tool_waits[call_id] = attrs.evolve(self.tool_waits[call_id], ended_at=now)

    def _change_round(self, **changes: Any) -> None:
        self.rounds[-1] = attrs.evolve(self.rounds[-1], **changes)
