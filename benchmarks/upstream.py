"""A mock of OpenAI's streaming chat completions that costs next to nothing: ``python -m benchmarks.upstream PORT``.

A stream that comes all at once is bytes made beforehand and one write; in a paced one each chunk is a write of its
own. Streams that run at a time are spread evenly within the time between two tokens.
``GET /closed`` tells which streams the server closed before their end, and when.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import json
import re
import sys
import time

from benchmarks.plan import Plan, parse_prompt, token

_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
_EVENT = (
    'data: {"id":"chatcmpl-B9MBs8CjcvOU2jLn4n570S5qMJKcT","object":"chat.completion.chunk","created":1741569952,'
    '"model":"mock","service_tier":"default","system_fingerprint":"fp_44709d6fcb","choices":[%s],"usage":%s}\n\n'
)
_TEXT = _EVENT % ('{"index":0,"delta":{"content":"%s"},"logprobs":null,"finish_reason":null}', "null")
_FIRST = _EVENT % ('{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}', "null")
_STOP = _EVENT % ('{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}', "null")
_USAGE = _EVENT % ("", '{"prompt_tokens":20,"completion_tokens":%d,"total_tokens":%d}')
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)
_SPREAD = 100

closed: dict[int, int] = {}


def _chunk(*events: str) -> bytes:
    data = "".join(events).encode()
    return b"%x\r\n%s\r\n" % (len(data), data)


def _chunk_of_tokens(first: int, plan: Plan, stamp: int) -> bytes:
    last = min(first + plan.per_chunk, plan.tokens)
    return _chunk(*(_TEXT % token(index, stamp) for index in range(first, last)))


def _end(plan: Plan) -> bytes:
    usage = _USAGE % (plan.tokens, plan.tokens + 20)
    return _chunk(_STOP) + _chunk(usage) + _chunk("data: [DONE]\n\n") + b"0\r\n\r\n"


@functools.lru_cache(maxsize=8)
def _all_at_once(plan: Plan) -> bytes:
    chunks = (_chunk_of_tokens(first, plan, 0) for first in range(0, plan.tokens, plan.per_chunk))
    return _chunk(_FIRST) + b"".join(chunks) + _end(plan)


class Connection(asyncio.Protocol):
    """One connection of the server under test; requests come one after the other."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.received = bytearray()
        self.stream: int | None = None
        self.next_write: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, separator, body = self.received.partition(b"\r\n\r\n")
        length = _LENGTH.search(head + b"\r\n")
        if separator and len(body) >= (int(length[1]) if length else 0):
            self.received.clear()
            self.answer(bytes(head), bytes(body))

    def connection_lost(self, _: Exception | None) -> None:
        if self.next_write:
            self.next_write.cancel()
        if self.stream is not None:
            closed[self.stream] = time.monotonic_ns() // 1000

    def answer(self, head: bytes, body: bytes) -> None:
        if head.startswith(b"GET"):
            text = json.dumps(closed).encode()
            self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(text), text))
            return
        self.stream, self.plan = parse_prompt(body)
        if self.plan.rate:
            self.begin()
        else:
            self.next_write = self.loop.call_later(self.plan.ttft, self.write_all)

    def write_all(self) -> None:
        self.stream = None
        self.transport.write(_HEAD + _all_at_once(self.plan))

    def begin(self) -> None:
        self.transport.write(_HEAD + _chunk(_FIRST))
        self.index = 0
        phase = (self.stream or 0) % _SPREAD / _SPREAD / self.plan.rate
        self.began = self.loop.time() + self.plan.ttft + phase
        self.next_write = self.loop.call_at(self.began, self.write_tokens)

    def write_tokens(self) -> None:
        plan = self.plan
        if self.index >= plan.tokens:
            self.stream = self.next_write = None
            self.transport.write(_end(plan))
            return
        self.transport.write(_chunk_of_tokens(self.index, plan, time.monotonic_ns() // 1000))
        self.index += plan.per_chunk
        self.next_write = self.loop.call_at(self.began + self.index / plan.rate, self.write_tokens)


async def main(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Connection, "127.0.0.1", port, backlog=4096)
    gc.disable()
    print("ready", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
