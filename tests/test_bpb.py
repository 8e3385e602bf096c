"""Bits per byte."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from nanochat import runtime
from nanochat.evals.bpb import UNITS, ExactBpb, evaluate_bpb, evaluate_documents, windows
from nanochat.gpt import GPT, GPTConfig
from nanochat.runtime import Runtime

TOKEN_BYTES = torch.tensor([0, 1, 2, 4], dtype=torch.int32)  # token 0 is a special one


def fixed_loss(nats: list[float]) -> Any:
    """A model whose losses are given."""

    def model(inputs: Tensor, targets: Tensor, reduction: str) -> Tensor:
        assert reduction == "none"
        return torch.tensor(nats[: targets.numel()])

    return model


def batch(*targets: int) -> tuple[Tensor, Tensor]:
    t = torch.tensor([targets], dtype=torch.int64)
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


@pytest.mark.parametrize("loss", [math.inf, math.nan])
def test_a_counted_loss_that_is_no_number_is_not_hidden(loss: float) -> None:
    assert math.isnan(evaluate_bpb(fixed_loss([1.0, loss]), [batch(1, 2)], TOKEN_BYTES))


def test_the_sum_does_not_depend_on_the_order() -> None:
    rng = np.random.default_rng(0)
    nats = (rng.random(1000) * 10 ** rng.uniform(-6, 2, 1000)).astype(np.float32)
    values = set()
    for seed in range(5):
        mixed = np.random.default_rng(seed).permutation(nats)
        parts = np.split(mixed, np.sort(rng.integers(0, 1000, seed)))
        losses = iter([part.tolist() for part in parts])
        batches = [batch(*[1] * len(part)) for part in parts]
        values.add(evaluate_bpb(lambda i, t, reduction, x=losses: torch.tensor(next(x)), batches, TOKEN_BYTES))
    (value,) = values
    assert value == pytest.approx(nats.astype(np.float64).sum() / 1000 / math.log(2), abs=1 / UNITS)


def test_a_number_of_batches_is_taken_and_no_more() -> None:
    batches = iter([batch(1), batch(1), batch(1)])
    evaluate_bpb(fixed_loss([1.0]), batches, TOKEN_BYTES, num_batches=2)
    assert len(list(batches)) == 1


def test_a_long_one_shows_how_far_it_is_and_a_short_one_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate_bpb(fixed_loss([1.0]), [batch(1)] * 4, TOKEN_BYTES, 4)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("nanochat.evals.bpb.SILENT_SECONDS", 0.0)
    evaluate_bpb(fixed_loss([1.0]), [batch(1)] * 4, TOKEN_BYTES)
    assert capsys.readouterr() == ("", "")  # a benchmark's, which has progress of its own
    evaluate_bpb(fixed_loss([1.0]), [batch(1)] * 4, TOKEN_BYTES, 4)
    assert re.search(r"Validation: +\d+%.*\d/4 \[\d\d:\d\d<", capsys.readouterr().err)


# ---- Whole documents


class Letters:
    """Ids 1.. for a.., BOS 0; `z` (26) stands for 4 bytes."""

    def get_bos_token_id(self) -> int:
        return 0

    def encode_to_arrays(self, texts: list[str], prepend: int) -> list[np.ndarray]:
        return [np.array([prepend, *(ord(c) - 96 for c in text)], np.int32) for text in texts]

    def token_bytes(self) -> Tensor:
        return torch.tensor([0, *[1] * 25, 4])


def a_model() -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(8, 27, n_layer=2, n_head=1, n_kv_head=1, n_embd=16))
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0.0, 0.3)
    return model.eval()


def some_documents() -> list[tuple[str, str]]:
    rng = np.random.default_rng(1)
    lengths = [1, 2, 7, 8, 9, 16, 17, 40, 3, 25]
    return [(f"s{n % 3}", "".join(chr(97 + c) for c in rng.integers(0, 26, n))) for n in lengths]


CPU = Runtime(torch.device("cpu"), torch.float32)


def exact(T: int = 8, stride: int | None = None, rows: int = 4, max_tokens: int | None = None, **rt: int) -> ExactBpb:
    runtime_ = Runtime(CPU.device, CPU.dtype, **rt)
    return evaluate_documents(a_model(), Letters(), runtime_, some_documents(), T, stride, rows, max_tokens)


def plainly(T: int, stride: int) -> tuple[float, dict[str, float]]:
    """One token at a time: its context begins where its window does."""
    model, letters = a_model(), Letters()
    sums: dict[str, list[float]] = {}
    for name, text in some_documents():
        (ids,) = letters.encode_to_arrays([text], 0)
        for t in range(1, len(ids)):
            if t <= T:
                first = 0
            else:  # windows after the first end at T + stride, T + 2 stride, ... or at the document's end
                end = min(len(ids) - 1, T + stride * math.ceil((t - T) / stride))
                first = max(0, end - T)
            with torch.no_grad():
                logits = model(torch.tensor([ids[first:t].tolist()]))[0, -1]
            nats = -torch.log_softmax(logits.double(), 0)[int(ids[t])].item()
            pair = sums.setdefault(name, [0.0, 0.0])
            pair[0] += nats
            pair[1] += 4 if ids[t] == 26 else 1

    def bpb(pairs: list[list[float]]) -> float:
        return sum(p[0] for p in pairs) / sum(p[1] for p in pairs) / math.log(2)

    return bpb(list(sums.values())), {name: bpb([pair]) for name, pair in sums.items()}


@pytest.mark.parametrize(("T", "stride"), [(8, None), (8, 3), (8, 1), (5, 5), (64, None), (1, None)])
def test_whole_documents_count_each_token_once_with_the_context_of_its_window(T: int, stride: int | None) -> None:
    found, (bpb, by_source) = exact(T, stride), plainly(T, stride or T)
    assert found.bpb == pytest.approx(bpb, rel=1e-6)
    assert found.by_source == {name: pytest.approx(value, rel=1e-6) for name, value in by_source.items()}
    assert found.num_documents == 10
    assert found.num_bytes == sum(len(text) + 3 * text.count("z") for _, text in some_documents())


def test_windows_by_hand() -> None:
    ids = np.arange(10)
    found = [(w.ids.tolist(), w.scored) for w in windows(ids, 4, 2)]
    assert found == [
        ([0, 1, 2, 3, 4], 4),
        ([2, 3, 4, 5, 6], 2),
        ([4, 5, 6, 7, 8], 2),
        ([5, 6, 7, 8, 9], 1),
    ]
    assert [(w.ids.tolist(), w.scored) for w in windows(ids[:1], 4, 2)] == []


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_the_batch_size_does_not_matter(rows: int) -> None:
    assert exact(stride=3, rows=rows).bpb == pytest.approx(exact(stride=3).bpb, rel=1e-7)


def test_documents_are_taken_up_to_the_limit_and_never_cut() -> None:
    assert [exact(max_tokens=n).num_documents for n in (1, 5, 12, 13, 10_000)] == [1, 2, 2, 3, 10]


def exact_rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    Path(folder, f"{rank}.txt").write_text(repr(exact(stride=3, rank=rank, world_size=2)), encoding="utf-8")
    runtime.stop()


def test_two_ranks_give_what_one_gives(tmp_path: Path) -> None:
    mp.spawn(exact_rank, args=(str(tmp_path),), nprocs=2)
    values = [(tmp_path / f"{r}.txt").read_text(encoding="utf-8") for r in range(2)]
    assert values == [repr(exact(stride=3))] * 2  # to the last digit: the batches are the same


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
