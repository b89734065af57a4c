"""The Python client on a line that breaks, against the whole server over real sockets."""

from __future__ import annotations

import pytest
import trio.testing

from inference_trio.client import (
    ConnectionLostError,
    Disconnected,
    Draining,
    Event,
    Resumed,
    SessionGoneError,
    TakenOverError,
    TextChunk,
    ToolCall,
    ToolResult,
)
from inference_trio.client import session as client_session
from tests import answers
from tests.client_bench import CALL, HANGS, HELLO, Bench, Look, events_of, running, text_of
from tests.line import Cut


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting between attempts to connect."""
    monkeypatch.setattr(client_session, "backoff", lambda attempt: 0.0)


UP = [Cut("up", after) for after in range(3)]  # the handshake, `generate`, `tool_result`
DOWN = [Cut("down", after) for after in range(7)]  # the handshake, `resumed`, answer, call, answer, text, `end`


def identity(cut: Cut) -> str:
    return f"{cut.way}-{cut.after}"


async def check_whole(it: Bench, look: Look) -> list[Event]:
    """The generation is as if nothing had happened, apart from the events that tell what has."""
    events, result = await events_of(it.session)
    assert text_of(events) == result.final_text == "There"
    assert [type(event) for event in events if isinstance(event, ToolCall | ToolResult)] == [ToolCall, ToolResult]
    assert look.seen == ["sea"]
    assert len(it.upstream.requests) == 2
    assert [message["role"] for message in it.session.history] == ["user", "assistant", "tool", "assistant"]
    return events


@pytest.mark.parametrize("cut", UP + DOWN, ids=identity)
async def test_a_line_that_is_cut_anywhere_changes_nothing(cut: Cut) -> None:
    look = Look()
    async with running(CALL, answers.reply("There"), cuts=(cut,), tools=[look.tool]) as it:
        await check_whole(it, look)
        assert (it.line.made, it.line.sockets) == (1, 2)


@pytest.mark.parametrize("second", UP + DOWN[:3], ids=identity)
@pytest.mark.parametrize("first", UP + DOWN, ids=identity)
async def test_a_line_that_is_cut_again_while_it_is_mended_changes_nothing(first: Cut, second: Cut) -> None:
    look = Look()
    async with running(CALL, answers.reply("There"), cuts=(first, second), tools=[look.tool]) as it:
        await check_whole(it, look)
        assert it.line.made >= 1


async def test_a_loss_is_told_among_the_events() -> None:
    slow = [answers.text("Hel"), answers.pause("go on"), answers.reply("lo")]
    async with running(slow) as it, it.session.generate("hi") as task:
        assert await anext(task) == TextChunk("Hel")
        it.line.cut()
        assert await anext(task) == Disconnected()
        assert await anext(task) == Resumed(gap=False)
        it.upstream.gate("go on").set()
        assert [event async for event in task] == [TextChunk("lo")]


async def test_without_a_connection_for_too_long_it_fails() -> None:
    async with running(HANGS, give_up_after=0.0) as it, it.session.generate("hi") as task:
        assert await anext(task) == TextChunk("Hel")
        it.line.target = "http://127.0.0.1:1"
        it.line.cut()
        assert await anext(task) == Disconnected()
        with pytest.raises(ConnectionLostError) as lost:
            await task.finish()
        assert lost.value.partial_text == "Hel"
        assert lost.value.retryable


async def test_a_session_that_the_server_has_forgotten_fails_what_ran_and_is_made_anew() -> None:
    async with running(HANGS) as it, running(answers.reply("new")) as other:
        it.session.history = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
        forgotten = it.session.id
        async with it.session.generate("three") as task:
            assert await anext(task) == TextChunk("Hel")
            it.line.target = other.server.url
            it.line.cut()
            assert await anext(task) == Disconnected()
            with pytest.raises(SessionGoneError) as gone:
                await anext(task)
        assert (gone.value.partial_text, gone.value.retryable) == ("Hel", True)
        assert str(await it.session.ask("four")) == "new"
        assert it.session.id not in (forgotten, None)
        assert [message["content"] for message in other.upstream.requests[0].messages] == ["one", "two", "four"]


async def test_a_newer_connection_takes_over_and_is_left_alone() -> None:
    async with running(HANGS) as it, it.session.generate("hi") as task:
        assert await anext(task) == TextChunk("Hel")
        async with it.server.connect(it.session.id or "", "?after=0") as newer:
            with pytest.raises(TakenOverError):
                await task.finish()
            with pytest.raises(TakenOverError):
                it.session.generate("again")
            assert (await newer.hear())["method"] == "resumed"
            assert it.line.sockets == 1


async def test_what_the_server_does_not_keep_is_announced_and_the_result_is_whole() -> None:
    many = [answers.text("Hel"), answers.pause("go on"), *[answers.text("x" * 400)] * 20, answers.reply("end")]
    async with running(many, outbox_bytes=4096) as it, it.session.generate("hi") as task:
        assert await anext(task) == TextChunk("Hel")
        it.line.loses = True
        it.upstream.gate("go on").set()
        while b'"end"' not in await it.line.lost.receive():
            pass
        it.line.loses = False
        it.line.cut()
        events = [event async for event in task]
        assert events[:2] == [Disconnected(), Resumed(gap=True)]
        assert len(text_of(events)) < 8000
        assert task.result.final_text == f"Hel{'x' * 8000}end"


async def test_a_server_that_stops_ends_what_runs_and_is_gone() -> None:
    async with running(HANGS, give_up_after=0.0) as it:
        async with it.session.generate("hi") as task:
            assert await anext(task) == TextChunk("Hel")
            it.server.shutdown.set()
            events = [event async for event in task]
            assert [type(event) for event in events] == [Draining]
            assert task.result.status == "cancelled"
        it.line.target = "http://127.0.0.1:1"
        with pytest.raises(ConnectionLostError):
            await it.session.ask("again")


async def test_reconnect_loses_nothing() -> None:
    slow = [answers.text("Hel"), answers.pause("go on"), answers.reply("lo")]
    async with running(slow) as it, it.session.generate("hi") as task:
        assert await anext(task) == TextChunk("Hel")
        it.session.reconnect()
        it.upstream.gate("go on").set()
        events = [event async for event in task]
        assert events == [Disconnected(), Resumed(gap=False), TextChunk("lo")]
        assert it.line.sockets == 2


async def test_an_idle_session_connects_again_only_when_there_is_something_to_ask() -> None:
    async with running(HELLO, HELLO) as it:
        await it.session.ask("one")
        it.line.cut()
        await trio.testing.wait_all_tasks_blocked()
        assert it.line.sockets == 1
        assert str(await it.session.ask("two")) == "Hello"
        assert it.line.sockets == 2


async def test_a_tool_goes_on_running_while_there_is_no_connection() -> None:
    started, may_end = trio.Event(), trio.Event()

    async def look(at: str) -> str:
        started.set()
        await may_end.wait()
        return at

    async with running(CALL, HELLO, tools=[look]) as it, it.session.generate("hi") as task:
        await started.wait()
        it.line.cut()
        may_end.set()
        assert (await task.finish()).final_text == "Hello"
        assert it.upstream.requests[1].messages[-1]["content"] == "sea"


async def test_a_line_that_is_dead_without_saying_so_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_session, "PING_EVERY", 0.05)
    slow = [answers.text("Hel"), answers.pause("go on"), answers.reply("lo")]
    async with running(slow) as it, it.session.generate("hi") as task:
        assert await anext(task) == TextChunk("Hel")
        it.line.loses = True
        assert await anext(task) == Disconnected()
        it.line.loses = False
        it.upstream.gate("go on").set()
        events = [event async for event in task]
        assert (text_of(events), task.result.final_text) == ("lo", "Hello")
