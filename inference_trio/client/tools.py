"""Tools: functions that the model may call in this process, and declarations of those that are answered by hand."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import attrs
import trio

from .events import JsonObject

Function: TypeAlias = Callable[..., Any]


@attrs.frozen
class ToolFunction:
    """A function, and how the model's arguments become its own (or ArgumentsError is raised)."""

    call: Function
    _convert: Callable[[JsonObject], JsonObject]

    async def run(self, arguments: JsonObject, limiter: trio.CapacityLimiter) -> Any:
        """What the function returns for these arguments; a function that is not async runs in a thread.

        Raises whatever it raises, and ArgumentsError before it is called. A thread cannot be cancelled: it is left to
        itself, and what it returns is dropped.
        """
        call = functools.partial(self.call, **self._convert(arguments))
        if inspect.iscoroutinefunction(inner(self.call)):
            return await call()
        (given,) = await trio.to_thread.run_sync(_whole, call, abandon_on_cancel=True, limiter=limiter)
        return await given if inspect.isawaitable(given) else given  # of an async function in a decorator that is not


@attrs.frozen
class Tool:
    """A tool as the server is told of it, with its function where it is not answered by hand."""

    name: str
    declaration: JsonObject
    function: ToolFunction | None = None


def tool(function: Function, *, name: str | None = None, description: str | None = None) -> Tool:
    """A function as a tool: its name, its docstring and its annotations are what the model is told.

    Parameters are described by the docstring's section on them (in the style of Google, NumPy or Sphinx) or by
    `Annotated[…, pydantic.Field(description=…)]`. The model's arguments are converted to the annotated types.
    Raises TypeError where a parameter can be given by position only, or no schema can be made of an annotation, and
    ValueError for a name that no tool can have, like that of a lambda.
    """
    name = name or str(getattr(function, "__name__", ""))
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        raise ValueError(
            f"Expected a tool's name of 1 to 64 letters, digits, _ or -, got {name!r} of {function!r}:"
            " `tool(function, name=…)` gives one"
        )
    kinds = [parameter.kind for parameter in inspect.signature(function).parameters.values()]
    if inspect.Parameter.POSITIONAL_ONLY in kinds or inspect.Parameter.VAR_POSITIONAL in kinds:
        raise TypeError(f"Expected parameters that can be given by name - in the tool {name!r}")
    from .schemas import described  # not with the module: pydantic takes longer to import than all the rest

    schema, documented, convert = described(function, inner(function), name)
    text = description or documented
    declaration = {"name": name, **({"description": text} if text else {}), "parameters": schema}
    return Tool(name, declaration, ToolFunction(function, convert))


def _whole(call: Callable[[], Any]) -> tuple[Any]:
    """What it returns, in a tuple because Trio lets no thread return a coroutine.

    From a generator it is all that it gives: that is the function's work, and so the thread's.
    """
    given = call()
    return (list(given) if inspect.isgenerator(given) else given,)


def inner(function: Function) -> Function:
    """What is written with `def`."""
    if isinstance(function, functools.partial):
        return inner(function.func)
    return function if inspect.isroutine(function) else function.__call__  # type: ignore[operator]


def tools_of(given: Iterable[Tool | Function | Mapping[str, Any]]) -> dict[str, Tool]:
    """Tools by name, in order. Raises TypeError for what is none, ValueError for a name that is there twice."""
    found: dict[str, Tool] = {}
    for one in given:
        made = one if isinstance(one, Tool) else _declared(one) if isinstance(one, Mapping) else tool(one)
        if made.name in found:
            raise ValueError(f"Expected each tool once, got {made.name!r} twice")
        found[made.name] = made
    return found


def _declared(declaration: Mapping[str, Any]) -> Tool:
    """A tool that is only declared, flat or as OpenAI has it. Its calls come as events, to be answered."""
    inner = declaration.get("function", declaration)
    name = inner.get("name") if isinstance(inner, Mapping) else None
    if not isinstance(name, str):
        raise TypeError(f"Expected a tool with a `name`, got {declaration!r}")
    return Tool(name, dict(declaration))
