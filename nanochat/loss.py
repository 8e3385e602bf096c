"""Cross-entropy of a linear head under a soft cap, without the (N, V) fp32 logits.

The logits live a chunk of rows at a time: their matmul, their loss and their gradient follow one another, so that on a
CPU they stay in its cache and on a GPU their memory does not grow with N. For "sum" and "mean" the gradients are made
in the forward pass (Hsu et al. 2024, arXiv 2410.10989) and the backward pass multiplies them by the upstream scalar, so
that no logit is computed twice.

CPU time of one core of a loaded EPYC with AVX512-BF16, N 8,192, C 256, V 4,096, forward and backward: fp32 702 ms, bf16
383 ms; the plain loss compiled 934 and 572 ms, not compiled 1,493 and 1,284 ms and five times the memory.

# N rows, C width, V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.linear import rows_to_add

# A chunk's logits: on a CPU they, and their softmax beside them, fit a last-level cache; 1 to 8 MB measured the same.
CHUNK_BYTES_CPU = 4 << 20
CHUNK_BYTES_GPU = 512 << 20
MIN_ROWS = 128  # below it, adding to the (V, C) gradient of the head costs more than the chunk itself


class SoftCap(NamedTuple):
    """z = cap * tanh((u + shift) / scale). SoftCap(11.5, 15, 5) is the asymmetric 23 * sigmoid((u + 5) / 7.5) but for a
    constant, which a softmax does not see. `cap` at most 40: see `_chunk`."""

    cap: float = 15.0
    scale: float = 15.0
    shift: float = 0.0


def capped(u: Tensor, cap: SoftCap) -> Tensor:
    """(..., V) outputs of the head -> (..., V) fp32 logits: in bf16 a logit near 15 would be off by up to 0.03."""
    shifted = u.to(_wide(u.dtype)) + cap.shift
    return cap.cap * shifted.div_(cap.scale).tanh_()  # in place: there may be gigabytes of them


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, cap: SoftCap, reduction: str = "mean") -> Tensor:
    """Loss in nats of the head `weight` on the features x.

    Args:
        x: (N, C) in the compute dtype.
        weight: (V, C), fp32; cast to x.dtype once per call.
        targets: (N,) int64, -1 = not counted.
        reduction: "mean" over the counted targets (NaN if there is none, as torch has it), "sum" (0 if none) or "none".

    Returns:
        fp32 (), or for "none" (N,) with 0 where not counted.
    """
    if reduction == "none":
        return _loss_per_row(x, weight, targets, cap)
    needs = [t.requires_grad and torch.is_grad_enabled() for t in (x, weight)]
    total = _loss_sum(x, weight, targets, cap, needs)[0]
    return total / (targets != -1).sum() if reduction == "mean" else total


# Operators of their own: opaque to torch.compile, which would unroll the loop, yet no break in the caller's graph. In
# cache, the in-place passes of `_chunk` cost what one compiled pass does (29 against 26 ms of CPU time).
@torch.library.custom_op(
    "nanochat::loss_sum",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor targets, float[] cap, bool[] needs) -> (Tensor, Tensor, Tensor)",
)
def _loss_sum(
    x: Tensor, weight: Tensor, targets: Tensor, cap: Sequence[float], needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    losses, dx, dw = _chunks(x, weight, targets, cap, needs)
    return losses.sum(), dx, dw


@torch.library.custom_op(
    "nanochat::loss_per_row",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor targets, float[] cap) -> Tensor",
)
def _loss_per_row(x: Tensor, weight: Tensor, targets: Tensor, cap: Sequence[float]) -> Tensor:
    return _chunks(x, weight, targets, cap)[0]


@torch.library.custom_op(
    "nanochat::loss_per_row_backward",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor targets, float[] cap, bool[] needs, Tensor upstream) -> (Tensor, Tensor)",
)
def _loss_per_row_backward(
    x: Tensor, weight: Tensor, targets: Tensor, cap: Sequence[float], needs: Sequence[bool], upstream: Tensor
) -> tuple[Tensor, Tensor]:
    return _chunks(x, weight, targets, cap, needs, upstream)[1:]


def _chunks(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    cap: Sequence[float],
    needs: Sequence[bool] = (False, False),
    row_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (N,), and the gradients of sum(row_weights * losses) by x and by weight, empty where not needed.
    row_weights: (N,) or None = 1."""
    if x.device.type != "cpu" or (targets != -1).all():  # on a GPU, to ask would be to wait for it
        return _all_chunks(x, weight, targets, cap, needs, row_weights)
    at = (targets != -1).nonzero()[:, 0]
    n, extra = len(at), rows_to_add(x[at])
    some, some_targets = F.pad(x[at], (0, 0, 0, extra)), F.pad(targets[at], (0, extra), value=-1)
    some_weights = None if row_weights is None else F.pad(row_weights[at], (0, extra))
    losses, dx, dw = _all_chunks(some, weight, some_targets, cap, needs, some_weights)
    losses = losses.new_zeros(len(x)).index_copy_(0, at, losses[:n])
    return losses, dx.new_zeros(x.shape).index_copy_(0, at, dx[:n]) if needs[0] else dx, dw


