"""One generation as the application has it: its events, its result, its end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

import attrs
import msgspec
import trio

from .conversation import Conversation
from .errors import ArgumentsError, described, leaves
from .events import Event, Result, ToolCall
from .task import Task
from .tools import Tool, ToolFunction

CANCEL_LIMIT = 5.0
"""Seconds to wait for the end of what was cancelled, where the block is left early."""

_ENDING = (SystemExit, KeyboardInterrupt, GeneratorExit, trio.Cancelled)
"""What is not told to the model, but ends what the tool runs in."""

logger = logging.getLogger(__name__)


@attrs.define(eq=False)
class ToolBox:
    """Where the tools of a session run."""

    nursery: trio.Nursery
    limiter: trio.CapacityLimiter = attrs.field(factory=lambda: trio.CapacityLimiter(40))
    """Of threads. One that was left to itself counts until it is done."""


class Generation:
    """A generation, for the length of an `async with` block; leaving the block early cancels it on the server.

    Made by `Session.generate`. Its events are for one reader::

        async with session.generate("Write a poem.") as task:
            async for event in task:
                if isinstance(event, TextChunk):
                    print(event.text, end="")
        print(task.result.usage)
    """

    def __init__(
        self,
        conversation: Conversation,
        params: msgspec.Raw,
        tools: Mapping[str, Tool],
        box: ToolBox,
        ended: Callable[[Result], None],
    ) -> None:
        self._conversation = conversation
        self._task = Task(params, self._changed, self._called)
        self._tools = tools
        self._box = box
        self._ended = ended
        self._news = trio.Event()
        self._over = trio.Event()
        self._scopes: set[trio.CancelScope] = set()
        self._is_started = False

    async def __aenter__(self) -> Self:
        if self._is_started:
            raise RuntimeError("A generation runs once: call `generate` again")
        self._is_started = True
        self._conversation.start(self._task)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Cancels what runs and waits for its end, which has all its messages, unless the block itself is cancelled.

        Then, as after `CANCEL_LIMIT`, what was heard so far is the result; an end that comes later changes nothing.
        """
        try:
            with trio.move_on_after(CANCEL_LIMIT):
                await self.cancel()
        finally:
            self._task.leave()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        """The next event. Raises an InferenceError where the generation fails, when all before it is read."""
        self._check()
        while (event := self._task.next_event()) is None and not self._task.is_over:
            if self._news.is_set():
                self._news = trio.Event()
            await self._news.wait()
        if event is not None:
            return event
        if self._task.error:
            raise self._task.error
        raise StopAsyncIteration

    async def finish(self) -> Result:
        """Waits for the end, whether the events are read or not. Raises an InferenceError where it fails."""
        self._check()
        await self._over.wait()
        return self.result

    async def cancel(self) -> None:
        """Stops it, also at the provider. Returns when it has ended, in whatever way."""
        self._check()
        self._conversation.cancel(self._task)
        await self._over.wait()

    @property
    def result(self) -> Result:
        """What it gave. Raises RuntimeError while it runs, and an InferenceError where it has failed."""
        if self._task.error:
            raise self._task.error
        if self._task.result is None:
            raise RuntimeError("The generation has not ended: read its events to the end, or `await task.finish()`")
        return self._task.result

    @property
    def text(self) -> str:
        """The text so far."""
        return self._task.text

    @property
    def task_id(self) -> str | None:
        """The server's id for it, once there is one."""
        return self._task.id

    def _check(self) -> None:
        if not self._is_started:
            raise RuntimeError("A generation is started by `async with session.generate(…) as task:`")

    def _changed(self) -> None:
        self._news.set()
        if self._task.is_over:
            self._over.set()
            for scope in self._scopes:
                scope.cancel()
            if self._task.result:
                self._ended(self._task.result)

    def _called(self, call: ToolCall) -> None:
        tool = self._tools.get(call.name)
        if tool and tool.function:
            self._box.nursery.start_soon(self._run, tool.function, call)

    async def _run(self, function: ToolFunction, call: ToolCall) -> None:
        scope = trio.CancelScope()
        self._scopes.add(scope)
        with scope:
            if self._task.is_over:
                return
            try:
                await call.reply(await function.run(call.arguments, self._box.limiter))
            except ArgumentsError as error:
                await call.fail(str(error))
            except BaseException as error:
                if any(isinstance(leaf, _ENDING) for leaf in leaves(error)):
                    raise
                logger.info("The tool %s has failed", call.name, exc_info=True)
                await call.fail(described(error))
        self._scopes.discard(scope)
