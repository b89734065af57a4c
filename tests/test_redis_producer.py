"""What the tasks of a session tell, on its way into a log that others write to as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import trio
from trio.testing import wait_all_tasks_blocked

from inference_trio.outbox import Budget
from inference_trio.redis_producer import Producer, Room
from inference_trio.task import Task


@attrs.define(eq=False)
class FakeWorker:
    """``meanwhile`` happens while a call of Redis is under way, which then says that others have ended the task."""

    nursery: trio.Nursery
    meanwhile: Callable[[], None] = lambda: None
    id: str = "worker"
    ttl: int = 1000
    is_over: bool = False
    is_behind: bool = False
    calls: int = 0

    @property
    def link(self) -> FakeWorker:
        return self

    def session_key(self, session_id: str) -> str:
        return session_id

    def new_number(self) -> int:
        return self.calls

    async def run(self, *_: Any, **__: Any) -> list[Any]:
        self.calls += 1
        self.meanwhile()
        await trio.lowlevel.checkpoint()
        return [b"ok", self.calls, 0, b"", 1, b"task"]


async def test_a_task_that_others_have_ended_may_change_while_that_is_told() -> None:
    async with trio.open_nursery() as nursery:
        worker: Any = FakeWorker(nursery)
        producer = Producer(worker, "session", 1000, Budget(1000), Room(1000), lambda _: None)
        producer.open(Task("task", tool_timeout=1.0, max_tool_rounds=1))
        worker.meanwhile = lambda: producer.change("task")
        producer.change("task")
        await wait_all_tasks_blocked()
        assert worker.calls == 1
        producer.change("task")
        await wait_all_tasks_blocked()
        assert worker.calls == 1
