"""ChatOpenAI blocks: a thread for the call, Trio for the stream.

Whatever may take long or block happens in a worker thread: converting the conversation, building the request, the
client's own work. Only, the thread does not do its own HTTP: `TrioTransport` hands each request to Trio, where a cancel
scope reaches it wherever it stands: connecting, or waiting for the headers.

Once the answer has begun nothing blocks any more but reading. So the iterator over it is taken out of the thread,
suspended as it is, and Trio goes on with it::

    worker thread                               Trio task
    iterator = iterate()
    next(iterator)
      └▶ handle_request ── from_thread.run ───▶ connect, send, receive the headers
      ◀───────────────────────────────────────
      └▶ yields None: nothing has come yet
    gives the iterator back ──────────────────▶ loop: read ─▶ bytes ─▶ next(iterator) ─▶ items ─▶ receive
                                                        until it yields None again

An iterator that never yields ``None`` is iterated to its end in the thread: those of other providers, which do their
own HTTP, and those that people observe by callbacks, which may block. There a cancel takes effect when the thread next
turns to Trio, with a request, a read or an item.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from contextvars import ContextVar
from typing import Any, Generic, TypeVar, cast

import attrs
import httpx2
import trio

T = TypeVar("T")

END_OF_BODY_GRACE = 0.05
"""Seconds for a body to end once nobody wants more of it. ``[DONE]`` ends the answer, but only a connection whose body
was read to its end can be used again, and the few bytes that end it may come a little later. Until then the end of the
answer is not told, hence so few. A server that is behind loses nothing: what has come is read before time is up."""

CLOSE_TIMEOUT = 1.0
"""Seconds for closing a response, which a cancel does not cut short. HTTP/1.1 waits for nothing then."""

_BODY = "inference_trio.body"  # among a response's extensions


async def stream_in_thread(
    iterate: Callable[[], Iterator[T | None]],
    receive: Callable[[T], Awaitable[None]],
    *,
    limiter: trio.CapacityLimiter,
) -> None:
    """Await ``receive`` with each item of ``iterate()``; the iterator goes on when that has returned.

    The iterator begins in a worker thread. It may yield ``None`` when it would have to wait for more of `reads_of` a
    response; from then on it must neither block nor make a request, and runs in this task.

    Raises, as it is, what either of them raises. It can be cancelled at any moment; when it returns, the thread has
    ended and all responses are closed.
    """
    async with AsyncExitStack() as responses:
        stream = _Stream(receive, responses)
        token = _current.set(stream)
        try:
            iterator = await trio.to_thread.run_sync(stream.begin, iterate, limiter=limiter)
        finally:
            _current.reset(token)
        await stream.go_on(iterator)


def reads_of(response: httpx2.Response) -> Iterator[bytes]:
    """The body in the pieces in which it comes, decoded; nothing (``b""``) where one would have to wait for more.

    Where that is not to be had, because the body is compressed or is no `TrioTransport`'s, this waits.
    """
    body = response.extensions.get(_BODY)
    if body is None or "content-encoding" in response.headers:
        return response.iter_bytes()
    return cast("_Body", body).pull()


class TrioTransport(httpx2.BaseTransport):
    """A blocking transport whose requests are done by Trio, through ``transport``, which its owner closes.

    It works in the threads of `stream_in_thread`.
    """

    def __init__(self, transport: httpx2.AsyncBaseTransport) -> None:
        self._transport = transport

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """Raises what ``transport`` raises, `trio.Cancelled`, or `RuntimeError` outside of `stream_in_thread`."""
        stream = _current.get(None)
        if stream is None:
            raise RuntimeError("TrioTransport can only be used in a thread of stream_in_thread()")
        request.read()  # leaves a body of bytes, which both kinds of transport can send
        return trio.from_thread.run(stream.send, self._transport, request)


@attrs.define(eq=False)
class _Stream(Generic[T]):
    """One call of `stream_in_thread`."""

    _receive: Callable[[T], Awaitable[None]]
    _responses: AsyncExitStack
    _body: _Body | None = None
    """Of the latest response."""

    def begin(self, iterate: Callable[[], Iterator[T | None]]) -> Iterator[T | None]:
        """In the thread: the iterator, once it yields ``None`` or has ended."""
        iterator = iterate()
        try:
            for item in iterator:
                if item is None:
                    break
                trio.from_thread.run(self._receive, item)
        except BaseException:
            _close(iterator)
            raise
        return iterator

    async def send(self, transport: httpx2.AsyncBaseTransport, request: httpx2.Request) -> httpx2.Response:
        response = await transport.handle_async_request(request)
        self._body = body = _Body(cast("httpx2.AsyncByteStream", response.stream))
        self._responses.push_async_callback(body.aclose)
        return httpx2.Response(
            response.status_code,
            headers=response.headers,
            stream=body,
            extensions={**response.extensions, _BODY: body},
        )

    async def go_on(self, iterator: Iterator[T | None]) -> None:
        """In the Trio task: the rest of the iterator."""
        try:
            while True:
                for item in iterator:
                    if item is None:
                        break
                    await self._receive(item)
                else:
                    return
                if self._body is None:
                    raise RuntimeError("The iterator waits for a response, and has made no request")
                await self._body.fill()
        finally:
            _close(iterator)


_current: ContextVar[_Stream[Any]] = ContextVar("_current")


def _close(iterator: Iterator[Any]) -> None:
    getattr(iterator, "close", lambda: None)()  # a generator has one, another iterator need not


class _Body(httpx2.SyncByteStream):
    """The body of a response. Closing it is left to `stream_in_thread`, whoever else thinks of it."""

    def __init__(self, stream: httpx2.AsyncByteStream) -> None:
        self._stream = stream
        self._reads = aiter(stream)
        self._read: bytes | None = b""  # what `fill` got; ``None`` at the end
        self._failure: Exception | None = None

    def __iter__(self) -> Iterator[bytes]:
        """In the thread."""
        while (data := trio.from_thread.run(self._next)) is not None:
            yield data

    def pull(self) -> Iterator[bytes]:
        """What `fill` has got, and nothing (``b""``) until it is called again."""
        while self._read is not None:
            read, self._read = self._read, b""
            yield read
            if self._failure is not None:
                raise self._failure

    async def fill(self) -> None:
        """Wait for the next read. What goes wrong is raised by `pull`, where the clients look for it."""
        try:
            self._read = await self._next()
        except Exception as error:
            self._failure = error

    async def _next(self) -> bytes | None:
        return await anext(self._reads, None)

    async def aclose(self) -> None:
        try:
            with trio.move_on_after(END_OF_BODY_GRACE):
                async for _ in self._reads:
                    pass
        except httpx2.HTTPError:
            pass  # nobody wants it any more
        finally:
            with trio.move_on_after(CLOSE_TIMEOUT, shield=True):
                await self._stream.aclose()
