"""A client on Trio: sessions, generations as async iterators, tools as functions.

    async with connect("http://127.0.0.1:8000", tools=[get_weather]) as session:
        async with session.generate("Do I need an umbrella in Paris?") as task:
            async for event in task:
                if isinstance(event, TextChunk):
                    print(event.text, end="", flush=True)
        print(task.result.usage)
        print(await session.ask("And tomorrow?"))

A connection that breaks is mended by itself; `conversation` says how. Everything that the server refuses or that goes
wrong is an `InferenceError`; `errors` has the tree.
"""

from ..protocol import Usage
from .errors import (
    BrokenStreamError,
    ClosedError,
    ConnectionLostError,
    DefectError,
    GenerationError,
    InferenceError,
    OverloadedError,
    RateLimitedError,
    RequestError,
    SessionGoneError,
    TakenOverError,
    TooBigError,
    ToolTimeoutError,
    TooManyRoundsError,
    UnauthorizedError,
    UnreachableError,
    UpstreamError,
    UpstreamTimeoutError,
)
from .events import (
    Disconnected,
    Draining,
    Event,
    ReasoningChunk,
    Result,
    Resumed,
    TextChunk,
    ToolCall,
    ToolResult,
)
from .generation import Generation
from .session import AnyTool, Parameters, Session, connect
from .tools import Tool, tool

__all__ = [
    "AnyTool",
    "BrokenStreamError",
    "ClosedError",
    "ConnectionLostError",
    "DefectError",
    "Disconnected",
    "Draining",
    "Event",
    "Generation",
    "GenerationError",
    "InferenceError",
    "OverloadedError",
    "Parameters",
    "RateLimitedError",
    "ReasoningChunk",
    "RequestError",
    "Result",
    "Resumed",
    "Session",
    "SessionGoneError",
    "TakenOverError",
    "TextChunk",
    "TooBigError",
    "TooManyRoundsError",
    "Tool",
    "ToolCall",
    "ToolResult",
    "ToolTimeoutError",
    "UnauthorizedError",
    "UnreachableError",
    "UpstreamError",
    "UpstreamTimeoutError",
    "Usage",
    "connect",
    "tool",
]
