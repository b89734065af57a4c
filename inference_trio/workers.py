"""``inference-trio serve --workers N``: a parent that keeps N workers running on one listening socket.

The parent serves nothing itself. It binds the port, starts the workers (`serving` is what they run) and waits:

* A worker that ends although nobody asked it to is replaced. The pause before that grows with each one that did not
  last, so that a worker which cannot live does not keep the machine busy.
* Until all of them have been ready once, nothing is replaced: what keeps a worker from starting will keep the next one
  from it, too. Then all end, with its exit status. The first one has to be ready before the others begin, so what
  is wrong with the settings is said once.
* Told to stop, the parent shuts its end of the socket to each worker, and waits for them. That is also what a worker
  sees when the parent is killed, so none outlives it for longer than a stop takes. They are in sessions of their own:
  Ctrl-C in a terminal is for the parent alone, and so are the signals that it counts. A worker that is not ready yet
  gets SIGTERM, as it listens to nobody.
* A second signal kills them, and so does the end of the time that each has to end by itself.

So a worker that gets a signal from elsewhere (a manager of services may send SIGTERM to all there are) counts it as its
first one, and what its parent says as the same.
"""

from __future__ import annotations

import logging
import math
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path

import attrs
import trio
from hypercorn.config import Config

from .access import Access
from .errors import ConfigurationError
from .logs import configure_logging
from .process import GRACE, SIGNALS, USAGE_ERROR, announce, complain
from .settings import Settings

SHORTEST_PAUSE = 0.5
LONGEST_PAUSE = 30.0
"""Seconds from the end of a worker to the start of another one."""

LASTING = 10.0
"""Seconds for which a worker has to be ready until its end is an accident, and not one of a series."""

MARGIN = 2.0
"""Seconds, beyond those in which a worker ends in any case, after which it is killed."""

logger = logging.getLogger(__name__)


def run(bind: str, count: int) -> int:
    """Serves at ``bind``, in Hypercorn's form, with this many workers. Returns the exit status, when all have ended."""
    try:
        settings = Settings.load()
        settings.check_workers(count)
        stop_logging = configure_logging(settings)
    except ConfigurationError as error:
        complain(error)
        return USAGE_ERROR
    try:
        with _bound(bind) as listener:
            Access.of(settings).warn_of_strangers([bind])
            return trio.run(Workers(listener, count, settings.drain_seconds).run)
    except OSError as error:
        complain(f"cannot serve on {bind}: {error}")
        return 1
    finally:
        stop_logging()


def _bound(bind: str) -> socket.socket:
    """The socket on which the first worker listens, once it is ready: until then a balancer goes to another server.

    Raises OSError where the address cannot be had.
    """
    config = Config()
    config.bind = [bind]
    (listener,) = config.create_sockets().insecure_sockets
    return listener


def pause_after(lived: float, last_pause: float) -> float:
    """Seconds until another worker begins, after one that was ready for so many, and for which so many were waited."""
    return SHORTEST_PAUSE if lived >= LASTING else min(max(SHORTEST_PAUSE, 2 * last_pause), LONGEST_PAUSE)


@attrs.define(eq=False)
class _Worker:
    """``stream`` is the parent's end of the socket; ``ready_at`` is infinite until then."""

    number: int
    process: trio.Process
    stream: trio.SocketStream
    ready_at: float = math.inf


