"""`redis+sentinel://`: a real primary with a replica, and a Sentinel that puts the one in the place of the other."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from inference_trio.redis_link import AwayError, open_link
from inference_trio.redis_scripts import ROOT

from .fakes import finish, text, wait
from .processes import reserved_port
from .redis_server import RedisServer, running_redis
from .test_connection import numbers, text_of, transcript
from .test_store_contract import in_redis

PATIENCE = 30.0
SERVICE = "sessions"
CONFIGURATION = """
port {port}
bind 127.0.0.1
sentinel monitor {service} 127.0.0.1 {primary} 1
sentinel down-after-milliseconds {service} 300
sentinel failover-timeout {service} 3000
"""


@contextmanager
def running_sentinel(folder: Path, primary: int) -> Iterator[RedisServer]:
    with reserved_port() as port:
        file = folder / "sentinel.conf"
        file.write_text(CONFIGURATION.format(port=port, service=SERVICE, primary=primary))
        process = subprocess.Popen(["redis-server", str(file), "--sentinel"], stdout=subprocess.DEVNULL)
        try:
            yield RedisServer(folder, port)
        finally:
            process.kill()
            process.wait()


@contextmanager
def running_pair() -> Iterator[tuple[RedisServer, RedisServer]]:
    """A primary and its replica."""
    with running_redis() as primary:
        options = ("--replicaof", "127.0.0.1", str(primary.port))
        primary.ask("CONFIG", "SET", "repl-diskless-sync-delay", "0")
        with running_redis(*options) as replica:
            yield primary, replica


async def until(server: RedisServer, line: bytes, *command: str) -> None:
    """Waits until the answer to this command has this in it."""
    with trio.fail_after(PATIENCE):
        while line not in await trio.to_thread.run_sync(server.ask, *command):  # noqa: ASYNC110
            await trio.sleep(0.02)


async def test_a_task_goes_on_with_the_replica_that_takes_the_primarys_place(tmp_path: Path) -> None:
    is_over = trio.Event()
    with running_pair() as (primary, replica):
        await until(replica, b"master_link_status:up", "INFO", "replication")
        with reserved_port() as nobody, running_sentinel(tmp_path, primary.port) as sentinel:
            await until(sentinel, b"slaves=1", "INFO", "sentinel")
            url = f"redis+sentinel://127.0.0.1:{nobody},127.0.0.1:{sentinel.port}/{SERVICE}/0"
            async with in_redis(url, [text("Hel"), wait(is_over), text("lo"), finish()]) as it:
                session_id = await it.create(0)
                socket = await it.connect(1, session_id)
                socket.call("generate", {"message": "hi"})
                frames = [await socket.hear(), await socket.hear()]
                primary.ask("SHUTDOWN", "NOSAVE")  # waits until the replica has all; what is killed may have said more
                await until(replica, b"role:master", "INFO", "replication")
                is_over.set()
                with trio.fail_after(PATIENCE):
                    frames += await transcript(socket)
                assert text_of(frames) == "Hello"
                assert numbers(frames) == list(range(1, len(frames)))
                again = await it.connect(2, session_id, 0)
                assert (await transcript(again))[1:] == frames[1:]


async def test_where_no_sentinel_knows_the_service_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with running_redis() as primary, running_sentinel(tmp_path, primary.port) as sentinel:
        await until(sentinel, b"status=ok", "INFO", "sentinel")
        async with open_link(f"redis+sentinel://127.0.0.1:{sentinel.port}/another") as link:
            with pytest.raises(AwayError):
                await link.probe("era", ROOT)
    assert "Redis is away: No primary found for 'another'" in caplog.text
