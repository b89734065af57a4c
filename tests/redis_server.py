"""A real Redis server on a free port of the loopback interface, that a test may stop, pause and start again."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs
import pytest

from tests.processes import reserved_port

STARTS_WITHIN = 20.0
"""Seconds."""


@attrs.define(eq=False)
class RedisServer:
    """``keeps``: whether it comes back with what it had."""

    folder: Path
    port: int
    options: tuple[str, ...] = ()
    _process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        command += ["--save", "", "--appendonly", "yes", "--appendfsync", "no", *self.options]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + STARTS_WITHIN
        while self.ask("PING") != b"+PONG\r\n":
            assert time.monotonic() < deadline, "Redis did not start"
            assert self._process.poll() is None, "Redis has ended"

    def ask(self, *command: str) -> bytes:
        """The reply to a command, as it is sent: its first 64 KB."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as stream:
                stream.sendall(" ".join(command).encode() + b"\r\n")
                return stream.recv(65536)
        except OSError:
            return b""

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()

    def forget(self) -> None:
        """Starts again with nothing."""
        self.kill()
        shutil.rmtree(self.folder / "appendonlydir", ignore_errors=True)
        self.start()

    def restart(self) -> None:
        """Starts again with what it had."""
        assert self._process
        self._process.terminate()
        self._process.wait()
        self.start()

    def _signal(self, number: signal.Signals) -> None:
        assert self._process
        os.kill(self._process.pid, number)


@contextmanager
def running_redis(*options: str) -> Iterator[RedisServer]:
    if not shutil.which("redis-server"):
        missing = "redis-server is not installed: what keeps sessions in Redis IS NOT TESTED"
        if os.environ.get("TESTS_NEED_EVERYTHING"):
            pytest.fail(missing)
        pytest.skip(missing)
    with reserved_port() as port, tempfile.TemporaryDirectory() as folder:
        server = RedisServer(Path(folder), port, options)
        try:
            server.start()
            yield server
        finally:
            server.kill()
