"""A session: what keeps its connection, and what the application asks of it."""

from __future__ import annotations

import random
import ssl
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Literal, TypeAlias, TypedDict, Unpack

import msgspec
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection

from .conversation import Conversation
from .errors import ClosedError, ConnectionLostError, DefectError, InferenceError, SessionGoneError, out_of_group
from .events import JsonObject, Result
from .generation import Generation, ToolBox
from .tools import Function, Tool, tools_of
from .transport import Transport, open_transport
from .wire import as_json

HEALTHY_AFTER = 10.0
"""Seconds after which a connection counts as good, also when nothing has come on it."""

PING_EVERY = 20.0
"""Seconds between pings. One that is not answered in as many is the end of the connection."""

GOODBYE_LIMIT = 2.0
"""Seconds to wait at the end of the session until the server has cancelled what runs."""

AnyTool: TypeAlias = Tool | Function | Mapping[str, Any]
"""A function, what `tool` makes of one, or a declaration without a function."""


def backoff(attempt: int) -> float:
    """Seconds before the attempt, from 0, to connect again."""
    return float(min(0.25 * 2 ** min(attempt, 10), 5.0) * random.uniform(0.5, 1.0))  # noqa: S311


class Parameters(TypedDict, total=False):
    """Further parameters of a generation, which mean what they mean in OpenAI's chat completions."""

    model: str
    max_new_tokens: int
    temperature: float
    top_p: float
    stop: str | Sequence[str]
    seed: int
    presence_penalty: float
    frequency_penalty: float
    tool_choice: Literal["none", "auto", "required"] | JsonObject
    parallel_tool_calls: bool
    response_format: JsonObject
    reasoning_effort: str
    logit_bias: Mapping[str, float]
    traceparent: str


class Session:
    """A session of the server, as long as the block of `connect` runs.

    Attributes:
        history: the turns so far, which generations go on from: the message and what the generation added, as each
            ends, at the latest when its block is left. It may be changed in between.
    """

    def __init__(self, transport: Transport, box: ToolBox, tools: Mapping[str, Tool], give_up_after: float) -> None:
        self.history: list[JsonObject] = []
        self._transport = transport
        self._box = box
        self._tools = tools
        self._give_up_after = give_up_after
        self._id: str | None = None
        self._awake = trio.Event()
        self._conversation = Conversation(self._wake)
        self._life = trio.CancelScope(shield=True)
        self._disconnected = trio.Event()
        self._line: trio.CancelScope | None = None

    @property
    def id(self) -> str | None:
        """The server's id for the session. Another one after the server has forgotten the session."""
        return self._id

    def generate(
        self,
        message: str | Sequence[JsonObject] | None = None,
        *,
        history: Sequence[JsonObject] | None = None,
        system: str | None = None,
        tools: Iterable[AnyTool] | None = None,
        **parameters: Unpack[Parameters],
    ) -> Generation:
        """A generation, that starts with `async with`. Several may run at a time.

        Args:
            message: of the user, a text or content parts; None: the history has it
            history: messages to go on from, in place of the session's own, which then stays as it is
            system: a system message put before the history, for this generation
            tools: in place of the session's, for this generation
            parameters: see `Parameters`

        Raises TypeError or ValueError for what cannot be sent, and what the session was closed with.
        """
        if self._conversation.closed:
            raise self._conversation.closed.copy()
        if message is not None and not message:
            raise ValueError("Expected a message that is not empty, or None where the history has it")
        own = tools_of(tools) if tools is not None else None
        turn: list[JsonObject] = [] if message is None else [{"role": "user", "content": message}]
        instruction = [] if system is None else [{"role": "system", "content": system}]
        params: JsonObject = {
            **parameters,
            "history": [*instruction, *(self.history if history is None else history)],
            "message": message,
            "tools": [one.declaration for one in own.values()] if own is not None else None,
        }

        def ended(result: Result) -> None:
            if history is None and result.messages:
                self.history += [*turn, *result.messages]

        sent = as_json({name: value for name, value in params.items() if value is not None})
        return Generation(self._conversation, sent, self._tools if own is None else own, self._box, ended)

    async def ask(
        self,
        message: str | Sequence[JsonObject] | None = None,
        *,
        history: Sequence[JsonObject] | None = None,
        system: str | None = None,
        tools: Iterable[AnyTool] | None = None,
        **parameters: Unpack[Parameters],
    ) -> Result:
        """What a whole generation gives; `print` it for its text. Takes and raises what `generate` does."""
        async with self.generate(message, history=history, system=system, tools=tools, **parameters) as task:
            return await task.finish()

    def reconnect(self) -> None:
        """Drops the connection and resumes on a new one, where the network is known to have changed."""
        if self._line:
            self._line.cancel()

    # What `connect` does

    async def open(self, nursery: trio.Nursery) -> None:
        """Creates the session and keeps it connected, in the nursery. Raises InferenceError."""
        await self._create()
        nursery.start_soon(self._keep_connected)

    async def close(self) -> None:
        """Cancels what runs and ends the connection."""
        with trio.move_on_after(GOODBYE_LIMIT, shield=True):
            cancelled = trio.Event()
            if self._conversation.cancel_all(cancelled.set):
                await cancelled.wait()
        self._conversation.end(ClosedError("The session is closed"))
        if self._line:
            self._line.cancel()
            with trio.CancelScope(shield=True):  # the closing handshake has a limit of its own
                await self._disconnected.wait()
        self._life.cancel()

    # Connecting

    def _wake(self) -> None:
        self._awake.set()

    async def _sleep_until_woken(self) -> None:
        await self._awake.wait()
        self._awake = trio.Event()

    async def _keep_connected(self) -> None:
        """Connects at once, and after a loss when there is something to connect for. Shielded until `close`."""
        with self._life:
            while not self._conversation.closed:
                await self._connect_until_given_up()
                while not self._conversation.is_busy and not self._conversation.closed:
                    await self._sleep_until_woken()

    async def _connect_until_given_up(self) -> None:
        attempt, lost_at = 0, trio.current_time()
        while True:
            started_at = trio.current_time()
            refusal = await self._connect_once()
            now = trio.current_time()
            if self._conversation.progressed or now - started_at >= HEALTHY_AFTER:
                attempt, lost_at = 0, now
            if isinstance(refusal, SessionGoneError):
                self._forget(refusal)
            elif refusal and not refusal.retryable:
                self._forget(refusal, everything=True)
            if now - lost_at >= self._give_up_after:
                lost = ConnectionLostError("The connection was lost, and none could be made anew")
                self._forget(lost, everything=True)
            if not self._conversation.is_busy:
                return
            least = (refusal and refusal.retry_after) or 0.0
            await trio.sleep(max(least, backoff(attempt)))
            attempt += 1

    async def _connect_once(self) -> InferenceError | None:
        """Returns when the connection is gone, with the reason where there was none."""
        self._conversation.progressed = False
        self._disconnected = trio.Event()
        code: int | None = None
        try:
            if self._id is None:
                await self._create()
            async with self._transport.open_socket(self._id or "", self._conversation.last_seq) as socket:
                code = await self._converse(socket)
        except InferenceError as error:
            return error
        finally:
            self._line = None
            self._conversation.disconnected(code)
            self._disconnected.set()
        return None

    async def _create(self) -> None:
        self._id = await self._transport.create_session([one.declaration for one in self._tools.values()])

    def _forget(self, error: InferenceError, *, everything: bool = False) -> None:
        self._id = None
        self._conversation.forget(error, everything=everything)

    async def _converse(self, socket: WebSocketConnection) -> int | None:
        """Serves one connection. Returns its close code when it is gone. Raises DefectError."""
        code: int | None = None
        defect: Exception | None = None
        async with trio.open_nursery() as nursery:
            self._line = nursery.cancel_scope
            nursery.start_soon(self._write, socket)
            nursery.start_soon(_keep_alive, socket, nursery.cancel_scope)
            try:
                while True:
                    self._conversation.receive(await socket.get_message())
            except ConnectionClosed as closed:
                code = closed.reason.code if closed.reason else None
            except (msgspec.MsgspecError, KeyError, TypeError, AttributeError) as error:
                defect = error
            nursery.cancel_scope.cancel()
        if defect:
            raise DefectError(f"The server has sent what is not of the protocol: {defect!r}") from defect
        return code

    async def _write(self, socket: WebSocketConnection) -> None:
        frames = self._conversation.frames
        with suppress(ConnectionClosed):  # the reader sees it too
            while True:
                while frames:
                    await socket.send_message(frames.popleft())
                await self._sleep_until_woken()


