"""Bits per byte: loss that does not depend on the vocabulary."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from nanochat import environment, runtime
from nanochat.ranks import together

# Losses are summed as integers of this many to a nat: the sum is the same in any order, so for any batches and ranks.
# One is 6e-8 nats, below what a loss of 1 has in fp32; a sum in int64 holds 5e11 nats.
UNITS = 2**24
DOCUMENTS_AT_ONCE = 256  # tokenized
SILENT_SECONDS = 5.0


@torch.no_grad()
def evaluate_bpb(
    model: Any, batches: Iterable[tuple[Tensor, Tensor]], token_bytes: Tensor, num_batches: int | None = None
) -> float:
    """Bits per byte of text over all batches of all ranks, which must all call it. With num_batches, one that takes
    longer than SILENT_SECONDS shows how far it is.

    bpb = sum(nats) / (ln 2 * sum(bytes)), both sums over the counted targets only: those >= 0 whose token
    stands for at least one byte. Special tokens (0 bytes) and masked targets (-1) leave both sums.

    Args:
        model: model(inputs, targets, reduction="none") gives the loss of each target in nats, (B*T,).
        batches: (inputs, targets), int64 (B, T) each; as many on every rank as it has.
        token_bytes: (V,) integers, the UTF-8 bytes that each token stands for.
        num_batches: most of this rank's to take; None = all.

    Returns:
        The same value on every rank; infinity where no byte is counted.

    Raises:
        RankError: the model or the batches failed on some rank; on every rank.
    """

    def sums() -> Tensor:
        total = torch.zeros(3, dtype=torch.int64, device=token_bytes.device)
        some = islice(batches, num_batches)
        hidden = num_batches is None or not environment.is_master()
        for inputs, targets in tqdm(
            some, "Validation", num_batches, False, mininterval=1, delay=SILENT_SECONDS, disable=hidden
        ):
            total += _row_sums(model, inputs, targets, token_bytes).sum(0).to(total.device)
        return total

    return bits_per_byte(runtime.all_reduce(together(sums)).tolist())


def _row_sums(model: Any, inputs: Tensor, targets: Tensor, token_bytes: Tensor) -> Tensor:
    """(B, 3) int64: each row's nats in UNITS, bytes, and counted targets whose loss is no number."""
    # Metal has no float64, which the product with UNITS takes
    where = torch.device("cpu") if inputs.device.type == "mps" else inputs.device
    losses = model(inputs, targets, reduction="none").to(where).double().view(targets.shape)  # (B, T)
    targets = targets.to(where)
    num_bytes = token_bytes.to(where)[targets.clamp(min=0)].long() * (targets >= 0)
    is_counted, is_number = num_bytes > 0, losses.isfinite()
    units = torch.where(is_counted & is_number, losses, 0.0).mul(UNITS).round().long()
    return torch.stack([units.sum(1), num_bytes.sum(1), (is_counted & ~is_number).sum(1)], 1)


def bits_per_byte(sums: Sequence[int]) -> float:
    """From (nats in UNITS, bytes, losses that are no number)."""
    units, num_bytes, num_bad = sums
    if num_bad:
        return math.nan
    return units / (UNITS * math.log(2) * num_bytes) if num_bytes else math.inf


@dataclass(frozen=True)
class ExactBpb:
    """Of whole documents, each of their tokens counted once."""

    bpb: float
    by_source: dict[str, float]  # in the order of first appearance
    num_documents: int
    num_bytes: int


@dataclass(frozen=True)
class Window:
    """A row of the exact evaluation: ids (up to T+1) of which the last `scored` are targets that count."""

    source: int
    ids: np.ndarray
    scored: int


