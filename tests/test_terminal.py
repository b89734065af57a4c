"""`inference-trio chat`, as a process against the whole server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from inference_trio import own_server, terminal
from inference_trio.__main__ import main
from inference_trio.errors import ConfigurationError
from inference_trio.variables import Secret
from tests import answers
from tests.client_bench import CALL, HANGS, HELLO
from tests.harness import PATIENCE, Server, open_server, settings
from tests.terminal import CONTROL_C, CONTROL_D, READY, chat, open_pipes, open_terminal
from tests.test_local_model import needs_model
from tests.upstream import Upstream, open_upstream

TOKEN = "token-of-the-tests"
TOOLS = """
def look(at: str) -> dict:
    "Looks."
    return {"saw": at.upper()}

def odd(at: str) -> dict:
    print("among the answers")
    return {(1, 2): float("nan")}

not_callable = 1
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "my_tools.py").write_text(TOOLS)
    return tmp_path


@attrs.frozen
class Bench:
    upstream: Upstream
    server: Server

    @property
    def url(self) -> str:
        return self.server.url


@asynccontextmanager
async def serving(*script: Any, **changes: Any) -> AsyncIterator[Bench]:
    with trio.fail_after(PATIENCE):
        async with open_upstream(*script) as upstream, open_server(settings(upstream.base_url, **changes)) as server:
            yield Bench(upstream, server)


# On a terminal


async def test_a_conversation_streams_and_keeps_its_history(folder: Path) -> None:
    slow = [answers.text("Hel"), answers.pause("go on"), answers.reply("lo")]
    async with serving(slow, answers.reply("Again")) as it, open_terminal(it.url, folder=folder) as screen:
        await screen.until("> ")
        screen.press("one\n")
        await screen.until("Hel")
        it.upstream.gate("go on").set()
        await screen.until("Hello")
        await screen.until("7 tokens in, 3 out")
        await screen.until("> ")
        screen.press("two\n")
        await screen.until("Again")
        await screen.until("> ")
        screen.press(CONTROL_D)
        assert await screen.process.wait() == 0
        said = [message["content"] for message in it.upstream.requests[1].messages]
        assert said == ["one", "Hello", "two"]


async def test_control_c_cancels_the_generation_and_not_the_program(folder: Path) -> None:
    async with serving(HANGS, HELLO) as it, open_terminal(it.url, folder=folder) as screen:
        await screen.until("> ")
        screen.press("one\n")
        await screen.until("Hel")
        screen.press(CONTROL_C)
        await screen.until("cancelled")
        await it.upstream.requests[0].closed.wait()
        await screen.until("> ")
        screen.press("two\n")
        await screen.until("Hello")
        await screen.until("> ")
        screen.press(CONTROL_D)
        assert await screen.process.wait() == 0


async def test_control_c_at_the_prompt_only_drops_the_line(folder: Path) -> None:
    async with serving(HELLO) as it, open_terminal(it.url, folder=folder) as screen:
        await screen.until("> ")
        screen.press("not this")
        await screen.until("this")
        screen.press(CONTROL_C)
        await screen.until("> ")
        screen.press("but this\n")
        await screen.until("Hello")
        await screen.until("> ")
        screen.press(CONTROL_D)
        assert await screen.process.wait() == 0
        assert it.upstream.requests[0].messages[-1]["content"] == "but this"


async def test_an_error_is_told_and_the_chat_goes_on(folder: Path) -> None:
    broken = [answers.text("Hel"), answers.drop()]
    async with serving(broken, HELLO) as it, open_terminal(it.url, folder=folder) as screen:
        await screen.until("> ")
        screen.press("one\n")
        await screen.until("-32006")
        await screen.until("> ")
        screen.press("two\n")
        await screen.until("Hello")


async def test_a_tool_is_called_and_shown(folder: Path) -> None:
    tool = ["--tool", "my_tools:look"]
    async with serving(CALL, HELLO) as it, open_terminal(it.url, *tool, folder=folder) as screen:
        await screen.until("> ")
        screen.press("one\n")
        await screen.until("look(at='sea')")
        await screen.until('look: {"saw":"SEA"}')
        await screen.until("Hello")


async def test_what_a_model_writes_cannot_steer_the_terminal(folder: Path) -> None:
    hostile = answers.reply("a\x1b]0;owned\x07b\x9b31mc")
    async with serving(hostile) as it, open_terminal(it.url, folder=folder) as screen:
        await screen.until("> ")
        screen.press("one\n")
        await screen.until("a]0;ownedb31mc")
        await screen.until("> ")
        assert "\x1b]0;" not in screen.seen


