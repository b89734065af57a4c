"""The files under `deploy/`: nginx with TLS is run before two servers, the unit and the image are checked in pieces.

A test is left out where its program is missing; `.ci/run` installs nginx.
"""

from __future__ import annotations

import os
import re
import shutil
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import attrs
import httpx2
import pytest
import trio
import trio_websocket
import trustme
import yaml

from inference_trio.settings import Settings
from inference_trio.variables import Secret
from tests import answers
from tests.harness import KEY, PATIENCE, Client, Server, open_server, settings
from tests.javascript import STRICT
from tests.processes import reserved_port
from tests.redis_server import running_redis
from tests.test_main import SERVE, environment, wait_until_ready
from tests.test_metrics import scrape
from tests.upstream import Request, Upstream, open_upstream

DEPLOY = Path(__file__).parent.parent / "deploy"
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
needs_nginx = pytest.mark.skipif(NGINX is None and STRICT not in os.environ, reason="nginx is not installed")

HERE = [f"127.0.0.{number}" for number in range(2, 18)]
"""Addresses of clients: enough for nginx to use both servers."""

STREAMING = [answers.text("Hel"), answers.pause("go on"), answers.text("lo"), answers.finish(), answers.done()]

BALANCED = {"hash $remote_addr consistent;": "least_conn;"}
"""What nginx.conf says to do where sessions are in Redis."""

MAIN = """
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 256; }}
http {{
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/site.conf;
}}
"""


@attrs.define(eq=False)
class Front:
    """nginx as its clients see it."""

    port: int
    tls: ssl.SSLContext
    access_log: Path

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    @asynccontextmanager
    async def http(self, from_address: str = "127.0.0.1") -> AsyncIterator[httpx2.AsyncClient]:
        transport = httpx2.AsyncHTTPTransport(verify=self.tls, local_address=from_address)
        async with httpx2.AsyncClient(base_url=self.url, transport=transport, timeout=PATIENCE) as http:
            yield http

    async def create_session(self, from_address: str = "127.0.0.1") -> str:
        async with self.http(from_address) as http:
            response = await http.post("/create_session")
        assert response.status_code == 200, response.text
        session_id: str = response.json()["session_id"]
        return session_id

    @asynccontextmanager
    async def connect(
        self, session_id: str, from_address: str = "127.0.0.1", query: str = "", **options: Any
    ) -> AsyncIterator[Client]:
        plain = await trio.open_tcp_stream("127.0.0.1", self.port, local_address=from_address)
        stream = trio.SSLStream(plain, self.tls, server_hostname="127.0.0.1", https_compatible=True)
        async with trio.open_nursery() as nursery:
            socket = await trio_websocket.wrap_client_stream(
                nursery, stream, f"127.0.0.1:{self.port}", f"/ws/{session_id}{query}", **options
            )
            yield Client(socket, session_id)
            await trio.aclose_forcefully(stream)  # trio-websocket fails where a ping crosses its own closing

    def answered(self) -> set[str]:
        """The statuses of all requests that are over."""
        return set(re.findall(r'" (\d{3}) ', self.access_log.read_text()))


def configured(folder: Path, port: int, urls: Sequence[str], nginx: dict[str, str]) -> ssl.SSLContext:
    """Writes nginx's files, and returns what its clients trust."""
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(folder / "key.pem")
    for part in certificate.cert_chain_pems:
        part.write_to_path(folder / "fullchain.pem", append=True)
    site = (DEPLOY / "nginx.conf").read_text()
    changes = {
        "/etc/ssl/inference-trio/": f"{folder}/",
        "/var/log/nginx/": f"{folder}/",
        "listen 443 ssl;": f"listen 127.0.0.1:{port} ssl;",
        "listen [::]:443 ssl;": "",
        "127.0.0.1:8001": urls[0].removeprefix("http://"),
        "127.0.0.1:8002": urls[1].removeprefix("http://"),
    }
    for ours, theirs in (changes | nginx).items():
        assert ours in site
        site = site.replace(ours, theirs)
    (folder / "site.conf").write_text(site)
    (folder / "nginx.conf").write_text(MAIN.format(folder=folder))
    tls = ssl.create_default_context()
    authority.configure_trust(tls)
    return tls


@asynccontextmanager
async def fronted(folder: Path, urls: Sequence[str], nginx: dict[str, str] | None = None) -> AsyncIterator[Front]:
    """nginx with the project's file, where only addresses and paths are other ones, and what ``nginx`` replaces."""
    with reserved_port() as port:
        front = Front(port, configured(folder, port, urls, nginx or {}), folder / "inference-trio.log")
        command = [str(NGINX), "-p", str(folder), "-c", str(folder / "nginx.conf")]
        async with started(command) as process:
            await wait_until_answered(process, front)
            yield front
    assert not re.search(r"\[(emerg|alert|crit)\]", (folder / "error.log").read_text())


