"""The routes, and the order of checks that decides which error wins.

    key -> size -> content type -> JSON and types -> fields -> model -> room -> prompt -> sampling -> engine

Everything up to the engine's admission happens before an answer begins, so whatever the user got wrong is an HTTP error, for a
stream too. The order is vLLM's.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, nullcontext
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from minivllm.serve import live, page
from minivllm.serve.answers import Answer
from minivllm.serve.auth import ApiKeyMiddleware
from minivllm.serve.chat import ChatAnswer
from minivllm.serve.completions import CompletionAnswer
from minivllm.serve.errors import ERROR_RESPONSES, ApiError, install_error_handlers, json_response
from minivllm.serve.http_metrics import HttpMetricsMiddleware
from minivllm.serve.limits import BodyLimitMiddleware
from minivllm.serve.protocol import Body, ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from minivllm.serve.sampling import chat_names, chat_params, completion_params
from minivllm.serve.service import Service
from minivllm.serve.streams import ClientGoneError, EventStream, race
from minivllm.version import __version__

router = APIRouter(responses=ERROR_RESPONSES)
CLIENT_CLOSED_REQUEST = 499  # nginx's code; it is sent to nobody and seen in the log only


def create_app(service: Service) -> FastAPI:
    """The ASGI application over one engine."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with service.metrics.log_line() if service.options.log_stats else nullcontext():
            yield
        service.close()

    app = FastAPI(title="minivllm", version=__version__, lifespan=lifespan)
    app.state.service = service
    install_error_handlers(app)
    app.add_middleware(BodyLimitMiddleware, max_bytes=service.options.max_request_body_bytes)
    if service.options.api_keys:  # what is added last is asked first
        app.add_middleware(ApiKeyMiddleware, keys=service.options.api_keys)
    routers = (router, page.router, live.router, live.control_router)
    paths = [getattr(route, "path", "") for each in routers for route in each.routes]
    app.add_middleware(HttpMetricsMiddleware, metrics=service.http_metrics, paths=paths)
    app.include_router(router)
    app.include_router(page.router)
    app.include_router(live.router)
    # JSON, though the bodies say nothing: a browser lets no foreign page send it
    app.include_router(live.control_router, dependencies=[Depends(require_json)])
    return app


def get_service(request: Request) -> Service:
    return request.app.state.service


async def require_json(request: Request) -> None:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise ApiError(f"the Content-Type must be application/json, got {media_type[:100] or 'none'}")


def begin(request: Request, body: Body) -> Service:
    """The checks that every POST starts with."""
    service = get_service(request)
    body.check(ignore_unknown=service.options.ignore_unknown_fields)
    service.check_model(body.model)
    service.check_admission()
    return service


@router.get("/health")
@router.get("/ping")
@router.post("/ping")
async def health(request: Request) -> Response:
    """200 while the engine answers; 503 once it has failed or the server is on its way out."""
    service = get_service(request)
    return Response(status_code=503 if service.engine.errored or service.is_draining else 200)


@router.get("/version")
async def version() -> Response:
    return json_response({"version": __version__})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """For Prometheus, and without a key, as for any monitor."""
    return Response(get_service(request).metrics.render(), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """One card per served name. `max_model_len` is vLLM's addition; benches and clients read it."""
    service = get_service(request)
    card = {"object": "model", "created": service.started, "owned_by": "minivllm", "root": service.options.model_root,
            "parent": None, "max_model_len": service.max_model_len}
    return json_response({"object": "list", "data": [{"id": name, **card} for name in service.options.served_model_names]})


@router.post("/v1/completions", dependencies=[Depends(require_json)])
async def completions(body: CompletionBody, request: Request) -> Response:
    service = begin(request, body)

    async def start() -> Answer:
        prompts = await service.reader.read_completion(body)
        params = completion_params(body, service.defaults, service.max_model_len)
        return await CompletionAnswer.admit(service, body, request.headers.get("x-request-id"), prompts, params)

    return await respond(request, start, stream=bool(body.stream))


@router.post("/v1/chat/completions", dependencies=[Depends(require_json)])
async def chat_completions(body: ChatBody, request: Request) -> Response:
    service = begin(request, body)

    async def start() -> Answer:
        prompt = await service.reader.read_chat(body)
        params = chat_params(body, service.defaults, service.max_model_len)
        with chat_names(body):  # the engine has limits of its own
            return await ChatAnswer.admit(service, body, request.headers.get("x-request-id"), [prompt], params)

    return await respond(request, start, stream=bool(body.stream))


async def respond(request: Request, start: Callable[[], Coroutine[Any, Any, Answer]], *, stream: bool) -> Response:
    """Admit, then answer; given up as soon as the client hangs up, which aborts the engine's requests."""
    service = get_service(request)
    service.check_queue()

    async def whole() -> dict[str, Any]:
        answer = await start()
        try:
            return await answer.whole()
        finally:
            answer.close()

    try:
        if not stream:
            return json_response(await race(whole(), request.receive, service.stopping))
        answer = await race(start(), request.receive, service.stopping)
        return EventStream(answer.chunks(), answer.close, service.stopping, push_to=answer.push_to,
                           keep_alive=service.options.sse_keep_alive_interval)
    except ClientGoneError:
        return Response(status_code=CLIENT_CLOSED_REQUEST)


@router.post("/tokenize", dependencies=[Depends(require_json)])
async def tokenize(body: TokenizeBody, request: Request) -> Response:
    """Token ids of a prompt, or of a conversation as the chat template renders it."""
    service = begin(request, body)
    tokens = await service.reader.read_tokenize(body)
    strings = service.tokenizer.convert_ids_to_tokens(tokens) if body.return_token_strs else None
    return json_response({"count": len(tokens), "max_model_len": service.max_model_len, "tokens": tokens,
                          "token_strs": strings})


@router.post("/detokenize", dependencies=[Depends(require_json)])
async def detokenize(body: DetokenizeBody, request: Request) -> Response:
    service = begin(request, body)
    service.reader.check_token_ids(body.tokens, "tokens")
    return json_response({"prompt": service.tokenizer.decode(body.tokens)})
