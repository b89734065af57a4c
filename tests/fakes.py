"""Stand-ins at the seams: a chat model that plays a script, a sink, a WebSocket made of two channels."""

from __future__ import annotations

import json
import math
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import attrs
import msgspec
import trio

from inference_trio.chat import Tool
from inference_trio.deltas import Delta, ToolCallDelta
from inference_trio.errors import InferenceError
from inference_trio.messages import ModelRequest
from inference_trio.outbox import Budget
from inference_trio.protocol import TaskNotification, Usage
from inference_trio.settings import Settings

T = TypeVar("T")
Receive = Callable[[Delta], Awaitable[None]]
Step = Callable[[Receive], Awaitable[None]]

USAGE = Usage(input_tokens=10, output_tokens=5, total_tokens=15)


def settings(**changes: Any) -> Settings:
    """Settings that read nothing from outside."""
    return attrs.evolve(Settings.load({"LLM_PROVIDER": "local"}, dotenv=None), **changes)


def at_once(coroutine: Coroutine[Any, Any, T]) -> T:
    """What a call gives that does not wait; asserts that it does not. Sessions in memory never do."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("it waits")


def tool(definition: dict[str, Any]) -> Tool:
    return msgspec.convert(definition, Tool)


def deltas(*batch: Delta) -> Step:
    async def step(receive: Receive) -> None:
        for delta in batch:
            await receive(delta)

    return step


def text(*pieces: str) -> Step:
    return deltas(*(Delta(text=piece) for piece in pieces))


def reasoning(*pieces: str, field: str = "reasoning_content") -> Step:
    return deltas(*(Delta(reasoning=piece, reasoning_field=field) for piece in pieces))


def tool_call(call_id: str, name: str, arguments: str = "{}", index: int | None = None) -> Step:
    return deltas(Delta(tool_calls=(ToolCallDelta(index, call_id, name, arguments),)))


def finish(reason: str = "stop", usage: Usage | None = USAGE) -> Step:
    return deltas(Delta(finish_reason=reason, usage=usage))


def fail(error: InferenceError | Exception) -> Step:
    async def step(_: Receive) -> None:
        raise error

    return step


def wait(event: trio.Event) -> Step:
    async def step(_: Receive) -> None:
        await event.wait()

    return step


def sleep(seconds: float) -> Step:
    async def step(_: Receive) -> None:
        await trio.sleep(seconds)

    return step


hang = sleep(math.inf)


class FakeModel:
    """Plays one list of steps a call, then the last one again."""

    def __init__(self, *rounds: list[Step]) -> None:
        self._rounds = list(rounds)
        self.requests: list[ModelRequest] = []
        self.streaming = 0

    async def stream(self, request: ModelRequest, receive: Receive) -> None:
        self.requests.append(attrs.evolve(request, messages=list(request.messages)))
        steps = self._rounds.pop(0) if len(self._rounds) > 1 else self._rounds[0]
        self.streaming += 1
        try:
            for step in steps:
                await trio.lowlevel.checkpoint()
                await step(receive)
        finally:
            self.streaming -= 1


class FakeSink:
    """Keeps notifications; has room while ``room`` is set."""

    def __init__(self) -> None:
        self.notes: list[TaskNotification] = []
        self.budget = Budget(2**30)
        self.room = trio.Event()
        self.room.set()

    @property
    def is_full(self) -> bool:
        return not self.room.is_set()

    def append(self, note: TaskNotification) -> None:
        self.notes.append(note)

    async def wait_for_room(self) -> None:
        await self.room.wait()


class FakeWebSocket:
    """The server's end of a WebSocket; the test holds the other end."""

    def __init__(self, session_id: str, outgoing: float = math.inf) -> None:
        self.session_id = session_id
        self._to_server, self._incoming = trio.open_memory_channel[str | bytes](math.inf)
        self._outgoing, self.from_server = trio.open_memory_channel[str](outgoing)
        self.close_code: int | None = None
        self.scope = trio.CancelScope()
        self.gone = trio.Event()

    # what the server calls

    async def accept(self, headers: None = None, subprotocol: str | None = None) -> None:
        await trio.lowlevel.checkpoint()

    async def receive(self) -> str | bytes:
        return await self._incoming.receive()

    @property
    def is_free(self) -> bool:
        queue = self._outgoing.statistics()
        has_room = queue.current_buffer_used < queue.max_buffer_size or queue.tasks_waiting_receive > 0
        return has_room and not queue.tasks_waiting_send

    def send_at_once(self, text: str) -> None:
        self._outgoing.send_nowait(text)

    async def send(self, data: str) -> None:
        await self._outgoing.send(data)

    async def close(self, code: int, reason: str = "") -> None:
        self.close_code = code

    # what the test calls

    @property
    def unread(self) -> int:
        """Frames that the server has not received yet."""
        return self._incoming.statistics().current_buffer_used

    async def drop(self) -> None:
        """The connection breaks: as Quart-Trio has it, the handler is cancelled."""
        self.scope.cancel()
        await self.gone.wait()

    def say(self, frame: Any) -> None:
        self._to_server.send_nowait(frame if isinstance(frame, str | bytes) else json.dumps(frame))

    def call(self, method: str, params: Any = None, request_id: Any = 1) -> None:
        frame = {"jsonrpc": "2.0", "method": method, "id": request_id}
        self.say(frame if params is None else frame | {"params": params})

    async def hear(self) -> Any:
        with trio.fail_after(5):
            return json.loads(await self.from_server.receive())

    def heard(self) -> list[Any]:
        frames = []
        while True:
            try:
                frames.append(json.loads(self.from_server.receive_nowait()))
            except trio.WouldBlock:
                return frames