async def _keep_alive(socket: WebSocketConnection, line: trio.CancelScope) -> None:
    """Ends the connection when the other end no longer answers."""
    with suppress(ConnectionClosed):
        while True:
            await trio.sleep(PING_EVERY)
            with trio.move_on_after(PING_EVERY) as patience:
                await socket.ping()
            if patience.cancelled_caught:
                line.cancel()


@asynccontextmanager
async def connect(
    url: str,
    *,
    tools: Iterable[AnyTool] = (),
    token: str | None = None,
    ssl_context: ssl.SSLContext | None = None,
    give_up_after: float = 120.0,
) -> AsyncIterator[Session]:
    """A new session on the server, for the length of the block; leaving it cancels what runs.

    Args:
        url: the server's address, `http://…` or `https://…` (or `ws://…`, `wss://…`)
        tools: functions, and declarations of what is answered by hand, for all generations of the session
        token: where the server asks for one
        ssl_context: in place of Python's default, for `https`
        give_up_after: seconds without a connection after which running generations fail

    Raises UnreachableError, UnauthorizedError, DefectError where there is no such server, or as the server refuses it;
    TypeError or ValueError for wrong tools; RuntimeError outside of Trio.
    """
    if not trio.lowlevel.in_trio_run():
        raise RuntimeError("The client needs Trio: run it with `trio.run(main)`, or in asyncio as docs/clients.md says")
    offered = tools_of(tools)
    failure: BaseException | None = None
    async with open_transport(url, token, ssl_context) as transport:
        try:
            async with trio.open_nursery() as nursery:
                session = Session(transport, ToolBox(nursery), offered, give_up_after)
                try:
                    await session.open(nursery)
                    yield session
                except BaseException as error:  # raised below, and so not in a group
                    failure = error
                finally:
                    await session.close()
                    nursery.cancel_scope.cancel()
        except BaseException as error:
            if failure is None or isinstance(failure, trio.Cancelled):
                failure = out_of_group(error)
        if failure is not None:
            raise failure
