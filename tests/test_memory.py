"""The memory model against public runs, and what it says fits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nanochat import gpt, loss, memory
from nanochat.memory import divisors, fitting_rows, memory_bytes, optimizer_bytes, smaller
from nanochat.scaling import shape_from_depth

V, T = 65_536, 2048


@pytest.mark.parametrize(("depth", "mib"), [(8, 19_176), (20, 75_422)])
def test_estimated_memory_is_within_3_percent_of_the_two_public_runs_which_held_all_logits(depth, mib):
    estimate = memory_bytes(shape_from_depth(depth, V, T), 32, 8, chunked_loss=False)
    assert estimate / 2**20 == pytest.approx(mib, rel=0.03)


def test_a_chunked_loss_holds_no_more_logits_than_a_chunk_has():
    shape = shape_from_depth(8, V, T)
    assert memory.LOGITS_AT_ONCE == loss.CHUNK_BYTES_GPU // 4
    rows = memory.LOGITS_AT_ONCE // (V * T)  # one row of logits fills a chunk
    activations = memory_bytes(shape, 2 * rows, 1) - memory_bytes(shape, rows, 1)
    assert activations == pytest.approx(memory.ACTIVATION_VALUES * 2 * rows * T * 8 * 512)  # and no logits


def test_recomputing_keeps_one_block_in_full_and_the_inputs_of_all():
    shape = shape_from_depth(20, V, T)
    whole, less = memory_bytes(shape, 8, 1), memory_bytes(shape, 8, 1, recompute=True)
    values = memory.ACTIVATION_VALUES
    assert whole - less == pytest.approx((20 * values - (20 + values)) * 2 * 8 * T * 1280)


def test_activations_take_twice_the_bytes_in_fp32_and_the_weights_the_same():
    shape = shape_from_depth(4, 1024, 256)
    in_bf16, in_fp32 = (memory_bytes(shape, 8, 1, value_bytes=n) for n in (2, 4))
    assert in_fp32 - in_bf16 == pytest.approx(memory.ACTIVATION_VALUES * 2 * 8 * 256 * 4 * 256)


def test_the_activations_that_autograd_keeps_are_about_those_of_the_memory_model():
    config = gpt.GPTConfig(256, 512, 3, 2, 2, 128)
    model = gpt.GPT(config)
    model.init_weights()
    weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept = {}

    def count(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        x = model.features(torch.zeros(2, 256, dtype=torch.int64))
    values = sum(n for at, n in kept.items() if at not in weights) / 4 / (2 * 256 * 3 * 128)
    assert x.shape == (2, 256, 128)
    assert values == pytest.approx(memory.ACTIVATION_VALUES, rel=0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_layer", [3, 6])
def test_modern_keeps_the_bytes_of_the_memory_model_whose_residual_stream_is_fp32(dtype, n_layer):
    config = gpt.GPTConfig(128, 512, n_layer, 2, 2, 128, "modern")
    model = gpt.GPT(config)
    model.init_weights()
    model.prepare(torch.device("cpu"), dtype)

    def kept(rows: int) -> int:
        """Bytes, those of the weights' casts included."""
        found, alive = {}, []

        def count(x: torch.Tensor) -> torch.Tensor:
            alive.append(x)  # or another tensor might get its address
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            model.features(torch.zeros(rows, 128, dtype=torch.int64))
        return sum(found.values())

    def expected(rows: int) -> float:
        no_logits = replace(config.shape, vocab_size=0)
        return memory_bytes(no_logits, rows, 1, value_bytes=dtype.itemsize)

    assert kept(4) - kept(2) == pytest.approx(expected(4) - expected(2), rel=0.15)


def test_recomputing_modern_keeps_the_fp32_stream_before_and_after_the_lambdas_of_each_block():
    shape = shape_from_depth(20, V, T, arch="modern")
    whole, less = memory_bytes(shape, 8, 1), memory_bytes(shape, 8, 1, recompute=True)
    block = 2 * memory.LAMBDA_VALUES + 4 * memory.STREAM_VALUES
    assert whole - less == pytest.approx((20 * block - (20 * 2 * 4 + block)) * 8 * T * 1280)


@pytest.mark.parametrize(
    ("sequence_len", "n_layer", "recompute", "flag"),
    [
        (2048, 20, False, "--recompute"),
        (2048, 20, True, "--max_seq_len=1024"),
        (128, 20, True, "--depth=10"),
        (128, 10, True, "--depth=4"),
        (128, 2, True, "--depth=1"),
    ],
)
def test_where_a_row_is_too_much_recomputing_comes_first_then_half_the_context_then_half_the_depth(
    sequence_len, n_layer, recompute, flag
):
    assert memory.less_memory(sequence_len, n_layer, recompute) == flag


def test_the_optimizers_state_is_shared_out_over_the_ranks():
    shape = shape_from_depth(8, V, T)
    assert optimizer_bytes(shape, 1) == 8 * 2 * V * 512 + 4 * 8 * 12 * 512**2
    assert optimizer_bytes(shape, 8) == optimizer_bytes(shape, 1) / 8


def test_rows_that_fit_are_divisors_from_the_largest_on_and_recomputing_comes_last():
    shape = shape_from_depth(20, V, T)
    room = memory_bytes(shape, 12, 1)
    assert list(fitting_rows(shape, 24, 1, room)) == [(n, False) for n in (12, 8, 6, 4, 3, 2, 1)]
    both = list(fitting_rows(shape, 24, 1, room, ways=(False, True)))
    assert both[:7] == [(n, False) for n in (12, 8, 6, 4, 3, 2, 1)] and both[7] == (24, True)
    assert list(fitting_rows(shape, 24, 1, room, pass_tokens=5 * T)) == [(n, False) for n in (4, 3, 2, 1)]
    assert list(fitting_rows(shape, 24, 1, room, pass_tokens=1)) == [(1, False)]
    just_too_little = memory_bytes(shape, 1, 1) - 1
    assert list(fitting_rows(shape, 1, 1, just_too_little, ways=(False, True))) == [(1, True)]
    assert list(fitting_rows(shape, 24, 1, 1e9, ways=(False, True))) == []


def test_a_model_of_which_no_row_fits_gets_half_the_context_or_else_fewer_layers():
    shape = shape_from_depth(20, V, T)
    context = replace(shape, sequence_len=512)
    assert smaller(shape, 1, memory_bytes(context, 1, 1)) == "--max_seq_len=512"
    flags = smaller(shape, 1, memory_bytes(shape_from_depth(12, V, T), 1, 1))
    assert flags == "--depth=12"
    assert smaller(shape, 1, 1000) == "a machine with more memory"


@pytest.mark.parametrize(("n", "expected"), [(1, [1]), (12, [12, 6, 4, 3, 2, 1]), (7, [7, 1]), (16, [16, 8, 4, 2, 1])])
def test_divisors_come_from_the_largest_on(n, expected):
    assert divisors(n) == expected
