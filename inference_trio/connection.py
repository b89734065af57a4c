"""One WebSocket: a nursery with a reader and a writer, and the only place where exceptions become JSON-RPC errors.

The reader decodes a frame, calls the session and is ready for the next one: no method waits for a generation. What is
sent are first the answers to requests, then what the session's outbox has. An answer that cannot be given at once
(`cancel` is answered when the tasks have ended) joins the queue when it is ready.

While the writer sleeps nothing waits to be sent. Whoever then has something for the client sends it at once, in its own
turn, if the socket takes it: a token waits for no other task. As soon as the socket takes no more, the writer is woken,
and is the only one that sends until nothing is left; text that waits for it is merged.

Answers that a client does not read are bounded by no longer reading its requests; of a request nothing is kept while
the next one is waited for. Two facts about Hypercorn shape the writer: sending may return without a checkpoint, so
there is one between two sends; and a cancelled send can lose the news of a disconnect, so sending is never put in a
cancel scope of its own.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import attrs
import msgspec
import trio

from . import openrpc
from .chat import JsonObject
from .errors import InferenceError, InternalError
from .jsonrpc import Call, Invalid, decode, encode, failure, notification, response
from .protocol import Accepted, Cancel, Cancelled, Generate, Kept, Notification, Started, ToolResult
from .session import Attachment

INTERNAL_ERROR = 1011
"""WebSocket close code of RFC 6455, section 7.4.1."""

LARGEST_BACKLOG = 64 * 1024
"""Bytes of answers that wait to be sent; beyond it no more requests are read."""

MOST_ANSWERS = 64
"""The same in number. Answers go first, so without a limit the requests of a busy client would hold back all else."""

logger = logging.getLogger(__name__)


class WebSocket(Protocol):
    """What is needed of Quart's WebSocket."""

    async def accept(self, headers: None = None, subprotocol: str | None = None) -> None: ...

    async def receive(self) -> str | bytes: ...

    @property
    def is_free(self) -> bool:
        """Whether nothing is on its way through `send`, or left of what `send_at_once` was given."""

    def send_at_once(self, text: str) -> None:
        """The same as `send`, while it `is_free`, but without waiting."""

    async def send(self, data: str) -> None: ...

    async def close(self, code: int, reason: str = "") -> None: ...


class Ending(Protocol):
    """Tasks that were cancelled."""

    async def ended(self) -> list[str]:
        """Waits until all have ended; the ids of those that the cancelling has ended."""


class Numbered(Protocol):
    """A notification of a task under its number."""

    @property
    def seq(self) -> int: ...

    @property
    def note(self) -> Notification | Kept: ...


class Session(Protocol):
    """What is needed of a session; see `session.Session` for what the methods do.

    What is `async` may ask elsewhere and raises an `InferenceError`, but waits for no generation.
    """

    @property
    def id(self) -> str: ...

    def take(self, connection: Attachment) -> Numbered | None: ...

    def detach(self, connection: Attachment) -> None: ...

    async def generate(self, call: Call, params: Generate) -> Started: ...

    async def tool_result(self, params: ToolResult) -> Accepted: ...

    async def cancel(self, task_id: str | None) -> Ending: ...


@attrs.frozen
class Cancelling:
    """A `cancel` that is answered when its tasks have ended."""

    call: Call
    tasks: Ending

    async def answer(self) -> JsonObject | None:
        return _response(self.call, Cancelled(await self.tasks.ended()))


