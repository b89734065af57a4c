"""What all sessions may hold and run together, with sessions on fakes."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing

from inference_trio.access import Owner
from inference_trio.errors import OverloadedError
from inference_trio.protocol import CreateSession

from . import fakes
from .fakes import finish, hang, text, tool_call
from .test_connection import Bench, bench, numbers, text_of, transcript

KB = 1024


def long_answer(kilobytes: int) -> list[Any]:
    """In pieces of a kilobyte, for each of which the model may have to wait."""
    return [*(text("x" * KB) for _ in range(kilobytes)), finish()]


async def generated(it: Bench, session: Any) -> Any:
    """A session with a whole answer that was read."""
    socket = it.connect(session)
    socket.call("generate", {"message": "hi"})
    frames = await transcript(socket)
    await socket.drop()
    await trio.testing.wait_all_tasks_blocked()
    return frames


def resumed(frames: list[Any]) -> Any:
    assert frames[0]["method"] == "resumed"
    return frames[0]["params"]


async def test_what_is_held_is_counted_and_given_back(autojump_clock: Any) -> None:
    async with bench(long_answer(8), session_ttl=10) as it:
        session = it.create(tools=[fakes.tool({"name": "look", "description": "d" * 10 * KB})])
        held = it.store.budget.used
        assert held > 30 * KB
        await generated(it, session)
        assert it.store.budget.used == held + session.outbox.size
        assert session.outbox.size > 16 * KB, "the chunks, and the end with the whole text"
        await trio.sleep(11)
        assert await it.store.get(session.id) is None
        assert (it.store.budget.used, it.owner.sessions, it.owner.running) == (0, 0, 0)


async def test_sessions_end_when_they_expire_though_nobody_asks_for_any(autojump_clock: Any) -> None:
    async with bench(long_answer(8), session_ttl=10) as it, trio.open_nursery() as nursery:
        nursery.start_soon(it.store.watch_expiry)
        await trio.sleep(3)
        first, second = it.create(), it.create()
        await trio.sleep(5)
        await generated(it, second)
        await trio.sleep(6)
        assert await it.store.get(second.id)
        assert len(it.store) == 1, f"{first} was not used for longer than it may be"
        await trio.sleep(12)
        assert (len(it.store), it.store.budget.used) == (0, 0)
        nursery.cancel_scope.cancel()


async def test_the_messages_of_a_task_are_held_until_it_ends() -> None:
    async with bench([hang]) as it:
        session = it.create()
        socket = it.connect(session)
        before = it.store.budget.used
        socket.call("generate", {"message": "m" * 10 * KB})
        await socket.hear()
        assert it.store.budget.used > before + 30 * KB
        socket.call("cancel")
        assert (await transcript(socket))[-1]["params"]["status_message"] == "cancelled"
        await trio.testing.wait_all_tasks_blocked()
        assert it.store.budget.used == before + session.outbox.size


async def test_those_longest_idle_keep_their_newest_notification_only() -> None:
    async with bench(long_answer(10), memory_bytes=155 * KB) as it:
        sessions = [it.create() for _ in range(4)]
        for session in sessions:
            await generated(it, session)
        assert it.store.budget.used <= 155 * KB
        kept = [session.outbox.latest_seq - session.outbox.oldest_seq + 1 for session in sessions]
        assert kept[0] == 1, "the first was idle longest"
        assert kept[-1] > 1, "the last is still whole"
        frames = await transcript(it.connect(sessions[0], after=1))
        assert resumed(frames)["gap"] is True
        assert frames[-1]["params"]["final_text"] == "x" * 10 * KB


async def test_a_model_waits_for_whoever_does_not_read_and_nothing_new_begins_meanwhile() -> None:
    async with bench(long_answer(100), memory_bytes=60 * KB, outbox_bytes=1024 * KB) as it:
        stuck, reading = it.create(), it.create()
        silent = it.connect(stuck, outgoing=1)
        silent.call("generate", {"message": "hi"})
        await trio.testing.wait_all_tasks_blocked()
        assert it.store.budget.is_exceeded
        assert it.store.budget.used < 64 * KB
        task = next(iter(stuck.runners.values()))
        assert len(task.task.text) < 60 * KB, "the model waits"

        refused = it.connect(reading)
        refused.call("generate", {"message": "hi"})
        assert (await refused.hear())["error"]["code"] == -32005
        with pytest.raises(OverloadedError, match="hold as much"):
            it.create()

        frames = await transcript(silent)
        assert text_of(frames) == "x" * 100 * KB
        assert numbers(frames) == list(range(1, len(numbers(frames)) + 1))


async def test_over_the_limit_a_reader_still_gets_everything() -> None:
    async with bench([hang], long_answer(40), memory_bytes=40 * KB) as it:
        hog, reading = it.create(), it.create()
        holder = it.connect(hog)
        socket = it.connect(reading)
        holder.call("generate", {"message": "m" * 9 * KB})
        await holder.hear()
        socket.call("generate", {"message": "hi"})
        frames = await transcript(socket)
        assert text_of(frames) == "x" * 40 * KB
        assert reading.outbox.size < 85 * KB, "nothing but the end, with the text twice, is kept for replay"


async def test_models_that_wait_for_room_go_on_when_others_have_made_some() -> None:
    answers = [long_answer(40), long_answer(40)]
    async with bench([hang], *answers, memory_bytes=620 * KB, outbox_bytes=1024 * KB) as it:
        hog, waiting = it.create(), [it.create() for _ in answers]
        holder = it.connect(hog)
        holder.call("generate", {"message": "m" * 180 * KB})
        await holder.hear()
        for session in waiting:
            it.connect(session, outgoing=1).call("generate", {"message": "hi"})
        await trio.testing.wait_all_tasks_blocked()
        assert it.store.budget.is_exceeded
        assert all(session.runners for session in waiting)
        holder.call("cancel")
        await trio.testing.wait_all_tasks_blocked()
        assert not any(session.runners for session in waiting), "both have told all, although nobody reads"


async def test_sessions_and_tasks_of_one_owner_are_counted_apart() -> None:
    async with bench([hang]) as it:
        alice, bob = Owner("alice", max_sessions=2, max_tasks=1), Owner("bob", max_sessions=2)
        one, two = [await it.store.create(CreateSession(), alice) for _ in range(2)]
        with pytest.raises(OverloadedError, match="too many sessions of this token: 2"):
            await it.store.create(CreateSession(), alice)
        await it.store.create(CreateSession(), bob)
        for session, refused in ((one, False), (two, True)):
            socket = it.connect(session)
            socket.call("generate", {"message": "hi"})
            assert ("error" in await socket.hear()) is refused
        assert (alice.running, bob.running, it.store.running) == (1, 0, 1)
        await (await one.cancel(None)).ended()
        await trio.testing.wait_all_tasks_blocked()
        assert (alice.running, it.store.running) == (0, 0)


async def test_one_token_cannot_hold_what_is_meant_for_all() -> None:
    async with bench([hang], memory_bytes=400 * KB) as it:
        alice, bob = Owner("alice"), Owner("bob")
        params = CreateSession(tools=[fakes.tool({"name": "look", "description": "d" * 20 * KB})])
        for _ in range(3):
            await it.store.create(params, alice)
        with pytest.raises(OverloadedError, match="this token hold as much"):
            await it.store.create(params, alice)
        session = await it.store.create(params, bob)
        held = it.store.budget_of(bob).used
        socket = it.connect(session)
        socket.call("generate", {"message": "m" * 10 * KB})
        assert "result" in await socket.hear()
        assert it.store.budget_of(bob).used > held + 30 * KB
        await (await session.cancel(None)).ended()
        await trio.testing.wait_all_tasks_blocked()
        assert it.store.budget_of(bob).used == held + session.outbox.size


async def test_what_one_token_leaves_unread_for_replay_is_its_own_affair(autojump_clock: Any) -> None:
    async with bench(*[long_answer(10)] * 8, memory_bytes=320 * KB) as it:
        alice, bob = Owner("alice"), Owner("bob")
        sessions = [await it.store.create(CreateSession(), alice) for _ in range(5)]
        others = [await it.store.create(CreateSession(), bob) for _ in range(2)]
        for session in (others[0], *sessions):
            await generated(it, session)
        assert it.store.budget_of(alice).used <= 160 * KB
        kept = [session.outbox.latest_seq - session.outbox.oldest_seq + 1 for session in (*sessions, others[0])]
        assert kept[0] == 1, "the first of hers was idle longest"
        assert kept[-1] > 1, "of what another token left nothing is given up for hers"
        large = CreateSession(tools=[fakes.tool({"name": "look", "description": "d" * 30 * KB})])
        with pytest.raises(OverloadedError, match="this token hold"):
            await it.store.create(large, alice)
        assert len(await generated(it, others[1])) > 1, "there is room for the other"


async def test_results_of_tools_are_held_until_the_task_ends() -> None:
    calls = [tool_call(name, "look", "{}", index) for index, name in enumerate("abc")]
    tools = [fakes.tool({"name": "look"})]
    async with bench([*calls, finish("tool_calls")], memory_bytes=400 * KB) as it:
        session = it.create(tools=tools)
        before = it.store.budget.used
        socket = it.connect(session)
        socket.call("generate", {"message": "hi"})
        task_id = (await socket.hear())["result"]["task_id"]
        for _ in calls:
            await socket.hear()

        def give(name: str, size: int) -> None:
            result = {"tool_call_id": name, "result": "r" * size}
            socket.call("tool_result", {"task_id": task_id, "results": [result]})

        give("a", 140 * KB)
        assert (await socket.hear())["result"]["outstanding"] == ["b", "c"]
        assert it.store.budget.used > before + 420 * KB
        give("b", 1)
        refusal = (await socket.hear())["error"]
        assert (refusal["code"], refusal["message"]) == (
            -32005,
            "The sessions of this server hold as much as they may",
        )
        with pytest.raises(OverloadedError, match="hold as much"):
            it.create()
        await (await session.cancel(None)).ended()
        await trio.testing.wait_all_tasks_blocked()
        assert it.store.budget.used == before + session.outbox.size
