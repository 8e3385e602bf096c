"""Evaluate a base model on CORE: 22 in-context tasks, each scored against guessing.

    python -m scripts.base_eval --max-per-task=16                    # a first look on one machine
    torchrun --nproc_per_node=8 -m scripts.base_eval                 # all examples

Reads base_checkpoints/<tag>/ and an evaluation bundle; writes base_eval/<model>.csv. A model trained on
tinyworld gets tinyworld's own bundle, and its score is never called CORE.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanochat import checkpoint, environment, runtime
from nanochat.config import InputError, flag, report_config, run_cli
from nanochat.evals.bundle import CORE_LABELS, open_bundle
from nanochat.evals.core import CoreResult, evaluate_core
from nanochat.report import get_report, write_atomically


@dataclass(frozen=True)
class BaseEvalConfig:
    max_per_task: int | None = flag(None, "examples a task; -1 = all", off=-1, new=True)
    model_tag: str | None = flag(None, "checkpoint tag; None = the deepest model", off="None", new=True)
    step: int | None = flag(None, "checkpoint step; None = the last", off="None", new=True)
    device_batch_size: int = flag(32, "prompts a forward pass, at most", new=True)
    device_type: str | None = flag(None, "cuda, mps or cpu; empty = the best there is", off="", new=True)
    bundle: str | None = flag(None, "evaluation bundle: folder, .zip or tinyworld", off="", new=True)

    def __post_init__(self) -> None:
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


def report_items(result: CoreResult, step: int) -> list[dict[str, Any]]:
    """The reference's keys, then the standard error. What is not CORE never stands under `CORE metric`."""
    scores: dict[str, Any] = {"Model": f"base_model (step {step})"}
    if not {task.label for task in result.tasks} <= set(CORE_LABELS):
        scores["CORE metric"] = f"not measured ({result.metric_name.split(' ', 1)[1]} bundle)"
    scores[result.metric_name] = result.core_metric
    return [scores, result.centered_results, {f"{result.metric_name} standard error": result.stderr}]


def run(cfg: BaseEvalConfig) -> CoreResult:
    rt = runtime.start(cfg.device_type)
    model, tokenizer, meta = checkpoint.load_model("base", rt, cfg.model_tag, cfg.step)
    model.eval()
    step = meta["step"]
    bundle = open_bundle(cfg.bundle, meta.get("user_config", {}).get("dataset"))
    result = evaluate_core(model, tokenizer, rt, bundle, cfg.max_per_task, cfg.device_batch_size)
    if rt.is_master:
        path = environment.base_dir() / "base_eval" / f"base_model_{step:06d}.csv"
        write_atomically(path, format_csv(result))
        print(f"{result.metric_name}: {result.core_metric:.4f} +- {result.stderr:.4f} (written to {path})")
    get_report().log("Base model evaluation", [*report_items(result, step), *report_config(cfg)])
    runtime.stop()
    return result


def main(argv: Sequence[str] | None = None) -> None:
    run_cli(BaseEvalConfig, run, argv, about=__doc__)


if __name__ == "__main__":
    main()
