"""Who may use the server: tokens with what each may take, one-time tickets, and the pages a browser may come from.

A program authenticates with a bearer token (RFC 6750). A browser cannot set a header on a WebSocket handshake; its
page gets a ticket instead, which is good for one handshake within `TICKET_LIFETIME` and so may pass through places
where a token must not be. Only digests are kept: what is looked up or compared is never the secret itself, so that
the time it takes says nothing about it.

A browser names the page that a request comes from (``Origin``, RFC 6454, section 7). A page is let in if it is named
in the settings or came from this server itself. "Itself" is what the ``Host`` header says, and that is the browser's
word for a name which somebody else's name server may have pointed here (DNS rebinding). So without tokens only
addresses and ``localhost`` count as the server's own.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import secrets
from collections.abc import Iterable, Mapping
from urllib.parse import urlsplit

import attrs

from .errors import OverloadedError
from .settings import Settings

TICKET_LIFETIME = 60.0
"""Seconds."""

SUBPROTOCOL = "inference-trio"
"""What the server speaks on a WebSocket; an entry ``ticket.<ticket>`` beside it in the client's list is a ticket."""

logger = logging.getLogger(__name__)

_TICKET_PREFIX = "ticket."
_DEFAULT_PORTS = {"http": 80, "https": 443}


@attrs.define(eq=False)
class Owner:
    """Whoever a token was given to, with what they hold and how much of it they may. ``None`` is no limit.

    ``name`` stands in the log in place of the token. Where no token is asked for, there is one owner without a name.
    """

    name: str | None
    max_sessions: int | None = None
    max_tasks: int | None = None
    requests_per_minute: int | None = None
    sessions: int = 0
    running: int = 0
    _spent: float = 0.0
    _spent_at: float = 0.0

    @property
    def too_many_requests(self) -> str:
        return f"There may be {self.requests_per_minute} requests a minute"

    def spend_request(self, now: float) -> None:
        """Counts a request at ``now`` (seconds). Raises OverloadedError where it is one too many.

        As many as a minute's worth may come at once; what was spent comes back evenly.
        """
        if self.requests_per_minute is None:
            return
        rate = self.requests_per_minute / 60
        spent = max(0.0, self._spent - (now - self._spent_at) * rate)
        if spent + 1 > self.requests_per_minute:
            raise OverloadedError(self.too_many_requests, retry_after=(spent + 1 - self.requests_per_minute) / rate)
        self._spent, self._spent_at = spent + 1, now


@attrs.frozen
class Ticket:
    """``expires`` is in seconds, on the clock of whoever issued it."""

    digest: bytes
    expires: float

    @classmethod
    def issue(cls, now: float) -> tuple[str, Ticket]:
        """A new ticket's text, and what is to be kept of it."""
        text = secrets.token_urlsafe(24)
        return text, cls(digest(text), now + TICKET_LIFETIME)

    def is_good(self, text: str, now: float) -> bool:
        return hmac.compare_digest(self.digest, digest(text)) and now < self.expires


def ticket_among(subprotocols: list[str]) -> str | None:
    """The ticket in a handshake's list of subprotocols, if there is one."""
    tickets = (entry.removeprefix(_TICKET_PREFIX) for entry in subprotocols if entry.startswith(_TICKET_PREFIX))
    return next(tickets, None)


@attrs.frozen
class Access:
    """``owners`` by the digest of their token; without any, no token is asked for."""

    owners: Mapping[bytes, Owner]
    origins: frozenset[str]
    anyone: Owner = attrs.field(factory=lambda: Owner(None))

    @classmethod
    def of(cls, settings: Settings) -> Access:
        owners = {
            digest(token.reveal()): Owner(
                name,
                max_sessions=settings.max_sessions_per_token,
                max_tasks=settings.max_tasks_per_token,
                requests_per_minute=settings.requests_per_minute,
            )
            for name, token in settings.auth_tokens.items()
        }
        return cls(owners, settings.allowed_origins)

    @property
    def needs_token(self) -> bool:
        return bool(self.owners)

    def warn_of_strangers(self, binds: Iterable[str]) -> None:
        """Called with where the server is going to listen, in Hypercorn's form."""
        reachable = [bind for bind in binds if not is_loopback(bind)]
        if reachable and not self.needs_token:
            where = ", ".join(reachable)
            logger.warning("whoever reaches %s can use the model: INFERENCE_AUTH_TOKENS would ask for a token", where)

    def owner_of(self, authorization: str | None) -> Owner | None:
        """Whose token an ``Authorization`` header carries; ``None`` where a token is asked for and it has none."""
        if not self.needs_token:
            return self.anyone
        scheme, _, token = (authorization or "").partition(" ")
        return self.owners.get(digest(token.strip())) if scheme.lower() == "bearer" else None

    def owner_named(self, name: str) -> Owner | None:
        """The owner of this name, empty where no token is asked for; ``None`` where there is no such token any more."""
        owners = self.owners.values() if self.needs_token else (self.anyone,)
        return next((owner for owner in owners if (owner.name or "") == name), None)

    def admits(self, origin: str, host: str, *, is_tls: bool = False) -> bool:
        """Whether a page from ``origin`` may use the server that it reached as ``host``.

        Where this server speaks TLS itself, only a page that came by TLS is its own. Else both kinds are: a proxy in
        front may speak TLS, and what it says of that (``X-Forwarded-Proto``) anybody could say.
        """
        if origin in self.origins:
            return True
        page = _address(origin)
        is_own = (
            page is not None
            and (origin.startswith("https:") or not is_tls)
            and page == _address(f"{urlsplit(origin).scheme}://{host}")
        )
        return is_own and (self.needs_token or is_unmistakable(page[0] if page else ""))


def is_loopback(bind: str) -> bool:
    """Whether only this machine reaches what listens at ``bind`` (in Hypercorn's form: ``host:port``, ``unix:…``)."""
    host = bind.rpartition(":")[0].strip("[]") or bind
    if bind.startswith(("unix:", "fd:")):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_unmistakable(hostname: str) -> bool:
    """Whether no name server has a say in where this leads: an address, or ``localhost``."""
    try:
        ipaddress.ip_address(hostname)
    except ValueError:
        return hostname == "localhost" or hostname.endswith(".localhost")
    return True


def _address(url: str) -> tuple[str, int | None] | None:
    try:
        parts = urlsplit(url)
        port = parts.port or _DEFAULT_PORTS.get(parts.scheme)
    except ValueError:
        return None
    return (parts.hostname, port) if parts.hostname else None


def digest(secret: str) -> bytes:
    """What is kept of a secret."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()
