"""The configuration: read once at the start, checked, frozen, and passed down.

Every setting is one field of `Settings`, which also names its variable, the parser of its text and its
default; `Settings.load` only walks over the fields. To add a setting, add a field here and a line to
``.env.example`` (a test holds the two together).
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import unquote, urlsplit

import attrs
from dotenv import dotenv_values

from .errors import ConfigurationError
from .variables import (
    MEMORY_STORE,
    Secret,
    Variable,
    boolean,
    file_path,
    integer,
    lower_case,
    names,
    one_of,
    origins,
    printable,
    seconds,
    setting,
    store_url,
    token_pairs,
    url,
    variable_name,
)

EMBEDDED_MODEL = "smollm2-135m-instruct"

LAST_PORT = 65535

_DEFAULT_BASE_URLS = {"openai": "https://api.deepseek.com/v1"}
_DEFAULT_MODELS = {"openai": "deepseek-chat", "local": EMBEDDED_MODEL}
_LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
# What LangChain and LangSmith read from the process's environment.
_TRACING_VARIABLES = ("LANGSMITH_TRACING", "LANGSMITH_TRACING_V2", "LANGCHAIN_TRACING", "LANGCHAIN_TRACING_V2")
_GATEWAY_VARIABLE = "LANGSMITH_GATEWAY"


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

    provider: str = setting("LLM_PROVIDER", lower_case, "openai", "`openai`, `local`, or a LangChain provider's name")
    api_key_env_var: str = setting("API_KEY_ENV_VAR", variable_name, "DEEPSEEK_API_KEY", "which variable holds the key")
    api_key: Secret | None = None
    base_url: str | None = setting("LLM_BASE_URL", url, attrs.Factory(_base_url, takes_self=True), "the endpoint")
    model_name: str = setting("LLM_MODEL_NAME", printable, attrs.Factory(_model_name, takes_self=True), "the model")
    responses_api: bool = setting(
        "LLM_RESPONSES_API", boolean, False, "OpenAI's Responses API instead of chat completions"
    )
    allowed_models: frozenset[str] = setting(
        "INFERENCE_ALLOWED_MODELS", names, frozenset(), "models that `generate` may name, comma-separated"
    )
    stream_usage: bool = setting("INFERENCE_STREAM_USAGE", boolean, True, "ask the provider for usage")

    store: Secret = setting(  # noqa: RUF009 - an attrs field, with a Secret for its default
        "INFERENCE_STORE",
        store_url,
        Secret(MEMORY_STORE),
        "where sessions are kept: memory://, or redis://host:port/db",
    )
    max_sessions: int = setting("INFERENCE_MAX_SESSIONS", integer(), 10_000, "sessions kept")
    session_ttl: float = setting("INFERENCE_SESSION_TTL", seconds(), 3600.0, "idle time after which a session ends")
    max_tasks: int = setting("INFERENCE_MAX_TASKS", integer(), 1000, "tasks running at a time")
    max_tasks_per_session: int = setting("INFERENCE_MAX_TASKS_PER_SESSION", integer(), 8, "of these, in one session")
    max_connections: int = setting("INFERENCE_MAX_CONNECTIONS", integer(), 10_000, "open connections of clients")
    max_message_bytes: int = setting(
        "INFERENCE_MAX_MESSAGE_BYTES", integer(), 4_194_304, "a WebSocket message or an HTTP body"
    )
    memory_bytes: int = setting(
        "INFERENCE_MEMORY_BYTES", integer(), 1_073_741_824, "what all sessions may hold together"
    )
    outbox_bytes: int = setting("INFERENCE_OUTBOX_BYTES", integer(), 1_048_576, "notifications kept per session")
    resume_window: float = setting(
        "INFERENCE_RESUME_WINDOW", seconds(0), 30.0, "how long tasks go on without a connection"
    )
    tool_timeout: float = setting("INFERENCE_TOOL_TIMEOUT", seconds(), 300.0, "until a tool call counts as failed")
    max_tool_rounds: int = setting("INFERENCE_MAX_TOOL_ROUNDS", integer(), 32, "rounds of tool calls in one task")

    auth_tokens: Mapping[str, Secret] = setting(
        "INFERENCE_AUTH_TOKENS", token_pairs, MappingProxyType({}), "`name:token` pairs; set, a token is asked for"
    )
    max_sessions_per_token: int | None = setting(
        "INFERENCE_MAX_SESSIONS_PER_TOKEN", integer(), None, "sessions kept for one token"
    )
    max_tasks_per_token: int | None = setting(
        "INFERENCE_MAX_TASKS_PER_TOKEN", integer(), None, "tasks running at a time for one token"
    )
    requests_per_minute: int | None = setting(
        "INFERENCE_REQUESTS_PER_MINUTE", integer(), None, "sessions, tickets and tasks asked for with one token"
    )
    allowed_origins: frozenset[str] = setting(
        "INFERENCE_ALLOWED_ORIGINS", origins, frozenset(), "origins whose pages may use the server, comma-separated"
    )

    connect_timeout: float = setting("INFERENCE_CONNECT_TIMEOUT", seconds(), 10.0, "upstream: connecting")
    first_token_timeout: float = setting(
        "INFERENCE_FIRST_TOKEN_TIMEOUT", seconds(), 120.0, "upstream: until the first chunk"
    )
    token_timeout: float = setting("INFERENCE_TOKEN_TIMEOUT", seconds(), 60.0, "upstream: between chunks")
    task_timeout: float = setting("INFERENCE_TASK_TIMEOUT", seconds(), 1800.0, "a whole task")
    max_retries: int = setting(
        "INFERENCE_MAX_RETRIES", integer(0), 3, "further attempts per round before its first chunk"
    )

    drain_seconds: float = setting("INFERENCE_DRAIN_SECONDS", seconds(0), 30.0, "time for running tasks at shutdown")

    metrics_port: int | None = setting(
        "INFERENCE_METRICS_PORT", integer(1, LAST_PORT), None, "a port of its own for `/metrics`, without a token"
    )
    metrics_host: str = setting("INFERENCE_METRICS_HOST", printable, "127.0.0.1", "the address of that port")

    log_level: str = setting("INFERENCE_LOG_LEVEL", one_of(*_LOG_LEVELS), "INFO", "the least severity")
    log_file: Path | None = setting(  # noqa: RUF009 - an attrs field, with a Path for its default
        "INFERENCE_LOG_FILE", file_path, Path("inference_server.log"), "empty turns it off", empty_means_off=True
    )
    log_format: str = setting(
        "INFERENCE_LOG_FORMAT", one_of("text", "json"), "text", "`text`, or `json` for JSON lines"
    )
    log_content: bool = setting("INFERENCE_LOG_CONTENT", boolean, False, "whether prompts and answers may be logged")

    worker: int | None = None
    """Which of several workers this is, from 1; ``None`` for one that is alone."""

    def for_worker(self, number: int) -> Settings:
        """What one of several workers has to itself: the port of its metrics, and the log file."""
        port = self.metrics_port and self.metrics_port + number - 1
        file = self.log_file and self.log_file.with_stem(f"{self.log_file.stem}-{number}")
        return attrs.evolve(self, worker=number, metrics_port=port, log_file=file)

    def check_workers(self, count: int) -> None:
        """Raises ConfigurationError where there cannot be so many."""
        if self.is_in_memory:
            raise ConfigurationError(
                f"{count} workers would not know each other's sessions, which are in memory:"
                " use one worker, or set INFERENCE_STORE to a Redis"
            )
        if self.metrics_port and self.metrics_port + count - 1 > LAST_PORT:
            raise ConfigurationError(
                f"INFERENCE_METRICS_PORT: expected at most {LAST_PORT + 1 - count} for {count} workers, which have"
                f" a port each, got {self.metrics_port}"
            )

    @property
    def is_in_memory(self) -> bool:
        """Whether sessions are known to this process alone."""
        return self.store.reveal() == MEMORY_STORE

    @property
    def store_password(self) -> Secret | None:
        password = urlsplit(self.store.reveal()).password
        return Secret(unquote(password)) if password else None

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
