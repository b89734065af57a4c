"""What the environment says becomes `Settings`, or one line that says what is wrong with it."""

from __future__ import annotations

import itertools
import logging
import re
import subprocess
import sys
from pathlib import Path

import attrs
import pytest
from dotenv import dotenv_values

from inference_trio import settings as settings_module
from inference_trio.errors import ConfigurationError
from inference_trio.settings import EMBEDDED_MODEL, Settings, environment_warnings
from inference_trio.variables import Secret

KEY = "sk-0123456789abcdef"
TOKEN = "token-of-at-least-16"
EXAMPLE = Path(__file__).parent.parent / ".env.example"

WHOLE_NUMBERS = {
    "INFERENCE_MAX_SESSIONS": "max_sessions",
    "INFERENCE_MAX_TASKS": "max_tasks",
    "INFERENCE_MAX_TASKS_PER_SESSION": "max_tasks_per_session",
    "INFERENCE_MAX_MESSAGE_BYTES": "max_message_bytes",
    "INFERENCE_MAX_TOOL_ROUNDS": "max_tool_rounds",
    "INFERENCE_MAX_RETRIES": "max_retries",
    "INFERENCE_OUTBOX_BYTES": "outbox_bytes",
}
TIMES = {
    "INFERENCE_SESSION_TTL": "session_ttl",
    "INFERENCE_TOOL_TIMEOUT": "tool_timeout",
    "INFERENCE_CONNECT_TIMEOUT": "connect_timeout",
    "INFERENCE_FIRST_TOKEN_TIMEOUT": "first_token_timeout",
    "INFERENCE_TOKEN_TIMEOUT": "token_timeout",
    "INFERENCE_TASK_TIMEOUT": "task_timeout",
    "INFERENCE_RESUME_WINDOW": "resume_window",
}
BOOLEANS = {
    "LLM_RESPONSES_API": "responses_api",
    "INFERENCE_STREAM_USAGE": "stream_usage",
    "INFERENCE_LOG_CONTENT": "log_content",
}
MAY_BE_ZERO = {"INFERENCE_MAX_RETRIES", "INFERENCE_RESUME_WINDOW"}


def load(**variables: str) -> Settings:
    return Settings.load({"DEEPSEEK_API_KEY": KEY, **variables}, dotenv=None)


