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

All outboxes, and what else sessions hold, share a `Budget`, where there are tokens within one for each of them. While
it is exceeded an outbox keeps nothing for
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

from .errors import InvalidParamsError, OverloadedError
from .protocol import End, Error, ReasoningChunk, TaskNotification, TextChunk

BYTES_PER_BYTE_OF_JSON = 3
"""What a request holds while its task runs: its Python objects, LangChain's, and the body that is sent upstream."""

RETRY_AFTER = 1.0
"""Seconds after which a client refused for a limit may try again."""

_OVERHEAD = 160
"""Bytes for a frame's envelope, the ids and the Python objects that hold an entry."""


@attrs.define
class Budget:
    """Bytes that may be held in all places together, and that are. ``make_room`` is called while they are too many.

    What is counted here counts in the ``whole`` too, and while that is exceeded, so is this.

    Who waits for room is woken one at a time, those who wait longest first; each of them wakes the next one when it
    goes on. So what the first ones put there is counted before many more are woken.
    """

    limit: int
    make_room: Callable[[], None] = lambda: None
    used: int = 0
    whole: Budget | None = None
    queue: dict[object, tuple[Budget, Callable[[], object]]] = attrs.field(
        default=attrs.Factory(lambda self: self.whole.queue if self.whole else {}, takes_self=True)
    )
    """Who waits for room, here or anywhere in the whole."""

    @property
    def is_exceeded(self) -> bool:
        return self.used > self.limit or (self.whole is not None and self.whole.is_exceeded)

    def check(self) -> None:
        """Raises OverloadedError where it is exceeded."""
        if self.is_exceeded:
            whose = "this token" if self.whole and not self.whole.is_exceeded else "this server"
            raise OverloadedError(f"The sessions of {whose} hold as much as they may", retry_after=RETRY_AFTER)

    def hold(self, size: int) -> None:
        """The same as `add`, but raises OverloadedError where that is too much; then nothing has changed."""
        self.add(size)
        try:
            self.check()
        except OverloadedError:
            self.release(size)
            raise

    def add(self, size: int) -> None:
        self.used += size
        if self.whole:
            self.whole.add(size)
        if self.used > self.limit:
            self.make_room()

    def release(self, size: int) -> None:
        self.used -= size
        if self.whole:
            self.whole.release(size)
        else:
            self._wake_next()

    @contextmanager
    def queueing(self, wake: Callable[[], object]) -> Iterator[None]:
        """To wait in for room: ``wake`` is called, at most once, when there is some."""
        place = object()
        self.queue[place] = self, wake
        try:
            yield
        finally:
            self.queue.pop(place, None)
            self._wake_next()

    def _wake_next(self) -> None:
        if (self.whole or self).is_exceeded:
            return
        for place, (budget, wake) in self.queue.items():
            if not budget.is_exceeded:
                del self.queue[place]
                wake()
                return


@attrs.define
class Gathered:
    """How much a task has gathered, in characters; ``limit`` is how much it may. The ``budget`` counts it in bytes."""

    limit: int
    budget: Budget
    size: int = 0

    @property
    def is_too_much(self) -> bool:
        return self.size > self.limit

    def add(self, size: int) -> None:
        self.size += size
        self.budget.add(size * BYTES_PER_BYTE_OF_JSON)

    def check(self, size: int) -> None:
        """Raises InvalidParamsError where results of this size are too much, OverloadedError where there is no room."""
        if self.size + size > self.limit:
            left = max(0, self.limit - self.size)
            raise InvalidParamsError(
                f"Expected at most {left} characters, as the task has {self.size} already, got {size}"
                " - at `params.results`"
            )
        self.budget.check()

    def release(self) -> None:
        self.budget.release(self.size * BYTES_PER_BYTE_OF_JSON)


@attrs.define
class Entry:
    """A notification under its number. ``more`` is text that came for it later, until the cursor passed it."""

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
    _sent: deque[TaskNotification] = attrs.field(factory=deque)
    """Without their numbers and sizes, which can be told from the rest: of tokens there are very many."""
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
        return self._advance() if self._unsent else None

    def rewind(self, after: int) -> Replay:
        """Moves the cursor, so that what is kept under numbers above ``after`` is taken next.

        Raises ValueError where ``after`` is not a number given out so far, or 0.
        """
        if not 0 <= after <= self.latest_seq:
            raise ValueError(f"Expected a number from 0 to {self.latest_seq}")
        replay = Replay(after, self.oldest_seq, self.latest_seq, gap=after < self.oldest_seq - 1)
        while self._sent and (seq := self.latest_seq - len(self._unsent)) > after:
            note = self._sent.pop()
            size = _size_of(note)
            self._sent_bytes -= size
            self._unsent.appendleft(Entry(seq, note, size, was_sent=True))
            self._unsent_bytes += size
        while self._unsent and self._unsent[0].seq <= after:
            self._advance()
        return replay

    def _advance(self) -> Entry:
        entry = self._unsent.popleft()
        entry.seal()
        self._unsent_bytes -= entry.size
        self._sent.append(entry.note)
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
        while self._sent and self.oldest_seq < self.latest_seq and is_too_much():
            size = _size_of(self._sent.popleft())
            self._sent_bytes -= size
            self.budget.release(size)


def _continues(newest: Entry, note: TextChunk | ReasoningChunk) -> bool:
    return not newest.was_sent and type(newest.note) is type(note) and newest.note.task_id == note.task_id


def _size_of(note: TaskNotification) -> int:
    if isinstance(note, TextChunk | ReasoningChunk):
        return _OVERHEAD + len(note.chunk.encode())
    return _OVERHEAD + len(msgspec.json.encode(note))
