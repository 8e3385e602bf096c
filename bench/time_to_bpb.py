"""Wall-clock and tokens to a validation bpb, for any architectures on any text.

    python -m bench.time_to_bpb --data=../shared/hub/datasets/local/edu-text-small --archs=plain,modern
    python -m bench.time_to_bpb --data=FOLDER --horizons=49,61 --seeds=0,1,2 --depths=4 --dtypes=float32,bfloat16

The reference architecture runs --steps; the others run --steps and, each with a whole schedule of its own, the shorter
--horizons: the shortest that ends at the reference's bpb or below is the answer. Every run sees the same text in the
same order (a horizon takes the first of it; a seed changes the order and the weights), packed in memory beforehand, so
that the seconds are those of forward, backward and optimizer alone. Compiling and validation are left out and stated.
Finished runs stay in the results file, and a rerun takes them from there.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import common
from bench.common import Plan, Setting, run_task
from bench.packed import Text
from bench.results import Results, Task, default_results, finish, numbers, run_all, table, words
from nanochat.config import InputError, flag, run_cli


@dataclass(frozen=True)
class TimeToBpbConfig:
    data: str = flag("../shared/hub/datasets/local/edu-text-small", "folder of text, source name, or packed .npz")
    archs: str = flag("plain,modern", "architectures")
    reference: str = flag("plain", "the architecture whose final bpb is to be reached")
    depths: str = flag("4", "layers")
    seeds: str = flag("0", "of the weights and the order of the rows")
    dtypes: str = flag("float32", "of the activations: float32, bfloat16, fp8")
    steps: int = flag(122, "optimizer steps")
    horizons: str = flag("", "shorter runs of the architectures that are not the reference, in steps")
    overrides: str = flag("", "hyper-parameters of those, e.g. matrix_lr=0.03,extras=(bigram)")
    target: float | None = flag(None, "bpb to reach; default: the reference's final one")
    eval_every: int | None = flag(None, "steps between validations on the way; default: at the end only")
    vocab_size: int = flag(4096, "of the tokenizer that is trained on the data")
    sequence_len: int = flag(512, "context in tokens")
    tokens_per_step: int = flag(16_384, "tokens of an optimizer step")
    device_batch_size: int = flag(32, "rows of a forward pass")
    aspect_ratio: int | None = flag(None, "width per layer; default: the depth dial's")
    compile: bool = flag(True, "torch.compile")
    device: str | None = flag(None, "cuda or cpu; default: the best there is")
    threads: int = flag(min(2, common.cores()), "of the CPU")
    results: str | None = flag(None, "file of the finished runs; default: <base>/bench/time_to_bpb.jsonl")
    time_limit: float | None = flag(None, "minutes after which no run is started")
    val_documents: int = flag(512, "documents of the validation")
    fresh: bool = flag(False, "make results of other code again")
    isolate: bool = flag(True, "each run in a process of its own")

    def __post_init__(self) -> None:
        if not words(self.dtypes):
            raise InputError("--dtypes names none; try --dtypes=float32")
        if self.eval_every is not None and self.eval_every < 1:
            raise InputError(f"--eval_every {self.eval_every} must be at least 1; try --eval_every=1")


@dataclass(frozen=True)
class Cell:
    """What is averaged over seeds."""

    depth: int
    dtype: str
    arch: str
    steps: int


Found = dict[Cell, dict[int, dict[str, Any]]]  # finished runs by seed


def cells(cfg: TimeToBpbConfig) -> list[Cell]:
    horizons = sorted({*numbers("horizons", cfg.horizons), cfg.steps})
    if horizons[0] < 1 or horizons[-1] > cfg.steps:
        raise InputError(f"--horizons {cfg.horizons} must lie between 1 and --steps {cfg.steps}")
    archs = words(cfg.archs)
    archs = [cfg.reference] + [a for a in archs if a != cfg.reference]
    return [
        Cell(depth, dtype, arch, steps)
        for depth in numbers("depths", cfg.depths, 1)
        for dtype in words(cfg.dtypes)
        for arch in archs
        for steps in (horizons if arch != cfg.reference else [cfg.steps])
    ]


def setting_and_plan(cfg: TimeToBpbConfig, sequence_len: int, cell: Cell, seed: int) -> tuple[Setting, Plan]:
    overrides = common.parse_overrides(cfg.overrides) if cell.arch != cfg.reference else {}
    if cfg.aspect_ratio is not None:
        overrides = {"aspect_ratio": cfg.aspect_ratio, **overrides}
    plan = Plan(
        cell.steps,
        cfg.tokens_per_step,
        sequence_len,
        cfg.device_batch_size,
        cell.dtype,
        cfg.compile,
        cfg.device or common.default_device(),
        cfg.threads,
    )
    return Setting(cell.depth, cell.arch, seed, overrides), plan


def task_of(cfg: TimeToBpbConfig, text: Text, cell: Cell, seed: int) -> Task:
    label = f"{cell.arch} d{cell.depth} {cell.dtype} {cell.steps} steps seed {seed}"
    return run_task(*setting_and_plan(cfg, text.sequence_len, cell, seed), text, label, cfg.eval_every)


def curve_of(runs: Sequence[dict[str, Any]]) -> list[tuple[float, float, float]]:
    """(tokens, seconds, bpb) of each validation, means over the seeds; () where a run broke off."""
    if any(run["bpb"] is None for run in runs):
        return []
    points = zip(*(run["curve"] for run in runs), strict=True)
    per_step = runs[0]["tokens"] / runs[0]["curve"][-1][0]
    return [(per_step * p[0][0], statistics.fmean(x[1] for x in p), statistics.fmean(x[2] for x in p)) for p in points]


def interpolated_seconds(points: Sequence[tuple[float, float]], target: float) -> float | None:
    """Seconds at which the target is met, on a line in log(seconds) between the two points (seconds, bpb) that
    enclose it; None where none do."""
    points = sorted(points)
    for (t0, b0), (t1, b1) in itertools.pairwise(points):
        if b1 <= target < b0:
            return math.exp(math.log(t0) + (b0 - target) / (b0 - b1) * math.log(t1 / t0))
    return None


def compare(cfg: TimeToBpbConfig, found: Found, stale: set[Cell]) -> list[dict[str, Any]]:
    """A table of all cells that are finished, and what it says as records."""
    records = []
    for cell, by_seed in found.items():
        references = found[Cell(cell.depth, cell.dtype, cfg.reference, cfg.steps)]
        runs = [by_seed[seed] for seed in by_seed if seed in references]
        reference = [references[seed] for seed in by_seed if seed in references]
        if not runs:
            continue
        curve, goal = curve_of(runs), curve_of(reference)
        target = cfg.target if cfg.target is not None else (goal[-1][2] if goal else None)
        seconds, whole = (statistics.fmean(run["seconds"] for run in some) for some in (runs, reference))
        reached = [point for point in curve if target is not None and point[2] <= target]
        records.append(
            {
                "depth": cell.depth,
                "dtype": cell.dtype,
                "arch": cell.arch,
                "steps": cell.steps,
                "seeds": len(runs),
                "bpb": curve[-1][2] if curve else None,
                "target": target,
                "seconds": seconds,
                "s_per_step": statistics.fmean(run["seconds"] / run["curve"][-1][0] for run in runs) if curve else None,
                "ratio": seconds / whole,
                "reached": bool(reached),
                "seconds_to_target": reached[0][1] if reached else None,
                "tokens_to_target": reached[0][0] if reached else None,
                "warmup_seconds": statistics.fmean(run["warmup_seconds"] for run in runs),
                "matmul_gflops": [pick(rate for r in runs for rate in r["matmul"]) / 1e9 for pick in (min, max)],
                "stale": cell in stale,
            }
        )
    head = "depth dtype architecture steps seeds bpb to-target-bpb seconds s/step ratio reached".split()
    head += ["seconds to target", "tokens to target", "compile s", "matmul GFLOP/s"]
    table(head, (_row(r) for r in records))
    return records


def _row(r: dict[str, Any]) -> list[Any]:
    def show(value: float | None, spec: str) -> str:
        return "" if value is None else format(value, spec)

    distance = None if r["bpb"] is None or r["target"] is None else r["bpb"] - r["target"]
    return [
        *(r["depth"], r["dtype"], ("*" if r["stale"] else "") + r["arch"], r["steps"], r["seeds"]),
        *(show(r["bpb"], ".4f") or "broke off", show(distance, "+.4f")),
        *(show(r["seconds"], ".1f"), show(r["s_per_step"], ".3f"), show(r["ratio"], ".3f")),
        "yes" if r["reached"] else "no",
        *(show(r["seconds_to_target"], ".1f"), show(r["tokens_to_target"], ",.0f"), show(r["warmup_seconds"], ".0f")),
        "{:.0f} to {:.0f}".format(*r["matmul_gflops"]),
    ]


def answers(cfg: TimeToBpbConfig, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each depth, dtype and architecture: the least seconds that were seen to reach the target, and those that
    lie between two horizons."""
    found = []
    for key in dict.fromkeys((r["depth"], r["dtype"], r["arch"]) for r in records):
        depth, dtype, arch = key
        mine = [r for r in records if (r["depth"], r["dtype"], r["arch"]) == key]
        whole = next(r for r in records if (r["depth"], r["dtype"], r["arch"]) == (depth, dtype, cfg.reference))
        best = min((r for r in mine if r["reached"]), key=lambda r: float(r["seconds_to_target"]), default=None)
        points = [(r["seconds"], r["bpb"]) for r in mine if r["bpb"] is not None]
        target = mine[0]["target"]
        between = interpolated_seconds(points, target) if target is not None else None
        seconds, tokens = (best["seconds_to_target"], best["tokens_to_target"]) if best else (None, None)
        answer = {"depth": depth, "dtype": dtype, "arch": arch, "target": target, "seconds": seconds, "tokens": tokens}
        answer["ratio"] = seconds / whole["seconds"] if seconds else None
        answer["interpolated_ratio"] = between / whole["seconds"] if between else None
        found.append(answer)
        if best:
            print(
                f"{arch} depth {depth} {dtype}: bpb {target:.4f} in {seconds:.1f} s and {tokens:,.0f} tokens,"
                f" {answer['ratio']:.3f} of {cfg.reference}'s whole run"
                + (f" ({answer['interpolated_ratio']:.3f} between horizons)" if between else "")
            )
    return found


