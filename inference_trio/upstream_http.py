"""HTTP/1.1 to providers, on Trio and llhttp, made for many answers that come in small pieces for a long time.

httpx2's own transport gives every piece of a body for itself, through half a dozen layers, and looks at all of its
connections for each request and each answer. Here a read gives all that has come, and the connections that wait
for a request lie in a stack. h11 writes the requests; to read with it would cost more than all that is done with what
was read.
"""

from __future__ import annotations

import os
import ssl
import sys
from collections import defaultdict, deque
from contextlib import suppress
from http import HTTPStatus
from math import inf

import attrs
import h11
import httptools
import httpx2
import trio

MAX_READ = 65_536
"""Bytes read from a socket at a time."""

MAX_HEAD = 65_536
"""Bytes of the head of an answer, with those of informational ones before it."""

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
            answer = await connection.send(request)
        except BaseException:
            connection.close()
            raise
        body = _Body(connection, self._idle[origin] if self.keepalive_expiry else None)
        return httpx2.Response(answer.status, headers=answer.headers, stream=body)

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


class _Answer:
    """What llhttp makes of the bytes of an answer. Informational ones before it are passed over.

    ``status`` is 0 until the head is complete.
    """

    def __init__(self) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.is_complete = False
        self.leaves_open = False
        """Once it is complete, whether another one may follow on the connection."""
        self._content: list[bytes] = []
        self._failure: Exception | None = None
        self._head_size = 0
        self._parser = httptools.HttpResponseParser(self)
        self._parser.set_dangerous_leniencies(  # there are servers that need them, and nobody to be smuggled past
            lenient_chunked_length=True, lenient_optional_cr_before_lf=True, lenient_spaces_after_chunk_size=True
        )

    def feed(self, data: bytes) -> None:
        """Take what has come, or nothing for the end of the connection. `take` raises what is wrong with it."""
        try:
            if data:
                self._parser.feed_data(data)
            elif not self.is_complete:
                self._end()
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._failure, self.leaves_open = error, False
        if not self.status:
            self._head_size += len(data)
            if self._head_size >= MAX_HEAD:
                self._failure = ValueError("The head of the answer is too large")

    def take(self) -> bytes:
        """The content that has come since. Raises httpx2.RemoteProtocolError, after what was good before."""
        content, self._content = b"".join(self._content), []
        if self._failure and not content and not self.is_complete:
            raise httpx2.RemoteProtocolError(str(self._failure)) from self._failure
        return content

    def _end(self) -> None:
        names = {name.lower() for name, _ in self.headers}
        if not self.status or names & {b"content-length", b"transfer-encoding"}:
            raise httptools.HttpParserError("The answer broke off")
        self.is_complete = True

    # What llhttp calls

    def on_message_begin(self) -> None:
        self.leaves_open = False  # nothing but one answer was asked for

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.status:  # else it comes after a body
            self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._content.append(body)

    def on_message_complete(self) -> None:
        if self.status < HTTPStatus.OK:
            self.status, self.headers = 0, []
        else:
            self.is_complete, self.leaves_open = True, self._parser.should_keep_alive()


@attrs.define(eq=False)
class _Connection:
    """One connection, with at most one request at a time. ``_tcp`` is what ``_stream`` runs over."""

    _stream: trio.abc.Stream
    _tcp: trio.SocketStream
    idle_since: float = 0.0
    _answer: _Answer = attrs.field(init=False)

    async def send(self, request: httpx2.Request) -> _Answer:
        """The answer to ``request``, whose body must have been read; of the answer, the head has come."""
        self._answer = _Answer()
        try:
            await self._stream.send_all(_bytes_of(request))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise httpx2.WriteError(str(error)) from error
        while not self._answer.status:
            self._answer.feed(await self._receive())
            if not self._answer.status:
                self._answer.take()
        return self._answer

    async def read(self) -> bytes:
        """All of the body that has come, waiting for some; nothing at its end."""
        while not (content := self._answer.take()) and not self._answer.is_complete:
            self._answer.feed(await self._receive())
        return content

    async def _receive(self) -> bytes:
        """What has come, waiting for some; nothing at the end. There hardly ever is any already, so this waits first.

        Raises httpx2.ReadError.
        """
        try:
            if self._stream is self._tcp and sys.platform != "win32":  # where a socket is no file
                await trio.lowlevel.wait_readable(self._tcp.socket)
                with suppress(BlockingIOError):
                    return os.read(self._tcp.socket.fileno(), MAX_READ)
            return bytes(await self._stream.receive_some(MAX_READ))
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise httpx2.ReadError(str(error)) from error

    def is_reusable(self) -> bool:
        """Whether another request may be sent: this one and its answer have come to their ends."""
        return self._answer.is_complete and self._answer.leaves_open

    def is_silent(self) -> bool:
        """Whether nothing has come while nothing was asked for; what may come is the end."""
        return not self._tcp.socket.is_readable()

    def close(self) -> None:
        self._tcp.socket.close()


def _bytes_of(request: httpx2.Request) -> bytes:
    http = h11.Connection(h11.CLIENT)
    head = h11.Request(method=request.method, target=request.url.raw_path, headers=request.headers.raw)
    return b"".join(http.send(event) or b"" for event in (head, h11.Data(data=request.content), h11.EndOfMessage()))


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
