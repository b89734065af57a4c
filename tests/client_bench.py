"""A client's session beside a server, on a line that can be cut."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import trio

from inference_trio.client import Event, Result, Session, TextChunk, connect
from tests import answers
from tests.harness import PATIENCE, Server, open_server, settings
from tests.line import Cut, Line, open_line
from tests.upstream import Upstream, open_upstream

CALL = answers.calls(answers.tool_call(0, "c1", "look", {"at": "sea"}))
HELLO = answers.reply("Hel", "lo")
HANGS = [answers.text("Hel"), answers.hang()]


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
