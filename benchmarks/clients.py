"""Clients that only note what comes and when; what it means is worked out after the run.

`WebSocketClient` speaks the server's own protocol, which the reference and the floor speak too; `SseClient` makes
a streaming HTTP request. Both are opened first and started later.
"""

from __future__ import annotations

import asyncio
import json
import struct
import time
from typing import Any, Protocol

import msgspec

from benchmarks.plan import Plan

_HANDSHAKE = (
    "GET /ws/{} HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
_PING, _CLOSE, _PONG_BYTE = 9, 8, 0x8A


class Client(Protocol):
    """``done`` is resolved when the answer is complete, and fails when the connection is lost before that."""

    done: asyncio.Future[None]
    started_at: float

    def start(self, stream: int, plan: Plan, **options: Any) -> None: ...

    def pieces(self) -> list[tuple[float, str]]:
        """The text as it came: seconds of the monotonic clock, and what. Raises ValueError for an error."""

    def close(self) -> None: ...


class _Connection(asyncio.Protocol):
    transport: asyncio.Transport

    def __init__(self) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.started_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(exc or ConnectionError("closed before the end"))
            self.done.exception()  # else it is reported where nobody waits for it

    def close(self) -> None:
        self.transport.abort()


class WebSocketClient(_Connection):
    def __init__(self) -> None:
        super().__init__()
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.frames: list[tuple[float, bytes]] = []
        self.buffer = b""

    @classmethod
    async def open(cls, port: int) -> WebSocketClient:
        session = await create_session(port)
        _, client = await asyncio.get_running_loop().create_connection(cls, "127.0.0.1", port)
        client.transport.write(_HANDSHAKE.format(session).encode())
        await asyncio.wait_for(client.opened, 60)
        return client

    def start(self, stream: int, plan: Plan, **options: Any) -> None:
        history = [*options.pop("history", []), {"role": "user", "content": plan.prompt(stream)}]
        self.started_at = time.monotonic()
        self.call("generate", {"history": history, **options})

    def call(self, method: str, params: dict[str, Any]) -> None:
        request = msgspec.json.encode({"jsonrpc": "2.0", "id": 1, "method": method, "params": params})
        self.send(0x81, request)

    def send(self, first_byte: int, payload: bytes) -> None:
        """Masked with zeros, which changes nothing."""
        size = len(payload)
        if size < 126:
            head = struct.pack("!BB", first_byte, 0x80 | size)
        elif size < 65536:
            head = struct.pack("!BBH", first_byte, 0x80 | 126, size)
        else:
            head = struct.pack("!BBQ", first_byte, 0x80 | 127, size)
        self.transport.write(head + bytes(4) + payload)

    def data_received(self, data: bytes) -> None:
        arrived = time.monotonic()
        self.buffer += data
        if not self.opened.done():
            head, separator, self.buffer = self.buffer.partition(b"\r\n\r\n")
            if not separator or b" 101 " not in head.partition(b"\r\n")[0]:
                self.opened.set_exception(ConnectionError(head.decode()))
                return
            self.opened.set_result(None)
        position = 0
        while (frame := _frame_at(self.buffer, position)) is not None:
            opcode, start, position = frame
            self.received(arrived, opcode, self.buffer[start:position])
        self.buffer = self.buffer[position:]

    def received(self, arrived: float, opcode: int, payload: bytes) -> None:
        if opcode == _PING:
            self.send(_PONG_BYTE, payload)
        elif opcode != _CLOSE:
            self.frames.append((arrived, payload))
            if (b'"method":"end"' in payload or b'"error":' in payload) and not self.done.done():
                self.done.set_result(None)

    def pieces(self) -> list[tuple[float, str]]:
        pieces, final_text = [], None
        for arrived, payload in self.frames:
            frame = msgspec.json.decode(payload)
            if frame.get("method") == "text_chunk":
                pieces.append((arrived, frame["params"]["chunk"]))
            elif frame.get("method") == "end":
                final_text = frame["params"]["final_text"]
            elif "result" not in frame:
                raise ValueError(payload.decode())
        if final_text != "".join(piece for _, piece in pieces):
            raise ValueError("`final_text` is not the text of all chunks")
        return pieces


def _frame_at(buffer: bytes, position: int) -> tuple[int, int, int] | None:
    """Opcode, start and end of the payload; ``None`` where the frame is not complete."""
    if len(buffer) < position + 2:
        return None
    size, start = buffer[position + 1], position + 2
    if size >= 126:
        start = position + (4 if size == 126 else 10)
        size = int.from_bytes(buffer[position + 2 : start], "big") if len(buffer) >= start else 1 << 62
    return (buffer[position] & 15, start, start + size) if len(buffer) >= start + size else None


async def create_session(port: int) -> str:
    answer = await request(port, "POST", "/create_session")
    return str(json.loads(answer)["session_id"])


async def request(port: int, method: str, path: str) -> bytes:
    """The body of a small answer. Raises ConnectionError unless its status is 200."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        writer.write(head.encode())
        top = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
        if b" 200 " not in top.partition(b"\r\n")[0]:
            raise ConnectionError(top.decode())
        length = next(line for line in top.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        return await reader.readexactly(int(length.partition(b":")[2]))
    finally:
        writer.close()


class SseClient(_Connection):
    """A streaming HTTP request whose events have the text somewhere within."""

    path, last_event = "", b""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[tuple[float, bytes]] = []
        self.tail = b""

    @classmethod
    async def open(cls, port: int) -> SseClient:
        _, client = await asyncio.get_running_loop().create_connection(cls, "127.0.0.1", port)
        return client

    def body(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        raise NotImplementedError

    def text_of(self, event: Any) -> str:
        raise NotImplementedError

    def start(self, stream: int, plan: Plan, **_: Any) -> None:
        body = json.dumps(self.body([{"role": "user", "content": plan.prompt(stream)}])).encode()
        head = f"POST {self.path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        self.started_at = time.monotonic()
        self.transport.write(f"{head}\r\nAuthorization: Bearer x\r\n\r\n".encode() + body)

    def data_received(self, data: bytes) -> None:
        self.reads.append((time.monotonic(), data))
        self.tail = (self.tail + data)[-64:]
        if b"\r\n0\r\n\r\n" in self.tail and not self.done.done():
            self.done.set_result(None)

    def pieces(self) -> list[tuple[float, str]]:
        """Events may be cut anywhere; an event came with the read that completed it."""
        joined = b"".join(data for _, data in self.reads)
        body = _without_chunks(joined)
        if b" 200 " not in joined[:20] or self.last_event not in body:
            raise ValueError(joined[:300].decode())
        ends, total = [], 0
        for arrived, data in self.reads:
            total += len(data)
            ends.append((total, arrived))
        pieces, raw, read = [], 0, 0
        for line in body.splitlines():
            if line.startswith(b"data: {"):
                raw = joined.index(line, raw) + len(line)
                while ends[read][0] < raw:
                    read += 1
                pieces.append((ends[read][1], self.text_of(msgspec.json.decode(line[6:]))))
        return pieces


def _without_chunks(answer: bytes) -> bytes:
    _, _, rest = answer.partition(b"\r\n\r\n")
    parts, position = [], 0
    while position < len(rest):
        end = rest.index(b"\r\n", position)
        size = int(rest[position:end], 16)
        parts.append(rest[end + 2 : end + 2 + size])
        position = end + 2 + size + 2
    return b"".join(parts)


class LiteLlmClient(SseClient):
    path, last_event = "/v1/chat/completions", b"data: [DONE]"

    def body(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        return {"model": "mock", "messages": messages, "stream": True}

    def text_of(self, event: Any) -> str:
        return "".join(choice["delta"].get("content") or "" for choice in event["choices"])


class LangServeClient(SseClient):
    path, last_event = "/chat/stream", b"event: end"

    def body(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        return {"input": [{"type": "human", "content": message["content"]} for message in messages]}

    def text_of(self, event: Any) -> str:
        return str(event.get("content") or "")
