"""The chat server's routes: OpenAI's endpoints, the reference's, the page, and what there is to watch.

Engines run in processes of their own (replica.py), so the event loop stays free; a client that goes away ends its
answer within a token (streaming.py). Only the page's own origin may call: no CORS headers are sent.
"""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.concurrency import run_in_threadpool

from nanochat.config import InputError
from nanochat.dialogue import AS_TOKENS
from nanochat.sampling import Sampling
from nanochat.server import openapi, schemas
from nanochat.server.errors import ApiError, add_handlers
from nanochat.server.gate import Gate
from nanochat.server.metrics import Metrics
from nanochat.server.page import page_router
from nanochat.server.pool import Generation, Pool
from nanochat.server.prompts import chat_ids, completion_ids, plain_turns, turns_of
from nanochat.server.replica import Job, Replica
from nanochat.server.streaming import AnswerResponse
from nanochat.server.text import Choice
from nanochat.server.wire import ChatWire, CompletionWire, PlainWire
from nanochat.tokenizer import Tokenizer

P = ParamSpec("P")
T = TypeVar("T")

TEMPERATURE = (0.0, 2.0)
TOP_K = (0, 200)  # of the reference's endpoint; 0 = off
MAX_TOKENS = (1, 4096)
MAX_ROWS = 256  # answers of one request: its prompts times n
SMALL_BODY = 4096  # bytes whose text is encoded sooner than another thread would begin to


@dataclass(frozen=True)
class Settings:
    """How to sample where a request does not say; limits; and what the model is called."""

    temperature: float = 0.8
    top_k: int = 50
    max_tokens: int = 512
    max_queue: int = 256  # answers that may wait
    max_body_bytes: int = 1 << 20
    drops_turns: bool = True  # the oldest, from a conversation that is longer than the context; else it is refused
    api_key: str | None = None
    log_text: bool = False
    model: str = "nanochat"
    source: str = "sft"

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_k, self.max_tokens)
        for name in ("max_queue", "max_body_bytes"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key):
            raise InputError("the API key must be printable ASCII, and not empty")


def create_app(replicas: Sequence[Replica], tokenizer: Tokenizer, settings: Settings | None = None) -> FastAPI:
    """The application over at least one replica of a model; all must be up."""
    server = Server(replicas, tokenizer, settings or Settings())

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        server.pool.start()
        yield
        await server.pool.stop()

    app = FastAPI(title="nanochat", docs_url=None, redoc_url=None, openapi_url=None, lifespan=life)
    app.state.pool = server.pool
    add_handlers(app)
    _add_v1(app, server)  # first: routes are tried in their order
    _add_figures(app, server)
    _add_pages(app, server)

    @app.post("/chat/completions", responses=openapi.PLAIN)
    async def plain_chat(body: schemas.PlainRequest, request: Request) -> Response:
        """The reference's endpoint: events of a token each."""
        return await server.plain(body, request)

    paths = [path for route in app.routes if (path := getattr(route, "path", None))]
    app.add_middleware(
        Gate,
        metrics=server.metrics,
        paths=paths,
        api_key=server.settings.api_key,
        max_body_bytes=server.settings.max_body_bytes,
    )
    return app


def _add_pages(app: FastAPI, server: Server) -> None:
    app.include_router(page_router())

    @app.get("/openapi.json", include_in_schema=False)
    def document() -> JSONResponse:
        return JSONResponse(openapi.document(app, with_key=server.settings.api_key is not None))