@attrs.define(eq=False)
class Workers:
    """``listener`` is closed when they are to stop."""

    listener: socket.socket
    count: int
    drain_seconds: float
    status: int = 0
    _ready: int = 0
    """How many were ready, up to the first time that all were."""
    _is_stopping: trio.Event = attrs.field(factory=trio.Event)
    _python: list[str] = attrs.field(factory=lambda: _python())
    _nursery: trio.Nursery = attrs.field(init=False)

    async def run(self) -> int:
        """Returns the exit status, when all have ended."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._heed_signals, nursery.cancel_scope)
            nursery.start_soon(self._lose_patience, nursery.cancel_scope)
            async with trio.open_nursery() as self._nursery:
                self._nursery.start_soon(self._keep, 1)
            nursery.cancel_scope.cancel()
        return self.status

    async def _heed_signals(self, all_there_is: trio.CancelScope) -> None:
        with trio.open_signal_receiver(*SIGNALS) as signals:
            async for _ in signals:
                if self._is_stopping.is_set():
                    break
                self._stop()
        all_there_is.cancel()

    async def _lose_patience(self, all_there_is: trio.CancelScope) -> None:
        await self._is_stopping.wait()
        await trio.sleep(self.drain_seconds + GRACE + MARGIN)
        logger.warning("workers that do not end are killed")
        all_there_is.cancel()

    def _stop(self) -> None:
        self._is_stopping.set()
        self.listener.close()  # so that none can connect any more, once no worker listens

    async def _keep(self, number: int) -> None:
        """Runs one worker after another, until all are to stop."""
        pause = 0.0
        while not self._is_stopping.is_set():
            try:
                status, lived = await self._run_one(number)
                how = _how(status)
            except OSError as error:
                status, lived, how = 0, 0.0, f"cannot be started ({error})"
            if self._is_stopping.is_set():
                break
            if self._ready < self.count:
                self._give_up(number, status, how)
                break
            pause = pause_after(lived, pause)
            logger.warning("worker %d %s: another one begins in %.1f s", number, how, pause)
            with trio.move_on_after(pause):
                await self._is_stopping.wait()

    async def _run_one(self, number: int) -> tuple[int, float]:
        """The exit status of a worker, negative where a signal ended it, and how long (s) it was ready.

        Raises OSError where it cannot be started.
        """
        ours, theirs = socket.socketpair()
        async with trio.SocketStream(trio.socket.from_stdlib_socket(ours)) as stream:
            with theirs, self.listener.dup() as listener:
                process = await trio.lowlevel.open_process(
                    [*self._python, "-m", f"{__package__}.serving", str(listener.fileno()), str(number)],
                    stdin=theirs,
                    pass_fds=[listener.fileno()],
                    start_new_session=True,
                )
            worker = _Worker(number, process, stream)
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._hear, worker)
                    nursery.start_soon(self._tell, worker)
                    status = await process.wait()
                    nursery.cancel_scope.cancel()
            finally:
                with trio.CancelScope(shield=True):
                    process.kill()
                    await process.wait()
        return status, trio.current_time() - worker.ready_at

    async def _hear(self, worker: _Worker) -> None:
        address = (await worker.stream.receive_some()).decode()
        if address:
            worker.ready_at = trio.current_time()
            logger.info("worker %d is ready: pid %d", worker.number, worker.process.pid)
            self._count(address)

    async def _tell(self, worker: _Worker) -> None:
        await self._is_stopping.wait()
        if worker.ready_at == math.inf:
            worker.process.terminate()
        with suppress(trio.BrokenResourceError):
            await worker.stream.send_eof()

    def _count(self, address: str) -> None:
        """Called for each worker that is ready, those that replace others included."""
        if self._ready == self.count:
            return
        self._ready += 1
        if self._ready == 1:
            for number in range(2, self.count + 1):
                self._nursery.start_soon(self._keep, number)
        elif self._ready == self.count:
            announce(address)

    def _give_up(self, number: int, status: int, how: str) -> None:
        """A worker has ended before all were ready."""
        if status <= 0:  # else it has said why
            logger.error("worker %d %s, before all were ready", number, how)
        self.status = max(1, status)
        self._stop()


def _python() -> list[str]:
    """The interpreter. With ``-m`` it looks for modules in the working directory, unless it is told not to (``-P``).

    The command ``inference-trio`` does not, and whatever lies there shall not stand in for a library.
    """
    return [sys.executable] if str(Path.cwd()) in sys.path else [sys.executable, "-P"]


def _how(status: int) -> str:
    if status < 0:
        return f"was ended by signal {-status} ({signal.strsignal(-status)})"
    return f"has ended with status {status}"
