"""What the README says is run, and its table of settings is the one of the code."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Collection
from pathlib import Path

import trio

from inference_trio.settings import Settings
from inference_trio.variables import Secret
from tests import answers
from tests.harness import KEY, PATIENCE, open_server, settings
from tests.javascript import NODE, WEB, without
from tests.upstream import open_upstream

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def table_of_settings() -> str:
    """The README's table, from the settings."""
    lines = ["| variable | default | meaning |", "|---|---|---|"]
    defaults = Settings.load({"DEEPSEEK_API_KEY": KEY}, dotenv=None)
    for name, variable in Settings.variables().items():
        lines.append(f"| `{variable.name}` | {written(getattr(defaults, name))} | {variable.help} |")
    return "\n".join(lines)


def written(value: object) -> str:
    if value is None or (isinstance(value, Collection) and not value):
        return "none"
    if isinstance(value, Secret):
        value = value.reveal()
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def test_the_table_of_settings_is_that_of_the_code() -> None:
    found = re.search(r"<!-- settings -->\n(.*?)\n?<!-- /settings -->", README, re.DOTALL)
    assert found is not None
    assert found[1] == table_of_settings()


def test_the_figures_are_those_of_the_last_benchmark() -> None:
    section = README.partition("## What it costs")[2].partition("\n## ")[0]
    figures = re.findall(r"\*\*(.+?)\*\*", section)
    measured = (ROOT / "docs" / "benchmarks.md").read_text()
    assert figures
    assert [figure for figure in figures if f"**{figure}**" not in measured] == []


def test_every_module_has_its_line() -> None:
    named = set(re.findall(r"`(\w+\.py)`", README))
    there = {path.name for path in (ROOT / "inference_trio").glob("*.py")} - {"__init__.py"}
    assert there <= named


def example(language: str, host: str) -> str:
    found = re.search(rf"<!-- run by tests/test_readme.py -->\n```{language}\n(.*?)```", README, re.DOTALL)
    assert found is not None
    assert len([line for line in found[1].splitlines() if line]) <= 16
    return found[1].replace("127.0.0.1:8000", host)


async def test_the_function_of_the_readme_is_called_in_python() -> None:
    call = answers.calls(answers.tool_call(0, "c1", "get_weather", {"city": "Paris"}))
    async with (
        open_upstream(call, answers.reply("Take one.")) as upstream,
        open_server(settings(upstream.base_url)) as server,
    ):
        program = example("python", server.url.removeprefix("http://"))
        with trio.fail_after(PATIENCE):
            ended = await trio.run_process([sys.executable, "-W", "error", "-c", program], capture_stdout=True)
        assert ended.stdout.startswith(b"Take one.\n Usage(input_tokens=14,")
        assert json.loads(upstream.requests[1].messages[-1]["content"])["sky"] == "rain"
        assert upstream.requests[0].tools[0]["function"]["description"] == "The weather in a city."


async def test_the_function_of_the_readme_is_called_in_javascript(tmp_path: Path) -> None:
    node = NODE or without("Node")
    call = answers.calls(answers.tool_call(0, "c1", "get_weather", {"city": "Paris"}))
    async with (
        open_upstream(call, answers.reply("Take one.")) as upstream,
        open_server(settings(upstream.base_url)) as server,
    ):
        shutil.copy(WEB / "client.js", tmp_path)
        script = trio.Path(tmp_path / "app.mjs")
        await script.write_text(example("javascript", server.url.removeprefix("http://")))
        command = [node, "--experimental-websocket", "--no-warnings", str(script)]
        with trio.fail_after(PATIENCE):
            ended = await trio.run_process(command, capture_stdout=True)
        assert ended.stdout == b"Take one."
        assert json.loads(upstream.requests[1].messages[-1]["content"])["sky"] == "rain"


if __name__ == "__main__":  # writes the table anew
    table = f"<!-- settings -->\n{table_of_settings()}\n<!-- /settings -->"
    (ROOT / "README.md").write_text(re.sub(r"<!-- settings -->.*<!-- /settings -->", table, README, flags=re.DOTALL))
