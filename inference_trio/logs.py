"""The log: written by a thread of its own, each line made where it is logged.

A line is made at once, in the task or thread that logs: only there are its context variables known, and nothing
that is logged can change before it is written. The finished line goes into a bounded queue, from which
one thread writes it to the file and to stderr; so a slow disk or terminal never holds up the event loop. When the
queue is full, lines are dropped and counted, and the log says how many.

Three rules hold for every line, whoever logs it:

- It is one line (a traceback's further lines are indented): control characters are escaped, so text that comes from
  outside cannot forge a line.
- Neither the provider's key nor a token stands in it.
- From below WARNING only this server's and Hypercorn's lines are taken: at DEBUG the HTTP and model libraries
  log whole requests, with the prompts and headers in them.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import logging
import logging.handlers
import math
import queue
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import attrs

from .errors import ConfigurationError
from .settings import Settings
from .variables import SHORTEST_KEY, Secret

LOG_PERIOD = 60.0
"""Seconds between two lines on what happens again and again."""

_OWN_LOGGERS = ("inference_trio", "hypercorn.error")
_QUEUE_LINES = 8192
_FILE_BYTES = 10_000_000
_OLD_FILES = 5
_SESSION_CHARACTERS = 8  # enough to tell sessions apart; a whole id is a credential
_STANDARD_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {"asctime", "message"}  # set by formatters

_context: contextvars.ContextVar[Mapping[str, str] | None] = contextvars.ContextVar("log_context", default=None)


def configure_logging(settings: Settings) -> Callable[[], None]:
    """Send everything that is logged where ``settings`` say, in place of an earlier call's arrangement.

    Returns what ends it: all that waits is written then, and the file closed. `logging` does the same by itself
    when the process exits. Raises `ConfigurationError`, and leaves things as they were, if the file cannot be
    opened. Processes must not share a file: each would rotate it.
    """
    root = logging.getLogger()
    sinks = [logging.StreamHandler(), *_file_sinks(settings.log_file)]
    hidden = [*settings.auth_tokens.values(), settings.api_key, settings.store_password]
    handler = _LineQueue(_LineFormatter(settings.log_format, hidden, settings.worker), sinks)
    for earlier in [other for other in root.handlers if isinstance(other, _LineQueue)]:
        earlier.close()
    root.addHandler(handler)
    # With OPENAI_LOG=debug in the environment, the openai package lowers its level and adds a handler of its own.
    logging.getLogger("openai").setLevel(logging.WARNING)
    for name in _OWN_LOGGERS:
        logging.getLogger(name).setLevel(settings.log_level)
    return handler.close


@contextlib.contextmanager
def log_context(
    *, task_id: str | None = None, session_id: str | None = None, owner: str | None = None
) -> Iterator[None]:
    """Mark every line logged inside, also from tasks and worker threads started there, with these ids."""
    ids = dict(_context.get() or {})
    if task_id is not None:
        ids["task_id"] = task_id
    if session_id is not None:
        ids["session"] = session_id[:_SESSION_CHARACTERS]
    if owner is not None:
        ids["owner"] = owner
    token = _context.set(ids)
    try:
        yield
    finally:
        _context.reset(token)


@attrs.define(eq=False)
class Seldom:
    """For what may happen hundreds of times a second: whether the log is to have a line on it now."""

    _count: int = 0
    _silent_until: float = -math.inf

    def one_more(self, now: float) -> int:
        """How many there were since the last line (times are in seconds); 0 where it is too early for another."""
        self._count += 1
        if now < self._silent_until:
            return 0
        count, self._count, self._silent_until = self._count, 0, now + LOG_PERIOD
        return count


def _file_sinks(path: Path | None) -> list[logging.Handler]:
    if path is None:
        return []
    try:
        file = logging.handlers.RotatingFileHandler(
            path, maxBytes=_FILE_BYTES, backupCount=_OLD_FILES, encoding="utf-8"
        )
    except OSError as error:
        raise ConfigurationError(f"INFERENCE_LOG_FILE: {str(path)!r} cannot be opened: {error.strerror}") from error
    return [file]


class _LineQueue(logging.handlers.QueueHandler):
    """The one handler on the root logger: makes the line and queues it, or drops it when the queue is full."""

    def __init__(self, formatter: logging.Formatter, sinks: list[logging.Handler]) -> None:
        self._lines: queue.Queue[logging.LogRecord] = queue.Queue(_QUEUE_LINES)
        super().__init__(self._lines)
        self.setFormatter(formatter)
        self.addFilter(_may_be_logged)
        self._dropped = 0
        self._writer: logging.handlers.QueueListener | None
        self._writer = logging.handlers.QueueListener(self._lines, *sinks)
        self._writer.start()

    def enqueue(self, record: logging.LogRecord) -> None:
        """Never waits. Called with the handler's lock held, which guards the count too."""
        try:
            if self._dropped:
                self._lines.put_nowait(self._drop_notice())
                self._dropped = 0
            self._lines.put_nowait(record)
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Write all that waits, then close the sinks. Closing twice is safe: `logging.shutdown` does it, too."""
        logging.getLogger().removeHandler(self)
        writer, self._writer = self._writer, None
        if writer is not None:
            if self._dropped:
                self._lines.put(self._drop_notice())
            self._lines.join()  # `stop` raises when there is no room for its sentinel
            writer.stop()
            for sink in writer.handlers:
                sink.close()
        super().close()

    def _drop_notice(self) -> logging.LogRecord:
        notice = {
            "name": __name__,
            "levelno": logging.WARNING,
            "levelname": "WARNING",
            "msg": f"{self._dropped} lines were dropped here: they came faster than they could be written",
        }
        # Whoever happens to log next has nothing to do with it: an empty context has no ids.
        record: logging.LogRecord = contextvars.Context().run(self.prepare, logging.makeLogRecord(notice))
        return record


def _may_be_logged(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or record.name.startswith(("inference_trio", "hypercorn."))


class _LineFormatter(logging.Formatter):
    """The whole line, in one of the two formats, without what is secret."""

    def __init__(self, line_format: str, hidden: Iterable[Secret | None], worker: int | None) -> None:
        super().__init__()
        self._worker = {} if worker is None else {"worker": worker}
        self._to_line = _json_line if line_format == "json" else _text_line
        plain = {secret.reveal() for secret in hidden if secret}
        self._hidden = {
            form
            for text in plain
            if len(text) >= SHORTEST_KEY
            for form in (text, json.dumps(text)[1:-1], repr(text)[1:-1])
        }

    def format(self, record: logging.LogRecord) -> str:
        line = self._to_line(self._fields(record))
        for text in self._hidden:
            line = line.replace(text, "***")
        return line

    def _fields(self, record: logging.LogRecord) -> dict[str, Any]:
        extra = {name: value for name, value in vars(record).items() if name not in _STANDARD_ATTRIBUTES}
        fixed = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")[:-6] + "Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        # Twice: `fixed` comes first in the line, and is not overwritten by a field of the same name.
        fields = fixed | self._worker | dict(_context.get() or {}) | extra | fixed
        if record.exc_info and record.exc_info[0]:
            fields["exception"] = self.formatException(record.exc_info)
        return fields


def _json_line(fields: dict[str, Any]) -> str:
    return json.dumps(fields, default=str)


def _text_line(fields: dict[str, Any]) -> str:
    """``time LEVEL logger [task_id session] message extra=…``, then a traceback's lines, indented."""
    ids = f"[{fields.pop('task_id', '-')} {fields.pop('session', '-')}]"
    exception = str(fields.pop("exception", "")).splitlines()
    head = f"{fields.pop('time')} {fields.pop('level'):<5} {fields.pop('logger')} {ids} {fields.pop('message')}"
    extra = "".join(f" {name}={value}" for name, value in fields.items())
    return "\n".join([_escape(head + extra), *("    " + _escape(line) for line in exception)])


def _escape(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
