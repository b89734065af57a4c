"""A server that is used well and badly for some time: then nothing may be lost, doubled or left behind.

``python -m tests.soak --minutes 5 --sessions 300 --seed 1``. The server is a process of its own, started by its own
command (``--command`` has another one, ``--set NAME=VALUE`` sets a variable for it); the model behind it is the
scripted upstream, with its faults. The exit status is not 0 where anything that must hold did not.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import sys
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import httpx2
import trio
import trio_websocket
from wsproto.events import TextMessage

from tests import answers
from tests.generations import ENDING, MENDED, TOOL, Generation, Script, generation
from tests.harness import PATIENCE, Client, Server
from tests.processes import MEGABYTE, SERVE, Holdings, ServerProcess, as_server, reserved_port, server_process
from tests.proxy import Fate, open_proxy
from tests.sockets import connected
from tests.transcripts import Transcript, check_that_no_number_had_two_meanings, content, joined
from tests.upstream import open_upstream

LIMITS = {"write_timeout": 4.0, "ping_interval": 2.0, "pong_timeout": 20.0}
VARIABLES = {
    "INFERENCE_RESUME_WINDOW": "10",
    "INFERENCE_SESSION_TTL": "10",
    "INFERENCE_TOKEN_TIMEOUT": "8",
    "INFERENCE_MAX_SESSIONS": "100000",
    "INFERENCE_MAX_TASKS": "100000",
}
RATE = 12.0
"""Visits begun a second, all sessions together: what two cores carry with room to spare, if they have nothing else."""
LONGEST_VISIT = 120.0
TASKS, SESSIONS = "inference_tasks{", "inference_sessions"
BLOCKS_LEARNT, BLOCKS_PER_TASK = 8_000, 5
"""What the server may keep in memory: what it loads late and remembers, and per task less than the least of them."""
LONG = [("text_chunk", "x" * 10_000)] * 300


@attrs.define(eq=False)
class Tally:
    """What came of it. ``left``: tasks whose client did not wait for the end. ``wrong``: all else that must not be."""

    started: int = 0
    ended: Counter[str] = attrs.field(factory=Counter)
    left: int = 0
    gaps: int = 0
    dropped: int = 0
    visits: Counter[str] = attrs.field(factory=Counter)
    lost: list[str] = attrs.field(factory=list)
    doubled: list[str] = attrs.field(factory=list)
    wrong: list[str] = attrs.field(factory=list)

    def judge(self, notes: list[Any], story: Generation | None, what: str) -> None:
        """Counts a task that was heard to its end; ``story`` is what must have been told, if that is known."""
        ends = [note for note in notes if note["method"] in ("end", "error")]
        how = ends[0]["params"].get("status_message") or str(ends[0]["params"]["error"]["code"])
        self.ended[how] += 1
        numbers = [note["params"]["seq"] for note in notes]
        if len(set(numbers)) < len(numbers) or len(ends) > 1:
            self.doubled.append(f"{what}: {numbers}, {len(ends)} ends")
        heard, told = list(joined(map(content, notes))), story and story.told
        if told and heard != told:
            missing = sum(len(str(item)) for item in told) > sum(len(str(item)) for item in heard)
            differs = next(
                (pair for pair in zip(heard, told, strict=False) if pair[0] != pair[1]), (heard[-1], told[-1])
            )
            (self.lost if missing else self.wrong).append(f"{what}: {str(differs)[:300]}")

    def judge_requests(self, asked: dict[Any, int], expected: dict[Any, int] | None, what: str) -> None:
        """A round that was asked for more often than it had to be was carried out twice."""
        for key, times in asked.items() if expected is None else expected.items():
            if asked.get(key, 0) > times:
                self.doubled.append(f"{what}: {key} was asked for {asked[key]} times, not {times}")


@attrs.frozen
class Memory:
    """Blocks are those of Python's objects; what is free was given back before they were counted."""

    resident: int
    blocks: int

    @classmethod
    def of(cls, process: ServerProcess) -> Memory:
        blocks = process.blocks()
        return cls(process.holdings().resident, blocks)

    def __str__(self) -> str:
        return f"{self.resident / MEGABYTE:.1f} MB, {self.blocks:,} blocks"


@attrs.frozen
class Outcome:
    """What came of it, and what the process held: without a task before and after, in use between."""

    tally: Tally
    before: Holdings
    after: Holdings
    memory: tuple[Memory, Memory, Memory]
    """At the start, at half time, and at the end."""

    @property
    def kept(self) -> int:
        """Blocks of memory that are in use at the end and were not at the start."""
        return self.memory[-1].blocks - self.memory[0].blocks

    @property
    def may_keep(self) -> int:
        return BLOCKS_LEARNT + BLOCKS_PER_TASK * self.tally.started


