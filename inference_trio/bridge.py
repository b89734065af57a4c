"""Blocking code within Trio: LangChain and the clients of providers block, and Trio does their waiting.

`call_blocking` runs a function in a greenlet: on a stack of its own, in Trio's thread. Where the function has to wait
it calls `wait_for`: that switches to the Trio task, which awaits in its place and then switches back, with the result
or the exception::

            Trio task                                  greenlet
            call_blocking ─────── switch ────────────▶ function
                                                          │       (LangChain, openai, httpx2)
            await handle_async_request(request) ◀──── wait_for, in TrioTransport
                 │  headers
                 └──────────────────────────────────────▶ │
            await anext(body) ◀────────────────────────── wait_for, in the iterator of the body

So a cancel scope reaches a request wherever it stands: `trio.Cancelled` is raised out of `wait_for`, passes through
every ``except Exception`` on its way out, since it is none, and runs every ``finally``. A switch costs less than a
microsecond, where handing something to a thread and back costs over a hundred.

Code that blocks in something else, as other providers' clients and callbacks may, belongs into a thread of
`trio.to_thread.run_sync`. `wait_for` works there too.
"""

from __future__ import annotations

import contextvars
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from contextvars import ContextVar
from typing import TypeVar, cast

import greenlet
import httpx2
import trio

T = TypeVar("T")

END_OF_BODY_GRACE = 1.0
"""Seconds for a body to end once nobody wants more of it. ``[DONE]`` ends the answer, but only a connection whose body
was read to its end can be used again, and the few bytes that end it may come a little later, on a busy machine above
all."""

CLOSE_TIMEOUT = 1.0
"""Seconds for closing a response, which a cancel does not cut short. HTTP/1.1 waits for nothing then."""


class _Callee(greenlet.greenlet):
    """What a function of `call_blocking` runs in; its parent is the Trio task's."""


async def call_blocking(function: Callable[[], T]) -> T:
    """What ``function`` returns or raises. It must block in nothing but `wait_for`."""
    callee = _Callee(function)
    callee.gr_context = contextvars.copy_context()
    awaited = callee.switch()
    while not callee.dead:
        try:
            value = await awaited
        except BaseException as error:
            awaited = callee.throw(error)
        else:
            awaited = callee.switch(value)
    return cast("T", awaited)


async def stream_blocking(
    iterate: Callable[[], Iterator[T]],
    receive: Callable[[T], Awaitable[None]],
    *,
    threads: trio.CapacityLimiter | None = None,
) -> None:
    """Await ``receive`` with each item of ``iterate()``; the iterator goes on when it has returned.

    Raises, as it is, what either of them raises. Cancelling it ends the iterator at its next `wait_for`. An iterator
    that blocks in anything else needs one of ``threads``: there a cancel waits until it is done with that. When this
    returns, all responses of a `TrioTransport` that the iterator got are closed.
    """

    def run() -> None:
        iterator = iterate()
        try:
            for item in iterator:
                wait_for(receive, item)
        finally:
            getattr(iterator, "close", lambda: None)()  # a generator has one, another iterator need not

    async with AsyncExitStack() as responses:
        token = _responses.set(responses)
        try:
            if threads:
                await trio.to_thread.run_sync(run, limiter=threads)
            else:
                await call_blocking(run)
        finally:
            _responses.reset(token)


_responses: ContextVar[AsyncExitStack] = ContextVar("_responses")


def wait_for(function: Callable[..., Awaitable[T]], *args: object) -> T:
    """Await ``function(*args)`` in the Trio task that has called the blocking code which calls this.

    Raises RuntimeError where none has: neither by `call_blocking` nor by `trio.to_thread.run_sync`.
    """
    current = greenlet.getcurrent()
    if isinstance(current, _Callee) and current.parent:
        return cast("T", current.parent.switch(function(*args)))
    return trio.from_thread.run(function, *args)


class TrioTransport(httpx2.BaseTransport):
    """A blocking transport whose requests are done by Trio, through ``transport``, which its owner closes."""

    def __init__(self, transport: httpx2.AsyncBaseTransport) -> None:
        self._transport = transport

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """Raises what ``transport`` or `wait_for` raises, and RuntimeError outside of `stream_blocking`."""
        responses = _responses.get(None)
        if responses is None:
            raise RuntimeError("TrioTransport can only be used within stream_blocking()")
        request.read()  # leaves a body of bytes, which both kinds of transport can send
        response = wait_for(self._transport.handle_async_request, request)
        body = _Body(cast("httpx2.AsyncByteStream", response.stream))
        responses.push_async_callback(body.aclose)
        return httpx2.Response(
            response.status_code, headers=response.headers, stream=body, extensions=response.extensions
        )


class _Body(httpx2.SyncByteStream):
    """The body of a response, for blocking code to read. Closing it is left to `stream_blocking`: blocking code may
    do that while a generator is being collected, which can be anywhere."""

    def __init__(self, stream: httpx2.AsyncByteStream) -> None:
        self._stream = stream
        self._reads = aiter(stream)

    def __iter__(self) -> Iterator[bytes]:
        while (data := wait_for(self._read)) is not None:
            yield data

    async def _read(self) -> bytes | None:
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
