"""The connection to Redis: runs scripts, waits while Redis is away, and knows whether it is.

What is to be run goes to Redis all at once, and while that is under way what comes next is gathered: a round trip costs
coredis several times what one more script in it does, so the more there is to do, the less each takes.

Every script is idempotent, so one whose reply was lost is run again. While Redis is away only whoever renews the lease
asks for it; all else waits for that: what Redis still knows has to be found out before anything is added to it.
"""

from __future__ import annotations

import logging
import math
import ssl
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import attrs
import coredis
import trio
from coredis.connection import TCPLocation
from coredis.exceptions import NoScriptError, ResponseError
from coredis.retry import NoRetryPolicy

from .errors import OverloadedError
from .logs import Seldom
from .redis_scripts import script
from .variables import SENTINELS

LOOK_INTERVAL = 0.5
"""Seconds between two looks whether Redis owes a reply."""

LONGEST_DEBT = 6
"""Looks for which it may owe one; more, and it counts as away. Longer than `Link.messages` waits on purpose."""

CONNECT_TIMEOUT = 3.0
"""Seconds until a connection is there."""

SENTINEL_PORT = 26379

SENTINEL_TIMEOUT = 1.0
"""Seconds until a Sentinel has answered: so there is time to ask another one."""

PATIENCE = 10.0
"""Seconds that a client's call waits for Redis."""

PAUSE = 0.2
"""Seconds between two attempts at a script that Redis refuses."""

RETRY_AFTER = 5.0
"""Seconds after which a client refused because Redis is away may try again."""

FOREVER = math.inf

Value = str | bytes | int | float

logger = logging.getLogger(__name__)


class AwayError(Exception):
    """Redis did not answer."""


@attrs.define(eq=False)
class Call:
    """``EVALSHA`` or ``EVAL``, with the script's digest or text, and what came of it."""

    command: str
    script: str
    key: str
    arguments: Sequence[Value]
    is_over: trio.Event = attrs.field(factory=trio.Event)
    reply: Any = None
    error: Exception | None = None

    def end(self, reply: Any = None, error: Exception | None = None) -> None:
        self.reply, self.error = reply, error
        self.is_over.set()


@attrs.define(eq=False)
class Link:
    """``connect`` opens a client. There is a new one after each failure, and whoever waits for the old one stops:
    coredis lets a call wait for ever for a place in a pool that was closed, or lost its places with their connections.
    """

    _connect: Callable[[], AbstractAsyncContextManager[Any]]
    _client: Any = None
    _there: trio.Event = attrs.field(factory=trio.Event)
    _opened: trio.Event = attrs.field(factory=trio.Event)
    _failed: trio.Event = attrs.field(factory=trio.Event)
    _was_told: bool = False
    """Whether the log knows that Redis is away."""
    _refusals: defaultdict[str, Seldom] = attrs.field(factory=lambda: defaultdict(Seldom))
    """By the name of the script."""
    _calls: list[Call] = attrs.field(factory=list)
    _has_calls: trio.Event = attrs.field(factory=trio.Event)
    _looks: int = 0
    _asked: dict[trio.CancelScope, int] = attrs.field(factory=dict)
    """What Redis was asked and has not answered, oldest first: how many looks there had been when it was."""

    @property
    def is_away(self) -> bool:
        return not self._there.is_set()

    async def serve(self) -> None:
        """Keeps a client open."""
        while True:
            self._failed = trio.Event()
            try:
                async with self._connect() as self._client:
                    self._opened.set()
                    await self._failed.wait()
            except* Exception as group:  # a cluster's client connects at once
                self._say_why(_reason(group.exceptions[0]))
                await trio.sleep(PAUSE)

    async def send(self) -> None:
        """Has Redis run what there is to run."""
        while True:
            await self._has_calls.wait()
            self._has_calls = trio.Event()
            calls, self._calls = self._calls, []
            try:
                await self._answer(partial(_run_all, calls))
            except AwayError as error:
                for call in calls:
                    call.end(error=AwayError(*error.args))

    async def open(self) -> None:
        """Waits for the first client, but not too long."""
        with trio.move_on_after(CONNECT_TIMEOUT):
            await self._opened.wait()

    async def watch(self) -> None:
        """Gives up on a Redis that owes a reply for too long.

        Looks are counted and not seconds: a process that is late itself is late in reading what has come, too.
        """
        while True:
            await trio.sleep(LOOK_INTERVAL)
            self._looks += 1
            if self._looks - next(iter(self._asked.values()), self._looks) > LONGEST_DEBT:
                self._give_up(self._client, "it does not answer")

    async def run(self, name: str, key: str, *arguments: Value, within: float = PATIENCE) -> Any:
        """The script's reply. Raises OverloadedError where there was none in time (seconds)."""
        with trio.move_on_after(within):
            while True:
                await self._there.wait()
                try:
                    return await self._run(name, key, arguments)
                except AwayError:
                    pass
                except ResponseError as error:  # out of memory, or a defect of the script
                    if count := self._refusals[name].one_more(trio.current_time()):
                        logger.error("Redis refuses %s (%d): %s", name, count, error)  # noqa: TRY400 (that says it all)
                    await trio.sleep(PAUSE)
        raise OverloadedError("The store of the sessions does not answer", retry_after=RETRY_AFTER)

    async def probe(self, name: str, key: str, *arguments: Value) -> Any:
        """The same, once, and whether Redis is away or not; call `is_back` when it is as it should be.

        Raises AwayError.
        """
        try:
            return await self._run(name, key, arguments)
        except ResponseError as error:
            self._give_up(self._client, str(error))
            raise AwayError(str(error)) from error

    async def messages(self, inbox: str, after: str, wait: float) -> list[tuple[str, bytes]]:
        """What came to an inbox after the message with this id, with their ids. Waits so long (seconds) for it.

        Raises AwayError.
        """
        streams = await self._answer(lambda client: client.xread({inbox: after}, count=1000, block=int(wait * 1000)))
        entries = next(iter(streams.values())) if streams else ()
        return [(entry.identifier.decode(), entry.field_values[b"m"]) for entry in entries]

    def is_back(self) -> None:
        if self.is_away:
            logger.info("Redis is there")
            self._there.set()
            self._was_told = False

    def _give_up(self, client: Any, why: str) -> None:
        """What was asked may be answered late or never: no connection of this client is used again."""
        if client is None or client is not self._client:
            return
        self._say_why(why)
        if not self.is_away:
            self._there = trio.Event()
        self._client = None
        self._failed.set()
        for asked in self._asked:
            asked.cancel()

    def _say_why(self, why: str) -> None:
        if not self._was_told:
            logger.warning("Redis is away: %s", why)
            self._was_told = True

    async def _run(self, name: str, key: str, arguments: Sequence[Value]) -> Any:
        """Raises ResponseError where Redis refuses it, AwayError where it does not answer."""
        asked = script(name)
        try:
            return await self._call(Call("evalsha", asked.sha, key, arguments))
        except NoScriptError:
            return await self._call(Call("eval", asked.text, key, arguments))

    async def _call(self, call: Call) -> Any:
        self._calls.append(call)
        self._has_calls.set()
        await call.is_over.wait()
        if call.error is not None:
            raise call.error
        return call.reply

    async def _answer(self, ask: Callable[[Any], Awaitable[Any]]) -> Any:
        """What Redis answers this question to a client. Raises AwayError where it does not."""
        client = self._client
        if client is None:
            raise AwayError("there is no connection")
        with trio.CancelScope() as asked:
            self._asked[asked] = self._looks
            try:
                return await ask(client)
            except Exception as error:
                self._give_up(client, _reason(error))
            finally:
                del self._asked[asked]
        raise AwayError("there was no answer")


