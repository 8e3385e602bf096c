"""What the training benchmarks share: the way to the library, packed text, one timed run, results that last.

Everything of `nanochat` that a benchmark builds comes through the first part, "The library", so that a change of the
library's interface is a change there. A run is decided by a `Setting` (the model and its recipe), a `Plan` (sizes and
machine) and a `Text`; their resolved values are the key under which its result is kept.

# B rows, T positions, N rows of text, V vocab_size
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import math
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.packed import Batch, Text, to_batch
from bench.results import Task, words
from nanochat import checkpoint, fp8, guards, runtime, scaling
from nanochat.config import InputError
from nanochat.evals.bpb import evaluate_bpb
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import MIN_VOCAB_SIZE
from nanochat.trainer import accumulate, compiled, compiles, make_optimizer

Override = float | str | tuple[Any, ...]
LINE_SECONDS = 30.0  # between two lines of progress inside a run
MATMUL = 2048  # side of the square product that speeds are measured against
WARMUP_STEPS = 2  # the second one meets the optimizer's state in place


# ---- The library: all that touches model, optimizer and schedule ------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A model and how it is trained. `overrides`: fields of the recipe, of GPTConfig, or aspect_ratio, head_dim."""

    depth: int
    arch: str = "plain"
    seed: int = 0
    overrides: dict[str, Override] = field(default_factory=dict)


def flops_per_token(config: GPTConfig) -> float:
    """Training FLOPs of one token, forward and backward."""
    return config.shape.flops_per_token


def use_fp8(model: GPT) -> None:
    """Turn the matrix products of a model to fp8.

    Raises:
        InputError: the model or the machine cannot.
    """
    if not fp8.convert_to_fp8(model):
        raise InputError(f"dtype fp8: no layer is {fp8.MIN_WIDTH} wide; use bfloat16")


def resolve(
    setting: Setting, vocab_size: int, sequence_len: int, tokens_per_step: int, steps: int
) -> tuple[GPTConfig, scaling.Settings]:
    """The model's and the recipe's every value.

    Raises:
        InputError: an unknown arch or override, or a width that does not divide into heads.
    """
    if setting.arch not in scaling.ARCHS:
        raise InputError(f"arch {setting.arch!r} is not known; use one of {', '.join(scaling.ARCHS)}")
    places: dict[str, dict[str, Any]] = {"shape": {}, "config": {}, "recipe": {"total_batch_size": tokens_per_step}}
    known = {"aspect_ratio": "shape", "head_dim": "shape"}
    sizes = {"vocab_size": vocab_size, "sequence_len": sequence_len}
    known |= {f.name: "config" for f in dataclasses.fields(GPTConfig) if f.name not in ("arch", "vocab_size")}
    known |= {f.name: "recipe" for f in dataclasses.fields(scaling.Settings)}
    for name, value in setting.overrides.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0) or [""]
            raise InputError(f"override {name!r} names no hyper-parameter; the nearest is {near[0]!r}")
        places[known[name]][name] = value
        if known[name] == "recipe" and isinstance(value, str):
            raise InputError(f"override {name}={value} is no number; write it like matrix_lr=0.03")
        if known[name] == "shape" or name.startswith("n_"):
            sizes[name] = value  # type: ignore[assignment]
    for name, value in sizes.items():
        least = 2 if name == "head_dim" else 1  # heads are even
        if not isinstance(value, int) or value < least:
            near = MIN_VOCAB_SIZE if name == "vocab_size" else least
            raise InputError(f"{name} {value} must be a number from {near} on; try {name}={near}")
    shape = scaling.shape_from_depth(setting.depth, vocab_size, sequence_len, **places["shape"])
    dial = {name: getattr(shape, name) for name in ("sequence_len", "n_layer", "n_head", "n_kv_head", "n_embd")}
    config = GPTConfig(vocab_size=vocab_size, **{**dial, "arch": setting.arch, **places["config"]})
    return config, scaling.settings(config.shape, 1, given=places["recipe"], iterations=steps)


def parse_overrides(text: str) -> dict[str, Override]:
    """ "matrix_lr=0.03, extras=(lambdas, bigram)" as Python values; a word that is none is a string."""
    found: dict[str, Override] = {}
    depth, parts = 0, [""]
    for char in text:
        depth += {"(": 1, ")": -1}.get(char, 0)
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    for part in filter(str.strip, parts):
        name, equals, value = part.partition("=")
        if not equals:
            raise InputError(f"override {part.strip()!r} is not of the form name=value, e.g. matrix_lr=0.03")
        found[name.strip()] = _value(value.strip())
    return found


def _value(text: str) -> Override:
    if text.startswith("(") and text.endswith(")"):
        return tuple(_value(part) for part in words(text[1:-1]))
    try:
        return ast.literal_eval(text)  # type: ignore[no-any-return]
    except (ValueError, SyntaxError):
        return text


