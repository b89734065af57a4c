"""What Hypercorn 0.18 and Quart-Trio 0.12/0.13 lack for a WebSocket server that strangers can reach.

`install` puts subclasses in place of the names that Hypercorn's Trio worker looks up; an application calls it
when it is imported, so the plain ``hypercorn`` command has them too. Every reason stands at its override.

How a connection ends. One task reads the socket, inside the cancel scope ``_reading``; all else is the
application's task and a few of Hypercorn's. Whatever ends a connection ends its reading:

* The peer went silent, or the application took nothing: the scope's deadline, moved on with each read, is reached.
* A write failed or took too long: the scope is cancelled, and the socket closed.
* We close (after a close frame or a last response): we send end-of-file, then read and discard for at most
  ``LINGER`` seconds. A socket that is closed with unread input is reset, and many a client then never sees
  why it was closed.

Then the socket is closed, the application is told, and the scope around the whole connection is cancelled, so
that no task outlives its socket. A WebSocket handler learns of the end in one way only: it is cancelled.

An application that does not read: its peer is made to wait (TCP's own back-pressure), which keeps memory
bounded; `arriving` says when. The price is that pings, pongs and a close by the peer wait as well, so the connection
is dropped after ``pong_timeout`` of that. To drop it at once would punish clients that send a burst.

Left to the application: ``send`` on a closed stream returns without a checkpoint, so a loop around it needs one
of its own; a handler that raises closes with 1000, so it has to close with 1011 itself;
``app.websocket_class = BoundedWebsocket``; ``MAX_CONTENT_LENGTH`` equal to ``max_message_bytes``, and
``BODY_TIMEOUT`` to ``body_timeout``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

import attrs
import hypercorn.protocol
import hypercorn.protocol.h11
import hypercorn.trio
import hypercorn.trio.run
import trio
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData
from hypercorn.trio.tcp_server import MAX_RECV, TCPServer
from hypercorn.typing import LifespanState, TaskGroup
from hypercorn.utils import LifespanFailureError

from .arriving import Arriving
from .hypercorn_streams import OUTLET, BoundedHTTPStream, BoundedWSStream, OnlyHTTP1, overloaded

logger = logging.getLogger(__name__)

LINGER = 5.0
"""Seconds for which a connection that we close is still read, and an application is told that it ended."""

STOPPING_TIME = 0.5
"""Seconds that connections have to end by themselves when Hypercorn stops."""

plain_worker_serve = hypercorn.trio.run.worker_serve
"""Hypercorn's own, for another app beside the one that it was started with."""

_HEADERS, _BODY = overloaded("There are too many connections")
NO_PLACE = b"HTTP/1.1 503 Service Unavailable\r\n%s\r\n%s" % (b"".join(b"%s: %s\r\n" % it for it in _HEADERS), _BODY)

PIECE = 2**16
"""Bytes that even a slow peer takes in time; the end of a task may be many times as long."""


@attrs.frozen
class ServerLimits:
    """What a connection may take, and how many there may be. Sizes in bytes, times in seconds.

    ``max_message_bytes``: a WebSocket message, in UTF-8 where it is text, or the body of a request. A larger
    message is answered with close code 1009; of a larger body the application sees just enough to refuse it.
    ``max_connections``: open ones; a further one is answered with 503 at once.
    ``max_arriving_bytes``: of messages and bodies that nobody is through with yet, on all connections together; beyond
    it those that are not small have to wait. The one that holds up others for longer than ``arriving_patience``, and
    each that had to wait for half of ``pong_timeout``, is refused, with close code 1013 or status 503. At least one
    message has to find room.
    ``write_timeout``: how long a write, or `PIECE` bytes of a longer one, may take before the peer is dropped.
    ``ping_interval``, ``pong_timeout``: how often a WebSocket is pinged, and how long any peer may send nothing at
    all before it is dropped. The second must be larger than the first, and than any response takes.
    ``header_timeout``: until the first or the next request's headers are complete.
    ``body_timeout``: until its body is, once it is asked for; to be set as Quart's ``BODY_TIMEOUT``, which answers 408.
    """

    max_message_bytes: int
    max_connections: int = 10_000
    max_arriving_bytes: int = 2**28
    arriving_patience: float = 5.0
    write_timeout: float = 30.0
    ping_interval: float = 20.0
    pong_timeout: float = 60.0
    header_timeout: float = 30.0
    body_timeout: float = 60.0

    def apply(self, config: Config) -> None:
        """Set what Hypercorn can be told."""
        config.websocket_max_message_size = self.max_message_bytes
        config.wsgi_max_body_size = self.max_message_bytes
        config.websocket_ping_interval = self.ping_interval
        # Runs from the connection's start, or the last response, to the next complete headers.
        config.keep_alive_timeout = self.header_timeout
        config.include_server_header = False
        config.max_app_queue_size = 1


