"""The whole server on a loopback socket, and a client for it on trio-websocket that speaks plain JSON-RPC."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import attrs
import httpx2
import hypercorn.trio
import trio
import trio_websocket
from hypercorn.config import Config

from inference_trio.runner import Model
from inference_trio.server import create_app
from inference_trio.settings import Settings

PATIENCE = 60.0
"""Seconds after which a test that waits has failed."""

KEY = "sk-of-the-tests"

HANDSHAKE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    "Sec-WebSocket-Version": "13",
}


def settings(base_url: str, **changes: Any) -> Settings:
    """Settings for an OpenAI-compatible endpoint, that read nothing from outside."""
    changes.setdefault("drain_seconds", 0.0)
    return attrs.evolve(Settings.load({"LLM_BASE_URL": base_url, "DEEPSEEK_API_KEY": KEY}, dotenv=None), **changes)


@attrs.define(eq=False)
class Client:
    """One WebSocket. Frames are read by the test, one at a time."""

    socket: trio_websocket.WebSocketConnection
    session_id: str
    _calls: int = 0

    async def say(self, frame: Any) -> None:
        await self.socket.send_message(frame if isinstance(frame, str | bytes) else json.dumps(frame))

    async def hear(self) -> Any:
        with trio.fail_after(PATIENCE):
            return json.loads(await self.socket.get_message())

    async def call(self, method: str, params: Any = None) -> Any:
        """The answer to a request; asserts that nothing else comes before it."""
        frame = await self.ask(method, params)
        answer = await self.hear()
        assert answer["id"] == frame["id"], answer
        return answer.get("result") or answer.get("error")

    async def ask(self, method: str, params: Any = None) -> Any:
        self._calls += 1
        frame = {"jsonrpc": "2.0", "id": self._calls, "method": method}
        if params is not None:
            frame["params"] = params
        await self.say(frame)
        return frame

    async def generate(self, message: str = "hi", **params: Any) -> str:
        """The id of a new task."""
        answer = await self.call("generate", {"message": message, **params})
        return answer["task_id"]

    async def until_end(self) -> list[Any]:
        """Notifications up to the end of a task."""
        frames = [await self.hear()]
        while frames[-1].get("method") not in ("end", "error"):
            frames.append(await self.hear())
        return frames

    async def until(self, method: str) -> Any:
        while (frame := await self.hear()).get("method") != method:
            pass
        return frame["params"]

    async def ask_model(self, message: str = "hi", **params: Any) -> Any:
        """The parameters of the notification with which a whole generation ended."""
        await self.generate(message, **params)
        return (await self.until_end())[-1]["params"]


@attrs.define(eq=False)
class Server:
    url: str
    _http: httpx2.AsyncClient
    shutdown: trio.Event

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    async def post(self, path: str = "/create_session", **options: Any) -> httpx2.Response:
        return await self._http.post(path, **options)

    async def request(self, method: str, path: str = "/create_session", **options: Any) -> httpx2.Response:
        return await self._http.request(method, path, **options)

    async def get(self, path: str, **options: Any) -> httpx2.Response:
        return await self._http.get(path, **options)

    async def shake_hands(self, path: str) -> httpx2.Response:
        """The answer to a WebSocket handshake that is going to be refused."""
        return await self.get(path, headers=HANDSHAKE)

    async def create_session(self, **body: Any) -> str:
        response = await self.post(json=body)
        assert response.status_code == 200, response.text
        return response.json()["session_id"]

    @asynccontextmanager
    async def connect(self, session_id: str, query: str = "", **headers: str) -> AsyncIterator[Client]:
        url = f"{self.url.replace('http', 'ws')}/ws/{session_id}{query}"
        try:
            async with trio_websocket.open_websocket_url(
                url,
                extra_headers=[(name.encode(), value.encode()) for name, value in headers.items()],
                max_message_size=2**26,
            ) as socket:
                try:
                    yield Client(socket, session_id)
                finally:
                    if socket.closed:  # by the server, in which case trio-websocket may leave its end open
                        await trio.aclose_forcefully(socket._stream)
        except trio.Cancelled:
            # Where a ping crosses our close, trio-websocket's reader fails, and out comes the Cancelled of its own
            # nursery, which would end the nursery around us in silence. One that is really meant for us comes again.
            await trio.lowlevel.checkpoint_if_cancelled()

    @asynccontextmanager
    async def client(self, **body: Any) -> AsyncIterator[Client]:
        """A connection to a new session."""
        async with self.connect(await self.create_session(**body)) as client:
            yield client


@asynccontextmanager
async def reaching(url: str) -> AsyncIterator[Server]:
    """A server that runs already, and is not ours to stop."""
    async with httpx2.AsyncClient(base_url=url, timeout=PATIENCE, verify=False) as client:
        yield Server(url, client, trio.Event())


@asynccontextmanager
async def open_server(server_settings: Settings, model: Model | None = None) -> AsyncIterator[Server]:
    config = Config()
    config.bind = ["127.0.0.1:0"]
    config.graceful_timeout = 0
    config.errorlog = None
    shutdown = trio.Event()
    async with trio.open_nursery() as nursery:
        app = create_app(server_settings, model)
        urls = await nursery.start(partial(hypercorn.trio.serve, app, config, shutdown_trigger=shutdown.wait))
        async with httpx2.AsyncClient(base_url=urls[0], timeout=PATIENCE, verify=False) as client:
            yield Server(urls[0], client, shutdown)
        shutdown.set()