def refusal(**variables: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load(**variables)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


# Values


def test_without_any_variable_but_the_key_the_defaults_of_the_protocol_hold() -> None:
    assert load() == Settings(
        provider="openai",
        api_key_env_var="DEEPSEEK_API_KEY",
        api_key=Secret(KEY),
        base_url="https://api.deepseek.com/v1",
        model_name="deepseek-chat",
        responses_api=False,
        allowed_models=frozenset(),
        stream_usage=True,
        store=Secret("memory://"),
        max_sessions=10000,
        session_ttl=3600.0,
        max_tasks=1000,
        max_tasks_per_session=8,
        max_message_bytes=4194304,
        outbox_bytes=1048576,
        resume_window=30.0,
        tool_timeout=300.0,
        max_tool_rounds=32,
        connect_timeout=10.0,
        first_token_timeout=120.0,
        token_timeout=60.0,
        task_timeout=1800.0,
        max_retries=3,
        log_level="INFO",
        log_file=Path("inference_server.log"),
        log_format="text",
        log_content=False,
    )


@pytest.mark.parametrize(
    ("variable", "text", "field", "value"),
    [
        ("LLM_PROVIDER", "OpenAI", "provider", "openai"),
        ("LLM_BASE_URL", "http://127.0.0.1:8000/v1", "base_url", "http://127.0.0.1:8000/v1"),
        ("LLM_BASE_URL", "https://api.example.com/v1//", "base_url", "https://api.example.com/v1"),
        ("LLM_BASE_URL", "http://[::1]:8000/@team/v1", "base_url", "http://[::1]:8000/@team/v1"),
        ("LLM_MODEL_NAME", "  vendor/model:free ", "model_name", "vendor/model:free"),
        ("INFERENCE_ALLOWED_MODELS", "a, b,,a ,", "allowed_models", frozenset({"a", "b"})),
        (
            "INFERENCE_AUTH_TOKENS",
            f"a:{TOKEN}, b.c-d_1:{TOKEN}:x",
            "auth_tokens",
            {"a": Secret(TOKEN), "b.c-d_1": Secret(f"{TOKEN}:x")},
        ),
        (
            "INFERENCE_ALLOWED_ORIGINS",
            "https://App.example/, http://localhost:3000",
            "allowed_origins",
            frozenset({"https://app.example", "http://localhost:3000"}),
        ),
        ("INFERENCE_STORE", "redis://127.0.0.1:6379/0", "store", Secret("redis://127.0.0.1:6379/0")),
        ("INFERENCE_STORE", "rediss://host/?cluster=true", "store", Secret("rediss://host/?cluster=true")),
        ("INFERENCE_LOG_LEVEL", "debug", "log_level", "DEBUG"),
        ("INFERENCE_LOG_FILE", "logs/server.log", "log_file", Path("logs/server.log")),
        ("INFERENCE_LOG_FORMAT", "JSON", "log_format", "json"),
        *[(variable, "17", field, 17) for variable, field in WHOLE_NUMBERS.items()],
        *[(variable, "2.5", field, 2.5) for variable, field in TIMES.items()],
        *[(variable, "yes", field, True) for variable, field in BOOLEANS.items()],
        *[(variable, "off", field, False) for variable, field in BOOLEANS.items()],
    ],
)
def test_a_variable_sets_its_field_and_no_other(variable: str, text: str, field: str, value: object) -> None:
    assert load(**{variable: text}) == attrs.evolve(load(), **{field: value})


def test_every_field_has_a_variable_but_the_key_which_has_one_of_its_own_choice_and_what_a_parent_gives() -> None:
    assert {field.name for field in attrs.fields(Settings)} - Settings.variables().keys() == {"api_key", "worker"}
    names = [variable.name for variable in Settings.variables().values()]
    assert len(names) == len(set(names))
    assert all(variable.help for variable in Settings.variables().values())


@pytest.mark.parametrize("text", ["true", "TRUE", "1", "yes", "On"])
def test_words_that_mean_true(text: str) -> None:
    assert load(INFERENCE_LOG_CONTENT=text).log_content is True


@pytest.mark.parametrize("text", ["false", "False", "0", "NO", "off"])
def test_words_that_mean_false(text: str) -> None:
    assert load(INFERENCE_STREAM_USAGE=text).stream_usage is False


@pytest.mark.parametrize("variable", [variable.name for variable in Settings.variables().values()])
@pytest.mark.parametrize("text", ["", "  "])
def test_an_empty_variable_counts_as_not_set_except_that_an_empty_log_file_is_none(variable: str, text: str) -> None:
    expected = attrs.evolve(load(), log_file=None) if variable == "INFERENCE_LOG_FILE" else load()
    assert load(**{variable: text}) == expected


@pytest.mark.parametrize("variable", sorted(MAY_BE_ZERO))
def test_no_retries_and_no_resume_window_are_possible(variable: str) -> None:
    field = (WHOLE_NUMBERS | TIMES)[variable]
    assert getattr(load(**{variable: "0"}), field) == 0


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        load().max_tasks = 1  # type: ignore[misc]


# Wrong values


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        *[(variable, text) for variable in WHOLE_NUMBERS for text in ("1.5", "ten", "-1", "1_0", "9" * 5000, "٣")],
        *[(variable, text) for variable in TIMES for text in ("nan", "inf", "-1", "soon", "10s", "1e10")],
        *[(variable, "0") for variable in sorted((WHOLE_NUMBERS | TIMES).keys() - MAY_BE_ZERO)],
        *[(variable, text) for variable in BOOLEANS for text in ("maybe", "2", "truee")],
        *[
            ("LLM_BASE_URL", text)
            for text in (
                "api.example.com/v1",
                "ftp://example.com",
                "https:///v1",
                "http://[::1",
                "http://host:port",
                "http://host:0",
                "http://ho st/v1",
                "http://host/v1?a=b",
                "http://host/v1#a",
                "http://ho\nst/v1",
                "http://host/\x00v1",
            )
        ],
        ("LLM_PROVIDER", "open\nai"),
        ("LLM_MODEL_NAME", "model\x00name"),
        ("INFERENCE_ALLOWED_MODELS", "a,\x1bb"),
        ("INFERENCE_ALLOWED_ORIGINS", "*"),
        ("INFERENCE_ALLOWED_ORIGINS", "app.example"),
        ("INFERENCE_ALLOWED_ORIGINS", "https://app.example/page"),
        ("INFERENCE_LOG_LEVEL", "LOUD"),
        ("INFERENCE_LOG_FILE", "a\nb"),
        ("INFERENCE_LOG_FORMAT", "xml"),
    ],
)
def test_a_wrong_value_is_refused_in_one_line_with_its_variable_and_itself(variable: str, text: str) -> None:
    message = refusal(**{variable: text})
    assert message.startswith(f"{variable}: expected ")
    assert message.endswith(f", got {text[:80]!r}")
    assert len(message) < 300


