"""What a connection is still to be sent, out of the session's log in Redis.

Where the task runs in this process, what was appended comes straight from there; otherwise, or where that does not
follow on what is here, the feeder takes it from the log. Either way in order and once: `accept` looks at the numbers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Iterable

import attrs
import msgspec
import trio

from .outbox import Budget
from .protocol import Kept, TaskNotification

LARGEST_READY = 64 * 1024
"""Bytes of notifications that are held here for a connection; what comes after that stays in the log.

Of more than that there is only ever one, and nothing else while all that is held here exceeds its budget.
"""


@attrs.frozen
class Ready:
    """A notification that is in the log under this number."""

    seq: int
    note: TaskNotification | Kept
    size: int


@attrs.define(eq=False)
class Delivery:
    """``position`` is the last number that came here, ``taken`` the last one that the connection took.

    ``unacknowledged`` are the bytes taken that the log does not know to be; ``ack_at`` of them make the feeder tell it.
    """

    position: int
    ack_at: int
    wake: Callable[[], None]
    budget: Budget
    taken: int = attrs.field(init=False)
    unacknowledged: int = 0
    is_behind: bool = True
    _ready: deque[Ready] = attrs.field(factory=deque)
    _size: int = 0
    _wanted: trio.Event = attrs.field(factory=trio.Event)

    def __attrs_post_init__(self) -> None:
        self.taken = self.position

    def accept(self, entries: Iterable[Ready]) -> None:
        """Takes those that come next; where some are missing or too much is here, the rest is left to the feeder."""
        for entry in entries:
            if entry.seq <= self.position:
                continue
            if entry.seq > self.position + 1 or self._size >= self.most:
                self.look()
                break
            self._ready.append(entry)
            self._size += entry.size
            self.budget.add(entry.size)
            self.position = entry.seq
        if self._ready:
            self.wake()

    def take(self) -> Ready | None:
        if not self._ready:
            return None
        entry = self._ready.popleft()
        self._size -= entry.size
        self.budget.release(entry.size)
        self.taken = entry.seq
        self.unacknowledged += entry.size
        if self._is_feeding_due:
            self._wanted.set()
        return entry

    def close(self) -> None:
        """Nothing is taken any more."""
        self.budget.release(self._size)
        self._size = 0
        self._ready.clear()

    @property
    def most(self) -> int:
        """Bytes that may be here before more is taken from the log."""
        return 1 if self.budget.is_exceeded else LARGEST_READY

    def acknowledge(self, size: int) -> None:
        """The log knows that so much more was taken."""
        self.unacknowledged -= size

    def look(self) -> None:
        """There is something in the log that is not here."""
        self.is_behind = True
        self._wanted.set()

    @property
    def _is_feeding_due(self) -> bool:
        return self._size < self.most and (self.is_behind or self.unacknowledged >= self.ack_at)

    async def feed(self, read: Callable[[], Awaitable[list[Ready] | None]]) -> None:
        """Reads from the log what is wanted, until there is no more to be had (``None``) or it is cancelled."""
        while True:
            if not self._is_feeding_due:
                self._wanted = trio.Event()
                await self._wanted.wait()
                continue
            # Before the call: what is told while it is under way may have come after it.
            self.is_behind = False
            entries = await read()
            if entries is None:
                return
            self.is_behind = self.is_behind or bool(entries)
            self.accept(entries)


def ready(seq: int, size: int, data: bytes) -> Ready:
    method, fields = msgspec.json.decode(data, type=tuple[str, dict[str, msgspec.Raw]])
    return Ready(seq, Kept(method, fields), size)


def encoded(note: TaskNotification) -> bytes:
    """A notification as it is in the log."""
    return msgspec.json.encode((note.method, note))
