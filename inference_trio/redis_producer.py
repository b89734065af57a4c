"""What the tasks of a session that run in this process have to tell, on its way into the session's log.

It waits in an `Outbox`, where text merges, while what came before is being appended: one call at a time, and each
takes all there is. The call also carries how the tasks stand, so that the log and they never disagree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import attrs
import trio

from .jsonrpc import encode
from .outbox import Budget, Entry, Outbox
from .protocol import End, Error, FunctionCallRequest, TaskNotification
from .redis_delivery import Ready, encoded
from .redis_link import FOREVER, Value
from .redis_worker import Worker
from .running import status_of
from .task import Task


@attrs.define(eq=False)
class Room:
    """How much of the log is not sent, as far as this process was told: replies that were overtaken do not count."""

    half: int
    _unsent: int = 0
    _version: int = 0
    _changed: trio.Event = attrs.field(factory=trio.Event)

    def is_full_with(self, pending: int) -> bool:
        return self._unsent + pending >= self.half

    def update(self, version: int, unsent: int) -> None:
        if version > self._version:
            self._version, self._unsent = version, unsent
            self.changed()

    def changed(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def wait(self) -> None:
        await self._changed.wait()


@attrs.frozen
class Appended:
    """``connection`` has to be told; the tasks in ``others`` do not run here any more, and were not appended."""

    entries: list[Ready]
    connection: str
    others: list[str]


@attrs.define(eq=False)
class Producer:
    """``appended`` is called with what came of a call; ``None`` stands for a session that is no more."""

    worker: Worker
    session_id: str
    limit: int
    budget: Budget
    room: Room
    appended: Callable[[Appended | None], None]
    _pending: Outbox = attrs.field(default=attrs.Factory(lambda self: Outbox(self.limit, self.budget), takes_self=True))
    _under_way: int = 0
    _open: dict[str, Task] = attrs.field(factory=dict)
    _changed: set[str] = attrs.field(factory=set)
    _begun: int = 0
    _done: int = 0
    _last_batch: int = 0
    """The last one that Redis has said to have."""
    _is_busy: bool = False

    def open(self, task: Task) -> None:
        """The task is registered; from now on it may tell something."""
        self._open[task.id] = task

    def append(self, note: TaskNotification) -> None:
        if note.task_id not in self._open:
            return
        self._pending.append(note)
        if isinstance(note, FunctionCallRequest | End | Error):
            self._changed.add(note.task_id)
        self._kick()

    def change(self, task_id: str) -> None:
        """The task's state has changed."""
        if task_id in self._open:
            self._changed.add(task_id)
            self._kick()

    @property
    def size(self) -> int:
        """Bytes that are not in the log yet."""
        return self._pending.unsent + self._under_way

    @property
    def is_full(self) -> bool:
        return self._pending.is_full or self.room.is_full_with(self.size)

    async def wait_for_room(self) -> None:
        while self.is_full and not self.worker.is_over:
            await self.room.wait()

    def close(self) -> None:
        """Nothing is told any more."""
        self._open.clear()
        self._changed.clear()
        self.budget.release(self._replace_pending().size)
        self.room.changed()

    async def settle(self) -> None:
        """Returns when all that was told before is in the log."""
        last = self._begun + 1 if self._has_something else self._begun
        while self._done < last and not self.worker.is_over:
            await self.room.wait()

    @property
    def _has_something(self) -> bool:
        return bool(self._changed) or self._pending.unsent > 0

    def _replace_pending(self) -> Outbox:
        pending, self._pending = self._pending, Outbox(self.limit, self.budget)
        return pending

    def _kick(self) -> None:
        if not self._is_busy and not self.worker.is_over:
            self._is_busy = True
            self.worker.nursery.start_soon(self._append_all)

    async def _append_all(self) -> None:
        try:
            while self._has_something:
                await self._append_batch()
        finally:
            self._is_busy = False

    async def _append_batch(self) -> None:
        self._begun += 1
        pending = self._replace_pending()
        self._under_way = pending.unsent
        try:
            self.appended(await self._append_pending(list(iter(pending.take, None))))
        finally:
            self._done = self._begun
            self._under_way = 0
            self.budget.release(pending.size)
            self.room.changed()

    async def _append_pending(self, entries: list[Entry]) -> Appended | None:
        statuses = list(self._statuses())
        worker, key = self.worker, self.worker.session_key(self.session_id)
        batch = worker.new_number()
        terms = (worker.ttl, worker.id, batch, self._last_batch, self.room.half, len(statuses) // 2)
        notes = (value for entry in entries for value in (entry.note.task_id, entry.size, encoded(entry.note)))
        reply = await worker.link.run("append", key, *terms, *statuses, *notes, within=FOREVER)
        if reply[0] != b"ok":
            worker.is_behind |= reply[0] == b"behind"
            return None
        self._last_batch = batch
        _, version, unsent, told, first, others = reply
        self.room.update(version, unsent)
        foreign = others.decode().split(",") if others else []
        for task_id in foreign:
            self._open.pop(task_id, None)
            self._changed.discard(task_id)
        return Appended(_numbered(entries, first, foreign), told.decode(), foreign)

    def _statuses(self) -> Iterator[Value]:
        for task_id in self._changed:
            task = self._open[task_id]
            yield task_id
            if task.has_ended:
                del self._open[task_id]
                yield ""
            else:
                yield encode(status_of(task))
        self._changed.clear()


def _numbered(entries: list[Entry], first: int, foreign: list[str]) -> list[Ready]:
    ours = [entry for entry in entries if entry.note.task_id not in foreign]
    return [Ready(seq, entry.note, entry.size) for seq, entry in enumerate(ours, first)]
