"""Weights as 8-bit integers with a scale a row: half of bf16's memory, and of what a decode step on a CPU has to read.

The scale is the row's largest magnitude / 127, the usual symmetric rounding (Dettmers et al. 2022, arXiv 2208.07339,
without its outliers: these models have no trained norm weights that make any). `scripts/base_loss.py --quantize=int8`
says what it costs in bits per byte.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nanochat.gpt import GPT
from nanochat.linear import Linear, linear

QUANTIZED = ("int8",)


class Int8Linear(Linear):
    """A Linear that is not trained any more. Its products are those of the integers, which bf16 has exactly, times the
    scales; decoding on a CPU reads the integers as they are."""

    integers: Tensor  # (out, in) int8
    scales: Tensor  # (out,) fp32

    def __init__(self, weight: Tensor) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.register_parameter("bias", None)
        weight = weight.detach().float()
        scales = weight.abs().amax(dim=1).clamp(min=1e-12) / 127  # a row of zeros stays zeros
        self.register_buffer("scales", scales)
        self.register_buffer("integers", (weight / scales[:, None]).round().to(torch.int8))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """(out, in) fp32, made anew for each use."""
        return self.integers.float().mul_(self.scales[:, None])

    def forward(self, x: Tensor) -> Tensor:
        return (linear(x, self.integers.to(x.dtype)) * self.scales).to(x.dtype)


def quantize_int8(model: GPT) -> GPT:
    """Swap all matrices for integers, in place. Embeddings, of which a step reads a row, stay, and so do the gates."""
    for block in model.blocks:
        for part in (block.attn, block.mlp):
            for name in ("c_q", "c_k", "c_v", "c_proj", "c_fc"):
                if hasattr(part, name):
                    setattr(part, name, Int8Linear(getattr(part, name).weight))
    model.lm_head = Int8Linear(model.lm_head.weight)
    return model