def run(cfg: TimeToBpbConfig) -> dict[str, Any]:
    seeds = numbers("seeds", cfg.seeds, 0)
    wanted = cells(cfg)
    for cell in wanted:
        common.check(*setting_and_plan(cfg, cfg.sequence_len, cell, seeds[0]), cfg.vocab_size)
    num_rows = Plan(cfg.steps, cfg.tokens_per_step, cfg.sequence_len).num_rows
    text = Text.open(cfg.data, cfg.vocab_size, cfg.sequence_len, num_rows, cfg.val_documents)
    tasks = {(cell, seed): task_of(cfg, text, cell, seed) for seed in seeds for cell in wanted}
    results = Results(Path(cfg.results) if cfg.results else default_results("time_to_bpb"))
    left = run_all(list(tasks.values()), results, jobs=int(cfg.isolate), time_limit=cfg.time_limit, fresh=cfg.fresh)
    found = {cell: {seed: r for seed in seeds if (r := results.get(tasks[cell, seed]))} for cell in wanted}
    stale = {cell for cell, seed in tasks if results.is_stale(tasks[cell, seed])}
    print(f"{next(iter(tasks.values())).spec['machine']}; {text.name}, {text.vocab_size:,} ids")
    records = compare(cfg, found, stale)
    outcome = {"bench": "time_to_bpb", "left": left, "runs": records, "answers": answers(cfg, records)}
    finish(outcome)
    return outcome


def main(argv: Sequence[str] | None = None) -> None:
    run_cli(TimeToBpbConfig, run, argv, about=__doc__)


if __name__ == "__main__":
    main()
