"""What is asked of tasks that run, here or at another worker: calls and replies are messages, each taken once."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from typing import Any
from weakref import WeakValueDictionary

import attrs
import msgspec
import trio

from .errors import InferenceError, InvalidParamsError, NoSuchTaskError, OverloadedError
from .outbox import RETRY_AFTER
from .protocol import Accepted, TaskStatus, ToolResult
from .redis_link import FOREVER
from .redis_producer import Producer
from .redis_worker import Message, Worker
from .running import RunnersEnding, RunningTasks, no_such_task
from .task import TaskState

CHECK_INTERVAL = 2.0
"""Seconds without an answer after which is looked whether the task is still where it was."""

_ERRORS = {error.code: error for error in (InvalidParamsError, NoSuchTaskError, OverloadedError)}


@attrs.define(eq=False)
class Reply:
    """What the worker of the task will have answered."""

    worker: str
    task_id: str
    came: trio.Event = attrs.field(factory=trio.Event)
    result: Any = None
    error: dict[str, Any] | None = None

    def value(self) -> Any:
        """Raises the InferenceError that was the answer."""
        if self.error is not None:
            kind = _ERRORS.get(self.error["code"], OverloadedError)
            raise kind(self.error["message"], **self.error.get("data", {}))
        return self.result


@attrs.define(eq=False)
class Calls:
    """Those of one session. ``tasks`` are those that run here, ``producer`` is where they tell."""

    worker: Worker
    session_id: str
    tasks: RunningTasks
    producer: Producer
    _waiting: WeakValueDictionary[str, Reply] = attrs.field(factory=WeakValueDictionary)
    """Those that somebody still waits for."""
    _giving: trio.Lock = attrs.field(factory=trio.Lock)

    async def tool_result(self, params: ToolResult, epoch: int) -> Accepted:
        """Results that came by the connection of this epoch.

        Raises what the worker of the task raises, and NoSuchTaskError where there is none.
        """
        task_id = params.task_id
        worker = self.worker.id if task_id in self.tasks.runners else (await self._workers()).get(task_id)
        if worker is None:
            raise no_such_task(task_id)
        reply = self._begin(worker, task_id, "tool_result", (msgspec.to_builtins(params), epoch))
        return msgspec.convert(await self.result(reply), Accepted)

    async def cancel(self, task_id: str | None) -> Ending:
        """Cancels this task, or with ``None`` all of them, wherever they run."""
        here = self.tasks.cancel(task_id)
        if task_id in self.tasks.runners:
            return Ending(self, here)
        workers = await self._workers()
        names = [name for name in workers if task_id in (None, name) and workers[name] != self.worker.id]
        return Ending(self, here, [self._begin(workers[name], name, "cancel", name) for name in names])

    async def _workers(self) -> dict[str, str]:
        """Which worker runs which task."""
        found = await self.worker.link.run("where", self.worker.session_key(self.session_id))
        names = [part.decode() for part in found]
        return dict(zip(names[::2], names[1::2], strict=True))

    def _begin(self, worker: str, task_id: str, method: str, argument: Any) -> Reply:
        call_id = secrets.token_hex(8)
        reply = self._waiting[call_id] = Reply(worker, task_id)
        self.worker.post(worker, ["call", self.session_id, call_id, self.worker.id, method, argument])
        return reply

    async def result(self, reply: Reply) -> Any:
        """Raises NoSuchTaskError where the task is gone before there is a reply."""
        while not reply.came.is_set():
            with trio.move_on_after(CHECK_INTERVAL):
                await reply.came.wait()
            if not reply.came.is_set() and (self.worker.is_over or not await self._is_there(reply)):
                raise NoSuchTaskError("The task has ended before it took the call")
        return reply.value()

    async def _is_there(self, reply: Reply) -> bool:
        return (await self._workers()).get(reply.task_id) == reply.worker

    # At the worker that runs the task

    def receive(self, message: Message) -> None:
        match message:
            case ["call", _, call_id, caller, "cancel", task_id]:
                ended = Ending(self, self.tasks.cancel(task_id)).ended()
                self.worker.nursery.start_soon(self._answer, caller, call_id, ended)
            case ["call", _, call_id, caller, _, [params, epoch]]:
                accepted = self._give(call_id, msgspec.convert(params, ToolResult), epoch)
                self.worker.nursery.start_soon(self._answer, caller, call_id, accepted)
            case ["reply", _, call_id, result, error]:
                reply = self._waiting.pop(call_id, None)
                if reply:
                    reply.result, reply.error = result, error
                    reply.came.set()

    async def _answer(self, caller: str, call_id: str, call: Awaitable[Any]) -> None:
        """Sends what the call gives to whoever has asked."""
        result, error = None, None
        try:
            result = msgspec.to_builtins(await call)
        except InferenceError as refused:
            error = refused.to_wire()
        self.worker.post(caller, ["reply", self.session_id, call_id, result, error])

    async def _give(self, call_id: str, params: ToolResult, epoch: int) -> Accepted:
        """First Redis has them, then the task: what a new connection is told to be outstanding is never taken late."""
        async with self._giving:
            if status := self._status_with(params):
                key, terms = self.worker.session_key(self.session_id), (msgspec.json.encode(status), call_id, epoch)
                reply = await self.worker.link.run(
                    "give", key, self.worker.ttl, self.worker.id, params.task_id, *terms, within=FOREVER
                )
                if reply[0] == b"other":
                    raise taken_over()
                if reply[0] != b"ok":
                    raise no_such_task(params.task_id)
            return self.tasks.give_results(params)

    def _status_with(self, params: ToolResult) -> TaskStatus | None:
        """How the task will stand; ``None`` where the results do not fit."""
        runner = self.tasks.runners.get(params.task_id)
        outstanding = runner.task.outstanding if runner else []
        given = {result.tool_call_id for result in params.results}
        if len(given) < len(params.results) or not given <= set(outstanding):
            return None
        left = [name for name in outstanding if name not in given]
        state = TaskState.AWAITING_TOOLS if left else TaskState.STREAMING
        return TaskStatus(params.task_id, state.value, left)


@attrs.frozen
class Ending:
    """Tasks that were cancelled, here and elsewhere."""

    calls: Calls
    here: RunnersEnding
    elsewhere: Sequence[Reply] = ()

    async def ended(self) -> list[str]:
        """Waits until all have ended and Redis knows; the ids of those that the cancelling has ended."""
        ids = await self.here.ended()
        await self.calls.producer.settle()
        for reply in self.elsewhere:
            with suppress(InferenceError):  # it has ended otherwise
                ids += await self.calls.result(reply)
        return ids


def taken_over() -> OverloadedError:
    return OverloadedError("This connection was taken over", retry_after=RETRY_AFTER)
