"""Keys and values of tokens gone by, and how keys lie in it.

# B rows, T positions, H_kv key/value heads, D head dim
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from nanochat.gpt import GPTConfig


class KVCache:
    """Keys and values of rows, each with its own length; or of some rows of another cache, see `at()`.

    k, v: per layer (rows, max_len, H_kv, D), k with one slot more for what the last key passes on (`offset_keys`);
    tokens: (rows, max_len) int64, their ids; lengths: (B,) int64, tokens held per row.
    rows: which of the memory's rows they are, a slice where they are neighbours;
    longest: the largest of the lengths where the host knows it, so that nobody need wait for the device to tell.
    """

    def __init__(self, config: GPTConfig, batch_size: int, max_len: int, device: Any, dtype: torch.dtype) -> None:
        self.has_offset_keys = config.has("offset_keys")
        shape = (config.n_kv_head, config.head_dim)
        layers = range(config.n_layer)
        self.k = [torch.zeros(batch_size, max_len + 1, *shape, device=device, dtype=dtype) for _ in layers]
        self.v = [torch.zeros(batch_size, max_len, *shape, device=device, dtype=dtype) for _ in layers]
        self.tokens = torch.zeros(batch_size, max_len, device=device, dtype=torch.int64)
        self.lengths = torch.zeros(batch_size, device=device, dtype=torch.int64)
        self.longest: int | None = None
        self._take_rows(range(batch_size))

    @staticmethod
    def row_bytes(config: GPTConfig, max_len: int, dtype: torch.dtype) -> int:
        """Of one row of a cache."""
        return config.n_layer * (2 * max_len + 1) * config.n_kv_head * config.head_dim * dtype.itemsize + 8 * max_len

    @property
    def max_len(self) -> int:
        return self.tokens.size(1)

    def at(self, rows: Sequence[int], lengths: Sequence[int]) -> KVCache:
        """The same memory as a cache of the given rows, of the given lengths. Neighbours cost no copy."""
        view = copy.copy(self)
        view.lengths = torch.tensor(lengths).to(self.tokens.device, non_blocking=True)
        view.longest = max(lengths)
        view._take_rows(rows)
        return view

    def _take_rows(self, rows: Sequence[int]) -> None:
        device, (first, last) = self.tokens.device, (rows[0], rows[-1]) if rows else (0, -1)
        is_range = list(rows) == list(range(first, last + 1))
        indices = torch.arange(first, last + 1, device=device) if is_range else torch.tensor(rows, device=device)
        self._index = indices[:, None]
        self.rows = slice(first, last + 1) if is_range else indices

    def resize(self, rows: Sequence[int], num_rows: int, max_len: int) -> None:
        """Keep the given rows, in their order, in a cache of another size; layer by layer, to need little memory."""
        width = min(max_len, self.max_len)
        kept = torch.tensor(rows, dtype=torch.int64, device=self.tokens.device)

        def resized(x: Tensor, width: int, max_len: int) -> Tensor:
            new = x.new_zeros(num_rows, max_len, *x.shape[2:])
            new[: len(kept), :width] = x[kept, :width]
            return new

        for layer in range(len(self.k)):
            self.k[layer] = resized(self.k[layer], width + 1, max_len + 1)
            self.v[layer] = resized(self.v[layer], width, max_len)
        self.tokens = resized(self.tokens, width, max_len)
        self.lengths = torch.zeros(num_rows, device=self.tokens.device, dtype=torch.int64)
        self._take_rows(range(num_rows))

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Give a row the first `length` tokens of another."""
        for x, n in self._parts(length):
            x[target, :n] = x[source, :n]

    def swap_rows(self, a: int, b: int, length: int) -> None:
        """Exchange the first `length` tokens of two rows."""
        for x, n in self._parts(length):
            held = x[a, :n].clone()
            x[a, :n] = x[b, :n]
            x[b, :n] = held

    def _parts(self, length: int) -> list[tuple[Tensor, int]]:
        """All that holds rows, and how much of it belongs to a row of that length."""
        return [(self.tokens, length), *((k, length + 1) for k in self.k), *((v, length) for v in self.v)]

    def previous(self, idx: Tensor, positions: Tensor) -> Tensor:
        """Keep the ids (B, T) that go to the (B, T) positions; returns the id before each, -1 before the first."""
        self.tokens[self._index, positions] = idx
        return torch.where(positions > 0, self.tokens[self._index, positions - 1], -1)

    def insert(self, layer: int, k: Tensor, v: Tensor, positions: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """Write (B, T, H_kv, D) at each row's (B, T) positions; returns the layer's slots 0..end."""
        if self.has_offset_keys:  # see offset_keys(): the slow channels belong to the next token's key
            fast, slow = fast_and_slow(self.k[layer])
            fast[self._index, positions], slow[self._index, positions + 1] = fast_and_slow(k)
        else:
            self.k[layer][self._index, positions] = k
        self.v[layer][self._index, positions] = v
        return self.k[layer][self.rows, :end], self.v[layer][self.rows, :end]


@dataclass(frozen=True)
class Slots:
    """Where in the cache the tokens of this forward go: (B, T) positions, all below `end`."""

    cache: KVCache
    positions: Tensor
    end: int


def fast_and_slow(k: Tensor) -> tuple[Tensor, Tensor]:
    """(..., D) keys -> views (..., 2, about D/4) of the channels that turn fast with the position and of the slow ones:
    the first and the second half of each half of `rotate`'s layout."""
    pairs = k.unflatten(-1, (2, -1))
    at = pairs.size(-1) // 2
    return pairs[..., :at], pairs[..., at:]


def offset_keys(k: Tensor) -> Tensor:
    """Each (B, T, H_kv, D) key gets the slow half of its channels from the key before it; the first has zeros there.

    A query that looks for a token then finds the one after it, so that one layer can do what takes an induction head
    two: find what followed the same token before. Partial key offset, record 49 of the modded-nanogpt speedrun (2025).
    """
    fast, slow = fast_and_slow(k)
    slow = F.pad(slow[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0))
    return torch.cat((fast, slow), dim=-1).flatten(-2)