@attrs.define(eq=False)
class Soak:
    server: Server
    script: Script
    tally: Tally
    _named: int = 0

    def new_generation(self, chance: random.Random, fault: str | None = None) -> Generation:
        self._named += 1
        return self.script.add(generation(chance, f"g{self._named}", fault))

    def new_long_generation(self) -> Generation:
        self._named += 1
        words = [words for _, words in LONG]
        told = [("text_chunk", "".join(words)), ("end", "".join(words))]
        return self.script.add(Generation(f"g{self._named}", [[answers.reply(*words)]], told))

    async def session_id(self) -> str:
        return await self.server.create_session(tools=[TOOL])


async def start(soak: Soak, client: Client, story: Generation) -> None:
    await client.generate(story.name)
    soak.tally.started += 1


async def hear_out(client: Client, pause: float = 0, notes: list[Any] | None = None) -> list[Any]:
    """The notifications of a task to its end, with its calls answered; numbers count on."""
    notes = [] if notes is None else notes
    while not notes or notes[-1]["method"] not in ("end", "error"):
        frame = await client.hear()
        if "id" in frame:
            assert "result" in frame, frame
            continue
        assert not notes or frame["params"]["seq"] == notes[-1]["params"]["seq"] + 1, (notes[-1], frame)
        notes.append(frame)
        await answer_call(client, frame)
        if pause:
            await trio.sleep(pause)
    return notes


# What clients do


async def mends_broken_lines(soak: Soak, chance: random.Random) -> None:
    """Comes back after every cut; the transcript must be whole."""
    async with open_proxy(soak.server.port, partial(fates, chance)) as proxy:
        transcript = Transcript(await soak.session_id(), proxy)
        for _ in range(chance.randint(1, 3)):
            story = soak.new_generation(chance, chance.choice((None, None, None, *MENDED, *ENDING)))
            soak.tally.started += 1
            soak.tally.judge(await transcript.generate(message=story.name), story, "mends")
            expected = soak.script.expected(story.name)
            soak.tally.judge_requests(soak.script.forget(story.name), expected, "mends")
        check_that_no_number_had_two_meanings(proxy)


def fates(chance: random.Random) -> Any:
    while True:
        where: Any = chance.choice(({}, {}, {"frames": chance.randint(0, 5)}, {"size": chance.randint(0, 4000)}))
        how = chance.choice(("closed", "reset", "half-open"))
        yield Fate(chance.choice(("down", "up")), how=how, whims=chance.choice((None, chance)), **where)


async def reads_slowly(soak: Soak, chance: random.Random) -> None:
    story = soak.new_generation(chance, chance.choice((None, *MENDED)))
    async with soak.server.connect(await soak.session_id()) as client:
        await start(soak, client, story)
        soak.tally.judge(await hear_out(client, pause=0.02), story, "slow")
    soak.script.forget(story.name)


async def cancels(soak: Soak, chance: random.Random) -> None:
    """Cancels at some time, with calls open perhaps. Nothing may follow the end."""
    story = soak.new_generation(chance, chance.choice((None, "stalled")))
    async with soak.server.connect(await soak.session_id()) as client:
        await start(soak, client, story)
        await trio.sleep(chance.choice((0, 0.01, 0.05)))
        asked = await client.ask("cancel")
        notes = []
        while "id" not in (frame := await client.hear()):
            notes.append(frame)
        assert frame["id"] == asked["id"], frame
        if not any(note["method"] in ("end", "error") for note in notes):
            notes += await client.until_end()
        soak.tally.judge(notes, None, "cancels")
        end = notes[-1]["params"]
        text = "".join(note["params"]["chunk"] for note in notes if note["method"] == "text_chunk")
        assert end.get("final_text", text) == text, end
        assert await client.call("cancel") == {"cancelled": []}
    soak.script.forget(story.name)


async def floods(soak: Soak, chance: random.Random) -> None:
    """Asks much and reads late, while a generation goes on. Each is answered, the generation whole."""
    story = soak.new_generation(chance)
    async with soak.server.connect(await soak.session_id()) as client:
        await start(soak, client, story)
        asked = {(await client.ask("cancel", {"task_id": "nobody"}))["id"] for _ in range(200)}
        await trio.sleep(0.5)
        notes = []
        while asked:
            frame = await client.hear()
            if "id" in frame:
                asked.remove(frame["id"])
            else:
                notes.append(frame)
        for note in notes:
            await answer_call(client, note)
        soak.tally.judge(await hear_out(client, notes=notes), story, "floods")
    soak.script.forget(story.name)


