"""Batches for pretraining: documents packed into rows by best fit, in an order any run can go on with.

Every row has T+1 tokens and begins with BOS. A document longer than a row fills rows of its own; what is left of it
is packed with the shorter ones: the longest that fits the rest of a row, again and again, and when none fits the
beginning of one, whose end waits for another place. Each piece of a document begins with BOS. So nothing is padded,
and a pass shows nearly every token once. Later passes show the same text, cut and mixed anew. Figures:
bench/loader.py.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import weakref
from bisect import bisect_right, insort
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanochat.config import InputError
from nanochat.data.sources import Source

MIN_ENCODE_THREADS = 4  # on any number of ranks: they may share the machine's cores, or be on many machines
MIN_ROWS = 64  # a unit is at least so many rows of tokens: the unfilled last row then loses under 2%
UNITS_AHEAD = 2  # packed units that wait for the consumer: it never waits for the tokeniser unless that is slower

Piece = tuple[int, int, int]  # (document, start, stop): its tokens from start to stop, the first shown as BOS


class Unit(NamedTuple):
    """Rows that were tokenised and packed together."""

    epoch: int
    block: int  # the first one
    rows: Tensor  # (N, T+1) int32; -1 = no token
    num_text: int  # tokens of the documents, BOS not counted
    num_kept: int  # how many of them the rows hold


def best_fit(lengths: Sequence[int], capacity: int, draw: Callable[[], float]) -> list[list[Piece]]:
    """Pack documents of two tokens or more into rows of `capacity` (2 or more) until none is left.

    A document longer than a row gives as many whole rows as it can, and its rest, at its beginning or its end as
    drawn, is packed as a document. (Cutting it only where nothing else fits gives 8% more pieces and 7% less context
    a token at 2,049.) Then a row takes the longest document that fits, of equals the earlier one. When none fits, one
    of all is drawn and cropped, and its rest goes back. Published recipes crop the shortest, to lose the least; with
    rests in use any choice loses nothing, and drawn ones make other rows in each pass. Of a rest of one token
    nothing could be learned: it is dropped. O(N log N) searches.

    Args:
        draw: gives numbers from 0 to 1 (exclusive), such as np.random.default_rng(seed).random.

    Returns:
        The pieces of each row; all rows but the last are full.
    """
    n, text = len(lengths), capacity - 1
    starts = [0] * n  # the slot for BOS of what is left of a document
    rows: list[list[Piece]] = []
    # a document's size and number as one integer, so that the pool is one sorted list and equals have their order
    pool: list[int] = []
    for i, size in enumerate(lengths):
        if size > capacity:
            count, rest = divmod(size - 1, text)
            first = rest if rest > 1 and draw() < 0.5 else 0
            rows += [[(i, start, start + capacity)] for start in range(first, first + count * text, text)]
            starts[i], size = 0 if first else count * text, rest + 1
            if rest < 2:
                continue
        pool.append(size * n + n - 1 - i)
    pool.sort()
    while pool:
        row, space = [], capacity
        while space and pool:
            at = bisect_right(pool, space * n + n - 1) - 1  # the longest that fits; -1 = none
            if at < 0:
                at = int(draw() * len(pool))
            size, i = divmod(pool.pop(at), n)
            i = n - 1 - i
            start, taken = starts[i], min(size, space)
            row.append((i, start, start + taken))
            if size - taken > 1:
                starts[i] = start + taken - 1  # the last token taken is where the rest has its BOS
                insort(pool, (size - taken + 1) * n + n - 1 - i)
            space -= taken
        rows.append(row)
    return rows


def host_rows(n: int, capacity: int, device: torch.device) -> Tensor:
    """(n, capacity) int32, not filled, in host memory: pinned when they go to a GPU, so that copies do not block.

    Pinned memory is PyTorch's, which uses it again only after the copies that read it are done.
    """
    if device.type != "cuda":
        return torch.empty((n, capacity), dtype=torch.int32)
    with torch.cuda.device(device):  # pinning takes a context, which must not be a new one on GPU 0
        return torch.empty((n, capacity), dtype=torch.int32, pin_memory=True)


def pack(documents: Sequence[np.ndarray], plan: Sequence[Sequence[Piece]], rows: Tensor) -> Tensor:
    """Fill rows (N, capacity) as planned from documents (int32, BOS first); -1 behind the end of a short last row."""
    pieces = [documents[i][start:stop] for row in plan for i, start, stop in row]
    ends = np.cumsum(np.fromiter(map(len, pieces), np.int64, len(pieces)))
    flat = rows.numpy().reshape(-1)
    np.concatenate(pieces, out=flat[: ends[-1]])
    flat[0] = flat[ends[:-1]] = documents[0][0]  # BOS
    flat[ends[-1] :] = -1
    return rows


def packed_unit(
    documents: Sequence[np.ndarray], capacity: int, epoch: int, block: int, is_last: bool, device: torch.device
) -> Unit:
    """The unit of these documents: a function of its arguments, so that all ranks have the same.

    The short last row is dropped, but for the last unit of a pass, where it stays and comes last, so that a text
    shorter than a row trains too.
    """
    rng = np.random.default_rng((epoch, block))
    plan = best_fit([len(d) for d in documents], capacity, rng.random)
    missing = capacity - sum(stop - start for _, start, stop in plan[-1])
    short = [plan.pop()] if missing else []
    # best fit puts long documents first: in that order a step would see one kind of text only
    plan = [plan[i] for i in rng.permutation(len(plan)).tolist()]
    if is_last:
        plan += short
    rows = pack(documents, plan, host_rows(len(plan), capacity, device))
    num_kept = rows.numel() - sum(map(len, plan)) - (missing if is_last else 0)  # a BOS a piece
    return Unit(epoch, block, rows, sum(map(len, documents)) - len(documents), num_kept)


def encode_threads(world_size: int) -> int:
    """A rank's share of this machine's cores, as far as we know: the ranks may be on many machines."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(min(cores, MIN_ENCODE_THREADS), cores // world_size)


