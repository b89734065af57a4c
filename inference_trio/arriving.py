"""What clients have sent and nobody is through with yet: kept within one limit, over all connections.

A message counts from its first byte until its handler asks for the next one, a body until its request is over.
Nothing is queued elsewhere. Two rules keep it bounded:

* Of a connection that has more than `SMALL` waiting for its handler nothing is read: TCP makes its peer wait.
* While all together are over the limit, the same holds for a message or body larger than `SMALL` that is still
  coming, but for the one that began first: that one comes to its end and makes room. Those that wait go on one at a
  time, in order.

Two kinds give way, and then what they hold is dropped, and so is their connection: the first one, when it has been the
first for ``patience`` seconds and others wait; and whoever has waited in vain for ``longest_wait`` seconds.
So small ones always come through, large ones wait at most for those who hold up everybody, and a client that is alone
never waits. Besides the limit a connection may hold `SMALL`, and what one read from its socket gives.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

import attrs
import trio

from .logs import Seldom

SMALL = 16 * 1024
"""Bytes."""

_OVERHEAD = 100
"""Bytes for the objects that hold a message; an empty one has to count too."""

logger = logging.getLogger(__name__)


@attrs.define(eq=False)
class Arriving:
    """All there is: ``used`` bytes, of ``limit``. ``patience`` and ``longest_wait`` are in seconds."""

    limit: int
    patience: float
    longest_wait: float
    on_refusal: Callable[[str, int], None] = lambda *_: None
    """Called for each that gives way, as `metrics.Metrics.request_refused` is."""
    used: int = 0
    large: dict[Share, None] = attrs.field(factory=dict)
    """Those that hold more than `SMALL`, those first who did so first."""
    first_since: float = 0.0
    """When the first of them became the first."""
    waiting: dict[Share, trio.Event] = attrs.field(factory=dict)
    """Of these, those that have to wait, and what tells them that they need not any more."""
    _drops: Seldom = attrs.field(factory=Seldom)

    @property
    def first(self) -> Share | None:
        return next(iter(self.large), None)

    @property
    def patient_until(self) -> float:
        return self.first_since + self.patience

    def wake(self, share: Share) -> None:
        if share in self.waiting:
            self.waiting.pop(share).set()

    def wake_next(self) -> None:
        """Whoever is woken wakes the next one: so what the first ones read is counted before many more go on."""
        if share := self.first if self.used > self.limit else next(iter(self.waiting), None):
            self.wake(share)

    def drop(self, share: Share) -> None:
        share.end()
        share.give_way()
        if count := self._drops.one_more(trio.current_time()):
            logger.warning("messages and bodies dropped, as too many were coming at a time: %d", count)


@attrs.define(eq=False)
class Share:
    """What one connection holds of it, in bytes. ``give_way`` is called, once, when it has to be dropped."""

    arriving: Arriving
    give_way: Callable[[], None]
    size: int = 0
    is_over: bool = False

    def hold(self, size: int) -> None:
        """From now on it is this much."""
        if self.is_over:
            return
        arriving, before = self.arriving, self.arriving.first
        arriving.used += size - self.size
        self.size = size
        if size > SMALL:
            arriving.large.setdefault(self)
        else:
            arriving.large.pop(self, None)
            arriving.wake(self)
        if arriving.first is not before:
            arriving.first_since = trio.current_time()
        arriving.wake_next()

    def end(self) -> None:
        """It holds nothing any more, and never will."""
        self.hold(0)
        self.is_over = True

    async def wait_for_room(self) -> None:
        """Returns when there is room for more, or this has ended."""
        arriving = self.arriving
        if self.size <= SMALL or arriving.first is self or arriving.used <= arriving.limit:
            return
        until = trio.current_time() + arriving.longest_wait
        turn = arriving.waiting[self] = trio.Event()
        try:
            while not turn.is_set():
                with trio.move_on_at(min(until, arriving.patient_until)):
                    await turn.wait()
                    return
                if trio.current_time() >= until:
                    if arriving.used > arriving.limit:
                        arriving.drop(self)
                    return
                if (first := arriving.first) and trio.current_time() >= arriving.patient_until:
                    arriving.drop(first)
        finally:
            arriving.waiting.pop(self, None)
            arriving.wake_next()


@attrs.define(eq=False)
class Inbox:
    """The messages of one WebSocket: the one that is coming, and those that are complete."""

    share: Share
    _coming: bytearray = attrs.field(factory=bytearray)
    _complete: deque[tuple[bytes | str, int]] = attrs.field(factory=deque)
    _waiting: int = 0
    """Bytes of those that are complete, and of those that the handler has not finished with."""
    _taken: int = 0
    """Of these, the one that the handler has."""
    _changed: trio.Event = attrs.field(factory=trio.Event)

    def extend(self, data: str | bytes) -> int:
        """Adds to the message that is coming, whose size in bytes is returned."""
        self._coming += data.encode() if isinstance(data, str) else data
        self._count()
        return len(self._coming)

    def finish(self, is_text: bool) -> None:
        """The message that was coming is complete. Text has to be UTF-8."""
        size = len(self._coming) + _OVERHEAD
        self._waiting += size
        self._complete.append((self._coming.decode() if is_text else bytes(self._coming), size))
        self._coming = bytearray()
        self._changed.set()
        self._count()

    async def wait_for_room(self) -> None:
        """Returns when more may be read, or nothing more will be."""
        while self._waiting > SMALL and not self.share.is_over:
            await self._change()
        await self.share.wait_for_room()

    async def take(self) -> bytes | str:
        """The next message; whoever asks for it is through with the one before."""
        self._waiting, self._taken = self._waiting - self._taken, 0
        self._changed.set()
        self._count()
        while not self._complete:
            await self._change()
        message, self._taken = self._complete.popleft()
        return message

    def close(self) -> None:
        self._coming = bytearray()
        self._complete.clear()
        self.share.end()
        self._changed.set()

    async def _change(self) -> None:
        if self._changed.is_set():
            self._changed = trio.Event()
        await self._changed.wait()

    def _count(self) -> None:
        self.share.hold(len(self._coming) + self._waiting)
