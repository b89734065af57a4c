"""Connections cut everywhere, over real sockets: whatever happens to the line, the transcript is the uncut one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest

from tests import answers
from tests.harness import open_server, settings
from tests.proxy import Direction, Fate, How, Proxy, open_proxy
from tests.transcripts import Transcript, check_that_no_number_had_two_meanings, content
from tests.upstream import Upstream, open_upstream

TOOLS = [{"name": "weather", "parameters": {"type": "object"}}, {"name": "time", "parameters": {"type": "object"}}]
ROUNDS = (
    [
        answers.reasoning("Hm "),
        answers.pause("1"),
        answers.text("Let "),
        answers.pause("2"),
        answers.text("me look. "),
        answers.pause("3"),
        answers.tool_call(0, "call_a", "weather", '{"city": "Paris"}'),
        answers.tool_call(1, "call_b", "time", '{"city": "Oslo"}'),
        answers.finish("tool_calls"),
        answers.usage(answers.tokens(10, 5)),
        answers.done(),
    ],
    [
        answers.text("It "),
        answers.pause("4"),
        answers.text("rains."),
        answers.pause("5"),
        answers.finish(),
        answers.usage(answers.tokens(10, 5)),
        answers.done(),
    ],
)
"""Each gate opens when the client has what comes before it: so every chunk is a frame of its own."""

UNCUT = [
    ("reasoning_chunk", "Hm "),
    ("text_chunk", "Let "),
    ("text_chunk", "me look. "),
    ("function_call_request", {"city": "Paris"}),
    ("function_call_request", {"city": "Oslo"}),
    ("text_chunk", "It "),
    ("text_chunk", "rains."),
    ("end", "Let me look. It rains."),
]
FRAMES: dict[Direction, int] = {"down": len(UNCUT) + 3, "up": 3}
"""What an uncut connection carries: the notifications and three answers; three requests."""


@attrs.define(eq=False)
class Scene:
    """A session at a server, reached through a proxy, and the server's upstream."""

    upstream: Upstream
    proxy: Proxy
    transcript: Transcript

    def open_gate(self, _: Any) -> None:
        chunks = [note for note in self.transcript.notes if note["method"].endswith("_chunk")]
        self.upstream.gate(str(len(chunks))).set()


@asynccontextmanager
async def scene(*fates: Fate, **changes: Any) -> AsyncIterator[Scene]:
    def given() -> Iterator[Fate]:
        return iter(fates)

    async with (
        open_upstream(*ROUNDS) as upstream,
        open_server(settings(upstream.base_url, **changes)) as server,
        open_proxy(server.port, given) as proxy,
    ):
        transcript = Transcript(await server.create_session(tools=TOOLS), proxy)
        built = Scene(upstream, proxy, transcript)
        transcript.on_note = built.open_gate
        yield built


async def test_an_uncut_connection_carries_what_the_walk_below_cuts() -> None:
    async with scene() as it:
        assert [content(note) for note in await it.transcript.generate(message="hi")] == UNCUT
        (line,) = it.proxy.lines
        assert {direction: len(line.said[direction]) for direction in FRAMES} == FRAMES


CUTS = [(direction, frames) for direction, count in FRAMES.items() for frames in range(count + 1)]


@pytest.mark.parametrize("how", ["closed", "reset", "half-open"])
@pytest.mark.parametrize(("direction", "frames"), CUTS)
async def test_a_cut_after_any_frame_changes_nothing(direction: Direction, frames: int, how: How) -> None:
    async with scene(Fate(direction, frames, how=how)) as it:
        notes = await it.transcript.generate(message="hi")
        assert [content(note) for note in notes] == UNCUT
        assert notes[-1]["params"]["usage"]["total_tokens"] == 30
        assert len(it.upstream.requests) == 2, "one for each round"
        check_that_no_number_had_two_meanings(it.proxy)
        is_cut = direction == "up" or frames < FRAMES["down"]
        assert len(it.proxy.lines) == 2 or not is_cut


@pytest.mark.parametrize("how", ["closed", "reset", "half-open"])
async def test_a_connection_that_is_cut_after_every_single_frame_gets_there(how: How) -> None:
    """Each connection brings one frame more: `resumed`, then the next one."""
    async with scene(*[Fate("down", 2, how=how)] * 30) as it:
        notes = await it.transcript.generate(message="hi")
        assert [content(note) for note in notes] == UNCUT
        assert len(it.upstream.requests) == 2
        check_that_no_number_had_two_meanings(it.proxy)