def packed_units(
    source: Source,
    split: str,
    tokenizer: Any,
    sequence_len: int,
    epoch: int,
    block: int,
    repeat: bool,
    num_threads: int,
    device: torch.device,
) -> Iterator[Unit]:
    """Units from a block on: one block, or as many as give MIN_ROWS rows, tokenised and packed by themselves.

    A unit depends on its epoch and first block only.
    """
    num_blocks = source.num_blocks(split)
    bos = tokenizer.get_bos_token_id()
    capacity = sequence_len + 1
    while True:
        is_empty = block == 0
        while block < num_blocks:
            first, documents, total = block, [], 0
            while block < num_blocks and total < MIN_ROWS * capacity:
                texts = source.read_block(split, block)
                ids = tokenizer.encode_to_arrays(texts, prepend=bos, num_threads=num_threads)
                documents += [doc for doc in ids if len(doc) > 1]
                total = sum(map(len, documents))
                block += 1
            if documents:
                is_empty = False
                yield packed_unit(documents, capacity, epoch, first, block == num_blocks, device)
        if is_empty:
            raise InputError(f"the {split} split of {source.name} has no text; add documents to it")
        if not repeat:
            return
        epoch, block = epoch + 1, 0


def _produce(units: Iterator[Unit], out: queue.Queue[Any], stop: threading.Event) -> None:
    """Put all units, then None, or the exception that ended them.

    Not a method: a thread that held the loader would keep a forgotten one alive, and itself with it.
    """

    def put(item: Any) -> None:
        while not stop.is_set():
            try:
                return out.put(item, timeout=0.1)
            except queue.Full:
                pass

    try:
        for unit in units:
            put(unit)
            if stop.is_set():
                return
        put(None)
    except BaseException as error:  # raised again where the consumer waits
        put(error)


def _end(thread: threading.Thread, out: queue.Queue[Any], stop: threading.Event) -> None:
    """Stop the thread and wait for it: at the end of the program, one that is in Rust code would abort it."""
    stop.set()
    while thread.is_alive() and thread is not threading.current_thread():  # a loader may be collected in the thread
        with contextlib.suppress(queue.Empty):
            out.get_nowait()  # it may be waiting for room
        thread.join(0.01)


