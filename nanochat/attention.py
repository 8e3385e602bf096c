"""Which attention runs where: torch's SDPA, which picks the best kernel that this device has.

# B rows, T query positions, S key positions, H heads, H_kv key/value heads, D head dim
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Each position attends to itself and all before it.

    Args:
        q: (B, T, H, D); k, v: (B, T, H_kv, D), H a multiple of H_kv.

    Returns:
        (B, T, H, D)
    """
    return _sdpa(q, k, v, is_causal=True)


def cached_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Queries against a cache: the query at position p sees the keys 0..p of its row.

    Args:
        q: (B, T, H, D); k, v: (B, S, H_kv, D), of which a row's slots beyond its length hold anything.
        positions: (B, T) int64, each query's position in its row.
    """
    S = k.size(1)
    visible = torch.arange(S, device=q.device) <= positions[:, :, None]  # (B, T, S)
    return _sdpa(q, k, v, mask=visible[:, None])


def _sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # SDPA wants heads in front
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=q.size(1) != k.size(1))
    return y.transpose(1, 2)
