"""The replicas and who may use them: a fair queue with a limit, and the way to stop. The event loop's alone."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanochat.server.engine_loop import News
from nanochat.server.errors import ApiError
from nanochat.server.replica import Job, Replica

log = logging.getLogger("nanochat.server")

AHEAD = 1 / 8  # more answers than slots that an engine gets, so that a slot that comes free is not idle for a token


@dataclass(eq=False)
class Generation:
    """What one request makes an engine write: a job for each choice, all on one replica."""

    jobs: list[Job]
    client: str  # who asks; clients take turns
    worker_id: int = -1  # none yet
    left: int = 0  # jobs that are not done
    error: ApiError | None = None
    arrived: float = field(default_factory=time.perf_counter)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self) -> list[tuple[int, News]]:
        """(choice, what is new of it) since the last time.

        Raises:
            ApiError: the answer cannot be written.
        """
        self.changed.clear()
        if self.error is not None:
            raise self.error
        news = [(i, item) for i, job in enumerate(self.jobs) for item in job.news]
        for job in self.jobs:
            job.news = []
        return news


class Pool:
    """Hands requests out to the replica with most room, each client's in turn.

    Args:
        max_queue: answers that may wait for a slot; more are refused.
    """

    def __init__(self, replicas: Sequence[Replica], max_queue: int) -> None:
        self.replicas = list(replicas)
        self.max_queue = max_queue
        self.queues: OrderedDict[str, deque[Generation]] = OrderedDict()
        self.running: dict[Job, Generation] = {}
        self.open: set[Generation] = set()  # whose answer is not wholly sent
        self.seconds = 1.0  # that an answer takes, a running mean
        self.closing: str | None = None  # how: "finish" or "cancel"
        self.idle = asyncio.Event()

    # ---- life ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to work, inside the event loop."""
        for replica in self.replicas:
            replica.listen(self._deliver)

    async def stop(self) -> None:
        await asyncio.gather(*(replica.stop() for replica in self.replicas))

    async def close(self, how: str, seconds: float) -> None:
        """Take no more requests; wait until the accepted ones are answered, but cancel those that are not after
        `seconds`, or all at once if `how` is "cancel"."""
        self.closing = how
        if how == "cancel":
            self._fail(self.open, shutting_down)
        try:
            await asyncio.wait_for(self._all_sent(), seconds)
        except asyncio.TimeoutError:
            log.info("%d requests are not finished after %g s, and cancelled", len(self.open), seconds)
            self._fail(self.open, shutting_down)

    async def _all_sent(self) -> None:
        while self.open:
            self.idle.clear()
            await self.idle.wait()

    def _fail(self, generations: Iterable[Generation], error: Callable[[], ApiError]) -> None:
        for generation in list(generations):
            generation.error = error()
            generation.changed.set()
            self._cancel(generation)

    # ---- requests -----------------------------------------------------------------------------------------------

    def submit(self, generation: Generation) -> None:
        """Queue it.

        Raises:
            ApiError: the queue is full, or the server is about to stop.
        """
        if self.closing:
            raise shutting_down()
        size = len(generation.jobs)
        if max(self._room()) < 1 and self.waiting + size > self.max_queue:
            raise self._busy(f"{self.waiting} answers wait already, and at most {self.max_queue} may")
        if len(self.open) >= 2 * (self.slots + self.max_queue):  # slow readers count here, though they run nowhere
            raise self._busy(f"{len(self.open)} requests are open already")
        generation.left = size
        self.open.add(generation)
        self.queues.setdefault(generation.client, deque()).append(generation)
        self._dispatch()

    def _busy(self, reason: str) -> ApiError:
        seconds = math.ceil(self.seconds * (1 + self.waiting / max(1, self.slots)))
        headers = {"Retry-After": str(min(max(seconds, 1), 60))}
        return ApiError(429, f"the server is busy: {reason}; try again later", code="queue_full", headers=headers)

    def release(self, generation: Generation) -> None:
        """Its answer is sent, or its client is gone: whatever of it still runs ends."""
        self._cancel(generation)
        self.open.discard(generation)
        if not self.open:
            self.idle.set()

    def _cancel(self, generation: Generation) -> None:
        queue = self.queues.get(generation.client)
        if queue and generation in queue:
            queue.remove(generation)
            if not queue:
                del self.queues[generation.client]
        elif generation.left:
            for job in generation.jobs:
                self.cancel_job(generation, job)

    def cancel_job(self, generation: Generation, job: Job) -> None:
        """One choice is complete by a stop string, or wanted no more."""
        if job in self.running:
            self.replicas[generation.worker_id].cancel(job)

    def _room(self) -> list[int]:
        """Free slots of each replica, a few more than there are."""
        return [math.ceil(replica.slots * (1 + AHEAD)) - len(replica.jobs) for replica in self.replicas]

    def _dispatch(self) -> None:
        while self.queues:
            room = self._room()
            if (most := max(room)) < 1:
                return
            client, queue = self.queues.popitem(last=False)
            generation = queue.popleft()
            if queue:
                self.queues[client] = queue  # behind the others
            generation.worker_id = room.index(most)
            for job in generation.jobs:
                self.running[job] = generation
                self.replicas[generation.worker_id].submit(job)

    def _deliver(self, news: list[tuple[Job, News]]) -> None:
        for job, item in news:
            generation = self.running[job]
            if item.finish_reason:
                del self.running[job]
                generation.left -= 1
                self.seconds += 0.05 * (time.perf_counter() - generation.arrived - self.seconds)
            if item.finish_reason in ("refused", "failed"):
                generation.error = generation.error or _error(item)
                self._cancel(generation)
            else:
                job.news.append(item)
            generation.changed.set()
        if all(replica.cannot_load for replica in self.replicas):
            self._fail((one for queue in self.queues.values() for one in queue), no_engine)
        self._dispatch()

    # ---- figures ------------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        return sum(len(generation.jobs) for queue in self.queues.values() for generation in queue)

    @property
    def slots(self) -> int:
        return sum(replica.slots for replica in self.replicas)

    def stats(self) -> dict[str, Any]:
        free = sum(len(replica.jobs) < replica.slots for replica in self.replicas)
        return {
            "total_workers": len(self.replicas),
            "available_workers": free,
            "busy_workers": len(self.replicas) - free,
            "workers": [{"gpu_id": replica.gpu_id, "device": replica.facts.device} for replica in self.replicas],
            "running": len(self.running),
            "waiting": self.waiting,
            "open_requests": len(self.open),
            "engines": [replica.stats for replica in self.replicas],
        }


def _error(news: News) -> ApiError:
    if news.finish_reason == "refused":
        return ApiError(400, news.refusal)
    return ApiError(500, "the engine failed while it wrote this answer; the server's log says why", code="engine_error")


def no_engine() -> ApiError:
    return ApiError(503, "no engine can be loaded again; the server's log says why", code="no_engine")


def shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "10"})
