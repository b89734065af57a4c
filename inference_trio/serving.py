"""``inference-trio serve``: the server as a process, alone or as one of several workers.

A worker is ``python -m inference_trio.serving FD NUMBER``, started by `workers`: ``FD`` is the listening socket, which
all of them share, and its standard input is a socket to its parent. There it says where it serves, once it does; and
when nothing more can come from there, because it is to stop or its parent is gone, it stops as if by SIGTERM.
"""

from __future__ import annotations

import logging
import socket
import sys
from contextlib import suppress
from functools import partial

import attrs
import hypercorn.trio
import trio
from hypercorn.config import Config
from quart_trio import QuartTrio

from .errors import ConfigurationError
from .hypercorn_fixes import AppEndedError
from .logs import configure_logging
from .process import BACKLOG, USAGE_ERROR, announce, complain, leave, loading, watch_signals
from .settings import Settings


@attrs.frozen(eq=False)
class Worker:
    """One of several: its number, from 1, and its end of the socket to its parent."""

    number: int
    parent: socket.socket


def run(bind: str, worker: Worker | None = None) -> int:
    """Serves at ``bind``, in Hypercorn's form. Returns the exit status, when the server has stopped."""
    try:
        settings = Settings.load()
        if worker:
            settings = settings.for_worker(worker.number)
        stop_logging = configure_logging(settings)
        with loading():
            from .server import create_app  # after the settings: importing LangChain takes two seconds

            app = create_app(settings)
    except ConfigurationError as error:
        complain(error)
        return USAGE_ERROR
    reason = ""
    try:
        trio.run(serve, app, bind, settings.drain_seconds, worker)
    except* OSError as group:
        name = f"as worker {worker.number}" if worker else f"on {bind}"
        reason = f"cannot serve {name}: {_first_of(group)}"
    except* AppEndedError:
        reason = "the server has a defect, see the log"
    finally:
        stop_logging()
    if reason:
        complain(reason)
    return 1 if reason else 0


def _first_of(error: Exception) -> Exception:
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


async def serve(app: QuartTrio, bind: str, drain_seconds: float, worker: Worker | None) -> None:
    """Serves until SIGINT or SIGTERM, and then lets what runs come to its end; a second one ends the process at once.

    Raises OSError, in a group, where the address cannot be had.
    """
    config = Config()
    config.bind = [bind]
    config.backlog = BACKLOG
    logging.getLogger("hypercorn.error").setLevel(logging.WARNING)  # what it says at the start is said below
    parent = trio.SocketStream(trio.socket.from_stdlib_socket(worker.parent)) if worker else None
    told = watch_signals(drain_seconds, partial(_wait_for_the_end, parent) if parent else None)
    async with trio.open_nursery() as nursery:
        addresses = await nursery.start(partial(hypercorn.trio.serve, app, config, shutdown_trigger=told))
        if parent:
            await _tell(parent, addresses[0])
        else:
            announce(addresses[0])


async def _tell(parent: trio.SocketStream, address: str) -> None:
    with suppress(trio.BrokenResourceError):  # it is gone, and this process is about to end as well
        await parent.send_all(address.encode())


async def _wait_for_the_end(parent: trio.SocketStream) -> None:
    with suppress(trio.BrokenResourceError):
        await parent.receive_some(1)


if __name__ == "__main__":
    fd, number = map(int, sys.argv[1:])
    leave(run(f"fd://{fd}", Worker(number, socket.socket(fileno=0))))
