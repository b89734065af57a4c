"""JSON-RPC 2.0: frames in, typed calls out; answers and notifications in, frames out.

A frame is decoded in two steps. First the JSON and the envelope of each request, keeping as much as can be
known: a request with an id gets its answer whatever is wrong with the rest. Then the parameters, into the
method's type. Rules come from the JSON-RPC 2.0 specification unless another source is named.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any, TypeVar

import attrs
import msgspec

from .chat import JsonObject, Params
from .errors import (
    InferenceError,
    InvalidParamsError,
    InvalidRequestError,
    MethodNotFoundError,
    ParseError,
)
from .protocol import METHODS, Kept, Notification

MAX_DEPTH = 100
"""Nesting of arrays and objects in a frame; far below what the JSON and HTTP libraries can still write."""

MAX_BATCH = 100
"""Requests in one batch."""

MAX_ID_CHARACTERS = 1024
"""Of a request's id, which its answer repeats: answers wait for clients that do not read."""

MAX_CONTAINERS = 100_000
"""Arrays and objects in a frame. Small ones take a hundred times their bytes, and the time to make them."""

T = TypeVar("T")

RequestId = str | int | float | None


@attrs.frozen
class Call:
    """A request (``expects_answer``) or a notification with valid parameters."""

    id: RequestId
    expects_answer: bool
    params: Params
    conversation: list[JsonObject]
    """The messages of a `Generate`, as they came."""
    size: int = attrs.field(default=0, eq=False, repr=False)
    """Bytes of the frame, or of this call's share of it."""


@attrs.frozen
class Invalid:
    """A request that is to be answered with an error."""

    id: RequestId
    error: InferenceError


@attrs.frozen
class Frame:
    """What one frame holds, less invalid notifications: they are never answered (section 4.1)."""

    is_batch: bool
    items: tuple[Call | Invalid, ...]


def decode(data: str | bytes) -> Frame:
    """What the frame asks for. Never raises: what cannot be read is an `Invalid` with the id ``None``."""
    try:
        value = loads(data)
    except ParseError as error:
        return Frame(is_batch=False, items=(Invalid(None, error),))
    if not isinstance(value, list):
        return Frame(is_batch=False, items=tuple(_decode_request(value, len(data))))
    if not 1 <= len(value) <= MAX_BATCH:
        size_error = InvalidRequestError(f"Expected a batch of 1 to {MAX_BATCH} requests, got {len(value)}")
        return Frame(is_batch=False, items=(Invalid(None, size_error),))
    share = len(data) // len(value)
    return Frame(is_batch=True, items=tuple(item for request in value for item in _decode_request(request, share)))


def loads(data: str | bytes) -> Any:
    """JSON as RFC 8259 has it: no NaN, no lone surrogates; with at most `MAX_CONTAINERS`, `MAX_DEPTH` deep.

    Raises ParseError. Integers of any size keep their value; of equal names in an object the last one counts.
    """
    try:
        encoded = data.encode() if isinstance(data, str) else data
        if _has_too_many_containers(encoded):
            raise ParseError(f"Expected JSON of at most {MAX_CONTAINERS} arrays and objects")
        value = msgspec.json.decode(encoded)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise ParseError(f"Expected JSON: {error}") from error
    except RecursionError as error:
        raise ParseError(f"Expected JSON nested at most {MAX_DEPTH} deep") from error
    if _is_deeper_than(value, MAX_DEPTH):
        raise ParseError(f"Expected JSON nested at most {MAX_DEPTH} deep")
    return value


def _has_too_many_containers(data: bytes) -> bool:
    """Counts before anything is made of them; with care, which takes longer, only where strings may hold the marks."""
    if _count_marks(data) <= MAX_CONTAINERS:
        return False
    outside_of_strings = data.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"')[::2]
    return _count_marks(b"".join(outside_of_strings)) > MAX_CONTAINERS


def _count_marks(data: bytes) -> int:
    return data.count(b"{") + data.count(b"[")


def _is_deeper_than(value: Any, depth: int) -> bool:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(depth):
        level = [child for parent in level for child in _containers_in(parent)]
    return bool(level)


