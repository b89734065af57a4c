"""``inference-trio serve``: the server as a process."""

from __future__ import annotations

import logging
import sys
from functools import partial

import hypercorn.trio
import trio
from hypercorn.config import Config
from quart_trio import QuartTrio

from .errors import ConfigurationError
from .logs import configure_logging
from .process import loading, watch_signals
from .settings import Settings

USAGE_ERROR = 2
"""Exit status for wrong arguments, as argparse has it, and for wrong settings."""


def run(host: str, port: int) -> int:
    """Returns the exit status, when the server has stopped."""
    try:
        settings = Settings.load()
        stop_logging = configure_logging(settings)
        with loading():
            from .server import create_app  # after the settings: importing LangChain takes two seconds

            app = create_app(settings)
    except ConfigurationError as error:
        print(f"inference-trio: {error}", file=sys.stderr)  # noqa: T201
        return USAGE_ERROR
    status = 0
    try:
        trio.run(serve, app, host, port, settings.drain_seconds)
    except* OSError as group:
        reason = group.exceptions[0]
        while isinstance(reason, ExceptionGroup):
            reason = reason.exceptions[0]
        print(f"inference-trio: cannot serve on {host}:{port}: {reason}", file=sys.stderr)  # noqa: T201
        status = 1
    finally:
        stop_logging()
    return status


async def serve(app: QuartTrio, host: str, port: int, drain_seconds: float) -> None:
    """Serves until SIGINT or SIGTERM, and then lets what runs come to its end; a second one ends the process at once.

    Raises OSError, in a group, where the address cannot be had.
    """
    config = Config()
    config.bind = [f"[{host}]:{port}" if ":" in host else f"{host}:{port}"]
    logging.getLogger("hypercorn.error").setLevel(logging.WARNING)  # what it says at the start is said below
    told = watch_signals(drain_seconds)
    async with trio.open_nursery() as nursery:
        addresses = await nursery.start(partial(hypercorn.trio.serve, app, config, shutdown_trigger=told))
        print(f"inference_trio serves at {addresses[0]}, until Ctrl-C", flush=True)  # noqa: T201
