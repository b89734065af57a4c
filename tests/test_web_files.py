"""The files of the JavaScript client and the playground, as files: types, format, what is shipped with them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.harness import PATIENCE
from tests.javascript import NODE, PROJECT, WEB, node_modules, without

LARGEST = 1_000_000


def npm_packages() -> Path:
    return node_modules() or without("npm")


def ended(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=100)


USE = """
import { createSession, InferenceError } from "./client.js";
const look = { name: "look", run: async ({ at }: any, { signal }: { signal: AbortSignal }) => [at, signal] };
const session = await createSession("/", { tools: [look] });
for await (const event of session.generate("hi", { temperature: 0, logit_bias: { a: 1 } })) {
  if (event.type === "text") event.text.trim();
  if (event.type === "end") event.usage?.output_tokens.toFixed();
  // @ts-expect-error
  if (event.type === "nonesuch") throw new InferenceError("x", 1);
}
// @ts-expect-error
session.generate("hi", { temperature: "hot" });
"""


@pytest.mark.parametrize(("change", "is_right"), [(("", ""), True), (("event.text.trim()", "event.chunk"), False)])
def test_the_types_pass_the_strict_compiler(change: tuple[str, str], is_right: bool, tmp_path: Path) -> None:
    modules = npm_packages()
    shutil.copytree(WEB, tmp_path, dirs_exist_ok=True)
    shutil.copy(modules / "marked" / "lib" / "marked.d.ts", tmp_path / "vendor" / "marked.d.ts")
    (tmp_path / "use.ts").write_text(USE.replace(*change))
    result = compiled(tmp_path, "--noEmit", "--checkJs", "--allowJs", "use.ts", "app.js", "client.js")
    assert (result.returncode == 0) == is_right, result.stdout
    without_scripts = compiled(tmp_path, "--noEmit", "use.ts")
    assert (without_scripts.returncode == 0) == is_right, without_scripts.stdout


def compiled(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    strict = "--strict --target es2023 --module es2022 --moduleResolution bundler --newLine lf"
    return ended(npm_packages() / ".bin" / "tsc", *strict.split(), "--types", "", *options, cwd=folder)


def test_the_declarations_are_those_of_the_client(tmp_path: Path) -> None:
    """To make them anew, run this with the options below in `inference_trio/web`."""
    shutil.copy(WEB / "client.js", tmp_path)
    result = compiled(tmp_path, "--allowJs", "--declaration", "--emitDeclarationOnly", "--outDir", "made", "client.js")
    assert result.returncode == 0, result.stdout
    assert (tmp_path / "made" / "client.d.ts").read_text() == (WEB / "client.d.ts").read_text()


def test_the_scripts_are_formatted() -> None:
    command = [npm_packages() / ".bin" / "prettier", "--config", PROJECT / ".prettierrc.json", "--check"]
    result = ended(*command, *WEB.glob("*.js"), cwd=WEB)
    assert result.returncode == 0, result.stderr


def test_what_is_shipped_of_others_is_what_they_published() -> None:
    published = npm_packages() / "marked"
    version = json.loads((published / "package.json").read_text())["version"]
    assert f"version {version}," in (WEB / "vendor" / "README.txt").read_text()
    script = re.sub(
        r"^//# sourceMappingURL.*\n?", "", (published / "lib" / "marked.esm.js").read_text(), flags=re.MULTILINE
    )
    assert (WEB / "vendor" / "marked.js").read_text() == script
    assert (WEB / "vendor" / "marked.LICENSE.txt").read_bytes() == (published / "LICENSE").read_bytes()


def test_the_page_needs_nothing_from_elsewhere_and_no_script_or_style_within_it() -> None:
    page = (WEB / "index.html").read_text()
    assert re.findall(r"<style|\sstyle=|\son\w+=|javascript:", page) == []
    assert [tag for tag in re.findall(r"<script[^>]*>", page) if "src=" not in tag] == []
    addresses = re.findall(r"""(?:src|href)=["']([^"']*)""", page)
    assert addresses
    assert [address for address in addresses if re.match(r"\w+:|//", address)] == []
    for path in [path for path in WEB.rglob("*") if path.is_file()]:
        assert path.stat().st_size < LARGEST, path


def test_no_html_is_made_from_text() -> None:
    ways = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|createContextualFragment|\beval\b|Function\("
    )
    for path in WEB.glob("*.js"):
        assert re.findall(ways, path.read_text()) == [], path


CASES = {
    "(17.5 * 23) - 2^7": 274.5,
    "-2^2": -4,
    "2^3^2": 512,
    "2*-3": -6,
    "1-2-3": -4,
    "8/4/2": 1,
    "2^-1": 0.5,
    ".5e1 % 3": 2,
    "3 \u00d7 (4 \u2212 1) \u00f7 9": 1,
    "--1": 1,
    "2**3": 8,
}
NONE = ["", "1 +", "(1", "1)", "1 2", "alert(1)", "1 // 2", "constructor", "(" * 1000, "2;3", "0x10"]


def test_the_calculator_calculates_and_nothing_else(tmp_path: Path) -> None:
    script = tmp_path / "calculate.mjs"
    script.write_text(
        f"import {{ calculate }} from {json.dumps((WEB / 'tools.js').as_uri())};"
        f"const value = (text) => {{ try {{ return calculate(text); }} catch (error) {{ return error.name; }} }};"
        f"console.log(JSON.stringify({json.dumps([*CASES, *NONE])}.map(value)));"
    )
    command = [NODE or without("Node"), "--no-warnings", str(script)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE).stdout
    assert json.loads(printed) == [*CASES.values(), *["SyntaxError"] * len(NONE)]
