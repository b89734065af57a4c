"""The playground: a page to try the server out, and the JavaScript client that it is built on.

The files in ``web/`` are read once and are all that can be asked for: a path is looked up, never opened. They are the
same for everybody and need no token; what the page then does needs one like everything else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable

import attrs
from quart import Response, request
from quart_trio import QuartTrio
from werkzeug.exceptions import NotFound

from .jsonrpc import encode
from .settings import Settings

PAGE = "index.html"

CONTENT_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "ts": "text/plain; charset=utf-8",
    "txt": "text/plain; charset=utf-8",
}


@attrs.frozen
class File:
    content_type: str
    content: bytes

    @property
    def etag(self) -> str:
        return hashlib.sha256(self.content).hexdigest()[:32]


def register(app: QuartTrio, settings: Settings) -> None:
    """Adds ``GET /``, ``GET /web/<file>`` and ``GET /playground.json``."""
    there = dict(_files(files(__package__).joinpath("web")))
    about = encode(description(settings))

    async def index() -> Response:
        return await _answer(there, PAGE)

    async def file(path: str) -> Response:
        return await _answer(there, path)

    async def playground() -> Response:
        return Response(about, content_type="application/json")

    app.get("/")(index)
    app.get("/web/<path:path>")(file)
    app.get("/playground.json")(playground)


def description(settings: Settings) -> dict[str, object]:
    """What the page says about the server: which models answer, and whether a token is asked for."""
    return {
        "model": settings.model_name,
        "models": sorted({settings.model_name, *settings.allowed_models}),
        "provider": settings.provider,
        "auth": bool(settings.auth_tokens),
    }


async def _answer(there: Mapping[str, File], path: str) -> Response:
    file = there.get(path)
    if file is None:
        raise NotFound("There is no such file")
    response = Response(file.content, content_type=file.content_type, headers={"Cache-Control": "no-cache"})
    response.set_etag(file.etag)
    await response.make_conditional(request)
    return response


def _files(folder: Traversable, prefix: str = "") -> Iterator[tuple[str, File]]:
    """The files below a folder by their paths, as far as they are of a type that is served."""
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _files(entry, f"{prefix}{entry.name}/")
        elif content_type := CONTENT_TYPES.get(entry.name.rpartition(".")[2]):
            yield prefix + entry.name, File(content_type, entry.read_bytes())
