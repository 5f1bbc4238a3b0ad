"""The FastAPI application: routes, and every error in OpenAI's shape.

`create_app` is called by the server (server.py) and by tests. Bodies are read by hand: bounded
while they are read, and their faults are 400 in OpenAI's shape, not the framework's 422.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...common.errors import RequestError
from .api_keys import KeyRing, RequireKey
from .call_response import CallResponse, error_headers
from .cluster_view import cluster_view
from .openai_requests import BodyT, ChatBody, CompletionBody, parse, schema_components
from .openai_responses import ChatCompletion, Completion, ErrorBody, error_body
from .render import Renderer
from .service import FrontService

BODY_TIMEOUT_S = 60.0
"""A body that has not arrived by then is answered 408."""
INLINE_BYTES = 64 * 1024
"""Larger bodies are parsed on a worker thread."""

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 404, 413, 429, 503)
}


def create_app(service: FrontService, api_keys: Sequence[str] = ()) -> FastAPI:
    """Returns the application that serves `service`; with `api_keys`, only to who has one."""
    app = FastAPI(title="tidepool", version=_version(), docs_url=None, redoc_url=None)
    _add_inference(app, service)
    _add_observation(app, service)
    _add_error_handlers(app)
    _complete_openapi(app)
    if api_keys:
        app.add_middleware(RequireKey, keys=KeyRing(api_keys))
    app.add_middleware(_CountAnswers, service=service)
    return app


def _add_inference(app: FastAPI, service: FrontService) -> None:
    @app.post(
        "/v1/completions",
        openapi_extra=_body_of(CompletionBody),
        response_model=None,
        responses={200: {"model": Completion}, **_ERRORS},
    )
    async def completions(request: Request) -> Response:
        """Completes prompts: text, texts, token ids or lists of token ids."""

        async def prepare(raw: bytes) -> Renderer:
            return await service.prepare_completion(await _parse(service, raw, CompletionBody))

        return await _serve(service, request, prepare)

    @app.post(
        "/v1/chat/completions",
        openapi_extra=_body_of(ChatBody),
        response_model=None,
        responses={200: {"model": ChatCompletion}, **_ERRORS},
    )
    async def chat_completions(request: Request) -> Response:
        """Answers a conversation."""

        async def prepare(raw: bytes) -> Renderer:
            return await service.prepare_chat(await _parse(service, raw, ChatBody))

        return await _serve(service, request, prepare)


def _add_observation(app: FastAPI, service: FrontService) -> None:
    def model_card() -> dict[str, Any]:
        return {
            "id": service.model.name,
            "object": "model",
            "created": service.created,
            "owned_by": "tidepool",
            "max_model_len": service.context_limit,
        }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_card()]}

    @app.get("/v1/models/{name:path}", responses={404: {"model": ErrorBody}})
    async def model(name: str) -> dict[str, Any]:
        if name != service.model.name:
            raise RequestError(
                f"the model {name[:200]!r} does not exist", status=404, code="model_not_found"
            )
        return model_card()

    @app.get("/health", responses={503: {"description": "Not ready; the body says why."}})
    async def health() -> JSONResponse:
        """200 if requests can be served now."""
        missing = service.missing_roles
        if service.slots.is_closed:
            body, status = {"status": "draining", "missing": missing}, 503
        elif missing:
            body, status = {"status": "unavailable", "missing": missing}, 503
        else:
            body, status = {"status": "ok", "missing": []}, 200
        return JSONResponse(body, status, {"retry-after": "1"} if status == 503 else None)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus text format."""
        content_type = "text/plain; version=0.0.4; charset=utf-8"
        return Response(service.render_metrics(), media_type=content_type)

    @app.get("/cluster")
    async def cluster() -> dict[str, Any]:
        """The nodes as this front sees them; `tidepool status` shows it."""
        return cluster_view(service)


def _add_error_handlers(app: FastAPI) -> None:
    def answer(error: RequestError, headers: dict[str, str] | None = None) -> JSONResponse:
        return JSONResponse(
            error_body(error), error.status, {**error_headers(error), **(headers or {})}
        )

    @app.exception_handler(RequestError)
    async def on_request_error(_: Request, error: RequestError) -> JSONResponse:
        is_unread = error.status in (408, 413, 429, 503)
        return answer(error, {"connection": "close"} if is_unread else None)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        texts = {
            404: f"there is no {request.url.path[:200]}",
            405: f"{request.url.path[:200]} does not take {request.method}",
        }
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        text = texts.get(error.status_code, str(error.detail))
        wrapped = RequestError(text, status=error.status_code, code=code)
        return answer(wrapped, dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def on_fault(_: Request, error: Exception) -> JSONResponse:
        return answer(RequestError("internal error", status=500, code="internal_error"))


async def _serve(service: FrontService, request: Request, prepare: Callable[..., Any]) -> Response:
    """Reads and checks a body under a slot; the answer takes the slot over."""
    slot = service.slots.admit()
    try:
        renderer: Renderer = await prepare(await _read_body(request, service))
        slot.grow(len(renderer.call.choices))
    except ClientDisconnect:
        slot.release()
        return Response(status_code=400)  # nobody reads it
    except BaseException:
        slot.release()
        raise
    return CallResponse(service, renderer, slot)


async def _read_body(request: Request, service: FrontService) -> bytes:
    """Reads at most front.max_body_bytes, whatever the headers say."""
    limit = service.config.front.max_body_bytes
    too_large = RequestError(
        f"the body is larger than {limit} bytes", status=413, code="body_too_large"
    )
    declared = request.headers.get("content-length", "")
    if len(declared) > 18 or (declared.isdecimal() and int(declared) > limit):
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for piece in request.stream():
                body += piece
                if len(body) > limit:
                    raise too_large
    except TimeoutError as error:
        raise RequestError("the body did not arrive", status=408, code="timeout") from error
    return bytes(body)


async def _parse(service: FrontService, raw: bytes, shape: type[BodyT]) -> BodyT:
    if len(raw) <= INLINE_BYTES:
        return parse(raw, shape)
    return await service.in_thread(lambda: parse(raw, shape))


def _version() -> str:
    try:
        return metadata.version("tidepool")
    except metadata.PackageNotFoundError:
        return "unknown"


def _body_of(shape: type[CompletionBody | ChatBody]) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{shape.__name__}"}
    content = {"application/json": {"schema": schema}}
    return {"requestBody": {"required": True, "content": content}}


def _complete_openapi(app: FastAPI) -> None:
    """Adds the schemas of the bodies we read by hand to the OpenAPI document."""
    document = app.openapi()
    document.setdefault("components", {}).setdefault("schemas", {}).update(schema_components())


class _CountAnswers:
    """Counts answers by route and status; unknown paths share one label."""

    def __init__(self, app: ASGIApp, service: FrontService) -> None:
        self._app = app
        self._counter = service.metrics.http_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path_format", "other")
                self._counter.labels(route, str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, counting)
