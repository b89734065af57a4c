"""Clients that misbehave, against the server as a process of its own.

While each of them does its worst, another client's generation goes on beside it, token by token: its tokens come in
step with what the upstream sends, and its transcript is the right one. Afterwards the server holds no task, thread or
descriptor more than before, and at no time it held much more memory.
"""

from __future__ import annotations

import itertools
import json
import socket
import struct
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import attrs
import httpx2
import pytest
import trio
from wsproto.events import BytesMessage, CloseConnection, Message, Pong, TextMessage

from tests import answers
from tests.harness import PATIENCE, Client, Server
from tests.processes import MEGABYTE, ServerProcess, as_server, reserved_port, server_process
from tests.sockets import HANDSHAKE, connected, everything, pour, pour_out
from tests.sockets import Client as RawClient
from tests.upstream import Request, Upstream, open_upstream

LIMITS = {"write_timeout": 1.0, "ping_interval": 1.0, "pong_timeout": 4.0, "header_timeout": 3.0, "body_timeout": 3.0}
"""Seconds. Short, so that no test waits long; a client that behaves would have to be as slow as that to suffer."""


@attrs.frozen(eq=False)
class Target:
    process: ServerProcess
    upstream_port: int


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """One server for most of them: whoever comes next finds what the ones before have left."""
    with serving(tmp_path_factory.mktemp("server"), LIMITS, INFERENCE_RESUME_WINDOW="0.2") as target:
        yield target


@contextmanager
def serving(folder: Path, limits: dict[str, float], **variables: str) -> Iterator[Target]:
    with reserved_port() as port:
        url = f"http://127.0.0.1:{port}/v1"
        with server_process(folder, url, limits, **variables) as process:
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


AT_ONCE = {"Connection": "close"}
"""Headers for connections that would count as left behind if they were kept."""

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
        if is_bystander:
            return (Fed(pieces), answers.reply())
        return script(request) if callable(script) else script

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
def record(request: pytest.FixtureRequest) -> Any:
    """Prints what was measured."""
    return lambda name, value: print(f"{request.node.name}: {name} {value}")


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
        attacker.nursery.start_soon(pour, client.stream, flood())
        assert await client.close_code() == 1009


async def test_a_message_in_a_hundred_thousand_fragments_is_a_message(target: Target, record: Any) -> None:
    async with attack(target, record) as attacker, attacker.socket() as client:
        await client.stream.send_all(masked(0x02, 0))
        await client.stream.send_all((masked(0x00, 1) + b"x") * 100_000)
        await client.stream.send_all(masked(0x80, 0))
        assert json.loads(await client.message())["error"]["code"] == -32700


async def test_a_message_that_is_compressed_closes_with_1002(target: Target, record: Any) -> None:
    deflate = b"Sec-WebSocket-Extensions: permessage-deflate\r\n"
    bomb = zlib.compress(bytes(100 * MEGABYTE), wbits=-15)
    async with attack(target, record) as attacker, attacker.socket(deflate) as client:
        assert b"extensions" not in client.head.lower()
        attacker.nursery.start_soon(pour, client.stream, [masked(0xC2, len(bomb)), bomb])
        assert await client.close_code() == 1002


PING = masked(0x89, 125) + bytes(125)
"""As large as may be: of answers of two bytes a kernel packs hundreds of thousands together for who does not read."""
CANCEL = b'{"jsonrpc":"2.0","id":1,"method":"cancel"}'
DISCOVER = b'{"jsonrpc":"2.0","id":1,"method":"rpc.discover"}'
VALID = {
    "pings": PING,
    "requests": masked(0x82, len(CANCEL)) + CANCEL,
    "questions": masked(0x82, len(DISCOVER)) + DISCOVER,
}


@pytest.mark.parametrize("frames", VALID)
async def test_a_flood_that_is_read_is_answered(frames: str, target: Target, record: Any) -> None:
    async with attack(target, record) as attacker, attacker.socket() as client:
        attacker.nursery.start_soon(pour, client.stream, [VALID[frames] * 3000])
        for _ in range(3000):
            assert not isinstance(await client.next(Message, Pong), CloseConnection)


@pytest.mark.parametrize("frames", VALID)
async def test_a_flood_whose_answers_are_not_read_ends_with_the_connection(
    frames: str, target: Target, record: Any
) -> None:
    async with attack(target, record) as attacker, attacker.socket() as client:
        with trio.fail_after(PATIENCE):
            await pour(client.stream, itertools.repeat(VALID[frames] * 100))


