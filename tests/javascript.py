"""JavaScript as the tests run it: a module in Node beside the server, and tools from npm.

Node and npm are not everywhere; what needs them is skipped there, with a line that says so. Where
``TESTS_NEED_EVERYTHING`` is set, as in CI, it fails instead.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

import inference_trio
from tests.harness import PATIENCE

WEB = Path(inference_trio.__file__).parent / "web"
PROJECT = Path(__file__).parent / "web"
"""A package of npm: what the tests take from there, in exact versions."""

NODE = shutil.which("node")
STRICT = "TESTS_NEED_EVERYTHING"


def without(what: str) -> Any:
    """Skips the test that calls it, as ``what`` is not here."""
    if os.environ.get(STRICT):
        pytest.fail(f"{what} is not here, and {STRICT} is set")
    pytest.skip(f"NOT TESTED: {what} is not here")


@cache
def node_modules() -> Path | None:
    """Where npm puts the packages of `PROJECT`; installs them if they are not there. ``None`` where it cannot."""
    npm = shutil.which("npm")
    if npm is None:
        return None
    command = [npm, "install", "--prefix", str(PROJECT), "--no-audit", "--no-fund", "--no-package-lock", "--silent"]
    with one_at_a_time(PROJECT):
        ended = subprocess.run(command, capture_output=True, text=True, timeout=100)
    return PROJECT / "node_modules" if ended.returncode == 0 else None


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Waits for whoever else is in here with this folder, in another process of the tests."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


PRELUDE = """
import {{ createInterface }} from "node:readline";
import {{ createSession, InferenceError, resumeSession }} from {client};
const url = {url};
const say = (value) => process.stdout.write(JSON.stringify(value) + "\\n");
const lines = createInterface({{ input: process.stdin }})[Symbol.asyncIterator]();
const hear = async () => JSON.parse((await lines.next()).value);
const fast = {{ backoff: () => 0 }};
const all = async (generation) => {{
  const events = [];
  for await (const event of generation) events.push(event);
  return events;
}};
const failing = async (promise) => {{
  try {{ await promise; return null; }} catch (error) {{
    if (!(error instanceof InferenceError)) throw error;
    return {{ code: error.code, message: error.message, data: error.data, retryable: error.retryable }};
  }}
}};
"""


@attrs.define(eq=False)
class Script:
    """A module that runs in Node; it and the test speak in lines of JSON."""

    process: trio.Process
    _received: bytes = b""

    async def say(self, value: Any) -> None:
        assert self.process.stdin is not None
        await self.process.stdin.send_all(json.dumps(value).encode() + b"\n")

    async def hear(self) -> Any:
        """What the script says next."""
        assert self.process.stdout is not None
        with trio.fail_after(PATIENCE):
            while b"\n" not in self._received:
                data = await self.process.stdout.receive_some()
                assert data, "the script has ended"
                self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return json.loads(line)


@asynccontextmanager
async def node(source: str, url: str, folder: Path) -> AsyncIterator[Script]:
    """Runs the module, which has what is in `PRELUDE`; asserts that it ends by itself and well."""
    path = folder / "script.mjs"
    prelude = PRELUDE.format(client=json.dumps((WEB / "client.js").as_uri()), url=json.dumps(url))
    path.write_text(prelude + source)
    assert NODE is not None
    command = [NODE, "--experimental-websocket", "--no-warnings", str(path)]
    async with trio.open_nursery() as nursery:
        start = partial(trio.run_process, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        process: trio.Process = await nursery.start(start)
        try:
            yield Script(process)
        except BaseException:
            process.kill()
            raise
        assert process.stdin is not None
        await process.stdin.aclose()
        with trio.fail_after(PATIENCE):
            await process.wait()
