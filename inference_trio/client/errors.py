"""What can go wrong, as a small tree of exceptions.

InferenceError
├── RequestError              what was asked for is wrong, or not there
├── GenerationError           a generation has failed
│   ├── UpstreamError         the provider refused or failed
│   ├── RateLimitedError      the provider has had too many requests
│   ├── UpstreamTimeoutError  the provider was too slow
│   ├── ToolTimeoutError      the results of tools did not come in time
│   ├── BrokenStreamError     the provider's stream broke off or made no sense
│   └── TooManyRoundsError    the model went on calling tools
├── OverloadedError           the server is full, or stopping
├── DefectError               the server has a defect, or there is no such server at the URL
└── ConnectionLostError       given up, or not to be settled after a gap
    ├── UnreachableError      no connection can be made
    ├── UnauthorizedError     the token is missing or not in force
    ├── SessionGoneError      the session has expired, or the server was started anew
    ├── TakenOverError        a newer connection has the session
    ├── TooBigError           the server takes no message of this size
    └── ClosedError           the session was closed here
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

UNSETTLED = "connection_lost"


class InferenceError(Exception):
    """What went wrong.

    Attributes:
        message: for people
        code: the server's (a negative number, see the protocol), or a word where the error is the client's own
        data: what a program can act on; the protocol's table of errors has the keys
    """

    codes: ClassVar[tuple[int | str, ...]] = ()
    """The codes for which this class stands."""

    def __init__(self, message: str, code: int | str | None = None, data: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = self.codes[0] if code is None and self.codes else code
        self.data = dict(data or {})

    @property
    def retryable(self) -> bool:
        """Whether the same may succeed when it is tried again, after `retry_after` seconds where that is given."""
        return bool(self.data.get("retryable", False))

    @property
    def retry_after(self) -> float | None:
        """After how many seconds the server asks to try again."""
        return self.data.get("retry_after")

    @property
    def partial_text(self) -> str:
        """The text that a generation had given before it failed."""
        return str(self.data.get("partial_text", ""))

    def copy(self) -> InferenceError:
        """The same error for one more generation, with a traceback and data of its own."""
        return type(self)(self.message, self.code, self.data)


class RequestError(InferenceError):
    """What was asked for is wrong, or not there. The message names the field by its path."""

    codes = ("refused", -32700, -32600, -32601, -32602, -32004)


class GenerationError(InferenceError):
    """A generation has failed. Has its text so far as `partial_text`."""


class UpstreamError(GenerationError):
    """The provider refused or failed: `data` has `status`, `type`, `retryable`, `provider_message`."""

    codes = (-32000,)


class RateLimitedError(GenerationError):
    """The provider has had too many requests; see `retry_after`."""

    codes = (-32001,)

    @property
    def retryable(self) -> bool:
        return True


class UpstreamTimeoutError(GenerationError):
    """The provider was too slow: `data["phase"]` is `connect`, `first_token`, `token` or `task`."""

    codes = (-32002,)

    @property
    def retryable(self) -> bool:
        return bool(self.data.get("phase") == "connect")


class ToolTimeoutError(GenerationError):
    """The results of tools did not come in time: `data["outstanding"]` has the ids of the calls."""

    codes = (-32003,)


class BrokenStreamError(GenerationError):
    """The provider's stream broke off, or made no sense."""

    codes = (-32006,)


class TooManyRoundsError(GenerationError):
    """The model went on calling tools until the server's limit on rounds."""

    codes = (-32007,)


class OverloadedError(InferenceError):
    """The server is full or stopping; see `retry_after`."""

    codes = (-32005,)

    @property
    def retryable(self) -> bool:
        return True


class DefectError(InferenceError):
    """The server has a defect, or what answers at the URL is no such server."""

    codes = ("defect", -32603)


class ConnectionLostError(InferenceError):
    """There was no connection for too long, or a generation cannot be settled because the server keeps too little."""

    codes: ClassVar[tuple[int | str, ...]] = (UNSETTLED,)

    @property
    def retryable(self) -> bool:
        return self.code in (UNSETTLED, "unreachable", "session_gone")


class UnreachableError(ConnectionLostError):
    """No connection can be made."""

    codes = ("unreachable",)


class UnauthorizedError(ConnectionLostError):
    """The token is missing or not in force."""

    codes = ("unauthorized",)


class SessionGoneError(ConnectionLostError):
    """The server no longer has the session: it has expired, or the server was started anew."""

    codes = ("session_gone",)


class TakenOverError(ConnectionLostError):
    """A newer connection has the session."""

    codes = ("taken_over",)


class TooBigError(ConnectionLostError):
    """The server takes no message of this size."""

    codes = ("too_big",)


class ClosedError(ConnectionLostError):
    """The session was closed here."""

    codes = ("closed",)


def _tree(kind: type[InferenceError]) -> list[type[InferenceError]]:
    return [kind, *(found for child in kind.__subclasses__() for found in _tree(child))]


_CLASSES = {code: kind for kind in _tree(InferenceError) for code in kind.codes}


def from_wire(error: Mapping[str, Any]) -> InferenceError:
    """The exception for an error object of JSON-RPC; a plain `InferenceError` where the code is not known."""
    code = error.get("code")
    kind = _CLASSES.get(code, InferenceError) if isinstance(code, int | str) else InferenceError
    return kind(str(error.get("message", "The server gives no reason")), code, error.get("data"))


def from_status(status: int, error: Mapping[str, Any], found: str, *, of_session: bool) -> InferenceError:
    """The exception for an HTTP answer with an error in its body, about a session or about none yet.

    ``found`` is what was found where the server should be, for people.
    """
    message = str(error.get("message", found))
    data = {**(error.get("data") or {}), "status": status}
    if status == 401:
        return UnauthorizedError(message, data=data)
    if status == 404 and of_session:
        return SessionGoneError(message, data=data)
    if "code" in error and status not in (404, 405):
        return from_wire({"message": message, "code": error["code"], "data": data})
    is_of_proxy = status in (502, 503, 504)
    return UnreachableError(found, data=data) if is_of_proxy else DefectError(found, data=data)


def leaves(error: BaseException) -> Iterator[BaseException]:
    """What is in a group, also in groups within it; the exception itself where it is no group."""
    if not isinstance(error, BaseExceptionGroup):
        yield error
        return
    for each in error.exceptions:
        yield from leaves(each)


def described(error: BaseException) -> str:
    """What was raised, for the model."""
    said = ((type(leaf).__name__, _text_of(leaf)) for leaf in leaves(error))
    return "; ".join(": ".join(filter(None, words)) for words in said)


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # of a class of the application
        return ""


def out_of_group(error: BaseException) -> BaseException:
    """What a group says: what ends the program, or else the only exception in it, or else the group."""
    inner = list(leaves(error))
    fatal = [leaf for leaf in inner if isinstance(leaf, SystemExit | KeyboardInterrupt)]
    return fatal[0] if fatal else inner[0] if len(inner) == 1 else error


class ArgumentsError(Exception):
    """The model's arguments do not fit the function; the message says how, for the model."""
