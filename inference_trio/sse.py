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

    _line: bytearray = attrs.field(factory=bytearray)
    _data: list[bytes] = attrs.field(factory=list)
    _is_first_line: bool = True
    _is_after_cr: bool = False
    _has_event: bool = False
    _size: int = 0

    def feed(self, read: bytes) -> list[bytes]:
        """The events that are complete with ``read``. Raises BrokenStreamError where one gets too large."""
        lines = self._complete_lines(read)
        events = [event for event in map(self._take, lines) if event]
        self._size = len(self._line) if events else self._size + len(read)
        self._has_event = self._has_event or bool(events)
        if self._has_event:
            self.answer_so_far.clear()
        else:
            self.answer_so_far += read
        if self._size > MAX_EVENT_BYTES:
            raise BrokenStreamError("The provider sent an event that is too large")
        return events

    def finish(self) -> list[bytes]:
        """The event that lacks its blank line, if there is one."""
        return self.feed(b"\n\n")

    def _complete_lines(self, read: bytes) -> list[bytes]:
        if self._is_after_cr and read:
            read, self._is_after_cr = read.removeprefix(b"\n"), False
        self._is_after_cr = self._is_after_cr or read.endswith(b"\r")
        *lines, rest = read.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        if lines:
            lines[0] = bytes(self._line + lines[0])
            self._line.clear()
            if self._is_first_line:
                lines[0] = lines[0].removeprefix(_BYTE_ORDER_MARK)
                self._is_first_line = False
        self._line += rest
        return lines

    def _take(self, line: bytes) -> bytes | None:
        """The event that ``line`` ends, if it ends one."""
        if not line:
            event, self._data = b"\n".join(self._data).strip(), []
            return event
        field, _, value = line.partition(b":")
        if field == b"data":
            self._data.append(value.removeprefix(b" "))
        return None
