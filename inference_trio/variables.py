"""An environment variable's text as a value: the parsers, and `Secret` for what must not be shown.

A parser takes text without surrounding white space and raises ``ValueError`` with what it expected, so that
every complaint has the same form: one line that names the variable.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

import attrs

from .errors import ConfigurationError

SHORTEST_KEY = 6
"""Characters. What is shorter is a stand-in such as "none", and a common word: it is not hidden where it occurs."""

MEMORY_STORE = "memory://"

SENTINELS = re.compile(
    r"redis\+sentinel://(?:(?P<username>[^:@/]*):(?P<password>[^@/]*)@)?"
    r"(?P<hosts>[^:@/?#,]+(?::\d{1,5})?(?:,[^:@/?#,]+(?::\d{1,5})?)*)/(?P<service>[^/?#]+)(?:/(?P<db>\d+))?"
)
"""Sentinels that know where the primary of a service is; the credentials are for that."""

_STORE_OPTIONS = ("", "cluster=true")

_LARGEST_INTEGER = 2**31 - 1
_LONGEST_SECONDS = 1e9  # what a thread may wait for ends at about 9.2e9 (`threading.TIMEOUT_MAX`)
_SHOWN_CHARACTERS = 80


class Secret:
    """A text that shows itself only when it is asked to.

    Not an attrs class: `attrs.asdict` would take it apart.
    """

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return "Secret('***')"

    def __str__(self) -> str:
        return "***"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._value == other._value

    def __hash__(self) -> int:
        return hash(self._value)


class _HiddenValueError(ValueError):
    """The text is wrong, and may hold a secret: it is not to be shown."""


# Parsers


def printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("printable text")
    return text


def lower_case(text: str) -> str:
    return printable(text).lower()


def names(text: str) -> frozenset[str]:
    return frozenset(name.strip() for name in printable(text).split(",")) - {""}


def token_pairs(text: str) -> Mapping[str, Secret]:
    """``name:token`` pairs. A token goes into an HTTP header and a list of pairs: visible ASCII without commas."""
    tokens: dict[str, Secret] = {}
    for pair in map(str.strip, text.split(",")):
        found = re.fullmatch(r"([A-Za-z0-9_.-]{1,64}):([!-+\--~]{16,})", pair)
        if not found or found[1] in tokens or Secret(found[2]) in tokens.values():
            raise _HiddenValueError(
                "name:token pairs, comma-separated, each name and token once, a token of at least 16 visible characters"
            )
        tokens[found[1]] = Secret(found[2])
    return MappingProxyType(tokens)


def origins(text: str) -> frozenset[str]:
    """As a browser writes them in ``Origin``: in lower case, without the port where it is the scheme's own."""
    return frozenset(_origin(name.lower().rstrip("/")) for name in names(text))


def _origin(text: str) -> str:
    parts = re.fullmatch(r"([a-z][a-z0-9+.-]*)://([^/?#@\s:\[\]]+|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?", text)
    if not (parts and text.isascii()):
        raise ValueError("origins such as https://app.example.com, comma-separated")
    is_default = (parts[1], parts[3]) in {("http", "80"), ("https", "443")}
    return f"{parts[1]}://{parts[2]}" if is_default else text


def file_path(text: str) -> Path | None:
    return Path(printable(text)) if text else None


def boolean(text: str) -> bool:
    word = text.lower()
    if word not in {"true", "1", "yes", "on", "false", "0", "no", "off"}:
        raise ValueError("true or false (or 1/0, yes/no, on/off)")
    return word in {"true", "1", "yes", "on"}


def integer(least: int = 1, largest: int = _LARGEST_INTEGER) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch("[0-9]{1,10}", text) or not least <= int(text) <= largest:
            raise ValueError(f"a whole number from {least} to {largest}")
        return int(text)

    return parse


def seconds(least: float = 0.001) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            seconds = float(text)
        except ValueError:
            seconds = math.nan
        if not least <= seconds <= _LONGEST_SECONDS:  # nor is NaN in any range
            raise ValueError(f"a number of seconds from {least:g} to {_LONGEST_SECONDS:.0f}")
        return seconds

    return parse


def one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        matching = [choice for choice in choices if choice.lower() == text.lower()]
        if not matching:
            raise ValueError(f"one of {', '.join(choices)}")
        return matching[0]

    return parse


def variable_name(text: str) -> str:
    if not re.fullmatch("[A-Z_][A-Z0-9_]*", text):
        # Most likely the key itself was put here.
        raise _HiddenValueError("the name of the variable that holds the key, in upper case (not the key itself)")
    return text


def url(text: str) -> str:
    try:
        url = urlsplit(text)
        valid = url.scheme in {"http", "https"} and url.hostname and url.port != 0 and url.username is None
    except ValueError:  # its brackets or its port are none
        valid = False
    if not valid or not text.isprintable() or re.search(r"[\s?#]", text):
        refused = _HiddenValueError if "@" in text else ValueError  # what stands before an @ may be a password
        raise refused("an http or https URL such as https://api.deepseek.com/v1, without credentials or query")
    return text.rstrip("/")


def store_url(text: str) -> Secret:
    """Where sessions are kept. The whole URL is hidden: it may hold a password."""
    if "sentinel" in text.partition("://")[0] + text.partition("?")[2]:
        is_one = _names_sentinels(text)
        expected = "Sentinels as in redis+sentinel://:password@host:26379,host:26379/service/0"
    else:
        is_one = text == MEMORY_STORE or _names_redis(text)
        expected = (
            f"{MEMORY_STORE}, or a URL such as redis://:password@host:6379/0"
            " (rediss:// with TLS, and ?cluster=true for a cluster)"
        )
    if not is_one or not re.fullmatch("[!-~]+", text):
        raise _HiddenValueError(expected)
    return Secret(text)


def _names_redis(text: str) -> bool:
    try:
        url = urlsplit(text)
        has_server = url.scheme in {"redis", "rediss"} and bool(url.hostname) and url.port != 0
    except ValueError:  # its brackets or its port are none
        return False
    is_plain = re.fullmatch(r"/?|/\d+", url.path) and not url.fragment and url.query in _STORE_OPTIONS
    return has_server and bool(is_plain)


def _names_sentinels(text: str) -> bool:
    found = SENTINELS.fullmatch(text)
    return found is not None and all(0 < int(port) < 65536 for port in re.findall(r":(\d+)", found["hosts"]))


# Fields


@attrs.frozen
class Variable:
    """Where a setting comes from. An empty text counts as not set, unless it means that something is off."""

    name: str
    parse: Callable[[str], Any]
    help: str
    empty_means_off: bool = False

    def is_set(self, texts: Mapping[str, str]) -> bool:
        return bool(texts.get(self.name)) or (self.empty_means_off and self.name in texts)

    def read(self, texts: Mapping[str, str]) -> Any:
        """The value in ``texts``. Raises `ConfigurationError`."""
        text = texts[self.name]
        try:
            return self.parse(text)
        except _HiddenValueError as error:
            raise ConfigurationError(f"{self.name}: expected {error}") from None
        except ValueError as error:
            shown = repr(text[:_SHOWN_CHARACTERS])
            raise ConfigurationError(f"{self.name}: expected {error}, got {shown}") from None


def setting(
    name: str, parse: Callable[[str], Any], default: Any, help_text: str, *, empty_means_off: bool = False
) -> Any:
    variable = Variable(name, parse, help_text, empty_means_off)
    return attrs.field(default=default, metadata={"variable": variable})
