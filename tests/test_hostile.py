"""Clients that misbehave, against the server as a process of its own.

While each of them does its worst, another client's generation goes on beside it, token by token: its tokens come in
step with what the upstream sends, and its transcript is the right one. Afterwards the server holds no task, thread or
descriptor more than before, and at no time it held much more memory.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import httpx2
import pytest
import trio
from wsproto.events import BytesMessage

from tests import answers
from tests.harness import PATIENCE, Client, Server
from tests.processes import MEGABYTE, ServerProcess, as_server, reserved_port, server_process
from tests.sockets import Client as RawClient
from tests.sockets import connected, pour
from tests.upstream import Request, Upstream, open_upstream

LIMITS = {"write_timeout": 1.0, "ping_interval": 1.0, "pong_timeout": 4.0, "header_timeout": 3.0}
"""Seconds. Short, so that no test waits long; a client that behaves would have to be as slow as that to suffer."""

UPSTREAM_PORT = pytest.StashKey[int]()


@attrs.frozen(eq=False)
class Target:
    process: ServerProcess
    upstream_port: int


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """One server for all of them: whoever comes next finds what the ones before have left."""
    with reserved_port() as port:
        url = f"http://127.0.0.1:{port}/v1"
        folder = tmp_path_factory.mktemp("server")
        with server_process(folder, url, LIMITS, INFERENCE_RESUME_WINDOW="0.2") as process:
            yield Target(process, port)


@attrs.frozen
class Fed:
    """A step of the upstream: sends each piece that it is fed, until there are no more."""

    pieces: trio.MemoryReceiveChannel[str]

    async def run(self, wire: answers.Wire) -> None:
        async for piece in self.pieces:
            for step in answers.flatten(answers.text(piece)):
                await step.run(wire)


@attrs.frozen(eq=False)
class Attack:
    process: ServerProcess
    server: Server
    upstream: Upstream
    nursery: trio.Nursery

    @property
    def port(self) -> int:
        return self.process.port

    @asynccontextmanager
    async def socket(self, headers: bytes = b"", **body: Any) -> AsyncIterator[RawClient]:
        """A raw connection to a new session."""
        path = f"/ws/{await self.server.create_session(**body)}".encode()
        async with connected(self.port, path, headers) as client:
            yield client


AT_ONCE = {"Connection": "close"}  # one kept alive would count as left behind
BYSTANDER = "I mean no harm"


@asynccontextmanager
async def attack(
    target: Target, record: Any, script: Any = (), *, megabytes: int = 16, name: str = ""
) -> AsyncIterator[Attack]:
    """The server may hold so much more at its worst. ``script`` answers all but the bystander."""
    process = target.process
    feed, pieces = trio.open_memory_channel[str](0)

    def answer(request: Request) -> Any:
        is_bystander = request.messages[-1]["content"] == BYSTANDER
        return (Fed(pieces), answers.reply()) if is_bystander else script

    async with (
        open_upstream(answer, port=target.upstream_port) as upstream,
        httpx2.AsyncClient(base_url=process.url, timeout=PATIENCE, verify=False, headers=AT_ONCE) as http,
        as_server(process, http).client() as bystander,
        trio.open_nursery() as nursery,
    ):
        await bystander.generate(BYSTANDER)
        over, told = trio.Event(), trio.Event()
        await nursery.start(go_on, bystander, feed, over, told)
        before = process.holdings()
        process.forget_the_peak()
        yield Attack(process, as_server(process, http), upstream, nursery)
        after = await process.wait_for(before.covers, f"left behind, with {before} before")
        over.set()
        await told.wait()
        nursery.cancel_scope.cancel()
    growth = [(number - before.resident) / MEGABYTE for number in (after.peak, after.resident)]
    record("memory", f"{before.resident / MEGABYTE:.1f} MB before, at worst +{growth[0]:.1f}, after +{growth[1]:.1f}")
    assert growth[0] < megabytes


async def go_on(
    client: Client,
    feed: trio.MemorySendChannel[str],
    over: trio.Event,
    told: trio.Event,
    task_status: trio.TaskStatus[None],
) -> None:
    """A generation that gives its next token when the one before has come, until it is told that it is over."""
    sent = []
    while not over.is_set() or len(sent) < 10:
        sent.append(f"{len(sent)} ")
        await feed.send(sent[-1])
        note = await client.hear()
        assert note["params"]["chunk"] == sent[-1], note
        if len(sent) == 1:
            task_status.started()
        await trio.sleep(0.01)
    feed.close()
    end = await client.hear()
    assert end["params"]["status_message"] == "completed", end
    assert end["params"]["final_text"] == "".join(sent)
    told.set()


# Frames that are not what they should be

GARBAGE = {
    "not JSON": (b"{", -32700),
    "not UTF-8": (b"\xff", -32700),
    "a lone surrogate": (rb'{"jsonrpc":"2.0","id":1,"method":"generate","params":{"message":"\ud800"}}', -32700),
    "deep nesting": (b"[" * 1_000_000, -32700),
    "deep nesting that ends": (b"[" * 50_000 + b"]" * 50_000, -32700),
    "a huge number": (b'{"jsonrpc":"2.0","id":1,"method":"cancel","params":' + b"9" * 1_000_000 + b"}", -32700),
    "a huge exponent": (b'{"jsonrpc":"2.0","id":1e999999999,"method":"cancel"}', -32700),
    "empty objects": (b"[" + b"{}," * 1_300_000 + b"{}]", -32700),
    "a batch of ten thousand": (b"[" + b'{"jsonrpc":"2.0","id":1,"method":"cancel"},' * 9_999 + b"1]", -32600),
    "duplicate keys": (b'{"jsonrpc":"2.0","id":1,"method":"cancel","method":"no","method":"nor this"}', -32601),
    "an unknown method": (b'{"jsonrpc":"2.0","id":1,"method":"' + b"x" * 1_000_000 + b'"}', -32601),
}


@pytest.fixture
def record(record_property: Any, request: pytest.FixtureRequest) -> Any:
    """Keeps what was measured for the report of the tests, and prints it."""

    def keep(name: str, value: str) -> None:
        record_property(name, value)
        print(f"{request.node.name}: {value}")

    return keep


@pytest.mark.parametrize("frame", GARBAGE)
async def test_garbage_is_answered(frame: str, target: Target, record: Any) -> None:
    data, code = GARBAGE[frame]
    async with attack(target, record, megabytes=48) as attacker, attacker.socket() as client:
        for _ in range(10):
            await client.send(BytesMessage(data=data))
            answer = json.loads(await client.message())
            assert answer["error"]["code"] == code, answer


BAD_FRAMES = {
    "text that is not UTF-8": (b"\x81\x81\0\0\0\0\xff", 1007),
    "no mask": (b"\x81\x01a", 1002),
    "an unknown opcode": (b"\x83\x80\0\0\0\0", 1002),
    "a reserved bit": (b"\xc1\x81\0\0\0\0a", 1002),
    "a length of 2**63": (b"\x82\xff" + b"\xff" * 8, 1002),
    "no frame at all": (b"GET / HTTP/1.1\r\n\r\n", 1002),
}


@pytest.mark.parametrize("frame", BAD_FRAMES)
async def test_a_bad_frame_closes_with_its_code(frame: str, target: Target, record: Any) -> None:
    data, code = BAD_FRAMES[frame]
    async with attack(target, record) as attacker:
        for _ in range(20):
            async with attacker.socket() as client:
                await client.stream.send_all(data)
                assert await client.close_code() == code
                await client.end_of_file()


# Too much


def masked(first: int, size: int) -> bytes:
    """The head of a frame with this first byte, and a mask of zeros."""
    length = bytes([0x80 + size]) if size < 126 else b"\xff" + size.to_bytes(8, "big")
    return bytes([first]) + length + bytes(4)


def in_one_message() -> Iterator[bytes]:
    yield masked(0x82, 100 * MEGABYTE)
    yield from itertools.repeat(bytes(MEGABYTE), 100)


def in_fragments() -> Iterator[bytes]:
    yield masked(0x02, 0)
    yield from itertools.repeat(masked(0x00, MEGABYTE // 8) + bytes(MEGABYTE // 8), 800)


FLOODS = [in_one_message, in_fragments]


@pytest.mark.parametrize("flood", FLOODS)
async def test_a_message_of_a_hundred_megabytes_closes_with_1009(flood: Any, target: Target, record: Any) -> None:
    async with attack(target, record, megabytes=40) as attacker, attacker.socket() as client:
        attacker.nursery.start_soon(pour, client, flood())
        assert await client.close_code() == 1009


async def test_a_message_in_a_hundred_thousand_fragments_is_a_message(target: Target, record: Any) -> None:
    async with attack(target, record) as attacker, attacker.socket() as client:
        await client.stream.send_all(masked(0x02, 0))
        await client.stream.send_all((masked(0x00, 1) + b"x") * 100_000)
        await client.stream.send_all(masked(0x80, 0))
        assert json.loads(await client.message())["error"]["code"] == -32700
