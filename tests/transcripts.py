"""A strict client: it comes back after every cut, sends nothing twice that has arrived, and believes nothing.

What it holds, and asserts with every frame: numbers count on without a gap, nothing follows the end of a task, and
every request is answered at most once and never with an error. What was under way when the line broke is settled by
what the server says in ``resumed`` and by the replay, before anything more is sent.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import trio
import trio_websocket

from .harness import PATIENCE
from .proxy import Line, Proxy


class LineBrokenError(Exception):
    """The connection is gone."""


@attrs.define(eq=False)
class Transcript:
    """What one session has told, and what it was asked."""

    session_id: str
    proxy: Proxy
    on_note: Callable[[Any], None] = lambda _: None
    notes: list[Any] = attrs.field(factory=list)
    connections: int = 0
    _asked: int = 0
    _unanswered: dict[int, Any] = attrs.field(factory=dict)
    _tasks: set[str] = attrs.field(factory=set)
    _ended: set[str] = attrs.field(factory=set)

    @property
    def last_seq(self) -> int:
        return len(self.notes)

    async def generate(self, **params: Any) -> list[Any]:
        """Runs a generation to its end through whatever happens to the line. Returns its notifications."""
        self._ask("generate", params)
        before = len(self._ended)
        while len(self._ended) == before:
            try:
                with trio.fail_after(PATIENCE):
                    await self._go_on(before)
            except* LineBrokenError:
                pass
        self._unanswered.clear()
        (task_id,) = {note["params"]["task_id"] for note in self.notes} - self._before(before)
        return [note for note in self.notes if note["params"]["task_id"] == task_id]

    def _before(self, count: int) -> set[str]:
        return set(list(dict.fromkeys(note["params"]["task_id"] for note in self.notes))[:count])

    async def _go_on(self, ended_before: int) -> None:
        after = f"?after={self.last_seq}" if self.connections else ""
        self.connections += 1
        async with self._dial(f"/ws/{self.session_id}{after}") as socket:
            if after:
                await self._settle(socket)
            for frame in self._unanswered.values():
                await _send(socket, frame)
            while len(self._ended) == ended_before:
                await self._take(await _receive(socket), socket)

    async def _settle(self, socket: Any) -> None:
        """After this, what is still unanswered has not arrived."""
        resumed = await _receive(socket)
        assert resumed["method"] == "resumed", resumed
        state = resumed["params"]
        assert (state["after"], state["gap"]) == (self.last_seq, False), state
        while self.last_seq < state["latest_seq"]:
            await self._take(await _receive(socket), None)
        running = {task["task_id"]: task["outstanding"] for task in state["tasks"]}
        told = {note["params"]["task_id"] for note in self.notes}
        arrived = (running.keys() | told) - self._tasks
        for number, frame in list(self._unanswered.items()):
            params = frame["params"]
            if frame["method"] == "generate":
                has_arrived = bool(arrived)
            else:
                has_arrived = params["results"][0]["tool_call_id"] not in running.get(params["task_id"], [])
            if has_arrived:
                del self._unanswered[number]
        self._tasks |= running.keys() | told

    async def _take(self, frame: Any, socket: Any) -> None:
        if "id" in frame:
            asked = self._unanswered.pop(frame["id"])
            assert "error" not in frame, (asked, frame)
            if asked["method"] == "generate":
                self._tasks.add(frame["result"]["task_id"])
            return
        params = frame["params"]
        assert params["seq"] == self.last_seq + 1, (self.last_seq, frame)
        assert params["task_id"] not in self._ended, frame
        self.notes.append(frame)
        self.on_note(frame)
        if frame["method"] in ("end", "error"):
            self._ended.add(params["task_id"])
        elif frame["method"] == "function_call_request":
            result = {"tool_call_id": params["request_id"], "result": params["parameters"]}
            asked = self._ask("tool_result", {"task_id": params["task_id"], "results": [result]})
            if socket is not None:
                await _send(socket, asked)

    def _ask(self, method: str, params: Any) -> Any:
        self._asked += 1
        frame = {"jsonrpc": "2.0", "id": self._asked, "method": method, "params": params}
        self._unanswered[self._asked] = frame
        return frame

    @asynccontextmanager
    async def _dial(self, path: str) -> AsyncIterator[Any]:
        """Raises LineBrokenError in place of whatever a broken line makes trio-websocket raise."""
        stream = await trio.open_tcp_stream("127.0.0.1", self.proxy.port)
        line = await self.proxy.next_line()
        async with trio.open_nursery() as nursery:
            handshake = trio.CancelScope()
            nursery.start_soon(_hang_up, line, stream, handshake)
            try:
                with handshake:
                    yield await trio_websocket.wrap_client_stream(nursery, stream, "127.0.0.1", path)
                    return
                raise LineBrokenError
            finally:
                stream.socket.close()
                nursery.cancel_scope.cancel()


def check_that_no_number_had_two_meanings(proxy: Proxy) -> None:
    """Over all lines, with what was sent and never got through."""
    meanings: dict[int, Any] = {}
    for frame in itertools.chain.from_iterable(line.said["down"] for line in proxy.lines):
        if seq := frame.get("params", {}).get("seq"):
            assert meanings.setdefault(seq, frame) == frame


def content(note: Any) -> tuple[str, Any]:
    params = note["params"]
    text = params.get("final_text") or params.get("error", {}).get("data", {}).get("partial_text", "")
    return note["method"], params.get("chunk") or params.get("parameters") or text


def joined(told: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Text may come in other pieces than it was sent in."""
    for kind, run in itertools.groupby(told, lambda item: item[0]):
        if kind.endswith("_chunk"):
            yield kind, "".join(words for _, words in run)
        else:
            yield from run


async def _hang_up(line: Line, stream: trio.SocketStream, scope: trio.CancelScope) -> None:
    """On a half-open line a client would wait for ever; real ones notice by their pings."""
    await line.cut.wait()
    stream.socket.close()
    scope.cancel()


async def _receive(socket: Any) -> Any:
    try:
        return json.loads(await socket.get_message())
    except trio_websocket.ConnectionClosed as error:
        raise LineBrokenError from error


async def _send(socket: Any, frame: Any) -> None:
    try:
        await socket.send_message(json.dumps(frame))
    except trio_websocket.ConnectionClosed as error:
        raise LineBrokenError from error
