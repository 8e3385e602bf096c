"""Evaluate a chat model on tasks: multiple choice, word problems, code, spelling.

    python -m scripts.chat_eval -i sft                                  # all default tasks
    python -m scripts.chat_eval -i sft -a "ARC-Easy|GSM8K" -x 100       # two tasks, 100 problems each
    python -m scripts.chat_eval -i rl -a GSM8K --against=mid            # compare with mid, not with the stage before
    torchrun --nproc_per_node=8 -m scripts.chat_eval -- -i sft

Reads {base,mid,chatsft,chatrl}_checkpoints/<tag>/; writes every prompt, answer and verdict to
chat_eval/<source>_<tag>_<step>_<weights>/<task>.jsonl, where the next stage's evaluation finds them and says whether
what changed is more than chance. A model trained on tinyworld gets tinyworld's own tasks, and their mean is never
called ChatCORE metric.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat import checkpoint, runtime
from nanochat.config import REQUIRED, InputError, flag, report_config, run_cli
from nanochat.environment import base_dir, print0
from nanochat.evals import records
from nanochat.evals.chat import ChatResult, chat_core, evaluate_task
from nanochat.evals.chat_report import details, paired_line, score_line
from nanochat.ranks import together
from nanochat.report import get_report
from nanochat.sandbox import isolation_level
from tasks.registry import BASELINES, EVAL_TASKS, REAL, TINYWORLD, default_tasks, eval_task

STAGES = tuple(checkpoint.DIRECTORIES)
STAGE_BEFORE = {"sft": "mid", "rl": "sft"}  # where the checkpoint does not name another
NO_RECORD = "no record of the stage before"


@dataclass(frozen=True)
class ChatEvalConfig:
    source: str = flag(REQUIRED, "stage that trained the model", choices=STAGES, short="-i")
    task_name: str | None = flag(None, "tasks joined by |; None = all default tasks", off="None", short="-a")
    dtype: str | None = flag(
        None, "compute dtype; None = the device's", off="None", choices=("bfloat16", "float32"), short="-d"
    )
    temperature: float = flag(0.0, "of sampling; 0 = the most likely token", short="-t")
    max_new_tokens: int = flag(512, "longest answer of a generative task, in tokens", short="-m")
    num_samples: int = flag(1, "answers to a generative problem; one right answer solves it", short="-n")
    top_k: int | None = flag(50, "sample among the k likeliest tokens; 0 = all", off=0, short="-k")
    batch_size: int = flag(8, "problems at once, on each rank", short="-b")
    model_tag: str | None = flag(None, "checkpoint tag; None = the deepest, d4 before d4-own", off="None", short="-g")
    step: int | None = flag(None, "checkpoint step; None = the last", off="None", short="-s")
    max_problems: int | None = flag(None, "only the first problems of each task", off="None", short="-x")
    device_type: str | None = flag(None, "cuda, mps or cpu; empty = the best there is", off="")
    against: str | None = flag(
        None,
        "stage whose answers to the same problems to compare with; None = the stage before",
        off="None",
        choices=STAGES,
        new=True,
    )
    show: int = flag(0, "print so many solved and so many unsolved problems of each task", new=True)

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_samples", "top_k", "batch_size", "max_problems"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name} {value} must be at least 1")
        if self.show < 0:
            raise InputError(f"--show {self.show} must be at least 0")
        if self.against == self.source:
            raise InputError(f"--against {self.against} is the stage evaluated; give an earlier one")
        if self.temperature < 0:
            raise InputError(f"--temperature {self.temperature} must be at least 0; 0 = the most likely token")
        if self.task_name is not None:
            parse_names(self.task_name)


def parse_names(text: str) -> list[str]:
    """`GSM8K|MMLU` -> names, each once, in the given order."""
    names = list(dict.fromkeys(name.strip() for name in text.split("|")))
    for name in names:
        if name not in EVAL_TASKS:
            raise InputError(f"--task_name: no task {name!r}; there are {', '.join(EVAL_TASKS)}")
    return names


def core_name(names: Sequence[str]) -> str | None:
    """What the mean over these tasks may be called: only a complete default set has a name."""
    if set(REAL) <= set(names):
        return "ChatCORE metric"
    return "ChatCORE tinyworld" if set(TINYWORLD) <= set(names) else None


def report_items(results: Mapping[str, ChatResult]) -> list[dict[str, Any]]:
    """The reference's keys (tasks, then the mean), then what says how sure they are."""
    scores: dict[str, Any] = {name: result.accuracy for name, result in results.items()}
    name = core_name(list(results))
    if name is not None:
        members = REAL if name == "ChatCORE metric" else TINYWORLD
        scores[name] = chat_core({task: results[task].accuracy for task in members}, BASELINES)
    new: dict[str, Any] = {}
    if name is None and len(results) > 1:
        mean = chat_core({task: result.accuracy for task, result in results.items()}, BASELINES)
        new[f"centered mean of {' + '.join(results)} (not ChatCORE)"] = mean
    for task, result in results.items():
        new |= {f"{task} {key}": value for key, value in details(result, BASELINES.get(task, 0.0)).items()}
    return [scores, new]


