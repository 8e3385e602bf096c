"""What saving costs the training loop, and how soon a resumed run trains.

    python -m bench.checkpoint --depth=6 --data=FOLDER          # two tables; one JSON line at the end

Saving: pairs of stretches of `every` steps, one that begins with a checkpoint, which is written meanwhile, and one
without; the difference is what it costs. Resuming: scripts.base_train in processes of its own, from the start of Python
to the end of the first step, cold and with --resume=auto. Everything is written in a temporary folder.
"""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import common
from bench.common import Built, Plan, Setting
from bench.packed import tokenizer_for
from bench.results import ROOT, finish, table
from bench.train import stream
from nanochat import checkpoint
from nanochat.config import InputError, flag, run_cli
from nanochat.data.sources import open_source
from nanochat.resume import LoopState
from nanochat.saver import Saver


@dataclass(frozen=True)
class CheckpointConfig:
    depth: int = flag(6, "layers")
    arch: str = flag("plain", "architecture")
    dtype: str | None = flag(None, "of the activations; default: what the machine is fast in")
    data: str = flag("tinyworld", "folder of text or source name, for the resumed run")
    every: int = flag(20, "steps between checkpoints")
    pairs: int = flag(3, "stretches with and without a checkpoint")
    resumes: int = flag(3, "cold starts and resumes")
    vocab_size: int = flag(4096, "ids")
    sequence_len: int = flag(512, "context in tokens")
    tokens_per_step: int = flag(16_384, "tokens of an optimizer step")
    device_batch_size: int = flag(16, "rows of a forward pass")
    device: str | None = flag(None, "cuda or cpu; default: the best there is")
    threads: int = flag(common.cores(), "of the CPU")

    def __post_init__(self) -> None:
        if min(self.every, self.pairs, self.resumes) < 1:
            raise InputError("--every, --pairs and --resumes must be at least 1")


def saving(setting: Setting, plan: Plan, vocab_size: int, pairs: int) -> dict[str, Any]:
    """Seconds of stretches of plan.steps steps with and without a checkpoint, of copying and of writing it."""
    built = Built(setting, plan, vocab_size)
    batches = stream(built, vocab_size, None)
    accum = plan.tokens_per_step // (plan.device_batch_size * plan.sequence_len)

    def stretch() -> float:
        return sum(built.timed_step([next(batches) for _ in range(accum)], step)[0] for step in range(plan.steps))

    built.warm_up([next(batches) for _ in range(accum)])
    built.timed_step([next(batches) for _ in range(accum)], 0)  # so that there is a state to save
    found: dict[str, list[float]] = {"with": [], "without": [], "copying": [], "writing": []}
    with tempfile.TemporaryDirectory() as folder:
        meta = {"model_config": built.config.to_dict()}
        saver = Saver(built.rt, Path(folder) / "d0", built.model, built.optimizer, meta, LoopState(), keep_last=1)
        saver.prepare()
        for pair in range(pairs):
            for kind in ("with", "without") if pair % 2 == 0 else ("without", "with"):
                began = time.perf_counter()
                copying = 0.0
                if kind == "with":
                    saver.save(LoopState(step=pair + 1), None)
                    copying = time.perf_counter() - began
                    found["copying"].append(copying)
                found[kind].append(copying + stretch())
                saver.wait()
        manifest = checkpoint.read_manifest(checkpoint.step_path(Path(folder) / "d0", pairs))
        for pair in range(pairs):  # alone
            began = time.perf_counter()
            saver.save(LoopState(step=pairs + pair + 1), None)
            saver.wait()
            found["writing"].append(time.perf_counter() - began)
        saver.finish()
    size = sum(file["bytes"] for file in manifest["files"].values())
    slower = sum(found["with"]) / sum(found["without"]) - 1
    return {**found, "bytes": size, "cost_percent": 100 * slower}


def resuming(cfg: CheckpointConfig, dtype: str) -> dict[str, list[float]]:
    """Seconds from the start of Python to the end of the first step, cold and resumed."""
    found: dict[str, list[float]] = {"cold": [], "resumed": []}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer_for(open_source(cfg.data), cfg.vocab_size).save(Path(folder) / "tokenizer")
        flags = [
            *(f"--depth={cfg.depth}", f"--arch={cfg.arch}", f"--dataset={cfg.data}"),
            *(f"--max_seq_len={cfg.sequence_len}", f"--total_batch_size={cfg.tokens_per_step}"),
            *(f"--device_batch_size={cfg.device_batch_size}", "--eval_every=-1", "--core_metric_every=-1"),
            *("--sample_every=-1", "--save_every=2", "--num_iterations=2"),
        ]
        if cfg.device:
            flags.append(f"--device_type={cfg.device}")
        environment = {**os.environ, "NANOCHAT_BASE_DIR": folder, "NANOCHAT_DTYPE": dtype, "PYTHONPATH": str(ROOT)}
        for _ in range(cfg.resumes):
            shutil.rmtree(Path(folder) / "base_checkpoints", ignore_errors=True)
            for kind, more in (("cold", []), ("resumed", ["--resume=auto", "--num_iterations=3"])):
                command = [sys.executable, "-u", "-m", "scripts.base_train", *flags, *more]
                began = time.perf_counter()
                process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=ROOT)
                assert process.stdout is not None
                found[kind].append(_until_first_step(process.stdout, began))
                if process.wait() != 0:
                    raise InputError(f"base_train ended with exit code {process.returncode}; its error stands above")
    return found


def _until_first_step(lines: Iterator[str], began: float) -> float:
    seconds = float("nan")
    for line in lines:
        if seconds != seconds and re.match(r"step \d+/", line):
            seconds = time.perf_counter() - began
    return seconds


def run(cfg: CheckpointConfig) -> dict[str, Any]:
    device = cfg.device or common.default_device()
    dtype = cfg.dtype or common.default_dtype(device)
    plan = Plan(
        cfg.every,
        cfg.tokens_per_step,
        cfg.sequence_len,
        cfg.device_batch_size,
        dtype,
        compile=False,
        device=device,
        threads=cfg.threads,
    )
    setting = Setting(cfg.depth, cfg.arch)
    common.check(setting, plan, cfg.vocab_size)
    tokenizer_for(open_source(cfg.data), cfg.vocab_size)
    saved = saving(setting, plan, cfg.vocab_size, cfg.pairs)
    print(f"{common.machine(plan)}; depth {cfg.depth}, {cfg.arch}, {dtype}, {cfg.tokens_per_step:,} tokens a step")
    names = ("with", "without", "copying", "writing")
    table(
        ["MiB", f"s-of-{cfg.every}-steps-with", "without", "cost%", "copying-s", "writing-alone-s"],
        [
            [
                f"{saved['bytes'] / 2**20:,.0f}",
                *(f"{statistics.mean(saved[n]):.2f}" for n in names[:2]),
                f"{saved['cost_percent']:.2f}",
                *(f"{statistics.mean(saved[n]):.2f}" for n in names[2:]),
            ]
        ],
    )
    starts = resuming(cfg, dtype)
    cold, resumed = (statistics.median(starts[kind]) for kind in ("cold", "resumed"))
    table(
        ["cold-start-s", "resumed-s", "ratio"],
        [[f"{cold:.2f}", f"{resumed:.2f}", f"{resumed / cold:.2f}"]],
    )
    result = {"bench": "checkpoint", "machine": common.machine(plan), "saving": saved, "resuming": starts}
    finish(result)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    run_cli(CheckpointConfig, run, argv, about=__doc__)


if __name__ == "__main__":
    main()
