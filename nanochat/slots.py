"""Which request lies in which row of the cache, and what it can take over from others.

Running rows are rows 0, 1, 2, ... of the cache, so that a decoding step reads them without copying. Behind them lie, in
any order, rows whose prompts are being computed, and what ended rows left, for prompts that begin alike.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from torch import Tensor

from nanochat.gpt import GPT
from nanochat.kv_cache import KVCache
from nanochat.sampling import Sampling, TokenLogprobs

MIN_SHARED = 16  # tokens that are worth copying: computing a few more hardly costs a batch
KEPT_ROWS = 8  # ended ones that the cache grows for, such as other conversations of a user
ROUND = 64  # row lengths are multiples, so that they grow rarely


@dataclass(eq=False)
class Request:
    """A prompt and the answer that is being written to it."""

    prompt: tuple[int, ...]
    budget: int  # new tokens that it may have
    sampling: Sampling
    rng: random.Random
    ids: list[int] = field(default_factory=list)  # new tokens, the terminal one included
    mask: list[int] = field(default_factory=list)  # 1 = sampled, 0 = forced by the tool
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of the new tokens, if asked for
    finish_reason: Literal["stop", "length", "cancelled"] | None = None  # None = still running
    cached_tokens: int = 0  # of the prompt, whose keys and values were there already
    forced: deque[int] = field(default_factory=deque)  # the tool's answer, still to be written
    call: list[int] | None = None  # tokens of the open tool call
    slot: int = -1  # of the cache
    length: int = 0  # tokens in the cache
    source: Request | None = None  # whose prompt is being computed, to copy its first `shared` tokens
    shared: int = 0

    @property
    def done(self) -> bool:
        return self.finish_reason is not None

    @property
    def need(self) -> int:
        """Tokens of cache that it may come to."""
        return len(self.prompt) + self.budget


class SlotTable:
    """The cache, and who holds its rows: `running` ones decode, `filling` ones compute their prompts, `kept` ones have
    ended (the longest ago first)."""

    def __init__(self, model: GPT, cache_bytes: int, max_rows: int) -> None:
        self.model, self.cache_bytes, self.max_rows = model, cache_bytes, max_rows
        row_bytes = [KVCache.row_bytes(model.config, n, model.compute_dtype) for n in (0, 1)]
        self.max_tokens = (cache_bytes - row_bytes[0]) // (row_bytes[1] - row_bytes[0])  # of a row that is alone
        self.release()

    def release(self) -> None:
        self.cache: KVCache | None = None
        self.holders: list[Request | None] = []  # of the cache's rows
        self.running: list[Request] = []
        self.filling: list[Request] = []
        self.kept: list[Request] = []
        self.contents: dict[Request, np.ndarray] = {}  # ids that a row stands for in the cache, or will

    @property
    def live(self) -> list[Request]:
        return self.running + self.filling

    @property
    def num_slots(self) -> int:
        return len(self.holders)

    def view(self, rows: Sequence[Request], new_tokens: int) -> KVCache:
        """The rows as a cache, with room for that many tokens more in each."""
        self._reserve(0, max(row.length for row in rows) + new_tokens)
        assert self.cache is not None
        return self.cache.at([row.slot for row in rows], [row.length for row in rows])

    def tokens(self, rows: Sequence[Request]) -> tuple[Tensor, list[int]]:
        """(B, S) ids in the cache, and how many of them are each row's."""
        assert self.cache is not None
        lengths = [row.length for row in rows]
        return self.cache.tokens[[row.slot for row in rows], : max(lengths)], lengths

    # From waiting to ended ----------------------------------------------------------------------

    def take(self, row: Request, num_waiting: int) -> bool:
        """Give a request a row of the cache, with the tokens that another has in common with it; False = none is free.

        There is room if every row may grow to the length that the neediest can come to.
        """
        live = self.live
        most = min(self.max_rows, self._max_slots(max(other.need for other in [row, *live])))
        if len(live) >= most:
            return False
        self.contents[row] = np.array(row.prompt)
        self.filling.append(row)  # from here on its need counts
        source, shared = self._find_source(row)
        row.slot = self._free_slot(row, source, shared, min(most, len(live) + num_waiting), most)
        self.holders[row.slot] = row
        if source is not None:
            row.source, row.shared = source, shared
            if source.length >= shared:
                self._copy(row)
        return True

    def start(self, row: Request) -> None:
        """Its prompt is complete."""
        self.filling.remove(row)
        self._swap(row.slot, len(self.running))
        self.running.append(row)

    def retire(self, row: Request) -> None:
        """It has ended; what it leaves is kept until its slot is needed."""
        for other in self.filling:
            if other.source is row:
                other.shared = min(other.shared, row.length)
                self._copy(other)
        if row in self.filling:
            self.filling.remove(row)
        else:
            last = self.running[-1]
            self._swap(row.slot, last.slot)
            self.running[last.slot] = last
            self.running.pop()
        if row.length >= MIN_SHARED:
            self.contents[row] = np.array([*row.prompt, *row.ids][: row.length])
            self.kept.append(row)
        else:
            del self.contents[row]
            self.holders[row.slot] = None

    def copy_shared(self) -> list[tuple[Request, Request]]:
        """Let rows have what they wait for, once it is there; returns rows that it completes, and their sources."""
        complete = []
        for row in self.filling:
            source = row.source
            if source is not None and source.length >= row.shared:
                self._copy(row)
                if row.length == len(row.prompt):
                    complete.append((row, source))
        return complete

    def groups(self, chunks: Sequence[tuple[Request, int]]) -> Iterator[list[tuple[Request, int]]]:
        """Rows and numbers of tokens that may go through the model together: padded, none gets twice as long, nor
        longer than rows of the cache may."""
        limit = max((row.need for row in self.live), default=0)
        left = sorted(chunks, key=lambda chunk: -chunk[1])
        while left:
            T = left[0][1]
            group = [chunk for chunk in left if 2 * chunk[1] >= T and chunk[0].length + T <= limit]
            yield group
            left = [chunk for chunk in left if chunk not in group]

    # Shared beginnings --------------------------------------------------------------------------

    def _find_source(self, row: Request) -> tuple[Request | None, int]:
        """The row that has, or will have, most of the prompt's first tokens, and how many.

        Of an equal prompt that is still being computed it is all of them: then both get the same logits.
        """
        best: tuple[Request | None, int] = (None, 0)
        prompt = self.contents[row]
        for other in self.holders:
            if other is None:
                continue
            if other in self.filling and other.prompt == row.prompt:
                return other, len(prompt)
            shared = min(_common(prompt, self.contents[other]), len(prompt) - 1)
            # what is there already wins over what is a little longer but must be waited for
            gain = shared - best[1] - (MIN_SHARED if other.length < shared else 0)
            if shared >= MIN_SHARED and gain > 0:
                best = other, shared
        return best

    def _copy(self, row: Request) -> None:
        assert row.source is not None and self.cache is not None
        if row.source.slot != row.slot:
            self.cache.copy_row(row.source.slot, row.slot, row.shared)
        row.length = row.cached_tokens = row.shared
        row.source = None

    # Memory -------------------------------------------------------------------------------------

    def _free_slot(self, row: Request, source: Request | None, shared: int, wanted: int, most: int) -> int:
        """A row of the cache that no live request holds: of `source` if nothing of it is lost by that, else an empty
        one, else a new one, else that of the row that ended longest ago.

        Args:
            wanted: rows that live and waiting requests would like to have.
            most: rows that the memory allows.
        """
        if source in self.kept:
            self.kept.remove(source)
            self.kept.append(source)  # it is of use, so it goes last
            if shared == source.length:
                return self._evict(source)
        if None not in self.holders and len(self.kept) < KEPT_ROWS:
            wanted = max(wanted, min(len(self.holders) + 1, most))
        self._reserve(wanted, len(row.prompt) + 1)
        if None in self.holders:
            return self.holders.index(None)
        return self._evict(self.kept[0])

    def _evict(self, row: Request) -> int:
        self.kept.remove(row)
        del self.contents[row]
        self.holders[row.slot] = None
        return row.slot

    def _max_slots(self, length: int) -> int:
        return self.cache_bytes // KVCache.row_bytes(self.model.config, length, self.model.compute_dtype)

    def _reserve(self, slots: int, length: int) -> None:
        """Make the cache at least so large, a good deal larger where that is allowed, to do it rarely."""
        limit = max((row.need for row in self.live), default=length)
        old_length = self.cache.max_len if self.cache is not None else 0
        if slots <= len(self.holders) and length <= old_length:
            return
        new_length = old_length
        if length > old_length:
            new_length = min(max(-(-length // ROUND) * ROUND, old_length * 3 // 2), limit)
        if slots > self._max_slots(new_length):  # a long row was here before
            new_length = limit
        new_slots = len(self.holders)
        if slots > new_slots:
            new_slots = max(slots, min(new_slots * 3 // 2, self.max_rows))
        new_slots = min(new_slots, self._max_slots(new_length))
        if self.cache is None:
            self.cache = self.model.new_cache(new_slots, new_length)
            self.holders = [None] * new_slots
            return
        placed = [row for row in self.live if row.slot >= 0] + self.kept[::-1]
        placed, lost = placed[:new_slots], placed[new_slots:]
        self.cache.resize([row.slot for row in placed], new_slots, new_length)
        self.holders = [*placed, *[None] * (new_slots - len(placed))]
        for slot, row in enumerate(placed):
            row.slot, row.length = slot, min(row.length, new_length)
        for row in lost:
            self.kept.remove(row)
            del self.contents[row]
        for row in self.kept:
            self.contents[row] = self.contents[row][: row.length]

    def _swap(self, a: int, b: int) -> None:
        """Exchange two rows of the cache, of which the first is somebody's."""
        first, second = self.holders[a], self.holders[b]
        assert first is not None and self.cache is not None
        if a == b:
            return
        if second is None:
            self.cache.copy_row(a, b, first.length)
        else:
            self.cache.swap_rows(a, b, max(first.length, second.length))
            second.slot = a
        first.slot = b
        self.holders[a], self.holders[b] = second, first


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many first items are the same."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    first = int(differs.argmax()) if n else 0
    return first if n and differs[first] else n