Trigger = Callable[[], Awaitable[None]]
"""Returns when the server is to stop."""


class AppEndedError(Exception):
    """What the application runs beside its requests has ended, while there still were to be some."""


@attrs.frozen
class Hooks:
    """What an application wants of the worker that serves it.

    ``before_start`` is called with Hypercorn's configuration; ``before_stop`` is awaited between the trigger and the
    stop, while all is still served. ``watch`` makes the trigger of a worker that Hypercorn's command started, out of
    the one that the command gave it, if any: the command itself leaves signals that reach the worker alone. ``leave``
    is called when such a worker has nothing more to do. ``on_refusal`` is called for each connection, message or body
    that is refused because there are too many, with ``http`` and the status or ``websocket`` and the close code.
    """

    before_start: Callable[[Config], None] = lambda _: None
    before_stop: Trigger = trio.lowlevel.checkpoint
    watch: Callable[[Trigger | None], Trigger | None] = lambda trigger: trigger
    leave: Callable[[], None] = lambda: None
    on_refusal: Callable[[str, int], None] = lambda *_: None


def install(limits: ServerLimits, hooks: Hooks | None = None) -> Arriving:
    """Make Hypercorn's Trio worker use these fixes in this process. The last call's arguments count."""
    hooks = hooks or Hooks()
    places = trio.CapacityLimiter(limits.max_connections)
    arriving = Arriving(limits.max_arriving_bytes, limits.arriving_patience, limits.pong_timeout / 2, hooks.on_refusal)
    hypercorn.trio.worker_serve = partial(_serve, hooks)  # type: ignore[attr-defined]
    hypercorn.trio.run.worker_serve = partial(_serve_command, hooks)
    hypercorn.trio.run.TCPServer = partial(BoundedTCPServer, limits, hooks, places)  # type: ignore[assignment, attr-defined]
    hypercorn.protocol.H11Protocol = OnlyHTTP1  # type: ignore[attr-defined]
    hypercorn.protocol.h11.WSStream = partial(BoundedWSStream, arriving)  # type: ignore[assignment, attr-defined]
    hypercorn.protocol.h11.HTTPStream = partial(BoundedHTTPStream, arriving)  # type: ignore[assignment, attr-defined]
    return arriving


async def _serve_command(
    hooks: Hooks, app: Any, config: Config, *, shutdown_trigger: Trigger | None = None, **options: Any
) -> None:
    await _serve(hooks, app, config, shutdown_trigger=hooks.watch(shutdown_trigger), **options)
    hooks.leave()


async def _serve(
    hooks: Hooks, app: Any, config: Config, *, shutdown_trigger: Trigger | None = None, **options: Any
) -> None:
    """Hypercorn tells open WebSockets nothing when it stops: they are cut off when its time is over.

    Where what an application runs beside its requests fails, Hypercorn logs at most that, and serves on, though nothing
    may work any more. Here it ends, and AppEndedError is raised, in a group.
    """
    hooks.before_start(config)
    config.graceful_timeout = STOPPING_TIME
    config.alpn_protocols = ["http/1.1"]
    # Else it writes to stderr by itself, as well as through `logging`.
    config.errorlog = logging.getLogger("hypercorn.error")

    ended = trio.Event()

    async def told_and_ready() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_raise_after, ended)
            await (shutdown_trigger or trio.sleep_forever)()
            nursery.cancel_scope.cancel()
        await hooks.before_stop()

    await plain_worker_serve(partial(_run_app, app, ended), config, shutdown_trigger=told_and_ready, **options)


async def _run_app(app: Any, ended: trio.Event, scope: Any, *args: Any) -> None:
    """``ended`` is set when the lifespan is over. What it fails with is logged; not what its start fails with."""
    if scope["type"] != "lifespan":
        await app(scope, *args)
        return
    try:
        await app(scope, *args)
    except* LifespanFailureError:
        raise
    except* Exception:
        logger.exception("defect in the server: it ends")
    finally:
        ended.set()


async def _raise_after(ended: trio.Event) -> None:
    await ended.wait()
    raise AppEndedError


