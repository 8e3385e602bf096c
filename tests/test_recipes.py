"""The recipes: every command starts, wrong arguments are refused, a run that was cut goes on."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.data import tinyworld
from scripts.plan import Stage, parse_stage

ROOT = Path(__file__).parent.parent
RECIPES = [
    ("speedrun.sh", "cpu"),
    ("speedrun.sh", "cpu --quick"),
    ("speedrun.sh", "gpu1"),
    ("speedrun.sh", "gpu8"),
    ("runs/aquarat.sh", "cpu"),
    ("runs/aquarat.sh", "gpu8"),
]
ORDER = (
    "tok_train tok_eval base_train base_loss base_eval mid_train chat_eval chat_sft chat_eval chat_rl chat_eval".split()
)
# Sizes turned down, by appended flags: the last one counts. Tasks are tinyworld's, for want of a network.
SMALL = {
    "nanochat.report": "",
    "nanochat.dataset": "-n 1",
    "scripts.tok_train": "--max_chars=100_000 --vocab_size=512",
    "scripts.tok_eval": "",
    "scripts.base_train": "--depth=2 --model_tag={tag} --aspect_ratio=16 --head_dim=16 --max_seq_len=64 "
    "--device_batch_size=2 --total_batch_size=128 --num_iterations=2 --eval_tokens=128 --core_metric_every=-1",
    "scripts.base_loss": "--device_batch_size=2 --split_tokens=128",
    "scripts.base_eval": "--max_per_task=1 --bundle=tinyworld",
    "scripts.mid_train": "--mixture=tinyworld --max_seq_len=64 --device_batch_size=2 --total_batch_size=128 "
    "--num_iterations=2 --eval_tokens=128",
    "scripts.chat_eval": "-a TinyMC|TinySums --max_problems=1 --max_new_tokens=4",
    "scripts.chat_sft": "--mixture=tinyworld --device_batch_size=2 --target_examples_per_step=2 --num_iterations=2 "
    "--eval_steps=1 --eval_metrics_max_problems=1",
    "scripts.chat_rl": "--task=TinySums --num_iterations=1 --examples_per_step=1 --num_samples=2 "
    "--device_batch_size=2 --max_new_tokens=4 --eval_examples=1",
}


def bash(
    script: Path | str, *arguments: str, path: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a recipe; `path` is a folder of programs that come before all others."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("NANOCHAT_", "WANDB_"))}
    if path is not None:
        env["PATH"] = f"{path}:{env['PATH']}"
    command = ["bash", str(script), *arguments]
    return subprocess.run(command, cwd=ROOT, env={**env, **environment}, capture_output=True, text=True, timeout=60)


def recipe(script: str, tier: str) -> list[Stage]:
    done = bash(script, *tier.split(), "--commands")
    assert done.returncode == 0, done.stderr
    return [parse_stage(f"stage\t{line}") for line in done.stdout.splitlines()]


def machine(folder: Path, num_gpus: int) -> Path:
    """A folder with an nvidia-smi that finds so many GPUs."""
    lines = "".join(f"echo 'GPU {i}: Some Card'\n" for i in range(num_gpus))
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{lines}exit 0\n")
    (folder / "nvidia-smi").chmod(0o755)
    return folder


@pytest.mark.parametrize(("script", "tier"), RECIPES)
def test_every_flag_is_known_and_the_stages_are_the_references_in_its_order(script, tier):
    stages = recipe(script, tier)  # parses each command with its script's own parser
    assert [s.module.split(".")[1] for s in stages if s.module.startswith("scripts.")] == ORDER
    assert stages[0].command.endswith("nanochat.report reset")
    assert stages[-1].command.endswith("nanochat.report generate")


@pytest.mark.parametrize(("script", "tier"), RECIPES)
def test_later_stages_take_the_model_that_the_recipe_trains(script, tier):
    stages = recipe(script, tier)
    depth = next(s.config.depth for s in stages if s.module == "scripts.base_train")
    tags = [s.config.model_tag for s in stages if s.module.startswith("scripts.") and "tok_" not in s.module]
    assert tags == [None] + [f"d{depth}"] * 8


def test_all_gpus_train_and_evaluate_on_gpu8():
    ranks = {s.module: s.num_ranks for s in recipe("speedrun.sh", "gpu8")}
    assert {m for m, n in ranks.items() if n == 8} == {m for m in ranks if m.startswith("scripts.") and "tok_" not in m}
    assert {s.num_ranks for s in recipe("speedrun.sh", "gpu1")} == {1}


def test_the_reference_recipe_has_the_references_settings():
    by_module = {s.module: s.config for s in recipe("runs/aquarat.sh", "gpu8")}
    base, mid = by_module["scripts.base_train"], by_module["scripts.mid_train"]
    sft, rl = by_module["scripts.chat_sft"], by_module["scripts.chat_rl"]
    assert (base.depth, base.num_iterations, base.device_batch_size, mid.num_iterations) == (8, 200, 32, 200)
    assert (sft.aqua_train_examples, sft.aqua_val_examples, sft.target_examples_per_step) == (20000, 254, 32)
    assert (rl.device_batch_size, rl.num_samples, rl.max_new_tokens, rl.temperature) == (1, 4, 64, 0.7)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub folder whose two pretraining sets are a little of tinyworld."""
    root = tmp_path_factory.mktemp("hub")
    for repo, val_shard in (("climbmix-400b-shuffle", 6542), ("fineweb-edu-100b-shuffle", 1822)):
        folder = root / "datasets" / "karpathy" / repo
        folder.mkdir(parents=True)
        for shard, split in ((0, "train"), (val_shard, "val")):
            texts = tinyworld.documents(split, 0)
            pq.write_table(pa.table({"text": texts}), folder / f"shard_{shard:05d}.parquet", row_group_size=1024)
    return root


