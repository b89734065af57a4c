"""What concerns the process: what it says, how it is told to stop and ends whatever holds it up, how many files it has.

What is told to stop ends in order: `store.SessionStore.drain`, then Hypercorn, then what runs in the app's nursery.
All of that is bounded in time but for what is not ours: a thread of a provider's client or of a callback may react
to nothing, and Trio waits for its threads. So the process ends in any case when the time for that is over, and at
once when it is told a second time.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import trio

SIGNALS = (signal.SIGINT, signal.SIGTERM)

USAGE_ERROR = 2
"""Exit status for wrong arguments, as argparse has it, and for wrong settings."""

BACKLOG = 2048
"""Connections that may wait to be accepted, as far as the system lets them (``net.core.somaxconn``)."""

GRACE = 1.75
"""Seconds beyond those for running tasks after which the process ends in any case."""

FLUSHING_TIME = 0.2
"""Seconds in which the log is written before; whoever should take it may not read."""

OTHER_FILES = 64
"""Open files besides connections: the interpreter's, the log's, listening sockets."""

logger = logging.getLogger(__name__)


@contextmanager
def loading() -> Iterator[None]:
    """Within it libraries are loaded, which stay: the garbage collector does not look at what they make, then or later.

    Their modules are half a million objects. To go through all of them takes 0.1 to 0.2 s each time, in which no
    stream gets anything.
    """
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def watch_signals(
    drain_seconds: float, told: Callable[[], Awaitable[None]] | None = None
) -> Callable[[], Awaitable[None]]:
    """From now on to the end of the process, SIGINT and SIGTERM tell it to stop; the second one ends it at once.

    What is returned waits for the first one, or until ``told`` returns. From then on the process has
    ``drain_seconds`` for what runs, and `GRACE` for the rest: then it ends, with exit status 0. (Through ``told`` a
    worker's parent tells it; a signal that comes to both of them counts once.)
    """
    token, is_told = trio.lowlevel.current_trio_token(), trio.Event()

    def on_first_signal(*_: object) -> None:
        _handle_signals(_end)
        with suppress(trio.RunFinishedError):
            token.run_sync_soon(is_told.set)

    async def wait() -> None:
        async with trio.open_nursery() as nursery:
            if told:
                nursery.start_soon(_set_after, told, is_told)
            await is_told.wait()
            nursery.cancel_scope.cancel()
        last_resort = threading.Timer(drain_seconds + GRACE, _end_all_the_same)
        last_resort.daemon = True
        last_resort.start()

    _handle_signals(on_first_signal)
    return wait


def announce(address: str) -> None:
    """Says that the server is ready."""
    print(f"inference_trio serves at {address}, until Ctrl-C", flush=True)  # noqa: T201


def complain(reason: object) -> None:
    """Says, in one line, why the command ends. It is one write: others may write there, too."""
    if sys.stderr:
        sys.stderr.write(f"inference-trio: {reason}\n")


def leave(status: int) -> NoReturn:
    """Ends the process as the interpreter does, but does not take its modules apart before.

    That takes a second on a busy machine, and nothing can cut it short: the last resort is a thread, and stopped first.
    """
    atexit._run_exitfuncs()  # noqa: SLF001 (there is no other name for it)
    if sys.stdout:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
    os._exit(status)


def _handle_signals(handler: Callable[..., None]) -> None:
    for number in SIGNALS:
        signal.signal(number, handler)


async def _set_after(told: Callable[[], Awaitable[None]], event: trio.Event) -> None:
    await told()
    event.set()


def _end_all_the_same() -> None:
    logger.warning("something does not end: the process ends without it")
    flushing = threading.Thread(target=logging.shutdown, daemon=True)
    flushing.start()
    flushing.join(FLUSHING_TIME)
    _end()


def _end(*_: object) -> None:
    os._exit(0)


def raise_file_limit(connections: int, tasks: int) -> None:
    """Lets the process open as many files as it may, and says so where that is less than it may come to need.

    Each of the connections and each task's connection to the provider is one. Where there are no more to be had,
    nothing can be accepted and tasks fail, until some are closed.
    """
    needed = connections + tasks + OTHER_FILES
    if sys.platform != "win32":  # which has no such limit
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        if most < needed:
            logger.warning(
                "%d connections and %d tasks may need %d open files, and there may be %d: raise that limit"
                " (ulimit -n, LimitNOFILE), or lower INFERENCE_MAX_CONNECTIONS",
                *(connections, tasks, needed, most),
            )