class PackingLoader:
    """Batches of (inputs, targets), int64 (B, T) each on the device; targets are the inputs one later.

    A global batch is the next W*B rows of one stream of rows that is the same for every world size; rank r
    takes rows r*B to (r+1)*B of it. Where a pass has no tokens left, targets are -1 and inputs BOS. A batch is
    the caller's to keep.

    Reading, tokenising, packing and pinning are done in a thread. What is left for the caller's, on a GPU: starting
    one copy of int32 rows (262 kB at 32 x 2,049 tokens) and four small kernels, none of which it waits for.

    Args:
        cursor: `loader.cursor` of an earlier loader over the same data (any W and B); None = the start.
        repeat: start again after the last document; False ends after one pass, the last batch being filled up
            with rows without targets, so that every rank gets equally many.

    Raises:
        InputError: no row of one input; while iterating: no text, damaged data, or a cursor that does not fit the data.
    """

    def __init__(
        self,
        source: Source,
        split: str,
        tokenizer: Any,
        *,
        batch_size: int,
        sequence_len: int,
        rank: int = 0,
        world_size: int = 1,
        cursor: dict[str, int] | None = None,
        device: str | torch.device = "cpu",
        repeat: bool = True,
    ) -> None:
        if sequence_len < 1:  # a row of BOS alone would never use up a text
            raise InputError(f"a sequence length of {sequence_len} holds no token; the shortest is 1")
        self.batch_size = batch_size
        self.sequence_len = sequence_len
        self.rank = rank
        self.world_size = world_size
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:  # the thread has a current device of its own
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._cursor = dict(cursor or {"epoch": 0, "block": 0, "row": 0})
        self._skip = self._cursor["row"]  # rows of the first unit that were taken before
        self._bos = tokenizer.get_bos_token_id()
        self._rows = torch.empty((0, sequence_len + 1), dtype=torch.int32)  # what is left of the current unit
        self._num_text = self._num_kept = 0
        self._is_over = False
        units = packed_units(
            source,
            split,
            tokenizer,
            sequence_len,
            self._cursor["epoch"],
            self._cursor["block"],
            repeat,
            encode_threads(world_size),
            self.device,
        )
        self._queue: queue.Queue[Any] = queue.Queue(UNITS_AHEAD)
        stop = threading.Event()
        thread = threading.Thread(target=_produce, args=(units, self._queue, stop), daemon=True)
        self._end = weakref.finalize(self, _end, thread, self._queue, stop)  # when forgotten, or at exit
        thread.start()

    @property
    def cursor(self) -> dict[str, int]:
        """Where the stream goes on after the last batch taken: {"epoch", "block", "row"}, from 0."""
        return dict(self._cursor)

    @property
    def tokens_kept(self) -> float:
        """Share of the text that the rows show, over the units begun so far (0 before the first).

        Tokens of text only: the BOS of a document, or one put before a rest, counts on neither side.
        """
        return self._num_kept / max(1, self._num_text)

    def _next_unit(self) -> bool:
        """Make the next unit the current one; False after the last."""
        item = self._queue.get()
        if item is None:
            return False
        if isinstance(item, BaseException):
            self._is_over = True
            raise item
        epoch, block, rows, num_text, num_kept = item
        if self._skip > len(rows) or (self._skip and (epoch, block) != (self._cursor["epoch"], self._cursor["block"])):
            raise InputError(f"cursor {self._cursor} does not fit the data; has the data set changed since?")
        self._rows, self._cursor = rows[self._skip :], {"epoch": epoch, "block": block, "row": self._skip}
        self._skip = 0
        self._num_text += num_text
        self._num_kept += num_kept
        return True

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        if self._is_over:
            raise StopIteration
        batch = torch.full((self.batch_size, self.sequence_len + 1), -1, dtype=torch.int32, device=self.device)
        wanted, mine = self.world_size * self.batch_size, self.rank * self.batch_size
        taken = 0  # rows of the global batch
        while taken < wanted and (len(self._rows) or self._next_unit()):
            part, self._rows = self._rows[: wanted - taken], self._rows[wanted - taken :]
            share = part[max(0, mine - taken) : max(0, mine + self.batch_size - taken)]
            at = max(0, taken - mine)
            # int32 is half the traffic; elsewhere than from pinned memory nothing keeps the source until it is read
            batch[at : at + len(share)].copy_(share, non_blocking=self.device.type == "cuda")
            taken += len(part)
            self._cursor["row"] += len(part)
        self._is_over = taken < wanted
        if not taken:
            raise StopIteration
        inputs, targets = batch[:, :-1].long(), batch[:, 1:].long()
        return inputs.masked_fill_(inputs < 0, self._bos), targets

    def close(self) -> None:
        """End the background thread, after the block it is at; the iteration is over."""
        self._is_over = True
        self._end()
