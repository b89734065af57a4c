"""Several workers of one command: one that ends is replaced, all stop together, and none is left behind."""

from __future__ import annotations

import math
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
import trio_websocket
from hypercorn.config import Config

from inference_trio import workers
from inference_trio.access import Access
from inference_trio.server import Service
from inference_trio.variables import Secret
from inference_trio.workers import LASTING, LONGEST_PAUSE, SHORTEST_PAUSE, Workers, pause_after
from tests import answers
from tests.harness import KEY, PATIENCE, Client, Server, open_server, reaching, settings
from tests.processes import HYPERCORN, SERVE, ServerProcess, reserved_port, server_process
from tests.redis_server import RedisServer, running_redis
from tests.test_drain import close_code
from tests.test_main import SERVE as SERVE_COMMAND
from tests.test_main import run
from tests.test_metrics import scrape
from tests.test_workers import check_the_error, check_what_is_kept
from tests.upstream import Upstream, open_upstream

TWO = ("--workers", "2")
MOST_CLIENTS = 200
"""Within these there is one at each of two workers: the system decides which of them gets whom."""

HALF = (answers.text("Hel"), answers.pause("go on"), answers.reply("lo"))
WHOLE = (answers.text("Hello"), answers.finish(), answers.done())


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(PATIENCE):
        while not condition():  # noqa: ASYNC110 (nothing tells us)
            await trio.sleep(0.01)


def state(pid: int) -> str:
    """Of a process: ``T`` where it is stopped, ``Z`` or nothing where it has ended."""
    try:
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""


def is_alive(pid: int) -> bool:
    return state(pid) not in ("", "Z")


# The rules, with workers of a line of shell, in which $4 is the number

LIVE = "trap 'exit 2' TERM; printf http://here >&0; read nothing"
"""Says where it serves, and stops when nothing more can come from its parent."""

READY = re.compile(r"worker (\d) is ready: pid (\d+)")


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as bound:
        yield bound


@pytest.fixture
def two(tmp_path: Path, listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Workers]:
    def make(script: str) -> Workers:
        program = tmp_path / "worker"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))
        return Workers(listener, 2, drain_seconds=0.0)

    return make


async def ended(it: Workers) -> int:
    with trio.fail_after(PATIENCE):
        return await it.run()


@asynccontextmanager
async def running(
    it: Workers, caplog: pytest.LogCaptureFixture, from_when: int = 2
) -> AsyncIterator[Callable[[], list[tuple[str, str]]]]:
    """From when so many are ready, until all have ended. Gives which were ready so far, with their process's id."""
    caplog.set_level("INFO")

    def ready() -> list[tuple[str, str]]:
        return READY.findall("\n".join(caplog.messages))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ended, it)
        await until(lambda: len(ready()) == from_when)
        yield ready
        it._stop()


