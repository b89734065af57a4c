"""The playground's routes, and that its files are in the wheel."""

from __future__ import annotations

import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from inference_trio.variables import Secret
from tests import fakes
from tests.fakes import FakeModel
from tests.harness import Server, open_server
from tests.javascript import WEB, without

ROOT = Path(__file__).parent.parent
SERVED = sorted(str(path.relative_to(WEB)) for path in WEB.rglob("*") if path.is_file())


async def test_the_page_and_its_files_are_served_to_everybody() -> None:
    async with open_server(fakes.settings(auth_tokens={"a": Secret("0123456789abcdef")}), FakeModel()) as server:
        page = await server.get("/")
        assert page.status_code == 200
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert "script-src 'self'" in page.headers["content-security-policy"]
        for name in SERVED:
            answer = await server.get(f"/web/{name}")
            assert (answer.status_code, answer.content) == (200, (WEB / name).read_bytes()), name
        script = await server.get("/web/client.js")
        assert script.headers["content-type"] == "text/javascript; charset=utf-8"


async def test_what_has_not_changed_is_not_sent_again() -> None:
    async with open_server(fakes.settings(), FakeModel()) as server:
        first = await server.get("/web/client.js")
        assert first.headers["cache-control"] == "no-cache"
        again = await server.get("/web/client.js", headers={"If-None-Match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        other = await server.get("/web/client.js", headers={"If-None-Match": '"another"'})
        assert other.status_code == 200


@pytest.mark.parametrize(
    "path", ["nothing.js", "", "../server.py", "%2e%2e/server.py", "..%2fserver.py", "/etc/passwd", "vendor", "."]
)
async def test_nothing_else_is_served(path: str) -> None:
    async with open_server(fakes.settings(), FakeModel()) as server:
        assert await status_of(server, f"/web/{path}") in (301, 308, 404)


async def status_of(server: Server, path: str) -> int:
    return (await server.get(path)).status_code


async def test_the_page_is_told_which_model_answers_and_whether_it_needs_a_token() -> None:
    changes = {"allowed_models": frozenset({"b", "a"}), "model_name": "m", "provider": "local"}
    async with open_server(fakes.settings(**changes), FakeModel()) as server:
        told = {"model": "m", "models": ["a", "b", "m"], "provider": "local", "auth": False}
        assert (await server.get("/playground.json")).json() == told
    async with open_server(fakes.settings(auth_tokens={"a": Secret("0123456789abcdef")}), FakeModel()) as server:
        assert (await server.get("/playground.json")).json()["auth"] is True


def test_the_wheel_has_the_files(tmp_path: Path) -> None:
    uv = shutil.which("uv") or without("uv")
    command = [uv, "build", "--quiet", "--wheel", "--out-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=100)
    (wheel,) = tmp_path.glob("*.whl")
    assert {f"inference_trio/web/{name}" for name in SERVED} <= set(zipfile.ZipFile(wheel).namelist())
