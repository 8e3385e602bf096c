"""Sends an answer, streamed or whole, while it is written, and ends it when its client is gone."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import Response
from starlette.types import Message, Receive, Scope, Send

from nanochat.server.errors import ApiError
from nanochat.server.metrics import Metrics
from nanochat.server.pool import Generation, Pool
from nanochat.server.text import Choice
from nanochat.server.wire import ChatWire, dumps, usage

log = logging.getLogger("nanochat.server")

SEND_SECONDS = 60.0  # that a client may leave a piece unread before its answer is given up


class ClientLeft(Exception):
    pass


class AnswerResponse(Response):
    """The answer to one request. Nothing is sent before the first token, so that what fails until then has a status.

    Args:
        choices: one a job of the generation.
        headers: besides those of its kind.
        log_text: whether the log has prompts and answers.
    """

    def __init__(
        self,
        pool: Pool,
        metrics: Metrics,
        generation: Generation,
        choices: Sequence[Choice],
        wire: ChatWire,
        stream: bool,
        headers: Mapping[str, str],
        log_text: bool,
    ) -> None:
        super().__init__()
        self.pool, self.metrics, self.generation, self.wire = pool, metrics, generation, wire
        self.choices = choices
        self.is_stream, self.extra_headers, self.log_text = stream, dict(headers), log_text
        self.client_left = self.started = False
        self.sending_since: float | None = None  # a piece that the client has no room for yet
        self.first_token: float | None = None
        self.ids: list[list[int]] = [[] for _ in choices]  # only if they are to be logged
        self.outcome = "cut off"  # by the server's end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.ensure_future(self._watch(receive))
        task = asyncio.current_task()
        assert task is not None
        self._check_reader(task)
        try:
            await self._answer(scope, receive, send)
        except ClientLeft:
            self.outcome = "disconnected"
        finally:
            self.timer.cancel()
            watcher.cancel()
            self.pool.release(self.generation)
            self._record()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await (self._stream(send) if self.is_stream else self._whole(send))
            self.outcome = "+".join(sorted({str(choice.reason) for choice in self.choices}))
        except ApiError as error:
            self.outcome = f"error {error.status}"
            if self.started:
                await self._send(send, self.wire.error(error.body()), more=False)
            else:
                await error.response(scope["path"])(scope, receive, send)

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.client_left = True
        self.pool.release(self.generation)
        self.generation.changed.set()

    # ---- two ways to send ---------------------------------------------------------------------------------------

    async def _stream(self, send: Send) -> None:
        more = True
        while more:
            written = await self._written()
            chunks = [] if self.started else [self.wire.begin(len(self.choices))]
            for choice in written:
                chunks.append(self.wire.pieces(choice))
                if choice.reason:
                    chunks.append(self.wire.finish(choice))
            more = not self._complete
            if not more:
                chunks.append(self.wire.close(self._usage()))
            await self._send(send, "".join(chunks), more)

    async def _whole(self, send: Send) -> None:
        while not self._complete:
            await self._written()
        body = dumps(self.wire.whole(self.choices, self._usage())).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self._start(send, headers)
        await send({"type": "http.response.body", "body": body})

    async def _send(self, send: Send, text: str, more: bool = True) -> None:
        """Waits for a slow reader; the engine does not."""
        if not self.started:
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
            await self._start(send, [*headers, (b"x-accel-buffering", b"no")])
        if text or not more:
            message: Message = {"type": "http.response.body", "body": text.encode(), "more_body": more}
            self.sending_since = time.perf_counter()
            try:
                await send(message)
            except asyncio.CancelledError:
                if self.client_left:
                    raise ClientLeft from None
                raise
            finally:
                self.sending_since = None

    def _check_reader(self, task: asyncio.Task[Any]) -> None:
        """Gives up a client that leaves a piece unread. One timer an answer: one a piece would cost a tenth of it."""
        waited = 0.0 if self.sending_since is None else time.perf_counter() - self.sending_since
        if waited < SEND_SECONDS:
            self.timer = asyncio.get_running_loop().call_later(SEND_SECONDS - waited, self._check_reader, task)
        else:
            log.info("%s: the client does not read; given up", self.wire.id)
            self.client_left = True
            task.cancel()

    async def _start(self, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        self.started = True
        extra = [(name.lower().encode(), value.encode()) for name, value in self.extra_headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers + extra})

    # ---- what is written ----------------------------------------------------------------------------------------

    @property
    def _complete(self) -> bool:
        return all(choice.reason for choice in self.choices)

    async def _written(self) -> list[Choice]:
        """Waits for choices that have something new."""
        while True:
            await self.generation.changed.wait()
            if self.client_left:
                raise ClientLeft
            if written := self._read():
                return written

    def _read(self) -> list[Choice]:
        written = {}
        for i, news in self.generation.take():
            choice = self.choices[i]
            if choice.reason:
                continue  # written behind a stop string, before the engine knew
            if self.first_token is None:
                self.first_token = time.perf_counter()
            choice.cached_tokens = news.cached_tokens
            choice.feed(news.ids, news.logprobs, news.finish_reason)
            if self.log_text:
                self.ids[i] += news.ids
            if choice.reason and not news.finish_reason:
                self.pool.cancel_job(self.generation, self.generation.jobs[i])
            written[i] = choice
        return list(written.values())

    def _usage(self) -> dict[str, Any]:
        first = [i for i, job in enumerate(self.generation.jobs) if job.sample == 0]  # a prompt counts once
        return usage(
            sum(len(self.generation.jobs[i].prompt) for i in first),
            sum(choice.num_tokens for choice in self.choices),
            sum(self.choices[i].cached_tokens for i in first),
        )

    def _record(self) -> None:
        """Metrics, and a line in the log."""
        now, generation, used = time.perf_counter(), self.generation, self._usage()
        self.metrics.prompt_tokens.inc(used["prompt_tokens"])
        self.metrics.generated_tokens.inc(used["completion_tokens"])
        if self.first_token is not None:
            self.metrics.first_token.observe(self.first_token - generation.arrived)
            longest = max(choice.num_tokens for choice in self.choices)
            if longest > 1:
                self.metrics.per_token.observe((now - self.first_token) / (longest - 1))
        log.info(
            "worker %d | prompt %d tokens, %d cached | answer %d tokens | %s | %.2f s",
            generation.worker_id,
            used["prompt_tokens"],
            used["prompt_tokens_details"]["cached_tokens"],
            used["completion_tokens"],
            self.outcome,
            now - generation.arrived,
        )
        if self.log_text:
            for job, ids in zip(generation.jobs, self.ids, strict=True):
                decode = self.choices[0].tokenizer.decode
                log.info("prompt %r | answer %r", decode(job.prompt), decode(ids))
