"""The device batch that fits, by estimate and by trying."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nanochat import fit, memory, runtime
from nanochat.config import InputError
from nanochat.gpt import GPTConfig
from nanochat.runtime import Runtime

CPU = Runtime(torch.device("cpu"), torch.float32)
CONFIG = GPTConfig(sequence_len=64, vocab_size=50, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)


def needs(rows: int, recompute: bool = False) -> float:
    return memory.memory_bytes(CONFIG.shape, rows, 1, recompute, value_bytes=4)


def with_memory(monkeypatch: pytest.MonkeyPatch, num_bytes: float) -> None:
    """So much for training, and a byte for rounding."""
    monkeypatch.setattr(runtime, "available_memory", lambda rt: (num_bytes + 1) / memory.CPU_SHARE)


def no_probe(*args: object) -> bool:
    pytest.fail("probed")


def test_with_memory_to_spare_all_rows_go_in_one_pass_without_a_probe(monkeypatch):
    with_memory(monkeypatch, 1e12)
    monkeypatch.setattr(fit, "probe", no_probe)
    assert fit.find_rows(CONFIG, CPU, 24) == (24, False)
    assert fit.find_rows(CONFIG, CPU, 1024)[0] == memory.CPU_PASS_TOKENS // 64


def test_a_tight_fit_is_tried_and_halved_until_a_pass_goes_through(monkeypatch):
    with_memory(monkeypatch, needs(24))
    tried = []

    def pass_of(config, rt, rows, recompute, compile, fp8):
        tried.append(rows)
        if rows > 6:
            torch.empty(1 << 50)

    monkeypatch.setattr(fit, "_pass", pass_of)
    assert fit.find_rows(CONFIG, CPU, 48) == (6, False)
    assert tried == [24, 16, 12, 8, 6]


def test_a_real_pass_of_what_fits_goes_through_and_leaves_the_seed_alone(monkeypatch):
    with_memory(monkeypatch, needs(8))
    passes = []
    real = fit._pass
    monkeypatch.setattr(fit, "_pass", lambda *args: passes.append(args[2]) or real(*args))
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    assert fit.find_rows(CONFIG, CPU, 16) == (8, False)
    assert passes == [8]
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("fp8", [False, True])
def test_the_model_that_is_tried_multiplies_in_fp8_where_the_run_does(monkeypatch, fp8):
    with_memory(monkeypatch, needs(8))
    converted = []
    monkeypatch.setattr(fit, "convert_to_fp8", converted.append)
    assert fit.find_rows(CONFIG, CPU, 8, fp8=fp8) == (8, False)
    assert len(converted) == fp8


def test_rows_that_are_asked_for_are_taken_up_to_all_that_is_free(monkeypatch):
    monkeypatch.setattr(runtime, "available_memory", lambda rt: needs(24))
    fit.check_rows(CONFIG, CPU, 24, False)
    with pytest.raises(InputError, match=r"^--device_batch_size 48 takes about .* GiB of memory, and .* free"):
        fit.check_rows(CONFIG, CPU, 48, False)


DEEP = GPTConfig(sequence_len=64, vocab_size=50, n_layer=8, n_head=2, n_kv_head=2, n_embd=32)


@pytest.mark.parametrize(
    ("rows", "recompute", "fitting", "flags"),
    [
        (48, False, (24, False), "--device_batch_size=24"),
        (48, True, (12, True), "--device_batch_size=12"),
        (1, False, (1, True), "--recompute"),
        (8, False, (8, True), "--device_batch_size=1"),  # fewer rows come before recomputing
    ],
)
def test_rows_beyond_the_memory_are_refused_with_flags_that_fit(monkeypatch, rows, recompute, fitting, flags):
    n, again = fitting
    with_memory(monkeypatch, memory.memory_bytes(DEEP.shape, n, 1, again, value_bytes=4))
    with pytest.raises(InputError, match=f"; try {flags}$"):
        fit.check_rows(DEEP, CPU, rows, recompute)


def test_a_model_of_which_the_rows_asked_for_never_fit_gets_another_and_one_row(monkeypatch):
    config = GPTConfig(sequence_len=1024, vocab_size=50, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)
    with_memory(monkeypatch, memory.memory_bytes(replace(config.shape, sequence_len=256), 1, 1, value_bytes=4))
    with pytest.raises(InputError, match=r"; try --max_seq_len=256 --device_batch_size=1$"):
        fit.check_rows(config, CPU, 16, False)
    with_memory(monkeypatch, 10.0)
    with pytest.raises(InputError, match=r"; try a machine with more memory$"):
        fit.check_rows(config, CPU, 16, False)


def test_a_mistake_in_the_pass_is_not_taken_for_a_lack_of_memory(monkeypatch):
    def wrong(*args: object) -> None:
        torch.ones(2, 3) @ torch.ones(2, 3)

    monkeypatch.setattr(fit, "_pass", wrong)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        fit.probe(CONFIG, CPU, 1, False)


def test_activations_are_recomputed_before_a_model_is_refused(monkeypatch):
    config = GPTConfig(sequence_len=64, vocab_size=50, n_layer=8, n_head=2, n_kv_head=2, n_embd=32)
    less = memory.memory_bytes(config.shape, 1, 1, True, value_bytes=4)
    assert less < memory.memory_bytes(config.shape, 1, 1, value_bytes=4)
    with_memory(monkeypatch, less)
    monkeypatch.setattr(fit, "probe", lambda *args: True)
    assert fit.find_rows(config, CPU, 4) == (1, True)


def test_recomputing_that_is_asked_for_is_counted_on(monkeypatch):
    with_memory(monkeypatch, needs(4, recompute=True))
    monkeypatch.setattr(fit, "probe", lambda *args: True)
    assert fit.find_rows(CONFIG, CPU, 8, recompute=True) == (4, True)


def test_a_model_of_which_not_one_row_fits_is_refused_with_one_that_does(monkeypatch):
    config = GPTConfig(sequence_len=1024, vocab_size=50, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)
    half = GPTConfig(sequence_len=256, vocab_size=50, n_layer=2, n_head=2, n_kv_head=2, n_embd=32).shape
    with_memory(monkeypatch, memory.memory_bytes(half, 1, 1, True, value_bytes=4))
    with pytest.raises(
        InputError, match=r"^not one row of 1024 tokens of --depth 2 fits the 0.0 GiB .*=\d+$"
    ) as refused:
        fit.find_rows(config, CPU, 4)
    assert str(refused.value).endswith("try --max_seq_len=256")


def fails_on_the_second(rt: Runtime, folder: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "_pass", lambda *args: torch.empty(1 << 50) if rt.rank and args[2] > 4 else None)
        patch.setattr(runtime, "available_memory", lambda rt: (needs(16) + 1) / memory.CPU_SHARE)
        rows, _ = fit.find_rows(CONFIG, rt, 16)
    assert rows == 4


def test_ranks_agree_on_the_rows_that_fit_everywhere(two_ranks, tmp_path):
    two_ranks(fails_on_the_second, str(tmp_path))