@pytest.mark.parametrize(
    "text",
    [
        TOKEN,
        f":{TOKEN}",
        "a:short",
        f"a:{TOKEN},a:{TOKEN}x",
        f"a:{TOKEN},b:{TOKEN}",
        f"a:{TOKEN} x",
        f"a:{TOKEN}ü",
        f"a:{TOKEN},",
        f"a b:{TOKEN}",
        ",",
    ],
)
def test_wrong_tokens_are_refused_and_not_shown(text: str) -> None:
    message = refusal(INFERENCE_AUTH_TOKENS=text)
    assert message.startswith("INFERENCE_AUTH_TOKENS: expected name:token pairs")
    assert TOKEN not in message


def test_tokens_are_not_shown_with_the_settings() -> None:
    assert TOKEN not in repr(load(INFERENCE_AUTH_TOKENS=f"a:{TOKEN}"))


@pytest.mark.parametrize(
    "text",
    [
        *("redis", "memory", "redis://", "redis://:secret@", "http://:secret@host", "redis://:secret@host:x"),
        *("redis://host:0", "redis://[", "redis://:se cret@host", "memory://secret", "redis://host/0?cluster=secret"),
        *("redis://host/secret", "redis://host/0#secret", "redis://host/0?secret=1", "redis://host/0?cluster=true&x=1"),
    ],
)
def test_a_wrong_store_is_refused_and_not_shown(text: str) -> None:
    message = refusal(INFERENCE_STORE=text)
    assert message.startswith("INFERENCE_STORE: expected memory://, or a URL such as redis://")
    assert "secret" not in message


@pytest.mark.parametrize(
    "text",
    [
        "redis+sentinel://one,two:26380/sessions",
        "redis+sentinel://user:secret@one:26379,two:26379,three:26379/sessions/2",
        "redis+sentinel://:secret@one/sessions",
    ],
)
def test_sentinels_are_named_with_their_service(text: str) -> None:
    assert load(INFERENCE_STORE=text).store.reveal() == text


@pytest.mark.parametrize(
    "text",
    [
        *(
            "redis+sentinel://:secret@host:26379",
            "redis+sentinel://:secret@host:x/sessions",
            "redis+sentinel:///secret",
        ),
        *("redis+sentinel://secret@host/sessions", "redis+sentinel://one,,secret/x", "sentinel://:secret@one/sessions"),
        "redis+sentinel://one:99999/secret",
        *("redis+sentinel://one/sessions/secret", "redis://:secret@host:26379/0?sentinel=main"),
    ],
)
def test_sentinels_that_are_named_otherwise_are_refused_and_not_shown(text: str) -> None:
    message = refusal(INFERENCE_STORE=text)
    assert message.startswith("INFERENCE_STORE: expected Sentinels as in redis+sentinel://")
    assert "secret" not in message


