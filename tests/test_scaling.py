"""From depth to everything: the table of the reference, the horizon, batches, learning rates, memory."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from nanochat import scaling
from nanochat.config import InputError
from nanochat.scaling import (
    MODERN,
    PLAIN,
    grad_accum_steps,
    least_depth,
    lr_multiplier,
    muon_momentum,
    num_iterations,
    round_to_multiple,
    rounded_up,
    schedule,
    settings,
    shape_from_depth,
    shared_batch,
    windows,
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
        ((0, None, None), r"--num_iterations 0 gives no step of 524,288 tokens; .*--num_iterations=1$"),
        ((None, 1e9, None), r"--target_flops 1e\+09 gives no step .*--target_flops=2.375e\+14$"),
        ((None, math.nan, None), r"--target_flops nan gives no step .*--target_flops=2.375e\+14$"),
        ((None, None, 0.001), r"--target_param_data_ratio 0.001 gives no step .*--target_param_data_ratio=0.00569$"),
        ((None, None, math.inf), r"--target_param_data_ratio inf gives no step"),
    ],
)
def test_no_horizon_and_an_empty_one_are_refused_by_flag(horizon, message):
    with pytest.raises(InputError, match=message):
        num_iterations(shape_from_depth(8, V, T), BATCH, *horizon)


def test_what_a_refusal_of_the_horizon_offers_gives_exactly_one_step():
    shape = shape_from_depth(8, V, T)
    assert num_iterations(shape, BATCH, None, 2.375e14, None)[0] == 1
    assert num_iterations(shape, BATCH, None, None, 0.00569)[0] == 1


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


@pytest.mark.parametrize(
    ("step", "plain", "modern"), [(0, 0.85, 0.75), (150, 0.90, 0.85), (300, 0.95, 0.95), (10_000, 0.95, 0.95)]
)
def test_muon_momentum_rises_over_the_first_300_steps(step, plain, modern):
    assert schedule(PLAIN, step, 20_000, "plain")[1] == muon_momentum(step) == pytest.approx(plain)
    assert schedule(PLAIN, step, 20_000, "modern")[1] == pytest.approx(modern)


@pytest.mark.parametrize(
    ("value", "shown"), [(0.0056818, "0.00569"), (0.5, "0.500"), (12.345, "12.4"), (1.0, "1.00"), (1234.5, "1240")]
)
def test_a_least_value_is_rounded_up(value, shown):
    assert rounded_up(value) == shown
    assert float(shown) >= value


@pytest.mark.parametrize("depth", [4, 8, 12, 20, 32])
@pytest.mark.parametrize("world_size", [1, 8])
def test_plain_has_the_references_settings_at_any_depth_unless_flags_say_otherwise(depth, world_size):
    shape = shape_from_depth(depth, V, T)
    assert settings(shape, world_size) == PLAIN
    given = {"total_batch_size": 2**17, "matrix_lr": 0.01, "weight_decay": None}
    assert settings(shape, world_size, given=given) == replace(PLAIN, total_batch_size=2**17, matrix_lr=0.01)


def modern(depth: int, vocab_size: int = 32_768, sequence_len: int = T) -> scaling.Shape:
    return shape_from_depth(depth, vocab_size, sequence_len, arch="modern")


@pytest.mark.parametrize("vocab_size", [4096, 32_768])
def test_modern_at_the_reference_depth_has_the_reference_values(vocab_size):
    assert settings(modern(12, vocab_size), 8) == MODERN


@pytest.mark.parametrize(("depth", "rows"), [(2, 10), (8, 10), (9, 5), (20, 5)])
def test_the_bigram_table_is_twice_as_long_in_small_models(depth, rows):
    assert replace(modern(8), n_layer=depth).parts["bigram"].num_params == rows * 32_768 * 512


def test_horizons_count_all_parameters_of_plain_and_those_that_multiply_of_modern():
    plain, ours = shape_from_depth(12, 32_768, T), modern(12)
    assert plain.num_horizon_params == plain.num_params == 12 * 12 * 768**2 + 2 * 32_768 * 768
    assert ours.num_horizon_params == ours.num_scaling_params == 12 * 12 * 768**2 + 32_768 * 768  # 110,100,480
    assert num_iterations(ours, 2**19, None, None, 12)[0] == 2_520  # the public table of depth 12


@pytest.mark.parametrize(
    ("depth", "batch"), [(6, 3 * 2**16), (8, 2**18), (16, 5 * 2**17), (24, 2**20), (32, 3 * 2**19)]
)
def test_modern_batch_rates_and_decay_follow_the_tokens_to_see(depth, batch):
    shape = modern(depth)
    base = replace(MODERN, weight_decay=0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaling, "MODERN", base)
        found = settings(shape, 8)
    times = shape.num_scaling_params / 110_100_480  # D/D_ref: the ratio is the same
    assert found.total_batch_size == batch == pytest.approx(2**19 * times ** (0.383 if times > 1 else 0.66), rel=1 / 8)
    scale = (batch / 2**19) ** 0.5
    decay = 0.1 * scale / times if times > 1 else 0
    assert found.matrix_lr == pytest.approx(base.matrix_lr * scale * max(1, times**-0.5))
    assert found.embedding_lr == pytest.approx(base.embedding_lr * scale * max(1, times**-0.37))
    assert found.unembedding_lr == pytest.approx(base.unembedding_lr * scale * max(1, times**-0.37))
    assert found.final_lr_frac == pytest.approx(0.05 * max(1, times**-0.22))
    assert found.weight_decay == pytest.approx(decay)


def test_a_run_twice_as_long_has_a_batch_of_the_data_law_and_its_decay_halves_against_it(monkeypatch):
    monkeypatch.setattr(scaling, "MODERN", replace(MODERN, weight_decay=0.1))
    shape = modern(12, sequence_len=32)  # short rows: hardly any rounding
    one, eight = (settings(shape, 1, given={"target_param_data_ratio": ratio}) for ratio in (12, 96))
    assert eight.total_batch_size / one.total_batch_size == pytest.approx(8**0.383, rel=1 / 8)
    scale = (eight.total_batch_size / one.total_batch_size) ** 0.5
    assert eight.weight_decay / one.weight_decay == pytest.approx(scale / 8)


def test_flags_of_modern_win_and_rates_follow_the_batch_and_the_steps_that_are_given():
    flags = {"total_batch_size": 2**13, "embedding_lr": 0.3, "weight_decay": 0.5}
    found = settings(modern(4), 1, given=flags, iterations=630)  # a quarter of the reference's steps
    assert (found.total_batch_size, found.embedding_lr, found.weight_decay) == (2**13, 0.3, 0.5)
    assert found.matrix_lr == pytest.approx(MODERN.matrix_lr * 2, rel=1e-4)
    shortest = settings(modern(4), 1, iterations=1)
    assert (shortest.matrix_lr, shortest.final_lr_frac) == (MODERN.matrix_lr * scaling.LR_MOST, 0.2)


def test_the_horizon_of_flops_is_that_of_its_tokens():
    shape = modern(4)
    flops = 3 * shape.num_scaling_params * shape.flops_per_token
    assert settings(shape, 1, target_flops=flops) == replace(
        settings(shape, 1, given={"target_param_data_ratio": 3}), target_param_data_ratio=12
    )


@pytest.mark.parametrize("world_size", [1, 2, 3, 6, 8, 64])
@pytest.mark.parametrize("rows", [None, 4, 5])
@pytest.mark.parametrize("depth", [4, 12, 20])
def test_an_auto_batch_always_divides_over_ranks_and_rows(depth, rows, world_size):
    batch = settings(modern(depth, sequence_len=512), world_size, rows).total_batch_size
    assert grad_accum_steps(batch, rows or 1, 512, world_size) >= 1


@pytest.mark.parametrize(
    ("ideal", "most", "unit", "batch"),
    [
        (1000, 9e9, 1, 1024),  # three bits: 896, 1024
        (1100, 9e9, 1, 1024),
        (1200, 9e9, 1, 1280),
        (5, 9e9, 1, 5),
        (1200, 9e9, 96, 12 * 96),  # 12.5 passes: 12 = 0b1100
        (10, 9e9, 64, 64),  # never less than one pass
        (1200, 700, 64, 640),  # never more than there is to see
        (1200, 10, 64, 64),
    ],
)
def test_a_shared_batch_is_near_the_ideal_one_and_a_multiple_of_the_unit(ideal, most, unit, batch):
    assert shared_batch(ideal, most, unit) == batch


@pytest.mark.parametrize("ratio", [0.0, -3.0, math.nan, math.inf])
@pytest.mark.parametrize("arch", ["plain", "modern"])
def test_a_ratio_that_gives_no_step_is_refused_with_the_least_that_gives_one(arch, ratio):
    shape = shape_from_depth(4, 4096, 512, arch=arch)
    with pytest.raises(InputError, match=r"--target_param_data_ratio .* gives no step; the least") as refused:
        settings(shape, 2, given={"target_param_data_ratio": ratio})
    least = float(str(refused.value).split("=")[-1])
    found = settings(shape, 2, given={"target_param_data_ratio": least})
    assert num_iterations(shape, found.total_batch_size, None, None, least)[0] == 1


@pytest.mark.parametrize(("name", "value", "near"), [("warmdown_ratio", 2.0, "1"), ("warmup_ratio", -3.0, "0")])
@pytest.mark.parametrize("arch", ["plain", "modern"])
def test_a_part_of_the_run_beyond_the_run_is_refused(arch, name, value, near):
    with pytest.raises(InputError, match=rf"--{name} {value} must be a part of the run, .*; try --{name}={near}$"):
        settings(shape_from_depth(4, 4096, 512, arch=arch), 1, given={name: value})


def test_a_negative_clip_which_would_turn_the_gradient_round_is_refused():
    with pytest.raises(InputError, match=r"--grad_clip -3.0 must be a number from 0; try --grad_clip=1.0"):
        settings(modern(4), 1, given={"grad_clip": -3.0})


@pytest.mark.parametrize("flags", [{"matrix_lr": -0.1}, {"weight_decay": math.nan}, {"embedding_lr": math.inf}])
def test_rates_that_are_no_rates_are_refused(flags):
    (name,) = flags
    with pytest.raises(InputError, match=rf"--{name} .* must be a number from 0; try --{name}={getattr(PLAIN, name)}$"):
        settings(modern(4), 1, given=flags)


@pytest.mark.parametrize(
    ("pattern", "n_layer", "sequence_len", "expected"),
    [
        ("L", 3, 2048, (2048, 2048, 2048)),
        ("SSSL", 6, 2048, (512, 512, 512, 2048, 512, 2048)),  # the last layer is long
        ("sl", 3, 2048, (512, 2048, 2048)),
        ("S", 2, 1100, (384, 1100)),  # 275 rounded up to a multiple of 128
        ("S", 2, 96, (96, 96)),  # 128 would be longer than the context
        ("S", 1, 2048, (2048,)),
    ],
)
def test_windows_repeat_a_pattern_over_the_layers(pattern, n_layer, sequence_len, expected):
    assert windows(pattern, n_layer, sequence_len) == expected


@pytest.mark.parametrize(("pattern", "near"), [("SXL", "SL"), ("", "L"), ("128", "L")])
def test_other_letters_of_windows_are_refused_with_the_nearest_pattern(pattern, near):
    with pytest.raises(InputError, match=rf"--window_pattern '{pattern}' must be .*--window_pattern={near}$"):
        windows(pattern, 4, 2048)


def test_short_windows_save_attention_flops_only():
    full = modern(8)
    short = replace(full, window_pattern="SL")
    assert full.flops_per_token - short.flops_per_token == 12 * 512 * 4 * (2048 - 512)
    assert full.num_params == short.num_params


@pytest.mark.parametrize(
    ("sizes", "flags"),
    [((3, 1, 128), "--depth=2"), ((6, 64, 3), "--depth=6 --head_dim=2"), ((3, 1, 1), "--depth=2 --head_dim=2")],
)
def test_a_width_that_no_head_size_divides_is_refused_with_sizes_that_work(sizes, flags):
    depth, aspect_ratio, head_dim = sizes
    with pytest.raises(InputError, match=rf"do not divide into even sizes; try {flags}$"):
        shape_from_depth(depth, V, T, aspect_ratio, head_dim)
    near = dict(part.removeprefix("--").split("=") for part in flags.split())
    shape_from_depth(int(near["depth"]), V, T, aspect_ratio, int(near.get("head_dim", head_dim)))


@pytest.mark.parametrize(("depth", "aspect_ratio", "near"), [(0, 64, 1), (-3, 64, 1), (0, 1, 2)])
def test_a_depth_below_1_is_refused_with_the_least_that_works(depth, aspect_ratio, near):
    with pytest.raises(InputError, match=rf"^--depth {depth} must be at least 1; try --depth={near}$"):
        shape_from_depth(depth, V, T, aspect_ratio)
    shape_from_depth(near, V, T, aspect_ratio)


@pytest.mark.parametrize(
    ("aspect_ratio", "head_dim", "depth"), [(64, 128, 20), (48, 96, 28), (65, 128, None), (2, 3, None)]
)
def test_the_least_depth_of_a_width_has_heads_of_an_even_size(aspect_ratio, head_dim, depth):
    found = least_depth(1280, 16, aspect_ratio, head_dim)
    if depth:
        assert found == depth
    if found:
        shape = shape_from_depth(found, V, T, aspect_ratio, head_dim)
        assert shape.n_embd >= 1280 and shape.n_embd % 16 == 0
    assert (found is None) == (head_dim == 3)


@pytest.mark.parametrize(("value", "expected"), [(10, 8), (13, 16), (1, 8), (0, 8), (24, 24)])
def test_rounding_to_a_multiple_never_gives_0(value, expected):
    assert round_to_multiple(value, 8) == expected
