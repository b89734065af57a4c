"""Blocking iterators in worker threads, while Trio does their network I/O.

LangChain's clients block: they send a request and iterate over its response. Here such an iterator runs in a
worker thread, but no thread ever touches a socket. Its HTTP transport hands each request back to Trio, where a
task reads the response; the thread only turns bytes into items. So a cancel scope reaches a request wherever
it stands: connecting, waiting for the headers, or silent in the middle of its body.

Two streams run between Trio and a thread. Each is bounded, so each end may have to wait for the other::

            Trio                                         worker thread
                       --- bytes: _chunks, _fed --->
      _Body.read                                         _Body.__iter__    (inside httpx2, openai, langchain)
                       <-- room: _taken, _wake -----
                                                               |
                       <-- items: _items, _wake ----           v
      _Stream.deliver                                    _Stream._put
                       --- room: _room ------------>

There is no lock. Each field is written by one side only, or is a queue or an event that both may use at any
time; the comments at the fields say which. What remains to get right is that no wake-up is lost, and one rule
sees to that: who is going to sleep says so first and then looks once more; who brings something brings it first
and then looks whether anybody sleeps. To say so is to clear the event or to write a flag. The flags (`_asleep`,
`_notified`) exist because waking Trio from a thread costs microseconds, and mostly it is awake.

A thread waits in three places, and a cancel ends each of them: `trio.from_thread.run` raises `trio.Cancelled`;
waiting for bytes or for room ends with `_Stopped`. Both derive from `BaseException`, so that no
``except Exception`` on the way out takes them for a failure of the request.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextvars import ContextVar
from queue import SimpleQueue
from typing import Any, Generic, TypeVar, cast

import attrs
import httpx2
import trio

T = TypeVar("T")

MAX_UNREAD_BYTES = 65_536
"""Bytes of a response that wait for the thread; with as much unread, Trio stops reading from the socket."""

MAX_UNRECEIVED_ITEMS = 128
"""Items that wait for ``receive``; with as many, the thread stops iterating."""

END_OF_BODY_GRACE = 0.1
"""Seconds for a body to end once the iterator has. ``[DONE]`` ends the iterator, but only a connection whose body
was read to its end can be used again, and the few bytes that end it may come a little later."""

CLOSE_TIMEOUT = 1.0
"""Seconds for closing a response. HTTP/1.1 waits for nothing then; this bounds what other transports may do."""


async def stream_in_thread(
    iterate: Callable[[], Iterator[T]],
    receive: Callable[[list[T]], Awaitable[None]],
    *,
    limiter: trio.CapacityLimiter,
) -> None:
    """Run ``iterate()`` to its end in a worker thread; await ``receive`` with all the items that have come since
    it was last awaited, in order and never with none.

    Raises, as it is, what the iterator raised (once the items before it were received) or what ``receive`` raised.

    It can be cancelled at any moment, also while it waits for a place in ``limiter``: the upstream request is
    closed at once, ``receive`` is not called any more, and when this returns the thread has ended; what the iterator
    raises while it is being stopped is then of no interest. For that, the iterator must block in nothing but
    requests through `TrioTransport`: nothing else can be interrupted.
    """
    stream = _Stream[T]()
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.run, iterate, limiter)
        try:
            await stream.deliver(receive)
        except Exception as exc:  # kept out of the nursery, which would put it into an exception group
            failure = exc
            nursery.cancel_scope.cancel()
        finally:
            stream.stop()
    if failure is not None:
        raise failure


class TrioTransport(httpx2.BaseTransport):
    """A blocking transport whose requests are done by Trio, through ``transport``.

    It works in the threads of `stream_in_thread` and serves all of them at a time. ``transport`` remains its
    owner's to close.
    """

    def __init__(self, transport: httpx2.AsyncBaseTransport) -> None:
        self._transport = transport

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """Raises what ``transport`` raises, `trio.Cancelled`, or `RuntimeError` outside of `stream_in_thread`."""
        stream = _current_stream.get(None)
        if stream is None:
            raise RuntimeError("TrioTransport can only be used in a thread of stream_in_thread()")
        request.read()  # leaves a body of bytes, which both kinds of transport can send
        return trio.from_thread.run(stream.send, self._transport, request)


class _Stopped(BaseException):
    """Raised in the thread when its stream has been cancelled."""


@attrs.define(eq=False)
class _Stream(Generic[T]):
    """One call of `stream_in_thread`."""

    _token: trio.lowlevel.TrioToken = attrs.field(factory=trio.lowlevel.current_trio_token)
    _items: deque[T] = attrs.field(factory=deque)  # the thread appends, Trio takes
    _notified: bool = False  # the thread sets it, Trio clears it: a wake-up is on its way
    _room: threading.Event = attrs.field(factory=threading.Event)  # Trio sets it, the thread clears it
    _stopped: bool = False  # written by Trio
    # The rest is Trio's alone.
    _arrived: trio.Event = attrs.field(factory=trio.Event)
    _finished: bool = False
    _failure: Exception | None = None
    _readers: trio.Nursery = attrs.field(init=False)

    async def run(self, iterate: Callable[[], Iterator[T]], limiter: trio.CapacityLimiter) -> None:
        """Run the thread, and beside it the tasks that read its responses."""
        async with trio.open_nursery() as self._readers:
            try:
                await trio.to_thread.run_sync(self._iterate, iterate, limiter=limiter)
            except _Stopped:
                pass  # this task is cancelled too: its next checkpoint says so
            except Exception as exc:
                self._failure = exc
            self._finished = True
            self._arrived.set()
            self._readers.cancel_scope.deadline = trio.current_time() + END_OF_BODY_GRACE

    async def deliver(self, receive: Callable[[list[T]], Awaitable[None]]) -> None:
        """Await ``receive`` with what comes until the thread has ended, then raise what it raised."""
        finished = False
        while not finished:
            await self._arrived.wait()
            self._arrived = trio.Event()
            self._notified = False
            finished = self._finished
            batch = [self._items.popleft() for _ in range(len(self._items))]
            self._room.set()
            if batch:
                await receive(batch)
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Let the thread raise `_Stopped` instead of giving another item."""
        self._stopped = True
        self._room.set()

    async def send(self, transport: httpx2.AsyncBaseTransport, request: httpx2.Request) -> httpx2.Response:
        """Send ``request`` and have its response read by a task of this stream."""
        response = await transport.handle_async_request(request)
        body = _Body(self._token)
        self._readers.start_soon(body.read, response)
        return httpx2.Response(
            response.status_code, headers=response.headers, stream=body, extensions=response.extensions
        )

    def _iterate(self, iterate: Callable[[], Iterator[T]]) -> None:
        """All that the thread does."""
        _current_stream.set(self)  # in the thread's own copy of the context
        iterator = iterate()
        try:
            for item in iterator:
                self._put(item)
        finally:
            getattr(iterator, "close", lambda: None)()  # a generator has one, another iterator need not

    def _put(self, item: T) -> None:
        """In the thread: hand over ``item``, as soon as there is room."""
        while len(self._items) >= MAX_UNRECEIVED_ITEMS and not self._stopped:
            self._room.wait()
            self._room.clear()
        if self._stopped:
            raise _Stopped
        self._items.append(item)
        if not self._notified:
            self._notified = True
            self._token.run_sync_soon(self._wake)

    def _wake(self) -> None:
        self._arrived.set()


