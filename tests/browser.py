"""A real Chromium, driven over its DevTools protocol: the messages are JSON on a WebSocket, so Trio does the waiting.

It is Debian's package ``chromium``, or whatever ``CHROMIUM`` names. Every browser has a fresh profile and runs without
a window; it looks nothing up outside of what the page asks for.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import attrs
import trio
import trio_websocket

from tests.harness import PATIENCE

CHROMIUM = shutil.which(os.environ.get("CHROMIUM", "chromium"))

FLAGS = (
    "--headless",
    "--no-sandbox",  # Chromium's own sandbox does not run as root, as CI does
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-default-apps",
    "--disable-extensions",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    "--remote-debugging-port=0",
)

KEYS = {"Enter": ("Enter", 13, "\r"), "Escape": ("Escape", 27, ""), "Tab": ("Tab", 9, "")}
SHIFT = 8

Handler = Callable[[str, Any], None]


@attrs.define(eq=False)
class DevTools:
    """The connection to the browser. ``handlers`` get the events, by the id of their session."""

    socket: trio_websocket.WebSocketConnection
    handlers: dict[str, Handler] = attrs.field(factory=dict)
    _calls: int = 0
    _answers: dict[int, Any] = attrs.field(factory=dict)

    async def call(self, method: str, session: str | None = None, **params: Any) -> Any:
        self._calls += 1
        number, answered = self._calls, trio.Event()
        self._answers[number] = answered
        frame = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        await self.socket.send_message(json.dumps(frame))
        with trio.fail_after(PATIENCE):
            await answered.wait()
        answer = self._answers.pop(number)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    async def listen(self) -> None:
        while True:
            frame = json.loads(await self.socket.get_message())
            if "id" in frame:
                answered, self._answers[frame["id"]] = self._answers[frame["id"]], frame
                answered.set()
            elif handler := self.handlers.get(frame.get("sessionId", "")):
                handler(frame["method"], frame["params"])


@attrs.define(eq=False)
class Page:
    """A tab. ``requests`` has what it asked for, ``troubles`` what went wrong in it, ``dialogs`` what it popped up."""

    _devtools: DevTools
    _session: str
    requests: list[str] = attrs.field(factory=list)
    troubles: list[str] = attrs.field(factory=list)
    dialogs: list[str] = attrs.field(factory=list)

    async def call(self, method: str, **params: Any) -> Any:
        return await self._devtools.call(method, self._session, **params)

    async def prepare(self) -> None:
        self._devtools.handlers[self._session] = self._hear
        for domain in ("Page", "Network", "Runtime", "Log"):
            await self.call(f"{domain}.enable")

    def _hear(self, method: str, params: Any) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Network.webSocketCreated":
            self.requests.append(params["url"])
        elif method == "Page.javascriptDialogOpening":
            self.dialogs.append(params["message"])
        elif method == "Runtime.exceptionThrown":
            self.troubles.append(json.dumps(params["exceptionDetails"])[:2000])
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.troubles.append(params["entry"]["text"])

    async def open(self, url: str) -> None:
        await self.call("Page.navigate", url=url)
        await self.wait_for("document.readyState === 'complete'")

    async def evaluate(self, expression: str) -> Any:
        """The value of an expression, which may be a promise of it."""
        answer = await self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, (expression, answer["exceptionDetails"])
        return answer["result"].get("value")

    async def wait_for(self, condition: str) -> None:
        """Returns when an expression in the page is true."""
        await self.evaluate(
            f"new Promise((resolve) => {{ const look = () => {{"
            f" if ({condition}) resolve(true); else setTimeout(look, 5); }}; look(); }})"
        )

    async def wait_for_text(self, words: str, within: str = "body") -> None:
        await self.wait_for(f"document.querySelector({json.dumps(within)})?.innerText.includes({json.dumps(words)})")

    async def text(self, selector: str) -> str:
        return str(await self.evaluate(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''"))

    async def count(self, selector: str) -> int:
        return int(await self.evaluate(f"document.querySelectorAll({json.dumps(selector)}).length"))

    async def click(self, selector: str) -> None:
        """Clicks with the mouse where the element is, once it is there."""
        found = json.dumps(selector)
        await self.wait_for(f"document.querySelector({found})?.getClientRects().length")
        at = await self.evaluate(
            f"(() => {{ const element = document.querySelector({found});"
            f" element.scrollIntoView({{ block: 'nearest' }}); const box = element.getBoundingClientRect();"
            f" return [box.x + box.width / 2, box.y + box.height / 2]; }})()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            await self.call("Input.dispatchMouseEvent", type=kind, x=at[0], y=at[1], button="left", clickCount=1)

    async def type(self, text: str) -> None:
        await self.call("Input.insertText", text=text)

    async def press(self, name: str, *, shift: bool = False) -> None:
        key, code, text = KEYS[name]
        common = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": SHIFT if shift else 0}
        await self.call("Input.dispatchKeyEvent", type="keyDown", **common, **({"text": text} if text else {}))
        await self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    async def resize(self, width: int, height: int, scale: float = 1, *, dark: bool = False) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 600}
        await self.call("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])

    async def screenshot(self) -> bytes:
        """A picture in PNG."""
        shot = await self.call("Page.captureScreenshot", format="png")
        return base64.b64decode(shot["data"])


@contextmanager
def chromium(profile: Path) -> Iterator[str]:
    """A browser with its profile in this folder; gives the address of its DevTools."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            said = []
            for line in process.stderr:
                said.append(line)
                if found := re.search("DevTools listening on (.*)", line):
                    break
            else:
                raise AssertionError("".join(said))
            threading.Thread(target=process.stderr.read).start()  # what it says later is dropped
            yield found[1]
        finally:
            process.kill()


@asynccontextmanager
async def open_page(address: str) -> AsyncIterator[Page]:
    """An empty page in the browser with this address, which shares nothing with others."""
    async with (
        trio_websocket.open_websocket_url(address, max_message_size=2**26) as socket,
        trio.open_nursery() as nursery,
    ):
        devtools = DevTools(socket)
        nursery.start_soon(devtools.listen)
        context = await devtools.call("Target.createBrowserContext", disposeOnDetach=True)
        target = await devtools.call("Target.createTarget", url="about:blank", **context)
        attached = await devtools.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        page = Page(devtools, attached["sessionId"])
        await page.prepare()
        yield page
        nursery.cancel_scope.cancel()
