"""The OpenAPI document at /openapi.json: which answers each route can give."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from nanochat.server import schemas

Responses = dict[int | str, dict[str, Any]]

WHY = {
    400: "a value is wrong, or the prompt too long",
    404: "there is no such model",
    408: "the request came too slowly",
    413: "the request is too large",
    429: "too many wait; Retry-After says for how long",
    500: "the engine failed",
    503: "the server is shutting down",
}
DROPPED = {"X-Dropped-Messages": {"description": "the oldest messages left out", "schema": {"type": "integer"}}}
# No type: some readers apply it to the whole text, others to each event.
EVENTS = {"text/event-stream": {"schema": {"description": "chunks as server-sent events"}}}


def _errors(*statuses: int, model: type = schemas.Error) -> Responses:
    return {status: {"model": model, "description": WHY[status]} for status in statuses}


def _ok(model: type, **more: Any) -> Responses:
    return {200: {"model": model, "description": "OK", **more}}


GENERATION_ERRORS = (400, 404, 408, 413, 429, 500, 503)
CHAT = {**_ok(schemas.ChatCompletion, content=EVENTS, headers=DROPPED), **_errors(*GENERATION_ERRORS)}
COMPLETIONS = {**_ok(schemas.Completion, content=EVENTS), **_errors(*GENERATION_ERRORS)}
MODELS = _ok(schemas.ModelList)
MODEL = {**_ok(schemas.Model), **_errors(404)}
STATS = _ok(schemas.Stats)
HEALTH = {**_ok(schemas.Health), 503: {"model": schemas.Health, "description": f"{WHY[503]}, or no engine is up"}}
METRICS: Responses = {200: {"description": "OK", "content": {"text/plain": {"schema": {"type": "string"}}}}}
PLAIN = {
    200: {"description": "events", "content": EVENTS, "headers": DROPPED},
    **_errors(400, 408, 413, 429, 500, 503, model=schemas.PlainError),
}


def document(app: FastAPI, with_key: bool) -> dict[str, Any]:
    made = get_openapi(title=app.title, version="1", routes=app.routes, description=str(__doc__))
    for path, methods in made["paths"].items():
        for operation in methods.values():
            responses = operation["responses"]
            if path.startswith("/v1/"):
                responses.pop("422", None)  # FastAPI's way to refuse; ours is 400
            if path in ("/metrics", "/chat/completions"):
                responses["200"]["content"].pop("application/json", None)
            if with_key and path != "/health":
                model = "PlainError" if path == "/chat/completions" else "Error"
                schema = {"schema": {"$ref": f"#/components/schemas/{model}"}}
                responses["401"] = {"description": "no or a wrong key", "content": {"application/json": schema}}
                operation["security"] = [{"key": []}]
    if with_key:
        made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return made
