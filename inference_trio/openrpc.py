"""The OpenRPC document of the WebSocket methods (OpenRPC specification 1.3), made from the types that decode them.

OpenRPC describes what a client may call. What the server sends on its own stands under `x-notifications`, in the
same form.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import msgspec
from msgspec import Struct

from . import __version__, errors
from .chat import JsonObject, Params
from .protocol import METHODS, NOTIFICATIONS, Accepted, Cancelled, Notification, Started

_RESULTS: dict[str, type[Struct]] = {"generate": Started, "tool_result": Accepted, "cancel": Cancelled}
_REF = "#/components/schemas/{name}"


@functools.cache
def document() -> JsonObject:
    """The document; it never changes while the server runs, and must not be changed."""
    types = [*METHODS.values(), *_RESULTS.values(), *NOTIFICATIONS]
    _, schemas = msgspec.json.schema_components(types, ref_template=_REF)
    return {
        "openrpc": "1.3.2",
        "info": {"title": "inference_trio", "version": __version__, "license": {"name": "MIT"}},
        "methods": [_method(name, params, schemas) for name, params in METHODS.items()],
        "x-notifications": [_notification(kind, schemas) for kind in NOTIFICATIONS],
        "components": {"schemas": schemas, "errors": _errors()},
    }


def _method(name: str, params: type[Params], schemas: dict[str, Any]) -> JsonObject:
    described: JsonObject = {
        "name": name,
        "summary": inspect.getdoc(params),
        "paramStructure": "by-name",
        "params": _descriptors(schemas[params.__name__]),
        "errors": [{"$ref": f"#/components/errors/{name}"} for name in _errors()],
    }
    result = _RESULTS.get(name)
    schema = {"$ref": _REF.format(name=result.__name__)} if result else {"type": "object"}
    return described | {"result": {"name": result.__name__ if result else "OpenRPC document", "schema": schema}}


def _notification(kind: type[Notification], schemas: dict[str, Any]) -> JsonObject:
    session: JsonObject = {"name": "session_id", "required": True, "schema": {"type": "string"}}
    fields = _descriptors(schemas[kind.__name__])
    numbered = any(field["name"] == "task_id" for field in fields)
    seq = [{"name": "seq", "required": True, "schema": {"type": "integer", "minimum": 1}}] if numbered else []
    return {
        "name": kind.method,
        "summary": inspect.getdoc(kind),
        "paramStructure": "by-name",
        "params": [session, *fields, *seq],
    }


def _descriptors(schema: JsonObject) -> list[JsonObject]:
    return [
        {"name": name, "required": name in schema["required"], "schema": field}
        for name, field in schema["properties"].items()
    ]


def _errors() -> dict[str, JsonObject]:
    return {
        kind.__name__.removesuffix("Error"): {"code": kind.code, "message": (inspect.getdoc(kind) or "").split("\n")[0]}
        for kind in errors.InferenceError.__subclasses__()
    }