async def test_lines_that_are_pasted_are_one_message(folder: Path) -> None:
    async with serving(HELLO) as it, open_terminal(it.url, folder=folder) as screen:
        await screen.until(READY)
        screen.press("\x1b[200~one\ntwo\x1b[201~\n")
        await screen.until("Hello")
        assert it.upstream.requests[0].messages[-1]["content"] == "one\ntwo"


async def test_as_json_on_a_terminal_the_prompts_are_not_in_the_output(folder: Path) -> None:
    async with serving(HELLO) as it, open_terminal(it.url, "--json", folder=folder, errors="prompts") as screen:
        await screen.until(READY)
        screen.press("one\n")
        await screen.until('"type":"end"')
        await screen.until(READY)
        screen.press(CONTROL_D)
        assert await screen.process.wait() == 0
        assert "> " not in screen.seen
        assert (folder / "prompts").read_text() == "> > \n"


async def test_a_hang_up_ends_it(folder: Path) -> None:
    async with serving() as it, open_terminal(it.url, folder=folder) as screen:
        await screen.until("> ")
        screen.process.send_signal(signal.SIGHUP)
        assert await screen.process.wait() == 128 + signal.SIGHUP


# In a pipe


async def test_a_message_is_piped_in_and_the_answer_out(folder: Path) -> None:
    async with serving(CALL, HELLO) as it:
        options = ["--tool", "my_tools:look", "--system", "Be brief.", "--temperature", "0.5", "--max-new-tokens", "9"]
        ended = await chat("one\ntwo\n", it.url, *options, folder=folder)
        assert (ended.returncode, ended.stdout) == (0, b"Hello\n")
        assert b"look(at='sea')" in ended.stderr
        request = it.upstream.requests[0]
        assert [message["content"] for message in request.messages] == ["Be brief.", "one\ntwo"]
        assert (request.body["temperature"], request.body["max_tokens"]) == (0.5, 9)


async def test_as_json_every_line_is_an_object(folder: Path) -> None:
    async with serving([answers.reasoning("Hm"), CALL], HELLO) as it:
        ended = await chat("hi", it.url, "--json", "--tool", "my_tools:look", folder=folder)
        lines = [json.loads(line) for line in ended.stdout.splitlines()]
        assert (ended.returncode, ended.stderr) == (0, b"")
        assert lines[:3] == [
            {"type": "reasoning", "text": "Hm"},
            {"type": "tool_call", "id": "c1", "name": "look", "arguments": {"at": "sea"}, "timeout": 300.0},
            {"type": "tool_result", "id": "c1", "name": "look", "result": {"saw": "SEA"}, "error": None},
        ]
        assert {line["type"] for line in lines[3:-1]} == {"text"}
        assert "".join(line["text"] for line in lines[3:-1]) == lines[-1]["final_text"] == "Hello"
        assert lines[-1]["type"] == "end"
        assert lines[-1]["usage"] == {"input_tokens": 14, "output_tokens": 6, "total_tokens": 20}


@pytest.mark.parametrize("options", [(), ("--json",)])
async def test_what_a_tool_prints_and_an_odd_result_do_no_harm(folder: Path, options: tuple[str, ...]) -> None:
    odd = answers.calls(answers.tool_call(0, "c1", "odd", {"at": "sea"}))
    async with serving(odd, HELLO) as it:
        ended = await chat("hi", it.url, *options, "--tool", "my_tools:odd", folder=folder)
        assert ended.returncode == 0
        assert b"among the answers" in ended.stderr
        if options:
            assert json.loads(ended.stdout.splitlines()[1])["result"] == {"1,2": None}
        else:
            assert ended.stdout == b"Hello\n"


async def test_bytes_that_are_no_utf_8_are_replaced(folder: Path) -> None:
    async with serving(HELLO) as it, open_pipes(it.url, folder=folder) as process:
        assert process.stdin
        await process.stdin.send_all(b"caf\xe9")
        await process.stdin.aclose()
        assert await process.wait() == 0
        assert it.upstream.requests[0].messages[-1]["content"] == "caf\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("url", ["http://127.0.0.1:abc", "http://[::1", "http://127.0.0.1:0", "127.0.0.1:8000"])
async def test_a_url_that_is_none_has_status_2(folder: Path, url: str) -> None:
    ended = await chat("hi", url, folder=folder)
    assert ended.returncode == 2
    assert b"expected something like http" in ended.stderr


async def test_a_token_that_is_none_has_status_2_and_is_not_shown(folder: Path) -> None:
    ended = await chat("hi", "http://127.0.0.1:1", folder=folder, CHAT_TOKEN="secret\nline")
    assert ended.returncode == 2
    (line,) = ended.stderr.decode().splitlines()
    assert "CHAT_TOKEN" in line
    assert "secret" not in line


