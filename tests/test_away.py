"""A session whose client is away, or has two connections at a time."""

from __future__ import annotations

from typing import Any

import trio
import trio.testing

from . import fakes
from .fakes import finish, hang, text
from .test_connection import CALLS, HELLO, TOOL, bench, numbers, text_of, transcript

PIECE = "x" * 500


async def test_the_time_for_calls_runs_on_while_the_client_is_away(autojump_clock: Any) -> None:
    async with bench(CALLS, HELLO, tool_timeout=10.0) as it:
        session = it.create(tools=[fakes.tool(TOOL)])
        first = it.connect(session)
        first.call("generate", {"message": "hi"})
        await trio.testing.wait_all_tasks_blocked()
        await trio.sleep(4)
        await first.drop()
        await trio.sleep(5.9)
        assert session.runners
        second = it.connect(session, after=0)
        await trio.sleep(0.2)
        *_, error = await transcript(second)
        assert error["params"]["error"]["code"] == -32003
        assert error["params"]["error"]["data"]["outstanding"] == ["c1", "c2"]


async def test_results_given_after_coming_back_are_taken() -> None:
    async with bench(CALLS, HELLO) as it:
        session = it.create(tools=[fakes.tool(TOOL)])
        first = it.connect(session)
        first.call("generate", {"message": "hi"})
        await trio.testing.wait_all_tasks_blocked()
        await first.drop()
        second = it.connect(session, after=0)
        resumed, *requests = [await second.hear() for _ in range(3)]
        (task,) = resumed["params"]["tasks"]
        assert [request["params"]["request_id"] for request in requests] == task["outstanding"]
        results = [{"tool_call_id": call, "result": 1} for call in task["outstanding"]]
        second.call("tool_result", {"task_id": task["task_id"], "results": results})
        assert text_of(await transcript(second)) == "Hello"


async def test_a_model_waits_for_a_client_that_is_away_and_goes_on_when_it_is_back() -> None:
    pieces = [[text(PIECE), fakes.reasoning("y")] for _ in range(20)]
    async with bench([*(step for pair in pieces for step in pair), finish()], outbox_bytes=4000) as it:
        session = it.create()
        first = it.connect(session, outgoing=0)
        first.call("generate", {"message": "hi"})
        await trio.testing.wait_all_tasks_blocked()
        await first.drop()
        await trio.testing.wait_all_tasks_blocked()
        assert session.outbox.is_full
        assert session.outbox.size < 4000
        resumed, *notes = await transcript(it.connect(session, after=0))
        assert not resumed["params"]["gap"]
        assert numbers(notes) == list(range(1, len(notes) + 1))
        assert text_of(notes) == PIECE * 20 == notes[-1]["params"]["final_text"]


async def test_a_client_that_asks_for_more_than_is_kept_is_told_of_the_gap() -> None:
    pieces = [[text(PIECE), fakes.reasoning("y")] for _ in range(20)]
    async with bench([*(step for pair in pieces for step in pair), finish()], outbox_bytes=4000) as it:
        session = it.create()
        first = it.connect(session)
        first.call("generate", {"message": "hi"})
        _, *notes = await transcript(first)
        await first.drop()
        resumed, *kept = await transcript(it.connect(session, after=3))
        assert resumed["params"]["gap"]
        assert numbers(kept)[0] == resumed["params"]["oldest_seq"] > 4
        assert kept == notes[-len(kept) :]


async def test_of_two_connections_neither_loses_nor_doubles() -> None:
    go_on = trio.Event()
    pieces = [[text(f"{number} "), fakes.reasoning("y")] for number in range(10)]
    async with bench([*(step for pair in pieces for step in pair), fakes.wait(go_on), text("end"), finish()]) as it:
        session = it.create()
        older = it.connect(session, outgoing=0)
        older.call("generate", {"message": "hi"})
        heard = [await older.hear() for _ in range(4)][1:]
        await trio.testing.wait_all_tasks_blocked()  # the next one is on its way
        newer = it.connect(session, after=3)
        on_its_way = await older.hear()
        await older.gone.wait()
        assert older.close_code == 4409
        go_on.set()
        _, *rest = await transcript(newer)
        assert numbers([*heard, *rest]) == list(range(1, 23))
        assert rest[0] == on_its_way, "sent to the older one, and so the same for the newer one"
        assert text_of([*heard, *rest]) == rest[-1]["params"]["final_text"]


async def test_a_task_that_nobody_waits_for_gives_its_place_back(autojump_clock: Any) -> None:
    async with bench([text("x"), hang], resume_window=5.0, max_tasks=1) as it:
        session = it.create()
        first = it.connect(session)
        first.call("generate", {"message": "hi"})
        await trio.testing.wait_all_tasks_blocked()
        await first.drop()
        await trio.sleep(5.1)
        assert (it.store.running, it.owner.running, it.store.model.streaming) == (0, 0, 0)
        other = it.connect(it.create())
        other.call("generate", {"message": "hi"})
        assert "result" in await other.hear()


async def test_a_window_ends_with_the_tasks_it_was_opened_for(autojump_clock: Any) -> None:
    go_on = trio.Event()
    async with bench([fakes.wait(go_on), finish()], [text("Hel"), fakes.sleep(3), text("lo"), finish()]) as it:
        session = it.create()
        socket = it.connect(session)
        socket.call("generate", {"message": "hi"})
        await socket.hear()
        session.tasks.open_window(1.0)
        go_on.set()
        await transcript(socket)
        socket.call("generate", {"message": "hi"})
        assert (await transcript(socket))[-1]["params"]["status_message"] == "completed"
