"""Workers that are stopped, killed and frozen, a Redis that stalls, restarts and forgets: clients check every word.

``python -m tests.chaos --seconds 60 --clients 40 --seed 1``. Three workers, each a process of its own, are behind a
balancer that sends each connection to the next of them; each asks the scripted upstream with a key of its own, so it
is known who ran what. Whatever happens, a task has its whole transcript and one `end`; or, where its worker was lost,
what there was of it and one `error`; or its session is gone, where Redis has forgotten it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import signal
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import attrs
import coredis
import httpx2
import trio
import trio_websocket

from tests import answers
from tests.generations import TOOL, Generation, Script
from tests.harness import PATIENCE
from tests.processes import ServerProcess, server_process
from tests.redis_server import RedisServer, running_redis
from tests.soak import leaves_of
from tests.transcripts import content, joined
from tests.upstream import Request, Upstream, open_upstream

WORKERS = 3
LOST_WITHIN = 10.0
"""Seconds within which a task hears that its worker is lost, as long as there is a Redis to say so."""
LEASE = 5.0
SILENCE = 2.0
"""Seconds after which a client asks whether anybody is there, and then waits for an answer."""
LONGEST_VISIT = 45.0
VARIABLES = {"INFERENCE_RESUME_WINDOW": "100", "INFERENCE_SESSION_TTL": "200"}
BROKEN = (OSError, trio.TooSlowError, trio_websocket.ConnectionClosed, trio_websocket.HandshakeError)


class SessionGoneError(Exception):
    """404."""


@attrs.define(eq=False)
class WorkerProcess:
    """``lost_at`` is when it was killed, or frozen for longer than its lease; ``is_left_alone`` while it is harmed."""

    name: str
    server: ServerProcess
    stack: ExitStack
    lost_at: float | None = None
    is_left_alone: bool = False


@attrs.define(eq=False)
class Town:
    """All there is. ``seen`` are requests of the upstream: which worker made those for which story."""

    redis: RedisServer
    upstream_url: str
    folder: Path
    nursery: trio.Nursery
    script: Script = attrs.field(factory=Script)
    workers: list[WorkerProcess] = attrs.field(factory=list)
    seen: dict[str, set[str]] = attrs.field(factory=dict)
    gone: dict[str, WorkerProcess] = attrs.field(factory=dict)
    redis_was_away: list[float] = attrs.field(factory=list)
    forgot_at: list[float] = attrs.field(factory=list)
    faults: Counter[str] = attrs.field(factory=Counter)
    outcomes: Counter[str] = attrs.field(factory=Counter)
    longest_loss: float = 0.0
    wrong: list[str] = attrs.field(factory=list)
    port: int = 0
    _names: Any = attrs.field(factory=itertools.count)
    _turn: Any = attrs.field(factory=itertools.count)

    def answer(self, request: Request) -> answers.Answer:
        worker = request.headers["authorization"].removeprefix("Bearer ")
        self.seen.setdefault(request.messages[0]["content"], set()).add(worker)
        return self.script.answer(request)

    async def start_worker(self) -> None:
        name = f"worker-{next(self._names)}"
        folder = self.folder / name
        folder.mkdir()
        stack = ExitStack()
        variables = VARIABLES | {"INFERENCE_STORE": self.redis.url, "DEEPSEEK_API_KEY": name}
        process = server_process(folder, self.upstream_url, **variables)
        server = await trio.to_thread.run_sync(stack.enter_context, process)
        async with httpx2.AsyncClient(base_url=server.url) as http:  # when it has answered, all of it is there
            assert (await http.get("/healthz")).status_code == 200
        self.workers.append(WorkerProcess(name, server, stack))

    def lose(self, worker: WorkerProcess) -> None:
        self.gone[worker.name] = worker
        worker.lost_at = trio.current_time()

    def running(self) -> list[WorkerProcess]:
        return [worker for worker in self.workers if not worker.is_left_alone]

    # The balancer

    async def listen(self) -> None:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listeners[0].socket.getsockname()[1]
        self.nursery.start_soon(trio.serve_listeners, self._pass_on, listeners)

    async def _pass_on(self, client: trio.SocketStream) -> None:
        for _ in range(2 * WORKERS):
            worker = self.workers[next(self._turn) % len(self.workers)]
            with suppress(OSError):
                server = await trio.open_tcp_stream("127.0.0.1", worker.server.port)
                break
        else:
            await trio.aclose_forcefully(client)
            return
        async with server, trio.open_nursery() as nursery:
            nursery.start_soon(_pump, client, server, nursery.cancel_scope)
            nursery.start_soon(_pump, server, client, nursery.cancel_scope)


async def _pump(source: trio.SocketStream, target: trio.SocketStream, scope: trio.CancelScope) -> None:
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        while data := await source.receive_some(65_536):
            await target.send_all(data)
    scope.cancel()


# What clients do


def make_story(chance: random.Random, name: str) -> Generation:
    """Up to three rounds of some words each, with calls between them, over some seconds."""
    rounds, told = [], []
    for number in range(count := chance.randint(1, 3)):
        words = [f"{name}.{number}.{word} " for word in range(chance.randint(2, 20))]
        steps = [step for word in words for step in (answers.text(word), answers.sleep(chance.choice((0, 0.02, 0.2))))]
        calls = [] if number + 1 == count else [f"{name}.{number}.{call}" for call in range(chance.randint(1, 2))]
        asked = [answers.tool_call(at, f"call_{number}_{at}", "look", {"call": call}) for at, call in enumerate(calls)]
        rounds.append([(*steps, *asked, answers.finish("tool_calls" if calls else "stop"), answers.done())])
        told += [("text_chunk", word) for word in words]
        told += [("function_call_request", {"call": call}) for call in calls]
    told.append(("end", "".join(words for kind, words in told if kind == "text_chunk")))
    return Generation(name, rounds, list(joined(told)))


@attrs.define(eq=False)
class Visit:
    """One session with one task, whose notifications are ``notes``. Results in ``doubtful`` may have been taken."""

    town: Town
    story: Generation
    chance: random.Random
    session_id: str = ""
    task_id: str | None = None
    notes: list[Any] = attrs.field(factory=list)
    ended_at: float | None = None
    created_at: float = 0.0
    connected_at: float = 0.0
    trail: deque[str] = attrs.field(factory=lambda: deque(maxlen=12))
    _answered: set[str] = attrs.field(factory=set)
    _doubtful: set[str] = attrs.field(factory=set)
    _asked: dict[int, tuple[str, str]] = attrs.field(factory=dict)
    _numbers: Any = attrs.field(factory=lambda: itertools.count(1))

    async def run(self) -> None:
        self.session_id = await self._create()
        while self.ended_at is None:
            try:
                async with self._connected() as socket:
                    await self._attend(socket)
            except* BROKEN as broken:
                for error in leaves_of(broken):
                    self._note(repr(error))
                    if isinstance(error, trio_websocket.ConnectionRejected) and error.status_code != 503:
                        assert error.status_code == 404, error
                        raise SessionGoneError from error
                await trio.sleep(0.1)

    async def _create(self) -> str:
        url = f"http://127.0.0.1:{self.town.port}/create_session"
        while True:
            self.created_at = trio.current_time()
            with suppress(httpx2.TransportError):
                async with httpx2.AsyncClient(timeout=2 * SILENCE, verify=False) as http:
                    response = await http.post(url, json={"tools": [TOOL]})
                if response.status_code == 200:
                    return response.json()["session_id"]
                assert response.status_code == 503, response.text
            await trio.sleep(0.2)

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[Any]:
        stream = await trio.open_tcp_stream("127.0.0.1", self.town.port)
        async with trio.open_nursery() as nursery:
            try:
                with trio.fail_after(2 * SILENCE):
                    path = f"/ws/{self.session_id}?after={len(self.notes)}"
                    socket = await trio_websocket.wrap_client_stream(nursery, stream, "127.0.0.1", path)
                self._note("connected")
                self.connected_at = trio.current_time()
                yield socket
            finally:  # whatever trio-websocket waits for
                stream.socket.close()
                nursery.cancel_scope.cancel()

    async def _hear(self, socket: Any) -> Any:
        while True:
            with trio.move_on_after(SILENCE):
                frame = json.loads(await socket.get_message())
                if frame.get("method") != "draining":
                    return frame
                continue
            with trio.fail_after(SILENCE):
                await socket.ping()

    async def _attend(self, socket: Any) -> None:
        """Until the task has ended, or there is a reason to go to another worker."""
        state = (await self._hear(socket))["params"]
        self._note(f"{state}")
        assert (state["after"], state["gap"]) == (len(self.notes), False), state
        while len(self.notes) < state["latest_seq"]:
            self._take(await self._hear(socket))
        if state["tasks"]:
            (task,) = state["tasks"]
            self._identify(task["task_id"])
        self._asked.clear()
        self._doubtful.clear()
        outstanding = {call for task in state["tasks"] for call in task["outstanding"]}
        assert outstanding <= self._open_calls(), (outstanding, state)
        if self.task_id is None:
            await self._ask(socket, "generate", {"message": self.story.name})
        for call in outstanding:
            await self._answer_call(socket, call)
        while self.ended_at is None:
            frame = await self._hear(socket)
            if "id" in frame:
                await self._take_answer(socket, frame)
            elif self._take(frame):
                await self._answer_call(socket, frame["params"]["request_id"])
            if self.chance.random() < 0.03:
                return

    def _note(self, what: str) -> None:
        self.trail.append(f"{datetime.now(UTC):%H:%M:%S.%f} {what[:150]}")

    def _open_calls(self) -> set[str]:
        asked = {note["params"]["request_id"] for note in self.notes if note["method"] == "function_call_request"}
        return asked - self._answered

    def _identify(self, task_id: str) -> None:
        assert self.task_id in (None, task_id), f"two tasks: {self.task_id}, {task_id}"
        self.task_id = task_id

    def _take(self, frame: Any) -> bool:
        """Whether it is a call."""
        assert "id" not in frame, frame
        assert frame["params"]["seq"] == len(self.notes) + 1, (len(self.notes), frame)
        assert self.ended_at is None, frame
        self._identify(frame["params"]["task_id"])
        self.notes.append(frame)
        if frame["method"] in ("end", "error"):
            self.ended_at = trio.current_time()
        return bool(frame["method"] == "function_call_request")

    async def _ask(self, socket: Any, method: str, params: Any) -> None:
        number = next(self._numbers)
        call = params["results"][0]["tool_call_id"] if method == "tool_result" else ""
        self._asked[number] = method, call
        await socket.send_message(json.dumps({"jsonrpc": "2.0", "id": number, "method": method, "params": params}))

    async def _answer_call(self, socket: Any, call: str) -> None:
        results = [{"tool_call_id": call, "result": call}]
        await self._ask(socket, "tool_result", {"task_id": self.task_id, "results": results})

    async def _take_answer(self, socket: Any, frame: Any) -> None:
        method, call = self._asked.pop(frame["id"])
        if "result" in frame:
            self._answered.add(call)
            self._identify(frame["result"]["task_id"])
            return
        code = frame["error"]["code"]
        self.town.outcomes[f"{method} refused: {code}"] += 1
        if code == -32005:
            await trio.sleep(0.3)
            if method == "generate":
                await self._ask(socket, "generate", {"message": self.story.name})
            else:
                self._doubtful.add(call)
                await self._answer_call(socket, call)
        elif method == "tool_result" and (code == -32004 or call in self._doubtful):
            self._answered.add(call)  # the task has ended, and an end will come; or it was taken
        else:
            raise AssertionError(frame)

    # What must be true of it in the end

    def judge(self) -> str:
        end = self.notes[-1]
        heard = list(joined(map(content, self.notes)))
        said = "".join(words for kind, words in heard if kind == "text_chunk")
        if end["method"] == "end":
            assert heard == self.story.told, (heard, self.story.told)
            return end["params"]["status_message"]
        error = end["params"]["error"]
        if error["code"] == -32005:
            assert (heard, self.town.seen.get(self.story.name)) == ([("error", "")], None), heard
            return "not begun"
        assert error["code"] == -32006, error
        assert error["data"]["reason"] == "worker lost", error
        assert error["data"].get("partial_text", "") == said, (error, said)
        for (kind, words), (kind_told, told) in zip(heard[:-1], self.story.told, strict=False):
            assert kind == kind_told
            assert told.startswith(words) if kind == "text_chunk" else told == words, (words, told)
        self._judge_loss()
        return "worker lost"

    def _judge_loss(self) -> None:
        town, ended_at = self.town, self.ended_at or 0.0
        workers = [town.gone.get(name) for name in town.seen.get(self.story.name, set())]
        assert all(worker and worker.lost_at is not None for worker in workers), "an error of a worker that lives"
        away = [moment for moment in town.redis_was_away if moment <= ended_at]
        since = max([worker.lost_at or 0.0 for worker in workers if worker] + away, default=0.0)
        since = max(since, self.connected_at)  # it may have come from a worker that was frozen itself
        if workers:
            town.longest_loss = max(town.longest_loss, ended_at - since)
            assert ended_at - since <= LOST_WITHIN, f"{ended_at - since:.1f} s until the error"

    def judge_gone(self) -> str:
        assert any(moment >= self.created_at for moment in self.town.forgot_at), "404, and Redis has forgotten nothing"
        return "forgotten with Redis"


async def visit_on(town: Town, number: int, seed: int, until: float) -> None:
    """One session after the other."""
    chance = random.Random(f"{seed} {number}")
    for count in itertools.count():
        await trio.sleep(chance.uniform(0, 1))
        if trio.current_time() > until:
            return
        visit = Visit(town, town.script.add(make_story(chance, f"s{number}.{count}")), chance)
        try:
            with trio.fail_after(LONGEST_VISIT):
                await visit.run()
            town.outcomes[visit.judge()] += 1
        except* SessionGoneError:
            try:
                town.outcomes[visit.judge_gone()] += 1
            except AssertionError as error:
                note_wrong(town, visit, error)
        except* (AssertionError, trio.TooSlowError, KeyError, ValueError) as errors:
            for error in leaves_of(errors):
                note_wrong(town, visit, error)
        asked = town.script.forget(visit.story.name)
        if any(times > 1 for times in asked.values()):
            town.wrong.append(f"{visit.story.name}: asked for twice: {asked}")


def note_wrong(town: Town, visit: Visit, error: BaseException) -> None:
    last = json.dumps(visit.notes[-1])[:200] if visit.notes else "nothing"
    workers = town.seen.get(visit.story.name)
    town.wrong.append(
        f"{visit.story.name} ({visit.session_id[:8]}, {visit.task_id}) at {workers}: {error!r}"[:600] + f"; {last}"
    )
    town.wrong += [f"    {line}" for line in visit.trail]


# What happens to workers and to Redis


async def kill_a_worker(town: Town, chance: random.Random) -> None:
    if len(town.running()) < 2:
        return
    worker = chance.choice(town.running())
    town.workers.remove(worker)
    worker.server.process.send_signal(signal.SIGKILL)
    town.lose(worker)
    worker.stack.close()
    town.nursery.start_soon(town.start_worker)


async def stop_a_worker(town: Town, chance: random.Random) -> None:
    """In good order: it costs no task anything."""
    if len(town.running()) < 2:
        return
    worker = chance.choice(town.running())
    worker.is_left_alone = True
    worker.server.process.send_signal(signal.SIGTERM)

    async def replace() -> None:
        status = await worker.server.ended()
        if status:
            town.wrong.append(f"{worker.name} has ended with {status}")
        town.workers.remove(worker)
        worker.stack.close()
        await town.start_worker()

    town.nursery.start_soon(replace)


async def freeze_a_worker(town: Town, chance: random.Random) -> None:
    if len(town.running()) < 2:
        return
    worker, seconds = chance.choice(town.running()), chance.choice((0.5, 3, 7, 9))
    worker.is_left_alone = True
    worker.server.process.send_signal(signal.SIGSTOP)
    if seconds > LEASE - 2:
        town.lose(worker)

    async def thaw() -> None:
        await trio.sleep(seconds)
        worker.server.process.send_signal(signal.SIGCONT)
        worker.is_left_alone = False

    town.nursery.start_soon(thaw)


async def stall_redis(town: Town, chance: random.Random) -> None:
    town.redis.pause()
    await trio.sleep(chance.uniform(1, 8))
    town.redis.go_on()


async def restart_redis(town: Town, _: random.Random) -> None:
    await trio.to_thread.run_sync(town.redis.restart)


async def forget(town: Town, _: random.Random) -> None:
    town.forgot_at.append(math.inf)  # until it is over
    await trio.to_thread.run_sync(town.redis.forget)
    town.forgot_at[-1] = trio.current_time()


async def cut_all_lines_to_redis(town: Town, _: random.Random) -> None:
    town.redis.ask("CLIENT", "KILL", "TYPE", "normal")


Fault = Callable[[Town, random.Random], Awaitable[None]]
FAULTS: dict[Fault, int] = {
    kill_a_worker: 4,
    stop_a_worker: 3,
    freeze_a_worker: 3,
    stall_redis: 2,
    restart_redis: 2,
    forget: 1,
    cut_all_lines_to_redis: 2,
}
OF_REDIS = (stall_redis, restart_redis, forget, cut_all_lines_to_redis)


async def do_harm(town: Town, seed: int, until: float) -> None:
    chance = random.Random(seed)
    while trio.current_time() < until:
        await trio.sleep(chance.uniform(0, 5))
        (fault,) = chance.choices(list(FAULTS), list(FAULTS.values()))
        town.faults[fault.__name__] += 1
        await fault(town, chance)
        if fault in OF_REDIS:
            town.redis_was_away.append(trio.current_time())


# The whole


async def check_what_is_left(town: Town) -> None:
    """In Redis nothing but what expires by itself: no task, no connection, nobody's lease but of those that live."""
    async with coredis.Redis.from_url(town.redis.url, decode_responses=True) as client:
        with trio.move_on_after(PATIENCE):
            while (left := await _left_in_redis(client)) and any("expire" not in line for line in left):  # noqa: ASYNC110
                await trio.sleep(0.2)
        town.wrong += left


