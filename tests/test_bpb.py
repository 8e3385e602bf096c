"""Bits per byte."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from nanochat import runtime
from nanochat.evals.bpb import evaluate_bpb

TOKEN_BYTES = torch.tensor([0, 1, 2, 4], dtype=torch.int32)  # token 0 is a special one


def fixed_loss(nats: list[float]) -> Any:
    """A model whose losses are given."""

    def model(inputs: Tensor, targets: Tensor, reduction: str) -> Tensor:
        assert reduction == "none"
        return torch.tensor(nats[: targets.numel()])

    return model


def batch(*targets: int) -> tuple[Tensor, Tensor]:
    t = torch.tensor([targets])
    return torch.zeros_like(t), t


def test_one_bit_for_each_byte_is_1() -> None:
    ln2 = math.log(2)
    assert evaluate_bpb(fixed_loss([ln2, 2 * ln2, 4 * ln2]), [batch(1, 2, 3)], TOKEN_BYTES) == pytest.approx(1)


def test_sums_are_over_all_batches_not_means_of_means() -> None:
    ln2 = math.log(2)
    # 3 bits on 1 byte, then 3 and 0 bits on 2 + 4 bytes: 6 bits on 7 bytes
    value = evaluate_bpb(fixed_loss([3 * ln2, 0.0]), [batch(1), batch(2, 3)], TOKEN_BYTES)
    assert value == pytest.approx(6 / 7)


@pytest.mark.parametrize("loss", [5.0, math.inf, math.nan])
def test_special_and_masked_targets_leave_both_sums(loss: float) -> None:
    value = evaluate_bpb(fixed_loss([math.log(2), loss, loss]), [batch(1, 0, -1)], TOKEN_BYTES)
    assert value == pytest.approx(1)


def test_without_a_counted_byte_it_is_infinite() -> None:
    assert evaluate_bpb(fixed_loss([1.0, 1.0]), [batch(0, -1)], TOKEN_BYTES) == math.inf
    assert evaluate_bpb(fixed_loss([]), [], TOKEN_BYTES) == math.inf


def test_small_losses_are_not_lost_beside_a_large_sum() -> None:
    batches = [batch(1)] * 3
    losses = iter([2.0**24, 1.0, 1.0])  # in float32 2**24 + 1 is 2**24

    def model(inputs: Tensor, targets: Tensor, reduction: str) -> Tensor:
        return torch.tensor([next(losses)])

    assert evaluate_bpb(model, batches, TOKEN_BYTES) * 3 * math.log(2) == pytest.approx(2**24 + 2, abs=0.5)


def one_rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    ln2 = math.log(2)
    # rank 0: 1 bit on 1 byte; rank 1: 9 bits on 4 bytes
    value = evaluate_bpb(fixed_loss([[ln2], [9 * ln2]][rank]), [[batch(1)], [batch(3)]][rank], TOKEN_BYTES)
    Path(folder, f"{rank}.txt").write_text(str(value), encoding="utf-8")
    runtime.stop()


def test_all_ranks_get_the_value_over_all_text(tmp_path: Path) -> None:
    mp.spawn(one_rank, args=(str(tmp_path),), nprocs=2)
    values = [float((tmp_path / f"{r}.txt").read_text(encoding="utf-8")) for r in range(2)]
    assert values == [pytest.approx(2), pytest.approx(2)]