def record_path(cfg: ChatEvalConfig, source: str, manifest: Mapping[str, Any], tag: str, task: str) -> Path:
    """Where the records of a task go. What was sampled otherwise, or cut, does not overwrite a whole run, and other
    weights have another folder: nobody is compared with a model that is no longer there."""
    weights = manifest["files"]["model.safetensors"]["sha256"][:8]
    settings = "" if cfg.temperature == 0 else f".t{cfg.temperature:g}.n{cfg.num_samples}"
    settings += "" if cfg.max_problems is None else f".first{cfg.max_problems}"
    return base_dir() / "chat_eval" / f"{source}_{tag}_{manifest['step']:06d}_{weights}" / f"{task}{settings}.jsonl"


def other_stage(cfg: ChatEvalConfig, meta: Mapping[str, Any]) -> str | None:
    """The stage to compare with: the given one, else the one that the model started from."""
    started_from = meta.get("user_config", {}).get("source")
    if started_from not in STAGES or started_from == cfg.source:
        started_from = STAGE_BEFORE.get(cfg.source)
    return cfg.against or started_from


def earlier_path(cfg: ChatEvalConfig, stage: str, tag: str, task: str) -> Path:
    """The records of a task by the last checkpoint of another stage: of as many problems, else of all, else of the
    most that there are.

    Raises:
        InputError: there is no such checkpoint.
    """
    manifest = checkpoint.read_manifest(checkpoint.find(stage, tag))
    same = record_path(cfg, stage, manifest, tag, task)
    whole = record_path(dataclasses.replace(cfg, max_problems=None), stage, manifest, tag, task)
    cut = sorted(whole.parent.glob(f"{whole.stem}.first*.jsonl"), key=lambda path: -path.stat().st_size)
    return next((path for path in (same, whole, *cut) if path.exists()), same)


def change(cfg: ChatEvalConfig, stage: str, tag: str, task: str, path: Path) -> str:
    """What the report says of another stage's answers to the same problems."""
    try:
        earlier = earlier_path(cfg, stage, tag, task)
    except InputError:
        return NO_RECORD
    if not earlier.exists():
        return NO_RECORD
    try:
        return paired_line(records.compare(records.read(earlier), records.read(path)), stage)
    except InputError as error:  # other data than then: no reason to lose the evaluation that has just been made
        return f"not compared: {error}"


def run(cfg: ChatEvalConfig) -> dict[str, ChatResult]:
    rt = runtime.start(cfg.device_type)
    if cfg.dtype is not None:
        rt = dataclasses.replace(rt, dtype=runtime.DTYPES[cfg.dtype])
    model, tokenizer, meta = checkpoint.load_model(cfg.source, rt, cfg.model_tag, cfg.step)
    model.eval()
    dataset = meta.get("user_config", {}).get("dataset")
    names = parse_names(cfg.task_name) if cfg.task_name is not None else default_tasks(dataset)
    tasks = {name: eval_task(name) for name in names}  # all at once: missing data must not show after hours
    tag, stage = meta["tag"], other_stage(cfg, meta)
    if cfg.against is not None:  # asked for: what is missing must not show after hours either
        together(lambda: [records.read(earlier_path(cfg, str(stage), tag, n)) for n in names] if rt.is_master else [])
    new: dict[str, Any] = {}
    if "HumanEval" in tasks:
        new["HumanEval sandbox"] = isolation_level()
        print0(f"HumanEval runs the model's code: {isolation_level()}")
    if cfg.num_samples > 1 and cfg.temperature == 0:
        print0(f"--num_samples {cfg.num_samples} at --temperature 0 are copies of one answer; try --temperature=0.8")
    results, changes = {}, {}
    for name, task in tasks.items():
        path = record_path(cfg, cfg.source, meta, tag, name)
        result = evaluate_task(
            task,
            model,
            tokenizer,
            rt,
            batch_size=cfg.batch_size,
            num_samples=cfg.num_samples,
            max_new_tokens=cfg.max_new_tokens,
            temperature=cfg.temperature,
            top_k=cfg.top_k,
            max_problems=cfg.max_problems,
            name=name,
            record_to=path,
        )
        results[name] = result
        print0(f"Final: {result.num_passed}/{result.total} ({100 * result.accuracy:.2f}%)")
        print0(f"{name} accuracy: {100 * result.accuracy:.2f}%")
        print0(f"{name} {score_line(result, BASELINES.get(name, 0.0))}")
        if result.num_lenient is not None:
            print0(f"{name} same number, other spelling too: {100 * result.num_lenient / result.total:.2f}%")
        if result.num_grader_errors:
            print0(f"{name} grader errors: {result.num_grader_errors}, counted as not passed ({result.first_error})")
        print0(f"{name} answers: {path}")
        if rt.is_master and cfg.show:
            print0(records.show(records.read(path), cfg.show))
        if rt.is_master and stage is not None:
            key = f"{name} against {stage}"
            changes[key] = change(cfg, stage, tag, name, path)
            print0(f"{key}: {changes[key]}")
    old, settings = report_config(cfg)
    old["dtype"] = str(rt.dtype).removeprefix("torch.")
    scores, behind = report_items(results)
    mean = core_name(list(results))
    if mean is not None:
        print0(f"{mean}: {scores[mean]:.4f}")
    get_report().log(f"Chat evaluation {cfg.source}", [old, scores, behind, changes, new, settings])
    runtime.stop()
    return results


def main(argv: Sequence[str] | None = None) -> None:
    run_cli(ChatEvalConfig, run, argv, about=__doc__)


if __name__ == "__main__":
    main()
