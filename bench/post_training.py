"""What fine-tuning and reinforcement learning each add on one task: a table of scores on its test split by seed.

    python -m bench.post_training --task=TinyAQUA --source=mid --rows=1000
    python -m bench.post_training --task=TinyWordProblems --sft_steps=0      # RL alone, from the last SFT

Each seed has training rows of its own and samples its own answers. SFT learns tinyworld's mixture and the task's rows
beside it; RL is that of speedrun.sh's cpu tier. Scores are of the test split, greedy; beside them stand the majority
answer's score and the exact test of two models on the same questions. Questions that were trained on by chance are left
out. Each seed replaces the checkpoints of the one before, so give this a base directory of its own.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.results import finish, table
from nanochat import checkpoint
from nanochat.config import InputError, flag, run_cli
from nanochat.environment import base_dir
from nanochat.evals import records
from nanochat.evals.records import Record
from nanochat.evals.stats import wilson
from scripts import chat_eval, chat_rl, chat_sft
from tasks.common import Conversation
from tasks.mixtures import TABLES
from tasks.registry import eval_task
from tasks.tables import Row

# Task -> the tasks that share its rows, with their parts, and the first row that no other stage trains on.
SHARES = {
    "TinyAQUA": ({"TinyAQUA": 1.0}, 10_000),
    "TinyWordProblems": ({"TinyWordProblems": 1.0}, 10_000),
    "SpellingBee": ({"SpellingBee": 2 / 7, "SimpleSpelling": 5 / 7}, 100_000),  # as in midtraining's mixture real
}
RATES = {"embedding_lr": 0.05, "unembedding_lr": 0.012, "matrix_lr": 0.02}  # of speedrun.sh's cpu tier
CALLED = re.compile(r"'(\w+)'\.count")


@dataclass(frozen=True)
class PostTrainingConfig:
    task: str = flag("TinyAQUA", "what to learn", choices=tuple(SHARES))
    source: str = flag("mid", "stage that fine-tuning starts from", choices=("base", "mid"))
    model_tag: str | None = flag(None, "checkpoint tag; None = the deepest model", off="None")
    rows: int = flag(6000, "training conversations of the task in SFT, beside tinyworld's mixture")
    sft_steps: int = flag(190, "optimizer steps of 64 conversations; 0 = no fine-tuning")
    sft_lr_frac: float = flag(0.4, "part of the learning rates that SFT starts with")
    rl_steps: int = flag(160, "optimizer steps of examples_per_step x num_samples answers; 0 = none")
    kl: float = flag(0.1, "weight of RL's KL to the model that it starts from")
    examples_per_step: int = flag(8, "prompts of an RL step")
    num_samples: int = flag(16, "answers to each")
    init_lr_frac: float = flag(0.1, "part of the learning rates that RL starts with")
    max_new_tokens: int = flag(128, "longest answer")
    seeds: str = flag("0,1,2", "of the training rows and of the rollouts")

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\d+(,\d+)*", self.seeds):
            raise InputError(f"--seeds {self.seeds!r} must be numbers such as 0,1,2")


def key(conversation: Conversation) -> str:
    """What must not be in training: the spelled word, else the question."""
    answer = json.dumps(conversation["messages"][-1]["content"])
    called = CALLED.search(answer)
    return called.group(1) if called else str(conversation["messages"][0]["content"])


def rows_of(cfg: PostTrainingConfig, seed: int) -> list[Row]:
    """What SFT learns of the task."""
    parts, first = SHARES[cfg.task]
    counts = {name: round(cfg.rows * part) for name, part in parts.items()}
    return [Row(name, rows=count, first=first + seed * count) for name, count in counts.items() if count]


def fine_tune(cfg: PostTrainingConfig, rows: Sequence[Row]) -> None:
    table = base_dir() / "post_training.txt"
    lines = [f"{row.task} train {row.rows} 1 {row.first}" for row in rows]
    table.write_text("\n".join([TABLES["sft", "tinyworld"], *lines]), encoding="utf-8")
    chat_sft.run(
        chat_sft.ChatSFTConfig(
            source=cfg.source,
            model_tag=cfg.model_tag,
            mixture=str(table),
            num_iterations=cfg.sft_steps,
            target_examples_per_step=64,
            device_batch_size=16,
            init_lr_frac=cfg.sft_lr_frac,
            eval_steps=8,
            eval_metrics_every=None,
            **RATES,
        )
    )


def reinforce(cfg: PostTrainingConfig, seed: int) -> None:
    chat_rl.run(
        chat_rl.ChatRLConfig(
            task=cfg.task,
            model_tag=cfg.model_tag,
            num_iterations=cfg.rl_steps,
            examples_per_step=cfg.examples_per_step,
            num_samples=cfg.num_samples,
            device_batch_size=16,
            max_new_tokens=cfg.max_new_tokens,
            init_lr_frac=cfg.init_lr_frac,
            kl=cfg.kl,
            eval_every=None,
            save_every=None,
            seed=seed,
            **RATES,
        )
    )


def score(cfg: PostTrainingConfig, source: str, trained: set[str]) -> tuple[list[Record], float]:
    """The records of the questions that were not trained on, and the majority answer's score on all."""
    settings = chat_eval.ChatEvalConfig(
        source=source,
        model_tag=cfg.model_tag,
        task_name=cfg.task,
        max_new_tokens=cfg.max_new_tokens,
        batch_size=64,
    )
    result = chat_eval.run(settings)[cfg.task]
    path = checkpoint.find(source, cfg.model_tag)
    manifest = checkpoint.read_manifest(path)
    found = records.read(chat_eval.record_path(settings, source, manifest, path.parent.name, cfg.task))
    task = eval_task(cfg.task)
    return [r for r in found if key(task[r.index]) not in trained], result.majority or 0.0


