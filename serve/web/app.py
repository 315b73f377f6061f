"""The HTTP application in front of a service: its routes, its door, its OpenAPI schema.

| route | answers |
|---|---|
| POST /v1/completions, /v1/chat/completions; GET /v1/models | as OpenAI's API |
| POST /generate, /generate/stream | as PAI-EAS |
| GET /model | what the model is |
| GET, HEAD /healthz, /readyz | whether the engine goes on; whether it takes requests |
"""

from typing import Any

import pydantic
from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi

from gptmoe.errors import Unavailable
from serve.access_log import AccessLog
from serve.service import ModelCard, Service

from . import chat, completions, eas
from .answers import PlainRefusal, refusals
from .door import MAX_BODY_BYTES, OPEN, Door, Keys
from .logged import Logged
from .openai import models_router
from .refusals import install


class Health(pydantic.BaseModel):
    """All is well."""

    status: str = "ok"


def build(
    service: Service,
    stall_s: float,
    keys: Keys | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
    log: AccessLog | None = None,
) -> FastAPI:
    """The application; unhealthy after a step of `stall_s` seconds, open to all without `keys`."""
    app = _Application(keyed=keys is not None)
    install(app)
    for part in (completions.router(service), chat.router(service), models_router(service)):
        app.include_router(part, prefix="/v1", tags=["OpenAI"])
    app.include_router(eas.router(service), tags=["EAS"])
    app.include_router(_about(service, stall_s), tags=["server"])
    app.add_middleware(Door, keys=keys, max_body_bytes=max_body_bytes)
    if log:
        app.add_middleware(Logged, log=log)  # the last one added is the outermost
    return app


class _Application(FastAPI):
    """FastAPI whose schema says what this application answers, and no more."""

    def __init__(self, keyed: bool) -> None:
        self._keyed = keyed
        super().__init__(
            title="gptmoe",
            summary="Continue Chinese text",
            version="1",
            redoc_url=None,
            swagger_ui_oauth2_redirect_url=None,
            redirect_slashes=False,  # to http:// behind a proxy with TLS: body and key in the open
        )

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            schema = get_openapi(
                title=self.title, version=self.version, summary=self.summary, routes=self.routes
            )
            self.openapi_schema = _honest(schema, self._keyed)
        return self.openapi_schema


def _honest(schema: dict[str, Any], keyed: bool) -> dict[str, Any]:
    """Without what FastAPI writes and nobody sends; with the key, if one is needed."""
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            operation["responses"].pop("422", None)
            content = operation["responses"]["200"]["content"]
            if content.get("application/json") == {"schema": {}}:
                del content["application/json"]
            if keyed and path not in OPEN:
                operation["security"] = [{"key": []}]
            if not keyed:
                operation["responses"].pop("401", None)
    parts = schema["components"]
    for name in ("HTTPValidationError", "ValidationError"):
        parts["schemas"].pop(name, None)
    if keyed:
        parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return schema


def _about(service: Service, stall_s: float) -> APIRouter:
    router = APIRouter()

    @router.get("/model", responses=refusals(PlainRefusal, 401), summary="What the model is")
    async def model() -> ModelCard:
        return service.card

    @router.head("/healthz", include_in_schema=False)
    @router.get("/healthz", responses=refusals(PlainRefusal, 503), summary="Does it live?")
    async def healthz() -> Health:
        service.check(stall_s)
        return Health()

    @router.head("/readyz", include_in_schema=False)
    @router.get("/readyz", responses=refusals(PlainRefusal, 503), summary="Does it take requests?")
    async def readyz() -> Health:
        service.check(stall_s)
        if service.draining:
            raise Unavailable(f"{service.card.name} drains: ask another server", None)
        return Health()

    return router
