"""The notifications of a session: a numbered, merging, byte-bounded log with a read cursor.

    kept ──▶ [ sent …………………………… | unsent …………………… ]
              oldest_seq           ^cursor       ^latest_seq

What a task produces is appended at the right. Whoever is connected takes what is right of the cursor. From this
one structure follow

- back-pressure: while `is_full`, whoever produces waits. It is full when what is unsent reaches half the limit;
- cheap tokens under load: text that is not sent yet grows in place instead of becoming one more notification;
- replay: what was sent is kept, up to the other half of the limit, and `rewind` moves the cursor back to it. What
  was once sent under a number never changes;
- bounded memory, whatever the client does. Only the newest notification is kept whatever its size.

All outboxes, and what else sessions hold, share one `Budget`. While it is exceeded an outbox keeps nothing for
replay, and a producer waits as soon as anything is unsent: whoever reads goes on, whoever does not read waits until
there is room, wherever that was made.

Sizes are in bytes of JSON, near enough for a bound.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import attrs
import msgspec

from .protocol import End, Error, ReasoningChunk, TaskNotification, TextChunk

_OVERHEAD = 160
"""Bytes for a frame's envelope, the ids and the Python objects that hold an entry."""


@attrs.define
class Budget:
    """Bytes that may be held in all places together, and that are. ``make_room`` is called while it is exceeded.

    Who waits for room is woken one at a time, those who wait longest first; each of them wakes the next one when it
    goes on. So what the first ones put there is counted before many more are woken.
    """

    limit: int
    make_room: Callable[[], None] = lambda: None
    used: int = 0
    _queue: dict[object, Callable[[], object]] = attrs.field(factory=dict)

    @property
    def is_exceeded(self) -> bool:
        return self.used > self.limit

    def add(self, size: int) -> None:
        self.used += size
        if self.is_exceeded:
            self.make_room()

    def release(self, size: int) -> None:
        self.used -= size
        self._wake_next()

    @contextmanager
    def queueing(self, wake: Callable[[], object]) -> Iterator[None]:
        """To wait in for room: ``wake`` is called, at most once, when there is some."""
        place = object()
        self._queue[place] = wake
        try:
            yield
        finally:
            self._queue.pop(place, None)
            self._wake_next()

    def _wake_next(self) -> None:
        if self._queue and not self.is_exceeded:
            self._queue.pop(next(iter(self._queue)))()


@attrs.define
class Entry:
    """A notification under its number. ``more`` is text that came for it later; once it was sent, none is added."""

    seq: int
    note: TaskNotification
    size: int
    was_sent: bool = False
    more: list[str] | None = None  # a list for each would cost more than the text of a token

    def seal(self) -> None:
        self.was_sent = True
        if self.more and isinstance(self.note, TextChunk | ReasoningChunk):
            self.note = msgspec.structs.replace(self.note, chunk="".join((self.note.chunk, *self.more)))
            self.more = None


@attrs.frozen
class Replay:
    """What can be replayed; ``gap`` is true where something after ``after`` is no longer kept."""

    after: int
    oldest_seq: int
    latest_seq: int
    gap: bool


@attrs.define
class Outbox:
    """``limit``: bytes that may be kept, of all that ``budget`` counts."""

    limit: int
    budget: Budget
    latest_seq: int = 0
    _sent: deque[Entry] = attrs.field(factory=deque)
    _unsent: deque[Entry] = attrs.field(factory=deque)
    _sent_bytes: int = 0
    _unsent_bytes: int = 0

    @property
    def oldest_seq(self) -> int:
        """Number of the oldest notification kept; ``latest_seq + 1`` when there is none."""
        return self.latest_seq + 1 - len(self._sent) - len(self._unsent)

    @property
    def size(self) -> int:
        return self._sent_bytes + self._unsent_bytes

    @property
    def unsent(self) -> int:
        """Bytes that wait to be taken."""
        return self._unsent_bytes

    @property
    def unsent_ends(self) -> int:
        """Tasks whose end waits to be taken."""
        return sum(isinstance(entry.note, End | Error) for entry in self._unsent)

    @property
    def is_full(self) -> bool:
        """Whether a producer has to wait: until something is taken, or where it `lacks_room` until there is room."""
        return self._unsent_bytes >= (1 if self.budget.is_exceeded else self.limit // 2)

    @property
    def lacks_room(self) -> bool:
        """Whether it is full only for what all together hold."""
        return self.is_full and self._unsent_bytes < self.limit // 2

    def append(self, note: TaskNotification) -> None:
        """Adds a notification under the next number, or its text to the newest one if that is not sent yet."""
        newest = self._unsent[-1] if self._unsent else None
        added = _size_of(note)
        if newest and isinstance(note, TextChunk | ReasoningChunk) and _continues(newest, note):
            added -= _OVERHEAD
            newest.more = newest.more or []
            newest.more.append(note.chunk)
            newest.size += added
        else:
            self.latest_seq += 1
            self._unsent.append(Entry(self.latest_seq, note, added))
        self._unsent_bytes += added
        self.budget.add(added)
        self._forget()

    def take(self) -> Entry | None:
        """The next notification to be sent, if there is one; it counts as sent from now on."""
        if not self._unsent:
            return None
        entry = self._advance()
        entry.seal()
        return entry

    def rewind(self, after: int) -> Replay:
        """Moves the cursor, so that what is kept under numbers above ``after`` is taken next.

        Raises ValueError where ``after`` is not a number given out so far, or 0.
        """
        if not 0 <= after <= self.latest_seq:
            raise ValueError(f"Expected a number from 0 to {self.latest_seq}")
        replay = Replay(after, self.oldest_seq, self.latest_seq, gap=after < self.oldest_seq - 1)
        while self._sent and self._sent[-1].seq > after:
            entry = self._sent.pop()
            self._sent_bytes -= entry.size
            self._unsent.appendleft(entry)
            self._unsent_bytes += entry.size
        while self._unsent and self._unsent[0].seq <= after:
            self._advance()
        return replay

    def _advance(self) -> Entry:
        entry = self._unsent.popleft()
        self._unsent_bytes -= entry.size
        self._sent.append(entry)
        self._sent_bytes += entry.size
        self._forget()
        return entry

    def shrink(self) -> None:
        """Keeps the newest notification only."""
        while self._unsent and self._unsent[0].seq < self.latest_seq:
            self._advance()
        self._forget_while(lambda: True)

    def _forget(self) -> None:
        self._forget_while(lambda: self._sent_bytes > self.limit // 2 or self.budget.is_exceeded)

    def _forget_while(self, is_too_much: Callable[[], bool]) -> None:
        while self._sent and self._sent[0].seq < self.latest_seq and is_too_much():
            size = self._sent.popleft().size
            self._sent_bytes -= size
            self.budget.release(size)


def _continues(newest: Entry, note: TextChunk | ReasoningChunk) -> bool:
    return not newest.was_sent and type(newest.note) is type(note) and newest.note.task_id == note.task_id


def _size_of(note: TaskNotification) -> int:
    if isinstance(note, TextChunk | ReasoningChunk):
        return _OVERHEAD + len(note.chunk.encode())
    return _OVERHEAD + len(msgspec.json.encode(note))
