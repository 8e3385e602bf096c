"""What runs in an engine's process: requests in through a connection, tokens out.

The event loop that they go to has work of its own for each piece. What is handed over is therefore gathered: first
tokens and ends at once, the others after a pause that grows with the number of answers.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import NamedTuple

from nanochat import runtime
from nanochat.config import InputError
from nanochat.dialogue import load_engine
from nanochat.engine import MAX_ROWS, Engine
from nanochat.sampling import Sampling, TokenLogprobs
from nanochat.slots import Request

log = logging.getLogger("nanochat.server")

# The pause between two hand-overs, per answer being written and at most. A chunk costs the event loop 0.1 ms or less
# (measured with 64 clients), so that each engine takes a twentieth of its time; with one answer nothing is held up.
PAUSE_SECONDS = 2e-3
MAX_PAUSE_SECONDS = 0.25


@dataclass(frozen=True)
class EngineSpec:
    """Which engine a process is to have; see load_engine()."""

    source: str
    device_type: str | None = None
    model_tag: str | None = None
    step: int | None = None
    dtype: str | None = None
    quantize: str | None = None

    def load(self) -> Engine:
        rt = runtime.start(self.device_type)
        return load_engine(self.source, rt, self.model_tag, self.step, self.dtype, self.quantize)


class Facts(NamedTuple):
    """The first message of an engine that is ready."""

    device: str
    context: int  # tokens
    slots: int  # answers that it can write at once if each fills the context


class Submit(NamedTuple):
    job: int
    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling
    sample: int


class Cancel(NamedTuple):
    """Frees the job's slot before the next token. Its last News comes all the same."""

    job: int


class News(NamedTuple):
    """What an engine wrote for a job since the last time; exactly one of each job has a finish reason."""

    job: int
    ids: Sequence[int] = ()
    logprobs: Sequence[TokenLogprobs] = ()
    cached_tokens: int = 0
    finish_reason: str | None = None  # the engine's, or "failed" or "refused"
    refusal: str = ""


@dataclass(eq=False)
class Written:
    """A job that the engine has, and how many of its tokens were handed over."""

    job: int
    request: Request
    seen: int = 0


class EngineLoop:
    """Ends when the other end of the connection is closed; what it was writing then is dropped."""

    def __init__(self, engine: Engine, connection: Connection) -> None:
        self.engine = engine
        self.connection = connection
        self.jobs: dict[int, Written] = {}
        self.by_request: dict[Request, Written] = {}
        self.touched: dict[int, Written] = {}  # have something that was not handed over
        self.handed_over = 0.0
        self.inbox: queue.SimpleQueue[Submit | Cancel | None] = queue.SimpleQueue()

    def run(self) -> None:
        engine = self.engine
        context = engine.model.config.sequence_len
        slots = max(1, min(MAX_ROWS, engine.stats()["cache_tokens_total"] // context))
        self._send(Facts(str(engine.model.device), context, slots))
        threading.Thread(target=self._listen, daemon=True).start()
        while True:
            try:
                if not self._obey():
                    return
                if engine.busy:
                    self._hand_over(engine.step())
            except Exception:
                log.exception("the engine failed; its %d answers are given up", len(self.jobs))
                self._give_up()

    def _listen(self) -> None:
        """Reads at all times, so that neither end waits for the other to read first."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                self.inbox.put(self.connection.recv())
        self.inbox.put(None)

    def _obey(self) -> bool:
        """Do what was asked for; waits while there is nothing to write. False = end."""
        block = not self.engine.busy
        with contextlib.suppress(queue.Empty):
            while True:
                message = self.inbox.get(block)
                block = False
                if message is None:
                    return False
                if isinstance(message, Submit):
                    self._submit(message)
                elif written := self.jobs.get(message.job):
                    self.engine.cancel(written.request)
                    self._forget(written)
                    self._tell([News(message.job, finish_reason="cancelled")])
        return True

    def _submit(self, message: Submit) -> None:
        try:
            request = self.engine.submit(message.prompt, message.max_tokens, message.sampling, message.sample)
        except InputError as error:
            self._tell([News(message.job, finish_reason="refused", refusal=str(error))])
        except Exception:
            log.exception("the engine refused a request")
            self._tell([News(message.job, finish_reason="failed")])
        else:
            self.jobs[message.job] = self.by_request[request] = Written(message.job, request)

    def _forget(self, written: Written) -> None:
        del self.jobs[written.job], self.by_request[written.request]
        self.touched.pop(written.job, None)

    def _hand_over(self, progressed: Sequence[Request]) -> None:
        for one in progressed:
            if written := self.by_request.get(one):
                self.touched[written.job] = written
        now = time.perf_counter()
        is_due = now - self.handed_over >= min(PAUSE_SECONDS * len(self.jobs), MAX_PAUSE_SECONDS)
        news = []
        for written in list(self.touched.values()):
            request = written.request
            if not (is_due or not written.seen or request.finish_reason):
                continue
            new = slice(written.seen, len(request.ids))
            written.seen = new.stop
            ids, logprobs = request.ids[new], request.logprobs[new]
            news.append(News(written.job, ids, logprobs, request.cached_tokens, request.finish_reason))
            if request.finish_reason:
                self._forget(written)
            else:
                del self.touched[written.job]
        if is_due:
            self.handed_over = now
        self._tell(news)

    def _give_up(self) -> None:
        """After an error nothing is known of the engine's state, so it begins anew; or, if it cannot, its process."""
        news = [News(job, finish_reason="failed") for job in self.jobs]
        for kept in (self.jobs, self.by_request, self.touched):
            kept.clear()
        self.engine.reset()
        self._tell(news)

    def _tell(self, news: list[News]) -> None:
        if news:
            self._send((news, self.engine.stats()))

    def _send(self, message: object) -> None:
        with contextlib.suppress(OSError):  # nobody listens any more; the inbox will say so
            self.connection.send(message)


def main(descriptor: int) -> None:
    """Be the process: the first message says which engine; the first answer is its Facts, or why there is none."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # service managers send it to all; the server says when to end
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    connection = Connection(descriptor)
    spec: EngineSpec = connection.recv()
    try:
        engine = spec.load()
    except InputError as error:
        connection.send(str(error))
    else:
        EngineLoop(engine, connection).run()