async def answer_call(client: Client, note: Any) -> None:
    if note["method"] == "function_call_request":
        params = note["params"]
        result = {"tool_call_id": params["request_id"], "result": params["parameters"]}
        await client.ask("tool_result", {"task_id": params["task_id"], "results": [result]})


async def stops_reading(soak: Soak, chance: random.Random) -> None:
    """Does not read until it is dropped or vanishes, and comes back: what is missing must have been announced.

    A busy machine makes it slow then too, and it may be dropped again.
    """
    story = soak.new_long_generation()
    session_id = await soak.session_id()
    async with connected(soak.server.port, f"/ws/{session_id}".encode()) as raw:
        frame = {"jsonrpc": "2.0", "id": 1, "method": "generate", "params": {"message": story.name}}
        await raw.send(TextMessage(json.dumps(frame)))
        assert "result" in json.loads(await raw.message())
        soak.tally.started += 1
        await trio.sleep(chance.uniform(0, 2) * LIMITS["write_timeout"])
    while (heard := await hear_all(soak, session_id)) is None:
        soak.tally.dropped += 1
    state, notes = heard
    assert notes[0]["params"]["seq"] == max(state["oldest_seq"], 1), (state, notes[0])
    assert state["gap"] == (state["oldest_seq"] > 1), state
    soak.tally.gaps += state["gap"]
    soak.tally.judge(notes, None if state["gap"] else story, "stops reading")
    assert notes[-1]["params"]["final_text"] == story.told[-1][1]
    soak.tally.judge_requests(soak.script.forget(story.name), {(story.name, 0): 1}, "stops reading")


async def hear_all(soak: Soak, session_id: str) -> tuple[Any, list[Any]] | None:
    """What `resumed` says, and all there is after it up to the end of the task; ``None`` where this is cut short."""
    async with soak.server.connect(session_id, "?after=0") as client:
        try:
            return (await client.hear())["params"], await hear_out(client)
        except trio_websocket.ConnectionClosed:
            return None


async def leaves(soak: Soak, chance: random.Random) -> None:
    """Goes in the middle and never comes back."""
    story = soak.new_generation(chance, chance.choice((None, "stalled")))
    async with soak.server.connect(await soak.session_id()) as client:
        await start(soak, client, story)
    soak.tally.left += 1


Behaviour = Callable[[Soak, random.Random], Awaitable[None]]
WEIGHTS: dict[Behaviour, int] = {
    mends_broken_lines: 8,
    cancels: 3,
    reads_slowly: 2,
    leaves: 2,
    floods: 1,
    stops_reading: 1,
}


async def visit_on(soak: Soak, chance: random.Random, pause: float, until: float) -> None:
    """One client after the other, each with a session of its own; ``pause``: seconds before each, on average."""
    while True:
        await trio.sleep(chance.uniform(0, 2) * pause)
        if trio.current_time() > until:
            return
        (behaviour,) = chance.choices(list(WEIGHTS), list(WEIGHTS.values()))
        soak.tally.visits[behaviour.__name__] += 1
        try:
            with trio.fail_after(LONGEST_VISIT):
                await behaviour(soak, chance)
        except* (AssertionError, trio.TooSlowError, KeyError, OSError, trio_websocket.ConnectionClosed) as errors:
            soak.tally.wrong += [f"{behaviour.__name__}: {error!r}"[:500] for error in leaves_of(errors)]


