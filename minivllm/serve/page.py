"""The page at `/` and its parts: files from the package, and nothing from anywhere else.

They hold no secret, so they need no key; what the page then asks for does. The policy below lets the browser run and load only
these files, whatever text a model writes.
"""

from __future__ import annotations

import hashlib
import html
import importlib.resources
from collections.abc import Callable

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

INDEX = "index.html"
MEDIA_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
FOLDER = importlib.resources.files("minivllm.serve") / "static"
FILES = frozenset(file.name for file in FOLDER.iterdir())
PAGE_PATHS = frozenset({"/", *(f"/static/{name}" for name in FILES)})
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
                               "base-uri 'self'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # ask each time; the answer is mostly "not modified"
}
router = APIRouter(include_in_schema=False)


@router.get("/")
async def index(request: Request) -> Response:
    """The page; behind a proxy with its public path as the base of all its addresses, so that /llm works as /llm/ does."""
    root_path = request.scope.get("root_path", "")
    base = f'<head>\n  <base href="{html.escape(root_path)}/">' if root_path else "<head>"
    return _send(INDEX, request, lambda content: content.replace(b"<head>", base.encode(), 1))


@router.get("/static/{name}")
async def asset(name: str, request: Request) -> Response:
    if name not in FILES:
        raise HTTPException(404)
    return _send(name, request)


def _send(name: str, request: Request, change: Callable[[bytes], bytes] = bytes) -> Response:
    content = change((FOLDER / name).read_bytes())  # each time: who edits the page sees it on the next load
    tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    headers = {**HEADERS, "etag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=MEDIA_TYPES[name.rpartition(".")[2]], headers=headers)