@asynccontextmanager
async def started(command: list[str], **options: Any) -> AsyncIterator[trio.Process]:
    """A process that is told to end at the end."""
    async with trio.open_nursery() as nursery:
        process = await nursery.start(partial(trio.run_process, command, check=False, **options))
        yield process
        nursery.cancel_scope.cancel()


async def wait_until_answered(process: trio.Process, front: Front) -> None:
    with trio.fail_after(PATIENCE):
        async with front.http() as http:
            while process.poll() is None:
                try:
                    assert (await http.get("/healthz")).status_code in (200, 502)
                except httpx2.TransportError:
                    await trio.sleep(0.02)
                else:
                    return
    raise AssertionError("nginx ended before it answered")


@attrs.define(eq=False)
class Deployment:
    front: Front
    servers: Sequence[Server]
    upstream: Upstream


@asynccontextmanager
async def deployed(
    folder: Path, *script: Any, nginx: dict[str, str] | None = None, **changes: Any
) -> AsyncIterator[Deployment]:
    """nginx before two servers, which are in this process."""
    async with (
        open_upstream(*script) as upstream,
        open_server(settings(upstream.base_url, **changes)) as one,
        open_server(settings(upstream.base_url, **changes)) as two,
        fronted(folder, [one.url, two.url], nginx) as front,
    ):
        yield Deployment(front, [one, two], upstream)


@asynccontextmanager
async def server_process(folder: Path, upstream: Upstream, **variables: str) -> AsyncIterator[str]:
    """The URL of ``inference-trio serve`` in a process of its own."""
    await trio.Path(folder).mkdir()
    ours = {"LLM_BASE_URL": upstream.base_url, "DEEPSEEK_API_KEY": KEY, "INFERENCE_DRAIN_SECONDS": "0"}
    options = {"cwd": folder, "env": environment(**ours, **variables), "stdout": subprocess.DEVNULL}
    with reserved_port() as port:
        url = f"http://127.0.0.1:{port}"
        async with started([*SERVE, "--port", str(port)], **options) as process:
            await wait_until_ready(process, url)
            yield url


# nginx


