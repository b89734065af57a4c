"""The app for ``hypercorn inference_trio.app:app --worker-class trio``.

Importing this module reads the settings and starts the log. Where the settings are wrong it ends the process, with one
line on stderr: under Hypercorn an exception would show as a traceback.
"""

from __future__ import annotations

from quart_trio import QuartTrio

from .errors import ConfigurationError
from .logs import configure_logging
from .process import USAGE_ERROR, complain, loading
from .settings import Settings


def _compose() -> QuartTrio:
    try:
        settings = Settings.load()
        configure_logging(settings)
        with loading():
            from .server import create_app  # after the settings: importing LangChain takes two seconds

            return create_app(settings)
    except ConfigurationError as error:
        complain(error)
        raise SystemExit(USAGE_ERROR) from None


app = _compose()