def _add_figures(app: FastAPI, server: Server) -> None:
    @app.get("/health", responses=openapi.HEALTH)
    async def health() -> JSONResponse:
        """Whether requests are answered: 200, or 503 while the server stops or has no engine up."""
        stats, closing = server.pool.stats(), server.pool.closing is not None
        ready = not closing and server.pool.slots > 0
        body = {
            "status": "shutting down" if closing else "ok" if ready else "no engine",
            "ready": ready,
            "num_gpus": stats["total_workers"],
            "available_workers": stats["available_workers"],
        }
        return JSONResponse(body, 200 if ready else 503)

    @app.get("/stats", responses=openapi.STATS)
    async def stats() -> JSONResponse:
        """Who is busy: an available worker would begin one more answer at once."""
        return JSONResponse(server.pool.stats())

    @app.get("/metrics", responses=openapi.METRICS)
    async def metrics() -> Response:
        """Counts and times, in Prometheus' format."""
        return Response(generate_latest(server.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _add_v1(app: FastAPI, server: Server) -> None:
    @app.get("/v1/models", responses=openapi.MODELS)
    async def models() -> JSONResponse:
        """The one model that is served."""
        return JSONResponse({"object": "list", "data": [server.model()]})

    @app.get("/v1/models/{model}", responses=openapi.MODEL)
    async def model(model: str) -> JSONResponse:
        """The same by its name."""
        server.check_model(model)
        return JSONResponse(server.model())

    @app.post("/v1/chat/completions", responses=openapi.CHAT)
    async def chat(body: schemas.ChatRequest, request: Request) -> Response:
        """The next message of a conversation, whole or as server-sent events."""
        return await server.chat(body, request)

    @app.post("/v1/completions", responses=openapi.COMPLETIONS)
    async def completions(body: schemas.CompletionRequest, request: Request) -> Response:
        """What follows a raw text."""
        return await server.complete(body, request)


class Server:
    """From a checked request to the response that writes its answer."""

    def __init__(self, replicas: Sequence[Replica], tokenizer: Tokenizer, settings: Settings) -> None:
        self.settings = settings
        self.pool = Pool(replicas, settings.max_queue)
        self.metrics = Metrics(self.pool)
        self.tokenizer = tokenizer
        self.context = replicas[0].facts.context
        self.created = int(time.time())

    def model(self) -> dict[str, Any]:
        return {
            "id": self.settings.model,
            "object": "model",
            "created": self.created,
            "owned_by": "nanochat",
            "context": self.context,
            "source": self.settings.source,
        }

    def check_model(self, name: str | None) -> None:
        if name and name != self.settings.model:
            raise ApiError(
                404,
                f"there is no model {name[:60]!a}; this server has {self.settings.model!r}",
                param="model",
                code="model_not_found",
            )

    async def chat(self, body: schemas.ChatRequest, request: Request) -> Response:
        self.check_model(body.model)
        sampling = self._sampling(body, body.wanted_logprobs)
        max_tokens = body.max_completion_tokens or body.max_tokens or self.settings.max_tokens
        ids, dropped = await self._prepared(
            request,
            chat_ids,
            self.tokenizer,
            turns_of(body.messages),
            self.context,
            max_tokens,
            self.settings.drops_turns,
        )
        wire = ChatWire(self.settings.model, bool(body.logprobs), body.include_usage, dropped)
        generation = self._generation(request, [ids], max_tokens, sampling, body.n or 1)
        return self._answer(generation, body.stops, wire, bool(body.stream), dropped)

    async def complete(self, body: schemas.CompletionRequest, request: Request) -> Response:
        self.check_model(body.model)
        sampling = self._sampling(body, body.logprobs)
        prompts = await self._prepared(request, completion_ids, self.tokenizer, body, self.context)
        wire = CompletionWire(self.settings.model, body.logprobs is not None, body.include_usage)
        max_tokens = body.max_tokens or self.settings.max_tokens
        generation = self._generation(request, prompts, max_tokens, sampling, body.n or 1)
        return self._answer(generation, body.stops, wire, bool(body.stream))

    async def plain(self, body: schemas.PlainRequest, request: Request) -> Response:
        settings = self.settings
        temperature = settings.temperature if body.temperature is None else body.temperature
        top_k = settings.top_k if body.top_k is None else body.top_k
        max_tokens = settings.max_tokens if body.max_tokens is None else body.max_tokens
        try:
            check_sampling(temperature, top_k, max_tokens)
            turns = plain_turns(body.messages)
        except InputError as error:
            raise ApiError(400, str(error)) from None
        ids, dropped = await self._prepared(
            request, chat_ids, self.tokenizer, turns, self.context, max_tokens, settings.drops_turns
        )
        sampling = Sampling(temperature, top_k, seed=random.randrange(2**31))
        generation = self._generation(request, [ids], max_tokens, sampling, 1)
        return self._answer(generation, [], PlainWire(generation), True, dropped, shown=AS_TOKENS)

    async def _prepared(self, request: Request, prepare: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What becomes of a request's text; of much text in another thread, so that the event loop stays free."""
        if len(await request.body()) <= SMALL_BODY:
            return prepare(*args, **kwargs)
        return await run_in_threadpool(prepare, *args, **kwargs)

    def _sampling(self, body: schemas.GenerationRequest, logprobs: int | None) -> Sampling:
        """The request's settings, the server's where it has none."""
        settings = self.settings
        try:
            return Sampling(
                settings.temperature if body.temperature is None else body.temperature,
                settings.top_k if body.top_k is None else body.top_k,
                1.0 if body.top_p is None else body.top_p,
                body.min_p or 0.0,
                body.repetition_penalty or 1.0,
                random.randrange(2**31) if body.seed is None else body.seed,
                logprobs,
            )
        except InputError as error:
            raise ApiError(400, str(error)) from None

    def _generation(
        self, request: Request, prompts: Sequence[list[int]], max_tokens: int, sampling: Sampling, n: int
    ) -> Generation:
        if len(prompts) * n > MAX_ROWS:
            raise ApiError(400, f"{len(prompts)} prompts times n = {n} are more than {MAX_ROWS} answers", param="n")
        jobs = [
            Job(ids, min(max_tokens, self.context - len(ids)), sampling, sample)
            for ids in prompts
            for sample in range(n)
        ]
        return Generation(jobs, request.client.host if request.client else "")

    def _answer(
        self,
        generation: Generation,
        stops: Sequence[str],
        wire: ChatWire,
        stream: bool,
        dropped: int = 0,
        shown: Mapping[str, str] | None = None,
    ) -> AnswerResponse:
        choices = [Choice(self.tokenizer, i, stops, shown) for i in range(len(generation.jobs))]
        self.pool.submit(generation)
        headers = {"X-Dropped-Messages": str(dropped)} if dropped else {}
        return AnswerResponse(
            self.pool, self.metrics, generation, choices, wire, stream, headers, self.settings.log_text
        )


def check_sampling(temperature: float, top_k: int, max_tokens: int) -> None:
    """The limits of the reference's endpoint and of the server's own settings.

    Raises:
        InputError: a value out of range.
    """
    checks = (
        ("temperature", temperature, TEMPERATURE),
        ("top_k", top_k, TOP_K),
        ("max_tokens", max_tokens, MAX_TOKENS),
    )
    for name, value, (low, high) in checks:
        if not low <= value <= high:  # NaN is out of range too
            raise InputError(f"{name} must be from {low} to {high}, got {value}")
