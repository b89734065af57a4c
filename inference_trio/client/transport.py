"""HTTP and WebSocket: how the client reaches the server, and what it makes of a refusal.

httpx2 is imported where a server is reached: to import it takes almost as long as all the rest of the client.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, urlsplit

import attrs
import trio
from trio_websocket import ConnectionRejected, WebSocketConnection, wrap_client_stream
from wsproto.utilities import LocalProtocolError

from .errors import InferenceError, UnreachableError, from_status
from .events import JsonObject

if TYPE_CHECKING:
    import httpx2

HANDSHAKE_LIMIT = 10.0
"""Seconds for a request over HTTP, and for connecting a WebSocket."""

CLOSING_LIMIT = 1.0
"""Seconds for the WebSocket's closing handshake."""

LARGEST_MESSAGE = 2**26
"""Bytes of a message from the server; the end of a task has all its text."""

_SCHEMES = {"http": "http", "https": "https", "ws": "http", "wss": "https"}


@attrs.frozen
class Transport:
    """Where the server is, and how to get in."""

    url: str
    """Of HTTP, with a slash at its end."""
    http: httpx2.AsyncClient
    ssl_context: ssl.SSLContext | None
    token: str | None

    async def create_session(self, tools: Sequence[JsonObject]) -> str:
        """The id of a new session. Raises InferenceError."""
        import httpx2

        try:
            response = await self.http.post(f"{self.url}create_session", json={"tools": tools})
        except httpx2.TransportError as error:
            raise self._unreachable(error) from error
        answer = _object(response.content)
        if response.status_code == 200 and "session_id" in answer:
            return str(answer["session_id"])
        found = self._found(response.status_code, response.headers.items())
        raise from_status(response.status_code, _error_in(answer), found, of_session=False)

    @asynccontextmanager
    async def open_socket(self, session_id: str, after: int) -> AsyncIterator[WebSocketConnection]:
        """A WebSocket of the session, on which comes first what came after this number. Raises InferenceError."""
        url = urlsplit(f"{self.url}ws/{session_id}?after={after}")
        line = await self._open_line(url)
        failures: list[Exception] = []
        try:
            async with trio.open_nursery() as nursery:
                socket = await self._shake_hands(nursery, line, url)
                try:
                    yield socket
                finally:
                    with trio.move_on_after(CLOSING_LIMIT):
                        await socket.aclose()
                    nursery.cancel_scope.cancel()
        except* (ConnectionRejected, UnreachableError) as group:
            failures.extend(group.exceptions)
        except* LocalProtocolError:
            pass  # a ping has crossed our close, and trio-websocket's reader has tried to answer it
        finally:
            await trio.aclose_forcefully(line)
        for failure in failures:
            raise self._refusal(failure) if isinstance(failure, ConnectionRejected) else failure

    async def _open_line(self, url: SplitResult) -> _Line:
        host, port = url.hostname or "", url.port or (443 if self.ssl_context else 80)
        try:
            with trio.fail_after(HANDSHAKE_LIMIT):
                stream = await trio.open_tcp_stream(host, port)
                if self.ssl_context is None:
                    return _Line(stream)
                encrypted = trio.SSLStream(stream, self.ssl_context, server_hostname=host, https_compatible=True)
                await encrypted.do_handshake()
                return _Line(encrypted)
        except (OSError, trio.BrokenResourceError, trio.TooSlowError) as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: BaseException) -> UnreachableError:
        reason = error
        while not str(reason) and (deeper := reason.__cause__ or reason.__context__):
            reason = deeper
        return UnreachableError(f"Cannot reach {self.url}: {reason}")

    def _refusal(self, rejected: ConnectionRejected) -> InferenceError:
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in rejected.headers or ()]
        found = self._found(rejected.status_code, headers)
        return from_status(rejected.status_code, _error_in(_object(rejected.body or b"")), found, of_session=True)

    def _found(self, status: int, headers: Iterable[tuple[str, str]]) -> str:
        """What answers in place of an inference server."""
        fields = {name.lower(): value for name, value in headers}
        to = f" to {fields['location']}" if "location" in fields else ""
        return f"No inference server at {self.url}: HTTP {status}{to}, {fields.get('content-type', 'no content type')}"

    async def _shake_hands(self, nursery: trio.Nursery, line: _Line, url: SplitResult) -> WebSocketConnection:
        headers = [(b"Authorization", f"Bearer {self.token}".encode())] if self.token else []
        with trio.CancelScope(deadline=trio.current_time() + HANDSHAKE_LIMIT) as scope:
            line.on_end = scope.cancel
            return await wrap_client_stream(
                nursery,
                line,  # type: ignore[arg-type]  # any stream will do
                url.netloc.rpartition("@")[2],
                f"{url.path}?{url.query}",
                extra_headers=headers,
                max_message_size=LARGEST_MESSAGE,
                receive_buffer_size=None,
            )
        raise UnreachableError(f"The connection to {self.url} was lost while it was made")


@attrs.define(eq=False)
class _Line(trio.abc.Stream):
    """A stream that tells when it ends: trio-websocket would wait for the rest of a handshake for ever."""

    _stream: trio.abc.Stream
    on_end: Callable[[], None] = attrs.field(default=lambda: None)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        try:
            await self._stream.send_all(data)
        except trio.BrokenResourceError:
            self.on_end()
            raise

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        data: bytes | bytearray = b""
        try:
            data = await self._stream.receive_some(max_bytes)
        finally:
            if not data:
                self.on_end()
        return data

    async def aclose(self) -> None:
        await self._stream.aclose()


@asynccontextmanager
async def open_transport(url: str, token: str | None, ssl_context: ssl.SSLContext | None) -> AsyncIterator[Transport]:
    """Raises ValueError for a URL that is none."""
    import httpx2

    parts = urlsplit(url)
    if parts.scheme not in _SCHEMES or not parts.hostname or parts.port == 0:
        raise ValueError(f"Expected a URL like http://127.0.0.1:8000 or https://…, got {url!r}")
    scheme = _SCHEMES[parts.scheme]
    at = f"{scheme}://{parts.netloc}{parts.path.rstrip('/')}/"
    context = (ssl_context or ssl.create_default_context()) if scheme == "https" else None
    check_token(token or "")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with httpx2.AsyncClient(
        headers=headers,
        verify=context or False,
        timeout=HANDSHAKE_LIMIT,
        limits=httpx2.Limits(max_keepalive_connections=0),  # sessions are created seldom
        trust_env=False,  # the WebSocket would not go through a proxy of the environment
    ) as http:
        yield Transport(at, http, context, token)


def check_token(token: str) -> None:
    """Raises ValueError for one that no server can have."""
    if not (token.isascii() and token.isprintable()):
        raise ValueError("Expected a token of printable ASCII characters, without the end of a line")


def _object(body: bytes) -> JsonObject:
    """The JSON object in a body, an empty one where it has none."""
    try:
        value = json.loads(body)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _error_in(answer: JsonObject) -> JsonObject:
    error: Any = answer.get("error")
    return error if isinstance(error, dict) else {}
