"""A program of a user: mypy sees here that the annotations of the client are enough for one that is strict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, assert_never, assert_type

from inference_trio.client import (
    AnyTool,
    Disconnected,
    Draining,
    Event,
    Generation,
    InferenceError,
    ReasoningChunk,
    Result,
    Resumed,
    Session,
    TextChunk,
    ToolCall,
    ToolResult,
    UpstreamError,
    Usage,
    connect,
    tool,
)


@dataclass
class Weather:
    sky: str


def get_weather(city: str) -> Weather:
    return Weather("rain")


async def get_time() -> str:
    return "12:00"


def told(event: Event) -> str:
    match event:
        case TextChunk(text) | ReasoningChunk(text):
            return assert_type(text, str)
        case ToolCall(name=name, arguments=arguments):
            return f"{name} {assert_type(arguments, dict[str, Any])}"
        case ToolResult(error=str(error)):
            return error
        case ToolResult(result=result):
            return str(result)
        case Disconnected():
            return "disconnected"
        case Resumed(gap):
            return str(assert_type(gap, bool))
        case Draining(deadline):
            return str(assert_type(deadline, float))
        case _:
            assert_never(event)


async def generate(session: Session) -> Usage | None:
    async with session.generate("hi", temperature=0.5, stop=["\n"], tools=[]) as task:
        assert_type(task, Generation)
        async for event in task:
            if isinstance(event, ToolCall):
                await event.reply({"sky": "rain"})
            told(event)
    assert_type(task.result.status, Literal["completed", "cancelled", "length", "content_filter"])
    return task.result.usage


async def main() -> None:
    declared = {"name": "look", "parameters": {"type": "object"}}
    tools: list[AnyTool] = [get_weather, get_time, tool(get_weather, name="weather"), declared]
    async with connect("https://localhost", tools=tools, token="token") as session:
        await generate(session)
        try:
            answer = await session.ask("And?", history=[{"role": "user", "content": "hi"}], system="Be brief.")
            assert_type(answer, Result)
            await session.ask([{"type": "text", "text": "hi"}], max_new_tokens=9)
        except UpstreamError as error:
            assert_type(error.partial_text, str)
        except InferenceError as error:
            assert_type(error.retry_after, float | None)
