"""Let EleutherAI's lm-eval score a checkpoint on tasks of the CORE bundle, beside our own scorer, on the same prompts.

    uv sync --group lm-eval
    python -m scripts.second_opinion -i base                                    # arc_easy, piqa and boolq
    python -m scripts.second_opinion -i sft --tasks="copa|arc_easy" --max_per_task=100

Ours takes the choice whose tokens have the highest mean log-probability, lm-eval's acc the one with the highest sum.
Both rules are applied to lm-eval's numbers: by ours it must get right exactly as many as our scorer does.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nanochat import checkpoint, runtime
from nanochat.config import REQUIRED, InputError, flag, run_cli
from nanochat.environment import print0
from nanochat.evals import lm_eval_adapter as adapter
from nanochat.evals.bundle import CoreTask, open_bundle
from nanochat.evals.core import evaluate_core


@dataclass(frozen=True)
class SecondOpinionConfig:
    source: str = flag(REQUIRED, "stage that trained the model", choices=tuple(checkpoint.DIRECTORIES), short="-i")
    tasks: str = flag("arc_easy|piqa|boolq", "multiple-choice tasks of the bundle, joined by |")
    max_per_task: int | None = flag(200, "examples a task; None = all", off="None")
    bundle: str | None = flag(None, "folder or zip of an evaluation bundle; None = the usual one", off="None")
    batch_size: int = flag(8, "prompts a forward pass")
    model_tag: str | None = flag(None, "checkpoint tag; None = the deepest model", off="None", short="-g")
    step: int | None = flag(None, "checkpoint step; None = the last", off="None", short="-s")
    device_type: str | None = flag(None, "cuda, mps or cpu; empty = the best there is", off="")

    def __post_init__(self) -> None:
        for name in ("max_per_task", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name} {value} must be at least 1")


@dataclass(frozen=True)
class Opinion:
    """Right answers of `total` to one task."""

    total: int
    ours: int
    lm_eval_by_mean: int  # lm-eval's log-probabilities, our rule
    lm_eval: int  # its own acc


def pick(tasks: Sequence[CoreTask], names: str) -> list[CoreTask]:
    known = {task.label: task for task in tasks if task.kind == "multiple_choice"}
    wanted = list(dict.fromkeys(name.strip() for name in names.split("|")))
    for name in wanted:
        if name not in known:
            raise InputError(f"--tasks: no multiple-choice task {name!r}; there are {', '.join(known)}")
    return [known[name] for name in wanted]


def run(cfg: SecondOpinionConfig) -> dict[str, Opinion]:
    adapter.require_lm_eval()
    rt = runtime.start(cfg.device_type)
    if rt.world_size > 1:
        raise InputError(f"lm-eval is asked by one process, not by {rt.world_size}; leave torchrun out")
    model, tokenizer, meta = checkpoint.load_model(cfg.source, rt, cfg.model_tag, cfg.step)
    model.eval()
    bundle = open_bundle(cfg.bundle, meta.get("user_config", {}).get("dataset"))
    tasks = pick(bundle.tasks, cfg.tasks)
    ours = evaluate_core(
        model, tokenizer, rt, dataclasses.replace(bundle, tasks=tuple(tasks)), cfg.max_per_task, cfg.batch_size
    )
    with tempfile.TemporaryDirectory(prefix="nanochat-lm-eval-") as folder:
        examples = {task.label: adapter.draw_examples(task, cfg.max_per_task) for task in tasks}
        names = adapter.write_tasks(tasks, Path(folder), tokenizer, examples)
        asked = adapter.ask_lm_eval(adapter.as_lm(model, tokenizer, cfg.batch_size), names, Path(folder))
    opinions = {}
    for task, score, name in zip(tasks, ours.tasks, names, strict=True):
        samples = asked[name]
        by_mean = sum(adapter.chosen(s["lls"], s["doc"]["lengths"]) == s["doc"]["gold"] for s in samples)
        its_own = round(sum(s["acc"] for s in samples))
        opinion = opinions[task.label] = Opinion(len(samples), score.num_correct, by_mean, its_own)
        agree = "the same" if opinion.ours == by_mean else "DIFFERENT"
        print0(
            f"{task.label} ({task.num_fewshot}-shot), of {opinion.total}: ours {opinion.ours}, lm-eval by our rule "
            f"{by_mean} ({agree}), lm-eval's acc {its_own}"
        )
    runtime.stop()
    return opinions


def main(argv: Sequence[str] | None = None) -> None:
    run_cli(SecondOpinionConfig, run, argv, about=__doc__)


if __name__ == "__main__":
    main()
