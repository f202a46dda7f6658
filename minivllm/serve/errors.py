"""What a client is told when something went wrong: one envelope, one table from exception to status.

    {"error": {"message": "...", "type": "NotFoundError", "param": "model", "code": 404}}

The shape and the types are vLLM's (vllm/entrypoints/serve/exception_handling), so that clients written for it read them.
The two bodies outside the envelope are vLLM's as well: {"error": "Unauthorized"} (auth.py) and FastAPI's {"detail": ...}
for an unknown path or method.
"""

from __future__ import annotations

import json
import logging
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exception_handlers import http_exception_handler
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from minivllm.exceptions import EngineDeadError, ValidationError

logger = logging.getLogger("minivllm.serve")

ERROR_TYPES = {
    400: "BadRequestError",
    404: "NotFoundError",
    413: "ContentTooLargeError",
    500: "InternalServerError",
    501: "NotImplementedError",
    503: "ServiceUnavailableError",
}
MAX_LISTED_ERRORS = 10
MAX_SHOWN_INPUT = 200


class ErrorFields(BaseModel):
    """What an error tells."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorBody(BaseModel):
    """The envelope of every error but a missing key and an unknown path."""

    error: ErrorFields


class Unauthorized(BaseModel):
    """The body of a 401."""

    error: str


# For the OpenAPI document. Without "default" FastAPI would write of a 422, which this server never sends.
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "The body or one of its fields is wrong: `param` names it"},
    401: {"model": Unauthorized, "description": "The server has keys and the request carries none of them"},
    "default": {"model": ErrorBody, "description": "404 unknown model, 413 body too large, 500 failure, 503 busy or shutting down"},
}


class ApiError(Exception):
    """An answer that is an error. `param` names the field at fault."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, kind: str | None = None,
                 headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.kind = kind or ERROR_TYPES[status]
        self.headers = headers

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.status}}


def to_api_error(error: BaseException) -> ApiError:
    """The answer to any exception. Only messages that were written for the user are shown to one."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValidationError):
        return ApiError(str(error), param=error.parameter)
    if isinstance(error, NotImplementedError):
        return ApiError(str(error), status=501)
    if isinstance(error, RecursionError):
        return ApiError("the body is nested too deeply")
    if isinstance(error, EngineDeadError):
        return ApiError("The engine has stopped and answers no more requests.", status=500)
    return ApiError("Internal server error", status=500)


def describe_body_errors(error: RequestValidationError) -> ApiError:
    """pydantic's findings as one message. 400, where FastAPI would say 422: vLLM and OpenAI say 400."""
    found = error.errors()
    lines = []
    for entry in found[:MAX_LISTED_ERRORS]:
        is_json = entry["type"] != "json_invalid"
        where = ".".join(map(str, entry["loc"])) if is_json else f"body at character {entry['loc'][-1]}"
        reason = entry.get("ctx", {}).get("error", entry["msg"])
        shown = f", got {_shorten(entry.get('input'))}" if is_json and entry["type"] != "missing" else ""
        lines.append(f"{where}: {reason}{shown}")
    first = found[0]["loc"]
    is_field = len(first) > 1 and isinstance(first[1], str)
    message = f"{len(found)} validation error{'s' if len(found) > 1 else ''}: " + "; ".join(lines)
    return ApiError(message, param=f"{first[0]}.{first[1]}" if is_field else "body", kind=HTTPStatus.BAD_REQUEST.phrase)


def _shorten(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= MAX_SHOWN_INPUT else shown[:MAX_SHOWN_INPUT] + "..."


ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))  # json.dumps would make one for every call


def to_json(content: Any) -> bytes:
    """Compact UTF-8. A lone surrogate, which JSON allows in a request and UTF-8 does not in an answer, becomes `?`."""
    return ENCODER.encode(content).encode("utf-8", "replace")


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(content), status_code=status, headers=headers, media_type="application/json")


def error_response(error: BaseException) -> Response:
    answer = to_api_error(error)
    return json_response(answer.body(), answer.status, answer.headers)


def install_error_handlers(app: FastAPI) -> None:
    """Every way out of a handler ends in the envelope."""

    async def on_error(request: Request, error: Exception) -> Response:
        return error_response(error)

    async def on_bad_body(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError), "registered for this class only"
        return error_response(describe_body_errors(error))

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException), "registered for this class only"
        if error.status_code == 400:  # FastAPI gave up on a body: it is no UTF-8, or nested too deeply
            return error_response(ApiError(str(error.detail), param="body", kind=HTTPStatus.BAD_REQUEST.phrase))
        if error.status_code == 413:  # found while the body was read
            return error_response(ApiError(str(error.detail), status=413, param="body"))
        return await http_exception_handler(request, error)  # unknown paths and methods keep {"detail": ...}

    for kind in (ApiError, ValidationError, NotImplementedError, RecursionError, EngineDeadError, Exception):
        app.add_exception_handler(kind, on_error)
    app.add_exception_handler(RequestValidationError, on_bad_body)
    app.add_exception_handler(HTTPException, on_http_error)