def test_the_stores_password_is_not_shown_with_the_settings() -> None:
    settings = load(INFERENCE_STORE="rediss://user:hid%40den@host:6380/2")
    assert "den" not in repr(settings)
    assert not settings.is_in_memory
    assert settings.store_password == Secret("hid@den")
    assert (load().is_in_memory, load().store_password) == (True, None)


def test_the_complaint_says_what_would_be_right() -> None:
    assert "from 1 to 2147483647" in refusal(INFERENCE_MAX_TASKS="0")
    assert "from 0 to 1000000000" in refusal(INFERENCE_RESUME_WINDOW="-1")
    assert "one of DEBUG, INFO, WARNING, ERROR, CRITICAL" in refusal(INFERENCE_LOG_LEVEL="x")
    assert "true or false" in refusal(LLM_RESPONSES_API="x")
    assert "http or https" in refusal(LLM_BASE_URL="x")


@pytest.mark.parametrize("url", ["https://user:hunter2@host/v1", "https://hunter2@host/v1", "user:hunter2@host"])
def test_credentials_in_the_base_url_are_refused_and_not_shown(url: str) -> None:
    message = refusal(LLM_BASE_URL=url)
    assert message.startswith("LLM_BASE_URL: expected ")
    assert "hunter2" not in message


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("INFERENCE_MAX_TASK", "INFERENCE_MAX_TASKS"),
        ("INFERENCE_LOGLEVEL", "INFERENCE_LOG_LEVEL"),
        ("INFERENCE_SESION_TTL", "INFERENCE_SESSION_TTL"),
    ],
)
def test_an_unknown_variable_is_refused_with_the_name_that_was_probably_meant(variable: str, meant: str) -> None:
    assert refusal(**{variable: "x"}) == f"{variable} is not a setting: did you mean {meant}?"


def test_an_unknown_variable_like_no_other_is_refused_too_even_when_empty() -> None:
    assert refusal(INFERENCE_QQQ="").startswith("INFERENCE_QQQ is not a setting: ")


def test_variables_without_our_prefix_are_none_of_our_business() -> None:
    assert load(PATH="/bin", LLM_SOMETHING="x", OPENAI_BASE_URL="y") == load()


# The key and the provider


def test_a_missing_key_is_reported_with_the_way_out() -> None:
    with pytest.raises(ConfigurationError) as caught:
        Settings.load({}, dotenv=None)
    assert str(caught.value) == (
        "DEEPSEEK_API_KEY is not set: put the provider's key in it (or name another variable in API_KEY_ENV_VAR),"
        " or set LLM_PROVIDER=local to try the embedded model without a key"
    )


def test_an_empty_key_is_a_missing_one() -> None:
    assert refusal(DEEPSEEK_API_KEY=" \n").startswith("DEEPSEEK_API_KEY is not set")


def test_the_key_is_in_the_variable_that_is_named() -> None:
    settings = load(API_KEY_ENV_VAR="OTHER_KEY", OTHER_KEY="other")
    assert (settings.api_key, settings.api_key_env_var) == (Secret("other"), "OTHER_KEY")
    assert refusal(API_KEY_ENV_VAR="OTHER_KEY").startswith("OTHER_KEY is not set")


def test_the_variable_of_the_key_may_have_our_prefix() -> None:
    assert load(API_KEY_ENV_VAR="INFERENCE_KEY", INFERENCE_KEY="k").api_key == Secret("k")


def test_a_key_in_place_of_its_variables_name_is_not_shown() -> None:
    message = refusal(API_KEY_ENV_VAR=KEY)
    assert message.startswith("API_KEY_ENV_VAR: expected the name")
    assert KEY not in message


def test_white_space_around_the_key_is_dropped() -> None:
    assert load(DEEPSEEK_API_KEY=f" {KEY}\r\n").api_key == Secret(KEY)


