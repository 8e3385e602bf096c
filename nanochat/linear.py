"""The matrix product of every layer, and how many rows it takes at a time.

oneDNN writes a program for each shape of a bf16 product that it meets on a CPU, in some 1.5 ms, and keeps 1,024 of
them, 0.7 MB each (measured: AMX, torch 2.15). An engine's prompts and the conversations of fine-tuning come in any
number of tokens, so rows of zeros round it up: fine-tuning a small model takes a quarter less time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """No bias; weights live in fp32 for the optimizer and are cast to the activations' dtype here."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight.to(x.dtype))


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """F.linear: (..., C) -> (..., C_out)."""
    extra = rows_to_add(x)
    if not extra:
        return F.linear(x, weight)
    flat = x.flatten(0, -2)
    return F.linear(F.pad(flat, (0, 0, 0, extra)), weight)[: len(flat)].view(*x.shape[:-1], len(weight))


def rows_to_add(x: Tensor) -> int:
    """How many rows of zeros bring x (..., C) to one of four numbers of rows an octave: an eighth more on average. 0
    where shapes cost nothing: on a GPU, in another dtype, or compiled, when they stay the same."""
    if x.device.type != "cpu" or x.dtype != torch.bfloat16 or torch.compiler.is_compiling():
        return 0
    rows = x.numel() // x.size(-1)
    return -rows % (1 << max(0, rows.bit_length() - 3))
