"""API keys: everything needs one when there are any, except what a monitor asks and the page that asks for the key.

A plain ASGI middleware, so that a refused request is answered before its body is read. vLLM guards /v1 only
(vllm/entrypoints/serve/middleware); here /tokenize and /docs need the key as well.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from minivllm.serve.errors import json_response
from minivllm.serve.page import PAGE_PATHS

OPEN_PATHS = frozenset({"/health", "/ping", "/version", "/metrics"}) | PAGE_PATHS


class ApiKeyMiddleware:
    """Answers 401 to a request without a valid `Authorization: Bearer KEY`."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self.app = app
        self.digests = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._may_pass(scope):
            await json_response({"error": "Unauthorized"}, 401)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _may_pass(self, scope: Scope) -> bool:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        # OPTIONS is a browser's preflight: it never carries a key
        return path in OPEN_PATHS or scope["method"] == "OPTIONS" or self._has_key(Headers(scope=scope))

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return False
        given = _digest(key)
        # Digests have one length, compare_digest takes one time, and no key is skipped: the clock tells nothing.
        return sum(secrets.compare_digest(given, known) for known in self.digests) > 0


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
