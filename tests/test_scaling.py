"""From depth to everything: the table of the reference, the horizon, batches, learning rates, memory."""

from __future__ import annotations

import pytest

from nanochat.config import InputError
from nanochat.scaling import (
    grad_accum_steps,
    lr_multiplier,
    memory_bytes,
    muon_momentum,
    num_iterations,
    round_to_multiple,
    shape_from_depth,
)

V, T, BATCH = 65_536, 2048, 524_288


@pytest.mark.parametrize(
    ("depth", "n_embd", "n_head", "num_params", "flops_per_token", "steps"),
    [
        (4, 256, 2, 36_700_160, 144_703_488, 1_400),
        (8, 512, 4, 92_274_688, 452_984_832, 3_520),
        (12, 768, 6, 185_597_952, 1_038_090_240, 7_080),
        (20, 1280, 10, 560_988_160, 3_491_758_080, 21_400),
        (26, 1664, 13, 1_081_999_360, 6_900_940_800, 41_275),
        (32, 2048, 16, 1_879_048_192, 12_079_595_520, 71_680),
    ],
)
def test_depth_gives_the_reference_sizes_flops_and_horizon(depth, n_embd, n_head, num_params, flops_per_token, steps):
    shape = shape_from_depth(depth, V, T)
    assert (shape.n_embd, shape.n_head, shape.n_kv_head) == (n_embd, n_head, n_head)
    assert shape.num_params == num_params
    assert shape.flops_per_token == flops_per_token
    assert num_iterations(shape, BATCH, None, None, 20)[0] == steps


def test_fewer_key_heads_mean_fewer_parameters_and_the_same_attention_flops():
    full = shape_from_depth(8, V, T)
    grouped = type(full)(full.n_layer, full.n_embd, full.n_head, 1, V, T)
    saved = 8 * 2 * 512 * (512 - 128)  # per layer, two matrices narrower by three heads of 128
    assert full.num_params - grouped.num_params == saved
    assert full.flops_per_token - grouped.flops_per_token == 6 * saved


@pytest.mark.parametrize(("depth", "head_dim"), [(1, 64), (2, 128), (3, 96), (7, 112), (15, 120)])
def test_odd_depths_that_divide_are_taken(depth, head_dim):
    shape = shape_from_depth(depth, V, T)
    assert shape.n_embd == 64 * depth
    assert shape.n_embd // shape.n_head == head_dim


@pytest.mark.parametrize(("depth", "near"), [(5, 4), (9, 8), (11, 10), (13, 12), (25, 24)])
def test_a_depth_whose_heads_do_not_divide_is_refused_with_one_that_works(depth, near):
    with pytest.raises(InputError, match=rf"--depth {depth} gives a width of {64 * depth}.*try --depth={near}$"):
        shape_from_depth(depth, V, T)
    shape_from_depth(near, V, T)


@pytest.mark.parametrize(
    ("iterations", "flops", "ratio", "expected"),
    [
        (7, 1e18, 20, (7, "num_iterations")),
        (None, 2.6 * 452_984_832 * 524_288, 20, (3, "target_flops")),  # to the nearest
        (None, None, 20, (3_520, "target_param_data_ratio")),
        (None, None, 0.0142, (2, "target_param_data_ratio")),  # 2.499...: rounded down
    ],
)
def test_steps_go_before_flops_and_flops_before_tokens_per_parameter(iterations, flops, ratio, expected):
    assert num_iterations(shape_from_depth(8, V, T), BATCH, iterations, flops, ratio) == expected


@pytest.mark.parametrize(
    ("horizon", "message"),
    [
        ((None, None, None), r"no horizon: give .*--target_param_data_ratio=20"),
        ((0, None, None), r"--num_iterations gives 0 optimizer steps of 524,288 tokens"),
        ((None, 1e9, None), r"--target_flops gives 0 optimizer steps .*try --num_iterations=1"),
        ((None, None, 0.001), r"--target_param_data_ratio gives 0 optimizer steps"),
    ],
)
def test_no_horizon_and_an_empty_one_are_refused_by_flag(horizon, message):
    with pytest.raises(InputError, match=message):
        num_iterations(shape_from_depth(8, V, T), BATCH, *horizon)


def test_accumulation_steps_are_the_batch_over_one_pass_of_all_ranks():
    assert grad_accum_steps(BATCH, 32, T, 8) == 1
    assert grad_accum_steps(BATCH, 32, T, 1) == 8
    assert grad_accum_steps(24, 2, 4, 3) == 1


@pytest.mark.parametrize(
    ("total", "near"), [(500_000, 524_288), (100, 65_536), (600_000, 589_824), (0, 65_536), (-5, 65_536)]
)
def test_a_batch_that_does_not_divide_is_refused_with_the_nearest_that_does(total, near):
    with pytest.raises(
        InputError, match=rf"{total} is no multiple of the 65536 tokens.*try --total_batch_size={near}$"
    ):
        grad_accum_steps(total, 32, T, 1)
    assert grad_accum_steps(near, 32, T, 1) >= 1


@pytest.mark.parametrize(("step", "expected"), [(0, 0.5), (1, 1), (6, 1), (7, 0.775), (8, 0.55), (10, 0.1)])
def test_lr_warms_up_in_2_steps_then_falls_to_a_tenth_over_the_last_4_of_10(step, expected):
    multiplier = lr_multiplier(step / 10, warmup=0.2, warmdown=0.4, final=0.1, warmup_step=0.1)
    assert multiplier == pytest.approx(expected)


@pytest.mark.parametrize(("step", "expected"), [(0, 1), (800, 1), (900, 0.5), (999, 0.005), (1000, 0)])
def test_the_default_lr_is_flat_then_falls_to_0_over_the_last_fifth(step, expected):
    assert lr_multiplier(step / 1000) == pytest.approx(expected)


@pytest.mark.parametrize(("step", "expected"), [(0, 1), (25, 0.75), (50, 0.5), (99, 0.01)])
def test_a_warmdown_of_1_is_a_straight_line_down(step, expected):
    assert lr_multiplier(step / 100, warmdown=1.0) == pytest.approx(expected)


@pytest.mark.parametrize("progress", [1.0001, 2.0, 100.0])
def test_lr_beyond_the_end_stays_at_its_last_value_and_is_never_negative(progress):
    assert lr_multiplier(progress) == 0
    assert lr_multiplier(progress, final=0.1) == 0.1
    assert lr_multiplier(progress, warmdown=0) == 1


@pytest.mark.parametrize(("step", "momentum"), [(0, 0.85), (150, 0.90), (300, 0.95), (10_000, 0.95)])
def test_muon_momentum_rises_over_the_first_300_steps(step, momentum):
    assert muon_momentum(step) == pytest.approx(momentum)


@pytest.mark.parametrize(("depth", "mib"), [(8, 19_176), (20, 75_422)])
def test_estimated_memory_is_within_3_percent_of_the_two_public_runs(depth, mib):
    assert memory_bytes(shape_from_depth(depth, V, T), 32, 8) / 2**20 == pytest.approx(mib, rel=0.03)


@pytest.mark.parametrize(("value", "expected"), [(10, 8), (13, 16), (1, 8), (0, 8), (24, 24)])
def test_rounding_to_a_multiple_never_gives_0(value, expected):
    assert round_to_multiple(value, 8) == expected
