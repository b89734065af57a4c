"""What the client knows of a session, and what it says next. Pure: frames go in, frames and events come out.

How a broken connection is mended
---------------------------------
The client connects with `?after=N`, where N is the last number (`seq`) that it has seen, and the server first says in
`resumed` which tasks run and which tool calls they wait for, then repeats what came after N. Whatever the old
connection still carried is dropped by the server from then on, so this is a picture of what has arrived, and what was
under way when the line broke is settled by it and never sent blindly a second time:

- `generate`: at most one is unanswered at a time, and it has arrived exactly if the server speaks of a task that is not
  known here, among those that run or in what it repeats. Otherwise it is sent again.
- a tool's result has arrived exactly if its call is no longer waited for. Otherwise it is sent again. Tools go on
  running meanwhile, and each call is run once.
- `cancel` is sent again as long as the task runs: that is harmless.

What the server no longer keeps is announced (`gap`). Then text may be missing from the events, never from the result;
and a generation that cannot be settled fails with `ConnectionLostError` instead of running twice. While the picture is
incomplete nothing is sent.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import attrs
import msgspec

from .. import protocol
from .errors import (
    ConnectionLostError,
    InferenceError,
    TakenOverError,
    TooBigError,
    from_wire,
)
from .events import Disconnected, Draining, JsonObject, ReasoningChunk, Result, Resumed, TextChunk, ToolCall, ToolResult
from .task import Task
from .wire import as_json, failure, reason

TAKEN_OVER = 4409
TOO_BIG = 1009
NO_SUCH_TASK = -32004

_NOTIFICATIONS = {kind.method: kind for kind in protocol.NOTIFICATIONS}


@attrs.frozen
class Request:
    """A request of this connection that is not answered."""

    size: int
    answered: Callable[[Any], object]
    refused: Callable[[InferenceError], None]


def _nothing(_: Any) -> None:
    pass


@attrs.define(eq=False)
class Conversation:
    """`wake` is called when there are `frames` to send, or the first task to connect for."""

    wake: Callable[[], None]
    frames: deque[str] = attrs.field(factory=deque)
    last_seq: int = 0
    progressed: bool = False
    """Whether anything has come on this connection that helps."""
    closed: InferenceError | None = None
    _is_ready: bool = False
    _replay: protocol.Resumed | None = None
    """What `resumed` said, until all that it announced has come."""
    _queue: list[Task] = attrs.field(factory=list)
    """Tasks without an id, in order; only the first may have been asked for."""
    _tasks: dict[str, Task] = attrs.field(factory=dict)
    _requests: dict[int, Request] = attrs.field(factory=dict)
    _ids: Any = attrs.field(factory=lambda: itertools.count(1))

    @property
    def is_busy(self) -> bool:
        """Whether there is anything that a connection is needed for."""
        return bool(self._queue or self._tasks)

    # Asking

    def start(self, task: Task) -> None:
        self._queue.append(task)
        self.wake()
        self._ask()

    def cancel(self, task: Task) -> None:
        if task.is_over or task.is_cancelled:
            return
        task.is_cancelled = True
        if task.id is None and not task.is_asked:
            self._dismiss(task)
        elif task.id is not None and self._is_ready:
            self._request("cancel", {"task_id": task.id})

    def cancel_all(self, done: Callable[[], object]) -> bool:
        """Cancels what runs, before the connection is closed for good; whether there is anything to wait for."""
        if not self.is_busy or not self._is_ready:
            return False
        self._request("cancel", {}, lambda _: done())
        return True

    def end(self, error: InferenceError) -> None:
        """Fails everything, now and from now on."""
        self.closed = self.closed or error
        self.forget(error, everything=True)

    def forget(self, error: InferenceError, *, everything: bool = False) -> None:
        """Fails what the server was asked for, or everything; the server no longer has the session."""
        lost = [*self._tasks.values(), *(task for task in self._queue if everything or task.is_asked)]
        self._tasks.clear()
        self._queue = [task for task in self._queue if task not in lost]
        self.last_seq = 0
        for task in lost:
            task.fail(error.copy())

    def _ask(self) -> None:
        """Asks for the next generation, if the one before is answered."""
        if not self._is_ready or not self._queue or self._queue[0].is_asked:
            return
        task = self._queue[0]
        task.is_asked = True

        def refuse(error: InferenceError) -> None:
            self._remove(task)
            task.fail(error)
            self._ask()

        self._request("generate", task.params, lambda started: self._adopt(started["task_id"]), refuse)

    def _dismiss(self, task: Task) -> None:
        """Cancels what the server does not have."""
        self._remove(task)
        task.finish(Result(final_text="", status="cancelled"))

    def _request(
        self,
        method: str,
        params: JsonObject | msgspec.Raw,
        answered: Callable[[Any], object] = _nothing,
        refused: Callable[[InferenceError], None] = _nothing,
    ) -> None:
        number = next(self._ids)
        frame = msgspec.json.encode({"jsonrpc": "2.0", "id": number, "method": method, "params": params})
        self._requests[number] = Request(len(frame), answered, refused)
        self.frames.append(frame.decode())
        self.wake()

    # Receiving

    def receive(self, text: str | bytes) -> None:
        """Takes a frame. Raises msgspec.DecodeError, KeyError or TypeError for what is not of the protocol."""
        frame = msgspec.json.decode(text)
        if "method" not in frame:
            return self._answered(frame)
        kind = _NOTIFICATIONS.get(frame["method"])
        note = msgspec.convert(frame["params"], kind) if kind else None
        if isinstance(note, protocol.Resumed):
            return self._resume(note)
        if isinstance(note, protocol.Draining):
            return self._tell(self._tasks.values(), Draining(note.deadline))
        seq = frame["params"].get("seq", 0)
        if seq <= self.last_seq:
            return None
        self.last_seq = seq
        self.progressed = True
        if isinstance(note, protocol.TaskNotification):
            task = self._tasks.get(note.task_id) or self._adopt(note.task_id)
            if task:
                self._notice(task, note)
        return self._settle()

    def disconnected(self, code: int | None = None) -> None:
        """The connection is gone, with this close code."""
        was_connected = self._is_ready or self._replay is not None
        requests = list(self._requests.values())
        self._requests.clear()
        self.frames.clear()
        self._replay = None
        self._is_ready = False
        if code == TAKEN_OVER:
            return self.end(TakenOverError("A newer connection has the session"))
        if code == TOO_BIG and requests:
            largest = max(requests, key=lambda request: request.size)
            largest.refused(TooBigError(f"The server takes no message of {largest.size} bytes"))
        if was_connected:
            self._tell(self._tasks.values(), Disconnected())
        return None

    def _answered(self, frame: JsonObject) -> None:
        # An error without an id is about a frame that the server could not read. It reads them in order.
        number = frame["id"]
        if number is None:
            number = next(iter(self._requests), None)
        request = self._requests.pop(number, None)
        self.progressed = True
        if request is None:
            return
        if "error" in frame:
            request.refused(from_wire(frame["error"]))
        else:
            request.answered(frame["result"])

    def _tell(self, tasks: Iterable[Task], event: Disconnected | Resumed | Draining) -> None:
        for task in tasks:
            task.emit(event)

    def _resume(self, resumed: protocol.Resumed) -> None:
        self._replay = resumed
        if resumed.gap:
            self.last_seq = max(self.last_seq, resumed.oldest_seq - 1)
        for status in resumed.tasks:
            if status.task_id not in self._tasks and _is_active(status):
                self._adopt(status.task_id)
        self._tell(self._tasks.values(), Resumed(resumed.gap))
        self._settle()

    def _settle(self) -> None:
        """Once all that `resumed` announced has come: settles what was under way before, and goes on."""
        if self._replay is None or self.last_seq < self._replay.latest_seq:
            return
        resumed, self._replay = self._replay, None
        self._is_ready = True
        active = {status.task_id: status for status in resumed.tasks if _is_active(status)}
        for number, task in list(self._tasks.items()):
            if number in active:
                self._reconcile(task, active[number].outstanding)
            else:
                self._lose(task, "Its end is among what the server no longer keeps")
        asked = next((task for task in self._queue if task.is_asked), None)
        if asked and resumed.gap:
            self._lose(asked, "Whether it ran is among what the server no longer keeps")
        elif asked:
            asked.is_asked = False
            if asked.is_cancelled:
                self._dismiss(asked)
        self._ask()

    def _reconcile(self, task: Task, outstanding: list[str]) -> None:
        if task.is_cancelled:
            return self._request("cancel", {"task_id": task.id})
        for number in set(task.calls) - set(outstanding):
            del task.calls[number]
        for number in outstanding:
            task.calls.setdefault(number, failure("The client did not get this call"))
            self._give(task, number)
        return None

    def _adopt(self, number: str) -> Task | None:
        """The server has taken on the task that it was asked for."""
        if not self._queue or not self._queue[0].is_asked:
            return None
        task = self._queue.pop(0)
        task.id = number
        self._tasks[number] = task
        if task.is_cancelled and self._is_ready:
            self._request("cancel", {"task_id": number})
        self._ask()
        return task

    def _notice(self, task: Task, note: protocol.TaskNotification) -> None:
        match note:
            case protocol.TextChunk():
                task.emit(TextChunk(note.chunk))
            case protocol.ReasoningChunk():
                task.emit(ReasoningChunk(note.chunk))
            case protocol.FunctionCallRequest():
                self._call(task, note)
            case protocol.Error():
                self._remove(task)
                task.fail(from_wire(note.error))
            case protocol.End():
                self._remove(task)
                task.finish(_result(note))

    def _lose(self, task: Task, reason: str) -> None:
        self._remove(task)
        task.fail(ConnectionLostError(f"The generation is lost: {reason}"))

    def _remove(self, task: Task) -> None:
        if task.id is not None:
            self._tasks.pop(task.id, None)
        self._queue = [other for other in self._queue if other is not task]

    # Tools

    def _call(self, task: Task, request: protocol.FunctionCallRequest) -> None:
        number, name = request.request_id, request.tool_name
        task.calls[number] = None

        def answer(result: Any, error: str | None) -> None:
            if task.is_over or task.calls.get(number, ...) is not None:
                return
            task.calls[number] = {"result": as_json(result)} if error is None else failure(error)
            task.emit(ToolResult(number, name, result, None if error is None else reason(error)))
            self._give(task, number)

        call = ToolCall(number, name, request.parameters, request.timeout, answer)
        task.emit(call)
        task.called(call)

    def _give(self, task: Task, number: str) -> None:
        """Sends the answer to a call, if there is one and a connection to send it on."""
        answer = task.calls.get(number)
        if not answer or not self._is_ready:
            return

        def refuse(error: InferenceError) -> None:
            if "is_error" in answer or error.code == NO_SUCH_TASK or number not in task.calls:
                return
            task.calls[number] = failure(f"The result cannot be sent: {error.message}")
            self._give(task, number)

        params = {"task_id": task.id, "results": [{"tool_call_id": number, **answer}]}
        self._request("tool_result", params, lambda _: task.calls.pop(number, None), refuse)


def _is_active(status: protocol.TaskStatus) -> bool:
    return status.state in ("streaming", "awaiting_tools")


def _result(end: protocol.End) -> Result:
    return Result(end.final_text, end.status_message, end.task_id, end.finish_reason, end.usage, end.messages)
