"""Providers with a format of their own (``LLM_PROVIDER=anthropic`` and so on), through LangChain's packages.

They do their own HTTP in the thread, so that a cancel takes effect with their next chunk, at the latest after the
time limit that they are given. What OpenAI's parameters are called there is read off the fields of the model's
class: LangChain's standard parameters are those of its constructor, so a request that has any gets a model of its
own, and one that the class does not have is refused.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import attrs
from langchain_core.language_models import BaseChatModel
from langchain_core.messages.ai import UsageMetadata, add_usage
from pydantic import SecretStr, ValidationError

from .chat import JsonObject
from .deltas import Delta, delta_of
from .errors import ConfigurationError, InvalidParamsError
from .messages import ModelRequest, to_langchain
from .settings import Settings

_OTHER_NAMES = {"max_tokens": ("max_output_tokens", "num_predict"), "timeout": ("request_timeout",)}
"""What classes without a field or alias of the standard name call it."""


@attrs.frozen
class ProviderSource:
    """Deltas from a provider's LangChain class. ``build`` makes a model, with arguments besides those it has."""

    _name: str
    _build: Callable[..., BaseChatModel]
    _model: BaseChatModel

    def deltas(self, request: ModelRequest) -> Iterator[Delta]:
        parameters = dict(request.parameters)
        stop = parameters.pop("stop", None)
        tool_options = {name: parameters.pop(name, None) for name in ("tool_choice", "parallel_tool_calls")}
        model: Any = self._model_for(parameters, request.model or self._name)
        if request.tools and tool_options["tool_choice"] != "none":
            model = model.bind_tools(list(request.tools), **_for_bind_tools(model, **tool_options))
        usage: UsageMetadata | None = None
        for chunk in model.stream(to_langchain(request.messages), stop=[stop] if isinstance(stop, str) else stop):
            if not chunk.usage_metadata:
                yield delta_of(chunk, {})
                continue
            usage = add_usage(usage, chunk.usage_metadata)  # those of a stream are made to add up
            yield delta_of(chunk.model_copy(update={"usage_metadata": usage}), {})

    async def aclose(self) -> None:
        """Does nothing: the clients close their connections when they go."""

    def _model_for(self, parameters: Mapping[str, Any], name: str) -> BaseChatModel:
        arguments = {self._field_for(parameter): value for parameter, value in parameters.items()}
        if name != self._name:
            arguments["model"] = name
        try:
            return self._build(**arguments) if arguments else self._model
        except ValidationError as error:
            raise InvalidParamsError(f"The provider does not take {_explained(error)} - at `params`") from error

    def _field_for(self, parameter: str) -> str:
        if field := _field_named(parameter, type(self._model)):
            return field
        raise _not_taken(parameter)


def open_provider(settings: Settings) -> ProviderSource:
    """Raises ConfigurationError where LangChain has no such provider, a package is missing, or a setting is wrong."""
    given = {"api_key": settings.api_key and settings.api_key.reveal(), "base_url": settings.base_url}
    options = {name: value for name, value in given.items() if value is not None}
    try:
        create = importlib.import_module("langchain.chat_models").init_chat_model
        build = partial(create, model=settings.model_name, model_provider=settings.provider, **options)
        build = partial(build, **_limits(settings, type(build())))
        model = build()
        _require_key(model, settings.provider)
        return ProviderSource(settings.model_name, build, model)
    except ImportError as error:
        packages = f"langchain {_package_for(settings.provider, error)}"
        raise ConfigurationError(f"LLM_PROVIDER={settings.provider} needs: pip install {packages}") from error
    except ValidationError as error:
        raise ConfigurationError(f"LLM_PROVIDER={settings.provider} takes no {_explained(error)}") from None
    except ValueError as error:
        raise ConfigurationError(f"LLM_PROVIDER={settings.provider}: LangChain knows no such provider") from error


def _require_key(model: BaseChatModel, provider: str) -> None:
    """Some packages take an empty key, and fail at each request. Raises ConfigurationError."""
    for name in type(model).model_fields:
        value = getattr(model, name)
        if name.endswith("api_key") and isinstance(value, SecretStr) and not value.get_secret_value():
            variable = f"{provider.upper()}_API_KEY"
            raise ConfigurationError(
                f"{variable} is not set: put the provider's key in it, or name it in API_KEY_ENV_VAR"
            )


def _package_for(provider: str, error: ImportError) -> str:
    """LangChain's message names it, unless it is LangChain itself that is missing."""
    named = re.search("langchain-[a-z-]+", str(error))
    return named[0] if named else f"langchain-{provider.replace('_', '-')}"


def _limits(settings: Settings, model_class: type[BaseChatModel]) -> dict[str, Any]:
    """Retries are the runner's. The time limit is between two reads; without one, a silent provider keeps a thread."""
    seconds = max(settings.first_token_timeout, settings.token_timeout)
    wanted = {"timeout": seconds, "client_kwargs": {"timeout": seconds}, "max_retries": 0}
    fields = {_field_named(name, model_class): value for name, value in wanted.items()}
    return {field: value for field, value in fields.items() if field}


def _field_named(parameter: str, model_class: type[BaseChatModel]) -> str | None:
    """The argument of the constructor that takes ``parameter``, if one does."""
    fields = model_class.model_fields
    known = fields.keys() | {field.alias for field in fields.values()}
    return next((name for name in (parameter, *_OTHER_NAMES.get(parameter, ())) if name in known), None)


def _for_bind_tools(
    model: BaseChatModel, *, tool_choice: str | JsonObject | None, parallel_tool_calls: bool | None
) -> dict[str, Any]:
    """A forced choice has other words in LangChain: ``any``, or just the tool's name."""
    options: dict[str, Any] = {}
    if isinstance(tool_choice, dict):
        options["tool_choice"] = tool_choice["function"]["name"]
    elif tool_choice == "required":
        options["tool_choice"] = "any"
    if parallel_tool_calls is not None:
        if "parallel_tool_calls" not in inspect.signature(model.bind_tools).parameters:
            raise _not_taken("parallel_tool_calls")
        options["parallel_tool_calls"] = parallel_tool_calls
    return options


def _not_taken(parameter: str) -> InvalidParamsError:
    name = "max_new_tokens" if parameter == "max_tokens" else parameter
    return InvalidParamsError(f"The provider takes no `{name}` - at `params.{name}`")


def _explained(error: ValidationError) -> str:
    """Without the values: there may be a key among them."""
    return "; ".join(f"`{'.'.join(map(str, item['loc']))}` ({item['msg']})" for item in error.errors())
