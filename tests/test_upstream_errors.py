"""Whatever a provider's client raises becomes an error of ours that says what to do, and shows no key."""

from __future__ import annotations

import json
from email.utils import formatdate
from typing import Any

import httpx2
import langchain_openai.chat_models.base as langchain_openai_base
import openai
import pytest
from langchain_core.exceptions import ModelConnectionError, ModelTimeoutError

from inference_trio import upstream_errors
from inference_trio.errors import (
    BrokenStreamError,
    InferenceError,
    InvalidParamsError,
    RateLimitedError,
    UpstreamError,
    UpstreamTimeoutError,
)
from inference_trio.upstream_errors import MAX_PROVIDER_MESSAGE, ErrorInStreamError, translated

KEY = "sk-0123456789"
REQUEST = httpx2.Request("POST", "http://upstream.test/v1/chat/completions")
NOW = 1_800_000_000.0


def ours(error: Exception, *, has_begun: bool = False) -> Any:
    return translated(error, has_begun=has_begun, secrets=[KEY])


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def status_error(status: int, body: Any = None, headers: dict[str, str] | None = None) -> Exception:
    """What openai's own client makes of an answer."""
    content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    response = httpx2.Response(status, content=content, headers=headers, request=REQUEST)
    return openai.OpenAI(api_key="none", http_client=httpx2.Client())._make_status_error_from_response(response)


def said(body: Any, status: int = 400) -> str:
    message = ours(status_error(status, body)).data["provider_message"]
    assert isinstance(message, str)
    return message


@pytest.mark.parametrize(
    ("status", "retryable"),
    [(302, False), (400, False), (401, False), (404, False), (408, True), (409, True), (500, True), (503, True)],
)
def test_an_error_status_says_whether_to_try_again(status: int, retryable: bool) -> None:
    error = ours(status_error(status, {"error": {"message": "no", "type": "odd", "code": "x"}}))
    assert type(error) is UpstreamError
    assert error.data == {"status": status, "type": "odd", "retryable": retryable, "provider_message": "no"}


def test_langchains_version_of_an_error_status_is_the_same() -> None:
    original = status_error(503, {"error": {"message": "no"}})
    with pytest.raises(langchain_openai_base.OpenAIAPIError) as caught:
        langchain_openai_base._handle_openai_api_error(original)
    assert ours(caught.value).data == ours(original).data


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ({"error": {"message": "no", "code": "x"}}, "x"),
        ({"error": {"message": "no", "type": None, "code": 7}}, "http_400"),
        ({"detail": "no"}, "http_400"),
        ("no", "http_400"),
    ],
)
def test_the_type_is_what_the_provider_calls_it_or_the_status(body: Any, kind: str) -> None:
    assert ours(status_error(400, body)).data["type"] == kind


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"Retry-After": "3"}, 3.0),
        ({"Retry-After": "1.5"}, 1.5),
        ({"Retry-After": "0"}, 0.0),
        ({"Retry-After": formatdate(NOW + 20, usegmt=True)}, 20.0),
        ({"Retry-After": formatdate(NOW - 20, usegmt=True)}, 0.0),
        ({"Retry-After": "-1"}, None),
        ({"Retry-After": "nan"}, None),
        ({"Retry-After": "1e999"}, None),
        ({"Retry-After": "9" * 400}, None),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "Thu, 99 Foo 2026 00:00:00 GMT"}, None),
        ({"retry-after-ms": "250", "Retry-After": "1"}, 0.25),
        ({"retry-after-ms": "x", "Retry-After": "1"}, 1.0),
    ],
)
def test_the_time_to_wait_is_in_seconds(
    headers: dict[str, str], seconds: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstream_errors.time, "time", lambda: NOW)
    limited = ours(status_error(429, {"error": {"message": "slow down"}}, headers))
    assert type(limited) is RateLimitedError
    assert limited.data == {"retry_after": seconds}
    unavailable = ours(status_error(503, {}, headers))
    assert unavailable.data.get("retry_after") == seconds


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"error": {"message": "no"}}, "no"),
        ({"error": "no"}, "no"),
        ({"message": "no"}, "no"),
        ({"detail": "no"}, "no"),
        ({"detail": [{"loc": ["body"]}]}, '{"detail":[{"loc":["body"]}]}'),
        ("no", "no"),
        ("", ""),
        ({}, ""),
        ("<html><head><TITLE>502 Bad\nGateway </TITLE></head>...</html>", "An HTML page: 502 Bad\nGateway"),
        ("  <!doctype html>", "An HTML page"),
    ],
)
def test_what_the_provider_said_is_passed_on_and_a_page_summarised(body: Any, message: str) -> None:
    assert said(body) == message


def test_no_key_nor_a_masked_one_is_passed_on() -> None:
    message = said({"error": {"message": f"Key {KEY} or ({KEY}), sk-01***89. or ****6789 is wrong"}}, 401)
    assert message == "Key [hidden] or ([hidden]), [hidden] or [hidden] is wrong"
    kind = ours(status_error(400, {"error": {"message": "", "type": f"bad {KEY}"}})).data["type"]
    assert KEY not in kind


def test_what_is_passed_on_has_a_limit_and_no_part_of_a_key_at_its_edge() -> None:
    message = said({"error": {"message": "x" * (MAX_PROVIDER_MESSAGE - 5) + KEY + "y" * 1_000_000}})
    assert len(message) == MAX_PROVIDER_MESSAGE
    assert "sk-" not in message


