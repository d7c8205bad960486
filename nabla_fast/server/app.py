"""The routes: OpenAI's, `/health` and `/metrics`."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import monotonic, time
from typing import Any

import fastapi
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nabla_fast.server.answering import Answering
from nabla_fast.server.asks import RequestError
from nabla_fast.server.engine import Engine
from nabla_fast.server.metrics import Metrics
from nabla_fast.server.names import method_of, model_names
from nabla_fast.server.protocol import Served, read_request

# More than any context holds. Prompts are read by the thread that decodes, which should not take long.
_MOST_BYTES = 2**22
_ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics")
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


def create_app(
    engine: Engine, served: Served, *, timeout: float = 600.0, api_key: str | None = None
) -> fastapi.FastAPI:
    """The application that answers requests with ``engine``, which it closes at its end.

    Args:
        timeout: seconds that a request may take, in the queue and under way.
        api_key: what the routes under ``/v1`` ask for as a bearer token; None asks for nothing.
    """
    metrics = Metrics(engine)

    @asynccontextmanager
    async def lifespan(_: fastapi.FastAPI) -> AsyncIterator[None]:
        yield
        engine.close()

    # No pages of documentation: they would load scripts from elsewhere.
    app = fastapi.FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_Watch, metrics=metrics, authorized=_authorizer(api_key))
    started = int(time())

    async def answer(request: fastapi.Request, *, chat: bool) -> Response:
        asked = read_request(await _json(request), served, chat=chat)
        return await Answering(engine, metrics, request, asked, timeout).response()

    @app.post("/v1/chat/completions")
    async def chat_completions(request: fastapi.Request) -> Response:
        return await answer(request, chat=True)

    @app.post("/v1/completions")
    async def completions(request: fastapi.Request) -> Response:
        return await answer(request, chat=False)

    def card(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": started, "owned_by": "nabla_fast"}

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [card(name) for name in model_names(served.name)]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        method_of(name, served.name)
        return JSONResponse(card(name))

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=200 if engine.alive else 503)

    @app.get("/metrics")
    async def metrics_text() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.exception_handler(RequestError)
    async def refuse(_: fastapi.Request, error: RequestError) -> Response:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def unknown(request: fastapi.Request, error: HTTPException) -> Response:
        told = f"{request.method} {request.url.path}: {error.detail}"
        return await refuse(request, RequestError(told, headers=error.headers, status=error.status_code))

    @app.exception_handler(Exception)
    async def broken(request: fastapi.Request, error: Exception) -> Response:
        # A mistake of ours, which is logged, too.
        return await refuse(request, RequestError(f"the server made a mistake: {type(error).__name__}", status=500))

    return app


@dataclass
class _Watch:
    """ASGI middleware for what every request passes, the API key and the counters; it leaves streams as they are.

    Attributes:
        app: what is watched.
        metrics: hears of each request when its answer has been sent.
        authorized: says of an Authorization header whether requests under ``/v1`` may pass.
    """

    app: ASGIApp
    metrics: Metrics
    authorized: Callable[[bytes], bool]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, path, method = monotonic(), scope["path"], scope["method"]
        # Only names that are known, or anybody could have the counters grow without end.
        route = path if path in _ROUTES else "/v1/models/{name}" if path.startswith("/v1/models/") else "other"
        status = 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        app = self.app
        if path.startswith("/v1") and not self.authorized(dict(scope["headers"]).get(b"authorization", b"")):
            error = RequestError(
                "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                status=401,
            )
            app = JSONResponse(error.body(), error.status, {"WWW-Authenticate": "Bearer"})
        try:
            await app(scope, receive, noted)
        finally:
            self.metrics.requests.labels(route, method if method in _METHODS else "other", str(status)).inc()
            self.metrics.seconds.labels(route).observe(monotonic() - began)


def _authorizer(api_key: str | None) -> Callable[[bytes], bool]:
    """Whether a request with an Authorization header may pass; the comparison takes the same time for every key."""
    if api_key is None:
        return lambda _: True
    # Digests have one length, whatever the keys'.
    expected = hashlib.sha256(f"Bearer {api_key}".encode()).digest()
    return lambda given: secrets.compare_digest(hashlib.sha256(given).digest(), expected)


async def _json(request: fastapi.Request) -> Any:
    """The body of a request.

    Raises:
        RequestError: if it is no JSON, or too long.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # A page in a browser may send other types to any server, without asking first.
        raise RequestError(f"the Content-Type must be application/json, got {kind!r}", status=415)
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > _MOST_BYTES:
            raise RequestError(f"the body must have at most {_MOST_BYTES} bytes", status=413)
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is no JSON: {error}") from error
