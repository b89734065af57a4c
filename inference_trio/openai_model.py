"""ChatOpenAI for any endpoint that speaks OpenAI's format.

`ChatOpenAI` is made for OpenAI's own models: it drops what other providers add to messages and chunks, renames
and reroutes by the name of the model, and reads the environment. `CompatibleChatOpenAI` undoes that through its
hooks, and reads the stream with a client of ours, while requests, keys and error statuses remain the work of
OpenAI's client. Its requests go through the `TrioTransport`, in a thread of `stream_in_thread`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar, cast

import attrs
import httpx2
import openai
from langchain_core.callbacks import CallbackManager
from langchain_core.messages import AIMessageChunk
from langchain_core.outputs import ChatGenerationChunk
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

from .bridge import TrioTransport, reads_of
from .chat import JsonObject
from .chunks import Plain, read_chunks
from .deltas import REASONING_FIELDS, Delta, delta_of
from .errors import ConfigurationError, InvalidParamsError
from .messages import ModelRequest, to_langchain, wire_form
from .settings import Settings
from .upstream_http import StreamTransport

KEEPALIVE_EXPIRY = 30.0
"""Seconds for which an idle connection is kept. Providers and proxies close theirs after 60 or more."""

_OPENAI = "api.openai.com"
_NO_KEY = "none"  # the clients insist on one
_NOT_IN_RESPONSES_API = ("stop", "seed", "presence_penalty", "frequency_penalty", "logit_bias")


@attrs.frozen
class _Passed:
    """What LangChain passes on for a `Plain` chunk. A chunk of its own would cost more than all the rest of a token."""

    delta: Delta | None
    message: ClassVar = AIMessageChunk(content="")
    generation_info: ClassVar = None

    def __getattr__(self, name: str) -> Any:
        """Whatever else a newer LangChain asks of it is what an empty chunk has."""
        return getattr(ChatGenerationChunk(message=self.message), name)


@attrs.frozen
class CompletionsClient:
    """Stands in for OpenAI's ``client.chat.completions``: the same requests, but plain dicts for chunks."""

    _client: openai.OpenAI

    @contextlib.contextmanager
    def create(self, *, extra_body: JsonObject | None = None, **body: Any) -> Iterator[Iterator[JsonObject]]:
        # The client's own method looks through every message, tool and parameter for names to change, which takes
        # longer than all the rest of a request. What is posted goes as it is.
        answer: Any = self._client.post(
            "/chat/completions",
            cast_to=httpx2.Response,
            body=body | {"stream": True} | (extra_body or {}),
            stream=True,
            stream_cls=openai.Stream[Any],
        )
        response: httpx2.Response = answer
        with contextlib.closing(response):
            if _is_observed():  # whoever does may block, would be told of nothing, and wants to see all
                yield map(dict, read_chunks(response.iter_bytes()))
            else:
                yield read_chunks(reads_of(response))


class CompatibleChatOpenAI(ChatOpenAI):
    """`ChatOpenAI` that sends and receives everything as it is, whatever the model's name."""

    def _get_request_payload(self, input_: Any, *, stop: list[str] | None = None, **kwargs: Any) -> dict[str, Any]:
        """``input_`` may have messages in OpenAI's format; those, and what was made from them, go as they are."""
        if self.use_responses_api:  # which has a format of its own
            return super()._get_request_payload(input_, stop=stop, **kwargs)
        messages = input_ if isinstance(input_, list) else self._convert_input(input_).to_messages()
        as_they_are = [wire_form(message) for message in messages]
        others = [message for message, done in zip(messages, as_they_are, strict=True) if not done]
        payload = super()._get_request_payload(others, stop=stop, **kwargs)
        converted = iter(payload["messages"])
        payload["messages"] = [done or next(converted) for done in as_they_are]
        if "max_completion_tokens" in payload and not self._is_openai():
            payload["max_tokens"] = payload.pop("max_completion_tokens")
        if "response_format" in payload:
            # As a field of its own it would have LangChain use a client that parses what the model says.
            payload["extra_body"] = {"response_format": payload.pop("response_format")}
        return payload

    def _convert_chunk_to_generation_chunk(
        self, chunk: dict[str, Any], default_chunk_class: type, base_generation_info: dict[str, Any] | None
    ) -> ChatGenerationChunk | None:
        if isinstance(chunk, Plain):
            return cast("ChatGenerationChunk", _Passed(chunk.delta))
        converted = super()._convert_chunk_to_generation_chunk(chunk, default_chunk_class, base_generation_info)
        if converted and chunk["choices"]:
            delta = chunk["choices"][0]["delta"]
            reasoning = {field: delta[field] for field in REASONING_FIELDS if field in delta}
            converted.message.additional_kwargs |= reasoning
        return converted

    def _is_openai(self) -> bool:
        host: str = self.root_client.base_url.host
        return host == _OPENAI or host.endswith("." + _OPENAI)


