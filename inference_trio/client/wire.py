"""Values of the application as JSON."""

from __future__ import annotations

from typing import Any

import msgspec

from .events import JsonObject


def as_json(value: Any) -> msgspec.Raw:
    """A value as it is now, whatever becomes of it: also dataclasses, pydantic's models, dates and the like.

    Raises TypeError for what has no JSON.
    """
    from pydantic_core import to_json  # not with the module: it takes a while to import

    try:
        return msgspec.Raw(to_json(value, inf_nan_mode="null"))
    except (ValueError, TypeError) as error:
        raise TypeError(f"It cannot be written as JSON: {error}") from error


LONGEST_REASON = 10_000
"""Characters of why a tool has failed: all that a model can use, and little enough for any server."""


def reason(message: str) -> str:
    """Why a tool has failed, as it can be sent."""
    return message[:LONGEST_REASON].encode(errors="replace").decode()


def failure(message: str) -> JsonObject:
    """The result of a tool that has failed."""
    return {"is_error": True, "error_message": reason(message)}
