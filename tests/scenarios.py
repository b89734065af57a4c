"""The scripted upstream as a program: ``python -m tests.upstream --port 9009 --scenario echo --rate 20``.

Without ``--scenario`` the request's model name selects one, as in ``{"model": "stall"}``; a name that is none
of them echoes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import signal
from collections.abc import Callable
from functools import partial
from typing import Any

import trio

from tests.answers import Answer, calls, drop, error, hang, reply, sleep, status, text, tool_call
from tests.upstream import Request, open_upstream

Scenario = Callable[[Request], Answer]
TEXT = "The quick brown fox jumps over the lazy dog."


def words(message: str, rate: float) -> Answer:
    """The message word by word, at ``rate`` words a second."""
    return tuple(step for word in message.split(" ") for step in (text(f"{word} "), sleep(1 / rate)))


def echo(request: Request, rate: float) -> Answer:
    """The last message of the user, or after a tool's result that."""
    content = request.messages[-1]["content"]
    if isinstance(content, list):
        content = " ".join(part.get("text", f"[{part['type']}]") for part in content)
    return (words(str(content), rate), reply())


def call_tool(request: Request, rate: float) -> Answer:
    """Calls the first tool with arguments made up from its schema; echoes the result when it is there."""
    if not request.tools or request.messages[-1]["role"] == "tool":
        return echo(request, rate)
    function = request.tools[0]["function"]
    arguments = json.dumps(example(function.get("parameters", {})))
    return calls(tool_call(0, f"call_{len(request.messages)}", function["name"], arguments))


def example(schema: dict[str, Any], depth: int = 5) -> Any:
    """A value that a simple JSON Schema allows."""
    if "enum" in schema or "examples" in schema:
        return (schema.get("examples") or schema["enum"])[0]
    if "default" in schema or "const" in schema:
        return schema.get("default", schema.get("const"))
    if "properties" in schema and depth:
        return {name: example(value, depth - 1) for name, value in schema["properties"].items()}
    values = {"string": "text", "integer": 1, "number": 1.5, "boolean": True, "array": [], "null": None}
    return values.get(schema.get("type", "object"), {})


def scenarios(rate: float) -> dict[str, Scenario]:
    """All scenarios by name; their counters start anew."""
    count = itertools.count(1)

    def limited(request: Request) -> Answer:
        if next(count) % 3:
            return status(429, {"error": {"message": "slow down"}}, headers={"Retry-After": "1"})
        return echo(request, rate)

    return {
        "echo": partial(echo, rate=rate),
        "tool": partial(call_tool, rate=rate),
        "slow": lambda request: (sleep(10), echo(request, rate)),
        "stall": lambda _: (words(TEXT, rate), hang()),
        "silent": lambda _: hang(),
        "limited": limited,
        "error": lambda _: (words(TEXT, rate), error()),
        "truncated": lambda _: (words(TEXT, rate), drop()),
    }


async def report(number: int, request: Request) -> None:
    """Prints one line for the request and one for the end of its answer."""
    model, messages, tools = request.body.get("model"), len(request.messages), len(request.tools)
    print(f"#{number} model={model} messages={messages} tools={tools}", flush=True)
    start = trio.current_time()
    await request.finished.wait()
    end = "answered" if request.complete else "the client closed the connection"
    print(f"#{number} {end} after {trio.current_time() - start:.2f} s", flush=True)


async def serve(port: int, scenario: str | None, rate: float) -> None:
    """Serves until SIGINT or SIGTERM."""
    known = scenarios(rate)
    numbers = itertools.count(1)

    def answer(request: Request) -> Answer:
        nursery.start_soon(report, next(numbers), request)
        name = scenario or str(request.body.get("model"))
        return known.get(name, known["echo"])(request)

    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery, open_upstream(answer, port=port) as upstream:
            print(f"{upstream.base_url}  scenarios: {', '.join(known)}", flush=True)
            await anext(signals)
            nursery.cancel_scope.cancel()


def main() -> None:
    parser = argparse.ArgumentParser("tests.upstream", description="A scripted OpenAI-compatible upstream.")
    parser.add_argument("--port", type=int, default=9009)
    parser.add_argument("--scenario", choices=scenarios(1), help="for all requests, whatever their model")
    parser.add_argument("--rate", type=float, default=20.0, help="words a second (default: 20)")
    options = parser.parse_args()
    trio.run(serve, options.port, options.scenario, options.rate)
