"""Evaluate a base model on CORE: 22 in-context tasks, each scored against guessing.

    python -m scripts.base_eval --max-per-task=16                    # a first look on one machine
    torchrun --nproc_per_node=8 -m scripts.base_eval                 # all examples

Reads base_checkpoints/<tag>/ and an evaluation bundle; writes base_eval/<model>.csv, and <model>.jsonl with each
prediction. A model trained on tinyworld gets tinyworld's own bundle, and its score is never called CORE. The tokenized
examples are kept in core_requests/ for the next time.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanochat import checkpoint, environment, runtime
from nanochat.config import InputError, flag, report_config, run_cli
from nanochat.evals.bundle import CORE_LABELS, open_bundle
from nanochat.evals.core import MODES, CoreResult, TaskScore, evaluate_core
from nanochat.report import get_report, write_atomically


@dataclass(frozen=True)
class BaseEvalConfig:
    max_per_task: int | None = flag(None, "examples a task; -1 = all", off=-1, new=True)
    model_tag: str | None = flag(None, "checkpoint tag; None = the deepest model", off="None", new=True)
    step: int | None = flag(None, "checkpoint step; None = the last", off="None", new=True)
    device_batch_size: int = flag(32, "prompts of 1,024 tokens a forward pass, at most; more shorter ones", new=True)
    device_type: str | None = flag(None, "cuda, mps or cpu; empty = the best there is", off="", new=True)
    bundle: str | None = flag(None, "evaluation bundle: folder, .zip or tinyworld", off="", new=True)
    mode: str = flag("fast", "fast, or identity: one example at a time, slowly, with the same predictions", new=True)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InputError(f"--mode {self.mode} is not known; use one of {', '.join(MODES)}")
        for name in ("max_per_task", "device_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name} {value} must be at least 1")


def format_csv(result: CoreResult) -> str:
    """Task, accuracy, centered accuracy; the last row is the mean under its own name."""
    rows = [f"{'Task':<35}, {'Accuracy':<10}, {'Centered':<10}"]
    rows += [f"{t.label:<35}, {t.accuracy:<10.6f}, {t.centered:<10.6f}" for t in result.tasks]
    name = "CORE" if result.metric_name == "CORE metric" else result.metric_name
    rows.append(f"{name:<35}, {'':<10}, {result.core_metric:<10.6f}")
    return "\n".join(rows) + "\n"


def format_predictions(result: CoreResult) -> str:
    """A line a task, in the order of its examples: the option chosen (-1 = the model gave no number) and the right one;
    of a language modeling task, 1 = each token of the continuation was the most likely one."""
    lines = [{"task": t.label, "predictions": t.predictions, "right": t.right} for t in result.tasks]
    return "".join(json.dumps(line) + "\n" for line in lines)


def report_items(result: CoreResult, step: int) -> list[dict[str, Any]]:
    """The reference's keys; then how sure they are, what no model would reach, and each task's counts. What is not CORE
    never stands under `CORE metric`."""
    scores: dict[str, Any] = {"Model": f"base_model (step {step})"}
    if not {task.label for task in result.tasks} <= set(CORE_LABELS):
        scores["CORE metric"] = f"not measured ({result.metric_name.split(' ', 1)[1]} bundle)"
    scores[result.metric_name] = result.core_metric
    name, (low, high) = result.metric_name, result.interval
    sureness = {
        f"{name} standard error": result.stderr,
        f"{name} 95% interval": f"{low:.4f} to {high:.4f}",
        f"{name} of random guesses": result.control("guess"),
        f"{name} of one answer to all": result.control("majority"),
    }
    return [scores, result.centered_results, sureness, {f"{t.label} accuracy": describe(t) for t in result.tasks}]


def describe(task: TaskScore) -> str:
    """A task's line: 0.4800 (48 of 100), centered -0.0400 +- 0.0999, 95% -0.2308 to 0.1541, random 0.5000, ..."""
    low, high = map(task.center, task.interval)
    parts = [
        f"{task.accuracy:.4f} ({task.num_correct} of {task.num_examples})",
        f"centered {task.centered:.4f} +- {task.stderr:.4f}",
        f"95% {low:.4f} to {high:.4f}",
        f"random guesses {task.guess:.4f}",
        f"one answer to all {task.majority:.4f}",
        *task.remarks,
    ]
    return ", ".join(parts)


def run(cfg: BaseEvalConfig) -> CoreResult:
    rt = runtime.start(cfg.device_type)
    model, tokenizer, meta = checkpoint.load_model("base", rt, cfg.model_tag, cfg.step)
    model.eval()
    step = meta["step"]
    bundle = open_bundle(cfg.bundle, meta.get("user_config", {}).get("dataset"))
    result = evaluate_core(model, tokenizer, rt, bundle, cfg.max_per_task, cfg.device_batch_size, cfg.mode)
    if rt.is_master:
        path = environment.base_dir() / "base_eval" / f"base_model_{step:06d}.csv"
        write_atomically(path, format_csv(result))
        write_atomically(path.with_suffix(".jsonl"), format_predictions(result))
        low, high = result.interval
        print(
            f"{result.metric_name}: {result.core_metric:.4f} +- {result.stderr:.4f} (95% {low:.4f} to {high:.4f}; "
            f"random guesses {result.control('guess'):.4f}, one answer to all {result.control('majority'):.4f}; "
            f"written to {path})"
        )
    get_report().log("Base model evaluation", [*report_items(result, step), *report_config(cfg)])
    runtime.stop()
    return result


def main(argv: Sequence[str] | None = None) -> None:
    run_cli(BaseEvalConfig, run, argv, about=__doc__)


if __name__ == "__main__":
    main()