async def _left_in_redis(client: Any) -> list[str]:
    left, leases = [], 0
    async for key in client.scan_iter():
        kind = key.split(":")
        if key != "{inference}" and await client.pttl(key) < 0:
            left.append(f"{key} does not expire")
        if ":held:" in key or kind[-1] == "tasks":
            left += [f"{key} has {entry}" for entry in await client.hgetall(key)]
        elif kind[-1] == "counts":
            left += [f"{key} counts {name}: {n}" for name, n in (await client.hgetall(key)).items() if int(n)]
        elif kind[-1] == "leases":
            leases = max(leases, await client.zcard(key))
    if leases != WORKERS:
        left.append(f"{leases} leases")
    return left


def holdings(town: Town, upstream: Upstream) -> Counter[str]:
    """Threads, descriptors and Trio tasks by name, of all workers together.

    Without what they keep open on purpose: lines to Redis, with coredis's tasks, and idle ones to the upstream.
    """
    to_redis = town.redis.ask("CLIENT", "LIST").count(b" addr=") - 1
    to_upstream = sum(not connection.closed.is_set() for connection in upstream.connections)
    held = Counter(descriptors=-to_redis - to_upstream)
    for server in (worker.server for worker in town.workers):
        now = server.holdings()
        held.update(threads=now.threads, descriptors=now.descriptors)
        held.update({name: n for name, n in server.tasks().items() if not name.startswith("coredis.")})
    return held