def _all_chunks(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    cap: Sequence[float],
    needs: Sequence[bool],
    row_weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same; rows that are not counted take as long as the others."""
    N, V = x.size(0), weight.size(0)
    cap = SoftCap(*cap)
    counted = (targets != -1).to(_wide(x.dtype))
    row_weights = counted if row_weights is None else row_weights * counted
    w = weight.to(x.dtype)
    chunk_bytes = CHUNK_BYTES_CPU if x.device.type == "cpu" else CHUNK_BYTES_GPU
    rows = max(MIN_ROWS, chunk_bytes // (V * counted.element_size()))
    losses = torch.empty_like(counted)
    dx, dw = _gradients_like(x, weight, needs)
    dw.zero_()
    for at in range(0, N, rows):
        part = slice(at, at + rows)
        losses[part], g = _chunk(x[part] @ w.T, targets[part], row_weights[part], cap, any(needs))
        if needs[0]:
            torch.mm(g, w, out=dx[part])
        if needs[1]:
            _add_product(dw, g.T, x[part])
    return losses, dx, dw


def _gradients_like(x: Tensor, weight: Tensor, needs: Sequence[bool]) -> tuple[Tensor, Tensor]:
    dx, dw = (
        torch.empty(t.shape if needed else (0,), dtype=t.dtype, device=t.device)
        for t, needed in zip((x, weight), needs, strict=True)
    )
    return dx, dw


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b. The total over the chunks is in the weight's fp32: in bf16 it would stop growing once it is 256
    times what a chunk adds. A chunk's own sum is fp32 inside the matmul; on a CPU it leaves it rounded to bf16 once."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        total += torch.mm(a, b, out_dtype=total.dtype)
    else:  # no CPU matmul takes bf16 and gives fp32
        total += a @ b


def _chunk(u: Tensor, targets: Tensor, row_weights: Tensor, cap: SoftCap, with_gradient: bool) -> tuple[Tensor, Any]:
    """(n, V) outputs of the head, overwritten -> (n,) losses, (n, V) gradient of sum(row_weights * losses) by u.

    With s = sigmoid(2 (u + shift) / scale), cap * tanh = 2 cap s - cap: every logit lies within 2 cap of the top, so a
    softmax in fp32 needs no pass for the maximum (e^-80 is still a normal number), and dz/du = (4 cap / scale) s (1-s).
    """
    if u.is_cuda and u.dtype != torch.float64 and find_spec("triton"):
        from nanochat.kernels import capped_cross_entropy_

        return capped_cross_entropy_(u, targets, row_weights, cap, with_gradient)
    s = u.to(_wide(u.dtype)).add_(cap.shift).mul_(2 / cap.scale).sigmoid_()
    e = (s - 1).mul_(2 * cap.cap).exp_()
    total = e.sum(1)
    at = targets.clamp(min=0)[:, None]
    losses = (total.log() + (1 - s.gather(1, at)[:, 0]) * (2 * cap.cap)) * (targets != -1)
    if not with_gradient:
        return losses, None
    row_weights = row_weights * (4 * cap.cap / cap.scale)
    g = e.mul_((row_weights / total)[:, None])
    g.scatter_add_(1, at, -row_weights[:, None])
    return losses, g.mul_(s.addcmul_(s, s, value=-1)).to(u.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What the loss is computed in: fp32, or fp64 if x has it."""
    return torch.promote_types(dtype, torch.float32)


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, dx, dw = output
    ctx.mark_non_differentiable(dx, dw)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(dx, dw)
    ctx.needs = inputs[-1]


def _scale_gradients(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Any, ...]:
    grads = (
        grad * upstream.to(grad.dtype) if needed else None
        for grad, needed in zip(ctx.saved_tensors, ctx.needs, strict=True)
    )
    return *grads, None, None, None


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.cap = inputs
    ctx.save_for_backward(*tensors)


def _gradients_per_row(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    """The upstream gradient is a number per row, unknown in the forward pass: once more over the chunks."""
    needs = list(ctx.needs_input_grad[:2])
    grads = _loss_per_row_backward(*ctx.saved_tensors, ctx.cap, needs, upstream)
    return *(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), None, None


@_loss_sum.register_fake
def _(x: Tensor, weight: Tensor, targets: Tensor, cap: Any, needs: Any) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty((), dtype=_wide(x.dtype)), *_gradients_like(x, weight, needs)


@_loss_per_row.register_fake
def _(x: Tensor, weight: Tensor, targets: Tensor, cap: Any) -> Tensor:
    return x.new_empty(x.size(0), dtype=_wide(x.dtype))


@_loss_per_row_backward.register_fake
def _(x: Tensor, weight: Tensor, targets: Tensor, cap: Any, needs: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:
    return _gradients_like(x, weight, needs)


_loss_sum.register_autograd(_scale_gradients, setup_context=_save_gradients)
_loss_per_row.register_autograd(_gradients_per_row, setup_context=_save_inputs)
