"""The chat server: a page, a streaming chat endpoint, and one engine per GPU behind them.

Generation runs in threads, so the event loop stays free; a client that goes away stops its generation within a
token. Only the page's own origin may call: no CORS headers are sent.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.types import Send

from nanochat.config import InputError
from nanochat.dialogue import AS_TOKENS, StreamingDecoder, fit_prompt, parse_content
from nanochat.engine import Engine
from nanochat.server.page import page_router

log = logging.getLogger("nanochat.server")

MAX_MESSAGES = 500
MAX_MESSAGE_CHARS = 8_000
MAX_CONVERSATION_CHARS = 32_000
TEMPERATURE = (0.0, 2.0)
TOP_K = (0, 200)  # 0 = off
MAX_TOKENS = (1, 4096)


class Message(BaseModel):
    role: str
    content: str


class ChatRequest(BaseModel):
    messages: list[Message]
    temperature: float | None = None
    top_k: int | None = None
    max_tokens: int | None = None


@dataclass(frozen=True)
class Sampling:
    """How to sample where a request does not say."""

    temperature: float = 0.8
    top_k: int = 50
    max_tokens: int = 512

    def __post_init__(self) -> None:
        _check_sampling(self.temperature, self.top_k, self.max_tokens)


@dataclass(frozen=True)
class Worker:
    """One replica of the model. It serves one conversation at a time."""

    gpu_id: int
    engine: Engine


class Pool:
    """The workers; who wants one waits in line."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self.workers = list(workers)
        self.free: asyncio.Queue[Worker] = asyncio.Queue()
        for worker in workers:
            self.free.put_nowait(worker)

    def stats(self) -> dict[str, Any]:
        total, available = len(self.workers), self.free.qsize()
        return {
            "total_workers": total,
            "available_workers": available,
            "busy_workers": total - available,
            "workers": [{"gpu_id": w.gpu_id, "device": str(w.engine.model.device)} for w in self.workers],
        }


class EventStream(StreamingResponse):
    """Server-sent events whose generator is closed as soon as the client is gone, wherever it stands."""

    def __init__(self, events: AsyncGenerator[str, None], headers: dict[str, str]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers}
        self.events = events
        super().__init__(events, media_type="text/event-stream", headers=headers)

    async def stream_response(self, send: Send) -> None:
        try:
            await super().stream_response(send)
        finally:
            await self.events.aclose()


def create_app(workers: Sequence[Worker], sampling: Sampling | None = None) -> FastAPI:
    """The application over at least one worker; all workers hold the same model."""
    defaults = sampling or Sampling()
    pool = Pool(workers)
    app = FastAPI(title="nanochat", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.pool = pool
    app.include_router(page_router())

    @app.get("/health")
    async def health() -> dict[str, Any]:
        stats = pool.stats()
        return {
            "status": "ok",
            "ready": stats["total_workers"] > 0,
            "num_gpus": stats["total_workers"],
            "available_workers": stats["available_workers"],
        }

    @app.get("/stats")
    async def stats() -> dict[str, Any]:
        return pool.stats()

    @app.post("/chat/completions")
    async def chat_completions(request: ChatRequest) -> EventStream:
        try:
            wanted = _sampling(request, defaults)
            _check_messages(request.messages)
            engine = pool.workers[0].engine
            context = engine.model.config.sequence_len
            ids, dropped = await run_in_threadpool(
                fit_prompt,
                engine.tokenizer,
                _as_turns(request.messages),
                context,
                min(wanted.max_tokens, context // 4),
            )
        except InputError as error:
            raise HTTPException(status_code=400, detail=str(error)) from None
        headers = {"X-Dropped-Messages": str(dropped)} if dropped else {}
        return EventStream(_events(pool, ids, wanted), headers)

    return app


async def _events(pool: Pool, ids: list[int], sampling: Sampling) -> AsyncGenerator[str, None]:
    """The answer to a prompt as server-sent events, by the first worker that is free."""
    worker = await pool.free.get()
    started, num_tokens = time.perf_counter(), 0
    try:
        engine = worker.engine
        room = engine.model.config.sequence_len - len(ids)
        stream = engine.generate(
            ids,
            max_tokens=min(sampling.max_tokens, room),
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            seed=random.randrange(2**31),
        )
        text = StreamingDecoder(engine.tokenizer, AS_TOKENS)
        # A cancelled wait still lets the thread finish its token, so the worker is idle when it goes back.
        with closing(stream):
            while (column := await run_in_threadpool(next, stream, None)) is not None:
                num_tokens += 1
                if piece := text.feed(column[0][0]):
                    yield _event(token=piece, gpu=worker.gpu_id)
        if piece := text.flush():
            yield _event(token=piece, gpu=worker.gpu_id)
        yield _event(done=True)
    finally:
        pool.free.put_nowait(worker)
        log.info(
            "worker %d | prompt %d tokens | answer %d tokens | %.2f s",
            worker.gpu_id,
            len(ids),
            num_tokens,
            time.perf_counter() - started,
        )


def _event(**fields: Any) -> str:
    return f"data: {json.dumps(fields, ensure_ascii=False)}\n\n"


def _sampling(request: ChatRequest, defaults: Sampling) -> Sampling:
    """The request's settings, the server's where it has none."""
    return Sampling(
        defaults.temperature if request.temperature is None else request.temperature,
        defaults.top_k if request.top_k is None else request.top_k,
        defaults.max_tokens if request.max_tokens is None else request.max_tokens,
    )


def _check_sampling(temperature: float, top_k: int, max_tokens: int) -> None:
    checks = (
        ("temperature", temperature, TEMPERATURE),
        ("top_k", top_k, TOP_K),
        ("max_tokens", max_tokens, MAX_TOKENS),
    )
    for name, value, (low, high) in checks:
        if not low <= value <= high:  # NaN is out of range too
            raise InputError(f"{name} must be from {low} to {high}, got {value}")


def _check_messages(messages: Sequence[Message]) -> None:
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise InputError(f"there must be 1 to {MAX_MESSAGES} messages, got {len(messages)}")
    for i, message in enumerate(messages):
        if message.role not in ("user", "assistant") and (message.role, i) != ("system", 0):
            raise InputError(
                f"message {i} has role {message.role!r}; roles are user and assistant, and system for the first message"
            )
        if not message.content:
            raise InputError(f"message {i} is empty")
        if len(message.content) > MAX_MESSAGE_CHARS:
            raise InputError(
                f"message {i} has {len(message.content)} characters; at most {MAX_MESSAGE_CHARS} are allowed"
            )
    total = sum(len(message.content) for message in messages)
    if total > MAX_CONVERSATION_CHARS:
        raise InputError(f"the conversation has {total} characters; at most {MAX_CONVERSATION_CHARS} are allowed")


def _as_turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages that take turns, user first, as the model was trained: neighbours of one role are joined by an
    empty line, and what an assistant said before the first user message is left out."""
    joined: list[dict[str, Any]] = []
    for message in messages:
        if joined and joined[-1]["role"] == message.role:
            joined[-1]["content"] += "\n\n" + message.content
        elif message.role != "assistant" or (joined and joined[-1]["role"] == "user"):
            joined.append({"role": message.role, "content": message.content})
    for turn in joined:
        if turn["role"] == "assistant":
            turn["content"] = parse_content(turn["content"])
    return joined
