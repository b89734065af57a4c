"""What went wrong at the provider, in our terms: the one place where foreign exceptions become ours.

The exceptions of the clients that LangChain uses are alike, since most are made by one generator: an answer with
an error status has ``status_code``, ``response`` and ``body``. So they are told apart by what they have, and the
clients of other providers need not be imported here.

What a provider says is passed on for people to read, but not as it is: it may show the key, or be a whole page.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterator, Mapping
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2
import msgspec
import openai
from langchain_core.exceptions import ModelConnectionError, ModelTimeoutError

from .errors import (
    BrokenStreamError,
    InferenceError,
    RateLimitedError,
    UpstreamError,
    UpstreamTimeoutError,
)

MAX_PROVIDER_MESSAGE = 2000
"""Characters of a provider's message that are passed on."""

_RETRYABLE_STATUSES = (408, 409)
_REFUSALS = ("invalid_request_error", "authentication_error", "permission_error", "content_filter")
_HIDDEN = "[hidden]"


class ErrorInStreamError(Exception):
    """A provider reported an error where a chunk was expected. ``error`` is what it sent for it."""

    def __init__(self, error: Any) -> None:
        super().__init__("The provider reported an error in its stream")
        self.error = error


def translated(error: Exception, *, has_begun: bool, secrets: Collection[str]) -> Exception:
    """Our exception for what a provider's client raised, or ``error`` itself where it is a defect of ours.

    ``has_begun`` is whether a chunk of the answer had come. None of ``secrets`` is in the messages of what is
    returned. An InferenceError stays as it is.
    """
    if isinstance(error, InferenceError):
        return error
    if isinstance(error, ErrorInStreamError):
        return _reported(error.error, _status_in(error.error), {}, secrets)
    if isinstance(getattr(error, "status_code", None), int):
        return _answered(error, secrets)
    if _any_is(error, _TIMEOUTS):
        return _timed_out(error, has_begun)
    if _any_is(error, _CONNECTION_FAILURES):
        return _disconnected(error, has_begun)
    if isinstance(error, openai.APIError):  # by OpenAI's Responses API, in mid-stream
        return _reported(error.body or error.message, _status_in(error.body), {}, secrets)
    if isinstance(error, ValueError):
        what = "could not convert the conversation or the answer"
        return BrokenStreamError(f"The provider's client {what} ({type(error).__name__})")
    return error


def _answered(error: Any, secrets: Collection[str]) -> InferenceError:
    """For an error status. Some clients use it for errors in the stream of a ``200`` as well."""
    response = getattr(error, "response", None)
    headers = getattr(response, "headers", {})
    status = error.status_code if error.status_code >= 300 else None
    return _reported(getattr(error, "body", None), status, headers, secrets)


def _reported(body: Any, status: int | None, headers: Mapping[str, str], secrets: Collection[str]) -> InferenceError:
    retry_after = _retry_after(headers)
    if status == 429:
        return RateLimitedError("The provider is limiting the rate of requests", retry_after=retry_after)
    details = body.get("error", body) if isinstance(body, dict) else body
    kind = _first_text(details, "type", "code") or (f"http_{status}" if status else "error")
    data: dict[str, Any] = {
        "status": status,
        "type": _shown(kind, secrets)[:100],
        "retryable": _is_retryable(status, kind),
        "provider_message": _shown(_message_in(details), secrets),
    }
    if retry_after is not None:
        data["retry_after"] = retry_after
    said = f"answered with status {status}" if status else "reported an error in its stream"
    return UpstreamError(f"The provider {said}", **data)


def _is_retryable(status: int | None, kind: str) -> bool:
    if status is None:
        return kind not in _REFUSALS
    return status in _RETRYABLE_STATUSES or status >= 500


