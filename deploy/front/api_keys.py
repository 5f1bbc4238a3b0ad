"""API keys: who may call the front. ASGI middleware, on the server's loop.

With keys, every path but /health needs `Authorization: Bearer KEY`; /metrics and /cluster tell what
the cluster does, so they need one too. Comparing takes the same time whichever key is right and
however much of a wrong one is, for all keys are compared, by their digests.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Sequence

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from ...common.errors import RequestError
from .openai_responses import error_body

OPEN_PATHS = frozenset({"/health"})


class KeyRing:
    """The digests of the keys, salted anew in each process."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._salt = secrets.token_bytes(32)
        self._digests = [self._digest(key.encode()) for key in keys]

    def fits(self, key: bytes) -> bool:
        digest, fits = self._digest(key), False
        for known in self._digests:
            fits |= hmac.compare_digest(digest, known)
        return fits

    def _digest(self, key: bytes) -> bytes:
        return hashlib.blake2b(key, key=self._salt, digest_size=32).digest()


class RequireKey:
    """Answers 401 in OpenAI's shape, without reading the body, unless a call has a key that fits."""

    def __init__(self, app: ASGIApp, keys: KeyRing) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_checked = scope["type"] == "http" and scope["path"] not in OPEN_PATHS
        fault = self._fault(Headers(scope=scope)) if is_checked else None
        if fault is None:
            await self._app(scope, receive, send)
            return
        error = RequestError(fault, status=401, code="invalid_api_key")
        headers = {"www-authenticate": "Bearer", "connection": "close"}
        await JSONResponse(error_body(error), 401, headers)(scope, receive, send)

    def _fault(self, headers: Headers) -> str | None:
        """Why a call is refused, or None."""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            return "this front needs an API key: send the header Authorization: Bearer KEY"
        if not self._keys.fits(key.strip().encode("latin-1")):
            return "incorrect API key"
        return None
