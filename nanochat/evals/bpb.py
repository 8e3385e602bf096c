"""Bits per byte: loss that does not depend on the vocabulary."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from nanochat import runtime


@torch.no_grad()
def evaluate_bpb(model: Any, batches: Iterable[tuple[Tensor, Tensor]], token_bytes: Tensor) -> float:
    """Bits per byte of text over all batches of all ranks, which must all call it.

    bpb = sum(nats) / (ln 2 * sum(bytes)), both sums over the counted targets only: those >= 0 whose token
    stands for at least one byte. Special tokens (0 bytes) and masked targets (-1) leave both sums.

    Args:
        model: model(inputs, targets, reduction="none") gives the loss of each target in nats, (B*T,).
        batches: (inputs, targets), int64 (B, T) each; as many on every rank as it has.
        token_bytes: (V,) integers, the UTF-8 bytes that each token stands for.

    Returns:
        The same value on every rank; infinity where no byte is counted.

    Raises:
        RankError: the model or the batches failed on some rank; on every rank.
    """
    sums = runtime.all_reduce(runtime.together(lambda: _sums(model, batches, token_bytes)))
    nats, total_bytes = sums.tolist()
    return nats / (math.log(2) * total_bytes) if total_bytes else math.inf


def _sums(model: Any, batches: Iterable[tuple[Tensor, Tensor]], token_bytes: Tensor) -> Tensor:
    """(2,) float64, which holds byte counts exactly up to 2**53: this rank's nats and bytes."""
    sums: Tensor | None = None
    for inputs, targets in batches:
        # Metal has no float64, and the sum must not lose small losses beside a large total
        where = torch.device("cpu") if inputs.device.type == "mps" else inputs.device
        losses = model(inputs, targets, reduction="none").to(where).double()  # (B*T,)
        flat = targets.reshape(-1).to(where)
        num_bytes = token_bytes.to(where)[flat.clamp(min=0)] * (flat >= 0)
        counted = torch.where(num_bytes > 0, losses, 0.0)  # not a product: 0 * inf would be nan
        batch_sums = torch.stack([counted.sum(), num_bytes.sum().double()])
        sums = batch_sums if sums is None else sums + batch_sums
    return torch.zeros(2, dtype=torch.float64, device=token_bytes.device) if sums is None else sums
