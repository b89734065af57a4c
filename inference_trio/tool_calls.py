"""Tool calls from the pieces in which models stream them.

LangChain's merge goes by ``index``, which many compatible servers leave out or always set to 0, and its lenient
JSON parser takes arguments that were cut off for complete ones. So the pieces are collected here, and the
arguments parsed strictly, once, at the end.

Where the pieces of one call end and the next begins: a piece belongs to the newest call with its index (without
an index, to the call with its id or the newest one), unless it names a tool and either has another id, or names
another tool, or finds the call's arguments complete. Ids need not be there, nor be unique; then we make one.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterator

import attrs

from .chat import JsonObject
from .deltas import ToolCallDelta, well_formed
from .errors import ParseError
from .jsonrpc import MAX_DEPTH, loads
from .task import ToolCall


@attrs.define
class _Call:
    """A tool call as it grows. ``previous`` is the one that its first piece did not belong to any more."""

    index: int | None
    previous: _Call | None
    id: str = ""
    name: str = ""
    pieces: list[str] = attrs.field(factory=list)

    @property
    def arguments(self) -> str:
        return "".join(self.pieces)

    def is_followed_by(self, piece: ToolCallDelta) -> bool:
        """Whether ``piece`` begins another call. A new id alone does not: some servers make one up each time."""
        if not piece.name or not self.name:
            return False
        has_other_id = bool(piece.id and self.id and piece.id != self.id)
        return has_other_id or piece.name != self.name or self._is_complete()

    def extend(self, piece: ToolCallDelta) -> None:
        self.id = self.id or piece.id
        self.name = self.name or piece.name
        if piece.arguments:
            self.pieces.append(piece.arguments)

    def is_call(self) -> bool:
        """Whether this is not just the id or the name of the previous call once more, after its arguments."""
        if self.name and self.previous and not self.arguments.strip():
            return self.name != self.previous.name or self.id not in ("", self.previous.id)
        return bool(self.name or self.arguments.strip())

    def _is_complete(self) -> bool:
        if not self.pieces or not self.pieces[-1].rstrip().endswith("}"):
            return False
        try:
            parse_arguments(self.arguments)
        except ValueError:
            return False
        return True


@attrs.define
class ToolCallAssembler:
    """The tool calls of one round."""

    _calls: list[_Call] = attrs.field(factory=list)

    def add(self, piece: ToolCallDelta) -> None:
        call = self._call_of(piece)
        if call is None or call.is_followed_by(piece):
            call = _Call(piece.index, call)
            self._calls.append(call)
        call.extend(piece)

    def complete(self, offered: Collection[str], used_ids: Collection[str]) -> Iterator[ToolCall]:
        """The calls, each with an id that is neither in ``used_ids`` nor that of another one.

        A call whose arguments are not a JSON object, or to a tool that is not ``offered``, has its ``problem``.
        """
        seen = set(used_ids)
        for call in self._calls:
            if call.is_call():
                call_id = call.id if _is_usable(call.id) and call.id not in seen else _fresh_id()
                seen.add(call_id)
                yield _checked(call_id, call.name, call.arguments, offered)

    def _call_of(self, piece: ToolCallDelta) -> _Call | None:
        """The call that ``piece`` belongs to if it does not begin one."""
        newest_first = reversed(self._calls)
        candidates = [call for call in newest_first if piece.index in (None, call.index)]
        same_id = (call for call in candidates if piece.id and call.id == piece.id)
        return next(same_id, candidates[0] if candidates else None)


def parse_arguments(arguments: str) -> JsonObject:
    """The JSON object in ``arguments``; blank text is an empty one. Raises ValueError, which says what is wrong."""
    try:
        # Pieces may have been cut within a surrogate pair: UTF-16 joins them and refuses lone ones.
        text = arguments.encode("utf-16", "surrogatepass").decode("utf-16")
        parsed = loads(text if text.strip() else "{}")
    except (UnicodeError, ParseError) as error:
        raise ValueError(f"they are not JSON nested at most {MAX_DEPTH} deep") from error
    if not isinstance(parsed, dict):
        raise ValueError("they are another JSON value")  # noqa: TRY004 - the value is wrong, not our type
    return parsed


def _is_usable(call_id: str) -> bool:
    return bool(call_id) and call_id.isprintable()


def _fresh_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _checked(call_id: str, name: str, arguments: str, offered: Collection[str]) -> ToolCall:
    if name not in offered:
        tools = ", ".join(offered) or "none"
        problem = f"There is no tool of this name; the tools are: {tools}."
        return ToolCall(call_id, well_formed(name), {}, problem)
    try:
        return ToolCall(call_id, name, parse_arguments(arguments))
    except ValueError as error:
        return ToolCall(call_id, name, {}, f"The arguments have to be a JSON object, but {error}.")