@attrs.define(eq=False)
class Connection:
    websocket: WebSocket
    session: Session
    subprotocol: str | None = None
    traceparent: str | None = None
    """The client's place in a trace, for tasks that name none of their own."""
    on_refusal: Callable[[InferenceError], None] = lambda _: None
    """Called with each error that a request is answered with, or would be if it asked for an answer."""
    _answers: deque[str] = attrs.field(factory=deque)
    _backlog: int = 0
    _cancelling: int = 0
    """Frames whose answer has to wait for tasks to end."""
    _awake: trio.Event = attrs.field(factory=trio.Event)
    _is_asleep: bool = False
    """Whether the writer has nothing to do, and waits for ``_awake``."""
    _defect: Exception | None = None
    _caught_up: trio.Event = attrs.field(factory=trio.Event)
    _close_code: int | None = None
    closed: trio.Event = attrs.field(factory=trio.Event)

    async def run(self) -> None:
        """Serves the connection, which is attached to its session, until it is closed from either side."""
        try:
            await self.websocket.accept(subprotocol=self.subprotocol)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._read, nursery)
                await self._write()
                nursery.cancel_scope.cancel()
        except* Exception:
            logger.exception("defect in a connection")
            await self.websocket.close(INTERNAL_ERROR)
        finally:
            self.session.detach(self)
            self.closed.set()

    def wake(self) -> None:
        if self._is_asleep:
            try:
                self._send_at_once()
            except Exception as error:  # it is this connection's, not that of whoever has something to tell
                self._defect, self._is_asleep = error, False  # nothing is to be sent after what is lost now
                self._awake.set()

    def tell(self, note: Notification) -> None:
        self._enqueue(notification(self.session.id, note))

    def close(self, code: int) -> None:
        self._close_code = code
        self.wake()

    # Reading

    async def _read(self, nursery: trio.Nursery) -> None:
        while self._close_code is None:
            await self._handle(await self.websocket.receive(), nursery)
            await trio.lowlevel.checkpoint()  # many may have come together, and are answered at once
            while self._backlog > LARGEST_BACKLOG or len(self._answers) + self._cancelling > MOST_ANSWERS:
                self._caught_up = trio.Event()
                await self._caught_up.wait()

    async def _handle(self, data: str | bytes, nursery: trio.Nursery) -> None:
        frame = decode(data)
        answers = [await self._dispatch(item) for item in frame.items]
        if any(isinstance(answer, Cancelling) for answer in answers):
            self._cancelling += 1
            nursery.start_soon(self._answer_later, frame.is_batch, answers)
        else:
            self._answer(frame.is_batch, answers)

    async def _dispatch(self, item: Call | Invalid) -> JsonObject | Cancelling | None:
        if self._close_code is not None:  # also what is left of a batch
            return None
        if isinstance(item, Invalid):
            self.on_refusal(item.error)
            return failure(item.id, item.error)
        try:
            return await self._call(item)
        except InferenceError as error:
            refused = error
        except Exception:
            logger.exception("defect in a method")
            refused = InternalError()
        self.on_refusal(refused)
        return failure(item.id, refused) if item.expects_answer else None

    async def _call(self, call: Call) -> JsonObject | Cancelling | None:
        match call.params:
            case Generate() as params:
                return _response(call, await self.session.generate(call, self._traced(params)))
            case ToolResult() as params:
                return _response(call, await self.session.tool_result(params))
            case Cancel(task_id=task_id):
                return Cancelling(call, await self.session.cancel(task_id))
            case _:
                return _response(call, openrpc.document())

    def _traced(self, params: Generate) -> Generate:
        if self.traceparent is None or params.traceparent is not None:
            return params
        return msgspec.structs.replace(params, traceparent=self.traceparent)

    async def _answer_later(self, is_batch: bool, answers: list[Any]) -> None:
        given = [await answer.answer() if isinstance(answer, Cancelling) else answer for answer in answers]
        self._cancelling -= 1
        self._answer(is_batch, given)
        self.wake()  # also where there is no answer, the reader may wait for this

    def _answer(self, is_batch: bool, answers: list[Any]) -> None:
        given = [answer for answer in answers if answer is not None]
        if given:
            self._enqueue(given if is_batch else given[0])

    # Writing

    def _enqueue(self, value: Any) -> None:
        text = encode(value)
        self._backlog += len(text)
        self._answers.append(text)
        self.wake()

    def _send_at_once(self) -> None:
        while self.websocket.is_free and self._close_code is None:
            text = self._next()
            if text is None:
                return
            self.websocket.send_at_once(text)
        self._awake.set()

    async def _write(self) -> None:
        while True:
            while text := self._next():
                await self.websocket.send(text)
                await trio.lowlevel.checkpoint()
            if self._close_code is not None:
                break
            self._awake, self._is_asleep = trio.Event(), True
            await self._awake.wait()
            self._is_asleep = False
            if self._defect:
                raise self._defect
        await self.websocket.close(self._close_code)

    def _next(self) -> str | None:
        if self._answers:
            text = self._answers.popleft()
            self._backlog -= len(text)
            return text
        self._caught_up.set()
        entry = self.session.take(self)
        return encode(notification(self.session.id, entry.note, entry.seq)) if entry else None


def _response(call: Call, result: Any) -> JsonObject | None:
    return response(call.id, result) if call.expects_answer else None