# ---- The machine ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Sizes of a run and what it runs on."""

    steps: int
    tokens_per_step: int = 16_384
    sequence_len: int = 512
    device_batch_size: int = 32  # rows of a forward pass
    dtype: str = "float32"  # of runtime.DTYPES, or fp8
    compile: bool = True
    device: str = "cpu"
    threads: int = 1  # of a CPU

    @property
    def num_rows(self) -> int:
        return self.steps * self.rows_per_step

    @property
    def rows_per_step(self) -> int:
        return self.tokens_per_step // self.sequence_len

    def check(self) -> None:
        """Refuse before anything slow runs."""
        for name in ("steps", "threads"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)} must be at least 1; try --{name}=1")
        if self.dtype not in (*runtime.DTYPES, "fp8"):
            raise InputError(f"dtype {self.dtype!r} is not known; use one of {', '.join(runtime.DTYPES)}, fp8")
        available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        if not available.get(self.device):
            raise InputError(f"--device {self.device}: torch finds none; try --device={default_device()}")
        if self.device_batch_size < 1 or self.sequence_len < 1:
            raise InputError(f"{self.device_batch_size} rows of {self.sequence_len} tokens; both must be at least 1")
        scaling.grad_accum_steps(self.tokens_per_step, self.device_batch_size, self.sequence_len, 1)


def check(setting: Setting, plan: Plan, vocab_size: int) -> None:
    """Refuse before anything slow runs."""
    plan.check()
    resolve(setting, vocab_size, plan.sequence_len, plan.tokens_per_step, plan.steps)