@pytest.mark.parametrize("inside", ["\n", "\x00", "\u00e9", "\u200b", "\x7f", "\udc80"])
def test_a_key_that_cannot_stand_in_a_header_is_refused_and_not_shown(inside: str) -> None:
    message = refusal(DEEPSEEK_API_KEY=f"hunter{inside}2")
    assert message.startswith("DEEPSEEK_API_KEY: expected ")
    assert "hunter" not in message


def test_the_embedded_model_needs_no_key_and_takes_none() -> None:
    settings = load(LLM_PROVIDER="local")
    assert (settings.api_key, settings.base_url, settings.model_name) == (None, None, EMBEDDED_MODEL)
    assert Settings.load({"LLM_PROVIDER": "local"}, dotenv=None) == settings
    assert load(LLM_PROVIDER="local", API_KEY_ENV_VAR="NOT_SET").api_key is None


def test_switching_to_the_embedded_model_leaves_the_other_providers_model_and_endpoint_aside() -> None:
    before = {"LLM_MODEL_NAME": "gpt-5", "LLM_BASE_URL": "https://api.openai.com/v1"}
    assert load(LLM_PROVIDER="local", **before) == load(LLM_PROVIDER="local")


def test_a_langchain_provider_finds_its_own_key_unless_a_variable_is_named() -> None:
    settings = load(LLM_PROVIDER="anthropic", LLM_MODEL_NAME="m")
    assert (settings.api_key, settings.base_url, settings.model_name) == (None, None, "m")
    named = {"LLM_PROVIDER": "anthropic", "LLM_MODEL_NAME": "m", "API_KEY_ENV_VAR": "THE_KEY"}
    assert load(**named, THE_KEY="k").api_key == Secret("k")
    assert refusal(**named).startswith("THE_KEY is not set")


def test_a_langchain_provider_needs_a_models_name() -> None:
    assert refusal(LLM_PROVIDER="anthropic").startswith("LLM_MODEL_NAME is not set")


def test_the_key_shows_itself_only_when_asked(caplog: pytest.LogCaptureFixture) -> None:
    settings = load()
    logging.getLogger("a test").warning("%s %r", settings, settings.api_key)
    shown = [repr(settings), str(settings), f"{settings.api_key}", f"{settings.api_key!r:>40}", caplog.text]
    shown += [str(attrs.asdict(settings)), str(attrs.astuple(settings)), str([settings.api_key])]
    shown.append(str(RuntimeError(settings)))
    assert not [text for text in shown if KEY in text]
    assert settings.api_key is not None
    assert settings.api_key.reveal() == KEY


def test_secrets_compare_by_their_value() -> None:
    assert Secret("a") == Secret("a") != Secret("b")
    assert Secret("a") != "a"
    assert len({Secret("a"), Secret("a")}) == 1


# .env


def test_the_file_is_read_and_the_environment_wins(tmp_path: Path) -> None:
    dotenv = tmp_path / ".env"
    dotenv.write_text('DEEPSEEK_API_KEY="from file"\nexport INFERENCE_MAX_TASKS=5 # few\nINFERENCE_MAX_RETRIES=1\n')
    settings = Settings.load({"INFERENCE_MAX_TASKS": "6"}, dotenv)
    assert (settings.api_key, settings.max_tasks, settings.max_retries) == (Secret("from file"), 6, 1)


def test_a_variable_that_is_empty_in_the_environment_hides_the_files(tmp_path: Path) -> None:
    dotenv = tmp_path / ".env"
    dotenv.write_text(f"DEEPSEEK_API_KEY={KEY}\nINFERENCE_MAX_TASKS=5\n")
    assert Settings.load({"INFERENCE_MAX_TASKS": ""}, dotenv).max_tasks == 1000


