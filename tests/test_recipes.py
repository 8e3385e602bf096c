"""The recipes: every command starts, wrong arguments are refused, a run that was cut goes on."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
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


# A recipe of stand-ins. `stage.py NAME` stands for a stage that trains and saves on a signal, `sleep` for one that does
# not know signals.
TOY = """
set -euo pipefail
. {root}/runs/recipe.sh
setup() {{ :; }}
parse_arguments "cpu gpu2" "$@"
begin ${{MODEL:-d2}}
stage first touch {folder}/first
background download python {folder}/stage.py {folder} download
stage evaluate sh -c "echo evaluate $EVAL >>{folder}/log"
stage train python {folder}/stage.py {folder} train $RATE --device_batch_size=$GPUS --resume=auto
await download
ranks last toy_last --resume=auto
finish sft
"""
STAGE = """
import os, signal, sys, time
from pathlib import Path

folder, name = Path(sys.argv[1]), sys.argv[2]
log = (folder / ("downloads" if name == "download" else "log")).open("a", buffering=1)
caught = []

def note(number, frame):
    log.write(f"{name} {signal.Signals(number).name}\\n")
    caught.append(number)
    if caught.count(signal.SIGINT) > 1:
        os._exit(130)

if name != "download":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, note)
log.write(f"{name} begins\\n")
(folder / f"{name}.pid").write_text(str(os.getpid()))
while not (folder / f"{name}.go").exists():
    time.sleep(0.01)
    if caught and not (folder / "hangs").exists():
        time.sleep(0.1)
        log.write(f"{name} saved\\n")
        sys.exit(75)
if (folder / f"{name}.fails").exists():
    sys.exit("no network")
