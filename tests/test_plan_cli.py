"""The plans: of one model (base_train --plan) and of a whole recipe (scripts.plan)."""

from __future__ import annotations

import re

import pytest

from nanochat import engine, plan, scaling
from nanochat.config import InputError
from scripts import base_train
from scripts import plan as cli

TOKENIZER = "tok_train\tpython -m scripts.tok_train --max_chars=36_000_000"
BASE = "base_train\ttorchrun --standalone --nproc_per_node=8 -m scripts.base_train -- --depth=20 --run=x"
D20 = scaling.shape_from_depth(20, 65536, 2048)


def table(*lines: str, num_gpus: int = 8) -> list[str]:
    return cli.table([cli.parse_stage(line) for line in lines], plan.h100s(num_gpus))


@pytest.mark.parametrize(
    ("depth", "params", "flops"), [(8, "92,274,688", "4.529848e+08"), (20, "560,988,160", "3.491758e+09")]
)
def test_a_models_plan_needs_no_tokenizer_and_names_its_parameters_and_flops(depth, params, flops, capsys):
    base_train.main(["--plan", "--arch=plain", f"--depth={depth}", "--vocab_size=65536"])
    out = capsys.readouterr().out
    assert f"Number of parameters: {params}\n" in out
    assert f"Estimated FLOPs per token: {flops}\n" in out


@pytest.mark.parametrize("arch", ["plain", "modern"])
def test_a_models_plan_names_one_and_eight_gpus_and_this_cpu(arch, capsys):
    base_train.main(["--plan", f"--arch={arch}", "--depth=12", "--vocab_size=32768"])
    *_, one, eight, cpu = capsys.readouterr().out.splitlines()
    for line, machine in ((one, "1 x H100"), (eight, "8 x H100"), (cpu, "this CPU")):
        assert re.match(rf"{machine}.*: [\d.]+ h, \$[\d.]+, [\d.]+ GiB (per GPU|in all) at \d+ rows", line)


def test_training_time_is_flops_over_the_expected_rate():
    tokens = 11_219_763_200  # 3.917670e19 FLOPs at 8 x 989e12 x 0.45: the public runs took 172 to 194 minutes
    seconds = plan.train_seconds(D20, tokens, plan.h100s(8))
    assert seconds == pytest.approx(3.917670e19 / (8 * 989e12 * 0.45), rel=1e-6)
    assert 172 < seconds / 60 < 194


def test_twice_the_gpus_halve_the_time_of_long_training_and_not_its_cost():
    one, two = (
        plan.Estimator(plan.h100s(n), D20, n).training(1000, 524288, 16, validations=0, validation_tokens=0)
        for n in (1, 2)
    )
    start = plan.h100s(1).start_seconds
    assert one.seconds - start == pytest.approx(2 * (two.seconds - start))
    assert plan.dollars(one.seconds - start, 1) == pytest.approx(plan.dollars(two.seconds - start, 2))


def test_a_batch_that_does_not_fit_the_card_gets_the_one_that_does():
    advice = table(TOKENIZER, "base_train\tpython -m scripts.base_train --depth=20 --device_batch_size=64", num_gpus=1)
    assert any("too much: use --device_batch_size=16" in line or "device_batch_size=32" in line for line in advice)
    assert not any("too much" in line for line in table(TOKENIZER, BASE))


def test_the_table_has_each_stage_with_its_command_and_the_sum():
    lines = table(TOKENIZER, BASE)
    assert [line.split()[0] for line in lines] == ["stage", "tok_train", "python", "base_train", "torchrun", "in"]
    assert lines[2].strip() == TOKENIZER.split("\t")[1]
    dollars = [float(line.split()[-1]) for line in (lines[1], lines[3], lines[5])]
    assert dollars[0] + dollars[1] == pytest.approx(dollars[2], abs=0.011)
    # 1 s for 36 million characters and 40 s to start, on a machine of $24 an hour
    assert dollars[0] == pytest.approx(24 * 41 / 3600, abs=0.006)


def test_a_stage_of_modern_is_planned_with_the_batch_of_its_depth():
    command = "base_train\ttorchrun --nproc_per_node=8 -m scripts.base_train -- --depth=24 --arch=modern"
    recipe = cli.read_recipe([cli.parse_stage(line) for line in (TOKENIZER, command)])
    found = scaling.settings(recipe.shape, 8)
    assert recipe.shape.arch == "modern" and found.total_batch_size != 524_288
    tokens = found.target_param_data_ratio * recipe.shape.num_scaling_params
    assert recipe.steps == int(tokens / found.total_batch_size)
    assert not any("too much" in line for line in table(TOKENIZER, command))


def test_what_runs_in_the_background_is_listed_but_not_added_up():
    alone = table(TOKENIZER, BASE)
    beside = table("shards (background)\tpython -m nanochat.dataset -n 240", TOKENIZER, BASE)
    assert beside[1].split()[2:4] == ["4", "min"]  # 240 shards of 100 MB at 100 MB/s
    assert beside[-1] == alone[-1]


def test_rows_beyond_the_engines_cache_wait_their_turn():
    assert plan.CACHE_BYTES == engine.CACHE_BYTES
    model = plan.Estimator(plan.h100s(1), D20, 1)
    # 20 layers x 1280 channels x 512 positions x 4 bytes = 52 MB a row: 163 rows in 8 GiB
    assert model._generate(163, 256) == pytest.approx(256 * 20 * 0.000585)
    assert model._generate(164, 256) == pytest.approx(2 * 256 * 20 * 0.000585)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("base_train\tpython -m scripts.base_train --dept=20", "stage base_train: unrecognized arguments: --dept=20"),
        ("x\tpython -m scripts.nothing", "stage x runs scripts.nothing"),
        ("python -m scripts.base_train", "a name, a tab and"),
    ],
)
def test_a_line_that_cannot_run_is_refused(line, message):
    with pytest.raises(InputError, match=message):
        cli.parse_stage(line)


def test_a_recipe_without_a_model_is_refused():
    with pytest.raises(InputError, match=r"no stage runs scripts\.base_train"):
        table(TOKENIZER)


@pytest.mark.parametrize(("seconds", "shown"), [(40, "40 s"), (600, "10 min"), (3 * 3600 + 300, "3h05min")])
def test_durations_read_well(seconds, shown):
    assert cli.duration(seconds) == shown
