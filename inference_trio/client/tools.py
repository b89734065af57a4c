"""Tools: functions that the model may call in this process, and declarations of those that are answered by hand."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias, get_type_hints

import attrs
import docstring_parser
import trio
from pydantic import PydanticUserError, TypeAdapter, ValidationError
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import ArgsKwargs

from .events import JsonObject

Function: TypeAlias = Callable[..., Any]


class ArgumentsError(Exception):
    """The model's arguments do not fit the function; the message says how, for the model."""


class _WithoutTitles(GenerateJsonSchema):
    """Titles repeat the names, and a model reads each of them."""

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002
        return False

    def get_title_from_name(self, name: str) -> str:  # noqa: ARG002
        return None  # type: ignore[return-value]


@attrs.frozen
class ToolFunction:
    """A function, and how the model's arguments become its own."""

    call: Function
    _arguments: TypeAdapter[Any]

    async def run(self, arguments: JsonObject, limiter: trio.CapacityLimiter) -> Any:
        """What the function returns for these arguments; a function that is not async runs in a thread.

        Raises whatever it raises, and ArgumentsError before it is called. A thread cannot be cancelled: it is left to
        itself, and what it returns is dropped.
        """
        converted = self._convert(arguments)
        if inspect.iscoroutinefunction(_inner(self.call)):
            return await self.call(**converted)
        call = functools.partial(self.call, **converted)
        return await trio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=limiter)

    def _convert(self, arguments: JsonObject) -> JsonObject:
        try:
            converted: JsonObject = self._arguments.validate_python(ArgsKwargs((), arguments))
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors(include_url=False)]
            raise ArgumentsError(f"The arguments do not fit: {'; '.join(problems)}") from error
        return converted


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
    Raises TypeError where a parameter can be given by position only, or no schema can be made of an annotation.
    """
    name = name or str(getattr(function, "__name__", ""))
    kinds = [parameter.kind for parameter in inspect.signature(function).parameters.values()]
    if inspect.Parameter.POSITIONAL_ONLY in kinds or inspect.Parameter.VAR_POSITIONAL in kinds:
        raise TypeError(f"Expected parameters that can be given by name - in the tool {name!r}")
    try:
        arguments: TypeAdapter[Any] = TypeAdapter(_keywords(function))
        schema = arguments.json_schema(schema_generator=_WithoutTitles)
    except (PydanticUserError, NameError) as error:
        raise TypeError(f"No JSON schema can be made of the annotations of the tool {name!r}: {error}") from error
    documented = docstring_parser.parse(inspect.getdoc(function) or "")
    for parameter in documented.params:
        described = schema.get("properties", {}).get(parameter.arg_name)
        if described is not None and parameter.description:
            described.setdefault("description", parameter.description)
    text = description or (documented.description or "").strip()
    declaration = {"name": name, **({"description": text} if text else {}), "parameters": schema}
    return Tool(name, declaration, ToolFunction(function, arguments))


def _keywords(function: Function) -> Any:
    """A function with the same parameters that only returns its arguments. Raises NameError where a type is unknown."""

    def keywords(**arguments: Any) -> JsonObject:
        return arguments

    keywords.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    keywords.__annotations__ = get_type_hints(_inner(function), include_extras=True)
    return keywords


def _inner(function: Function) -> Function:
    """What is written with `def`."""
    if isinstance(function, functools.partial):
        return _inner(function.func)
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
