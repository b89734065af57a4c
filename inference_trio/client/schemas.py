"""What a model is told of a function's parameters, and how its arguments become the function's."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

import docstring_parser
from pydantic import PydanticUserError, TypeAdapter, ValidationError
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import ArgsKwargs

from .errors import ArgumentsError
from .events import JsonObject


class _WithoutTitles(GenerateJsonSchema):
    """Titles repeat the names, and a model reads each of them."""

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002
        return False

    def get_title_from_name(self, name: str) -> str:  # noqa: ARG002
        return None  # type: ignore[return-value]


def described(
    function: Callable[..., Any], annotated: Callable[..., Any], name: str
) -> tuple[JsonObject, str, Callable[[JsonObject], JsonObject]]:
    """The JSON schema of the parameters, the docstring's description, and what converts arguments.

    ``annotated`` has the annotations. Raises TypeError where no schema can be made of one; converting raises
    ArgumentsError.
    """
    try:
        arguments: TypeAdapter[Any] = TypeAdapter(_keywords(function, annotated))
        schema = arguments.json_schema(schema_generator=_WithoutTitles)
    except (PydanticUserError, NameError) as error:
        raise TypeError(f"No JSON schema can be made of the annotations of the tool {name!r}: {error}") from error
    documented = docstring_parser.parse(inspect.getdoc(function) or "")
    for parameter in documented.params:
        property_ = schema.get("properties", {}).get(parameter.arg_name)
        if property_ is not None and parameter.description:
            property_.setdefault("description", parameter.description)

    def convert(given: JsonObject) -> JsonObject:
        try:
            converted: JsonObject = arguments.validate_python(ArgsKwargs((), given))
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors(include_url=False)]
            raise ArgumentsError(f"The arguments do not fit: {'; '.join(problems)}") from error
        return converted

    return schema, (documented.description or "").strip(), convert


def _keywords(function: Callable[..., Any], annotated: Callable[..., Any]) -> Any:
    """A function with the same parameters that only returns its arguments. Raises NameError where a type is unknown."""

    def keywords(**arguments: Any) -> JsonObject:
        return arguments

    keywords.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    keywords.__annotations__ = {name: hint for name, hint in annotated.__annotations__.items() if name != "return"}
    names = getattr(inspect.unwrap(annotated), "__globals__", {})
    keywords.__annotations__ = get_type_hints(keywords, globalns=names, include_extras=True)
    return keywords