@needs_nginx
async def test_a_generation_streams_unbuffered_over_tls_from_one_of_two_processes(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(open_upstream(STREAMING))
        urls = [await stack.enter_async_context(server_process(tmp_path / name, upstream)) for name in ("one", "two")]
        front = await stack.enter_async_context(fronted(tmp_path, urls))
        async with front.connect(await front.create_session()) as client:
            await client.generate()
            assert (await client.hear())["params"]["chunk"] == "Hel"
            upstream.gate("go on").set()
            *_, end = await client.until_end()
            assert end["params"]["final_text"] == "Hello"


@needs_nginx
async def test_each_client_reaches_the_server_that_has_its_session(tmp_path: Path) -> None:
    """In memory a session is known to one server, and nginx goes by the client's address."""
    async with deployed(tmp_path, lambda _: answers.reply("x")) as it:
        for address in HERE:
            async with it.front.connect(await it.front.create_session(address), address) as client:
                assert (await client.ask_model())["status_message"] == "completed"
        made = [(await scrape(server))["inference_sessions",] for server in it.servers]
        assert sum(made) == len(HERE)
        assert min(made) > 0, "both are used"


@needs_nginx
async def test_with_redis_each_server_knows_every_session_and_none_is_sticky(tmp_path: Path) -> None:
    """One after the other: with `least_conn` and nobody else connected, nginx takes them in turn."""
    with running_redis() as redis:
        async with deployed(tmp_path, lambda _: answers.reply("x"), nginx=BALANCED, store=Secret(redis.url)) as it:
            session_id = await it.front.create_session()
            for _ in range(4):
                async with it.front.connect(session_id) as client:
                    assert (await client.ask_model())["status_message"] == "completed"
            ended = [await scrape(server) for server in it.servers]
        done = [counted.get(("inference_tasks_ended_total", "done", "deepseek-chat"), 0) for counted in ended]
        assert sum(done) == 4
        assert min(done) > 0, "both have run some"


@needs_nginx
async def test_new_sessions_go_to_the_server_that_is_left(tmp_path: Path) -> None:
    nobody = "http://127.0.0.1:1"
    async with (
        open_upstream() as upstream,
        open_server(settings(upstream.base_url)) as left,
        fronted(tmp_path, [left.url, nobody]) as front,
    ):
        for address in HERE:
            await front.create_session(address)
        assert (await scrape(left))["inference_sessions",] == len(HERE)


STORES = pytest.mark.parametrize("store", ["memory", "redis"])


@pytest.fixture
def deployment(store: str, tmp_path: Path) -> Iterator[Callable[..., AbstractAsyncContextManager[Deployment]]]:
    """`deployed` with what the store asks for."""
    if store == "memory":
        yield partial(deployed, tmp_path)
        return
    with running_redis() as redis:
        yield partial(deployed, tmp_path, nginx=BALANCED, store=Secret(redis.url))


def held_or_not(request: Request) -> answers.Answer:
    return STREAMING if request.messages[-1]["content"] == "hold" else answers.reply("x")


@needs_nginx
@STORES
async def test_while_a_server_stops_nothing_is_refused_and_what_runs_there_ends(store: str, deployment: Any) -> None:
    """New clients stay connected: so the server that stops has the least of them."""
    async with deployment(held_or_not, drain_seconds=3600.0) as it:
        async with it.front.connect(await it.front.create_session()) as client, AsyncExitStack() as connected:
            await client.generate("hold")
            assert (await client.hear())["params"]["chunk"] == "Hel"
            (stopping,) = [
                server for server in it.servers if (await scrape(server))["inference_tasks", "streaming"] == 1
            ]
            stopping.shutdown.set()
            assert (await client.hear())["method"] == "draining"
            for address in HERE:
                connection = it.front.connect(await it.front.create_session(address), address)
                new = await connected.enter_async_context(connection)
                assert (await new.ask_model())["status_message"] == "completed"
            it.upstream.gate("go on").set()
            *_, end = await client.until_end()
            assert end["params"]["final_text"] == "Hello"
            await closed(client)
        for address in HERE:
            await it.front.create_session(address)
    assert it.front.answered() == {"101", "200"}


@needs_nginx
@STORES
async def test_a_client_that_is_cut_off_from_a_server_that_stops_comes_back_to_where_its_session_is(
    store: str, deployment: Any
) -> None:
    """In memory that is the same server, and with Redis the other one."""
    async with deployment(held_or_not, drain_seconds=3600.0) as it:
        session_id = await it.front.create_session()
        async with it.front.connect(session_id) as client:
            await client.generate("hold")
            assert (await client.hear())["params"]["chunk"] == "Hel"
            for server in it.servers:
                if (await scrape(server))["inference_tasks", "streaming"] == 1:
                    server.shutdown.set()
            assert (await client.hear())["method"] == "draining"
        for _ in range(4):
            async with it.front.connect(session_id, query="?after=1") as client:
                assert (await client.until("resumed"))["tasks"][0]["state"] == "streaming"
        async with it.front.connect(session_id, query="?after=1") as client:
            it.upstream.gate("go on").set()
            *_, end = await client.until_end()
            assert end["params"]["final_text"] == "Hello"
    assert it.front.answered() == {"101", "200"}


async def closed(client: Client) -> None:
    with trio.fail_after(PATIENCE), pytest.raises(trio_websocket.ConnectionClosed) as over:
        await client.socket.get_message()
    assert over.value.reason is not None
    assert over.value.reason.code == 1012


@needs_nginx
async def test_a_session_in_memory_is_found_at_whichever_server_made_it(tmp_path: Path) -> None:
    """Also with a ticket, and one that is nowhere is nowhere."""
    token = "a-token-of-the-tests"
    bearer = {"Authorization": f"Bearer {token}"}
    async with deployed(tmp_path, lambda _: answers.reply("x"), auth_tokens={"alice": Secret(token)}) as it:
        async with it.front.http() as http:
            session_id = (await http.post("/create_session", headers=bearer)).json()["session_id"]
        for address in HERE:
            async with it.front.http(address) as http:
                answer = await http.post(f"/sessions/{session_id}/ticket", headers=bearer)
                assert (await http.post("/sessions/nowhere/ticket", headers=bearer)).status_code == 404
            offered = ["inference-trio", f"ticket.{answer.json()['ticket']}"]
            async with it.front.connect(session_id, address, subprotocols=offered) as client:
                assert (await client.ask_model())["status_message"] == "completed"


@needs_nginx
async def test_a_limit_is_told_to_whom_it_concerns_and_no_server_counts_as_down(tmp_path: Path) -> None:
    async with deployed(tmp_path, lambda _: answers.reply("x"), max_sessions=1) as it:
        made = [await it.front.create_session(), await it.front.create_session()]
        for address in HERE:
            async with it.front.http(address) as http:
                full = await http.post("/create_session")
                assert (full.status_code, full.json()["error"]["code"]) == (503, -32005)
                assert int(full.headers["retry-after"]) > 0
            for session_id in made:
                async with it.front.connect(session_id, address) as client:
                    assert (await client.ask_model())["status_message"] == "completed"


@needs_nginx
async def test_what_nginx_adds_and_what_it_keeps_back(tmp_path: Path) -> None:
    async with deployed(tmp_path, lambda _: answers.reply("x")) as it, it.front.http() as http:
        assert "max-age" in (await http.get("/healthz")).headers["strict-transport-security"]
        assert (await http.get("/metrics")).status_code == 404
        large = await http.post("/create_session", content=b" " * (4 * 1024 * 1024 + 1))
        assert large.status_code == 413
        for origin, status in ((it.front.url, 200), ("https://elsewhere.example", 403)):
            response = await http.post("/create_session", headers={"Origin": origin})
            assert response.status_code == status, "the server knows its own address behind nginx"


@needs_nginx
async def test_no_whole_id_of_a_session_is_in_the_access_log(tmp_path: Path) -> None:
    async with deployed(tmp_path, lambda _: answers.reply("x")) as it, it.front.http() as http:
        session_id = await it.front.create_session()
        async with it.front.connect(session_id) as client:
            await client.ask_model()
        await http.post(f"/sessions/{session_id}/ticket")
    logged = it.front.access_log.read_text()
    assert session_id not in logged
    assert f'"GET /ws/{session_id[:8]}" 101' in logged
    assert f'"POST /sessions/{session_id[:8]}" 200' in logged


# systemd, and the image


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_the_unit_is_one_that_systemd_takes(tmp_path: Path) -> None:
    text = (DEPLOY / "inference-trio@.service").read_text()
    program = "/opt/inference-trio/bin/inference-trio"
    assert program in text
    unit = tmp_path / "inference-trio@8001.service"
    unit.write_text(text.replace(program, sys.executable))
    command = ["systemd-analyze", "verify", "--man=no", str(unit)]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60)
    complaints = [line for line in checked.stderr.splitlines() if "inference-trio" in line]
    assert (checked.returncode, complaints) == (0, []), checked.stderr


