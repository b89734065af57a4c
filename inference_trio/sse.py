"""Server-sent events (WHATWG HTML, section 9.2.6) as far as model providers use them.

That is ``data``, comments, any line ends, and a last event that may lack its blank line. Events are cut from the
bytes of one read at a time, all that it completes, because under load a read brings many.
"""

from __future__ import annotations

import attrs

from .errors import BrokenStreamError

MAX_EVENT_BYTES = 16_777_216
"""Bytes from one event to the next. More is nothing that a model says."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@attrs.define
class EventDecoder:
    """Splits bytes into the data of events, without the white space around it and without blank ones."""

    answer_so_far: bytearray = attrs.field(factory=bytearray)
    """All that came before the first event; empty from then on."""

    _rest: bytearray = attrs.field(factory=bytearray)
    """The beginning of an event."""
    _is_after_cr: bool = False
    _is_first: bool = True
    _has_event: bool = False
    _size: int = 0

    def feed(self, read: bytes) -> list[bytes]:
        """The events that are complete with ``read``. Raises BrokenStreamError where one gets too large."""
        events = [event for event in map(_data_of, self._complete_blocks(read)) if event]
        self._size = len(self._rest) if events else self._size + len(read)
        if not self._has_event:
            self._has_event = bool(events)
            self.answer_so_far = bytearray() if events else self.answer_so_far + read
        if self._size > MAX_EVENT_BYTES:
            raise BrokenStreamError("The provider sent an event that is too large")
        return events

    def finish(self) -> list[bytes]:
        """The event that lacks its blank line, if there is one."""
        return self.feed(b"\n\n")

    def _complete_blocks(self, read: bytes) -> list[bytes]:
        """What lies between blank lines. An event that comes in many reads is put together once, at its end."""
        read = self._with_plain_line_ends(read)
        if self._rest:
            if b"\n\n" not in self._rest[-1:] + read:
                self._rest += read
                return []
            read = bytes(self._rest + read)
        *blocks, rest = read.split(b"\n\n")
        self._rest = bytearray(rest)
        if self._is_first and blocks:
            blocks[0] = blocks[0].removeprefix(_BYTE_ORDER_MARK)
            self._is_first = False
        return blocks

    def _with_plain_line_ends(self, read: bytes) -> bytes:
        if self._is_after_cr and read:
            read, self._is_after_cr = read.removeprefix(b"\n"), False
        if b"\r" in read:
            self._is_after_cr = read.endswith(b"\r")
            read = read.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        return read


def _data_of(block: bytes) -> bytes:
    if block.startswith(b"data:") and b"\n" not in block:
        return block[5:].strip()
    lines = (line.partition(b":") for line in block.split(b"\n"))
    return b"\n".join(value.removeprefix(b" ") for field, _, value in lines if field == b"data").strip()