log.write(f"{name} ends\\n")
"""
ENDS_IN = 40  # seconds that anything may take on a busy machine


@dataclass
class Run:
    """A recipe in a session of its own."""

    process: subprocess.Popen[bytes]
    out: Path
    err: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def left(self) -> list[psutil.Process]:
        """What is still there of it and of all that it started."""
        found = []
        for process in psutil.process_iter():
            with suppress(ProcessLookupError, psutil.NoSuchProcess):
                if os.getsid(process.pid) == self.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found


class Toy:
    """Runs of the stand-in recipe."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.base = folder, folder / "base"
        self.runs: list[Run] = []
        self.script = folder / "toy.sh"
        self.script.write_text(TOY.format(root=ROOT, folder=folder))
        (folder / "stage.py").write_text(STAGE)
        for name in ("log", "downloads"):  # the latter apart, as it runs beside the others
            (folder / name).touch()
        machine(folder, num_gpus=2)
        (folder / "modules").mkdir()
        (folder / "modules" / "toy_last.py").write_text(f"open({str(folder / 'log')!r}, 'a').write('last ends\\n')")
        self.go("download")

    def go(self, *names: str) -> None:
        """Let these stages end."""
        for name in names:
            (self.folder / f"{name}.go").touch()

    @property
    def log(self) -> list[str]:
        return (self.folder / "log").read_text().splitlines()

    @property
    def downloads(self) -> list[str]:
        return (self.folder / "downloads").read_text().splitlines()

    def pid(self, name: str) -> int:
        return int((self.folder / f"{name}.pid").read_text())

    def start(self, *arguments: str, tier: str = "cpu", **environment: str) -> Run:
        given = {"NANOCHAT_BASE_DIR": str(self.base), "EVAL": "", "RATE": "--rate=1", **environment}
        path = f"{self.folder}:{sys.prefix}/bin:{os.environ['PATH']}"
        outputs = [self.folder / f"run{len(self.runs)}.{kind}" for kind in ("out", "err")]
        with outputs[0].open("w") as out, outputs[1].open("w") as err:
            process = subprocess.Popen(
                ["bash", str(self.script), tier, *arguments],
                env={**os.environ, **given, "PATH": path, "PYTHONPATH": str(self.folder / "modules")},
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        self.runs.append(Run(process, *outputs))
        return self.runs[-1]

    def end(self, run: Run) -> subprocess.CompletedProcess[str]:
        """Wait for it, and for all that it started."""
        code = run.process.wait(ENDS_IN)
        wait_for(lambda: not run.left())
        return subprocess.CompletedProcess([], code, run.out.read_text(), run.err.read_text())

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.end(self.start(*arguments, **environment))

    def start_until(self, line: str, *arguments: str, **environment: str) -> Run:
        """Start it, and return when the log has this line once more."""
        before = self.log.count(line)
        run = self.start(*arguments, **environment)
        wait_for(lambda: self.log.count(line) > before or run.process.poll() is not None)
        assert run.process.poll() is None, run.err.read_text()
        return run


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + ENDS_IN
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


@pytest.fixture
def toy(tmp_path: Path) -> Iterator[Toy]:
    one = Toy(tmp_path)
    yield one
    for process in [process for run in one.runs for process in run.left()]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    for run in one.runs:
        run.process.wait(ENDS_IN)


@pytest.mark.parametrize(
    ("sent", "to", "received"),
    [
        ("SIGINT", "group", "SIGINT"),  # what Ctrl-C in a terminal does
        ("SIGINT", "recipe", "SIGINT"),
        ("SIGTERM", "group", "SIGTERM"),
        ("SIGTERM", "recipe", "SIGTERM"),
        ("SIGUSR1", "recipe", "SIGTERM"),
        ("SIGHUP", "group", "SIGTERM"),
    ],
)
def test_a_signal_reaches_the_stage_once_and_after_it_has_saved_the_same_command_goes_on(toy, sent, to, received):
    started = toy.start_until("train begins")
    (os.killpg if to == "group" else os.kill)(started.pid, signal.Signals[sent])
    stopped = toy.end(started)
    assert toy.log[-2:] == [f"train {received}", "train saved"]
    assert stopped.returncode == 75
    assert stopped.stderr == (f"stopped by {sent} at stage train, all is saved; go on with: bash {toy.script} cpu\n")

    (toy.folder / "first").unlink()
    toy.go("train")
    resumed = toy.run()
    assert resumed.returncode == 0, resumed.stderr
    assert not (toy.folder / "first").exists()  # was not run a second time
    assert toy.log[-3:] == ["train begins", "train ends", "last ends"]
    first, *_ = resumed.stdout.splitlines()
    assert first.startswith("== going on with the run of d2") and first.endswith(f"bash {toy.script} cpu --new")
    assert "scripts.chat_cli -i sft -g d2" in resumed.stdout


def test_a_second_ctrl_c_ends_a_stage_that_does_not_save(toy):
    (toy.folder / "hangs").touch()
    started = toy.start_until("train begins")
    os.killpg(started.pid, signal.SIGINT)
    wait_for(lambda: toy.log[-1] == "train SIGINT")
    os.killpg(started.pid, signal.SIGINT)
    stopped = toy.end(started)
    assert stopped.returncode == 130
    assert stopped.stderr.startswith("stopped by SIGINT at stage train (exit code 130); go on with: ")
    assert stopped.stderr.count("\n") == 1


def test_a_stage_that_does_not_know_signals_ends_at_once_and_is_run_again(toy):
    toy.go("train")
    started = toy.start(EVAL="; exec sleep 60")
    wait_for(lambda: any(p.name() == "sleep" for p in started.left()))
    os.kill(started.pid, signal.SIGTERM)
    stopped = toy.end(started)
    assert stopped.returncode == 143
    assert stopped.stderr.startswith("stopped by SIGTERM at stage evaluate (exit code 143); go on with: ")
    assert toy.run().returncode == 0
    assert [line for line in toy.log if line.startswith("evaluate")] == ["evaluate"]


def test_a_stage_that_ends_in_spite_of_the_signal_is_through_and_the_next_is_not_started(toy):
    (toy.folder / "hangs").touch()
    started = toy.start_until("train begins")
    os.kill(started.pid, signal.SIGTERM)
    wait_for(lambda: toy.log[-1] == "train SIGTERM")
    toy.go("train")
    stopped = toy.end(started)
    assert (stopped.returncode, toy.log[-1]) == (75, "train ends")
    assert "all is saved" in stopped.stderr
    assert toy.run().returncode == 0
    assert (toy.log.count("train begins"), toy.log[-1]) == (1, "last ends")


@pytest.mark.parametrize("name", ["train", "download"])
def test_a_stage_that_fails_ends_the_run_with_its_code_and_says_how_to_go_on(toy, name):
    (toy.folder / f"{name}.fails").touch()
    toy.go("train")
    failed = toy.run()
    assert failed.returncode == 1
    message = f"error: stage {name} ended with exit code 1; mend it, then go on with: bash {toy.script}"
    assert failed.stderr.startswith(f"no network\n{message}") and failed.stderr.count("\n") == 2
    (toy.folder / f"{name}.fails").unlink()
    assert toy.run().returncode == 0
    assert toy.log[-1] == "last ends"


def test_a_download_ends_with_its_run_and_is_begun_again_until_it_is_through(toy):
    (toy.folder / "download.go").unlink()
    toy.go("train")
    started = toy.start_until("train ends")
    wait_for(lambda: "done train" in (toy.base / "run" / "state").read_text())
    wait_for(lambda: "download begins" in toy.downloads)
    os.kill(started.pid, signal.SIGTERM)  # while the recipe waits for it
    stopped = toy.end(started)  # nothing of it is left
    assert stopped.returncode == 143
    assert "at stage download (exit code 143)" in stopped.stderr
    toy.go("download")
    resumed = toy.run()
    assert resumed.returncode == 0, resumed.stderr
    assert (toy.downloads.count("download begins"), toy.log.count("train begins")) == (2, 1)


def test_kill_9_of_the_recipe_blocks_nothing_and_its_stage_saves_before_the_next_run_goes_on(toy):
    started = toy.start_until("train begins")
    started.process.kill()
    started.process.wait(ENDS_IN)
    again = toy.start_until("train begins")
    assert toy.log[-3:] == ["train SIGTERM", "train saved", "train begins"]  # never two of them at once
    toy.go("train")
    resumed = toy.end(again)
    assert resumed.returncode == 0, resumed.stderr
    assert "is left of a run that was killed" in resumed.stdout and "== going on with" in resumed.stdout


def test_kill_9_of_recipe_and_stage_blocks_nothing(toy):
    started = toy.start_until("train begins")
    started.process.kill()
    os.kill(toy.pid("train"), signal.SIGKILL)
    started.process.wait(ENDS_IN)
    toy.go("train")
    assert toy.run().returncode == 0
    assert (toy.base / "run" / "lock").exists()  # the file stays; what locks is the kernel's


def test_two_runs_in_one_base_directory_at_once_are_refused_and_the_first_is_not_disturbed(toy):
    first = toy.start_until("train begins")
    for model in ("d2", "d4"):  # the tokenizer and the report are of both
        second = toy.run(MODEL=model)
        assert second.returncode == 2
        assert second.stderr.startswith(f"error: process {first.pid} on ") and second.stderr.count("\n") == 1
    toy.go("train")
    assert toy.end(first).returncode == 0
    assert toy.log.count("train begins") == 1


def cut(toy: Toy, *, last_stage: bool = True) -> None:
    """A run that was cut in its last stage, or just after it."""
    toy.go("train")
    assert toy.run().returncode == 0
    state = toy.base / "run" / "state"
    lines = [line for line in state.read_text().splitlines() if line != "through"]
    state.write_text("\n".join(lines[: -1 if last_stage else None]) + "\n")


def test_after_a_run_that_was_through_a_new_one_begins_and_the_last_one_is_set_aside(toy):
    toy.go("train")
    base = toy.base
    for name in ("base_checkpoints/d2/step_000009", "base_checkpoints/d4/step_000009", "tokenizer"):
        (base / name).mkdir(parents=True)
    assert toy.run().returncode == 0
    assert not (base / "base_checkpoints/d2").exists()
    assert (base / "previous/base_checkpoints/d2/step_000009").is_dir()
    assert (base / "previous/tokenizer").is_dir()
    assert (base / "base_checkpoints/d4").is_dir()  # of no run that we know of

    (base / "chatrl_checkpoints/d2/step_000005").mkdir(parents=True)
    again = toy.run(MODEL="d4")  # its tokenizer is another, so d2 goes with the one that it was trained with
    assert again.stdout.startswith("== a new run of d4 in ")
    assert (base / "previous/chatrl_checkpoints/d2/step_000005").is_dir()
    assert not (base / "chatrl_checkpoints/d2").exists()
    assert toy.log.count("train begins") == 2


def test_new_sets_a_run_that_was_cut_aside(toy):
    started = toy.start_until("train begins")
    (toy.base / "base_checkpoints" / "d2").mkdir(parents=True)
    os.kill(started.pid, signal.SIGTERM)
    assert toy.end(started).returncode == 75
    toy.go("train")
    (toy.folder / "first").unlink()
    new = toy.run("--new")
    assert new.returncode == 0 and new.stdout.startswith("== a new run of d2")
    assert (toy.folder / "first").exists()
    assert (toy.base / "previous" / "base_checkpoints" / "d2").is_dir()


def test_a_new_run_that_was_cut_while_it_set_the_last_one_aside_begins_again_and_loses_nothing(toy):
    cut(toy)
    with (toy.base / "run" / "state").open("a") as state:
        state.write("through\n")  # as --new begins; the tokenizer was moved, the checkpoints were not yet
    (toy.base / "previous" / "tokenizer").mkdir(parents=True)
    (toy.base / "base_checkpoints" / "d2").mkdir(parents=True)
    assert toy.run(MODEL="d4").stdout.startswith("== a new run of d4")
    assert (toy.base / "previous" / "tokenizer").is_dir()
    assert (toy.base / "previous" / "base_checkpoints" / "d2").is_dir()


def test_a_run_that_was_cut_before_its_first_stage_ended_goes_on(toy):
    cut(toy)
    state = toy.base / "run" / "state"
    state.write_text("".join(state.read_text().splitlines(keepends=True)[:2]))
    resumed = toy.run()
    assert resumed.stdout.startswith("== going on with")
    assert toy.log.count("train begins") == 2


def test_another_recipe_does_not_displace_a_run_that_was_cut(toy):
    cut(toy)
    (toy.base / "tokenizer").mkdir()
    other = toy.run(MODEL="d4")
    assert other.returncode == 2
    assert other.stderr.startswith(f"error: a run of toy.sh d2 in {toy.base} was cut; go on with it: bash {toy.script}")
    assert other.stderr.count("\n") == 1
    assert (toy.base / "tokenizer").is_dir()
    assert toy.run().stdout.startswith("== going on with")


def test_what_later_stages_build_on_must_not_change_within_a_run(toy):
    cut(toy)
    changed = toy.run(RATE="--rate=2")
    assert changed.returncode == 2
    assert "error: stage train is through, but was " in changed.stderr and "--rate=1;" in changed.stderr
    assert changed.stderr.count("\n") == 1 and changed.stderr.rstrip().endswith("--new")
    assert toy.run().returncode == 0
    assert toy.log.count("train begins") == 1


def test_an_evaluation_that_was_changed_is_done_again_and_a_training_that_was_not_through_goes_on(toy):
    cut(toy)
    assert toy.run(EVAL="anew").returncode == 0
    assert [line for line in toy.log if line.startswith("evaluate")] == ["evaluate", "evaluate anew"]
    assert toy.log.count("train begins") == 1


def test_another_tier_of_the_same_model_goes_on_with_what_is_done(toy):
    cut(toy, last_stage=False)
    done = toy.run(tier="gpu2")  # other launchers, other rows a pass
    assert done.returncode == 0, done.stderr
    assert "== train: done before" in done.stdout and "== last: done before" in done.stdout


def test_the_flag_that_is_not_needed_any_more_says_so(toy):
    done = toy.run("--resume")
    assert (done.returncode, done.stderr) == (2, "error: a run that was cut goes on without --resume; leave it out\n")