def healthcheck() -> list[str]:
    found = re.search(r'CMD \["python", "-c", "(.*)"\]', (DEPLOY / "Containerfile").read_text())
    assert found is not None
    return [sys.executable, "-c", found[1]]


@pytest.mark.parametrize("is_ready", [True, False])
async def test_the_health_check_of_the_image_tells_whether_the_server_is_ready(is_ready: bool) -> None:
    async with open_upstream() as upstream, open_server(settings(upstream.base_url)) as server:
        *python, program = healthcheck()
        url = server.url if is_ready else "http://127.0.0.1:1"
        assert "http://127.0.0.1:8000" in program
        command = [*python, program.replace("http://127.0.0.1:8000", url)]
        with trio.fail_after(PATIENCE):
            checked = await trio.run_process(command, capture_stderr=True, check=False)
        assert (checked.returncode == 0) is is_ready


def test_what_the_image_copies_is_there() -> None:
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", (DEPLOY / "Containerfile").read_text(), re.MULTILINE)
    paths = [path for line in copied for path in line.split()]
    assert paths
    assert all((DEPLOY.parent / path).exists() for path in paths)


def composed() -> Any:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def test_the_composed_nginx_has_the_servers_addresses(tmp_path: Path) -> None:
    """Each has one that nobody else is given."""
    services, network = composed()["services"], composed()["networks"]["default"]["ipam"]["config"][0]
    shell, option, script = services["nginx"]["command"]
    script, _ = script.split(" && exec ")
    changes = {
        "/etc/inference-trio/nginx.conf": DEPLOY / "nginx.conf",
        "/etc/nginx/conf.d/default.conf": tmp_path / "x",
    }
    for theirs, ours in changes.items():
        script = script.replace(theirs, str(ours))
    subprocess.run([shell, option, script], check=True, timeout=60)
    site = (tmp_path / "x").read_text()
    addresses = [services[name]["networks"]["default"]["ipv4_address"] for name in ("one", "two")]
    assert re.findall(r"^ +server (\S+) max_fails=0;", site, re.MULTILINE) == [f"{one}:8000" for one in addresses]
    for address in map(ip_address, addresses):
        assert address in ip_network(network["subnet"])
        assert address not in ip_network(network["ip_range"])
    assert re.findall(r"^ +(least_conn|hash .*);", site, re.MULTILINE) == ["least_conn"]
    assert re.findall(r"^ +access_log (\S+)", site, re.MULTILINE) == ["/dev/stdout"]


def test_the_composed_servers_have_the_health_check_of_the_image() -> None:
    _, *composed_check = composed()["x-server"]["healthcheck"]["test"]
    assert composed_check == ["python", *healthcheck()[1:]]


def test_composed_servers_have_settings_that_there_are() -> None:
    names = composed()["x-server"]["environment"]
    known = {variable.name for variable in Settings.variables().values()}
    assert names.keys() <= known