@pytest.mark.parametrize(
    ("script", "tier"),
    [
        ("speedrun.sh", "gpu8"),
        ("runs/aquarat.sh", "gpu8"),
        pytest.param("speedrun.sh", "gpu1", marks=pytest.mark.slow),  # nearly gpu8's commands
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of matplotlib's own imports
def test_every_command_of_a_gpu_recipe_runs_on_a_cpu_when_turned_down(script, tier, hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("NANOCHAT_HUB_DIR", str(hub))
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    monkeypatch.setattr("scripts.tok_eval.BASELINES", {})  # they would be fetched
    monkeypatch.chdir(tmp_path)
    stages = recipe(script, tier)
    tag = next(s.config.model_tag for s in stages if s.module == "scripts.base_loss")
    for stage in stages:
        words = stage.command.split()
        flags = words[words.index(stage.module) + 1 :] + SMALL[stage.module].format(tag=tag).split()
        try:
            importlib.import_module(stage.module).main(flags)
        except SystemExit as end:
            pytest.fail(f"{stage.command} ended with {end.code}: {capsys.readouterr().err}")
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    sections = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert sections[:13] == [
        "Environment",
        "Tokenizer training",
        "Tokenizer evaluation",
        "Base model training",
        "Base model loss",
        "Base model evaluation",
        "Midtraining",
        "Chat evaluation mid",
        "Chat SFT",
        "Chat evaluation sft",
        "Chat RL",
        "Chat evaluation rl",
        "Summary",
    ]


@pytest.mark.slow
def test_torchrun_starts_the_gpu_recipes_training(hub, tmp_path):
    stages = {s.module: s for s in recipe("speedrun.sh", "gpu8")}
    env = {"NANOCHAT_BASE_DIR": str(tmp_path), "NANOCHAT_HUB_DIR": str(hub), "OMP_NUM_THREADS": "1"}
    for module in ("scripts.tok_train", "scripts.base_train"):
        words = stages[module].command.split()
        small = SMALL[module].format(tag="d20").replace("--total_batch_size=128", "--total_batch_size=256").split()
        words = [w.replace("nproc_per_node=8", "nproc_per_node=2") for w in words] + small
        done = subprocess.run(
            words,
            cwd=ROOT,
            env={**os.environ, **env, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "base_checkpoints" / "d20" / "step_000002" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("speedrun.sh", "gpu8", "gpu8 needs 8 GPUs and nvidia-smi finds 1"),
        ("speedrun.sh", "tpu", "unknown tier tpu; give one of: cpu gpu1"),
        ("speedrun.sh", "cpu gpu1", "two tiers"),
        ("speedrun.sh", "--fast", "unknown flag --fast"),
        ("speedrun.sh", "gpu1 --quick", "--quick goes with the tier cpu"),
        ("runs/aquarat.sh", "cpu", "set NANOCHAT_HUB_DIR"),
        ("runs/aquarat.sh", "gpu1", "unknown tier gpu1; give one of: cpu gpu8"),
    ],
)
def test_a_wrong_argument_is_refused_in_one_line(script, arguments, message, tmp_path):
    done = bash(script, *arguments.split(), path=machine(tmp_path, num_gpus=1))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("num_gpus", "tier"), [(0, "cpu"), (1, "gpu1"), (3, "gpu2"), (4, "gpu4"), (8, "gpu8"), (16, "gpu8")]
)
def test_the_tier_is_the_largest_that_the_machine_can_run(num_gpus, tier, tmp_path):
    done = bash("speedrun.sh", "--commands", path=machine(tmp_path, num_gpus))
    assert done.stdout == bash("speedrun.sh", tier, "--commands").stdout
    assert done.stderr == f"tier: {tier} ({num_gpus} GPUs found)\n"


TOY = """
set -euo pipefail
. {root}/runs/recipe.sh
setup() {{ :; }}
parse_arguments "cpu" "$@"
begin d2
stage first touch {folder}/first
background download test -e {folder}/network
stage second test -e {folder}/go
await download
stage third touch {folder}/third
finish sft
"""


def toy(folder: Path) -> Path:
    script = folder / "toy.sh"
    script.write_text(TOY.format(root=ROOT, folder=folder))
    (folder / "base").mkdir()
    return script


def test_a_run_that_was_cut_goes_on_where_it_stopped(tmp_path):
    script = toy(tmp_path)
    env = {"NANOCHAT_BASE_DIR": str(tmp_path / "base")}
    (tmp_path / "network").touch()
    cut = bash(script, **env)
    assert cut.returncode == 1  # that of `test`
    assert "error: stage second ended with exit code 1" in cut.stderr and "--resume" in cut.stderr
    assert not (tmp_path / "third").exists()

    (tmp_path / "first").unlink()
    (tmp_path / "go").touch()
    resumed = bash(script, "--resume", **env)
    assert resumed.returncode == 0, resumed.stderr
    assert not (tmp_path / "first").exists()  # was not run a second time
    assert (tmp_path / "third").exists()
    assert "scripts.chat_cli -i sft -g d2" in resumed.stdout


def test_a_download_that_fails_in_the_background_ends_the_run(tmp_path):
    script = toy(tmp_path)
    (tmp_path / "go").touch()
    done = bash(script, NANOCHAT_BASE_DIR=str(tmp_path / "base"))
    assert done.returncode == 2
    assert "error: stage download failed" in done.stderr
    assert not (tmp_path / "third").exists()


def test_a_new_run_finds_no_checkpoint_of_the_last_one_and_keeps_it(tmp_path):
    script = toy(tmp_path)
    (tmp_path / "go").touch()
    (tmp_path / "network").touch()
    for name in ("base_checkpoints/d2/step_000009", "base_checkpoints/d4/step_000009", "tokenizer"):
        (tmp_path / "base" / name).mkdir(parents=True)
    assert bash(script, NANOCHAT_BASE_DIR=str(tmp_path / "base")).returncode == 0
    assert not (tmp_path / "base/base_checkpoints/d2").exists()
    assert (tmp_path / "base/previous/base_checkpoints/d2/step_000009").is_dir()
    assert (tmp_path / "base/previous/tokenizer").is_dir()
    assert (tmp_path / "base/base_checkpoints/d4").is_dir()  # another recipe's


def test_resuming_what_was_never_begun_is_refused(tmp_path):
    done = bash(toy(tmp_path), "--resume", NANOCHAT_BASE_DIR=str(tmp_path / "base"))
    assert done.returncode == 2
    assert "no run of d2 was begun" in done.stderr
