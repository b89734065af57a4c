"""The Quart-Trio app: the session route, the WebSocket, and what a deployment asks for.

`create_app` puts the parts together. The model, the sessions and their tasks live in the nursery that Quart-Trio
opens while it serves, so they end with the server.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from functools import partial
from http import HTTPStatus
from typing import Any, NoReturn, TypeVar

import attrs
import trio
from hypercorn.config import Config
from msgspec import UNSET
from quart import Response, request, websocket
from quart_trio import QuartTrio
from werkzeug.datastructures import Headers, WWWAuthenticate
from werkzeug.exceptions import (
    HTTPException,
    MethodNotAllowed,
    NotFound,
    Unauthorized,
    UnsupportedMediaType,
)

from . import openrpc, playground
from .access import SUBPROTOCOL, Access, Owner, ticket_among
from .browsers import BrowserRules
from .connection import Connection
from .errors import (
    ConfigurationError,
    InferenceError,
    InternalError,
    InvalidParamsError,
    InvalidRequestError,
    NoSuchSessionError,
    OverloadedError,
    ParseError,
)
from .hypercorn_fixes import Hooks, ServerLimits, install
from .hypercorn_streams import BoundedWebsocket
from .jsonrpc import convert, encode, loads
from .local_model import embedded_model, find_weights
from .metrics import Metrics
from .model import ChatModel, build_model
from .outbox import RETRY_AFTER
from .process import USAGE_ERROR, complain, leave, raise_file_limit, watch_signals
from .protocol import Created, CreateSession, NewTicket
from .runner import Model
from .settings import Settings, environment_warnings
from .store import CLOSING_TIME
from .stores import Session, Store, check_store, open_store
from .tracing import Tracing, open_tracing

T = TypeVar("T")

logger = logging.getLogger(__name__)

_METRICS_APART = (
    "Each of several workers counts for itself, at a port of its own: `inference-trio serve --workers` with"
    " INFERENCE_METRICS_PORT"
)

_ONE_PORT = "INFERENCE_METRICS_PORT is one port, for {0} workers: `inference-trio serve --workers {0}` gives each one"

_STATUS = {ParseError: 400, NoSuchSessionError: 404, InvalidParamsError: 422, OverloadedError: 503}


def create_app(settings: Settings, model: Model | None = None) -> QuartTrio:
    """The app for these settings; ``model`` stands in for the one that the settings name.

    Raises ConfigurationError where a package that the settings need is not there.
    """
    for line in environment_warnings(os.environ):
        logger.warning("%s", line)
    check_store(settings)
    opening = nullcontext(model) if model else open_model(settings)
    service = Service(settings, opening, Access.of(settings), open_tracing(settings, os.environ))
    arriving = max(settings.memory_bytes // 4, 2 * settings.max_message_bytes)
    limits = ServerLimits(settings.max_message_bytes, settings.max_connections, arriving)
    watch = partial(watch_signals, settings.drain_seconds)
    metrics = service.metrics
    hooks = Hooks(service.before_start, service.drain, watch, partial(leave, 0), metrics.request_refused)
    metrics.show_arriving(install(limits, hooks))
    app = QuartTrio(__package__, static_folder=None)
    app.websocket_class = BoundedWebsocket
    app.config["MAX_CONTENT_LENGTH"] = limits.max_message_bytes
    app.config["BODY_TIMEOUT"] = limits.body_timeout
    app.config["BACKGROUND_TASK_SHUTDOWN_TIMEOUT"] = None  # what runs in the nursery ends when it is told to
    rules = BrowserRules(service.access)
    app.before_request(rules.before_request)
    app.before_websocket(rules.before_websocket)
    app.after_request(rules.after_request)
    app.after_websocket(rules.after_websocket)  # type: ignore[type-var]  # Quart's type leaves the async ones out
    app.after_request(service.count_refusal)
    app.after_websocket(service.count_refusal)
    app.errorhandler(InferenceError)(refuse)
    app.errorhandler(HTTPException)(refuse_http)
    app.errorhandler(Exception)(report_defect)
    service.register(app)
    playground.register(app, settings)
    return app


def _end_because_of(reason: object) -> NoReturn:
    complain(reason)
    raise SystemExit(USAGE_ERROR)


def _metrics(service: Service) -> Metrics:
    return Metrics(lambda: service.store.census())


@attrs.define(eq=False)
class Service:
    """The routes, and what they need from start to end of serving."""

    settings: Settings
    opening_model: AbstractAsyncContextManager[Model]
    access: Access
    tracing: Tracing | None = None
    metrics: Metrics = attrs.field(default=attrs.Factory(_metrics, takes_self=True))
    _is_alone: bool = attrs.field(default=attrs.Factory(lambda self: self.settings.worker is None, takes_self=True))
    _store: Store | None = None

    def register(self, app: QuartTrio) -> None:
        async def start() -> None:
            model: Model = await app.nursery.start(_hold, self.opening_model)
            observers = [self.metrics, self.tracing] if self.tracing else [self.metrics]
            opening = open_store(self.settings, model, app.nursery, self.access, observers)
            self._store = await app.nursery.start(_hold, opening)
            app.nursery.start_soon(self.metrics.watch_event_loop)
            app.nursery.start_soon(self.metrics.serve)

        app.before_serving(start)
        if self.tracing:
            app.after_serving(self.tracing.aclose)
        app.post("/create_session")(self.create_session)
        app.post("/sessions/<session_id>/ticket")(self.issue_ticket)
        app.get("/healthz")(self.healthz)
        app.get("/readyz")(self.readyz)
        app.get("/openrpc.json")(self.openrpc)
        app.websocket("/ws/<session_id>")(self.connect)
        if not self.settings.metrics_port:
            app.get("/metrics")(self.show_metrics)

    def before_start(self, config: Config) -> None:
        """Called with Hypercorn's configuration. Ends the process where it asks for what cannot work.

        Raises OSError where the port for the metrics cannot be had.
        """
        if config.workers > 1:
            self._join_others(config.workers)
        if self.settings.metrics_port:
            self.metrics.listen(self.settings.metrics_host, self.settings.metrics_port)
        self.access.warn_of_strangers([*config.bind, *config.insecure_bind])
        raise_file_limit(self.settings.max_connections, self.settings.max_tasks)

    def _join_others(self, workers: int) -> None:
        """This is one of the workers of Hypercorn's command, which does not say which."""
        self._is_alone = False
        try:
            self.settings.check_workers(workers)
        except ConfigurationError as error:
            _end_because_of(error)
        if self.settings.metrics_port:
            _end_because_of(_ONE_PORT.format(workers))
        # No code of ours runs in Hypercorn's parent.
        logger.warning(
            "when one of these %d workers ends, Hypercorn ends all of them, with exit status 0:"
            " inference-trio serve --workers would start another one",
            workers,
        )

    async def drain(self) -> None:
        if self._store:
            await self._store.drain()

    @property
    def store(self) -> Store:
        """Raises OverloadedError until the server is ready."""
        if self._store is None:
            raise OverloadedError("The server is not ready", retry_after=RETRY_AFTER)
        return self._store

    async def create_session(self) -> Response:
        owner = self._owner(request.headers)
        session = await self.store.create(convert(await _json_body(), CreateSession, "body"), owner)
        return _json(Created(session.id, await session.issue_ticket() if self.access.needs_token else UNSET))

    async def issue_ticket(self, session_id: str) -> Response:
        owner = self._owner(request.headers)
        await self.store.spend_request(owner)
        session = await self._session_of(owner, session_id)
        return _json(NewTicket(await session.issue_ticket()))

    async def healthz(self) -> Response:
        return _json({"status": "ok"})

    async def readyz(self) -> Response:
        self.store.check_ready()
        return _json({"status": "ready"})

    async def openrpc(self) -> Response:
        self._owner(request.headers)
        return _json(openrpc.document())

    async def show_metrics(self) -> Response:
        self._owner(request.headers)
        if not self._is_alone:
            raise NotFound(_METRICS_APART)
        return await self.metrics.respond()

    async def connect(self, session_id: str) -> None:
        socket = websocket._get_current_object()  # type: ignore[attr-defined]  # noqa: SLF001 (Werkzeug's proxies)
        offered = socket.requested_subprotocols
        session = await self._session_for_ticket(session_id, ticket_among(offered))
        if session is None:
            session = await self._session_of(self._owner(socket.headers), session_id)
        subprotocol = SUBPROTOCOL if SUBPROTOCOL in offered else None
        traceparent = socket.headers.get("traceparent")
        connection = Connection(socket, session, subprotocol, traceparent, self._count_error)
        await session.attach(connection, _after(socket.args.get("after")))
        await connection.run()

    async def count_refusal(self, response: Any) -> Any:
        """Called with what is sent for a request; a handshake that was accepted has no response."""
        if response is not None and response.status_code >= HTTPStatus.BAD_REQUEST:
            self.metrics.request_refused("http", response.status_code)
        return response

    def _count_error(self, error: InferenceError) -> None:
        self.metrics.request_refused("websocket", error.code)

    def _owner(self, headers: Headers) -> Owner:
        owner = self.access.owner_of(headers.get("Authorization"))
        if owner is None:
            expected = (
                "Expected `Authorization: Bearer <token>` with a token that is in force, or a ticket for a WebSocket"
            )
            raise Unauthorized(expected)
        return owner

    async def _session_of(self, owner: Owner, session_id: str) -> Session:
        session = await self._session(session_id)
        return session if session.owner is owner else _no_session()

    async def _session_for_ticket(self, session_id: str, ticket: str | None) -> Session | None:
        session = await self._session(session_id) if ticket else None
        return session if session and ticket and await session.redeem(ticket) else None

    async def _session(self, session_id: str) -> Session:
        return await self.store.get(session_id) or _no_session()


