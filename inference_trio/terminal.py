"""``inference-trio chat``: a conversation in the terminal, or one message in a pipe.

The main thread reads lines, so that Ctrl-C reaches it as everywhere else; the session runs on Trio in another one.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import sys
from contextlib import nullcontext
from typing import Any

import attrs
from anyio.from_thread import BlockingPortal, start_blocking_portal

from .client import Generation, InferenceError, Parameters, Result, Session, Tool, connect, tool
from .display import Display, JsonLines, OnTerminal, Plain
from .errors import ConfigurationError
from .own_server import own_server

TOKEN_VARIABLE = "CHAT_TOKEN"  # noqa: S105
PROMPT = "> "
FAILED, WRONG, UNREACHABLE, INTERRUPTED = 1, 2, 3, 130
"""Exit statuses; `--help` says what they mean."""


def run(options: argparse.Namespace) -> int:
    """Returns the exit status."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    display = _display(options.json)
    try:
        tools = [load_tool(path) for path in options.tool]
        message = None if sys.stdin.isatty() else _piped()
        with (
            own_server() if options.url is None else nullcontext(options.url) as url,
            start_blocking_portal("trio") as portal,
            portal.wrap_async_context_manager(connect(url, tools=tools, token=_token())) as session,
        ):
            chat = Chat(portal, session, display, options.system, _parameters(options))
            return chat.converse() if message is None else chat.ask(message)
    except ConfigurationError as error:
        sys.stderr.write(f"inference-trio: {error}\n")
        return WRONG
    except InferenceError as error:
        display.error(error)
        return UNREACHABLE
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever reads has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _piped() -> str:
    message = sys.stdin.read().strip()
    if not message:
        raise ConfigurationError("expected a message on standard input, got nothing")
    return message


def _display(as_json: bool) -> Display:
    if as_json:
        return JsonLines()
    return OnTerminal() if sys.stdout.isatty() else Plain()


def _parameters(options: argparse.Namespace) -> Parameters:
    names = ("model", "max_new_tokens", "temperature")
    given: Any = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    parameters: Parameters = given
    return parameters


def load_tool(path: str) -> Tool:
    """The function at ``module:function``; modules of the working directory are found. Raises ConfigurationError."""
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise ConfigurationError(f"--tool {path}: expected module:function")
    sys.path.insert(0, "")
    try:
        function: Any = importlib.import_module(module_name)
        for part in name.split("."):
            function = getattr(function, part)
        return function if isinstance(function, Tool) else tool(function)
    except Exception as error:  # of whatever the module does
        raise ConfigurationError(f"--tool {path}: {type(error).__name__}: {error}") from error


def _token() -> str | None:
    return os.environ.get(TOKEN_VARIABLE) or None


@attrs.define
class Chat:
    """Turns of a session, each shown as it comes."""

    portal: BlockingPortal
    session: Session
    display: Display
    system: str | None
    parameters: Parameters
    _task: Generation | None = None

    def converse(self) -> int:
        """Asks for lines until there are no more."""
        with contextlib.suppress(ImportError):
            importlib.import_module("readline")  # gives `input` its keys
        while True:
            try:
                message = self._read_line()
            except EOFError:
                sys.stderr.write("\n")
                return 0
            except KeyboardInterrupt:
                sys.stderr.write("\n")
                continue
            if message.strip():
                self.ask(message)

    def _read_line(self) -> str:
        if sys.stdout.isatty():
            return input(PROMPT)
        sys.stderr.write(PROMPT)  # standard output is for the answers
        sys.stderr.flush()
        return input()

    def ask(self, message: str) -> int:
        """Returns the exit status for this answer. Raises KeyboardInterrupt at the second Ctrl-C."""
        answer = self.portal.start_task_soon(self._generate, message)
        is_cancelled = False
        while True:
            try:
                result = answer.result()
            except KeyboardInterrupt:
                if is_cancelled:
                    raise
                is_cancelled = True
                self.portal.start_task_soon(self._cancel)
            except InferenceError as error:
                self.display.error(error)
                return FAILED
            else:
                return INTERRUPTED if result.status == "cancelled" else 0

    async def _generate(self, message: str) -> Result:
        async with self.session.generate(message, system=self.system, **self.parameters) as self._task:
            async for event in self._task:
                self.display.show(event)
        self.display.end(self._task.result)
        return self._task.result

    async def _cancel(self) -> None:
        if self._task:
            await self._task.cancel()
