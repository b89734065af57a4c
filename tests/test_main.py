"""The server as a process, started as the README says."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import trio
import trio_websocket

from inference_trio.process import loading
from tests.harness import KEY
from tests.processes import reserved_port
from tests.test_local_model import ask_weather, needs_model

SERVE = [sys.executable, "-m", "inference_trio", "serve"]
HYPERCORN = [sys.executable, "-m", "hypercorn", "inference_trio.app:app", "--worker-class", "trio"]
ROOT = Path(__file__).parent.parent
STARTS_WITHIN = 100  # seconds; only a defect takes so long


def environment(**variables: str) -> dict[str, str]:
    ours = ("LLM_", "INFERENCE_", "API_KEY_ENV_VAR", "DEEPSEEK_", "OPENAI_", "LANG", "OTEL_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return inherited | variables


def run(command: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, env=environment(**variables), capture_output=True, text=True, timeout=STARTS_WITHIN
    )


@contextmanager
def running(command: list[str], folder: Path, **variables: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server's process and its address, once it is ready."""
    with reserved_port() as port, (folder / "console").open("w+") as console:
        at = ["--port", str(port)] if "serve" in command else ["--bind", f"127.0.0.1:{port}"]
        process = subprocess.Popen(
            [*command, *at], cwd=folder, env=environment(**variables), text=True, stdout=console, stderr=console
        )
        try:
            trio.run(wait_until_ready, process, f"http://127.0.0.1:{port}")
            yield process, f"http://127.0.0.1:{port}"
        finally:
            process.kill()
            process.wait()


async def wait_until_ready(process: subprocess.Popen[str] | trio.Process, url: str) -> None:
    with trio.fail_after(STARTS_WITHIN):
        async with httpx2.AsyncClient(verify=False) as http:
            while process.poll() is None:
                try:
                    if (await http.get(f"{url}/readyz")).status_code == 200:
                        return
                except httpx2.TransportError:
                    await trio.sleep(0.05)
    raise AssertionError("the server ended before it was ready")


@pytest.mark.parametrize("command", [SERVE, HYPERCORN], ids=["serve", "hypercorn"])
@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"DEEPSEEK_API_KEY": KEY, "INFERENCE_MAX_TASKS": "many"}, "INFERENCE_MAX_TASKS"),
        ({"LLM_PROVIDER": "nonesuch", "LLM_MODEL_NAME": "m"}, "nonesuch"),
    ],
)
def test_wrong_settings_end_the_process_with_one_line(
    command: list[str], variables: dict[str, str], named: str, tmp_path: Path
) -> None:
    anywhere = ["--bind", "127.0.0.1:0"] if command is HYPERCORN else []
    ended = run([*command, *anywhere], tmp_path, **variables)
    lines = [line for line in ended.stderr.splitlines() if "Running on" not in line]
    assert len(lines) == 1, ended.stderr
    assert named in lines[0]
    assert KEY not in ended.stderr
    if command is SERVE:
        assert ended.returncode == 2


def test_several_workers_that_would_not_know_each_others_sessions_are_refused(tmp_path: Path) -> None:
    several = ["--bind", "127.0.0.1:0", "--workers", "2"]
    ended = run([*HYPERCORN, *several], tmp_path, DEEPSEEK_API_KEY=KEY, INFERENCE_LOG_FILE="")
    said = {line for line in ended.stderr.splitlines() if "Running on" not in line}
    assert len(said) == 1, ended.stderr
    assert "2 workers" in said.pop()


def test_a_port_that_is_taken_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        ended = run([*SERVE, "--port", port], tmp_path, DEEPSEEK_API_KEY=KEY)
    assert (ended.returncode, len(ended.stderr.splitlines())) == (1, 1)
    assert port in ended.stderr


def test_a_closed_standard_output_does_not_matter() -> None:
    program = (
        "import sys; sys.stdout = sys.stderr = None; from inference_trio.process import *; complain('x'); leave(7)"
    )
    assert run([sys.executable, "-c", program], ROOT).returncode == 7


