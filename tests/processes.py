"""The server as a process of its own, seen from outside: what it holds, and what it is asked by raw sockets."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import attrs
import httpx2
import trio

from tests.harness import KEY, PATIENCE, Server

MEGABYTE = 2**20
SERVE = ("serve", "--port", "0")
HYPERCORN = ("inference_trio.app:app", "--worker-class", "trio", "--bind", "127.0.0.1:{port}")
WITHOUT_WORKERS = (*HYPERCORN, "--workers", "0")
OURS = ("LLM_", "INFERENCE_", "API_KEY_ENV_VAR", "DEEPSEEK_", "OPENAI_", "LANG")


@attrs.frozen
class Holdings:
    """What a process holds; ``peak`` is the most memory since it was last asked to forget that."""

    resident: int
    peak: int
    descriptors: int
    threads: int
    tasks: int

    def covers(self, now: Holdings) -> bool:
        """Whether there is nothing more now than there was, memory aside."""
        return now.descriptors <= self.descriptors and now.threads <= self.threads and now.tasks <= self.tasks


@attrs.frozen(eq=False)
class ServerProcess:
    process: subprocess.Popen[str]
    url: str
    console: Path

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def holdings(self) -> Holdings:
        folder = Path("/proc", str(self.process.pid))
        status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
        return Holdings(
            resident=_bytes(status["VmRSS"]),
            peak=_bytes(status["VmHWM"]),
            descriptors=len(list((folder / "fd").iterdir())),
            threads=int(status["Threads"]),
            tasks=self.tasks().total(),
        )

    def forget_the_peak(self) -> None:
        Path("/proc", str(self.process.pid), "clear_refs").write_text("5")

    def blocks(self) -> int:
        """Blocks of memory in use for Python's objects; before it counts, the process gives back what is free."""
        return int(self._ask(signal.SIGUSR2))

    def tasks(self) -> Counter[str]:
        """The Trio tasks that there are, by name."""
        return Counter(json.loads(self._ask(signal.SIGUSR1)))

    def _ask(self, number: signal.Signals) -> str:
        assert self.process.stdout
        self.process.send_signal(number)
        return self.process.stdout.readline()

    async def wait_for(self, condition: Callable[[Holdings], bool], what: str) -> Holdings:
        """What the process holds, once this is true of it."""
        with trio.move_on_after(PATIENCE):
            while not condition(now := self.holdings()):  # noqa: ASYNC110 (nothing tells us)
                await trio.sleep(0.02)
            return now
        raise AssertionError(f"{what}: {now}; {self.console.read_text()[-2000:]}")

    def tell_all(self, number: signal.Signals) -> None:
        """To it and its workers: Ctrl-C in a terminal, or a manager of services that wants to be sure."""
        os.killpg(self.process.pid, number)

    async def ended(self) -> int:
        """The exit status, when the process has ended by itself."""
        with trio.fail_after(PATIENCE):
            while (status := self.process.poll()) is None:  # noqa: ASYNC110
                await trio.sleep(0.01)
        return status


def _bytes(kilobytes: str) -> int:
    return int(kilobytes.removesuffix(" kB")) * 1024


def environment(**variables: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    return inherited | {"DEEPSEEK_API_KEY": KEY, "INFERENCE_LOG_FILE": ""} | variables


@contextmanager
def server_process(
    folder: Path,
    upstream_url: str,
    limits: dict[str, float] | None = None,
    command: tuple[str, ...] = SERVE,
    **variables: str,
) -> Iterator[ServerProcess]:
    """A server that is ready, and is killed at the end if it is still there."""
    console = folder / "console"
    with reserved_port() as port, console.open("w") as stderr:
        arguments = [part.format(port=port) for part in command]
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.launch", json.dumps(limits or {}), *arguments],
            cwd=Path(__file__).parent.parent,
            env=environment(LLM_BASE_URL=upstream_url, **variables),
            text=True,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=stderr,
        )
        try:
            yield ServerProcess(process, _address(process, command, port), console)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def _address(process: subprocess.Popen[str], command: tuple[str, ...], port: int) -> str:
    """Where the server is, once it is ready."""
    if command[0] == "serve":
        assert process.stdout
        return process.stdout.readline().split(",")[0].split()[-1]
    url = f"http://127.0.0.1:{port}"
    with httpx2.Client(verify=False) as http:
        while process.poll() is None:
            with suppress(httpx2.TransportError):
                if http.get(f"{url}/readyz").status_code == 200:
                    return url
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.05)
    raise AssertionError("the server has ended before it was ready")


@contextmanager
def reserved_port() -> Iterator[int]:
    """A port that is given to nobody who asks for any, and where whoever asks for it can listen."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def as_server(process: ServerProcess, http: httpx2.AsyncClient) -> Server:
    return Server(process.url, http, trio.Event())
