"""What the server takes on: how large a body may be, and how many requests may come in.

Without limits a crowd is served later and later, and at last from swap. With them a request is refused while that is still
cheap: a body before it is parsed, a request before it is tokenised or holds a block. Who runs or waits already is not touched.

    --max-request-body-bytes    413, by Content-Length or as soon as a chunked body is found to be longer
    --max-num-queued-reqs       503 and Retry-After, so that clients come back (OpenAI's do by themselves)
    --max-num-queued-tokens     the same: 503, counted by the prompts that have no token of their answer yet
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minivllm.serve.errors import ApiError, error_response

DEFAULT_BODY_BYTES = 32 * 2**20
RETRY_AFTER_SECONDS = 1
BUSY = "The engine is currently busy and cannot accept new requests. Please try again later or on a different instance."
BACKLOG = ("The engine has reached its prefill token backlog limit. Please try again later or on a different instance.")


class BodyLimitMiddleware:
    """Answers 413 to a body of more than `max_bytes`. Plain ASGI: no more than that is ever held."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif self._declares_too_much(scope):
            await error_response(body_too_large(self.max_bytes))(scope, receive, send)
        else:
            await self.app(scope, self._counted(receive), send)

    def _declares_too_much(self, scope: Scope) -> bool:
        declared = Headers(scope=scope).get("content-length", "")
        return declared.isdecimal() and int(declared[:20]) > self.max_bytes  # int() refuses thousands of digits

    def _counted(self, receive: Receive) -> Receive:
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.max_bytes:  # FastAPI turns any other exception from here into a 400
                raise HTTPException(413, str(body_too_large(self.max_bytes)))
            return message

        return counted


def body_too_large(max_bytes: int) -> ApiError:
    return ApiError(f"The body is larger than the {max_bytes} bytes that this server takes: send less, or start it with a higher "
                    "--max-request-body-bytes.", status=413, param="body")


class BusyError(ApiError):
    """A request that may come again later; `reason` is the limit that was reached."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message, status=503, kind=HTTPStatus.SERVICE_UNAVAILABLE.phrase,
                         headers={"Retry-After": str(RETRY_AFTER_SECONDS)})
        self.reason = reason


class QueueLimit:
    """At most `max_reqs` requests run and wait together (vLLM: AsyncLLM.check_admission); one for n answers counts n times.

    And nobody comes in while prompts of `max_tokens` tokens or more, cached ones included, wait for their first token.
    Decided on the engine's thread, in the command that queues: no other can come between.
    """

    def __init__(self, max_reqs: int | None, max_tokens: int | None = None) -> None:
        self.max_reqs = max_reqs
        self.max_tokens = max_tokens
        self.num_coming = 0  # of bodies that are let in, and whose commands have not all run yet

    def check(self, core: Any, num_requests: int = 1) -> None:
        """Raise `BusyError` if so many more may not come now, `ApiError` (400) if they never may."""
        if self.max_reqs is not None:
            if num_requests > self.max_reqs:
                raise ApiError(f"{num_requests} answers at once are more than the {self.max_reqs} that may run and wait together "
                               "(max_num_queued_reqs): split the request", param="n")
            if len(core.scheduler.requests) + self.num_coming + num_requests > self.max_reqs:
                raise BusyError(BUSY, "max_num_queued_reqs")
        if self.max_tokens is not None and _num_queued_tokens(core.scheduler) >= self.max_tokens:
            raise BusyError(BACKLOG, "max_num_queued_tokens")


def _num_queued_tokens(scheduler: Any) -> int:
    """Prompt tokens of all requests that have no token of their answer. list() is one step for other threads."""
    return sum(request.num_prompt_tokens for request in list(scheduler.requests.values()) if not request.num_output_tokens)


class Entry:
    """One body's way in: its first request decides for all, and the others find their places kept. On the engine's thread."""

    def __init__(self, queue: QueueLimit, num_prompts: int, n: int) -> None:
        self.queue = queue
        self.num_requests = num_prompts * n
        self.n = n
        self.num_coming = 0
        self.refusal: ApiError | None = None
        self.has_begun = False

    def enter(self, core: Any) -> None:
        """Called before each prompt is queued. Raises `ApiError`, for every one of them if for the first."""
        if not self.has_begun:
            self.has_begun = True
            try:
                self.queue.check(core, self.num_requests)
            except ApiError as error:
                self.refusal = error
            else:
                self.num_coming = self.num_requests
                self.queue.num_coming += self.num_requests
        if self.refusal is not None:
            raise self.refusal
        self.num_coming -= self.n
        self.queue.num_coming -= self.n

    def leave(self, core: Any) -> None:
        """Give up the places of prompts that will not come after all: one was refused, or the client has left."""
        self.queue.num_coming -= self.num_coming
        self.num_coming = 0