@attrs.frozen
class OpenAISource:
    """Chunks from an endpoint that speaks OpenAI's format, through one model and one pool of connections."""

    _model: CompatibleChatOpenAI
    _transport: httpx2.AsyncBaseTransport

    def deltas(self, request: ModelRequest) -> Iterator[Delta | None]:
        """What the model says; ``None`` where nothing has come yet."""
        arguments = self._arguments(request)
        if _is_observed():
            for message in self._model.stream(to_langchain(request.messages), **arguments):
                yield delta_of(message, message.response_metadata)
            return
        raw = not self._model.use_responses_api
        messages: Any = list(request.messages) if raw else to_langchain(request.messages)
        # `stream` keeps every chunk, and merges them at the end for callbacks that nobody has set.
        for chunk in self._model._stream(messages, **arguments):  # noqa: SLF001
            message = cast("AIMessageChunk", chunk.message)
            yield chunk.delta if isinstance(chunk, _Passed) else delta_of(message, chunk.generation_info or {})

    async def aclose(self) -> None:
        await self._transport.aclose()

    def _arguments(self, request: ModelRequest) -> dict[str, Any]:
        arguments = dict(request.parameters)
        if self._model.use_responses_api:
            for name in arguments.keys() & set(_NOT_IN_RESPONSES_API):
                raise InvalidParamsError(f"OpenAI's Responses API takes no `{name}` - at `params.{name}`")
        if request.tools:
            arguments["tools"] = list(request.tools)
        if request.model:
            arguments["model"] = request.model
        return arguments


def open_openai(settings: Settings) -> OpenAISource:
    """Connects to nothing yet. Raises ConfigurationError where there is no endpoint."""
    if settings.base_url is None:
        raise ConfigurationError("LLM_BASE_URL is not set: name the endpoint of the model")
    # llama.cpp announces that it keeps a connection, and closes it.
    keepalive_expiry = 0.0 if settings.provider == "local" else KEEPALIVE_EXPIRY
    transport = StreamTransport(keepalive_expiry)
    return OpenAISource(_chat_openai(settings, _openai_client(settings, TrioTransport(transport))), transport)


def _openai_client(settings: Settings, transport: httpx2.BaseTransport) -> openai.OpenAI:
    """The client of one key and one endpoint. Only connecting has a time limit here; Trio has the others."""
    timeout = httpx2.Timeout(None, connect=settings.connect_timeout)
    key = settings.api_key.reveal() if settings.api_key else _NO_KEY
    client = openai.OpenAI(
        api_key=key,
        base_url=settings.base_url,
        timeout=timeout,
        max_retries=0,
        default_headers={
            "Authorization": f"Bearer {key}",  # else OPENAI_CUSTOM_HEADERS may have another
            "Accept-Encoding": "identity",  # a compressed stream is not worth the delay
        },
        http_client=httpx2.Client(transport=transport, timeout=timeout, trust_env=False),
    )
    client.organization = client.project = None  # which it has read from the environment
    return client


def _chat_openai(settings: Settings, client: openai.OpenAI) -> CompatibleChatOpenAI:
    """Whatever is given explicitly here would otherwise come from the environment or the name of the model."""
    completions = CompletionsClient(client)
    return CompatibleChatOpenAI(
        model=settings.model_name,
        temperature=None,
        api_key=SecretStr(_NO_KEY),  # the client has the key; without it here, no trace can show it
        base_url=settings.base_url,
        openai_proxy=None,
        http_socket_options=(),
        max_retries=0,
        stream_usage=settings.stream_usage,
        use_responses_api=settings.responses_api,
        output_version="responses/v1" if settings.responses_api else "v0",
        client=completions,
        root_client=client,
        async_client=completions,  # so that LangChain does not make one, with another pool of connections
    )


def _is_observed() -> bool:
    """Whether there is anybody to call back, such as LangSmith's tracing or LangChain's debug mode."""
    return bool(CallbackManager.configure().handlers)
