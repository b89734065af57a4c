"""The app for ``hypercorn inference_trio.app:app --worker-class trio``: the settings' composition root.

Importing this module reads the settings and starts the log. Where the settings are wrong it ends the process with one
line on stderr: under Hypercorn an exception would show as a traceback, and after the port was bound.
"""

from __future__ import annotations

import sys
from typing import NoReturn

from quart_trio import QuartTrio

from .errors import ConfigurationError
from .logs import configure_logging
from .server import create_app
from .settings import Settings


def _end(error: ConfigurationError) -> NoReturn:
    print(f"inference_trio: {error}", file=sys.stderr)  # noqa: T201
    raise SystemExit(2)


def _compose() -> QuartTrio:
    try:
        settings = Settings.load()
        configure_logging(settings)
        return create_app(settings)
    except ConfigurationError as error:
        _end(error)


app = _compose()