async def check_workers(town: Town, upstream: Upstream, at_first: Counter[str]) -> None:
    """They hold no more than workers that were only just started."""
    with trio.move_on_after(PATIENCE):
        while not (now := holdings(town, upstream)) <= at_first:  # noqa: ASYNC110
            await trio.sleep(0.2)
    if not now <= at_first:
        town.wrong.append(f"workers have {dict(now - at_first)} more than at first")
    for worker in town.workers:
        console = worker.server.console.read_text()
        town.wrong += [f"{worker.name}: {line}" for line in console.splitlines() if "defect" in line]


async def run(redis: RedisServer, folder: Path, seconds: float, clients: int, seed: int) -> Town:
    async with AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(open_upstream())
        nursery = await stack.enter_async_context(trio.open_nursery())
        town = Town(redis, upstream.base_url, folder, nursery)
        upstream.script(town.answer)
        try:
            async with trio.open_nursery() as starting:
                for _ in range(WORKERS):
                    starting.start_soon(town.start_worker)
            await town.listen()
            at_first = holdings(town, upstream)
            until = trio.current_time() + seconds
            async with trio.open_nursery() as visiting:
                visiting.start_soon(do_harm, town, seed, until)
                for number in range(clients):
                    visiting.start_soon(visit_on, town, number, seed, until)
            with trio.fail_after(PATIENCE):
                while len(town.running()) < WORKERS:  # noqa: ASYNC110
                    await trio.sleep(0.1)
            await check_what_is_left(town)
            await check_workers(town, upstream, at_first)
        finally:
            for worker in town.workers:
                worker.stack.close()
        nursery.cancel_scope.cancel()
    return town


def chaos(redis: RedisServer, seconds: float, clients: int, seed: int) -> list[str]:
    """What was wrong."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        town = trio.run(run, redis, Path(folder), seconds, clients, seed)
        consoles = {path.parent.name: path.read_text() for path in Path(folder).glob("*/console")}
    print(f"{seconds:g} s with {clients} clients, seed {seed}; {time.monotonic() - began:.0f} s in all")
    print(f"happened {dict(town.faults)}")
    print(f"came of it {dict(sorted(town.outcomes.items()))}; {town.longest_loss:.1f} s at most until a loss was told")
    for line in town.wrong:
        print(f"  {line}")
    if town.wrong:
        for name, console in consoles.items():
            Path(f"/tmp/chaos-{seed}-{name}").write_text(console)
    return town.wrong


def main() -> None:
    parser = argparse.ArgumentParser("tests.chaos", description="Harms workers and Redis while clients check.")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runs", type=int, default=1, help="with one seed after the other (default: 1)")
    options = parser.parse_args()
    wrong = []
    for seed in range(options.seed, options.seed + options.runs):
        with running_redis() as redis:
            wrong += chaos(redis, options.seconds, options.clients, seed)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