def test_what_is_passed_on_can_be_encoded() -> None:
    assert said({"error": {"message": "a\ud800b"}}) == "a?b"


@pytest.mark.parametrize(
    ("reported", "status", "retryable", "kind", "message"),
    [
        ({"message": "down"}, None, True, "error", "down"),
        ({"message": "down", "type": "server_error", "code": None}, None, True, "server_error", "down"),
        ({"message": "no", "type": "invalid_request_error"}, None, False, "invalid_request_error", "no"),
        ({"message": "down", "code": 502}, 502, True, "http_502", "down"),
        ({"message": "no", "code": "400"}, 400, False, "400", "no"),
        ({"message": "down", "code": True}, None, True, "error", "down"),
        ("down", None, True, "error", "down"),
        ([f"down {KEY}"], None, True, "error", '["down [hidden]"]'),
    ],
)
def test_an_error_in_the_stream_keeps_what_the_provider_said(
    reported: Any, status: int | None, retryable: bool, kind: str, message: str
) -> None:
    error = ours(ErrorInStreamError(reported), has_begun=True)
    assert type(error) is UpstreamError
    assert error.data == {"status": status, "type": kind, "retryable": retryable, "provider_message": message}


def test_a_429_in_the_stream_is_a_rate_limit() -> None:
    error = ours(ErrorInStreamError({"message": "slow down", "code": 429}), has_begun=True)
    assert type(error) is RateLimitedError
    assert error.data == {"retry_after": None}


def test_the_same_from_openais_client_and_with_a_good_status_from_anthropics() -> None:
    from_openai = openai.APIError("down", REQUEST, body={"message": "down", "code": 502})
    assert ours(from_openai).data["status"] == 502
    assert ours(openai.APIError("down", REQUEST, body=None)).data["provider_message"] == "down"

    class APIStatusError(Exception):
        status_code = 200
        body = {"type": "error", "error": {"type": "overloaded_error", "message": "down"}}  # noqa: RUF012

    error = ours(APIStatusError())
    assert (error.data["status"], error.data["type"]) == (None, "overloaded_error")


class ForeignConnectTimeout(Exception):  # noqa: N818 - as httpx names its own
    """Of a client that is not imported here."""


ForeignConnectTimeout.__name__ = "ConnectTimeout"


class TimeoutException(Exception):  # noqa: N818 - as httpx names it
    """Of a client that is not imported here."""


class RequestError(Exception):
    """Of a client that is not imported here."""


TIMED_OUT = openai.APITimeoutError(REQUEST)


@pytest.mark.parametrize(
    ("error", "phase", "phase_later"),
    [
        (httpx2.ConnectTimeout(""), "connect", "connect"),
        (caused(openai.APITimeoutError(REQUEST), httpx2.ConnectTimeout("")), "connect", "connect"),
        (
            caused(langchain_openai_base.OpenAITimeoutError(REQUEST), caused(TIMED_OUT, httpx2.ConnectTimeout(""))),
            "connect",
            "connect",
        ),
        (caused(TimeoutException(), ForeignConnectTimeout()), "connect", "connect"),
        (httpx2.ReadTimeout(""), "first_token", "token"),
        (openai.APITimeoutError(REQUEST), "first_token", "token"),
        (ModelTimeoutError(), "first_token", "token"),
        (TimeoutException(), "first_token", "token"),
        (TimeoutError(), "first_token", "token"),
    ],
)
def test_a_timeout_says_in_which_phase(error: Exception, phase: str, phase_later: str) -> None:
    for has_begun, expected in ((False, phase), (True, phase_later)):
        timeout = ours(error, has_begun=has_begun)
        assert type(timeout) is UpstreamTimeoutError
        assert timeout.data == {"phase": expected}


@pytest.mark.parametrize(
    "error",
    [
        httpx2.ConnectError("[SSL] /etc/ssl/cert.pem"),
        httpx2.ReadError(""),
        httpx2.RemoteProtocolError(""),
        httpx2.DecodingError(""),
        openai.APIConnectionError(request=REQUEST),
        langchain_openai_base.OpenAIConnectionError(request=REQUEST),
        ModelConnectionError(),
        RequestError(),
        ConnectionResetError("/a/path"),
    ],
)
def test_a_connection_that_fails_is_worth_another_attempt_only_before_the_first_chunk(error: Exception) -> None:
    before, after = ours(error), ours(error, has_begun=True)
    assert type(before) is UpstreamError
    assert before.data == {"status": None, "type": "connection", "retryable": True, "provider_message": ""}
    assert type(after) is BrokenStreamError
    assert not after.retryable
    assert "/" not in before.message + after.message


@pytest.mark.parametrize("error", [ValueError(f"{KEY} secret prompt"), json.JSONDecodeError("no", "secret prompt", 0)])
def test_what_could_not_be_converted_is_a_broken_stream_that_shows_nothing_of_it(error: Exception) -> None:
    assert type(ours(error)) is BrokenStreamError
    assert "secret" not in ours(error).message


@pytest.mark.parametrize("error", [InvalidParamsError("no"), BrokenStreamError("no"), KeyError("x"), TypeError("x")])
def test_our_own_errors_and_defects_stay_what_they_are(error: Exception) -> None:
    assert ours(error) is error


def test_every_translation_has_its_place_on_the_wire() -> None:
    for error in (status_error(500, {}), httpx2.ReadError(""), TimeoutError(), ValueError()):
        assert isinstance(ours(error), InferenceError)
        json.dumps(ours(error).to_wire())
