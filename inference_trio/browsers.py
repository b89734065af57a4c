"""What the server tells browsers, and asks of them: whose pages may use it, and what its own page may do.

CORS (Fetch standard, section 3.2) only keeps a foreign page from reading an answer, and a WebSocket is not subject to
it at all; so a request that names a foreign page is refused before it does anything. The headers are those of OWASP's
HTTP Headers Cheat Sheet, less Strict-Transport-Security, which is for whoever terminates TLS.
"""

from __future__ import annotations

import attrs
from quart import Response, request, websocket
from werkzeug.datastructures import Headers
from werkzeug.exceptions import Forbidden

from .access import Access

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)

_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-store",
}
_CORS_HEADERS = {
    "Access-Control-Allow-Methods": "GET, POST",
    "Access-Control-Allow-Headers": "Authorization, Content-Type",
    "Access-Control-Expose-Headers": "Retry-After",
    "Access-Control-Max-Age": "600",
}


@attrs.frozen
class BrowserRules:
    """To be called by Quart around each request, and before each handshake."""

    _access: Access

    async def before_request(self) -> None:
        self._refuse_foreign_page(request.headers, request.scheme)

    async def before_websocket(self) -> None:
        self._refuse_foreign_page(websocket.headers, websocket.scheme)

    async def after_websocket(self, response: Response | None) -> Response | None:
        """A handshake that is refused has a response, one that is accepted has none."""
        return response and self._protected(response)

    async def after_request(self, response: Response) -> Response:
        self._protected(response)
        response.vary.add("Origin")
        if self._page_is_admitted(request.headers, request.scheme):
            response.headers.update(_CORS_HEADERS)
            response.headers["Access-Control-Allow-Origin"] = request.headers["Origin"]
        return response

    def _protected(self, response: Response) -> Response:
        for name, value in _HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    def _refuse_foreign_page(self, headers: Headers, scheme: str) -> None:
        if self._page_is_admitted(headers, scheme) is False:
            origin = headers["Origin"][:200]
            raise Forbidden(
                f"Pages from {origin} may not use this server; INFERENCE_ALLOWED_ORIGINS names those that may"
            )

    def _page_is_admitted(self, headers: Headers, scheme: str) -> bool | None:
        """``None`` where no page is named: then it is no browser, or nothing that a page could misuse."""
        origin = headers.get("Origin")
        is_tls = scheme in ("https", "wss")
        return None if origin is None else self._access.admits(origin.lower(), headers.get("Host", ""), is_tls=is_tls)
