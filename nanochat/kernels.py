"""Triton kernels; imports triton, so only `loss` imports this, and only for tensors on a GPU."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # columns at a time: 16 registers a thread in 8 warps


@triton.jit
def _capped_cross_entropy(
    u_ptr,
    row_stride,
    targets_ptr,
    row_weights_ptr,
    losses_ptr,
    V,
    cap,
    scale,
    shift,
    WITH_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    u_ptr += row.to(tl.int64) * row_stride  # n * V passes 2^31
    target = tl.load(targets_ptr + row)
    cols = tl.arange(0, BLOCK)
    totals = tl.zeros((BLOCK,), tl.float32)
    hits = tl.zeros((BLOCK,), tl.float32)
    for at in range(0, V, BLOCK):
        u = tl.load(u_ptr + at + cols, mask=at + cols < V, other=0.0).to(tl.float32)
        s = 1 / (1 + tl.exp((u + shift) * (-2 / scale)))
        totals += tl.where(at + cols < V, tl.exp((s - 1) * (2 * cap)), 0.0)
        hits += tl.where(at + cols == target, s, 0.0)
    total = tl.sum(totals, 0)
    # the target's s out of the same pass: reading it from u would race with the gradient that other warps write there
    s_target = tl.sum(hits, 0)
    loss = tl.log(total) + (1 - s_target) * (2 * cap)
    tl.store(losses_ptr + row, tl.where(target >= 0, loss, 0.0))
    if WITH_GRADIENT:
        row_weight = tl.load(row_weights_ptr + row) * (4 * cap / scale)
        for at in range(0, V, BLOCK):
            u = tl.load(u_ptr + at + cols, mask=at + cols < V, other=0.0).to(tl.float32)
            s = 1 / (1 + tl.exp((u + shift) * (-2 / scale)))
            g = tl.exp((s - 1) * (2 * cap)) / total - tl.where(at + cols == target, 1.0, 0.0)
            g = g * row_weight * s * (1 - s)
            tl.store(u_ptr + at + cols, g.to(u_ptr.dtype.element_ty), mask=at + cols < V)


def capped_cross_entropy_(
    u: Tensor, targets: Tensor, row_weights: Tensor, cap: tuple[float, float, float], with_gradient: bool
) -> tuple[Tensor, Any]:
    """`loss._chunk` in two passes over u, which the gradient overwrites."""
    n, V = u.shape
    losses = torch.empty(n, device=u.device, dtype=torch.float32)
    block = min(BLOCK, triton.next_power_of_2(V))
    _capped_cross_entropy[(n,)](
        u, u.stride(0), targets, row_weights, losses, V, *cap, WITH_GRADIENT=with_gradient, BLOCK=block, num_warps=8
    )
    return losses, u if with_gradient else None