def test_by_default_the_file_is_that_of_the_working_directory_and_the_environment_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".env").write_text("A_TEST_KEY=k\nAPI_KEY_ENV_VAR=A_TEST_KEY\nINFERENCE_MAX_TASKS=5\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(settings_module.os, "environ", {"INFERENCE_MAX_TASKS": "7"})
    settings = Settings.load()
    assert (settings.api_key, settings.max_tasks) == (Secret("k"), 7)
    assert settings_module.os.environ == {"INFERENCE_MAX_TASKS": "7"}


def test_the_files_values_are_literal_and_a_byte_order_mark_is_no_part_of_a_name(tmp_path: Path) -> None:
    dotenv = tmp_path / ".env"
    dotenv.write_bytes(b"\xef\xbb\xbfDEEPSEEK_API_KEY=a${PATH}b\nNO_VALUE\n")
    assert Settings.load({}, dotenv).api_key == Secret("a${PATH}b")


def test_a_missing_file_is_as_good_as_an_empty_one(tmp_path: Path) -> None:
    assert Settings.load({"DEEPSEEK_API_KEY": KEY}, tmp_path / "none") == load()


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dotenv = tmp_path / ".env"
    dotenv.write_bytes(b"DEEPSEEK_API_KEY=sk-\xff\n")
    with pytest.raises(ConfigurationError, match=r"\.env cannot be read: it is not UTF-8") as caught:
        Settings.load({}, dotenv)
    assert caught.value.__cause__ is None

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(settings_module, "dotenv_values", refuse)
    with pytest.raises(ConfigurationError, match=r"\.env cannot be read: Permission denied"):
        Settings.load({}, dotenv)


def test_an_unknown_variable_in_the_file_is_refused(tmp_path: Path) -> None:
    dotenv = tmp_path / ".env"
    dotenv.write_text(f"DEEPSEEK_API_KEY={KEY}\nINFERENCE_MAX_TASK=5\n")
    with pytest.raises(ConfigurationError, match="did you mean INFERENCE_MAX_TASKS"):
        Settings.load({}, dotenv)


def test_the_example_lists_every_variable_once_with_a_comment_and_its_default(tmp_path: Path) -> None:
    lines = EXAMPLE.read_text().splitlines()
    assignment = re.compile("#?([A-Z_]+)=")
    found = [(match[1], above) for above, line in itertools.pairwise(lines) if (match := assignment.match(line))]
    assert all(above.startswith("# ") for _, above in found)
    assert sorted(name for name, _ in found) == sorted(
        ["DEEPSEEK_API_KEY", *(variable.name for variable in Settings.variables().values())]
    )
    everything_set = tmp_path / ".env"
    everything_set.write_text(
        "\n".join(line[1:] if assignment.match(line) and line[0] == "#" else line for line in lines)
    )
    assert len(dotenv_values(everything_set)) == len(found)
    assert Settings.load({"DEEPSEEK_API_KEY": KEY}, everything_set) == load()


def test_a_copy_of_the_example_asks_for_the_key_and_nothing_else() -> None:
    with pytest.raises(ConfigurationError, match="DEEPSEEK_API_KEY is not set"):
        Settings.load({}, EXAMPLE)
    assert Settings.load({"LLM_PROVIDER": "local"}, EXAMPLE) == load(LLM_PROVIDER="local")


# What is not ours


@pytest.mark.parametrize(
    "variable", ["LANGSMITH_TRACING", "LANGSMITH_TRACING_V2", "LANGCHAIN_TRACING", "LANGCHAIN_TRACING_V2"]
)
def test_tracing_is_warned_about_when_it_is_on(variable: str) -> None:
    assert environment_warnings({variable: "true"}) == [
        f"{variable} is on: prompts and answers may be sent to LangSmith"
    ]
    assert environment_warnings({variable: "false"}) == environment_warnings({}) == []


def test_the_gateway_is_warned_about_without_its_address() -> None:
    [warning] = environment_warnings({"LANGSMITH_GATEWAY": "https://user:hunter2@gateway.example"})
    assert warning.startswith("LANGSMITH_GATEWAY is on: ")
    assert "hunter2" not in warning


def test_settings_are_pure() -> None:
    check = (
        "import sys, inference_trio.settings; print({'trio', 'quart', 'langchain_core', 'openai'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
