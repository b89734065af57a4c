"""The configuration: read once at the start, checked, frozen, and passed down.

Every setting is one field of `Settings`, which also names its variable, the parser of its text and its
default; `Settings.load` only walks over the fields. To add a setting, add a field here and a line to
``.env.example`` (a test holds the two together).

A parser takes text without surrounding white space and raises ``ValueError`` with what it expected, so that
every complaint has the same form: one line that names the variable.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import attrs
from dotenv import dotenv_values

from .errors import ConfigurationError

SHORTEST_KEY = 6
"""Characters. What is shorter is a stand-in such as "none", and a common word: it is not hidden where it occurs."""

EMBEDDED_MODEL = "smollm2-135m-instruct"

_DEFAULT_BASE_URLS = {"openai": "https://api.deepseek.com/v1"}
_DEFAULT_MODELS = {"openai": "deepseek-chat", "local": EMBEDDED_MODEL}
_LARGEST_INTEGER = 2**31 - 1
_LONGEST_SECONDS = 1e9  # what a thread may wait for ends at about 9.2e9 (`threading.TIMEOUT_MAX`)
_SHOWN_CHARACTERS = 80
_LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
# What LangChain and LangSmith read from the process's environment.
_TRACING_VARIABLES = ("LANGSMITH_TRACING", "LANGSMITH_TRACING_V2", "LANGCHAIN_TRACING", "LANGCHAIN_TRACING_V2")
_GATEWAY_VARIABLE = "LANGSMITH_GATEWAY"


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


def _text(text: str) -> str:
    if not text.isprintable():
        raise ValueError("printable text")
    return text


def _lower_case(text: str) -> str:
    return _text(text).lower()


def _names(text: str) -> frozenset[str]:
    return frozenset(name.strip() for name in _text(text).split(",")) - {""}


def _path(text: str) -> Path | None:
    return Path(_text(text)) if text else None


def _boolean(text: str) -> bool:
    word = text.lower()
    if word not in {"true", "1", "yes", "on", "false", "0", "no", "off"}:
        raise ValueError("true or false (or 1/0, yes/no, on/off)")
    return word in {"true", "1", "yes", "on"}


def _integer(least: int = 1) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch("[0-9]{1,10}", text) or not least <= int(text) <= _LARGEST_INTEGER:
            raise ValueError(f"a whole number from {least} to {_LARGEST_INTEGER}")
        return int(text)

    return parse


def _seconds(least: float = 0.001) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            seconds = float(text)
        except ValueError:
            seconds = math.nan
        if not least <= seconds <= _LONGEST_SECONDS:  # nor is NaN in any range
            raise ValueError(f"a number of seconds from {least:g} to {_LONGEST_SECONDS:.0f}")
        return seconds

    return parse


def _one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        matching = [choice for choice in choices if choice.lower() == text.lower()]
        if not matching:
            raise ValueError(f"one of {', '.join(choices)}")
        return matching[0]

    return parse


def _variable_name(text: str) -> str:
    if not re.fullmatch("[A-Z_][A-Z0-9_]*", text):
        # Most likely the key itself was put here.
        raise _HiddenValueError("the name of the variable that holds the key, in upper case (not the key itself)")
    return text


def _url(text: str) -> str:
    try:
        url = urlsplit(text)
        valid = url.scheme in {"http", "https"} and url.hostname and url.port != 0 and url.username is None
    except ValueError:  # its brackets or its port are none
        valid = False
    if not valid or not text.isprintable() or re.search(r"[\s?#]", text):
        refused = _HiddenValueError if "@" in text else ValueError  # what stands before an @ may be a password
        raise refused("an http or https URL such as https://api.deepseek.com/v1, without credentials or query")
    return text.rstrip("/")


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


def _setting(
    name: str, parse: Callable[[str], Any], default: Any, help_text: str, *, empty_means_off: bool = False
) -> Any:
    variable = Variable(name, parse, help_text, empty_means_off)
    return attrs.field(default=default, metadata={"variable": variable})


def _base_url(settings: Settings) -> str | None:
    return _DEFAULT_BASE_URLS.get(settings.provider)


def _model_name(settings: Settings) -> str:
    if settings.provider not in _DEFAULT_MODELS:
        raise ConfigurationError(
            f"LLM_MODEL_NAME is not set: name the model to use with LLM_PROVIDER={settings.provider}"
        )
    return _DEFAULT_MODELS[settings.provider]


@attrs.frozen(kw_only=True)
class Settings:
    """Everything that can be configured. Times are in seconds, sizes in bytes."""

    provider: str = _setting("LLM_PROVIDER", _lower_case, "openai", "`openai`, `local`, or a LangChain provider's name")
    api_key_env_var: str = _setting(
        "API_KEY_ENV_VAR", _variable_name, "DEEPSEEK_API_KEY", "which variable holds the key"
    )
    api_key: Secret | None = None
    base_url: str | None = _setting("LLM_BASE_URL", _url, attrs.Factory(_base_url, takes_self=True), "the endpoint")
    model_name: str = _setting("LLM_MODEL_NAME", _text, attrs.Factory(_model_name, takes_self=True), "the model")
    responses_api: bool = _setting(
        "LLM_RESPONSES_API", _boolean, False, "OpenAI's Responses API instead of chat completions"
    )
    allowed_models: frozenset[str] = _setting(
        "INFERENCE_ALLOWED_MODELS", _names, frozenset(), "models that `generate` may name, comma-separated"
    )
    stream_usage: bool = _setting("INFERENCE_STREAM_USAGE", _boolean, True, "ask the provider for usage")

    max_sessions: int = _setting("INFERENCE_MAX_SESSIONS", _integer(), 10_000, "sessions kept")
    session_ttl: float = _setting("INFERENCE_SESSION_TTL", _seconds(), 3600.0, "idle time after which a session ends")
    max_tasks: int = _setting("INFERENCE_MAX_TASKS", _integer(), 1000, "tasks running at a time")
    max_tasks_per_session: int = _setting("INFERENCE_MAX_TASKS_PER_SESSION", _integer(), 8, "of these, in one session")
    max_message_bytes: int = _setting(
        "INFERENCE_MAX_MESSAGE_BYTES", _integer(), 4_194_304, "a WebSocket message or an HTTP body"
    )
    outbox_bytes: int = _setting("INFERENCE_OUTBOX_BYTES", _integer(), 1_048_576, "notifications kept per session")
    resume_window: float = _setting(
        "INFERENCE_RESUME_WINDOW", _seconds(0), 30.0, "how long tasks go on without a connection"
    )
    tool_timeout: float = _setting("INFERENCE_TOOL_TIMEOUT", _seconds(), 300.0, "until a tool call counts as failed")
    max_tool_rounds: int = _setting("INFERENCE_MAX_TOOL_ROUNDS", _integer(), 32, "rounds of tool calls in one task")

    connect_timeout: float = _setting("INFERENCE_CONNECT_TIMEOUT", _seconds(), 10.0, "upstream: connecting")
    first_token_timeout: float = _setting(
        "INFERENCE_FIRST_TOKEN_TIMEOUT", _seconds(), 120.0, "upstream: until the first chunk"
    )
    token_timeout: float = _setting("INFERENCE_TOKEN_TIMEOUT", _seconds(), 60.0, "upstream: between chunks")
    task_timeout: float = _setting("INFERENCE_TASK_TIMEOUT", _seconds(), 1800.0, "a whole task")
    max_retries: int = _setting(
        "INFERENCE_MAX_RETRIES", _integer(0), 3, "further attempts per round before its first chunk"
    )

    drain_seconds: float = _setting("INFERENCE_DRAIN_SECONDS", _seconds(0), 30.0, "time for running tasks at shutdown")

    log_level: str = _setting("INFERENCE_LOG_LEVEL", _one_of(*_LOG_LEVELS), "INFO", "the least severity")
    log_file: Path | None = _setting(  # noqa: RUF009 - an attrs field, with a Path for its default
        "INFERENCE_LOG_FILE", _path, Path("inference_server.log"), "empty turns it off", empty_means_off=True
    )
    log_format: str = _setting(
        "INFERENCE_LOG_FORMAT", _one_of("text", "json"), "text", "`text`, or `json` for JSON lines"
    )
    log_content: bool = _setting("INFERENCE_LOG_CONTENT", _boolean, False, "whether prompts and answers may be logged")

    @classmethod
    def variables(cls) -> dict[str, Variable]:
        """The variable of each field that has one, by the field's name."""
        return {field.name: field.metadata["variable"] for field in attrs.fields(cls) if "variable" in field.metadata}

    @classmethod
    def load(cls, environ: Mapping[str, str] | None = None, dotenv: Path | None = Path(".env")) -> Settings:
        """The settings from ``environ`` (default: the process's environment) and the file ``dotenv``.

        A variable that is in both is taken from ``environ``, even if it is empty there; ``os.environ`` is
        not changed. Raises `ConfigurationError` for what is wrong, missing or not known.
        """
        merged = {**_read_dotenv(dotenv), **(os.environ if environ is None else environ)}
        texts = {name: text.strip() for name, text in merged.items()}
        values = {field: variable.read(texts) for field, variable in cls.variables().items() if variable.is_set(texts)}
        settings = cls(**_for_provider(values))
        _refuse_unknown(texts, settings.api_key_env_var)
        if settings.provider == "local":
            return settings
        if settings.provider != "openai" and "api_key_env_var" not in values:
            return settings  # the provider's own package looks for its key
        return attrs.evolve(settings, api_key=_read_key(settings.api_key_env_var, texts))