async def test_a_flood_of_tasks_is_refused_beyond_the_limit(target: Target, record: Any) -> None:
    async with attack(target, record, answers.hang()) as attacker, attacker.socket() as client:
        call = {"jsonrpc": "2.0", "id": 1, "method": "generate", "params": {"message": "again"}}
        frame = json.dumps(call).encode()
        attacker.nursery.start_soon(pour, client.stream, [(masked(0x82, len(frame)) + frame) * 500])
        results = [json.loads(await client.message()) for _ in range(500)]
        assert [("result" in result) for result in results] == [True] * 8 + [False] * 492
        assert all(result["error"]["code"] == -32005 for result in results[8:])


# Too slowly


@attrs.frozen
class Endless:
    """A step of the upstream: text without an end."""

    async def run(self, wire: answers.Wire) -> None:
        while True:
            for step in answers.flatten(answers.text("x" * 4096)):
                await step.run(wire)


async def generate(client: RawClient, message: str = "go") -> str:
    """The new task's id."""
    params = {"message": message}
    await client.send(TextMessage(data=json.dumps({"jsonrpc": "2.0", "id": 1, "method": "generate", "params": params})))
    task_id: str = json.loads(await client.message())["result"]["task_id"]
    return task_id


async def test_who_stops_reading_is_dropped_and_the_task_ends(target: Target, record: Any) -> None:
    async with attack(target, record, Endless()) as attacker, attacker.socket() as client:
        await generate(client)
        with trio.fail_after(PATIENCE):
            await (await attacker.upstream.wait_for_requests(2)).closed.wait()


async def test_who_reads_a_byte_at_a_time_is_dropped_and_the_task_ends(target: Target, record: Any) -> None:
    async with attack(target, record, Endless()) as attacker, attacker.socket() as client:
        client.stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        await generate(client)
        request = await attacker.upstream.wait_for_requests(2)
        with trio.fail_after(PATIENCE):
            while not request.closed.is_set():
                await client.stream.receive_some(1)
                await trio.sleep(0.05)


POST = b"POST /create_session HTTP/1.1\r\nHost: localhost\r\n%s\r\n\r\n"
SLOW = {
    "nothing": b"",
    "half a request": b"GET /ws/x HTTP/1.1\r\nHost: localhost\r\n",
    "half a body": POST % b"Content-Length: 1000000" + b"{",
    "half an upgrade": HANDSHAKE[:100],
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
}


async def test_who_says_nothing_is_dropped(target: Target, record: Any) -> None:
    async with attack(target, record) as attacker, trio.open_nursery() as nursery:
        for opening in SLOW.values():
            for _ in range(20):
                nursery.start_soon(say_no_more, attacker.port, opening)
        for _ in range(20):
            nursery.start_soon(never_pong, attacker)


async def say_no_more(port: int, opening: bytes) -> None:
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(opening)
        await everything(stream)


async def never_pong(attacker: Attack) -> None:
    async with attacker.socket() as client:
        await pour_out(client.stream)


async def test_who_says_a_byte_at_a_time_is_dropped(target: Target, record: Any) -> None:
    async with attack(target, record) as attacker, trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(trickle, attacker.port, b"GET /healthz HTTP/1.1\r\nX: ")
            nursery.start_soon(trickle, attacker.port, SLOW["half a body"])


async def trickle(port: int, opening: bytes) -> None:
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream, trio.open_nursery() as nursery:
        await stream.send_all(opening)
        nursery.start_soon(pour_out, stream)
        with suppress(trio.BrokenResourceError), trio.fail_after(PATIENCE):
            while True:
                await stream.send_all(b"x")
                await trio.sleep(0.05)


# Too many


async def test_bodies_without_an_end_are_refused(target: Target, record: Any) -> None:
    async with attack(target, record, megabytes=40) as attacker:
        for head in (b"Transfer-Encoding: chunked", b"Content-Length: 99999999999"):
            async with await trio.open_tcp_stream("127.0.0.1", attacker.port) as stream:
                await stream.send_all(POST % head)
                attacker.nursery.start_soon(pour, stream, itertools.repeat(b"10000\r\n" + bytes(65536) + b"\r\n"))
                assert (await everything(stream)).startswith(b"HTTP/1.1 413")


