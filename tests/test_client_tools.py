"""Functions as tools of the Python client: what the model is told of them, and how they are called."""

from __future__ import annotations

import asyncio
import datetime
import enum
import functools
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pydantic
import pytest
import trio

from inference_trio.client import Generation, Tool, ToolCall, ToolResult, ToolTimeoutError, connect, tool
from inference_trio.client.wire import LONGEST_REASON
from tests import answers
from tests.client_bench import CALL, HELLO, Bench, running
from tests.harness import PATIENCE, open_server, settings
from tests.upstream import open_upstream


class Unit(enum.Enum):
    CELSIUS = "C"
    KELVIN = "K"


@dataclass
class Place:
    city: str
    country: str = "FR"


class Report(pydantic.BaseModel):
    place: Place
    day: datetime.date


def forecast(
    place: Place,
    days: Annotated[int, pydantic.Field(ge=1, le=14)] = 3,
    unit: Unit = Unit.CELSIUS,
    kind: Literal["short", "long"] = "short",
    since: datetime.date | None = None,
) -> Report:
    """Says what the weather will be.

    It is right now and then.

    Args:
        place: where
        days: how many days
            from now
    """
    return Report(place=place, day=since or datetime.date(2000, 1, days))


# What the model is told


def test_a_function_is_described_by_its_name_its_docstring_and_its_annotations() -> None:
    declaration = tool(forecast).declaration
    assert declaration["name"] == "forecast"
    assert declaration["description"] == "Says what the weather will be.\n\nIt is right now and then."
    parameters = declaration["parameters"]
    assert parameters["required"] == ["place"]
    assert parameters["additionalProperties"] is False
    assert parameters["properties"]["days"] == {
        "type": "integer",
        "minimum": 1,
        "maximum": 14,
        "default": 3,
        "description": "how many days\nfrom now",
    }
    assert parameters["properties"]["place"]["description"] == "where"
    assert parameters["properties"]["kind"]["enum"] == ["short", "long"]
    assert parameters["$defs"]["Unit"]["enum"] == ["C", "K"]
    assert parameters["$defs"]["Place"]["required"] == ["city"]


def test_a_function_without_parameters_or_docstring_is_a_tool() -> None:
    def now() -> str:
        return "12:00"

    assert tool(now).declaration == {
        "name": "now",
        "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
    }


def test_name_and_description_may_be_given() -> None:
    declared = tool(functools.partial(forecast, Place("Paris")), name="paris", description="Paris.").declaration
    assert (declared["name"], declared["description"]) == ("paris", "Paris.")
    assert "place" not in declared["parameters"]["properties"]


class Counter:
    def __init__(self) -> None:
        self.total = 0

    def add(self, number: int) -> int:
        """Adds."""
        self.total += number
        return self.total


def test_a_method_is_a_tool() -> None:
    declaration = tool(Counter().add).declaration
    assert declaration["name"] == "add"
    assert list(declaration["parameters"]["properties"]) == ["number"]


def by_position(number: int, /) -> int:
    return number


def any_number(*numbers: int) -> int:
    return len(numbers)


def unknown(number: Nonesuch) -> int:  # type: ignore[name-defined]  # noqa: F821
    return 1


def no_schema(call: trio.Event) -> int:
    return 1


@pytest.mark.parametrize("function", [by_position, any_number, unknown, no_schema])
def test_what_cannot_be_described_is_refused_with_its_name(function: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=function.__name__):
        tool(function)


@pytest.mark.parametrize("function", [lambda at: at, functools.partial(forecast)])
async def test_a_function_without_a_usable_name_is_refused_before_anything_is_sent(function: Any) -> None:
    with pytest.raises(ValueError, match="Expected a tool's name"):
        async with connect("http://127.0.0.1:1", tools=[function]):
            pass


# How it is called


@asynccontextmanager
async def calling(
    function: Callable[..., Any] | Tool, arguments: Any, **changes: Any
) -> AsyncIterator[tuple[Bench, Generation]]:
    """A generation in which the model calls the function."""
    name = function.name if isinstance(function, Tool) else function.__name__
    call = answers.calls(answers.tool_call(0, "c1", name, arguments))
    async with (
        running(call, HELLO, tools=[function], **changes) as it,
        it.session.generate("hi") as task,
    ):
        yield it, task


async def given(function: Callable[..., Any] | Tool, arguments: Any) -> str:
    """What the model gets for a call."""
    async with calling(function, arguments) as (it, task):
        await task.finish()
        return str(it.upstream.requests[1].messages[-1]["content"])


