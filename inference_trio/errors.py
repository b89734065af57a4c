"""Every error this server reports, each class with its JSON-RPC code.

Codes from -32700 to -32600 are those of the JSON-RPC 2.0 specification, section 5.1; codes from -32000
on are ours and stand in the protocol's table of error codes. A message is for a person to read and
never carries a key, a stack trace or a path of the server.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar


class ConfigurationError(Exception):
    """The settings are wrong or incomplete. The message is one line that says what to set."""


class InferenceError(Exception):
    """An error with a place on the wire.

    ``data`` holds what a program can act on; its keys per class are those of the protocol.
    """

    code: ClassVar[int]

    def __init__(self, message: str, **data: Any) -> None:
        super().__init__(message)
        self.message = message
        self.data = data

    @property
    def kind(self) -> str:
        """The class as a word such as ``rate_limited``: one for each code of the table."""
        return re.sub("(?<=[a-z])(?=[A-Z])", "_", type(self).__name__.removesuffix("Error")).lower()

    @property
    def retryable(self) -> bool:
        """Whether the same request may succeed when it is sent again."""
        return bool(self.data.get("retryable", False))

    def to_wire(self) -> dict[str, Any]:
        """The error object of JSON-RPC 2.0, section 5.1: ``code``, ``message`` and any ``data``."""
        wire: dict[str, Any] = {"code": self.code, "message": self.message}
        if self.data:
            wire["data"] = self.data
        return wire


class ParseError(InferenceError):
    """What came is not JSON."""

    code = -32700


class InvalidRequestError(InferenceError):
    """What came is JSON but not a JSON-RPC 2.0 request."""

    code = -32600


class NoSuchSessionError(InvalidRequestError):
    """The session is unknown or has expired."""


class MethodNotFoundError(InferenceError):
    """There is no method of this name."""

    code = -32601


class InvalidParamsError(InferenceError):
    """The parameters do not have the method's shape; the message names the field by its path."""

    code = -32602


class InternalError(InferenceError):
    """A defect of the server. What happened is in its log, not in the message."""

    code = -32603

    def __init__(self) -> None:
        super().__init__("The server has a defect; its log has the details")


class UpstreamError(InferenceError):
    """The provider refused or failed: ``status``, ``type``, ``retryable``, ``provider_message``.

    Where the provider said how long to wait, ``retry_after`` has it (seconds).
    """

    code = -32000


class RateLimitedError(InferenceError):
    """The provider's 429 outlasted the retries, or asked to wait too long: ``retry_after`` (seconds)."""

    code = -32001

    @property
    def retryable(self) -> bool:
        return True


class UpstreamTimeoutError(InferenceError):
    """The provider was too slow: ``phase`` is ``connect``, ``first_token``, ``token`` or ``task``."""

    code = -32002

    @property
    def retryable(self) -> bool:
        return bool(self.data["phase"] == "connect")


class ToolTimeoutError(InferenceError):
    """Tool results did not come in time: ``outstanding`` (call ids)."""

    code = -32003


class NoSuchTaskError(InferenceError):
    """The task is unknown, has ended, or is not in a state for this call."""

    code = -32004


class OverloadedError(InferenceError):
    """Too many tasks or sessions, or the server is stopping: ``retry_after`` (seconds)."""

    code = -32005


class BrokenStreamError(InferenceError):
    """The upstream stream ended without a finish reason, broke off, or carried what is not valid."""

    code = -32006


class TooManyRoundsError(InferenceError):
    """The model went on calling tools until the limit on rounds."""

    code = -32007
