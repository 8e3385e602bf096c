"""The chat server's API with answers that a test has written: for the page, which needs no model."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from nanochat.server.page import page_router

CUT = object()  # the line breaks
# A piece of text, (type, text) of a tool's part, an event to wait for, seconds to wait, or CUT.
Step = str | tuple[str, str] | threading.Event | float | object


@dataclass
class Answer:
    """What the server does with one request."""

    steps: tuple[Step, ...] = ()
    finish: str = "stop"
    dropped: int = 0
    status: int = 200
    message: str = ""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class FakeApi:
    """Answers wait in line; where none does, the user's words come back."""

    url: str = ""
    key: str | None = None
    answers: list[Answer] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    left: int = 0  # clients that went away before the end

    def will_say(self, *steps: Step, **how: Any) -> None:
        self.answers.append(Answer(steps, **how))

    def will_refuse(self, status: int, message: str, **headers: str) -> None:
        self.answers.append(Answer(status=status, message=message, headers=headers))

    def reset(self) -> None:
        self.key, self.answers, self.requests, self.left = None, [], [], 0

    def app(self) -> FastAPI:
        app = FastAPI()
        app.include_router(page_router())

        @app.get("/health")
        async def health() -> dict[str, Any]:
            return {"status": "ok", "ready": True}

        @app.get("/v1/models")
        async def models() -> dict[str, Any]:
            return {"object": "list", "data": [{"id": "d8", "context": 1024, "source": "sft"}]}

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Response:
            if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
                return refusal(401, "the API key is missing or wrong")
            body = await request.json()
            self.requests.append(body)
            answer = self.answers.pop(0) if self.answers else Answer((f"You said: {body['messages'][-1]['content']}",))
            if answer.status != 200:
                return refusal(answer.status, answer.message, answer.headers)
            return StreamingResponse(self.stream(answer), media_type="text/event-stream")

        return app

    async def stream(self, answer: Answer) -> AsyncIterator[str]:
        first = {"choices": [choice({"role": "assistant", "content": ""})], "dropped_messages": answer.dropped}
        num_tokens, whole = 0, False
        try:
            yield event(first)
            for step in answer.steps:
                if step is CUT:
                    whole = True
                    raise ConnectionError("as the test wants it")
                if isinstance(step, float):
                    await asyncio.sleep(step)
                elif isinstance(step, threading.Event):
                    while not step.is_set():
                        await asyncio.sleep(0.005)
                elif isinstance(step, tuple):
                    yield event({"choices": [choice({"parts": [{"type": step[0], "text": step[1]}]})]})
                else:
                    yield event({"choices": [choice({"content": step})]})
                num_tokens += isinstance(step, (str, tuple))
            yield event({"choices": [choice({}, answer.finish)]})
            details = {"prompt_tokens_details": {"cached_tokens": 8}}
            yield event({"choices": [], "usage": {"prompt_tokens": 20, "completion_tokens": num_tokens, **details}})
            yield "data: [DONE]\n\n"
            whole = True
        finally:
            self.left += not whole


def choice(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "finish_reason": finish}


def event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def refusal(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": {"message": message, "type": "", "param": None, "code": None}}, status, headers)


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """An application on a free port of this machine; gives its address."""
    config = uvicorn.Config(app, port=0, log_level="critical", ws="none", lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 10
        while not server.started:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()