_current_stream: ContextVar[_Stream[Any]] = ContextVar("_current_stream")


@attrs.define(eq=False)
class _Body(httpx2.SyncByteStream):
    """The body of a response: a Trio task reads it, the thread iterates over it."""

    _token: trio.lowlevel.TrioToken
    _chunks: SimpleQueue[bytes] = attrs.field(factory=SimpleQueue)  # Trio puts, the thread gets; b"" is the end
    _failure: BaseException | None = None  # written by Trio, before the end
    _fed: int = 0  # bytes so far, written by Trio
    _taken: int = 0  # bytes so far, written by the thread
    _asleep: bool = False  # written by Trio
    _room: trio.Event = attrs.field(factory=trio.Event)  # Trio's alone

    async def read(self, response: httpx2.Response) -> None:
        """Feed the thread with the body of ``response``, and at last with how it ended."""
        self._failure = _Stopped()
        try:
            await self._feed(response)
            self._failure = None
        except Exception as exc:
            self._failure = exc
        finally:
            self._chunks.put(b"")

    async def _feed(self, response: httpx2.Response) -> None:
        """Put the body's bytes on the queue as room comes, and close ``response`` in every case."""
        body = aiter(cast("httpx2.AsyncByteStream", response.stream))
        try:
            async for chunk in body:
                if chunk:
                    self._fed += len(chunk)
                    self._chunks.put(chunk)
                    await self._wait_for_room()
        finally:
            with trio.move_on_after(CLOSE_TIMEOUT, shield=True):
                await response.aclose()
            # Cancelled between two reads, the generators behind `body` are still suspended. One more read
            # is cancelled as well and so ends them; else they are left to the garbage collector.
            async for _ in body:
                pass

    async def _wait_for_room(self) -> None:
        self._asleep = True
        while self._fed - self._taken >= MAX_UNREAD_BYTES:
            await self._room.wait()
            self._room = trio.Event()
        self._asleep = False

    def __iter__(self) -> Iterator[bytes]:
        """In the thread: all bytes that wait, joined, so that a busy thread parses many tokens in one go."""
        at_end = False
        while not at_end:
            chunks = [self._chunks.get()]
            chunks += [self._chunks.get_nowait() for _ in range(self._chunks.qsize())]
            at_end = not chunks[-1]
            data = b"".join(chunks)
            self._taken += len(data)
            if self._asleep:
                self._token.run_sync_soon(self._wake)
            if data:
                yield data
        if self._failure is not None:
            raise self._failure

    def _wake(self) -> None:
        self._room.set()
