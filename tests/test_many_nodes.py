"""Recipes for several nodes, as far as one machine can try them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from scripts import tok_train

ROOT = Path(__file__).parents[1]
FLAGS = [
    *("--dataset=tinyworld", "--depth=2", "--aspect_ratio=16", "--head_dim=16", "--max_seq_len=64"),
    *("--num_iterations=3", "--total_batch_size=512", "--eval_tokens=512", "--eval_every=3"),
    *("--core_metric_every=-1", "--sample_every=-1"),
]


def node(base: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    """runs/multinode.sh, as it is started on a node."""
    env = {k: v for k, v in os.environ.items() if k not in ("NODES", "HEAD", "RANKS", "RUN_ID")}
    env |= {"VIRTUAL_ENV": sys.prefix, "PATH": f"{sys.prefix}/bin:{env['PATH']}", "NANOCHAT_BASE_DIR": str(base)}
    command = ["bash", str(ROOT / "runs" / "multinode.sh"), *words]
    return subprocess.Popen(
        command, env={**env, **environment}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.parametrize(
    ("environment", "words", "message"),
    [
        ({}, ["scripts.base_train"], "NODES= must be the number of nodes; try NODES=2"),
        ({"NODES": "two"}, ["scripts.base_train"], "NODES=two must be"),
        ({"NODES": "2"}, ["scripts.base_train"], "HEAD= must be HOST:PORT"),
        ({"NODES": "2", "HEAD": "node0"}, ["scripts.base_train"], "HEAD=node0 must be HOST:PORT"),
        ({"NODES": "2", "HEAD": "node0:29500"}, [], "no stage; try:"),
    ],
)
def test_what_a_node_must_be_told_is_asked_for_in_one_line(tmp_path, environment, words, message):
    started = node(tmp_path, *words, **environment)
    _, error = started.communicate(timeout=60)
    assert started.returncode == 2
    assert len(error.splitlines()) == 1 and message in error


@pytest.mark.parametrize("script", sorted(p.name for p in (ROOT / "runs").glob("*.sh")))
def test_every_recipe_is_bash(script):
    assert subprocess.run(["bash", "-n", str(ROOT / "runs" / script)], capture_output=True).returncode == 0


def test_the_skypilot_task_runs_bash_on_every_node_and_sets_what_multinode_needs(tmp_path):
    task = yaml.safe_load((ROOT / "runs" / "skypilot.yaml").read_text())
    assert task["num_nodes"] >= 2 and set(task) >= {"resources", "workdir", "setup", "run"}
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "multinode.sh").write_text('echo "$NODES $RANKS $HEAD $RUN_ID $*"')
    sky = {
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_TASK_ID": "t1",
    }
    env = {**os.environ, **sky, **{k: str(v) for k, v in task["envs"].items()}}
    done = subprocess.run(["bash", "-eu"], input=task["run"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout == "2 8 10.0.0.1:29500 t1 scripts.base_train --depth=26 --run=dummy\n", done.stderr
    assert subprocess.run(["bash", "-n"], input=task["setup"], text=True).returncode == 0


def test_a_slurm_job_starts_one_torchrun_a_node_and_names_the_first_as_head(tmp_path):
    done = slurm(tmp_path, srun='echo "$NODES $HEAD $RUN_ID $*"')
    asked = "--kill-on-bad-exit=0 --wait=25 --cpus-per-task=96 bash runs/multinode.sh scripts.base_train --depth=4"
    assert done.stdout == f"2 n3:30001 70001 {asked}\n", done.stderr


@pytest.mark.parametrize(
    ("code", "environment", "requeued"),
    [(75, {"REQUEUE": "yes"}, "requeue 70001\n"), (75, {}, ""), (1, {"REQUEUE": "yes"}, "")],
)
def test_a_slurm_job_that_was_stopped_puts_itself_back_into_the_queue_when_told_to(
    tmp_path, code, environment, requeued
):
    done = slurm(tmp_path, srun=f"exit {code}", **environment)
    assert (done.returncode, done.stdout) == (code, requeued), done.stderr


def slurm(folder: Path, srun: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """runs/slurm.sh with stand-ins for Slurm's commands."""
    for name, text in {
        "srun": srun,
        "scontrol": '[ "$*" = "show hostnames n[3-4]" ] && printf "n3\\nn4\\n" || echo "$*"',
    }.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    job = {
        "SLURM_SUBMIT_DIR": str(folder),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "70001",
        "SLURM_JOB_NODELIST": "n[3-4]",
        "SLURM_CPUS_ON_NODE": "96",
    }
    env = {**os.environ, **job, **environment, "PATH": f"{folder}:{os.environ['PATH']}"}
    command = ["bash", str(ROOT / "runs" / "slurm.sh"), "scripts.base_train", "--depth=4"]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


