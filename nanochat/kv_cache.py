"""Keys and values of tokens gone by, and how keys lie in it.

# B rows, T positions, H_kv key/value heads, D head dim
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from nanochat.gpt import GPTConfig


class KVCache:
    """Keys and values of a batch of rows, each row with its own length.

    k, v: (n_layer, B, max_len, H_kv, D), k with one slot more for what the last key passes on (`offset_keys`);
    tokens: (B, max_len) int64, their ids; lengths: (B,) int64, tokens held per row.
    """

    def __init__(self, config: GPTConfig, batch_size: int, max_len: int, device: Any, dtype: torch.dtype) -> None:
        self.has_offset_keys = config.has("offset_keys")
        L, H, D = config.n_layer, config.n_kv_head, config.head_dim
        self.k = torch.zeros(L, batch_size, max_len + 1, H, D, device=device, dtype=dtype)
        self.v = torch.zeros(L, batch_size, max_len, H, D, device=device, dtype=dtype)
        self.tokens = torch.zeros(batch_size, max_len, device=device, dtype=torch.int64)
        self.lengths = torch.zeros(batch_size, device=device, dtype=torch.int64)

    @property
    def max_len(self) -> int:
        return self.v.size(2)

    def select(self, rows: Tensor, max_len: int | None = None) -> KVCache:
        """A cache of the given rows (int64 indices, repeats allowed), widened to max_len if given."""
        new = object.__new__(KVCache)
        new.has_offset_keys = self.has_offset_keys
        new.k, new.v = self.k[:, rows], self.v[:, rows]
        new.tokens, new.lengths = self.tokens[rows], self.lengths[rows]
        if max_len is not None and max_len > self.max_len:
            pad = (0, 0, 0, 0, 0, max_len - self.max_len)
            new.k, new.v, new.tokens = F.pad(new.k, pad), F.pad(new.v, pad), F.pad(new.tokens, pad[4:])
        return new

    def join(self, other: KVCache) -> KVCache:
        """A cache with the rows of both."""
        width = max(self.max_len, other.max_len)
        new, tail = (c.select(torch.arange(len(c.lengths), device=c.lengths.device), width) for c in (self, other))
        new.k, new.v = torch.cat((new.k, tail.k), dim=1), torch.cat((new.v, tail.v), dim=1)
        new.tokens, new.lengths = torch.cat((new.tokens, tail.tokens)), torch.cat((new.lengths, tail.lengths))
        return new

    def previous(self, idx: Tensor, positions: Tensor) -> Tensor:
        """Keep the ids (B, T) that go to the (B, T) positions; returns the id before each, -1 before the first."""
        rows = torch.arange(idx.size(0), device=idx.device)[:, None]
        self.tokens[rows, positions] = idx
        return torch.where(positions > 0, self.tokens[rows, positions - 1], -1)

    def insert(self, layer: int, k: Tensor, v: Tensor, positions: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """Write (B, T, H_kv, D) at each row's (B, T) positions; returns the layer's slots 0..end."""
        rows = torch.arange(k.size(0), device=k.device)[:, None]
        if self.has_offset_keys:  # see offset_keys(): the slow channels belong to the next token's key
            fast, slow = fast_and_slow(self.k[layer])
            fast[rows, positions], slow[rows, positions + 1] = fast_and_slow(k)
        else:
            self.k[layer][rows, positions] = k
        self.v[layer][rows, positions] = v
        return self.k[layer][:, :end], self.v[layer][:, :end]


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
