"""The thread that owns an engine: requests in through a queue, tokens out to the event loop.

Engine and event loop share Python's one lock, so each waits while the other runs. What is handed over is therefore
gathered: first tokens and ends at once, the others after a pause that grows with the number of answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from nanochat.config import InputError
from nanochat.engine import Engine
from nanochat.sampling import Sampling, TokenLogprobs
from nanochat.server.errors import ApiError
from nanochat.slots import Request

log = logging.getLogger("nanochat.server")

# The pause between two hand-overs, per answer being written and at most. A chunk costs the event loop 0.1 ms or less
# (measured with 64 clients), so that streaming to 64 takes a twentieth of the time; with one nothing is held up.
PAUSE_SECONDS = 2e-3
MAX_PAUSE_SECONDS = 0.25


@dataclass(eq=False)
class Job:
    """One answer to be written. The thread alone has `request` and `seen`; the event loop alone has the rest."""

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling
    sample: int = 0
    request: Request | None = None
    seen: int = 0  # of the request's tokens, how many were handed over
    news: list[News] = field(default_factory=list)  # not yet read


class News(NamedTuple):
    """What an engine wrote for a job since the last time; the last one has a reason or an error."""

    job: Job
    ids: list[int]
    logprobs: list[TokenLogprobs]
    cached_tokens: int = 0
    finish_reason: str | None = None
    error: ApiError | None = None

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


class EngineLoop:
    """`deliver` is called in the event loop with what happened; exactly one News of each job is its last."""

    def __init__(self, engine: Engine, deliver: Callable[[list[News]], None]) -> None:
        self.engine = engine
        self.deliver = deliver
        self.loop = asyncio.get_running_loop()
        self.jobs: dict[int, Job] = {}  # by the id() of their requests
        self.touched: dict[int, Job] = {}  # have something that was not handed over
        self.handed_over = 0.0
        self.stats = engine.stats()  # after the last step; the engine itself is the thread's alone
        self.inbox: queue.SimpleQueue[tuple[str, Job | None]] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.thread.start()

    def submit(self, job: Job) -> None:
        self.inbox.put(("submit", job))

    def cancel(self, job: Job) -> None:
        """Frees the job's slot before the next token. Its last News comes all the same."""
        self.inbox.put(("cancel", job))

    def stop(self) -> None:
        """Ends the thread at its next token; what it was writing is dropped."""
        self.inbox.put(("stop", None))

    def join(self, seconds: float) -> None:
        self.thread.join(seconds)

    # ---- in the thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            try:
                if not self._obey():
                    return
                if self.engine.busy:
                    progressed = self.engine.step()
                    self.stats = self.engine.stats()
                    self._hand_over(progressed)
                else:
                    self.stats = self.engine.stats()
            except Exception:
                log.exception("the engine failed; its %d answers are given up", len(self.jobs))
                self._give_up()

    def _obey(self) -> bool:
        """Do what was asked for; waits while there is nothing to write. False = end."""
        block = not self.engine.busy
        with contextlib.suppress(queue.Empty):
            while True:
                kind, job = self.inbox.get(block)
                block = False
                if job is None:
                    return False
                if kind == "submit":
                    self._submit(job)
                elif job.request is not None and id(job.request) in self.jobs:
                    self.engine.cancel(job.request)
                    del self.jobs[id(job.request)]
                    self.touched.pop(id(job.request), None)
                    self._tell([News(job, [], [], finish_reason="cancelled")])
        return True

    def _submit(self, job: Job) -> None:
        try:
            request = self.engine.submit(job.prompt, job.max_tokens, job.sampling, job.sample)
        except InputError as error:
            self._tell([News(job, [], [], error=ApiError(400, str(error)))])
        except Exception:
            log.exception("the engine refused a request")
            self._tell([News(job, [], [], error=engine_error())])
        else:
            job.request = request
            self.jobs[id(request)] = job

    def _hand_over(self, progressed: Sequence[Request]) -> None:
        for one in progressed:
            if job := self.jobs.get(id(one)):
                self.touched[id(one)] = job
        now = time.perf_counter()
        is_due = now - self.handed_over >= min(PAUSE_SECONDS * len(self.jobs), MAX_PAUSE_SECONDS)
        news = []
        for key, job in list(self.touched.items()):
            request = job.request
            assert request is not None
            if not (is_due or not job.seen or request.finish_reason):
                continue
            del self.touched[key]
            if request.finish_reason:
                del self.jobs[key]
            new = slice(job.seen, len(request.ids))
            job.seen = new.stop
            ids, logprobs = request.ids[new], request.logprobs[new]
            news.append(News(job, ids, logprobs, request.cached_tokens, request.finish_reason))
        if is_due:
            self.handed_over = now
        self._tell(news)

    def _give_up(self) -> None:
        """After an error nothing is known of the engine's state, so it begins anew."""
        news = [News(job, [], [], error=engine_error()) for job in self.jobs.values()]
        self.jobs.clear()
        self.touched.clear()
        self.engine.reset()
        self._tell(news)

    def _tell(self, news: list[News]) -> None:
        if news:
            with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody listens any more
                self.loop.call_soon_threadsafe(self.deliver, news)


def engine_error() -> ApiError:
    return ApiError(500, "the engine failed while it wrote this answer; the server's log says why", code="engine_error")
