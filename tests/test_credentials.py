"""Tokens, tickets, foreign pages and response headers over real sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest
import trio
import trio_websocket

from inference_trio.access import TICKET_LIFETIME, Access
from inference_trio.browsers import CONTENT_SECURITY_POLICY
from inference_trio.logs import _context
from inference_trio.variables import Secret
from tests import fakes
from tests.fakes import FakeModel, finish, hang, text
from tests.harness import HANDSHAKE, Client, Server, open_server

ALICE, BOB = "alice-0123456789abcdef", "bob-0123456789abcdef"
TOKENS = {"alice": Secret(ALICE), "bob": Secret(BOB)}
HELLO = [text("Hello"), finish()]
FOREIGN = {"Origin": "https://evil.example"}


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@asynccontextmanager
async def serving(**changes: Any) -> AsyncIterator[Server]:
    changes.setdefault("auth_tokens", TOKENS)
    async with open_server(fakes.settings(drain_seconds=0.0, **changes), FakeModel(HELLO)) as server:
        yield server


async def created(server: Server, token: str = ALICE) -> dict[str, str]:
    response = await server.post(headers=bearer(token))
    assert response.status_code == 200
    answer: dict[str, str] = response.json()
    return answer


async def refusal(server: Server, path: str, headers: dict[str, str]) -> int:
    """The status with which a WebSocket handshake is refused."""
    return (await refused_handshake(server, path, headers)).status_code


async def refused_handshake(server: Server, path: str, headers: dict[str, str]) -> httpx2.Response:
    async with httpx2.AsyncClient(base_url=server.url) as http:  # the server closes the connection
        return await http.get(path, headers=HANDSHAKE | headers)


def protocols(ticket: str) -> dict[str, str]:
    return {"Sec-WebSocket-Protocol": f"inference-trio, ticket.{ticket}"}


@asynccontextmanager
async def connected(
    server: Server, session_id: str, **options: Any
) -> AsyncIterator[trio_websocket.WebSocketConnection]:
    url = f"{server.url.replace('http', 'ws')}/ws/{session_id}"
    async with trio_websocket.open_websocket_url(url, **options) as socket:
        yield socket


async def test_without_a_token_there_is_nothing_but_health() -> None:
    async with serving() as server:
        session_id = (await created(server))["session_id"]
        for path in ("/healthz", "/readyz"):
            assert (await server.get(path)).status_code == 200
        for headers in ({}, bearer("wrong-0123456789abcdef"), {"Authorization": f"Basic {ALICE}"}):
            refused = await server.post(headers=headers)
            assert refused.status_code == 401
            assert refused.headers["www-authenticate"].lower() == "bearer"
            assert "Authorization" in refused.json()["error"]["message"]
            assert (await server.get("/openrpc.json", headers=headers)).status_code == 401
            assert (await server.post(f"/sessions/{session_id}/ticket", headers=headers)).status_code == 401
            assert await refusal(server, f"/ws/{session_id}", headers) == 401
        assert (await server.get("/openrpc.json", headers=bearer(ALICE))).status_code == 200


async def test_a_session_belongs_to_the_token_that_made_it() -> None:
    async with serving() as server:
        session_id = (await created(server))["session_id"]
        assert await refusal(server, f"/ws/{session_id}", bearer(BOB)) == 404
        assert (await server.post(f"/sessions/{session_id}/ticket", headers=bearer(BOB))).status_code == 404
        headers = [(name, value) for name, value in bearer(ALICE).items()]
        async with connected(server, session_id, extra_headers=headers) as socket:
            assert (await Client(socket, session_id).ask_model())["final_text"] == "Hello"


async def test_a_ticket_lets_a_browser_in_once() -> None:
    async with serving() as server:
        answer = await created(server)
        session_id, ticket = answer["session_id"], answer["ticket"]
        other = (await created(server))["session_id"]
        assert await refusal(server, f"/ws/{other}", protocols(ticket)) == 401
        assert await refusal(server, "/ws/elsewhere", protocols(ticket)) == 404, "another server may have it"
        async with connected(server, session_id, subprotocols=["inference-trio", f"ticket.{ticket}"]) as socket:
            assert socket.subprotocol == "inference-trio"
            assert (await Client(socket, session_id).ask_model())["final_text"] == "Hello"
        assert await refusal(server, f"/ws/{session_id}", protocols(ticket)) == 401
        fresh = (await server.post(f"/sessions/{session_id}/ticket", headers=bearer(ALICE))).json()["ticket"]
        assert fresh != ticket
        async with connected(server, session_id, subprotocols=["inference-trio", f"ticket.{fresh}"]) as socket:
            assert (await Client(socket, session_id).ask_model())["final_text"] == "Hello"


async def test_a_ticket_expires(mock_clock: trio.testing.MockClock) -> None:
    async with serving() as server:
        answer = await created(server)
        mock_clock.jump(TICKET_LIFETIME)
        assert await refusal(server, f"/ws/{answer['session_id']}", protocols(answer["ticket"])) == 401


async def test_without_tokens_in_force_there_is_no_ticket_and_the_subprotocol_is_still_spoken() -> None:
    async with serving(auth_tokens={}) as server:
        answer = (await server.post()).json()
        assert answer.keys() == {"session_id"}
        async with connected(server, answer["session_id"], subprotocols=["inference-trio"]) as socket:
            assert socket.subprotocol == "inference-trio"
        async with connected(server, answer["session_id"], subprotocols=["other"]) as socket:
            assert socket.subprotocol is None


async def test_every_token_has_its_own_limits() -> None:
    async with serving(max_sessions_per_token=2, requests_per_minute=3) as server:
        for _ in range(2):
            await created(server)
        refused = await server.post(headers=bearer(ALICE))
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, -32005)
        assert int(refused.headers["retry-after"]) >= 1
        session_id = (await created(server, BOB))["session_id"]
        assert (await server.post(f"/sessions/{session_id}/ticket", headers=bearer(BOB))).status_code == 200
        headers = list(bearer(BOB).items())
        async with connected(server, session_id, extra_headers=headers) as socket:
            client = Client(socket, session_id)
            assert (await client.ask_model())["final_text"] == "Hello"
            refusal = await client.call("generate", {"message": "hi"})
            assert (refusal["code"], "requests a minute" in refusal["message"]) == (-32005, True)
            assert refusal["data"]["retry_after"] > 1


async def test_tasks_of_one_token_are_limited_over_its_sessions() -> None:
    settings = fakes.settings(drain_seconds=0.0, auth_tokens=TOKENS, max_tasks_per_token=1)
    async with open_server(settings, FakeModel([hang])) as server:
        first, second = [(await created(server))["session_id"] for _ in range(2)]
        headers = list(bearer(ALICE).items())
        async with (
            connected(server, first, extra_headers=headers) as one,
            connected(server, second, extra_headers=headers) as two,
        ):
            await Client(one, first).generate()
            refused = await Client(two, second).call("generate", {"message": "hi"})
            assert (refused["code"], "token" in refused["message"]) == (-32005, True)


async def test_the_log_names_the_token_and_never_shows_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    contexts: list[Any] = []

    async def note_context(receive: Any) -> None:
        contexts.append(dict(_context.get() or {}))
        await receive([])

    settings = fakes.settings(drain_seconds=0.0, auth_tokens=TOKENS)
    async with open_server(settings, FakeModel([note_context, *HELLO])) as server:
        answer = await created(server)
        async with connected(server, answer["session_id"], extra_headers=list(bearer(ALICE).items())) as socket:
            await Client(socket, answer["session_id"]).ask_model()
    assert [context["owner"] for context in contexts] == ["alice"]
    lines = [record.getMessage() for record in caplog.records if record.name.startswith(("inference", "hypercorn"))]
    assert lines
    assert not any(word in line for line in lines for word in (ALICE, answer["ticket"], answer["session_id"]))


# Pages


async def test_a_foreign_page_can_use_nothing() -> None:
    async with serving(auth_tokens={}) as server:
        session_id = await server.create_session()
        for response in (await server.post(headers=FOREIGN), await server.get("/openrpc.json", headers=FOREIGN)):
            assert response.status_code == 403
            assert "evil.example" in response.json()["error"]["message"]
            assert "access-control-allow-origin" not in response.headers
        assert await refusal(server, f"/ws/{session_id}", FOREIGN) == 403
        rebound = {"Origin": "http://rebound.example:8000", "Host": "rebound.example:8000"}
        assert (await server.post(headers=rebound)).status_code == 403


async def test_the_servers_own_pages_and_those_that_are_listed_may_use_it() -> None:
    async with serving(auth_tokens={}, allowed_origins=frozenset({"https://app.example"})) as server:
        session_id = await server.create_session()
        for origin in (server.url, "https://app.example", "https://APP.example"):
            response = await server.post(headers={"Origin": origin})
            assert response.status_code == 200
            assert response.headers["access-control-allow-origin"] == origin
            assert "origin" in response.headers["vary"].lower()
            async with connected(server, session_id, extra_headers=[("Origin", origin)]) as socket:
                assert (await Client(socket, session_id).call("cancel")) == {"cancelled": []}


async def test_a_preflight_is_answered_for_a_page_that_is_listed_without_a_token() -> None:
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    async with serving(allowed_origins=frozenset({"https://app.example"})) as server:
        answered = await server.request("OPTIONS", headers=asks | {"Origin": "https://app.example"})
        assert answered.status_code in (200, 204)
        assert "POST" in answered.headers["access-control-allow-methods"]
        assert "Authorization" in answered.headers["access-control-allow-headers"]
        assert (await server.request("OPTIONS", headers=asks | FOREIGN)).status_code == 403


async def test_every_response_tells_browsers_to_be_careful() -> None:
    async with serving() as server:
        session_id = (await created(server))["session_id"]
        for response in (
            await server.get("/healthz"),
            await server.post(),
            await server.get("/nowhere"),
            await server.post(headers=bearer(ALICE)),
            await refused_handshake(server, f"/ws/{session_id}", {}),
            await refused_handshake(server, f"/ws/{session_id}", FOREIGN),
            await refused_handshake(server, "/ws/nobody", bearer(ALICE)),
        ):
            assert response.headers["content-security-policy"] == CONTENT_SECURITY_POLICY
            assert response.headers["x-content-type-options"] == "nosniff"
            assert response.headers["referrer-policy"] == "no-referrer"
            assert response.headers["cache-control"] == "no-store"
            assert "server" not in response.headers
    assert "unsafe" not in CONTENT_SECURITY_POLICY


@pytest.mark.parametrize(("tokens", "lines"), [({}, 1), (TOKENS, 0)])
async def test_listening_to_strangers_without_tokens_is_warned_about(
    tokens: Any, lines: int, caplog: pytest.LogCaptureFixture
) -> None:

    access = Access.of(fakes.settings(auth_tokens=tokens))
    access.warn_of_strangers(["127.0.0.1:8000"])
    assert caplog.messages == []
    access.warn_of_strangers(["0.0.0.0:8000"])
    assert len([line for line in caplog.messages if "INFERENCE_AUTH_TOKENS" in line]) == lines
