"""Tokens, tickets and origins, decided without a network."""

from __future__ import annotations

from typing import Any

import pytest

from inference_trio.access import TICKET_LIFETIME, Access, Owner, Ticket, is_loopback, ticket_among
from inference_trio.errors import OverloadedError
from inference_trio.settings import Settings

ALICE, BOB = "alice-0123456789abcdef", "bob:0123456789abcdef"


def access(**variables: str) -> Access:
    return Access.of(Settings.load({"LLM_PROVIDER": "local", **variables}, dotenv=None))


def with_tokens(**variables: str) -> Access:
    return access(INFERENCE_AUTH_TOKENS=f"alice:{ALICE}, bob:{BOB}", **variables)


@pytest.mark.parametrize(
    ("authorization", "name"),
    [
        (f"Bearer {ALICE}", "alice"),
        (f"bearer  {BOB} ", "bob"),
        (f"Basic {ALICE}", None),
        (ALICE, None),
        (f"Bearer {ALICE}x", None),
        (f"Bearer {ALICE[:-1]}", None),
        ("Bearer", None),
        ("Bearer ", None),
        ("", None),
        ("Bearer \udcff", None),
        (None, None),
    ],
)
def test_a_token_names_its_owner(authorization: str | None, name: str | None) -> None:
    owner = with_tokens().owner_of(authorization)
    assert (owner and owner.name) == name


def test_without_tokens_everybody_is_the_same_owner() -> None:
    open_to_all = access()
    assert open_to_all.owner_of(None) is open_to_all.owner_of("Bearer whatever") is open_to_all.anyone
    assert open_to_all.anyone.name is None


def test_every_token_has_limits_of_its_own() -> None:
    limited = with_tokens(
        INFERENCE_MAX_SESSIONS_PER_TOKEN="3", INFERENCE_MAX_TASKS_PER_TOKEN="2", INFERENCE_REQUESTS_PER_MINUTE="1"
    )
    alice, bob = limited.owner_of(f"Bearer {ALICE}"), limited.owner_of(f"Bearer {BOB}")
    assert alice
    assert bob
    assert (alice.max_sessions, alice.max_tasks, alice.requests_per_minute) == (3, 2, 1)
    alice.spend_request(0.0)
    bob.spend_request(0.0)
    with pytest.raises(OverloadedError):
        alice.spend_request(0.0)


def test_a_minutes_requests_may_come_at_once_and_then_come_back_evenly() -> None:
    owner = Owner("a", requests_per_minute=6)
    for _ in range(6):
        owner.spend_request(100.0)
    with pytest.raises(OverloadedError) as refused:
        owner.spend_request(104.0)
    assert refused.value.data["retry_after"] == pytest.approx(6.0)
    owner.spend_request(110.0)
    with pytest.raises(OverloadedError):
        owner.spend_request(110.0)
    for _ in range(6):
        owner.spend_request(1000.0)
    with pytest.raises(OverloadedError):
        owner.spend_request(1000.0)


def test_a_ticket_is_good_for_a_minute_and_nothing_else_is() -> None:
    text, ticket = Ticket.issue(now=10.0)
    assert ticket.is_good(text, 10.0 + TICKET_LIFETIME - 0.001)
    assert not ticket.is_good(text, 10.0 + TICKET_LIFETIME)
    assert not ticket.is_good(text + "x", 10.0)
    assert not ticket.is_good("", 10.0)
    assert len(text) >= 32
    assert text not in repr(ticket)


@pytest.mark.parametrize(
    ("subprotocols", "ticket"),
    [
        ([], None),
        (["inference-trio"], None),
        (["inference-trio", "ticket.abc"], "abc"),
        (["ticket.a", "ticket.b"], "a"),
    ],
)
def test_a_ticket_is_found_among_the_subprotocols(subprotocols: list[str], ticket: str | None) -> None:
    assert ticket_among(subprotocols) == ticket


OWN = [
    ("http://127.0.0.1:8000", "127.0.0.1:8000"),
    ("http://localhost:8000", "localhost:8000"),
    ("http://[::1]:8000", "[::1]:8000"),
    ("http://10.1.2.3", "10.1.2.3"),
    ("https://10.1.2.3", "10.1.2.3:443"),
]
FOREIGN = [
    ("http://127.0.0.1:3000", "127.0.0.1:8000"),
    ("http://localhost:8000", "127.0.0.1:8000"),
    ("https://evil.example", "127.0.0.1:8000"),
    ("http://127.0.0.1.evil.example:8000", "127.0.0.1:8000"),
    ("null", "127.0.0.1:8000"),
    ("", ""),
    ("http://", ""),
    ("http://[", "["),
    ("http://x:99999", "x:99999"),
]


@pytest.mark.parametrize(("origin", "host"), OWN)
def test_a_page_of_the_server_itself_is_admitted(origin: str, host: str) -> None:
    assert access().admits(origin, host)


@pytest.mark.parametrize(("origin", "host"), FOREIGN)
def test_a_page_from_elsewhere_is_not(origin: str, host: str) -> None:
    assert not access().admits(origin, host)
    assert not with_tokens().admits(origin, host)


def test_a_name_that_others_may_point_here_is_the_servers_own_only_with_a_token() -> None:
    assert not access().admits("http://rebound.example:8000", "rebound.example:8000")
    assert with_tokens().admits("http://rebound.example:8000", "rebound.example:8000")
    listed = access(INFERENCE_ALLOWED_ORIGINS="https://Chat.example/, http://localhost:3000")
    assert listed.admits("https://chat.example", "10.0.0.1:8000")
    assert listed.admits("http://localhost:3000", "127.0.0.1:8000")
    assert not listed.admits("http://chat.example", "10.0.0.1:8000")


def test_a_listed_origin_may_name_the_port_that_browsers_leave_out() -> None:
    listed = access(
        INFERENCE_ALLOWED_ORIGINS="https://a.example:443, http://b.example:80, https://c.example:80, http://[::1]:80"
    )
    assert listed.origins == {"https://a.example", "http://b.example", "https://c.example:80", "http://[::1]"}


def test_a_page_without_tls_is_not_of_a_server_with_it() -> None:
    assert access().admits("https://10.1.2.3", "10.1.2.3", is_tls=True)
    assert not access().admits("http://10.1.2.3", "10.1.2.3", is_tls=True)
    assert access().admits("https://10.1.2.3", "10.1.2.3"), "a proxy may speak TLS for it"


@pytest.mark.parametrize(
    ("bind", "expected"),
    [
        ("127.0.0.1:8000", True),
        ("127.3.2.1:80", True),
        ("localhost:8000", True),
        ("[::1]:8000", True),
        ("unix:/run/x.sock", True),
        ("fd://3", True),
        ("0.0.0.0:8000", False),
        ("[::]:8000", False),
        ("10.0.0.1:80", False),
        ("example.com:80", False),
        ("0.0.0.0", False),
    ],
)
def test_loopback_is_told_from_the_rest(bind: str, expected: Any) -> None:
    assert is_loopback(bind) is expected