def windows(ids: np.ndarray, T: int, stride: int, source: int = 0) -> Iterator[Window]:
    """Cut a document (BOS first) so that each token but BOS is a counted target once.

    Windows hold up to T inputs and move by `stride` tokens: after the first, each counts the tokens that no window
    before it had as targets, with the T - stride before these, or more at the end, as context. With stride T nothing is
    computed twice, and tokens at a window's start are predicted from little. (Baevski & Auli 2019, arXiv 1809.10853,
    evaluate with less stride than context.)
    """
    stop = 1  # tokens before it were targets, or are BOS
    while stop < len(ids):
        first = stop
        stop = min(len(ids), stop + (T if first == 1 else stride))
        yield Window(source, ids[max(0, stop - 1 - T) : stop], stop - first)


def evaluate_documents(
    model: Any,
    tokenizer: Any,
    rt: runtime.Runtime,
    documents: Iterable[tuple[str, str]],
    T: int,
    stride: int | None = None,
    device_batch_size: int = 32,
    max_tokens: int | None = None,
) -> ExactBpb:
    """Bits per byte of whole documents: what a packed row cuts off or mixes has no part in it.

    The value does not depend on how windows come together in batches or on ranks, but for how the device rounds in
    batches of another shape.

    Args:
        documents: (source, text), the same on every rank, which tokenizes all and computes its share.
        T: inputs of a row.
        stride: tokens from one window to the next; None = T.
        max_tokens: stop before the document that would go beyond; None = take all. The first is always taken.

    Raises:
        RankError: it failed on some rank; on every rank.
    """
    token_bytes = tokenizer.token_bytes().to(rt.device)
    names: dict[str, int] = {}
    counts = [0, 0]  # documents, tokens

    def all_windows() -> Iterator[Window]:
        remaining = iter(documents)
        while some := list(islice(remaining, DOCUMENTS_AT_ONCE)):
            encoded = tokenizer.encode_to_arrays([text for _, text in some], prepend=tokenizer.get_bos_token_id())
            for (name, _), ids in zip(some, encoded, strict=True):
                if max_tokens is not None and counts[0] and counts[1] + len(ids) > max_tokens:
                    return
                counts[0] += 1
                counts[1] += len(ids)
                yield from windows(ids, T, stride or T, names.setdefault(name, len(names)))

    def sums() -> list[list[int]]:
        totals: list[list[int]] = []
        for i, batch in enumerate(_batches(all_windows(), device_batch_size)):
            if i % rt.world_size == rt.rank:
                inputs, targets = _tensors(batch, rt.device)
                found = _row_sums(model, inputs, targets, token_bytes).tolist()
                for window, row in zip(batch, found, strict=True):
                    while len(totals) <= window.source:
                        totals.append([0, 0, 0])
                    totals[window.source] = [a + b for a, b in zip(totals[window.source], row, strict=True)]
        return totals + [[0, 0, 0]] * (len(names) - len(totals))

    with torch.no_grad():
        mine = torch.tensor(together(sums), dtype=torch.int64, device=rt.device).view(-1, 3)
    found = runtime.all_reduce(mine).tolist()
    total = [sum(column) for column in zip(*found, strict=True)] or [0, 0, 0]
    by_source = {name: bits_per_byte(found[i]) for name, i in names.items()}
    return ExactBpb(bits_per_byte(total), by_source, counts[0], total[1])


def _batches(all_windows: Iterable[Window], size: int) -> Iterator[list[Window]]:
    """Windows of like length together, from as many as make 16 batches."""
    remaining = iter(all_windows)
    while some := list(islice(remaining, 16 * size)):
        some.sort(key=lambda window: len(window.ids), reverse=True)
        yield from (some[at : at + size] for at in range(0, len(some), size))


def _tensors(batch: Sequence[Window], device: torch.device) -> tuple[Tensor, Tensor]:
    """(inputs, targets), (B, T) each; what is behind a row's end has no target."""
    width = max(len(window.ids) for window in batch) - 1
    inputs = np.zeros((len(batch), width), np.int64)
    targets = np.full((len(batch), width), -1, np.int64)
    for i, window in enumerate(batch):
        n = len(window.ids) - 1
        inputs[i, :n] = window.ids[:-1]
        targets[i, n - window.scored : n] = window.ids[n + 1 - window.scored :]
    return torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device)
