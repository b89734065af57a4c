"""The servers that are compared: how each is installed and started, and what it uses by the system's account.

The server under test has the first core to itself; all else is on the others.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from benchmarks.clients import Client, LangServeClient, LiteLlmClient, WebSocketClient, request

ROOT = Path(__file__).parent.parent
REFERENCE = "benchmarks.reference"
_ENVIRONMENTS = Path(tempfile.gettempdir()) / "inference-trio-benchmarks"
_SAME = [f"{package}=={version(package)}" for package in ("langchain-openai", "langchain-core", "openai")]
_CORES = sorted(os.sched_getaffinity(0))
SERVER_CORES, OTHER_CORES = set(_CORES[:1]), set(_CORES[1:] or _CORES)


@dataclass(frozen=True)
class Kind:
    """``command`` is split at spaces; ``{bin}`` is its environment's, ``{port}`` the port. ``packages`` go into it.

    ``shown`` are the packages whose versions say what was measured.
    """

    name: str
    title: str
    command: str
    client: type[WebSocketClient | LiteLlmClient | LangServeClient]
    ready: str
    shown: tuple[str, ...]
    packages: tuple[str, ...] = ()

    @property
    def bin(self) -> Path:
        return _ENVIRONMENTS / self.name / "bin" if self.packages else Path(sys.executable).parent

    def versions(self) -> str:
        code = "import sys, importlib.metadata as m; print(*(f'{p} {m.version(p)}' for p in sys.argv[1:]), sep=', ')"
        return subprocess.check_output([self.bin / "python", "-c", code, *self.shown], text=True).strip()


OURS = Kind(
    "ours",
    "inference_trio",
    "{bin}/python -m inference_trio serve --port {port}",
    WebSocketClient,
    "/readyz",
    ("trio", "quart", "hypercorn", "langchain-openai", "openai", "httpx2"),
)
USUAL = Kind(
    "reference",
    "Starlette, uvicorn, astream()",
    f"{{bin}}/python -m uvicorn {REFERENCE}.app:app --port {{port}} --log-level warning",
    WebSocketClient,
    "/healthz",
    ("starlette", "uvicorn", "uvloop", "langchain-openai", "openai"),
    ("starlette", "uvicorn[standard]", *_SAME),
)
FLOOR = Kind(
    "floor",
    "bare Trio, httpx2, Hypercorn",
    f"{{bin}}/python -m hypercorn {REFERENCE}.floor:app --worker-class trio --bind 127.0.0.1:{{port}}",
    WebSocketClient,
    "/",
    ("trio", "httpx2", "hypercorn"),
)
LITELLM = Kind(
    "litellm",
    "LiteLLM proxy",
    "{bin}/litellm --config benchmarks/reference/litellm.yaml --host 127.0.0.1 --port {port}",
    LiteLlmClient,
    "/health/liveliness",
    ("litellm", "uvicorn"),
    ("litellm[proxy]",),
)
LANGSERVE = Kind(
    "langserve",
    "LangServe",
    f"{{bin}}/python -m uvicorn {REFERENCE}.langserve_app:app --port {{port}} --log-level warning",
    LangServeClient,
    "/openapi.json",
    ("langserve", "uvicorn", "langchain-openai"),
    ("langserve[server]", "uvicorn[standard]", *_SAME),
)
KINDS = (OURS, USUAL, LITELLM, LANGSERVE, FLOOR)


def install(kind: Kind) -> bool:
    """Make its environment. Where that fails, a loud line says so."""
    if not kind.packages or (kind.bin / "python").exists():
        return True
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    steps: tuple[list[str | Path], ...] = (
        ["uv", "venv", "--quiet", "--clear", "--python", python, kind.bin.parent],
        ["uv", "pip", "install", "--quiet", "--python", kind.bin / "python", *kind.packages],
    )
    try:
        for step in steps:
            subprocess.run(step, check=True, timeout=300)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"!!! {kind.title} IS LEFT OUT: it cannot be installed ({error})", flush=True)
        return False
    return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Server:
    """A running server of one kind. ``start_seconds``: from the start of its process until it was ready."""

    kind: Kind
    port: int
    process: subprocess.Popen[bytes]
    start_seconds: float = 0.0

    async def open(self) -> Client:
        return await self.kind.client.open(self.port)

    def cpu(self) -> float:
        """Seconds of CPU that all its processes have used."""
        return sum(map(cpu_of, self._pids()))

    def memory(self, field: str = "VmRSS") -> float:
        """MB of all its processes: ``VmRSS``, or ``VmHWM`` for the peak since `forget_peak`."""
        return sum(_status(pid, field) for pid in self._pids()) / 1024

    def forget_peak(self) -> None:
        for pid in self._pids():
            Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")  # see proc(5)

    def pause(self) -> None:
        """Stop its processes where they stand."""
        for pid in self._pids():
            os.kill(pid, signal.SIGSTOP)

    @contextmanager
    def awake(self) -> Iterator[None]:
        for pid in self._pids():
            os.kill(pid, signal.SIGCONT)
        yield
        self.pause()

    def _pids(self) -> list[int]:
        found = [self.process.pid]
        for pid in found:
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                found += map(int, children.read_text(encoding="ascii").split())
        return found


def cpu_of(pid: int) -> float:
    """Seconds of CPU that a process has used; see clock_getcpuclockid(3)."""
    return time.clock_gettime((~pid << 3) | 2)


def _status(pid: int, field: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


@contextmanager
def running(command: list[str], cores: set[int], **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process on these cores; it is ended with the block."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            stdout=log,
            stderr=log,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        try:
            yield process
        finally:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()
            if process.returncode not in (0, -signal.SIGKILL):
                log.seek(0)
                print(log.read().decode(errors="replace")[-2000:], flush=True)


async def wait_until_ready(port: int, path: str, process: subprocess.Popen[bytes], limit: float = 120.0) -> None:
    """Raises TimeoutError, or ConnectionError where the process has ended."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ConnectionError(f"the process has ended with status {process.returncode}")
        try:
            await request(port, "GET", path)
        except ConnectionError as error:
            if " 404 " in str(error):
                return
        except (OSError, asyncio.IncompleteReadError):
            pass
        else:
            return
        await asyncio.sleep(0.02)
    raise TimeoutError(f"not ready within {limit:g} s")


@contextmanager
def upstream(port: int) -> Iterator[subprocess.Popen[bytes]]:
    with running([sys.executable, "-m", "benchmarks.upstream", str(port)], OTHER_CORES) as process:
        yield process


@contextmanager
def server(kind: Kind, upstream_port: int, **settings: str) -> Iterator[Server]:
    """Started, but perhaps not ready yet. ``settings`` are further variables of its environment."""
    port = free_port()
    command = kind.command.format(bin=kind.bin, port=port).split(" ")
    environment = {
        "LLM_BASE_URL": f"http://127.0.0.1:{upstream_port}/v1",
        "LLM_MODEL_NAME": "mock",
        "API_KEY_ENV_VAR": "BENCHMARK_KEY",
        "BENCHMARK_KEY": "sk-of-the-benchmark",
        "INFERENCE_MAX_TASKS": "4000",
        "INFERENCE_LOG_FILE": "",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
    }
    with running(command, SERVER_CORES, **environment, **settings) as process:
        yield Server(kind, port, process)
