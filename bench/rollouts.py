"""Rollouts of RL: tokens a second with many prompts in one batch, against one prompt and one answer at a time.

    python -m bench.rollouts --source=sft --model_tag=d4 --task=TinyWordProblems

The ways take turns, so that a machine whose speed wanders is as slow for each; the middle of the repeats counts. All
of them sample with the same seed; the table says how long their answers are on average.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench import common
from bench.results import finish, table
from nanochat import checkpoint, runtime
from nanochat.config import InputError, flag, run_cli
from nanochat.engine import Engine
from nanochat.rollouts import RewardTask, Sampling, roll_out
from tasks.registry import rl_tasks


@dataclass(frozen=True)
class RolloutsConfig:
    source: str = flag("sft", "stage whose model answers", choices=("mid", "sft", "rl"))
    model_tag: str | None = flag(None, "checkpoint tag; None = the deepest model", off="None")
    task: str = flag("TinyWordProblems", "whose training prompts are answered")
    prompts: int = flag(16, "prompts in one batch")
    num_samples: int = flag(16, "answers to each prompt")
    max_new_tokens: int = flag(96, "longest answer")
    singles: int = flag(16, "answers that are sampled one at a time")
    repeats: int = flag(3, "of each way")
    device: str | None = flag(None, "cuda or cpu; default: the best there is")

    def __post_init__(self) -> None:
        for name in ("prompts", "num_samples", "max_new_tokens", "singles", "repeats"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)} must be at least 1; try --{name}=1")


def sample(engine: Engine, task: RewardTask, cfg: RolloutsConfig, groups: Sequence[Sequence[int]], num_samples: int):
    """(tokens of the answers, answers, seconds) of the groups of prompts one after the other."""
    sampling = Sampling(cfg.max_new_tokens, 1.0, 50)
    t0 = time.perf_counter()
    done = [roll_out(engine, task, group, num_samples, sampling, seed=7) for group in groups]
    runtime.synchronize(engine.model.device)
    seconds = time.perf_counter() - t0
    tokens = sum(len(r.answer_ids(row)) for r in done for row in range(len(r.sequences)))
    return tokens, sum(len(r.sequences) for r in done), seconds


def run(cfg: RolloutsConfig) -> dict[str, Any]:
    rt = runtime.start(cfg.device)
    model, tokenizer, meta = checkpoint.load_model(cfg.source, rt, cfg.model_tag)
    model.eval()
    engine, (task, _) = Engine(model, tokenizer), rl_tasks(cfg.task)
    every = range(cfg.prompts)
    ways: dict[str, tuple[list[list[int]], int]] = {
        f"{cfg.prompts} prompts x {cfg.num_samples}": ([list(every)], cfg.num_samples),
        f"one prompt x {cfg.num_samples} at a time": ([[i] for i in every], cfg.num_samples),
        "one answer at a time": ([[i % cfg.prompts] for i in range(cfg.singles)], 1),
    }
    found: dict[str, list[tuple[int, int, float]]] = {name: [] for name in ways}
    sample(engine, task, cfg, [[0]], 2)  # warms kernels up
    for _ in range(cfg.repeats):
        for name, (groups, num_samples) in ways.items():
            found[name].append(sample(engine, task, cfg, groups, num_samples))
    rates = {name: statistics.median(tokens / s for tokens, _, s in runs) for name, runs in found.items()}
    first = next(iter(rates.values()))
    rows = [
        [name, runs[0][1], f"{runs[0][0] / runs[0][1]:.1f}", f"{rates[name]:,.0f}", f"{first / rates[name]:.1f}"]
        for name, runs in found.items()
    ]
    where = torch.cuda.get_device_name() if rt.device.type == "cuda" else f"{common.cores()} CPU cores"
    print(f"{where}; {cfg.source} {meta['tag']} step {meta['step']}, {cfg.task}, {rt.dtype}")
    table(["rollouts", "answers", "tokens-an-answer", "tokens/s", "the first is faster by"], rows)
    result = {"bench": "rollouts", "machine": where, "model": meta["tag"], "task": cfg.task, "tokens_per_second": rates}
    finish(result)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    run_cli(RolloutsConfig, run, argv, about=__doc__)


if __name__ == "__main__":
    main()
