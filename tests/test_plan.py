"""--plan: what a run takes, before it is started."""

from __future__ import annotations

from typing import Any

import pytest

from nanochat import memory
from nanochat.memory import memory_bytes
from nanochat.plan import H100_MEMORY, Estimator, Machine, dollars, h100s, plan_lines, this_cpu, train_seconds
from nanochat.scaling import Shape, shape_from_depth, with_settings
from scripts.base_train import BaseTrainConfig

V, T = 65_536, 2048


def plan(shape: Shape, machine: Machine, **flags: Any) -> list[str]:
    cfg = with_settings(BaseTrainConfig(arch=shape.arch, max_seq_len=shape.sequence_len, **flags), shape, 1)
    return plan_lines(shape, 21_400, cfg, [machine])


def test_time_is_flops_over_what_the_gpus_reach():
    shape = shape_from_depth(20, V, T)
    one = train_seconds(shape, 1e9, h100s(1))
    assert one == pytest.approx(3_491_758_080 * 1e9 / (989e12 * 0.45))
    assert train_seconds(shape, 1e9, h100s(8)) == pytest.approx(one / 8)


def test_a_cpu_reaches_more_where_training_compiles_as_long_ones_do_unless_told_otherwise():
    shape = shape_from_depth(20, V, T)
    cpu, flops = this_cpu(2e11), 3_491_758_080  # a token
    assert train_seconds(shape, 1e5, cpu) == pytest.approx(flops * 1e5 / (2e11 * 0.6))
    assert train_seconds(shape, 2e4, cpu) == pytest.approx(flops * 2e4 / (2e11 * 0.43))  # 7e13 FLOPs
    assert train_seconds(shape, 1e5, cpu, compile=False) == pytest.approx(flops * 1e5 / (2e11 * 0.43))
    line, eager = (plan(shape, cpu, compile=way)[-1] for way in (None, False))
    hours = [float(text.split(": ")[1].split(" h")[0]) for text in (line, eager)]
    assert hours[1] / hours[0] == pytest.approx(0.6 / 0.43, rel=1e-3)
    stage = [Estimator(cpu, shape, 1).training(n, 1024, 1, 0, 0).seconds - cpu.start_seconds for n in (20, 100)]
    assert stage == pytest.approx([flops * 20 * 1024 / (2e11 * 0.43), flops * 100 * 1024 / (2e11 * 0.6)])


def test_dollars_count_every_gpu():
    assert dollars(seconds=7200, num_gpus=8) == pytest.approx(48.0)  # 2 h x 8 x $3


def test_the_plan_of_depth_20_has_the_reference_numbers():
    text = "\n".join(plan(shape_from_depth(20, V, T), h100s(8), device_batch_size=32))
    assert "depth 20, width 1280, 10 heads, vocabulary 65,536, context 2,048, plain" in text
    assert "Number of parameters: 560,988,160" in text
    assert "Estimated FLOPs per token: 3.491758e+09" in text
    assert "Total batch size: 524,288 tokens" in text
    assert "Learning rates: embedding 0.2, unembedding 0.004, matrices 0.02; weight decay 0" in text
    assert "Number of iterations: 21,400" in text
    assert "Total number of training tokens: 11,219,763,200" in text
    assert "Tokens : Params ratio: 20.00" in text
    assert "Total training FLOPs estimate: 3.917670e+19" in text
    assert "8 x H100 at $3.00 a GPU and hour, 45% of peak: 3.06 h, $73.36" in text


def test_a_modern_plan_tells_its_own_batch_and_rates():
    shape = shape_from_depth(24, 32_768, T, arch="modern")
    text = "\n".join(plan(shape, h100s(1)))
    assert "context 2,048, modern" in text
    assert "Total batch size: 1,048,576 tokens" in text
    assert "matrices 0.02828;" in text  # 0.02 * sqrt(2)


def test_without_a_device_batch_the_plan_has_the_largest_that_fits():
    shape = shape_from_depth(26, V, T)
    fit = h100s(8).rows(shape, 32)
    assert fit == 16
    assert memory_bytes(shape, fit, 8) < memory.GPU_SHARE * H100_MEMORY < memory_bytes(shape, 2 * fit, 8)
    assert plan(shape, h100s(8))[-1].endswith("GiB per GPU at 16 rows")


def test_a_device_batch_that_does_not_fit_gets_the_one_that_does():
    shape = shape_from_depth(26, V, T)
    line = plan(shape, h100s(8), device_batch_size=32)[-1]
    assert line.endswith("at 32 rows, too much: use --device_batch_size=16")
    assert "too much" not in plan(shape_from_depth(8, V, T), h100s(1), device_batch_size=32)[-1]


def test_a_model_of_which_no_row_fits_is_said_to_need_another_depth():
    shape = shape_from_depth(100, V, T)
    assert h100s(8).rows(shape, 32) is None
    line = plan(shape, h100s(8))[-1]
    assert line.endswith("too much: not one row fits, lower --depth or --max_seq_len")


def test_a_cpu_costs_nothing_and_takes_no_more_rows_than_are_of_use():
    shape = shape_from_depth(4, 4096, 512)
    machine = this_cpu(1e11, memory=64 * 2**30, value_bytes=4)
    assert machine.rows(shape, 1024) == memory.CPU_PASS_TOKENS // 512
    assert machine.rows(shape, 12) == 12
    line = plan(shape, machine)[-1]
    assert line.startswith("this CPU, 60% compiled and 43% eager of the 100 GFLOP/s measured in matmuls: ")
    assert ", $0.00, " in line
    assert this_cpu(1e11, memory=2**20).rows(shape, 8) is None
    assert this_cpu(1e11).rows(shape, 8) == 8  # memory not looked at


def test_a_batch_that_the_gpus_cannot_share_is_said_beside_the_machine():
    line = plan(shape_from_depth(8, V, T), h100s(8), total_batch_size=3 * T)[-1]
    assert line.startswith("8 x H100") and line.endswith("try --total_batch_size=16384")
