"""Whether traces are made: decided by OpenTelemetry's standard variables, before any of its packages is imported.

The packages are an extra. `spans` makes the traces, and all else about them is configured by the variables
(``OTEL_*``, in the process's environment) too.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from typing import Protocol, cast

from .errors import ConfigurationError
from .report import Observer
from .settings import Settings

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")

logger = logging.getLogger(__name__)


class Tracing(Observer, Protocol):
    async def aclose(self) -> None:
        """Sends what is left, in bounded time."""


def open_tracing(settings: Settings, environ: Mapping[str, str]) -> Tracing | None:
    """What makes traces, where they are asked for and the packages are there. Raises ConfigurationError."""
    if not traces_are_wanted(environ):
        return None
    try:
        spans = importlib.import_module(f"{__package__}.spans")
    except ImportError:
        logger.warning("OTEL_* asks for traces, which need: pip install inference-trio[otel]")
        return None
    logger.info("traces go where OTEL_* says")
    return cast("Tracing", spans.open_spans(settings, environ))


def traces_are_wanted(environ: Mapping[str, str]) -> bool:
    """Whether the variables ask for traces. Raises ConfigurationError for an exporter other than OTLP's."""
    exporter = environ.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true" or exporter == "none":
        return False
    if exporter not in ("", "otlp"):
        raise ConfigurationError(f"OTEL_TRACES_EXPORTER: expected otlp or none, got {exporter[:80]!r}")
    return bool(exporter) or any(environ.get(name, "").strip() for name in _ENDPOINTS)