@pytest.mark.parametrize(
    ("script", "status", "said"),
    [
        ("exit 3", 3, []),
        (f"[ $4 = 2 ] && exit 2; {LIVE}", 2, []),
        (f"[ $4 = 2 ] && exit 0; {LIVE}", 1, ["worker 2 has ended with status 0, before all were ready"]),
        ("kill -9 $$", 1, ["worker 1 was ended by signal 9 (Killed), before all were ready"]),
    ],
)
async def test_what_does_not_start_ends_all_and_says_so_once(
    two: Callable[[str], Workers], script: str, status: int, said: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert await ended(two(script)) == status
    assert caplog.messages == said


@pytest.mark.parametrize(("is_looked_at", "status"), [(True, 4), (False, 5)])
async def test_a_worker_looks_for_modules_in_the_working_directory_where_its_parent_does(
    two: Callable[[str], Workers], tmp_path: Path, is_looked_at: bool, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if is_looked_at:
        monkeypatch.syspath_prepend(tmp_path)
    assert await ended(two('[ "$1" = -m ] && exit 4; [ "$1 $2" = "-P -m" ] && exit 5')) == status


async def test_workers_that_cannot_be_started_at_all_end_it(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere")
    assert await ended(Workers(listener, 2, drain_seconds=0.0)) == 1
    assert [line.partition(" (")[0] for line in caplog.messages] == ["worker 1 cannot be started"]


@pytest.mark.parametrize(
    ("by", "how"),
    [(signal.SIGKILL, "was ended by signal 9 (Killed)"), (signal.SIGTERM, "has ended with status 2")],
)
async def test_a_worker_that_ends_later_is_replaced_whatever_it_ended_with(
    two: Callable[[str], Workers],
    by: signal.Signals,
    how: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(workers, "SHORTEST_PAUSE", 0.0)
    async with running(two(LIVE), caplog) as ready:
        os.kill(int(ready()[1][1]), by)
        await until(lambda: len(ready()) == 3)
    assert [number for number, _ in ready()] == ["1", "2", "2"]
    assert f"worker 2 {how}: another one begins in 0.0 s" in caplog.messages
    assert capsys.readouterr().out == "inference_trio serves at http://here, until Ctrl-C\n"


async def test_a_stop_does_not_wait_for_a_worker_that_is_still_to_begin(
    two: Callable[[str], Workers], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(workers, "SHORTEST_PAUSE", 10 * PATIENCE)
    async with running(two(LIVE), caplog) as ready:
        os.kill(int(ready()[1][1]), signal.SIGKILL)
        await until(lambda: "another one begins" in caplog.messages[-1])


async def test_a_stop_does_not_wait_for_a_worker_that_is_not_ready_yet(
    two: Callable[[str], Workers], caplog: pytest.LogCaptureFixture
) -> None:
    async with running(two(f"[ $4 = 2 ] && exec sleep 1000; {LIVE}"), caplog, from_when=1):
        pass
    assert len(caplog.messages) == 1


async def test_the_first_signal_stops_all_and_the_second_one_kills_them(
    two: Callable[[str], Workers], caplog: pytest.LogCaptureFixture
) -> None:
    async with running(two(f"{LIVE}; kill -STOP $$"), caplog) as ready:
        pids = [int(pid) for _, pid in ready()]
        assert [os.getsid(pid) for pid in pids] == pids, "or Ctrl-C in a terminal would reach them"
        os.kill(os.getpid(), signal.SIGINT)
        await until(lambda: all(state(pid) == "T" for pid in pids))
        os.kill(os.getpid(), signal.SIGTERM)
        await until(lambda: not any(map(is_alive, pids)))


async def test_a_worker_that_does_not_end_is_killed(
    two: Callable[[str], Workers], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(workers, "MARGIN", 0.0)
    monkeypatch.setattr(workers, "GRACE", 0.0)
    async with running(two(f"{LIVE}; kill -STOP $$"), caplog):
        pass
    assert caplog.messages[-1] == "workers that do not end are killed"


def test_what_does_not_last_is_replaced_later_and_later() -> None:
    pauses = [0.0]
    for lived in (LASTING / 2, -math.inf, 0.0, 1.0, 2.0, 3.0, 4.0):
        pauses.append(pause_after(lived, pauses[-1]))
    assert pauses[1:] == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0]
    assert pause_after(LASTING / 2, LONGEST_PAUSE) == LONGEST_PAUSE
    assert pause_after(LASTING, LONGEST_PAUSE) == SHORTEST_PAUSE


# The command


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with running_redis() as server:
        yield server


@contextmanager
def two_ports() -> Iterator[int]:
    """The first of two that are free, one after the other."""
    for _ in range(100):
        with reserved_port() as first, socket.socket() as second:
            second.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                second.bind(("127.0.0.1", first + 1))
            except OSError:
                continue
            yield first
            return
    raise AssertionError("no two ports are free")


@attrs.frozen(eq=False)
class Pair:
    """``each`` is where the metrics of worker 1 and 2 are."""

    process: ServerProcess
    server: Server
    each: tuple[Server, Server]
    upstream: Upstream

    def console(self) -> str:
        return self.process.console.read_text()

    async def pids(self, count: int = 2) -> list[int]:
        """Of the workers, in the order in which so many of them were ready."""

        def ready() -> list[tuple[str, str]]:
            return READY.findall(self.console())

        await until(lambda: len(ready()) >= count)
        return [int(pid) for _, pid in ready()]

    async def connections(self) -> list[float]:
        return [(await scrape(server))["inference_connections",] for server in self.each]

    @asynccontextmanager
    async def generating_at_both(self) -> AsyncIterator[list[Client]]:
        """Clients whose generations have begun, and go on when they are let; both workers have some of them."""
        async with AsyncExitStack() as stack:
            clients: list[Client] = []
            while 0 in await self.connections():
                assert len(clients) < MOST_CLIENTS
                clients.append(await stack.enter_async_context(self.server.client()))
                await clients[-1].generate()
                assert (await clients[-1].hear())["params"]["chunk"] == "Hel"
            yield clients

    async def ends_in_order(self, clients: list[Client]) -> None:
        """Clients are told, get the rest, and no worker is left behind."""
        for client in clients:
            assert (await client.hear())["method"] == "draining"
            assert (await client.call("generate", {"message": "more"}))["code"] == -32005
        self.upstream.gate("go on").set()
        for client in clients:
            assert (await client.until_end())[-1]["params"]["final_text"] == "Hello"
            assert await close_code(client) == 1012
        pids = await self.pids()
        await until(lambda: not any(map(is_alive, pids)))


@asynccontextmanager
async def pair(folder: Path, redis: RedisServer) -> AsyncIterator[Pair]:
    variables = {"INFERENCE_STORE": redis.url, "INFERENCE_DRAIN_SECONDS": "3600"}
    async with AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(open_upstream(lambda _: HALF))
        port = stack.enter_context(two_ports())
        variables |= {"INFERENCE_METRICS_PORT": str(port), "INFERENCE_LOG_FILE": str(folder / "a.log")}
        server = stack.enter_context(server_process(folder, upstream.base_url, command=(*SERVE, *TWO), **variables))
        each = [
            await stack.enter_async_context(reaching(url))
            for url in (server.url, f"http://127.0.0.1:{port}", f"http://127.0.0.1:{port + 1}")
        ]
        yield Pair(server, each[0], (each[1], each[2]), upstream)


async def test_a_worker_that_is_killed_costs_its_task_one_error_and_soon_there_are_two_again(
    tmp_path: Path, redis: RedisServer
) -> None:
    async with pair(tmp_path, redis) as it, it.server.client() as client:
        await client.generate()
        assert (await client.hear())["params"]["chunk"] == "Hel"
        victim = (await it.connections()).index(1)
        os.kill((await it.pids())[victim], signal.SIGKILL)
        with pytest.raises(trio_websocket.ConnectionClosed):
            await client.socket.get_message()
        async with it.server.connect(client.session_id, "?after=1") as again:
            assert (await again.hear())["method"] == "resumed"
            await check_the_error(again, heard=1)
            it.upstream.script(WHOLE)
            assert (await again.ask_model())["final_text"] == "Hello"
        await check_what_is_kept(it.server, client.session_id)
        await it.pids(3)
        assert f"worker {victim + 1} was ended by signal 9 (Killed): another one begins in " in it.console()
        it.upstream.script(lambda _: HALF)
        async with it.generating_at_both() as clients:
            it.process.tell_all(signal.SIGINT)
            await it.ends_in_order(clients)
        assert await it.process.ended() == 0
    assert "worker 1 is ready" in (tmp_path / "a.log").read_text()
    for number in (1, 2):
        assert f" worker={number}" in (tmp_path / f"a-{number}.log").read_text()


async def test_workers_whose_parent_is_killed_let_run_what_runs_and_end(tmp_path: Path, redis: RedisServer) -> None:
    async with pair(tmp_path, redis) as it, it.generating_at_both() as clients:
        it.process.process.kill()
        await it.ends_in_order(clients)


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"INFERENCE_MAX_TASKS": "many"}, "INFERENCE_MAX_TASKS"),
        ({"LLM_PROVIDER": "nonesuch", "LLM_MODEL_NAME": "m"}, "nonesuch"),
        ({"INFERENCE_STORE": "memory://"}, "2 workers"),
        ({"INFERENCE_METRICS_PORT": "65535"}, "65534"),
    ],
)
def test_wrong_settings_end_all_with_one_line(
    tmp_path: Path, redis: RedisServer, variables: dict[str, str], named: str
) -> None:
    variables = {"DEEPSEEK_API_KEY": KEY, "INFERENCE_STORE": redis.url} | variables
    ended = run([*SERVE_COMMAND, "--port", "0", *TWO], tmp_path, **variables)
    assert (ended.returncode, ended.stdout, len(ended.stderr.splitlines())) == (2, "", 1), ended.stderr
    assert named in ended.stderr


def test_a_port_that_is_taken_is_one_line(tmp_path: Path, listener: socket.socket, redis: RedisServer) -> None:
    port = str(listener.getsockname()[1])
    ended = run([*SERVE_COMMAND, "--port", port, *TWO], tmp_path, DEEPSEEK_API_KEY=KEY, INFERENCE_STORE=redis.url)
    assert (ended.returncode, len(ended.stderr.splitlines())) == (1, 1)
    assert f"cannot serve on 127.0.0.1:{port}" in ended.stderr


def test_a_port_for_metrics_that_is_taken_is_one_line(
    tmp_path: Path, listener: socket.socket, redis: RedisServer
) -> None:
    port = str(listener.getsockname()[1])
    variables = {"INFERENCE_STORE": redis.url, "INFERENCE_METRICS_PORT": port, "INFERENCE_LOG_LEVEL": "ERROR"}
    ended = run([*SERVE_COMMAND, "--port", "0", *TWO], tmp_path, DEEPSEEK_API_KEY=KEY, **variables)
    assert (ended.returncode, ended.stdout, len(ended.stderr.splitlines())) == (1, "", 1), ended.stderr
    assert f"worker 1: INFERENCE_METRICS_PORT: 127.0.0.1:{port} cannot be had" in ended.stderr


# One of several


@pytest.mark.parametrize(("worker", "status"), [(None, 200), (2, 404)])
async def test_the_port_that_all_share_has_no_metrics(worker: int | None, status: int) -> None:
    async with open_server(settings("http://127.0.0.1:1", worker=worker)) as server:
        response = await server.get("/metrics")
    assert response.status_code == status
    assert ("INFERENCE_METRICS_PORT" in response.text) == (worker is not None)


def test_what_one_of_several_has_to_itself() -> None:
    alone = settings("http://127.0.0.1:1", metrics_port=9100, log_file=Path("logs/a.log"))
    third = alone.for_worker(3)
    assert (third.worker, third.metrics_port, third.log_file) == (3, 9102, Path("logs/a-3.log"))
    without = settings("http://127.0.0.1:1", log_file=None).for_worker(3)
    assert (without.metrics_port, without.log_file) == (None, None)


# Hypercorn's command


def workers_of_hypercorn(parent: str) -> list[int]:
    pids = Path("/proc", parent, "task", parent, "children").read_text().split()
    return [int(pid) for pid in pids if "spawn_main" in Path("/proc", pid, "cmdline").read_text()]


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


async def test_hypercorns_workers_share_their_sessions_and_say_that_they_end_together(
    tmp_path: Path, redis: RedisServer
) -> None:
    async with open_upstream(WHOLE) as upstream:
        with server_process(tmp_path, upstream.base_url, command=(*HYPERCORN, *TWO), INFERENCE_STORE=redis.url) as it:
            async with reaching(it.url) as server:
                one, other = workers_of_hypercorn(str(it.process.pid))
                with frozen(one):
                    session_id = await server.create_session()
                with frozen(other):
                    async with reaching(it.url) as afresh, afresh.connect(session_id) as client:
                        assert (await client.ask_model())["final_text"] == "Hello"
                assert (await server.get("/metrics")).status_code == 404
            it.process.send_signal(signal.SIGTERM)
            assert await it.ended() == 0
    lines = [line for line in it.console.read_text().splitlines() if " WARNING " in line]
    assert len(lines) == 2, "one of each worker"
    assert all("inference-trio serve --workers would start another one" in line for line in lines)


def test_nobody_is_kept_waiting_before_a_worker_is_ready() -> None:
    """A balancer that is refused goes to another server; one that waits holds up its client for seconds."""
    with workers._bound("127.0.0.1:0") as taken, pytest.raises(ConnectionRefusedError):
        socket.create_connection(taken.getsockname())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, "in memory"),
        ({"store": Secret("redis://redis"), "metrics_port": 9100}, "`inference-trio serve --workers 3`"),
    ],
)
def test_what_hypercorns_workers_cannot_do_is_refused(
    changes: dict[str, Any], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    service = Service(settings("http://127.0.0.1:1", **changes), None, Access.of(settings("http://127.0.0.1:1")))  # type: ignore[arg-type]
    config = Config()
    config.workers = 3
    with pytest.raises(SystemExit) as ended:
        service.before_start(config)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert named in said
