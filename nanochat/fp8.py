"""fp8 matmuls for the Linear layers of a training run (Micikevicius et al. 2022, arXiv 2209.05433).

Tensorwise dynamic scaling: a tensor is stored as x * scale with scale = fp8_max / max|x|. Forward multiplies e4m3 by
e4m3 with fast accumulation; backward multiplies the gradient in e5m2, which has the range, by the same e4m3 tensors
with exact accumulation. Weights stay fp32 and are the ones the optimizer knows; their fp8 copies live until it changes
them. Where no gradient is wanted (evaluation, sampling) a layer is the plain Linear.

Not for everything: below a width of about 1,280 the casts cost more than the matmuls save (reported for 8xH100:
depth 12 slower, depth 26 17% more tokens/s; not measured here).

# N rows, K in_features, M out_features
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MIN_WIDTH = 1280
ALIGNMENT = 16  # of every dimension, or the hardware refuses


def is_worth_fp8(name: str, linear: nn.Linear, min_width: int = MIN_WIDTH) -> bool:
    """Whether the layer is wide enough; never the head, whose matmul belongs to the loss."""
    sizes = linear.weight.shape
    is_aligned = not any(size % ALIGNMENT for size in sizes) and linear.bias is None
    return is_aligned and min(sizes) >= max(min_width, 128) and not name.endswith("lm_head")


def convert_to_fp8(model: nn.Module, wanted: Callable[[str, nn.Linear], bool] = is_worth_fp8) -> int:
    """Swap the wanted Linear layers of the model for fp8 ones with the same parameters, before it is compiled.

    Returns:
        How many were swapped. State dict, parameter names and optimizer groups are as before.
    """
    chosen = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and wanted(name, m)]
    for name, linear in chosen:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, Float8Linear(linear))
    if chosen:
        model.register_forward_pre_hook(_refresh_all)
    return len(chosen)


@torch.compiler.disable  # a compiled graph would keep the version that it was traced with
def _refresh_all(model: nn.Module, args: Any) -> None:
    for module in model.modules():
        if isinstance(module, Float8Linear):
            module.refresh()


class Float8Linear(nn.Linear):
    """Takes over another Linear's weight. The fp8 copies follow it by its version counter, which every in-place change
    outside `.data` advances, so that the micro-batches of a step share one cast."""

    weight_fp8: Tensor  # (M, K)
    weight_fp8_t: Tensor  # (K, M), contiguous: the backward pass needs the other layout
    weight_scale: Tensor  # (), what an fp8 value is to be multiplied by

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        M, K = linear.weight.shape
        device = linear.weight.device
        self.register_buffer("weight_fp8", torch.empty(M, K, dtype=E4M3, device=device), persistent=False)
        self.register_buffer("weight_fp8_t", torch.empty(K, M, dtype=E4M3, device=device), persistent=False)
        self.register_buffer("weight_scale", torch.empty((), device=device), persistent=False)
        self.version: int | None = None
        self.train(linear.training)

    @torch.no_grad()
    def refresh(self) -> None:
        if self.version == self.weight._version:
            return
        weight_fp8, scale = quantize(self.weight, E4M3)
        self.weight_fp8.copy_(weight_fp8)
        self.weight_fp8_t.copy_(weight_fp8.T)
        self.weight_scale.copy_(scale)
        self.version = self.weight._version

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.size(-1)
        if not (self.training and torch.is_grad_enabled()) or rows % ALIGNMENT:
            return F.linear(x, self.weight.to(x.dtype))
        if not torch.compiler.is_compiling():  # compiled: _refresh_all has done it
            self.refresh()
        args = self.weight, self.weight_fp8, self.weight_fp8_t, self.weight_scale
        y = _Matmul.apply(x.reshape(rows, -1), *args)  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], -1)


class _Matmul(torch.autograd.Function):
    """(N, K) -> x @ weight.T (N, M). `weight` is there for its gradient only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, w8: Tensor, w8_t: Tensor, w_scale: Tensor) -> Tensor:
        x8, x_scale = quantize(x, E4M3)
        ctx.save_for_backward(x8, x_scale, w8_t, w_scale)
        ctx.dtypes = x.dtype, weight.dtype
        return multiply(x8, w8.T, x_scale * w_scale, x.dtype, is_fast=True)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        x8, x_scale, w8_t, w_scale = ctx.saved_tensors
        dy8, dy_scale = quantize(dy, E5M2)
        dx = multiply(dy8, w8_t.T, dy_scale * w_scale, ctx.dtypes[0], is_fast=False)
        dw = multiply(dy8.T.contiguous(), x8.T.contiguous().T, dy_scale * x_scale, ctx.dtypes[1], is_fast=False)
        return dx, dw, None, None, None


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """fp8 values and the fp32 () factor that gives x back. A tensor of zeros has a finite factor."""
    largest = torch.finfo(dtype).max
    scale = (
        largest / x.abs().max().double().clamp(min=1e-12)
    ).float()  # fp64: an fp32 quotient may land beyond fp8_max
    return (x.float() * scale).clamp(-largest, largest).to(dtype), 1 / scale


def multiply(a: Tensor, b: Tensor, scale: Tensor, dtype: torch.dtype, is_fast: bool) -> Tensor:
    """(a @ b) * scale for fp8 a (row-major) and b (column-major). Off a GPU the same products are summed in fp32, so
    that the rounding can be tested there."""
    if not a.is_cuda:
        return (a.float() @ b.float() * scale).to(dtype)
    one = torch.ones_like(scale)
    return torch._scaled_mm(a, b, scale_a=scale, scale_b=one, out_dtype=dtype, use_fast_accum=is_fast)
