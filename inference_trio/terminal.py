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
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import attrs
import trio
from anyio.from_thread import BlockingPortal, start_blocking_portal

from .client import InferenceError, Parameters, Result, Session, Tool, connect, tool
from .client.tools import tools_of
from .client.transport import check_token
from .display import Display, JsonLines, OnTerminal, Plain
from .errors import ConfigurationError
from .own_server import own_server

TOKEN_VARIABLE = "CHAT_TOKEN"  # noqa: S105
PROMPT = "> "
LONGEST_DEAFNESS = 0.2
"""Seconds after which a signal is noticed at the latest."""

FAILED, WRONG, UNREACHABLE, INTERRUPTED = 1, 2, 3, 130
"""Exit statuses; `--help` says what they mean."""


def run(options: argparse.Namespace) -> int:
    """Returns the exit status."""
    with _signals_watched():
        try:
            return _run(options)
        except OSError as error:  # of standard output, also while an error is told
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if isinstance(error, BrokenPipeError):  # whoever reads has enough
                return 128 + signal.SIGPIPE
            sys.stderr.write(f"inference-trio: {error}\n")
            return FAILED


def _run(options: argparse.Namespace) -> int:
    display = _display(options.json)
    try:
        tools = _load_tools(options.tool)
        message = None if sys.stdin and sys.stdin.isatty() else _piped()
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


@contextmanager
def _signals_watched() -> Iterator[None]:
    """Ends properly at SIGTERM and SIGHUP, and sees that no signal waits for the next key that is pressed.

    A signal that comes just before the main thread goes to sleep does not wake it; the next one of the timer does.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, LONGEST_DEAFNESS, LONGEST_DEAFNESS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _piped() -> str:
    message = sys.stdin.buffer.read().decode(errors="replace").strip() if sys.stdin else ""
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


def _load_tools(paths: Sequence[str]) -> list[Tool]:
    try:
        return list(tools_of(map(load_tool, paths)).values())
    except ValueError as error:
        raise ConfigurationError(f"--tool: {error}") from error


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
    token = os.environ.get(TOKEN_VARIABLE) or None
    try:
        check_token(token or "")
    except ValueError as error:
        raise ConfigurationError(f"{TOKEN_VARIABLE}: {error}") from error
    return token


@attrs.define
class Chat:
    """Turns of a session, each shown as it comes."""

    portal: BlockingPortal
    session: Session
    display: Display
    system: str | None
    parameters: Parameters

    def converse(self) -> int:
        """Asks for lines until there are no more."""
        with contextlib.suppress(ImportError):
            keys = importlib.import_module("readline")  # of `input`
            keys.parse_and_bind("set enable-bracketed-paste on")  # pasted lines are one message
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
        if isinstance(self.display, OnTerminal):
            return input(PROMPT)
        sys.stderr.write(PROMPT)  # standard output is for the answers
        sys.stderr.flush()
        return input()

    def ask(self, message: str) -> int:
        """Returns the exit status for this answer. The first Ctrl-C cancels it, the second raises KeyboardInterrupt."""
        with self._cancelled_by_control_c() as scope, self._answers_alone():
            try:
                result = self.portal.call(self._generate, message, scope)
            except InferenceError as error:
                self.display.error(error)
                return FAILED
        return INTERRUPTED if result.status == "cancelled" else 0

    def _answers_alone(self) -> AbstractContextManager[object]:
        """What tools print does not go among the answers."""
        return nullcontext() if isinstance(self.display, OnTerminal) else contextlib.redirect_stdout(sys.stderr)

    @contextmanager
    def _cancelled_by_control_c(self) -> Iterator[trio.CancelScope]:
        scope = trio.CancelScope()
        token = self.portal.call(trio.lowlevel.current_trio_token)

        def cancel(*_: object) -> None:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            token.run_sync_soon(scope.cancel)

        before = signal.signal(signal.SIGINT, cancel)
        try:
            yield scope
        finally:
            signal.signal(signal.SIGINT, before)

    async def _generate(self, message: str, scope: trio.CancelScope) -> Result:
        async with self.session.generate(message, system=self.system, **self.parameters) as task:
            with scope:
                async for event in task:
                    self.display.show(event)
        self.display.end(task.result)
        return task.result