async def test_arguments_are_converted_and_so_is_the_result() -> None:
    arguments = {"place": {"city": "Lyon"}, "days": "5", "unit": "K", "since": "2001-02-03"}
    assert await given(forecast, arguments) == '{"place":{"city":"Lyon","country":"FR"},"day":"2001-02-03"}'


async def test_text_goes_as_it_is() -> None:
    def shout(what: str) -> str:
        return what.upper()

    assert await given(shout, {"what": "sea"}) == "SEA"


async def test_arguments_that_do_not_fit_are_told_to_the_model() -> None:
    said = await given(forecast, {"place": {}, "days": 99, "nonesuch": 1})
    assert "place.city: Field required" in said
    assert "days: Input should be less than or equal to 14" in said
    assert "nonesuch: Unexpected keyword argument" in said


async def test_what_a_function_raises_is_told_to_the_model() -> None:
    def look(at: str) -> str:
        raise LookupError(f"no {at}")

    async with calling(look, {"at": "sea"}) as (it, task):
        events = [event async for event in task]
        assert events[1] == ToolResult("c1", "look", error="LookupError: no sea")
        assert "LookupError: no sea" in it.upstream.requests[1].messages[-1]["content"]
        assert task.result.final_text == "Hello"


@pytest.mark.parametrize("value", [object(), "\ud800", {"a": {1, object()}}])
async def test_what_has_no_json_is_told_to_the_model(value: Any) -> None:
    def look(at: str) -> Any:
        return value

    assert "cannot be written as JSON" in await given(look, {"at": "sea"})


class Asynchronous:
    __name__ = "asynchronous"
    thread = 0

    async def __call__(self, at: str) -> None:
        await trio.lowlevel.checkpoint()
        self.thread = threading.get_ident()


