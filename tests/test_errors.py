"""Every error has the code that the protocol gives it, and says whether another attempt makes sense."""

from __future__ import annotations

import pytest

from inference_trio import errors
from inference_trio.errors import InferenceError

CODES = {
    "ParseError": -32700,
    "InvalidRequestError": -32600,
    "MethodNotFoundError": -32601,
    "InvalidParamsError": -32602,
    "InternalError": -32603,
    "UpstreamError": -32000,
    "RateLimitedError": -32001,
    "UpstreamTimeoutError": -32002,
    "ToolTimeoutError": -32003,
    "NoSuchTaskError": -32004,
    "OverloadedError": -32005,
    "BrokenStreamError": -32006,
    "TooManyRoundsError": -32007,
}


def test_each_error_has_the_code_of_the_protocols_table() -> None:
    kinds = [kind for kind in InferenceError.__subclasses__() if kind.__module__ == errors.__name__]
    assert {kind.__name__: kind.code for kind in kinds} == CODES


def test_on_the_wire_an_error_has_its_code_its_message_and_what_a_program_can_act_on() -> None:
    error = errors.RateLimitedError("Slow down", retry_after=2.5)
    assert error.to_wire() == {"code": -32001, "message": "Slow down", "data": {"retry_after": 2.5}}
    assert str(error) == "Slow down"


def test_an_error_without_data_has_no_such_member() -> None:
    assert errors.ParseError("Expected JSON").to_wire() == {"code": -32700, "message": "Expected JSON"}


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (errors.UpstreamError("", retryable=True), True),
        (errors.UpstreamError("", retryable=False), False),
        (errors.UpstreamError(""), False),
        (errors.RateLimitedError("", retry_after=1.0), True),
        (errors.UpstreamTimeoutError("", phase="connect"), True),
        (errors.UpstreamTimeoutError("", phase="first_token"), False),
        (errors.UpstreamTimeoutError("", phase="token"), False),
        (errors.UpstreamTimeoutError("", phase="task"), False),
        (errors.ToolTimeoutError("", outstanding=[]), False),
        (errors.BrokenStreamError(""), False),
    ],
    ids=lambda value: repr(value.data or value) if isinstance(value, InferenceError) else "",
)
def test_only_what_may_pass_is_worth_another_attempt(error: InferenceError, expected: bool) -> None:
    assert error.retryable is expected