# Rank 1 dies if it is told to; rank 0 waits for it, as in a collective.
RANK = """
import os, signal, sys, time
from pathlib import Path

folder, dies, rank = Path(sys.argv[1]), sys.argv[2:] == ["dies"], int(os.environ["RANK"])
caught = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda n, frame: caught.append(signal.Signals(n).name))
(folder / f"rank{rank}").write_text(str(os.getpid()))
until = time.monotonic() + 120
while time.monotonic() < until:
    time.sleep(0.01)
    if dies and rank == 1 and (folder / "rank0").exists():
        raise RuntimeError("rank 1 has found a mistake")
    if caught and not dies:
        time.sleep(rank)  # the ranks do not end in the same moment
        (folder / f"saved{rank}").write_text(" ".join(caught[:1]))
        sys.exit(75)
"""


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts two stand-ins as the ranks of a node, through runs/multinode.sh; none is left at the end."""
    (tmp_path / "toy_rank.py").write_text(RANK)
    started = []

    def start(*words: str) -> subprocess.Popen[str]:
        settings = {"NODES": "1", "RANKS": "2", "HEAD": "127.0.0.1:0", "PYTHONPATH": str(tmp_path)}
        started.append(node(tmp_path, "toy_rank", str(tmp_path), *words, **settings))
        until = time.monotonic() + 120  # the launcher imports torch
        while not all((tmp_path / f"rank{rank}").exists() for rank in range(2)):
            assert started[-1].poll() is None and time.monotonic() < until, started[-1].communicate()
            time.sleep(0.05)
        return started[-1]

    yield start
    for one in started:
        one.kill()
    for path in tmp_path.glob("rank?"):
        with suppress(ProcessLookupError):
            os.kill(int(path.read_text()), signal.SIGKILL)


def gone(path: Path) -> bool:
    return not psutil.pid_exists(int(path.read_text()))


def test_a_warning_to_a_node_reaches_its_ranks_and_its_exit_code_is_theirs(ranks, tmp_path):
    one = ranks()
    one.send_signal(signal.SIGUSR1)
    _, error = one.communicate(timeout=60)
    assert one.returncode == 75, error
    assert [(tmp_path / f"saved{rank}").read_text() for rank in range(2)] == ["SIGTERM", "SIGTERM"]


@pytest.mark.slow
def test_a_rank_that_dies_takes_one_that_hangs_along_within_30_s_and_its_error_is_shown(ranks, tmp_path):
    one = ranks("dies")
    began = time.monotonic()
    while not gone(tmp_path / "rank0"):
        assert time.monotonic() < began + 30
        time.sleep(0.1)
    _, error = one.communicate(timeout=60)
    assert one.returncode == 1
    assert "RuntimeError: rank 1 has found a mistake" in error


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["plain", "modern"])
def test_the_same_command_on_two_ranks_has_the_losses_of_one_over_50_steps(tmp_path, monkeypatch, arch):
    """The passes hold the same rows, two after another on one rank: what is added, and in which order, stays."""
    curves = []
    for ranks in ("1", "2"):
        base = tmp_path / ranks
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
        tok_train.main(["--dataset=tinyworld", "--max_chars=50000", "--vocab_size=300"])
        flags = [*FLAGS, "--num_iterations=50", "--device_batch_size=4", f"--arch={arch}"]
        one = node(base, "scripts.base_train", *flags, NODES="1", RANKS=ranks, HEAD="127.0.0.1:0", RUN_ID=arch)
        _, error = one.communicate(timeout=600)
        assert one.returncode == 0, error
        lines = (base / "report" / "curves" / "base.jsonl").read_text().splitlines()
        curves.append([row["loss"] for row in map(json.loads, lines) if "loss" in row])
    assert len(curves[0]) == 50
    assert curves[1] == pytest.approx(curves[0], abs=1e-4)


@pytest.mark.slow
def test_two_nodes_of_two_ranks_train_what_one_process_trains(tmp_path, monkeypatch):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        head = f"127.0.0.1:{s.getsockname()[1]}"
    curves = []
    for name, nodes, ranks in (("one", 1, 1), ("four", 2, 2)):
        base = tmp_path / name
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
        tok_train.main(["--dataset=tinyworld", "--max_chars=50000", "--vocab_size=300"])
        settings = {"NODES": str(nodes), "RANKS": str(ranks), "HEAD": head, "RUN_ID": name}
        started = [node(base, "scripts.base_train", *FLAGS, **settings) for _ in range(nodes)]
        outputs = [one.communicate(timeout=600) for one in started]
        assert [one.returncode for one in started] == [0] * nodes, outputs
        log = "".join(out for out, _ in outputs)
        assert log.count(f"Tokens / micro-batch / rank: {8 // nodes // ranks} x 64") == 1  # said once, by rank 0
        curves.append([float(v) for v in re.findall(r"Validation bpb: ([\d.]+)", log)])
    assert len(curves[0]) == 2
    assert curves[1] == pytest.approx(curves[0], abs=2e-4)