def environment_warnings(environ: Mapping[str, str]) -> list[str]:
    """A line for each variable that makes LangChain send what it handles elsewhere; to be logged at the start.

    LangChain reads them from the process's environment itself: `Settings` has no say in that.
    """
    consequences = dict.fromkeys(_TRACING_VARIABLES, "prompts and answers may be sent to LangSmith")
    consequences[_GATEWAY_VARIABLE] = "requests may go through LangSmith's gateway"
    return [
        f"{name} is on: {consequence}"
        for name, consequence in consequences.items()
        if environ.get(name, "").strip().lower() not in {"", "false", "0", "no"}
    ]


def _read_dotenv(path: Path | None) -> dict[str, str]:
    """The assignments in the file, literally: ``${NAME}`` stands for itself, as it may be part of a key."""
    if path is None:
        return {}
    try:
        texts = dotenv_values(path, interpolate=False, encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        # Not chained: a UnicodeDecodeError carries the whole text, with the key.
        raise ConfigurationError(f"{path} cannot be read: {reason}") from None
    return {name: text for name, text in texts.items() if text is not None}


def _for_provider(values: dict[str, Any]) -> dict[str, Any]:
    """The embedded model has neither endpoint nor choice: what was set for another provider does not count."""
    if values.get("provider") != "local":
        return values
    return {field: value for field, value in values.items() if field not in {"base_url", "model_name"}}


def _refuse_unknown(names: Iterable[str], key_variable: str) -> None:
    prefix = "INFERENCE_"
    known = {variable.name for variable in Settings.variables().values()} | {key_variable}
    endings = sorted(name.removeprefix(prefix) for name in known if name.startswith(prefix))
    for name in sorted(names):
        if name.startswith(prefix) and name not in known:
            close = difflib.get_close_matches(name.removeprefix(prefix), endings, n=1)
            hint = f"did you mean {prefix}{close[0]}?" if close else ".env.example lists all there are"
            raise ConfigurationError(f"{name} is not a setting: {hint}")


def _read_key(name: str, texts: Mapping[str, str]) -> Secret:
    """The provider's key. It goes into an HTTP header, which takes printable ASCII only."""
    key = texts.get(name, "")
    if not key:
        raise ConfigurationError(
            f"{name} is not set: put the provider's key in it (or name another variable in API_KEY_ENV_VAR),"
            " or set LLM_PROVIDER=local to try the embedded model without a key"
        )
    if not (key.isascii() and key.isprintable()):
        raise ConfigurationError(f"{name}: expected a key of printable ASCII characters, got others in it")
    return Secret(key)