@pytest.mark.parametrize("options", [(), ("--json",)])
async def test_a_generation_that_fails_has_status_1(folder: Path, options: tuple[str, ...]) -> None:
    async with serving([answers.text("Hel"), answers.drop()]) as it:
        ended = await chat("hi", it.url, *options, folder=folder)
        assert ended.returncode == 1
        assert b"-32006" in (ended.stdout if options else ended.stderr)
        assert options or ended.stdout == b"Hel\n"


@pytest.mark.parametrize("path", ["my_tools", "my_tools:nonesuch", "nonesuch:look", "my_tools:not_callable"])
async def test_a_tool_that_is_not_there_has_status_2_and_one_line(folder: Path, path: str) -> None:
    ended = await chat("hi", "http://127.0.0.1:1", "--tool", path, folder=folder)
    assert ended.returncode == 2
    (line,) = ended.stderr.decode().splitlines()
    assert path in line


async def test_a_tool_that_is_given_twice_has_status_2_and_one_line(folder: Path) -> None:
    ended = await chat("hi", "http://127.0.0.1:1", *["--tool", "my_tools:look"] * 2, folder=folder)
    assert ended.returncode == 2
    (line,) = ended.stderr.decode().splitlines()
    assert "--tool" in line
    assert "look" in line


async def test_nothing_piped_in_has_status_2(folder: Path) -> None:
    assert (await chat("\n", "http://127.0.0.1:1", folder=folder)).returncode == 2


async def test_a_server_that_is_not_there_has_status_3(folder: Path) -> None:
    ended = await chat("hi", "http://127.0.0.1:1", folder=folder)
    assert ended.returncode == 3
    assert b"http://127.0.0.1:1" in ended.stderr


async def test_the_token_comes_from_the_environment(folder: Path) -> None:
    async with serving(HELLO, auth_tokens={"tests": Secret(TOKEN)}) as it:
        assert (await chat("hi", it.url, folder=folder)).returncode == 3
        assert (await chat("hi", it.url, folder=folder, CHAT_TOKEN=TOKEN)).stdout == b"Hello\n"


async def test_an_interrupted_answer_has_status_130(folder: Path) -> None:
    async with serving(HANGS) as it, open_pipes(it.url, folder=folder) as process:
        assert process.stdin
        assert process.stdout
        await process.stdin.send_all(b"hi")
        await process.stdin.aclose()
        assert await process.stdout.receive_some() == b"Hel"
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 130
        await it.upstream.requests[0].closed.wait()


async def test_a_reader_that_has_enough_ends_it(folder: Path) -> None:
    slow = [answers.text("Hel"), answers.pause("go on"), answers.text("lo"), answers.hang()]
    async with serving(slow) as it, open_pipes(it.url, folder=folder) as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        await process.stdin.send_all(b"hi")
        await process.stdin.aclose()
        assert await process.stdout.receive_some() == b"Hel"
        await process.stdout.aclose()
        it.upstream.gate("go on").set()
        assert await process.wait() == 128 + signal.SIGPIPE
        assert await process.stderr.receive_some() == b""
        await it.upstream.requests[0].closed.wait()


def test_where_there_is_no_room_for_the_answer_one_line_says_so(folder: Path) -> None:
    command = [sys.executable, "-m", "inference_trio", "chat", "http://127.0.0.1:1", "--json"]
    with Path("/dev/full").open("wb") as full:
        ended = subprocess.run(command, input=b"hi", stdout=full, stderr=subprocess.PIPE, cwd=folder, timeout=60)
    assert ended.returncode == 1
    (line,) = ended.stderr.decode().splitlines()
    assert "No space left" in line


# A server of its own


@needs_model
async def test_without_a_url_it_starts_a_server_on_the_embedded_model(folder: Path) -> None:
    (folder / ".env").write_text("INFERENCE_AUTH_TOKENS=somebody:something-of-length\n")
    with trio.fail_after(PATIENCE):
        ended = await chat("Write one sentence.", "--max-new-tokens", "20", folder=folder, INFERENCE_MAX_TASKS="many")
    assert ended.returncode == 0, ended.stderr
    assert len(ended.stdout) > 10
    assert sorted(os.listdir(folder)) == [".env", "my_tools.py"]  # noqa: PTH208


def test_without_the_embedded_model_one_line_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> Path:
        raise ConfigurationError("missing")

    monkeypatch.setattr(own_server, "find_weights", missing)
    monkeypatch.setattr(terminal, "_piped", lambda: "hi")
    monkeypatch.setattr(terminal, "_signals_watched", nullcontext)
    assert main(["chat"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install" in line
    assert "URL" in line