class BoundedTCPServer(TCPServer):
    """One connection, which ends in bounded time whatever its peer and its application do."""

    def __init__(
        self, limits: ServerLimits, hooks: Hooks, places: trio.CapacityLimiter, app: Any, config: Config, *args: Any
    ) -> None:
        limits.apply(config)
        super().__init__(app, config, *args)
        self._limits = limits
        self._hooks = hooks
        self._places = places
        self.state = LifespanState({**self.state, OUTLET: self})
        self._owed = b""
        self._closing = False
        self._connection = trio.CancelScope()
        self._reading = trio.CancelScope()

    async def run(self) -> None:
        """Serve the connection. Never raises an `Exception`.

        An error of Hypercorn's own ends the whole server otherwise, and a peer can provoke one, with a byte that is
        not ASCII in ``Sec-WebSocket-Protocol``: that one is refused now, and there may be others.
        """
        try:
            self._places.acquire_on_behalf_of_nowait(self)
        except trio.WouldBlock:
            self._hooks.on_refusal("http", 503)
            self._write_at_once(NO_PLACE)
            await trio.aclose_forcefully(self.stream)
            return
        try:
            with self._connection:
                await super().run()
        except* Exception:
            await self.config.log.exception("A connection failed")
        finally:
            self._places.release_on_behalf_of(self)

    async def protocol_send(self, event: Event) -> None:
        """Write, close, or start and stop the idle timer.

        The last two are shielded, too: Quart-Trio cancels the task of a request as soon as Hypercorn tells it that
        the response is complete, which is before Hypercorn gets here. The connection was then neither closed nor
        timed, and stayed for as long as its peer liked.
        """
        if isinstance(event, RawData):
            self._write_at_once(event.data)
            await self._write_owed()
        elif isinstance(event, Closed):
            with trio.CancelScope(shield=True):
                await self._linger()
            await self.protocol.handle(Closed())
        else:
            with trio.CancelScope(shield=True):
                await super().protocol_send(event)

    # Writing

    @property
    def is_idle(self) -> bool:
        """Whether all that was to be written is."""
        return not self._owed and not self.send_lock.locked()

    def write_soon(self, data: bytes, task_group: TaskGroup) -> None:
        """Write after all that came before, without waiting for it."""
        self._write_at_once(data)
        if self._owed:
            task_group.spawn(self._write_owed)

    def _write_at_once(self, data: bytes) -> None:
        """What the socket does not take is owed. Mostly that is nothing, and locks and time limits are not needed."""
        self._owed += data
        if isinstance(self.stream, trio.SocketStream) and not self.send_lock.locked():
            with suppress(OSError):  # it takes nothing, or is broken: the ordinary way finds out
                self._owed = self._owed[os.write(self.stream.socket.fileno(), self._owed) :]

    async def _write_owed(self) -> None:
        """Write, whole frames only, hence the shield; a peer that does not read would hold it for ever."""
        while self._owed:
            async with self.send_lock:
                data, self._owed = self._owed, b""
                try:
                    for start in range(0, len(data), PIECE):
                        with trio.fail_after(self._limits.write_timeout, shield=True):
                            await self.stream.send_all(data[start : start + PIECE])
                except (trio.TooSlowError, trio.BrokenResourceError, trio.ClosedResourceError):
                    self._reading.cancel()  # it may wait for the application, which may write on for long
                    await trio.aclose_forcefully(self.stream)

    async def _linger(self) -> None:
        self._closing = True
        self._reading.deadline = trio.current_time() + LINGER
        if not isinstance(self.stream, trio.abc.HalfCloseableStream):  # TLS
            await self.stream.aclose()
            return
        await self._write_owed()
        async with self.send_lock:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await self.stream.send_eof()

    async def _read_data(self) -> None:
        try:
            with self._reading:
                await self._receive()
        finally:
            # Also where the server stops: a write under way is shielded, and ends with its socket.
            await trio.aclose_forcefully(self.stream)
        with trio.move_on_after(LINGER):
            await self.protocol.handle(Closed())
        # Hypercorn would wait for the ping and idle timers, and for an application that does not read.
        self._connection.cancel()

    async def _receive(self) -> None:
        while True:
            if not self._closing:
                self._reading.deadline = trio.current_time() + self._limits.pong_timeout
            try:
                data = await self.stream.receive_some(MAX_RECV)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return
            if not self._closing:
                await self.protocol.handle(RawData(bytes(data)))
            if not data:
                return
