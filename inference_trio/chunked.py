"""The chunked transfer coding (RFC 9112, section 7.1), for bodies of very many small chunks.

h11 makes an event of each chunk, which takes longer than all that is then done with what is in it.
"""

from __future__ import annotations

import re

import attrs

MAX_LINES = 16_384
"""Bytes of a chunk's head with its extensions, and of the fields after the last chunk, which nobody looks at."""

_HEAD = re.compile(rb"\r\n([0-9A-Fa-f]{1,16})[ \t]*(?:;[^\r\n]*)?\r\n")
"""Of a chunk, with the end of the one before it."""
_TRAILER = re.compile(rb"(?:[^\r\n]+\r\n)*\r\n")


class ChunkError(Exception):
    """What came is not in chunks."""


@attrs.define(eq=False)
class ChunkedBody:
    """``rest`` is what came and is not used yet; once it `is_complete`, what came after the end."""

    rest: bytes
    is_complete: bool = False
    _left: int = 0
    """Bytes of a chunk that has begun."""

    def __attrs_post_init__(self) -> None:
        self.rest = b"\r\n" + self.rest  # as if there was a chunk before

    def feed(self, data: bytes) -> bytes:
        """The content of what came. Raises ChunkError, but only when what came before the error was given."""
        data, position, parts = self.rest + data, 0, []
        while not self.is_complete:
            if self._left:
                parts.append(data[position : position + self._left])
                position += len(parts[-1])
                self._left -= len(parts[-1])
            head = None if self._left else _HEAD.match(data, position)
            if head is None:
                break
            if size := int(head[1], 16):
                self._left, position = size, head.end()
            elif trailer := _TRAILER.match(data, head.end()):
                self.is_complete, position = True, trailer.end()
            else:
                break
        self.rest = data[position:]
        if not parts and not self.is_complete:
            _check(self.rest)
        return b"".join(parts)


def _check(rest: bytes) -> None:
    """``rest`` is the beginning of a chunk's head, or of the last one's with its trailer."""
    is_head = _HEAD.match(rest) or (rest[:2] == b"\r\n"[: len(rest)] and b"\n" not in rest[2:])
    if not is_head or len(rest) > MAX_LINES:
        raise ChunkError(f"Expected a chunk of the body, got {rest[:40]!r}")