def _containers_in(parent: Any) -> Iterator[Any]:
    children = parent.values() if isinstance(parent, dict) else parent
    return (child for child in children if isinstance(child, dict | list))


def _decode_request(value: Any, size: int) -> Iterator[Call | Invalid]:
    request = value if isinstance(value, dict) else {}
    request_id = request.get("id")
    if isinstance(request_id, bool) or not isinstance(request_id, str | int | float | None):
        yield Invalid(None, InvalidRequestError("Expected a string, a number or null - at `id`"))
    elif isinstance(request_id, str) and len(request_id) > MAX_ID_CHARACTERS:
        yield Invalid(None, InvalidRequestError(f"Expected at most {MAX_ID_CHARACTERS} characters - at `id`"))
    elif error := _envelope_error(request):
        yield Invalid(request_id, error)
    else:
        try:
            raw = request.get("params", {})
            params = _decode_params(request["method"], raw)
        except InferenceError as refused:
            if "id" in request:
                yield Invalid(request_id, refused)
        else:
            yield Call(request_id, "id" in request, params, _conversation(raw), size)


def _envelope_error(request: JsonObject) -> InvalidRequestError | None:
    if not request:
        return InvalidRequestError('Expected an object with "jsonrpc", "method" and mostly "params" and "id"')
    if request.get("jsonrpc") != "2.0":
        return InvalidRequestError('Expected "2.0" - at `jsonrpc`')
    if not isinstance(request.get("method"), str):
        return InvalidRequestError("Expected a string - at `method`")
    if not isinstance(request.get("params", {}), dict | list):
        return InvalidRequestError("Expected an object - at `params`")
    return None


def _decode_params(method: str, params: Any) -> Params:
    if method not in METHODS:
        raise MethodNotFoundError(f"There is no method `{method[:64]}`; there are {', '.join(METHODS)}")
    if isinstance(params, list):
        raise InvalidParamsError("Expected an object with named parameters, got an array - at `params`")
    return convert(params, METHODS[method], "params")


def _conversation(raw: JsonObject) -> list[JsonObject]:
    message = [{"role": "user", "content": raw["message"]}] if raw.get("message") else []
    return [*(raw.get("history") or []), *message]


def convert(value: Any, to: type[T], root: str) -> T:
    """The value as the type. Raises InvalidParamsError with the path of the field, from ``root`` on."""
    try:
        return msgspec.convert(value, to)
    except msgspec.ValidationError as error:
        raise InvalidParamsError(_with_path(str(error), root)) from error


_CHOICES = (
    (".role", "system, developer, user, assistant or tool"),
    (r"\.content\[\d+\]\.type|message\[\d+\]\.type", "text, image_url, input_audio, file or refusal"),
    (".type", "function"),
    (".tool_choice", "none, auto, required or an object that names a function"),
)


def _with_path(message: str, root: str) -> str:
    what, found, path = message.rpartition(" - at `$")
    if not found:
        return f"{message} - at `{root}`"
    if what.startswith("Invalid "):
        choices = (choice for ending, choice in _CHOICES if re.search(f"(?:{ending})`$", path))
        what += "".join(f", expected {choice}" for choice in itertools.islice(choices, 1))
    return f"{what} - at `{root}{path}"


def response(request_id: RequestId, result: Any) -> JsonObject:
    return {"jsonrpc": "2.0", "id": request_id, "result": result}


def failure(request_id: RequestId, error: InferenceError) -> JsonObject:
    return {"jsonrpc": "2.0", "id": request_id, "error": error.to_wire()}


def notification(session_id: str, note: Notification | Kept, seq: int | None = None) -> JsonObject:
    """The notification as it goes out; ``seq`` where it belongs to a task."""
    numbered = {} if seq is None else {"seq": seq}
    fields = note.fields if isinstance(note, Kept) else msgspec.structs.asdict(note)
    params = {"session_id": session_id, **fields, **numbered}
    return {"jsonrpc": "2.0", "method": note.method, "params": params}


def encode(value: Any) -> str:
    """JSON text of a frame. Text in it must be free of lone surrogates: the model's side sees to that."""
    return msgspec.json.encode(value).decode()