def leaves_of(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    return [
        leaf
        for error in group.exceptions
        for leaf in (leaves_of(error) if isinstance(error, BaseExceptionGroup) else [error])
    ]


# The whole


async def run(process: ServerProcess, port: int, minutes: float, sessions: int, seed: int, rate: float) -> Outcome:
    """``port`` is the upstream's."""
    tally, script = Tally(), Script()
    async with open_upstream(script.answer, port=port):
        await warm_up(process, script, tally)
        await settle(process, tally, TASKS)
        before, at_start = await at_rest(process), Memory.of(process)
        half_time = await visit_all(process, script, tally, minutes * 60, sessions, seed, rate)
    async with open_upstream(script.answer, port=port):  # so the server keeps no connection to the one before
        await warm_up(process, script, tally)
        await settle(process, tally, TASKS)
        after = await process.wait_for(before.covers, f"left behind, with {before} before")
        return Outcome(tally, before, after, (at_start, half_time, Memory.of(process)))


async def visit_all(
    process: ServerProcess, script: Script, tally: Tally, seconds: float, sessions: int, seed: int, rate: float
) -> Memory:
    """Returns the memory at half time."""
    until = trio.current_time() + seconds
    async with httpx2.AsyncClient(base_url=process.url, timeout=PATIENCE, verify=False) as http:
        soak = Soak(as_server(process, http), script, tally)
        async with trio.open_nursery() as nursery:
            for number in range(sessions):
                own = random.Random(f"{seed} {number}")
                nursery.start_soon(visit_on, soak, own, sessions / rate, until)
            await trio.sleep(seconds / 2)
            half_time = Memory.of(process)
        if trio.current_time() < until:
            tally.wrong.append("the visits ended before their time: what is counted here is not all there was")
    await settle(process, tally, TASKS, SESSIONS)
    return half_time


async def warm_up(process: ServerProcess, script: Script, tally: Tally) -> None:
    """One visit, so that what is loaded or opened once is there."""
    async with httpx2.AsyncClient(
        base_url=process.url, timeout=PATIENCE, verify=False, headers={"Connection": "close"}
    ) as http:
        await reads_slowly(Soak(as_server(process, http), script, tally), random.Random(0))


async def at_rest(process: ServerProcess) -> Holdings:
    """What it holds, once that does not change any more."""
    now = process.holdings()
    for _ in range(20):
        await trio.sleep(0.3)
        earlier, now = now, process.holdings()
        if earlier.covers(now) and now.covers(earlier):
            break
    return now


async def settle(process: ServerProcess, tally: Tally, *kept: str) -> None:
    """Waits until the server has none of these any more; then as many tasks must have ended as were started."""
    headers = {"Connection": "close"}
    async with httpx2.AsyncClient(base_url=process.url, timeout=PATIENCE, verify=False, headers=headers) as http:
        with trio.move_on_after(LONGEST_VISIT):
            while any(map(partial(metric, text := (await http.get("/metrics")).text), kept)):  # noqa: ASYNC110
                await trio.sleep(0.5)
    ended = metric(text, "inference_tasks_ended_total")
    if ended != tally.started:
        tally.wrong.append(f"{tally.started} tasks were started, {ended} have ended")


def metric(text: str, name: str) -> int:
    """The sum over all labels."""
    return sum(int(float(line.split()[-1])) for line in text.splitlines() if line.startswith(name))


def report(outcome: Outcome) -> bool:
    """Prints it, and returns whether all is well."""
    tally, before, after = outcome.tally, outcome.before, outcome.after
    print(f"visits        {dict(tally.visits)}")
    print(f"tasks started {tally.started}, left by their client {tally.left}, with an announced gap {tally.gaps}")
    print(f"too slow      {tally.dropped} clients dropped once more after they had come back")
    print(f"ended         {dict(sorted(tally.ended.items()))}")
    print(f"lost {len(tally.lost)}, doubled {len(tally.doubled)}, otherwise wrong {len(tally.wrong)}")
    for name in ("threads", "tasks", "descriptors"):
        print(f"{name:13} {getattr(before, name)} at the start, {getattr(after, name)} at the end")
    start, half_time, end = outcome.memory
    print(f"memory        {start} at the start; {half_time} at half time; {end} at the end")
    failures = [*tally.lost, *tally.doubled, *tally.wrong]
    if outcome.kept > outcome.may_keep:
        failures.append(f"memory: {outcome.kept:,} more blocks are in use, at most {outcome.may_keep:,} were expected")
    for line in failures[:20]:
        print(f"  {line}")
    return not failures and before.covers(after)


def soak(
    minutes: float,
    sessions: int,
    seed: int,
    rate: float = RATE,
    command: tuple[str, ...] = SERVE,
    variables: dict[str, str] | None = None,
) -> bool:
    """Whether all that must hold did."""
    print(f"{minutes:g} minutes, {sessions} sessions, seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder, reserved_port() as port:
        url = f"http://127.0.0.1:{port}/v1"
        with server_process(Path(folder), url, LIMITS, command, **VARIABLES, **(variables or {})) as process:
            return report(trio.run(run, process, port, minutes, sessions, seed, rate))


def main() -> None:
    parser = argparse.ArgumentParser("tests.soak", description="Uses a server well and badly for some time.")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--sessions", type=int, default=300, help="clients at a time (default: 300)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--command", default=shlex.join(SERVE), help="arguments of the server (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a variable for the server")
    options = parser.parse_args()
    variables = dict(assignment.split("=", 1) for assignment in options.set)
    command = tuple(shlex.split(options.command))
    sys.exit(not soak(options.minutes, options.sessions, options.seed, command=command, variables=variables))


if __name__ == "__main__":
    main()
