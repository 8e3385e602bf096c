"""CORE: examples and tokens a second, one example at a time against batches, on the same examples in one run.

    python -m bench.evals --model_tag=d4 --max_per_task=500 --one_by_one=16    # a table and one JSON line

All examples are scored in batches, some of each task one at a time as well; these must get the same prediction, and the
others count as taking as long. The last two lines are the sums: of the examples, and of all of the bundle if the others
of a task take as long as those. That errs against batches: a few of each task are always scored both ways. The fast
way's requests are tokenized before its time is taken, since they are kept; a column says how long that took.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench import common
from bench.results import finish, table
from nanochat import checkpoint, runtime
from nanochat.config import InputError, flag, run_cli
from nanochat.evals.bundle import open_bundle
from nanochat.evals.core import CoreResult, answer_one, evaluate_core
from nanochat.evals.core_requests import get_requests, make_requests
from nanochat.evals.core_rules import select_items


@dataclass(frozen=True)
class EvalsConfig:
    model_tag: str | None = flag(None, "checkpoint tag; None = the deepest base model", off="None")
    bundle: str | None = flag(None, "evaluation bundle: folder, .zip or tinyworld", off="")
    max_per_task: int | None = flag(16, "examples a task; -1 = all", off=-1)
    one_by_one: int = flag(16, "how many of them are scored one at a time too")
    device_batch_size: int = flag(32, "prompts of 1,024 tokens a forward pass, at most")
    dtype: str | None = flag(None, "of the activations; default: what the machine is fast in")
    device: str | None = flag(None, "cuda or cpu; default: the best there is")
    threads: int = flag(common.cores(), "of the CPU")

    def __post_init__(self) -> None:
        for name in ("max_per_task", "one_by_one", "device_batch_size", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name} {value} must be at least 1; try --{name}=1")
        if self.dtype is not None and self.dtype not in runtime.DTYPES:
            raise InputError(f"--dtype {self.dtype} is not known; use one of {', '.join(runtime.DTYPES)}")


def run(cfg: EvalsConfig) -> dict[str, Any]:
    torch.set_num_threads(cfg.threads)
    device = cfg.device or common.default_device()
    dtype = cfg.dtype or common.default_dtype(device)
    rt = runtime.Runtime(torch.device(device), runtime.DTYPES[dtype])
    model, tokenizer, meta = checkpoint.load_model("base", rt, cfg.model_tag)
    model.eval()
    bundle = open_bundle(cfg.bundle, meta.get("user_config", {}).get("dataset"))
    chosen, tokens, tokenizing = [], [], []
    for task in bundle.tasks:
        items, n = select_items(task.read(), cfg.max_per_task)
        t0 = time.perf_counter()
        made = make_requests(task, items, n, tokenizer)
        tokenizing.append(time.perf_counter() - t0)
        get_requests(task, items, n, tokenizer)
        chosen.append((task, items, n))
        tokens.append(int((made.shared.repeat(made.num_options) + made.rest).sum()))

    def batches(max_per_task: int | None) -> CoreResult:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            return evaluate_core(model, tokenizer, rt, bundle, max_per_task, cfg.device_batch_size)

    batches(1)  # warms kernels up
    t0 = time.perf_counter()
    fast = batches(cfg.max_per_task)
    fast_wall = time.perf_counter() - t0
    rows: list[Sequence[str | int]] = []
    compared = differ = 0
    plain, whole = [], {"tokens": 0.0, "identity": 0.0, "fast": 0.0}
    for (task, items, n), found, count, making in zip(chosen, fast.tasks, tokens, tokenizing, strict=True):
        few = min(n, cfg.one_by_one)
        t0 = time.perf_counter()
        answers = [answer_one(model, tokenizer, rt, task, items, n, i)[0] for i in range(few)]
        plain.append((time.perf_counter() - t0) * n / few)
        same = sum(x == y for x, y in zip(answers, found.predictions[:few], strict=True))
        compared, differ = compared + few, differ + few - same
        for key, value in (("tokens", count), ("identity", plain[-1]), ("fast", found.seconds)):
            whole[key] += value * len(items) / n
        rows.append(_row(task.label, n, count, making, plain[-1], found.seconds, f"{same} of {few}"))
    plain_seconds, n, size = sum(plain), sum(n for *_, n in chosen), sum(len(items) for _, items, _ in chosen)
    same_of_all = f"{compared - differ} of {compared}"
    rows.append(_row("all", n, sum(tokens), sum(tokenizing), plain_seconds, fast_wall, same_of_all))
    rows.append(_row("the bundle, scaled", size, int(whole["tokens"]), 0.0, whole["identity"], whole["fast"], ""))
    where = f"{torch.cuda.get_device_name()}" if device == "cuda" else f"{cfg.threads} CPU threads"
    print(f"{where}; {meta['tag']} step {meta['step']}, {dtype}; {bundle.metric_name} {fast.core_metric:.4f}")
    head = ["task", "examples", "tokens", "tokenizing-s", "one-by-one-s", "fast-s", "ratio"]
    table([*head, "examples/s", "fast", "tokens/s", "fast", "same-prediction"], rows)
    result = {
        "bench": "evals",
        "machine": where,
        "dtype": dtype,
        "model": meta["tag"],
        "examples": n,
        "compared": compared,
        "different_predictions": differ,
        "identity_seconds": plain_seconds,
        "fast_seconds": fast_wall,
        "ratio": plain_seconds / fast_wall,
        "ratio_scaled_to_bundle": whole["identity"] / whole["fast"],
    }
    finish(result)
    return result


def _row(
    label: str, examples: int, tokens: int, making: float, plain: float, fast: float, same: str
) -> Sequence[str | int]:
    rates = [f"{examples / plain:.2f}", f"{examples / fast:.2f}", f"{tokens / plain:,.0f}", f"{tokens / fast:,.0f}"]
    return [
        label,
        examples,
        f"{tokens:,}",
        f"{making:.2f}",
        f"{plain:.2f}",
        f"{fast:.2f}",
        f"{plain / fast:.2f}",
        *rates,
        same,
    ]


def main(argv: Sequence[str] | None = None) -> None:
    run_cli(EvalsConfig, run, argv, about=__doc__)


if __name__ == "__main__":
    main()
