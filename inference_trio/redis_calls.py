"""Calls to the worker that runs a task, and its answers: messages, of which each is taken once.

And tasks that were cancelled, here or there.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Sequence
from typing import Any

import attrs
import msgspec
import trio

from .errors import InferenceError, InvalidParamsError, NoSuchTaskError, OverloadedError
from .protocol import Accepted, ToolResult
from .redis_producer import Producer
from .redis_worker import Worker
from .running import RunnersEnding, no_such_task

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
    """Those of one session."""

    worker: Worker
    session_id: str
    _waiting: dict[str, Reply] = attrs.field(factory=dict)

    async def tool_result(self, params: ToolResult) -> Accepted:
        """Raises what the worker of the task raises, and NoSuchTaskError where there is none."""
        worker = (await self._elsewhere()).get(params.task_id)
        if worker is None:
            raise no_such_task(params.task_id)
        reply = self._begin(worker, params.task_id, "tool_result", msgspec.to_builtins(params))
        return msgspec.convert(await self.result(reply), Accepted)

    async def cancel(self, task_id: str | None) -> list[EndingElsewhere]:
        """Cancels this task, or with ``None`` all of them, where other workers run them."""
        tasks = {name: worker for name, worker in (await self._elsewhere()).items() if task_id in (None, name)}
        replies = [self._begin(worker, name, "cancel", name) for name, worker in tasks.items()]
        return [EndingElsewhere(self, reply) for reply in replies]

    async def _elsewhere(self) -> dict[str, str]:
        """The workers of the tasks that other workers run."""
        found = [
            part.decode() for part in await self.worker.link.run("where", self.worker.session_key(self.session_id))
        ]
        tasks = dict(zip(found[::2], found[1::2], strict=True))
        return {task: worker for task, worker in tasks.items() if worker != self.worker.id}

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
        return (await self._elsewhere()).get(reply.task_id) == reply.worker

    def receive(self, call_id: str, result: Any, error: dict[str, Any] | None) -> None:
        reply = self._waiting.pop(call_id, None)
        if reply:
            reply.result, reply.error = result, error
            reply.came.set()

    async def answer(self, caller: str, call_id: str, call: Awaitable[Any]) -> None:
        """Sends what the call gives to whoever has asked."""
        result, error = None, None
        try:
            result = msgspec.to_builtins(await call)
        except InferenceError as refused:
            error = refused.to_wire()
        self.worker.post(caller, ["reply", self.session_id, call_id, result, error])


@attrs.frozen
class EndingElsewhere:
    """A task that was cancelled and runs in another process."""

    calls: Calls
    reply: Reply

    async def ended(self) -> list[str]:
        try:
            ids: list[str] = await self.calls.result(self.reply)
        except InferenceError:  # it has ended otherwise
            return []
        return ids


@attrs.frozen
class EndingHere:
    """Tasks that were cancelled and run in this process."""

    runners: RunnersEnding
    producer: Producer

    async def ended(self) -> list[str]:
        ids = await self.runners.ended()
        await self.producer.settle()
        return ids


@attrs.frozen
class Ending:
    """Tasks that were cancelled, in several places."""

    parts: Sequence[EndingHere | EndingElsewhere]

    async def ended(self) -> list[str]:
        return [task_id for part in self.parts for task_id in await part.ended()]