def _no_session() -> NoReturn:
    raise NotFound("There is no such session; it may have expired")


async def refuse(error: InferenceError) -> Response:
    return _error(error, _STATUS.get(type(error), 500))


async def refuse_http(error: HTTPException) -> Response:
    response = _error(InvalidRequestError(error.description or error.name), error.code or 500)
    if isinstance(error, MethodNotAllowed):
        response.allow.update(error.valid_methods or ())
    if isinstance(error, Unauthorized):
        response.www_authenticate = WWWAuthenticate("bearer")
    return response


async def report_defect(error: Exception) -> Response:
    logger.error("defect in a route", exc_info=error)
    return _error(InternalError(), 500)


def open_model(settings: Settings) -> AbstractAsyncContextManager[Model]:
    """The chat model that the settings name, for as long as the context lasts.

    Raises ConfigurationError, when it is called and not only when it is entered.
    """
    if settings.provider != "local":
        return _closing(build_model(settings))
    find_weights()
    return _embedded(settings)


@asynccontextmanager
async def _closing(model: ChatModel) -> AsyncIterator[Model]:
    try:
        yield model
    finally:
        with trio.move_on_after(2 * CLOSING_TIME, shield=True):  # a cancelled one closes the first connection only
            await model.aclose()


@asynccontextmanager
async def _embedded(settings: Settings) -> AsyncIterator[Model]:
    async with embedded_model() as embedded:
        endpoint = attrs.evolve(settings, base_url=embedded.base_url, api_key=embedded.api_key)
        async with _closing(build_model(endpoint)) as model:
            yield model


async def _hold(context: AbstractAsyncContextManager[T], task_status: trio.TaskStatus[T]) -> None:
    """A task that keeps a context open until it is cancelled, and gives what the context gave."""
    async with context as value:
        task_status.started(value)
        await trio.sleep_forever()


async def _json_body() -> Any:
    """The request's body; no body stands for an empty object."""
    body = await request.get_data(cache=False)
    if not body:
        return {}
    if not request.is_json:
        raise UnsupportedMediaType(f"Expected a body of type application/json, got {request.mimetype or 'none'!r}")
    return loads(body)


def _after(text: str | None) -> int | None:
    if text is None:
        return None
    if not re.fullmatch("[0-9]{1,18}", text):
        raise InvalidParamsError(f"Expected a number that was sent as `seq`, or 0, got {text[:64]!r} - at `after`")
    return int(text)


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(encode(value), status, headers, content_type="application/json")


def _error(error: InferenceError, status: int) -> Response:
    retry_after = error.data.get("retry_after")
    headers = {} if retry_after is None else {"Retry-After": str(math.ceil(retry_after))}
    return _json({"error": error.to_wire()}, status, headers)
