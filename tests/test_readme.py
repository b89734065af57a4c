"""What the README says is run, and its table of settings is the one of the code."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

from inference_trio.settings import Settings
from tests.harness import KEY
from tests.test_local_model import needs_model
from tests.test_main import SERVE, running

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
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def test_the_table_of_settings_is_that_of_the_code() -> None:
    found = re.search(r"<!-- settings -->\n(.*?)\n?<!-- /settings -->", README, re.DOTALL)
    assert found is not None
    assert found[1] == table_of_settings()


def test_every_module_has_its_line() -> None:
    named = set(re.findall(r"`(\w+\.py)`", README))
    there = {path.name for path in (ROOT / "inference_trio").glob("*.py")} - {"__init__.py"}
    assert there <= named


def example(language: str, host: str) -> str:
    found = re.search(rf"<!-- run by tests/test_readme.py -->\n```{language}\n(.*?)```", README, re.DOTALL)
    assert found is not None
    assert len(found[1].splitlines()) <= 18
    return found[1].replace("127.0.0.1:8000", host)


@needs_model
def test_the_clients_of_the_readme_print_a_generation(tmp_path: Path) -> None:
    with running(SERVE, tmp_path, LLM_PROVIDER="local") as (_, url):
        host = url.removeprefix("http://")
        commands = {"python": [sys.executable, "-W", "error", "-c", example("python", host)]}
        if node := shutil.which("node"):
            script = tmp_path / "client.mjs"
            script.write_text(example("javascript", host))
            commands["javascript"] = [node, "--experimental-websocket", str(script)]
        for language, command in commands.items():
            ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
            assert ended.returncode == 0, ended.stderr
            text, usage = ended.stdout.rsplit("\n", 2)[:2]
            assert len(text) > 10, language
            assert "output_tokens" in usage


if __name__ == "__main__":  # writes the table anew
    table = f"<!-- settings -->\n{table_of_settings()}\n<!-- /settings -->"
    (ROOT / "README.md").write_text(re.sub(r"<!-- settings -->.*<!-- /settings -->", table, README, flags=re.DOTALL))
