"""--plan: what a run takes, before it is started."""

from __future__ import annotations

import pytest

from nanochat.plan import dollars, fitting_batch, plan_lines, train_seconds
from nanochat.scaling import memory_bytes, shape_from_depth

V, T = 65_536, 2048


def test_time_is_flops_over_what_the_gpus_reach():
    shape = shape_from_depth(20, V, T)
    one = train_seconds(shape, 1e9, num_gpus=1)
    assert one == pytest.approx(3_491_758_080 * 1e9 / (989e12 * 0.45))
    assert train_seconds(shape, 1e9, num_gpus=8) == pytest.approx(one / 8)


def test_dollars_count_every_gpu():
    assert dollars(seconds=7200, num_gpus=8) == pytest.approx(48.0)  # 2 h x 8 x $3


def test_the_plan_of_depth_20_has_the_reference_numbers():
    text = "\n".join(plan_lines(shape_from_depth(20, V, T), 21_400, 524_288, 32))
    assert "depth 20, width 1280, 10 heads, vocabulary 65,536, context 2,048" in text
    assert "Number of parameters: 560,988,160" in text
    assert "Estimated FLOPs per token: 3.491758e+09" in text
    assert "Number of iterations: 21,400" in text
    assert "Total number of training tokens: 11,219,763,200" in text
    assert "Tokens : Params ratio: 20.00" in text
    assert "Total training FLOPs estimate: 3.917670e+19" in text
    assert "8 x H100 (estimate at 45% of peak): 3.06 h, $73.36" in text


def test_a_batch_that_does_not_fit_is_halved_until_it_does():
    shape = shape_from_depth(26, V, T)
    fit = fitting_batch(shape, 32, 8)
    assert fit == 16
    assert memory_bytes(shape, fit, 8) < 0.95 * 80 * 2**30 < memory_bytes(shape, 2 * fit, 8)
    line = plan_lines(shape, 100, 524_288, 32)[-1]
    assert line.endswith("at 32 rows, too much: use --device_batch_size=16")


def test_a_batch_that_fits_is_left_alone():
    assert fitting_batch(shape_from_depth(8, V, T), 32, 1) == 32
    assert "too much" not in plan_lines(shape_from_depth(8, V, T), 100, 524_288, 32)[-1]


def test_a_model_of_which_no_row_fits_is_said_to_need_another_depth():
    shape = shape_from_depth(100, V, T)
    assert fitting_batch(shape, 32, 8) is None
    line = plan_lines(shape, 100, 524_288, 32)[-1]
    assert line.endswith("too much: not one row fits, lower --depth or --max_seq_len")