def test_a_server_that_fails_ends_and_says_so() -> None:
    command = [sys.executable, "-m", "tests.launch", '{"broken": true}', "serve", "--port", "0"]
    ended = run(command, ROOT, DEEPSEEK_API_KEY=KEY, INFERENCE_LOG_FILE="")
    assert ended.returncode == 1
    assert "defect in the server: it ends" in ended.stderr
    assert "FileNotFoundError" in ended.stderr
    assert "inference-trio: the server has a defect, see the log" in ended.stderr.splitlines()


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_serve_says_where_it_is_and_ends_when_it_is_told_to(stop: signal.Signals, tmp_path: Path) -> None:
    with running(SERVE, tmp_path, DEEPSEEK_API_KEY=KEY) as (process, url):
        process.send_signal(stop)
        assert process.wait(STARTS_WITHIN) == 0
    assert (tmp_path / "console").read_text() == f"inference_trio serves at {url}, until Ctrl-C\n"
    assert (tmp_path / "inference_server.log").exists()


def test_hypercorns_command_serves_it_with_our_limits(tmp_path: Path) -> None:
    limits = {"DEEPSEEK_API_KEY": KEY, "INFERENCE_MAX_MESSAGE_BYTES": "1000"}

    async def too_large(url: str) -> int:
        async with httpx2.AsyncClient(verify=False) as http:
            session_id = (await http.post(f"{url}/create_session")).json()["session_id"]
        async with trio_websocket.open_websocket_url(f"{url.replace('http', 'ws')}/ws/{session_id}") as socket:
            await socket.send_message("x" * 1001)
            with pytest.raises(trio_websocket.ConnectionClosed) as closed:
                await socket.get_message()
            await trio.aclose_forcefully(socket._stream)
            return closed.value.reason.code

    with running(HYPERCORN, tmp_path, **limits) as (process, url):
        assert trio.run(too_large, url) == 1009
        process.send_signal(signal.SIGTERM)
        assert process.wait(STARTS_WITHIN) == 0


@needs_model
def test_the_embedded_model_calls_a_tool_of_the_client_and_goes_on_with_its_result(tmp_path: Path) -> None:
    request = ask_weather("Paris")
    params = {
        "history": request["messages"],
        "tool_choice": "required",
        "max_new_tokens": request["max_tokens"],
        **{name: request[name] for name in ("logit_bias", "temperature", "seed")},
    }

    async def converse(url: str) -> list[Any]:
        frames: list[Any] = []
        async with httpx2.AsyncClient(verify=False) as http:
            created = await http.post(f"{url}/create_session", json={"tools": request["tools"]})
        at = f"{url.replace('http', 'ws')}/ws/{created.json()['session_id']}"
        with trio.fail_after(STARTS_WITHIN):
            async with trio_websocket.open_websocket_url(at) as socket:
                call = {"jsonrpc": "2.0", "id": 1, "method": "generate", "params": params}
                await socket.send_message(json.dumps(call))
                while not frames or frames[-1].get("method") not in ("end", "error"):
                    frames.append(json.loads(await socket.get_message()))
                    if frames[-1].get("method") == "function_call_request":
                        asked = frames[-1]["params"]
                        result = {"tool_call_id": asked["request_id"], "result": {"weather": "rain"}}
                        given = {"task_id": asked["task_id"], "results": [result]}
                        answer = {"jsonrpc": "2.0", "id": 2, "method": "tool_result", "params": given}
                        await socket.send_message(json.dumps(answer))
        return frames

    with running(SERVE, tmp_path, LLM_PROVIDER="local") as (_, url):
        frames = trio.run(converse, url)
    (asked,) = [frame["params"] for frame in frames if frame.get("method") == "function_call_request"]
    assert (asked["tool_name"], asked["parameters"]) == ("get_weather", {"city": "Paris"})
    end = frames[-1]["params"]
    assert end["status_message"] == "completed"
    assert "rain" in end["final_text"]
    assert len([frame for frame in frames if frame.get("method") == "text_chunk"]) > 1
    assert [message["role"] for message in end["messages"]] == ["assistant", "tool", "assistant"]


def test_what_is_made_while_loading_is_never_looked_at_by_the_collector() -> None:
    try:
        with loading():
            assert not gc.isenabled()
            made = [object()]
        assert gc.isenabled()
        assert not any(found is made for found in gc.get_objects())  # which leaves out what is frozen
    finally:
        gc.unfreeze()


def test_the_collector_goes_on_after_loading_has_failed() -> None:
    with pytest.raises(ImportError), loading():
        raise ImportError
    assert gc.isenabled()
