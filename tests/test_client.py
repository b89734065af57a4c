"""The Python client, against the whole server over real sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest
import trio

from inference_trio.client import (
    ConnectionLostError,
    Disconnected,
    Event,
    Result,
    Resumed,
    Session,
    TextChunk,
    ToolCall,
    ToolResult,
    Usage,
    connect,
)
from inference_trio.client import session as client_session
from tests import answers
from tests.harness import PATIENCE, Server, open_server, settings
from tests.line import Cut, Line, open_line
from tests.upstream import Upstream, open_upstream

CALL = answers.calls(answers.tool_call(0, "c1", "look", {"at": "sea"}))
HELLO = answers.reply("Hel", "lo")


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting between attempts to connect."""
    monkeypatch.setattr(client_session, "backoff", lambda attempt: 0.0)


@attrs.define(eq=False)
class Look:
    """A tool that counts."""

    seen: list[str] = attrs.field(factory=list)

    @property
    def tool(self) -> Any:
        def look(at: str) -> dict[str, str]:
            """Looks there."""
            self.seen.append(at)
            return {"saw": at.upper()}

        return look


@attrs.frozen
class Bench:
    upstream: Upstream
    server: Server
    line: Line
    session: Session


@asynccontextmanager
async def running(*script: Any, cuts: tuple[Cut, ...] = (), tools: Any = (), **changes: Any) -> AsyncIterator[Bench]:
    """A session beside a server, whose upstream answers as scripted, on a line with these cuts."""
    give_up_after = changes.pop("give_up_after", 120.0)
    with trio.fail_after(PATIENCE):
        async with (
            open_upstream(*script) as upstream,
            open_server(settings(upstream.base_url, **changes)) as server,
            open_line(server.url, *cuts) as line,
            connect(line.url, tools=tools, give_up_after=give_up_after) as session,
        ):
            yield Bench(upstream, server, line, session)


async def events_of(session: Session, message: str = "hi", **options: Any) -> tuple[list[Event], Result]:
    async with session.generate(message, **options) as task:
        events = [event async for event in task]
    return events, task.result


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextChunk))


# Generations


async def test_a_generation_is_iterated_as_it_comes() -> None:
    slow = [answers.text("Hel"), answers.pause("go on"), answers.reply("lo")]
    async with running(slow) as it, it.session.generate("hi", temperature=0.5, system="Be brief.") as task:
        assert await anext(task) == TextChunk("Hel")
        assert task.text == "Hel"
        it.upstream.gate("go on").set()
        assert [event async for event in task] == [TextChunk("lo")]
        assert task.result == await task.finish()
        assert (task.result.final_text, task.result.status) == ("Hello", "completed")
        assert task.result.usage == Usage(7, 3, 10)
        assert task.result.task_id == task.task_id
        request = it.upstream.requests[0]
        assert [message["role"] for message in request.messages] == ["system", "user"]
        assert request.body["temperature"] == 0.5


async def test_the_next_generation_goes_on_from_the_one_before() -> None:
    async with running(lambda request: answers.reply(f"to {request.messages[-1]['content']}")) as it:
        assert str(await it.session.ask("one")) == "to one"
        await it.session.ask("two", system="Be brief.")
        await it.session.ask("aside", history=[])
        turns = [("user", "one"), ("assistant", "to one"), ("user", "two"), ("assistant", "to two")]
        assert [(message["role"], message["content"]) for message in it.session.history] == turns
        assert [len(request.messages) for request in it.upstream.requests] == [1, 4, 1]


async def test_a_function_is_called_and_its_result_goes_to_the_model() -> None:
    look = Look()
    async with running(CALL, HELLO, tools=[look.tool]) as it:
        events, result = await events_of(it.session)
        assert isinstance(events[0], ToolCall)
        assert (events[0].id, events[0].name, events[0].arguments) == ("c1", "look", {"at": "sea"})
        assert events[1] == ToolResult("c1", "look", result={"saw": "SEA"})
        assert text_of(events) == result.final_text == "Hello"
        assert it.upstream.requests[1].messages[-1]["content"] == '{"saw":"SEA"}'
        assert look.seen == ["sea"]


# Broken connections

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
    hangs = [answers.text("Hel"), answers.hang()]
    async with running(hangs, give_up_after=0.0) as it, it.session.generate("hi") as task:
        assert await anext(task) == TextChunk("Hel")
        it.line.target = "http://127.0.0.1:1"
        it.line.cut()
        assert await anext(task) == Disconnected()
        with pytest.raises(ConnectionLostError) as lost:
            await task.finish()
        assert lost.value.partial_text == "Hel"
        assert lost.value.retryable
