"""Decoding on a GPU without waiting for Python: the kernels of a step are recorded once, and replayed from then on.

A step of one row is hundreds of kernels of a few microseconds each, which Python cannot launch as fast as they run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from nanochat.environment import print0
from nanochat.gpt import GPT
from nanochat.kv_cache import KVCache

Recorder = Callable[[Callable[[], None]], Callable[[], object]]

END = 256  # a recording sees slots 0..end of the cache, a multiple of this: a row needs another when it has grown by it
WARM_STEPS = 4  # not recorded, of each number of rows: recording takes about as long
MAX_RECORDINGS = 128  # the one that was unused for longest goes


def cuda_recorder() -> Recorder:
    """Makes, of a function, what launches again the kernels that it launches, on the same addresses."""
    pool = torch.cuda.graph_pool_handle()  # recordings are never replayed at once, so they can share their memory

    def record(run: Callable[[], None]) -> Callable[[], object]:
        graph = torch.cuda.CUDAGraph()
        run()  # libraries set themselves up at the first use of a shape, which cannot be recorded
        with torch.cuda.stream(torch.cuda.current_stream()):  # to which a failure does not always return by itself
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                run()
        return graph.replay

    return record


class GraphDecoder:
    """Steps of a model over the first rows of a cache. With another cache, or its memory elsewhere, it begins anew.

    Weights may change where they lie.
    """

    def __init__(self, model: GPT, max_rows: int, recorder: Callable[[], Recorder] = cuda_recorder) -> None:
        self.model, self.recorder = model, recorder
        self.idx = torch.zeros(max_rows, 1, dtype=torch.int64, device=model.device)
        self.lengths = torch.zeros(max_rows, dtype=torch.int64, device=model.device)
        self.logits = torch.zeros(max_rows, model.config.vocab_size, device=model.device)
        self.recordings: dict[tuple[int, int], tuple[Callable[[], object], KVCache]] = {}  # by rows and end
        self.met: dict[tuple[int, int], int] = {}  # how often
        self.is_off = False
        self.clear()

    def clear(self) -> None:
        """Forget the recordings, and with them the cache."""
        self.tokens: Tensor | None = None  # of the cache that the recordings are of
        self.recordings.clear()
        self.met.clear()
        self.record = self.recorder()  # a pool of recordings that are all gone cannot be used again

    def step(self, idx: Tensor, cache: KVCache) -> Tensor:
        """model(idx[:, None], cache=cache)[:, -1]: (B,) ids -> (B, V) fp32 logits, which hold until the next step."""
        if self.tokens is not cache.tokens:
            self.clear()
            self.tokens = cache.tokens
        assert cache.longest is not None and cache.rows == slice(0, len(idx))
        end = min(-(-(cache.longest + 1) // END) * END, cache.max_len, self.model.config.max_positions)
        key = len(idx), end
        self.met[key] = self.met.get(key, 0) + 1
        if key not in self.recordings and (self.is_off or self.met[key] <= WARM_STEPS):
            return self.model(idx[:, None], cache=cache)[:, -1]
        self.idx[: len(idx), 0] = idx
        self.lengths[: len(idx)] = cache.lengths
        if key not in self.recordings:
            try:
                self._record(*key, cache)
            except RuntimeError as error:  # a kernel that cannot be recorded
                self.is_off = True
                print0(f"decoding goes on without CUDA graphs, more slowly: {str(error).splitlines()[0]}")
                return self.model(idx[:, None], cache=cache)[:, -1]
        self.recordings[key] = recording = self.recordings.pop(key)
        recording[0]()
        cache.lengths = cache.lengths + 1
        return self.logits[: len(idx)]

    def _record(self, rows: int, end: int, cache: KVCache) -> None:
        view = copy.copy(cache)  # kept with the recording, whose kernels find the rows' numbers in it
        view.longest = end - 1

        def run() -> None:
            view.lengths = self.lengths[:rows]
            self.logits[:rows] = self.model(self.idx[:rows], cache=view)[:, -1]

        if len(self.recordings) == MAX_RECORDINGS:
            oldest = next(iter(self.recordings))
            del self.recordings[oldest], self.met[oldest]
        self.recordings[rows, end] = self.record(run), view