def _timed_out(error: BaseException, has_begun: bool) -> UpstreamTimeoutError:
    if _any_is(error, ("ConnectTimeout",)):
        return UpstreamTimeoutError("The provider could not be reached in time", phase="connect")
    phase = "token" if has_begun else "first_token"
    return UpstreamTimeoutError("The provider was silent for too long", phase=phase)


def _disconnected(error: BaseException, has_begun: bool) -> InferenceError:
    cause = type(list(_chain(error))[-1]).__name__
    if has_begun:
        return BrokenStreamError(f"The connection to the provider broke in the middle of its answer ({cause})")
    return UpstreamError(
        f"The connection to the provider failed ({cause})",
        status=None,
        type="connection",
        retryable=True,
        provider_message="",
    )


# Telling exceptions apart

# httpx's and those of LangChain's providers by name: neither package need be there.
_TIMEOUTS = (TimeoutError, httpx2.TimeoutException, ModelTimeoutError, "TimeoutException", "APITimeoutError")
_CONNECTION_FAILURES = (
    ConnectionError,
    httpx2.RequestError,
    openai.APIConnectionError,
    ModelConnectionError,
    "RequestError",
    "APIConnectionError",
)


def _any_is(error: BaseException, kinds: tuple[type | str, ...]) -> bool:
    """Whether ``error`` or what it was raised from is of one of these classes, given as such or by name."""
    types = tuple(kind for kind in kinds if isinstance(kind, type))
    names = {kind for kind in kinds if isinstance(kind, str)}
    return any(
        isinstance(link, types) or names.intersection(cls.__name__ for cls in type(link).__mro__)
        for link in _chain(error)
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """``error`` and what it was raised from, outermost first."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__


# What the provider said


def _status_in(error: Any) -> int | None:
    """The HTTP status that some providers give as ``code`` or ``status`` of an error in the stream."""
    for key in ("code", "status", "status_code"):
        code = error.get(key) if isinstance(error, dict) else None
        if isinstance(code, int | str) and re.fullmatch("[3-5][0-9][0-9]", str(code)):
            return int(code)
    return None


def _message_in(details: Any) -> str:
    text = _first_text(details, "message", "detail", "error", "error_message")
    if not text and details:
        text = details if isinstance(details, str) else str(msgspec.json.encode(details), "utf-8", "replace")
    if re.match(r"\s*<", text):
        title = re.search(r"<title[^>]*>([^<]*)", text, re.IGNORECASE)
        return f"An HTML page: {title[1].strip()}" if title else "An HTML page"
    return text


def _first_text(details: Any, *keys: str) -> str:
    values = (details.get(key) for key in keys) if isinstance(details, dict) else ()
    return next((value for value in values if isinstance(value, str) and value), "")


def _shown(text: str, secrets: Collection[str]) -> str:
    """``text`` without the secrets, nor the masked forms in which providers show parts of them."""
    for secret in secrets:
        text = text.replace(secret, _HIDDEN)
    parts = ["***", *(part for secret in secrets if len(secret) >= 16 for part in (secret[:8], secret[-8:]))]
    text = re.sub(r"\S+", lambda word: _HIDDEN if any(part in word[0] for part in parts) else word[0], text)
    return text.encode("utf-8", "replace").decode()[:MAX_PROVIDER_MESSAGE]


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait: ``retry-after-ms`` as OpenAI has it, else ``Retry-After`` (RFC 9110, section 10.2.3)."""
    if milliseconds := _number(headers.get("retry-after-ms")):
        return milliseconds / 1000
    value = headers.get("retry-after")
    seconds = _number(value)
    return seconds if seconds is not None else _seconds_until(value)


def _number(text: str | None) -> float | None:
    return float(text) if text and re.fullmatch(r"\s*[0-9]{1,12}(\.[0-9]{1,12})?\s*", text) else None


def _seconds_until(date: str | None) -> float | None:
    try:
        moment = parsedate_to_datetime(date or "").timestamp()
    except (ValueError, OverflowError, OSError):
        return None
    return max(0.0, moment - time.time())