async def test_functions_run_in_threads_and_async_ones_in_trio() -> None:
    threads = []

    def sync(at: str) -> None:
        threads.append(threading.get_ident())

    asynchronous = Asynchronous()
    assert await given(sync, {"at": ""}) == "null"
    assert await given(asynchronous, {"at": ""}) == "null"
    assert asynchronous.thread == threading.get_ident()
    assert threads[0] != threading.get_ident()


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    """As decorators are that know nothing of async functions."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return call


async def test_an_async_function_may_be_decorated_by_what_is_not_async() -> None:
    @decorated
    async def look(at: str) -> str:
        await trio.lowlevel.checkpoint()
        return at.upper()

    assert await given(look, {"at": "sea"}) == "SEA"
    assert await given(tool(functools.partial(look), name="look"), {"at": "sea"}) == "SEA"


async def test_a_generator_gives_a_list_and_runs_in_the_thread() -> None:
    threads = []

    def look(at: str) -> Iterator[str]:
        threads.append(threading.get_ident())
        yield from at

    assert await given(look, {"at": "sea"}) == '["s","e","a"]'
    assert threads[0] != threading.get_ident()


async def test_of_a_group_of_exceptions_the_model_is_told_what_is_in_it() -> None:
    async def look(at: str) -> None:
        raise ExceptionGroup(
            "of a nursery", [LookupError("no sea"), ExceptionGroup("inner", [KeyError("x"), OSError()])]
        )

    async with calling(look, {"at": "sea"}) as (_, task):
        events = [event async for event in task]
        assert events[1] == ToolResult("c1", "look", error="LookupError: no sea; KeyError: 'x'; OSError")


class UnspeakableError(Exception):
    def __str__(self) -> str:
        raise LookupError


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (asyncio.CancelledError("gone"), "CancelledError: gone"),
        (UnspeakableError(), "UnspeakableError"),
        (ValueError("\ud800"), "ValueError: ?"),
        (ValueError("x" * 5_000_000), f"ValueError: {'x' * 5_000_000}"[:LONGEST_REASON]),
    ],
    ids=["asyncio", "unspeakable", "surrogate", "long"],
)
async def test_whatever_is_raised_is_told_to_the_model_as_far_as_it_can_be(error: BaseException, told: str) -> None:
    def look(at: str) -> None:
        raise error

    async with calling(look, {"at": "sea"}) as (it, task):
        events = [event async for event in task]
        assert events[1] == ToolResult("c1", "look", error=told)
        assert told in it.upstream.requests[1].messages[-1]["content"]


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("is_async", [False, True])
async def test_a_function_that_ends_the_program_ends_it(kind: type[BaseException], is_async: bool) -> None:
    def look(at: str) -> None:
        raise kind(3)

    async def look_async(at: str) -> None:
        raise kind(3)

    call = answers.calls(answers.tool_call(0, "c1", "look", {"at": "sea"}))
    function = tool(look_async if is_async else look, name="look")
    with trio.fail_after(PATIENCE):
        async with open_upstream(call, HELLO) as upstream, open_server(settings(upstream.base_url)) as server:
            with pytest.raises(kind) as ended:
                async with connect(server.url, tools=[function]) as session:
                    await session.ask("hi")
            assert ended.value.args == (3,)


async def test_calls_of_a_round_run_at_a_time() -> None:
    both = [trio.Event(), trio.Event()]

    async def meet(number: int) -> int:
        both[number].set()
        await both[1 - number].wait()
        return number

    calls = answers.calls(
        answers.tool_call(0, "c1", "meet", {"number": 0}), answers.tool_call(1, "c2", "meet", {"number": 1})
    )
    async with running(calls, HELLO, tools=[meet]) as it:
        assert str(await it.session.ask("hi")) == "Hello"
        assert [message["content"] for message in it.upstream.requests[1].messages[-2:]] == ["0", "1"]


async def test_a_function_is_cancelled_with_its_generation() -> None:
    ended = trio.Event()

    async def look(at: str) -> None:
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    async with calling(look, {"at": "sea"}) as (_, task):
        assert isinstance(await anext(task), ToolCall)
    await ended.wait()
    assert task.result.status == "cancelled"


async def test_a_thread_is_left_to_itself_when_its_generation_is_cancelled() -> None:
    release = threading.Event()

    def look(at: str) -> None:
        release.wait()

    try:
        async with calling(look, {"at": "sea"}) as (_, task):
            assert isinstance(await anext(task), ToolCall)
        assert task.result.status == "cancelled"
    finally:
        release.set()


async def test_a_tool_that_is_too_slow_fails_the_generation() -> None:
    async def look(at: str) -> None:
        await trio.sleep_forever()

    async with calling(look, {"at": "sea"}, tool_timeout=0.01) as (_, task):
        with pytest.raises(ToolTimeoutError) as slow:
            await task.finish()
        assert slow.value.data["outstanding"] == ["c1"]


# Tools that are only declared

LOOK = {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}}


@pytest.mark.parametrize("declared", [LOOK, {"type": "function", "function": LOOK}])
async def test_the_calls_of_a_declared_tool_are_answered_by_hand(declared: Any) -> None:
    async with running(CALL, HELLO, tools=[declared]) as it, it.session.generate("hi") as task:
        call = await anext(task)
        assert isinstance(call, ToolCall)
        assert (call.arguments, call.timeout) == ({"at": "sea"}, 300.0)
        with pytest.raises(TypeError, match="JSON"):
            await call.reply(object())
        await call.reply([1])
        await call.reply([2])
        await call.fail("no")
        assert await anext(task) == ToolResult("c1", "look", result=[1])
        await task.finish()
        await call.reply([3])
        assert it.upstream.requests[1].messages[-1]["content"] == "[1]"
        assert it.upstream.requests[0].tools[0]["function"]["description"] == "Looks."


async def test_a_call_may_be_failed_by_hand() -> None:
    async with running(CALL, HELLO, tools=[LOOK]) as it, it.session.generate("hi") as task:
        call = await anext(task)
        assert isinstance(call, ToolCall)
        await call.fail("no such sea")
        assert await anext(task) == ToolResult("c1", "look", error="no such sea")
        await task.finish()
        assert "no such sea" in it.upstream.requests[1].messages[-1]["content"]


async def test_a_generation_may_have_tools_of_its_own_or_none() -> None:
    async with running(CALL, HELLO, HELLO, tools=[forecast]) as it:
        async with it.session.generate("hi", tools=[LOOK]) as task:
            async for event in task:
                if isinstance(event, ToolCall):
                    await event.reply("sea")
        await it.session.ask("hi", tools=[])
        names = [[each["function"]["name"] for each in request.tools] for request in it.upstream.requests]
        assert names == [["look"], ["look"], []]


async def test_tools_are_checked_before_anything_is_sent() -> None:
    async with running() as it:
        with pytest.raises(ValueError, match="twice"):
            it.session.generate("hi", tools=[forecast, forecast])
        with pytest.raises(TypeError, match="name"):
            it.session.generate("hi", tools=[{"description": "?"}])


def test_what_a_tool_returns_need_not_be_resolved() -> None:
    def look(at: int) -> Unknown:  # type: ignore[name-defined]  # noqa: F821
        return at

    assert tool(look).declaration["parameters"]["properties"] == {"at": {"type": "integer"}}


async def test_a_token_with_the_end_of_a_line_is_refused_and_not_shown() -> None:
    with pytest.raises(ValueError, match="Expected a token") as refused:
        async with connect("http://127.0.0.1:9", token="secret\n"):
            pass
    assert "secret" not in str(refused.value)
