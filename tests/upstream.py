"""An upstream that does what it is told: OpenAI's chat completions on a loopback socket, from a script.

Every connection has two tasks. One carries out the script's answers; the other does nothing but read, so it
sees the peer close the connection also while the script is silent, and then cancels the first. The bytes go
through h11 for the framing and straight to the socket for what h11 would rightly refuse to send.

`tests.answers` has the vocabulary of the scripts, `tests.quirks` has ready-made ones. By hand:
``python -m tests.upstream --port 9009``.
"""

from __future__ import annotations

import collections
import contextlib
import json
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterable
from functools import partial
from typing import Any, TypeAlias

import attrs
import h11
import trio

from tests.answers import EVENT_STREAM, Answer, flatten, status


@attrs.define(eq=False)
class Request:
    """A request for a completion as it came, and what became of the answer.

    ``headers`` has lower-case names. ``closed`` is set as soon as the peer is seen to have closed the
    connection, at the latest when the connection is gone; ``finished`` when the answer is over for
    whatever reason, and then ``complete`` tells whether every step of it was carried out.
    """

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    closed: trio.Event
    finished: trio.Event = attrs.field(factory=trio.Event)
    complete: bool = False

    @property
    def messages(self) -> Any:
        return self.body["messages"]

    @property
    def tools(self) -> Any:
        return self.body.get("tools", [])


Script: TypeAlias = Answer | Callable[[Request], Answer]
MODELS = {"object": "list", "data": [{"id": "scripted", "object": "model", "owned_by": "tests"}]}


@attrs.define(eq=False)
class Upstream:
    """What a test sees. ``connections`` has every TCP connection there was, oldest first."""

    base_url: str
    requests: list[Request] = attrs.field(factory=list)
    connections: list[Connection] = attrs.field(factory=list)
    _queue: collections.deque[Script] = attrs.field(factory=collections.deque)
    _gates: dict[str, trio.Event] = attrs.field(factory=lambda: collections.defaultdict(trio.Event))
    _waiting: trio.lowlevel.ParkingLot = attrs.field(factory=trio.lowlevel.ParkingLot)

    def script(self, *answers: Script) -> None:
        """Replaces what is left of the script by these answers, one for each request to come.

        A function takes the request and returns the answer, for this request and all that follow. When the
        script is used up the answer is ``418``, which nobody should take for worth a retry.
        """
        self._queue = collections.deque(answers)

    def gate(self, name: str) -> trio.Event:
        """The event on which the step ``pause(name)`` waits."""
        return self._gates[name]

    async def wait_for_requests(self, count: int) -> Request:
        """Returns the ``count``-th request, when it is there."""
        while len(self.requests) < count:
            await self._waiting.park()
        return self.requests[count - 1]

    def answer_to(self, method: str, request: Request) -> Answer:
        if (method, request.path) == ("GET", "/v1/models"):
            return status(200, MODELS)
        if (method, request.path) != ("POST", "/v1/chat/completions"):
            return status(404, {"error": {"message": f"no such route: {method} {request.path}"}})
        self.requests.append(request)
        self._waiting.unpark_all()
        return self._next_answer(request)

    def _next_answer(self, request: Request) -> Answer:
        if not self._queue:
            return status(418, {"error": {"message": "the script has no more answers"}})
        if callable(self._queue[0]):
            return self._queue[0](request)
        return self._queue.popleft()  # type: ignore[return-value]


@attrs.define(eq=False)
class Connection:
    """One TCP connection, and what the steps of an answer may do with it (`tests.answers.Wire`)."""

    _upstream: Upstream
    _stream: trio.SocketStream
    closed: trio.Event = attrs.field(factory=trio.Event)
    _http: h11.Connection = attrs.field(factory=lambda: h11.Connection(h11.SERVER))
    _arrived: trio.Event = attrs.field(factory=trio.Event)
    _sending: bool = True

    async def serve(self) -> None:
        """Returns when the peer has closed the connection, or the script has reset it."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read, nursery.cancel_scope)
            await self._answer_all()

    async def _read(self, scope: trio.CancelScope) -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while data := await self._stream.receive_some():
                self._http.receive_data(data)
                self._arrived.set()
        self.closed.set()
        scope.cancel()

    async def _answer_all(self) -> None:
        while self._sending:
            method, request = await self._next_request()
            try:
                await self._answer(self._upstream.answer_to(method, request))
                request.complete = True
            finally:
                request.finished.set()

    async def _answer(self, answer: Answer) -> None:
        for step in flatten(answer):
            await step.run(self)
        if not self._sending:
            return
        await self.send_body([])
        await self._send(self._http.send(h11.EndOfMessage()))
        if self._http.our_state is h11.MUST_CLOSE:
            await self.close(reset=False)
        else:
            self._http.start_next_cycle()

    async def _next_request(self) -> tuple[str, Request]:
        head = await self._next_event()
        body = bytearray()
        while isinstance(event := await self._next_event(), h11.Data):
            body += event.data
        assert isinstance(head, h11.Request), head
        assert isinstance(event, h11.EndOfMessage), event
        headers = {name.decode(): value.decode() for name, value in head.headers}
        path = head.target.decode().partition("?")[0]
        return head.method.decode(), Request(path, headers, json.loads(body or b"{}"), self.closed)

    async def _next_event(self) -> Any:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            self._arrived = trio.Event()
            await self._arrived.wait()
        return event

    async def send_head(self, code: int, headers: dict[str, str]) -> None:
        await self._send(self._http.send(h11.Response(status_code=code, headers=list(headers.items()))))

    async def send_body(self, parts: Iterable[bytes]) -> None:
        if self._http.our_state is h11.SEND_RESPONSE:
            await self.send_head(200, {"Content-Type": EVENT_STREAM})
        await self._send(b"".join(self._http.send(h11.Data(data=part)) or b"" for part in parts))

    async def send_unframed(self, data: bytes) -> None:
        await self._send(data)

    async def close(self, *, reset: bool) -> None:
        """Closes our side, or with ``reset`` the whole connection."""
        self._sending = False
        if reset:
            self._stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._stream.socket.close()
        else:
            with contextlib.suppress(trio.BrokenResourceError):
                await self._stream.send_eof()

    def gate(self, name: str) -> trio.Event:
        return self._upstream.gate(name)

    async def _send(self, data: bytes | None) -> None:
        try:
            await self._stream.send_all(data or b"")
        except trio.BrokenResourceError:
            await trio.sleep_forever()  # the reader sees it too, and cancels us


@contextlib.asynccontextmanager
async def open_upstream(*answers: Script, port: int = 0) -> AsyncIterator[Upstream]:
    """An upstream with this script (see `Upstream.script`) as long as the block runs."""
    listeners = await trio.open_tcp_listeners(port, host="127.0.0.1")
    host, port = listeners[0].socket.getsockname()
    upstream = Upstream(f"http://{host}:{port}/v1")
    upstream.script(*answers)

    async def serve(stream: trio.SocketStream) -> None:
        connection = Connection(upstream, stream)
        upstream.connections.append(connection)
        await connection.serve()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(trio.serve_listeners, serve, listeners))
        yield upstream
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    from tests.scenarios import main

    main()
