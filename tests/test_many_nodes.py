"""Recipes for several nodes, as far as one machine can try them."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

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
    for name, text in {
        "srun": 'echo "$NODES $HEAD $RUN_ID $*"',
        "scontrol": '[ "$*" = "show hostnames n[3-4]" ] && printf "n3\\nn4\\n"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "70001",
        "SLURM_JOB_NODELIST": "n[3-4]",
        "SLURM_CPUS_ON_NODE": "96",
    }
    env = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(ROOT / "runs" / "slurm.sh"), "scripts.base_train", "--depth=4"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    asked = "--kill-on-bad-exit=1 --cpus-per-task=96 bash runs/multinode.sh scripts.base_train --depth=4"
    assert done.stdout == f"2 n3:30001 70001 {asked}\n", done.stderr


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
