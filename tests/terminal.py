"""The chat as a process: in a pseudo-terminal, or with pipes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import trio

from tests.test_main import environment

CHAT = [sys.executable, "-W", "error", "-m", "inference_trio", "chat"]
CONTROL_C, CONTROL_D = "\x03", "\x04"
READY = "\x1b[?2004h"
"""The terminal is asked to mark what is pasted: keys are read from now on."""
ROOT = Path(__file__).parent.parent


def _environment(**variables: str) -> dict[str, str]:
    return environment(PYTHONPATH=str(ROOT), TERM="xterm", **variables)


@attrs.define(eq=False)
class Terminal:
    """A pseudo-terminal, from the side of who sits at it; `seen` is all that was written on it."""

    process: trio.Process
    _keys: int
    seen: str = ""
    _read: int = 0

    async def until(self, text: str) -> str:
        """What comes up to this text, and the text."""
        while (at := self.seen.find(text, self._read)) < 0:
            await trio.lowlevel.wait_readable(self._keys)
            try:
                data = os.read(self._keys, 65536)
            except OSError:  # the other end is closed
                data = b""
            assert data, f"{text!r} has not come: {self.seen!r}"
            self.seen += data.decode(errors="replace")
        start, self._read = self._read, at + len(text)
        return self.seen[start : self._read]

    def press(self, keys: str) -> None:
        os.write(self._keys, keys.encode())


@asynccontextmanager
async def open_terminal(
    *arguments: str, folder: Path, columns: int = 80, errors: str = "&1", **variables: str
) -> AsyncIterator[Terminal]:
    """The chat in a terminal of this width, with standard error there or in a file."""
    keys, screen = pty.openpty()
    fcntl.ioctl(screen, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    # The first terminal that the leader of a session opens becomes its own, which Ctrl-C needs.
    command = ["sh", "-c", f'exec "$@" <>{os.ttyname(screen)} >&0 2>{errors}', "sh", *CHAT, *arguments]
    process = await trio.lowlevel.open_process(
        command, cwd=folder, env=_environment(**variables), start_new_session=True
    )
    try:
        yield Terminal(process, keys)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
        os.close(keys)
        os.close(screen)


@asynccontextmanager
async def open_pipes(*arguments: str, folder: Path, **variables: str) -> AsyncIterator[trio.Process]:
    """The chat with pipes on all sides."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = await trio.lowlevel.open_process([*CHAT, *arguments], cwd=folder, env=_environment(**variables), **pipes)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream:
                await trio.aclose_forcefully(stream)


async def chat(message: str, *arguments: str, folder: Path, **variables: str) -> Any:
    """What the chat in a pipe makes of a message."""
    return await trio.run_process(
        [*CHAT, *arguments],
        stdin=message.encode(),
        capture_stdout=True,
        capture_stderr=True,
        check=False,
        cwd=folder,
        env=_environment(**variables),
    )