def share(found: Sequence[Record]) -> str:
    low, high = wilson(sum(r.passed for r in found), len(found))
    return f"{100 * accuracy(found):.1f} ({100 * low:.1f} to {100 * high:.1f})"


def run(cfg: PostTrainingConfig) -> dict[str, Any]:
    rows, results = [], []
    for seed in map(int, cfg.seeds.split(",")):
        learnt = rows_of(cfg, seed) if cfg.sft_steps else []
        trained = {key(conversation) for row in learnt for conversation in row.open()}
        result: dict[str, Any] = {"seed": seed}
        if cfg.sft_steps:
            result["sft_seconds"], result["sft_cpu_seconds"] = timed(lambda rows=learnt: fine_tune(cfg, rows))
        before, result["majority"] = score(cfg, "sft", trained)
        result |= {"problems": len(before), "sft": accuracy(before)}
        row = [seed, len(before), f"{100 * result['majority']:.1f}", share(before)]
        if cfg.rl_steps:
            result["rl_seconds"], result["rl_cpu_seconds"] = timed(lambda seed=seed: reinforce(cfg, seed))
            after, _ = score(cfg, "rl", trained)
            result |= {"rl": accuracy(after), "p_value": records.compare(before, after).p_value}
            row += [share(after), f"{result['p_value']:.2g}", f"{result['rl_seconds']:.0f}"]
            row += [f"{result['rl_cpu_seconds']:.0f}"]
        rows.append(row)
        results.append(result)
    head = ["seed", "questions", "majority %", "SFT % (95%)", "RL % (95%)", "p of RL over SFT", "RL s", "CPU s"]
    table(head[: len(rows[0])], rows)
    final = {"bench": "post_training", "task": cfg.task, "config": dataclasses.asdict(cfg), "seeds": results}
    finish(final)
    return final


def timed(stage: Callable[[], None]) -> tuple[float, float]:
    """Its seconds on the clock and of all cores' work."""
    wall, cpu = time.perf_counter(), time.process_time()
    stage()
    return time.perf_counter() - wall, time.process_time() - cpu


def accuracy(found: Sequence[Record]) -> float:
    return sum(r.passed for r in found) / len(found)


def main(argv: Sequence[str] | None = None) -> None:
    run_cli(PostTrainingConfig, run, argv, about=__doc__)


if __name__ == "__main__":
    main()