def start(plan: Plan, seed: int = 0) -> runtime.Runtime:
    if plan.device == "cpu":
        torch.set_num_threads(plan.threads)
    rt = runtime.start(plan.device, seed)
    return dataclasses.replace(rt, dtype=torch.bfloat16 if plan.dtype == "fp8" else runtime.DTYPES[plan.dtype])


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_dtype(device: str) -> str:
    return str(runtime.start(device).dtype).removeprefix("torch.")


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(plan: Plan) -> str:
    """What times depend on, in words: a result of another machine is another result."""
    if plan.device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    facts = dict(line.split(":", 1) for line in _cpuinfo() if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    # the number too: two generations of servers may share a name
    name = f"{facts.get('model name', 'a CPU')} (family {facts.get('cpu family')}, model {facts.get('model')})"
    return f"{plan.threads} of {cores()} cores of {name}, torch {torch.__version__}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def matmul_rate(rt: runtime.Runtime, n: int = MATMUL, tries: int = 5) -> float:
    """FLOP/s of the best of some (n, n) products in the compute dtype."""
    a = torch.randn(n, n, device=rt.device, dtype=rt.dtype)
    many = 20 if rt.device.type == "cuda" else 1  # one product is too short to time on a GPU
    best = math.inf
    for _ in range(tries + 1):  # the first only warms up, and is never the best
        runtime.synchronize(rt.device)
        t0 = time.perf_counter()
        for _ in range(many):
            a @ a
        runtime.synchronize(rt.device)
        best = min(best, (time.perf_counter() - t0) / many)
    return 2 * n**3 / best


# ---- One run ----------------------------------------------------------------------------------------------------


class Built:
    """A model in training."""

    def __init__(self, setting: Setting, plan: Plan, vocab_size: int) -> None:
        self.plan = plan
        self.rt = start(plan, setting.seed)  # seeds torch: the same weights for the same seed
        self.config, self.recipe = resolve(setting, vocab_size, plan.sequence_len, plan.tokens_per_step, plan.steps)
        self.model = checkpoint.build_model(self.config, self.rt)
        if plan.dtype == "fp8":
            use_fp8(self.model)
        self.forward = compiled(self.model, self.rt, plan.compile)
        compile = self.rt.device.type == "cuda" and compiles(self.rt, plan.compile)  # as scripts.base_train
        self.optimizer = make_optimizer(self.model, self.recipe, self.rt, compile)

    def optimize(self, step: int, loss: Tensor) -> None:
        """Guarded, as in the training loop; a loss that is no number ends a benchmark, so nobody asks."""
        self.optimizer.set_lr(*scaling.schedule(self.recipe, step, self.plan.steps, self.config.arch))
        self.optimizer.step(self.recipe.grad_clip or None, loss, (guards.LARGEST, guards.LARGEST))

    def step(self, batches: Sequence[Batch], step: int) -> Tensor:
        """One optimizer step; returns the loss (), nats a target. Does not wait for the device."""
        self.model.train()
        loss = accumulate(self.forward, batches, 1, self.rt.device)
        self.optimize(step, loss)
        return loss

    def timed_step(self, batches: Sequence[Batch], step: int) -> tuple[float, float]:
        """(seconds, loss) of one step, waited for on both sides."""
        runtime.synchronize(self.rt.device)
        t0 = time.perf_counter()
        loss = self.step(batches, step).item()
        runtime.synchronize(self.rt.device)
        return time.perf_counter() - t0, loss

    def warm_up(self, batches: Sequence[Batch]) -> float:
        """Compile and fill caches, then put weights and optimizer back to the start. Returns the seconds it took."""
        t0 = time.perf_counter()
        weights = {key: value.clone() for key, value in self.model.state_dict().items()}
        for step in range(WARMUP_STEPS):
            self.timed_step(batches, step)
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict({"step": torch.tensor(0)})  # a new one would be compiled again
        return time.perf_counter() - t0

    def bpb(self, text: Text) -> float:
        """Validation bits per byte."""
        size = self.plan.device_batch_size
        rows = (text.val[i : i + size] for i in range(0, len(text.val), size))
        batches = (to_batch(part, text.bos, self.rt.device) for part in rows)
        self.model.eval()
        return evaluate_bpb(self.model, batches, torch.from_numpy(text.token_bytes).to(self.rt.device))


def train_run(
    setting: Setting, plan: Plan, text: Text, label: str = "", eval_every: int | None = None
) -> dict[str, Any]:
    """Train from the start to the end of the plan.

    Returns:
        bpb at the end (None where the loss was no number, and the run ended there); seconds of training alone;
        median and slowest step; warmup_seconds (compiling, not in seconds); curve: [[step, seconds, bpb], ...] of
        the validations; the rate of a 1024^3 product before and after, FLOP/s, by which a loaded machine shows.
    """
    built = Built(setting, plan, text.vocab_size)
    steps = list(text.batches(plan, setting.seed, torch.device("cpu")))
    device = built.rt.device
    before = matmul_rate(built.rt, 1024)
    warmup_seconds = built.warm_up([(x.to(device), y.to(device)) for x, y in steps[0]])
    times: list[float] = []
    curve: list[tuple[int, float, float]] = []
    last_line, loss = time.perf_counter(), math.nan
    for step, batches in enumerate(steps):
        seconds, loss = built.timed_step([(x.to(device), y.to(device)) for x, y in batches], step)
        times.append(seconds)
        if not math.isfinite(loss):
            break
        if step + 1 == plan.steps or (eval_every and (step + 1) % eval_every == 0):
            curve.append((step + 1, sum(times), built.bpb(text)))
        if time.perf_counter() - last_line > LINE_SECONDS:
            last_line, per_step = time.perf_counter(), statistics.median(times)
            eta = per_step * (plan.steps - step - 1)
            print(f"  {label} step {step + 1}/{plan.steps} | loss {loss:.4f} | {per_step:.3f} s/step | eta {eta:.0f} s",
                  flush=True)  # fmt: skip
    bpb = curve[-1][2] if curve and len(times) == plan.steps and math.isfinite(curve[-1][2]) else None
    return {
        "bpb": bpb,
        "loss": loss if math.isfinite(loss) else None,
        "seconds": sum(times),
        "median_step": statistics.median(times),
        "slowest_step": max(times),
        "warmup_seconds": warmup_seconds,
        "tokens": len(times) * plan.tokens_per_step,
        "curve": curve,
        "matmul": [before, matmul_rate(built.rt, 1024)],
        "memory_mib": runtime.peak_memory_mib(device),
        "params": sum(p.numel() for p in built.model.parameters()),
    }


def run_task(
    setting: Setting, plan: Plan, text: Text, label: str, eval_every: int | None = None, kind: str = "run"
) -> Task:
    """A training run as a task. A result without validations on the way does for a run that asks for none."""
    plan.check()
    config, recipe = resolve(setting, text.vocab_size, plan.sequence_len, plan.tokens_per_step, plan.steps)
    if plan.sequence_len != text.sequence_len:
        raise InputError(f"the text is packed in rows of {text.sequence_len} tokens; use --sequence_len of that")
    if plan.num_rows > len(text.train):
        most = len(text.train) // plan.rows_per_step
        way_out = f"--steps={most}" if most else "more text, or a smaller --tokens_per_step"
        raise InputError(f"the text has no {plan.num_rows} rows, only {len(text.train)}; use {way_out}")
    spec = {
        "kind": kind,
        "config": config.to_dict(),
        "recipe": asdict(recipe),
        "seed": setting.seed,
        "plan": asdict(plan),
        "text": text.digest(plan.num_rows),
        "machine": machine(plan),
        "eval_every": eval_every,
    }
    work = partial(train_run, setting, plan, text, label, eval_every)
    return Task(label, spec, work, flops_per_token(config) * plan.steps * plan.tokens_per_step)