async def test_thousands_of_connections_that_are_dropped_leave_nothing(target: Target, record: Any) -> None:
    async with attack(target, record) as attacker:
        openings = [b"", b"GET / HTT", HANDSHAKE % (b"/ws/nobody", b""), b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"]
        for opening in openings:
            for _ in range(10):
                async with trio.open_nursery() as nursery:
                    for _ in range(50):
                        nursery.start_soon(drop, attacker.port, opening)


async def test_thousands_of_sockets_that_are_dropped_leave_nothing(target: Target, record: Any) -> None:
    async with attack(target, record) as attacker:
        path = b"/ws/" + (await attacker.server.create_session()).encode()
        for _ in range(20):
            async with trio.open_nursery() as nursery:
                for _ in range(50):
                    nursery.start_soon(drop, attacker.port, HANDSHAKE % (path, b""))


async def drop(port: int, opening: bytes) -> None:
    """Connects, says this, and resets the connection."""
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await stream.send_all(opening)
        await trio.sleep(0.01)


async def test_sessions_without_an_end_are_refused_in_number_and_in_size(tmp_path: Path, record: Any) -> None:
    limits = {"INFERENCE_MAX_SESSIONS": "100", "INFERENCE_MEMORY_BYTES": str(32 * MEGABYTE)}
    with serving(tmp_path, LIMITS, **limits) as target:
        async with attack(target, record, megabytes=64) as attacker:
            tools = [{"name": "t", "description": "x" * MEGABYTE}]
            large = [(await attacker.server.post(json={"tools": tools})).status_code for _ in range(50)]
            small = [(await attacker.server.post()).status_code for _ in range(100)]
        for statuses in (large, small):
            assert statuses == sorted(statuses)
            assert set(statuses) == {200, 503}


ALMOST_4_MB = 3_900_000
GENERATE = b'{"jsonrpc":"2.0","id":1,"method":"generate","params":{"message":"' + b"x" * ALMOST_4_MB + b'"}}'
QUESTION = masked(0x82, len(DISCOVER)) + DISCOVER
PUSHES = {
    "requests, without reading the answers": [QUESTION * 2000, *[masked(0x82, len(GENERATE)) + GENERATE] * 1000],
    "a message without an end": [masked(0x02, ALMOST_4_MB) + bytes(ALMOST_4_MB), *[masked(0x00, 1) + b"x"] * 1000],
}


async def push_messages(attacker: Attack, pieces: Iterable[bytes], ended: trio.MemorySendChannel[None]) -> None:
    while True:
        async with attacker.socket() as client:
            await pour(client.stream, pieces)
            await pour_out(client.stream)
            await ended.send(None)


async def push_bodies(attacker: Attack, ended: trio.MemorySendChannel[None]) -> None:
    while True:
        async with await trio.open_tcp_stream("127.0.0.1", attacker.port) as stream:
            await pour(stream, [POST % b"Content-Length: 4000000" + bytes(ALMOST_4_MB)])
            await pour_out(stream)
            await ended.send(None)


async def test_what_sixty_clients_push_at_once_is_bounded_and_small_requests_get_through(
    tmp_path: Path, record: Any
) -> None:
    """Of what comes 16 MB may wait, and tasks may hold 64 MB; as much again is for reading and sending it."""
    variables = {"INFERENCE_MEMORY_BYTES": str(64 * MEGABYTE), "INFERENCE_RESUME_WINDOW": "0.2"}
    ended, endings = trio.open_memory_channel[None](0)
    with serving(tmp_path, {"arriving_patience": 0.2}, **variables) as target:
        async with (
            attack(target, record, answers.hang(), megabytes=160) as attacker,
            attacker.socket() as client,
            trio.open_nursery() as attackers,
        ):
            for _ in range(20):
                for pieces in PUSHES.values():
                    attackers.start_soon(push_messages, attacker, pieces, ended)
                attackers.start_soon(push_bodies, attacker, ended)
            for _ in range(30):
                await client.send(BytesMessage(data=CANCEL))
                assert json.loads(await client.message())["result"] == {"cancelled": []}
                await endings.receive()
            attackers.cancel_scope.cancel()


async def test_connections_beyond_the_limit_are_refused(tmp_path: Path, record: Any) -> None:
    with serving(tmp_path, {}, INFERENCE_MAX_CONNECTIONS="50") as target:
        async with attack(target, record) as attacker:
            before = attacker.process.holdings()
            async with AsyncExitStack() as held:
                streams = [
                    await held.enter_async_context(await trio.open_tcp_stream("127.0.0.1", attacker.port))
                    for _ in range(200)
                ]
                answer = await everything(streams[-1])
                head, _, body = answer.partition(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 503")
                assert json.loads(body)["error"]["code"] == -32005
            await attacker.process.wait_for(before.covers, "still held")
            assert (await attacker.server.get("/healthz")).status_code == 200


async def test_it_survives_that_there_are_no_more_files(tmp_path: Path, record: Any) -> None:
    with serving(tmp_path, {"files": 100}) as target:
        async with attack(target, record) as attacker:
            async with AsyncExitStack() as held:
                for _ in range(150):
                    await held.enter_async_context(await trio.open_tcp_stream("127.0.0.1", attacker.port))
                await attacker.process.wait_for(lambda now: now.descriptors == 100, "there are more to be had")
            assert (await attacker.server.get("/healthz")).status_code == 200
        assert "10000 connections" in target.process.console.read_text()


# Tools, and ids


TOOLS = [{"name": "look"}]
CALLS = answers.calls(answers.tool_call(0, "a", "look", "{}"), answers.tool_call(1, "b", "look", "{}"))


async def test_results_that_come_twice_late_for_nothing_or_in_tons_change_nothing(target: Target, record: Any) -> None:
    def answer(request: Request) -> Any:
        not_kept = answers.head(headers=AT_ONCE)
        return (not_kept, answers.reply("seen") if request.messages[-1]["role"] == "tool" else CALLS)

    async with attack(target, record, answer, megabytes=80) as attacker:
        async with attacker.server.client(tools=TOOLS) as client:
            task_id = await client.generate()
            for _ in range(2):
                await client.until("function_call_request")

            async def give(*ids: str, task: str = task_id, result: str = "x") -> Any:
                results = [{"tool_call_id": call_id, "result": result} for call_id in ids]
                return await client.call("tool_result", {"task_id": task, "results": results})

            assert (await give("c"))["code"] == -32602
            assert (await give("a", "a"))["code"] == -32602
            assert (await give(*["a"] * 1000))["code"] == -32602
            assert (await give("a", task="task_0"))["code"] == -32004
            assert (await give("a", result="x" * 4_000_000))["outstanding"] == ["b"]
            assert (await give("a"))["code"] == -32602
            assert (await give("b"))["outstanding"] == []
            assert (await client.until("end"))["final_text"] == "seen"
            assert (await give("b"))["code"] == -32004
        async with attacker.socket() as raw:
            large = json.dumps({"result": "x" * 10_000_000})
            attacker.nursery.start_soon(pour, raw.stream, [raw.connection.send(TextMessage(data=large))])
            assert await raw.close_code() == 1009


async def test_an_id_may_be_used_again_and_is_answered_each_time(target: Target, record: Any) -> None:
    async with attack(target, record) as attacker, attacker.server.client() as client:
        for request_id in (1, 1, "1", 1.5, None, 2**63, "x" * 1024):
            await client.say({"jsonrpc": "2.0", "id": request_id, "method": "cancel"})
            assert await client.hear() == {"jsonrpc": "2.0", "id": request_id, "result": {"cancelled": []}}
        await client.say([{"jsonrpc": "2.0", "id": 1, "method": "cancel"}] * 100)
        assert [answer["id"] for answer in await client.hear()] == [1] * 100


# With an upstream that fails as well

FAULTS = {
    "says no more": answers.hang(),
    "resets": answers.reset(),
    "breaks off": answers.drop(),
    "says what is not JSON": answers.raw(b"data: {\n\n"),
    "sends no chunks": answers.unframed(bytes(1000)),
}


async def half_close(client: RawClient) -> None:
    await client.stream.send_eof()
    await pour_out(client.stream)


async def reset(client: RawClient) -> None:
    client.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def leave_half_a_message(client: RawClient) -> None:
    await client.stream.send_all(masked(0x02, ALMOST_4_MB) + bytes(100_000))
    await pour_out(client.stream)


async def send_a_bad_frame(client: RawClient) -> None:
    await client.stream.send_all(BAD_FRAMES["no mask"][0])
    await pour_out(client.stream)


async def ask_for_more_and_read_nothing(client: RawClient) -> None:
    call = {"jsonrpc": "2.0", "id": 1, "method": "generate", "params": {"message": "more"}}
    await pour(client.stream, itertools.repeat(client.connection.send(TextMessage(data=json.dumps(call) * 100)), 100))
    await pour(client.stream, itertools.repeat(PING * 100))


@pytest.mark.parametrize("fault", FAULTS)
async def test_an_upstream_that_fails_while_its_clients_misbehave_leaves_nothing(
    fault: str, target: Target, record: Any
) -> None:
    async def misbehave(how: Callable[[RawClient], Awaitable[None]]) -> None:
        async with attacker.socket() as client:
            await generate(client)
            await how(client)

    script = (answers.head(headers=AT_ONCE), answers.text(*["x" * 10_000] * 100), FAULTS[fault])
    async with attack(target, record, script, megabytes=64) as attacker, trio.open_nursery() as clients:
        for how in (half_close, reset, leave_half_a_message, send_a_bad_frame, ask_for_more_and_read_nothing):
            for _ in range(4):
                clients.start_soon(misbehave, how)
