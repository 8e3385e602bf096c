"""An engine as the event loop sees it: a process of its own, so that neither waits for the other's interpreter."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Protocol

from nanochat import environment
from nanochat.config import InputError
from nanochat.sampling import Sampling
from nanochat.server.engine_loop import Cancel, EngineSpec, Facts, News, Submit

log = logging.getLogger("nanochat.server")

END_SECONDS = 10.0  # that an engine gets to end; it looks up after every token
RESTART_SECONDS = 1.0  # from an engine's death to the next one's start


@dataclass(eq=False)
class Job:
    """One answer to be written."""

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling
    sample: int = 0
    number: int = -1  # the replica's
    news: list[News] = field(default_factory=list)  # not yet read


class EngineEnd(Protocol):
    """Whatever runs an EngineLoop at the other end of a connection."""

    connection: Connection

    def close(self, seconds: float) -> None:
        """End it, by force after the seconds."""


class EngineProcess:
    def __init__(self, spec: EngineSpec, gpu_id: int) -> None:
        self.connection, theirs = Pipe()
        code = f"from nanochat.server.engine_loop import main; main({theirs.fileno()})"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            env=environment.of_local_rank(gpu_id),
            start_new_session=True,  # a terminal's Ctrl-C is for the server, which lets its engines finish
        )
        theirs.close()
        self.connection.send(spec)

    def close(self, seconds: float) -> None:
        self.connection.close()
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Replica:
    """Starts an engine, and another when it dies; exactly one News of each job is its last, whatever happens.

    Args:
        start: begins to load an engine; the first message at its end is Facts, or a str: why there is none.
    """

    def __init__(self, gpu_id: int, start: Callable[[], EngineEnd]) -> None:
        self.gpu_id, self.start = gpu_id, start
        self.jobs: dict[int, Job] = {}
        self.numbers = count()
        self.stats: dict[str, int] = {}  # the engine's, when it last told something
        self.is_up = False
        self.cannot_load = False  # the last try to start another ended before it was ready
        self.restart: asyncio.Task[None] | None = None
        self.engine = start()

    def wait(self) -> None:
        """Until the first engine is loaded, before there is an event loop.

        Raises:
            InputError: it cannot be.
        """
        try:
            message = self.engine.connection.recv()
        except (EOFError, OSError):
            message = "the engine ended before it was ready; what it wrote above says why"
        if isinstance(message, str):
            raise InputError(message)
        self._ready(message)

    def _ready(self, facts: Facts) -> None:
        self.facts, self.is_up, self.cannot_load = facts, True, False

    @property
    def slots(self) -> int:
        return self.facts.slots if self.is_up else 0

    # ---- in the event loop --------------------------------------------------------------------------------------

    def listen(self, deliver: Callable[[list[tuple[Job, News]]], None]) -> None:
        """`deliver` is called with what happened, and with nothing when there is room again."""
        self.deliver, self.loop = deliver, asyncio.get_running_loop()
        self.loop.add_reader(self.engine.connection.fileno(), self._read)

    def submit(self, job: Job) -> None:
        job.number = next(self.numbers)
        self.jobs[job.number] = job
        self._send(Submit(job.number, job.prompt, job.max_tokens, job.sampling, job.sample))

    def cancel(self, job: Job) -> None:
        self._send(Cancel(job.number))

    def _send(self, message: Submit | Cancel) -> None:
        with contextlib.suppress(OSError):  # it is dead; _read() will hear of it
            self.engine.connection.send(message)

    def _read(self) -> None:
        try:
            message = self.engine.connection.recv()
        except (EOFError, OSError):
            self._lost()
            return
        if isinstance(message, str):
            log.error("worker %d: %s", self.gpu_id, message)
        elif isinstance(message, Facts):
            self._ready(message)
            self.deliver([])
        else:
            news, self.stats = message
            self._tell(news)

    def _tell(self, news: Sequence[News]) -> None:
        self.deliver([(self.jobs.pop(n.job) if n.finish_reason else self.jobs[n.job], n) for n in news])

    def _lost(self) -> None:
        log.error(
            "worker %d: its engine died with %d answers; another starts in %g s",
            self.gpu_id,
            len(self.jobs),
            RESTART_SECONDS,
        )
        self.loop.remove_reader(self.engine.connection.fileno())
        self.is_up, self.cannot_load, self.stats = False, not self.is_up, {}
        self._tell([News(number, finish_reason="failed") for number in self.jobs])
        self.restart = self.loop.create_task(self._start_again())

    async def _start_again(self) -> None:
        await self.loop.run_in_executor(None, self.engine.close, 0.0)  # a GPU takes its time to let go
        while True:
            await asyncio.sleep(RESTART_SECONDS)
            try:
                self.engine = self.start()
            except OSError as error:  # no room for a process
                log.error("worker %d: %s", self.gpu_id, error)
            else:
                break
        self.restart = None
        self.loop.add_reader(self.engine.connection.fileno(), self._read)

    async def stop(self) -> None:
        if self.restart is not None:
            self.restart.cancel()
            return
        self.loop.remove_reader(self.engine.connection.fileno())
        await self.loop.run_in_executor(None, self.engine.close, END_SECONDS)
