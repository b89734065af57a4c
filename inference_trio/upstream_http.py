"""HTTP/1.1 to providers, on Trio and h11, made for many answers that come in small pieces for a long time.

httpx2's own transport gives every piece of a body for itself, through half a dozen layers, and looks at all of its
connections for each request and each answer. Here a read gives all that has come, and the connections that wait
for a request lie in a stack.
"""

from __future__ import annotations

import os
import ssl
from collections import defaultdict, deque
from contextlib import suppress
from math import inf
from typing import Any

import attrs
import h11
import httpx2
import trio

from .chunked import ChunkedBody, ChunkError

MAX_READ = 65_536
"""Bytes read from a socket at a time."""

Origin = tuple[str, str, int]
"""Scheme, host and port."""


@attrs.define(eq=False)
class StreamTransport(httpx2.AsyncBaseTransport):
    """Connections to any origins. Of a request's time limits only that of connecting is kept to.

    ``keepalive_expiry``: seconds for which a connection without a request is kept, 0 for not at all.
    """

    keepalive_expiry: float
    _ssl_context: ssl.SSLContext = attrs.field(factory=httpx2.create_ssl_context)
    _idle: dict[Origin, deque[_Connection]] = attrs.field(factory=lambda: defaultdict(deque))

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Raises ConnectTimeout, ConnectError, WriteError, ReadError and RemoteProtocolError of httpx2."""
        origin = _origin_of(request.url)
        connection = self._take_idle(origin) or await self._connect(origin, request)
        try:
            head = await connection.send(request)
        except BaseException:
            connection.close()
            raise
        body = _Body(connection, self._idle[origin] if self.keepalive_expiry else None)
        return httpx2.Response(head.status_code, headers=list(head.headers), stream=body)

    async def aclose(self) -> None:
        """Close the connections that wait for a request."""
        for connections in self._idle.values():
            while connections:
                connections.pop().close()

    def _take_idle(self, origin: Origin) -> _Connection | None:
        """The connection used last, if it is still good; those that have expired are closed."""
        connections, expired = self._idle[origin], trio.current_time() - self.keepalive_expiry
        while connections and connections[0].idle_since < expired:
            connections.popleft().close()
        while connections:
            connection = connections.pop()
            if connection.is_silent():
                return connection
            connection.close()
        return None

    async def _connect(self, origin: Origin, request: httpx2.Request) -> _Connection:
        scheme, host, port = origin
        limit = request.extensions.get("timeout", {}).get("connect")
        try:
            with trio.fail_after(inf if limit is None else limit):
                tcp = await trio.open_tcp_stream(host, port)
                if scheme == "http":
                    return _Connection(tcp, tcp)
                return _Connection(await self._secured(tcp, host), tcp)
        except trio.TooSlowError as error:
            raise httpx2.ConnectTimeout("", request=request) from error
        except (OSError, trio.BrokenResourceError) as error:
            raise httpx2.ConnectError(str(error.__cause__ or error), request=request) from error

    async def _secured(self, tcp: trio.SocketStream, host: str) -> trio.abc.Stream:
        secured = trio.SSLStream(tcp, self._ssl_context, server_hostname=host, https_compatible=True)
        try:
            await secured.do_handshake()
        except BaseException:
            tcp.socket.close()
            raise
        return secured


def _origin_of(url: httpx2.URL) -> Origin:
    return url.scheme, url.raw_host.decode("ascii"), url.port or (443 if url.scheme == "https" else 80)


@attrs.define(eq=False)
class _Connection:
    """One connection, with at most one request at a time. ``_tcp`` is what ``_stream`` runs over."""

    _stream: trio.abc.Stream
    _tcp: trio.SocketStream
    idle_since: float = 0.0
    _http: h11.Connection = attrs.field(factory=lambda: h11.Connection(h11.CLIENT))
    _chunked: ChunkedBody | None = None
    """The body of the answer, where it comes in chunks; h11 has all others."""
    _is_kept: bool = False

    async def send(self, request: httpx2.Request) -> h11.Response:
        """The head of the answer to ``request``, whose body must have been read."""
        self._http = h11.Connection(h11.CLIENT)
        request_line = h11.Request(method=request.method, target=request.url.raw_path, headers=request.headers.raw)
        events = (request_line, h11.Data(data=request.content), h11.EndOfMessage())
        try:
            await self._stream.send_all(b"".join(self._http.send(event) or b"" for event in events))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise httpx2.WriteError(str(error)) from error
        while not isinstance(event := await self._next_event(), h11.Response):
            pass  # an informational one
        headers = dict(event.headers)
        is_chunked = b"transfer-encoding" in headers and event.http_version == b"1.1"  # h11 knows no other coding
        self._chunked = ChunkedBody(self._http.trailing_data[0]) if is_chunked else None
        self._is_kept = b"close" not in headers.get(b"connection", b"").lower()
        return event

    async def read(self) -> bytes:
        """All of the body that has come, waiting for some; nothing at its end."""
        if self._chunked is None:
            return await self._read_other()
        try:
            content = self._chunked.feed(b"")
            while not content and not self._chunked.is_complete:
                data = await self._receive()
                if not data:
                    raise httpx2.RemoteProtocolError("The answer broke off within its body")
                content = self._chunked.feed(data)
        except ChunkError as error:
            raise httpx2.RemoteProtocolError(str(error)) from error
        return content

    async def _read_other(self) -> bytes:
        parts: list[bytes] = []
        if self._http.their_state in (h11.SEND_BODY, h11.ERROR):
            event = await self._next_event()
            with suppress(h11.RemoteProtocolError):  # the next read raises it again
                while isinstance(event, h11.Data):
                    parts.append(event.data)
                    event = self._http.next_event()
        return b"".join(parts)

    async def _next_event(self) -> Any:
        try:
            while (event := self._http.next_event()) is h11.NEED_DATA:
                self._http.receive_data(await self._receive())
        except h11.RemoteProtocolError as error:
            raise httpx2.RemoteProtocolError(str(error)) from error
        return event

    async def _receive(self) -> bytes:
        """What has come, waiting for some; nothing at the end. There hardly ever is any already, so this waits first.

        Raises httpx2.ReadError.
        """
        try:
            if self._stream is self._tcp:
                await trio.lowlevel.wait_readable(self._tcp.socket)
                with suppress(BlockingIOError):
                    return os.read(self._tcp.socket.fileno(), MAX_READ)
            return bytes(await self._stream.receive_some(MAX_READ))
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise httpx2.ReadError(str(error)) from error

    def is_reusable(self) -> bool:
        """Whether another request may be sent: this one and its answer have come to their ends."""
        if self._chunked:
            return self._is_kept and self._chunked.is_complete and not self._chunked.rest
        return self._http.our_state is self._http.their_state is h11.DONE and not self._http.trailing_data[0]

    def is_silent(self) -> bool:
        """Whether nothing has come while nothing was asked for; what may come is the end."""
        return not self._tcp.socket.is_readable()

    def close(self) -> None:
        self._tcp.socket.close()


@attrs.define(eq=False)
class _Body(httpx2.AsyncByteStream):
    """An iterator of its own: there is no generator that could be left suspended."""

    _connection: _Connection
    _idle: deque[_Connection] | None
    """Where the connection goes when the body was read to its end."""

    def __aiter__(self) -> _Body:
        return self

    async def __anext__(self) -> bytes:
        if data := await self._connection.read():
            return data
        raise StopAsyncIteration

    async def aclose(self) -> None:
        if self._idle is not None and self._connection.is_reusable():
            self._connection.idle_since = trio.current_time()
            self._idle.append(self._connection)
            self._idle = None
        else:
            self._connection.close()
