"""The examples of the page on clients run as they are, and what it lists is there."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from anyio.from_thread import start_blocking_portal

from inference_trio import client
from inference_trio.__main__ import CHAT_ENDS
from inference_trio.client import Session, connect
from inference_trio.display import _NAMES
from inference_trio.terminal import TOKEN_VARIABLE
from tests import answers
from tests.harness import PATIENCE, open_server, settings
from tests.upstream import Request, Upstream, open_upstream

PAGE = (Path(__file__).parent.parent / "docs" / "clients.md").read_text()
EXAMPLES = re.findall(r"<!-- run by tests/test_clients_page.py -->\n```python\n(.*?)```", PAGE, re.DOTALL)


def answer(request: Request) -> Any:
    """Calls the tool, where there is one and it was not called yet."""
    if request.tools and request.messages[-1]["role"] != "tool":
        return answers.calls(answers.tool_call(0, "c1", "get_weather", {"city": "Paris"}))
    return answers.reply("Take ", "one.")


@asynccontextmanager
async def serving(script: Any = answer) -> AsyncIterator[tuple[Upstream, str]]:
    with trio.fail_after(PATIENCE):
        async with open_upstream(script) as upstream, open_server(settings(upstream.base_url)) as server:
            yield upstream, server.url


async def printed(program: str, url: str) -> str:
    """What the program prints, beside this server."""
    program = program.replace("127.0.0.1:8000", url.removeprefix("http://"))
    ended = await trio.run_process([sys.executable, "-W", "error", "-c", program], capture_stdout=True)
    return ended.stdout.decode()


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
async def test_an_example_runs_as_it_is(example: str) -> None:
    async with serving() as (upstream, url):
        said = await printed(example, url)
        assert "Take one." in said
        for request in upstream.requests:
            if request.messages[-1]["role"] == "tool":
                assert "rain" in request.messages[-1]["content"]


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == 5


async def test_an_asyncio_program_asks_and_cancels() -> None:
    """In a thread, because these tests are Trio's."""

    async def program(url: str, cancel: trio.Event, token: trio.lowlevel.TrioToken) -> str:
        with (
            start_blocking_portal("trio") as portal,
            portal.wrap_async_context_manager(connect(url)) as session,
        ):
            said = await asyncio.wrap_future(portal.start_task_soon(session.ask, "hi"))
            waiting = asyncio.ensure_future(asyncio.wrap_future(portal.start_task_soon(session.ask, "hi")))
            await asyncio.to_thread(trio.from_thread.run, cancel.wait, trio_token=token)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            return str(said)

    def run(url: str, cancel: trio.Event, token: trio.lowlevel.TrioToken) -> str:
        return asyncio.run(program(url, cancel, token))

    def script(request: Request) -> Any:
        is_first = len(request.messages) == 1
        return answer(request) if is_first else [answers.text("Hel"), answers.hang()]

    async with serving(script) as (upstream, url), trio.open_nursery() as nursery:
        cancel, said = trio.Event(), []

        async def in_thread() -> None:
            said.append(await trio.to_thread.run_sync(run, url, cancel, trio.lowlevel.current_trio_token()))

        nursery.start_soon(in_thread)
        request = await upstream.wait_for_requests(2)
        cancel.set()
        await request.closed.wait()
    assert said == ["Take one."]


def test_the_exit_statuses_are_those_of_the_help() -> None:
    table = PAGE.partition("| exit status | |")[2].partition("\n\n")[0]
    on_page = dict(re.findall(r"^\| (\d+) \| (.+) \|$", table, re.MULTILINE))
    assert on_page == dict(re.findall(r"^  (\d+) +(.+)$", CHAT_ENDS, re.MULTILINE))
    assert f"`{TOKEN_VARIABLE}`" in PAGE


def test_every_exception_event_and_member_is_named() -> None:
    code = set(re.findall(r"`(\w+)", PAGE))
    assert {name for name in client.__all__ if name.endswith("Error")} <= code
    assert {"TextChunk", "ReasoningChunk", "ToolCall", "ToolResult", "Disconnected", "Resumed", "Draining"} <= code
    assert set(_NAMES.values()) <= code
    assert {name for name in vars(Session) if not name.startswith("_")} >= {"generate", "ask"}
