"""What fine-tuning and reinforcement learning each add on one task: a table of scores on its test split by seed.

    python -m bench.post_training --task=TinyAQUA --source=mid --rows=6000 --sft_steps=190 --rl_steps=56
    python -m bench.post_training --task=TinyWordProblems --rows=0 --sft_steps=0      # RL alone, from the last SFT

Each seed has training rows of its own and samples its own answers. SFT learns the data set's mixture and, as a file of
conversations, the task's rows. Scores are of the test split, greedy; beside them stand the majority answer's score and
the exact test of two models on the same questions. Questions that were trained on by chance are left out. Each seed
replaces the checkpoints of the one before, so give this a base directory of its own.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.results import finish, table
from nanochat import checkpoint
from nanochat.config import InputError, flag, run_cli
from nanochat.environment import base_dir
from nanochat.evals import records
from nanochat.evals.records import Record
from nanochat.evals.stats import wilson
from scripts import chat_eval, chat_rl, chat_sft
from tasks.common import Conversation, Task
from tasks.registry import eval_task
from tasks.spellingbee import SimpleSpelling, SpellingBee
from tasks.tinyworld import TinyAQUA, TinyWordProblems

# Name -> `rows` training conversations for a seed, none in common with another seed's.
ROWS: dict[str, Callable[[int, int], Sequence[Task]]] = {
    "TinyAQUA": lambda rows, seed: [TinyAQUA("train", rows, first=10_000 + seed * rows)],
    "TinyWordProblems": lambda rows, seed: [TinyWordProblems("train", rows, first=10_000 + seed * rows)],
    "SpellingBee": lambda rows, seed: [
        SpellingBee(1_000_000, "train", start=seed * rows, stop=seed * rows + rows * 3 // 4),
        SimpleSpelling(1_000_000, "train", start=seed * rows, stop=seed * rows + rows // 4),
    ],
}
RATES = {"embedding_lr": 0.05, "unembedding_lr": 0.012, "matrix_lr": 0.02}  # of speedrun.sh's cpu tier
CALLED = re.compile(r"'(\w+)'\.count")


@dataclass(frozen=True)
class PostTrainingConfig:
    task: str = flag("TinyAQUA", "what to learn", choices=tuple(ROWS))
    source: str = flag("mid", "stage that fine-tuning starts from", choices=("base", "mid"))
    model_tag: str | None = flag(None, "checkpoint tag; None = the deepest model", off="None")
    rows: int = flag(6000, "training conversations of the task in SFT, beside the data set's mixture")
    sft_steps: int = flag(190, "optimizer steps of 64 conversations; 0 = no fine-tuning")
    rl_steps: int = flag(56, "optimizer steps of examples_per_step x num_samples answers; 0 = none")
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


def write_rows(cfg: PostTrainingConfig, seed: int) -> tuple[Path, set[str]]:
    """The task's training conversations as a file, and what they ask for."""
    path = base_dir() / "post_training" / f"{cfg.task}_{seed}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    conversations = [c for task in ROWS[cfg.task](cfg.rows, seed) for c in task]
    path.write_text("".join(json.dumps({"messages": c["messages"]}) + "\n" for c in conversations), encoding="utf-8")
    return path, set(map(key, conversations))


def fine_tune(cfg: PostTrainingConfig, path: Path | None) -> None:
    chat_sft.run(
        chat_sft.ChatSFTConfig(
            source=cfg.source,
            model_tag=cfg.model_tag,
            conversations=None if path is None else str(path),
            num_iterations=cfg.sft_steps,
            target_examples_per_step=64,
            device_batch_size=16,
            init_lr_frac=0.4,
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
    step = checkpoint.read_manifest(path)["step"]
    found = records.read(chat_eval.record_path(settings, source, path.parent.name, step, cfg.task))
    task = eval_task(cfg.task)
    return [r for r in found if key(task[r.index]) not in trained], result.majority or 0.0


def share(found: Sequence[Record]) -> str:
    low, high = wilson(sum(r.passed for r in found), len(found))
    return f"{100 * accuracy(found):.1f} ({100 * low:.1f} to {100 * high:.1f})"


def run(cfg: PostTrainingConfig) -> dict[str, Any]:
    rows, results = [], []
    for seed in map(int, cfg.seeds.split(",")):
        path, trained = write_rows(cfg, seed) if cfg.rows else (None, set())
        result: dict[str, Any] = {"seed": seed}
        if cfg.sft_steps:
            result["sft_seconds"], result["sft_cpu_seconds"] = timed(lambda path=path: fine_tune(cfg, path))
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