async def _run_all(calls: Sequence[Call], client: Any) -> None:
    """Runs them in one round trip (of each node of a cluster), and ends each with what came of it."""
    async with client.pipeline(transaction=False, raise_on_error=False) as pipeline:
        replies = [getattr(pipeline, call.command)(call.script, [call.key], call.arguments) for call in calls]
    for call, reply in zip(calls, replies, strict=True):
        try:
            call.end(await reply)
        except ResponseError as error:
            call.end(error=error)


def _reason(error: BaseException) -> str:
    """What the error says, and what was behind it, where that says more."""
    said = str(error) or type(error).__name__
    return f"{said}: {error.__cause__}" if error.__cause__ else said


@asynccontextmanager
async def open_link(url: str) -> AsyncIterator[Link]:
    """``?cluster=true`` in the URL for a Redis Cluster; `SENTINELS` are asked for the primary at each connection."""
    options: dict[str, Any] = {
        "stream_timeout": PATIENCE,  # for what coredis asks for itself
        "connect_timeout": CONNECT_TIMEOUT,
        "retry_policy": NoRetryPolicy(),
    }
    logging.getLogger("coredis").setLevel(logging.CRITICAL)  # what it says in several lines is said here in one
    link = Link(partial(_client, url, options))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.serve)
        nursery.start_soon(link.watch)
        nursery.start_soon(link.send)
        await link.open()
        yield link
        nursery.cancel_scope.cancel()


def _client(url: str, options: dict[str, Any]) -> AbstractAsyncContextManager[Any]:
    if sentinels := SENTINELS.fullmatch(url):
        return _primary(options, **sentinels.groupdict())
    parts = urlsplit(url)
    if parts.scheme == "rediss":  # coredis would not look at the name in the certificate
        options = {**options, "ssl_context": ssl.create_default_context()}
    is_cluster = parse_qs(parts.query).get("cluster") == ["true"]
    kind: Any = coredis.RedisCluster if is_cluster else coredis.Redis
    client: AbstractAsyncContextManager[Any] = kind.from_url(url, **options)
    return client


@asynccontextmanager
async def _primary(
    options: dict[str, Any], hosts: str, service: str, username: str | None, password: str | None, db: str | None
) -> AsyncIterator[Any]:
    locations = [
        TCPLocation(name, int(port or SENTINEL_PORT))
        for name, _, port in (host.partition(":") for host in hosts.split(","))
    ]
    within = {"stream_timeout": SENTINEL_TIMEOUT, "connect_timeout": SENTINEL_TIMEOUT}
    credentials: dict[str, Any] = {
        "username": unquote(username or "") or None,
        "password": unquote(password or "") or None,
    }
    async with coredis.Sentinel(locations, sentinel_kwargs=within, **options) as sentinels:
        primary: Any = sentinels.primary_for(service, db=int(db or 0), **credentials)
        async with primary as client:
            yield client
