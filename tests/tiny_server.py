"""The application behind a real server on a free port, and an engine that does as a test says."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import httpx
import uvicorn

from nanochat.engine import Engine
from nanochat.sampling import Sampling
from nanochat.server.app import Settings, create_app
from nanochat.server.engine_loop import EngineLoop
from nanochat.server.replica import Replica
from nanochat.server.stopping import StoppableServer
from nanochat.slots import Request
from tests.tiny_engine import TOKENIZER, special

START, END = special("assistant_start"), special("assistant_end")
HELLO = {"messages": [{"role": "user", "content": "hello"}]}
CHAT = "/v1/chat/completions"


class RecordingEngine:
    """Writes one "a" after another to each of `slots` requests at a time, each only after `gate` lets it; keeps the
    prompts it was given. `fails` = its next step does; `dies` = it takes its process along."""

    def __init__(self, sequence_len: int = 128, slots: int = 1) -> None:
        self.tokenizer, self.max_running = TOKENIZER, slots
        self.model = SimpleNamespace(config=SimpleNamespace(sequence_len=sequence_len), device="cpu")
        self.gate, self.cancelled = threading.Event(), threading.Event()
        self.fails = self.dies = False
        self.requests: list[Request] = []
        self.prompts: list[str] = []
        self.settings: list[Sampling] = []
        self.written = 0

    def submit(self, prompt: Sequence[int], max_tokens: int, sampling: Sampling, sample: int) -> Request:
        self.ids = list(prompt)
        self.prompts.append(TOKENIZER.decode(self.ids))
        self.settings.append(sampling)
        self.requests.append(Request(tuple(prompt), max_tokens, sampling, None))  # type: ignore[arg-type]
        return self.requests[-1]

    def step(self) -> list[Request]:
        assert self.gate.wait(10)
        time.sleep(0.002)
        if self.dies:
            self.dies = False
            self.requests.clear()
            raise SystemExit
        if self.fails:
            self.fails = False
            raise RuntimeError("out of memory")
        running = self.requests[: self.max_running]
        for request in running:
            request.ids.append(97)
            self.written += 1
            if len(request.ids) == request.budget:
                request.finish_reason = "length"
                self.requests.remove(request)
        return running

    def cancel(self, request: Request) -> None:
        request.finish_reason = "cancelled"
        self.requests.remove(request)
        self.cancelled.set()

    def reset(self) -> None:
        self.requests.clear()

    @property
    def busy(self) -> bool:
        return bool(self.requests)

    def stats(self) -> dict[str, int]:
        running = min(len(self.requests), self.max_running)
        total = self.max_running * self.model.config.sequence_len
        return {"running": running, "waiting": len(self.requests) - running, "cache_tokens_total": total}


class EngineThread:
    """What is a process behind the real server, as a thread, so that a test can reach its engine."""

    def __init__(self, engine: Engine | RecordingEngine) -> None:
        self.connection, theirs = Pipe()
        self.thread = threading.Thread(target=self._run, args=(engine, theirs), name="engine", daemon=True)
        self.thread.start()

    def _run(self, engine: Engine | RecordingEngine, connection: Connection) -> None:
        with connection, socket.socket(fileno=os.dup(connection.fileno())) as end:
            with suppress(SystemExit):
                EngineLoop(engine, connection).run()  # type: ignore[arg-type]
            end.shutdown(socket.SHUT_RDWR)  # the loop's listener still reads, which would keep it open

    def close(self, seconds: float) -> None:
        self.connection.close()
        self.thread.join(seconds)


def replicas(*engines: Engine | RecordingEngine) -> list[Replica]:
    made = [Replica(i, partial(EngineThread, engine)) for i, engine in enumerate(engines)]
    for replica in made:
        replica.wait()
    return made


@contextmanager
def running(
    engines: Sequence[Engine | RecordingEngine], how: str, seconds: float, **settings: Any
) -> Iterator[StoppableServer]:
    """A server in a thread, whose handle_exit() does what a signal would."""
    app = create_app(replicas(*engines), TOKENIZER, Settings(**settings))
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", ws="none")
    server = StoppableServer(config, app.state.pool, how, seconds)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 10
        while not server.started:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield server
    finally:
        for engine in engines:
            if isinstance(engine, RecordingEngine):
                engine.gate.set()
        server.should_exit = True
        thread.join(10)


def client_of(server: uvicorn.Server) -> httpx.Client:
    port = server.servers[0].sockets[0].getsockname()[1]
    return httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10, trust_env=False)


@contextmanager
def serving(*engines: Engine | RecordingEngine, **settings: Any) -> Iterator[httpx.Client]:
    """A client of a running server."""
    with running(engines, "finish", 5, **settings) as server, client_of(server) as client:
        yield client


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def stats(client: httpx.Client) -> dict:
    return client.get("/stats").json()


def ask(client: httpx.Client, **fields) -> httpx.Response:
    return client.post(CHAT, json={**HELLO, **fields})
