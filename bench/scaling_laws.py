"""A miniseries: models of several depths trained by the depth dial, and the power law through what they reach.

    python bench/scaling_laws.py run OUT.jsonl --depth=4 ...     # one model; the flags are those of scripts.base_train
    python bench/scaling_laws.py fit OUT.jsonl [PLOT.png]        # the laws, and bits per byte over FLOPs

`run` appends one line to OUT.jsonl, skips a model that has one with the same flags, and goes on with one that was
interrupted. Several ranks: torchrun ... bench/scaling_laws.py run ... . runs/scaling_laws.sh does the whole series.

With several batch sizes (or other flags) at each depth, the law goes through the best run of each depth, and the best
batch's growth with the tokens is fitted as well: the exponent that scaling.py has as BATCH_EXPONENT.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from nanochat import checkpoint
from nanochat.config import InputError, parse_config
from nanochat.environment import is_master, print0
from nanochat.tokenizer import get_tokenizer
from scripts import base_train

Runs = list[dict[str, Any]]


def read_runs(path: Path) -> Runs:
    """
    Raises:
        InputError: a torn line.
    """
    runs = []
    for i, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else [], start=1):
        try:
            runs.append(json.loads(line))
        except json.JSONDecodeError:
            raise InputError(f"line {i} of {path} is no JSON; delete it, and run that depth again") from None
    return runs


def run(out: Path, flags: Sequence[str]) -> None:
    """Train one model, unless it is there already, and append its line."""
    flags = list(flags)
    if any(one["flags"] == flags for one in read_runs(out)):
        print0(f"done before: {' '.join(flags)}")
        return
    tag = "scaling-" + hashlib.sha256(" ".join(flags).encode()).hexdigest()[:8]
    cfg = parse_config(base_train.BaseTrainConfig, [*flags, f"--model_tag={tag}", "--resume=auto"])
    if cfg.eval_every is None:
        raise InputError("--eval_every=-1 leaves the run without a result; try a large one, --eval_every=1000000")
    state = base_train.run(cfg)
    if state is None or state.val_bpb is None or not is_master():
        return
    # the checkpoint knows what was decided for the flags that were left open
    decided = checkpoint.load(checkpoint.find("base", tag)).meta["user_config"]
    shape = base_train.shape_of(cfg, get_tokenizer().get_vocab_size())
    tokens = state.step * decided["total_batch_size"]
    line = {
        "flags": flags,
        "depth": cfg.depth,
        "arch": cfg.arch,
        "num_params": shape.num_params,
        "num_scaling_params": shape.num_scaling_params,
        "total_batch_size": decided["total_batch_size"],
        "matrix_lr": decided["matrix_lr"],
        "weight_decay": decided["weight_decay"],
        "steps": state.step,
        "tokens": tokens,
        "flops": shape.flops_per_token * tokens,
        "bpb": state.val_bpb,
        "train_seconds": state.train_seconds,
        "machine": platform.processor() or platform.machine(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") as f:
        f.write(json.dumps(line) + "\n")


def best_of_each_depth(runs: Runs) -> Runs:
    """The run of the lowest bits per byte at each depth, in rising order of FLOPs."""
    best: dict[int, dict[str, Any]] = {}
    for one in runs:
        if math.isfinite(one["bpb"]) and one["bpb"] < best.get(one["depth"], {"bpb": math.inf})["bpb"]:
            best[one["depth"]] = one
    return sorted(best.values(), key=lambda one: one["flops"])


def power_law(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """(a, b, error) of y = a * x^b by least squares of the logarithms; error is the largest share that a point is off.

    Raises:
        InputError: fewer than two different x.
    """
    if len(set(x)) < 2:
        raise InputError(f"a power law needs runs of two sizes or more, there are {len(set(x))}; train another depth")
    b, log_a = np.polyfit(np.log(x), np.log(y), 1)
    error = np.abs(np.exp(log_a) * np.power(x, b) / np.asarray(y) - 1).max()
    return float(np.exp(log_a)), float(b), float(error)


def fit(out: Path, plot: Path | None) -> None:
    """Print the runs and the laws, and draw them."""
    runs = best_of_each_depth(read_runs(out))
    print(f"{'depth':>5} {'params':>12} {'batch':>9} {'tokens':>14} {'FLOPs':>10} {'bpb':>7}")
    for one in runs:
        print(
            f"{one['depth']:>5} {one['num_params']:>12,} {one['total_batch_size']:>9,} {one['tokens']:>14,} "
            f"{one['flops']:>10.3e} {one['bpb']:>7.4f}"
        )
    flops, bpb = [one["flops"] for one in runs], [one["bpb"] for one in runs]
    a, b, error = power_law(flops, bpb)
    print(f"bpb = {a:.4g} * FLOPs^{b:.4f}, every point within {error:.2%}")
    swept = {one["depth"] for one in read_runs(out) if one["total_batch_size"] != batch_of(runs, one["depth"])}
    if len(swept) >= 2:
        chosen = [one for one in runs if one["depth"] in swept]
        _, exponent, off = power_law([one["tokens"] for one in chosen], [one["total_batch_size"] for one in chosen])
        print(f"best batch ~ tokens^{exponent:.3f} over {len(chosen)} depths with several batches, within {off:.0%}")
    if plot is not None:
        draw(runs, (a, b), plot)
        print(f"wrote {plot}")


def batch_of(runs: Runs, depth: int) -> int | None:
    return next((one["total_batch_size"] for one in runs if one["depth"] == depth), None)


def draw(runs: Runs, law: tuple[float, float], path: Path) -> None:
    from matplotlib.figure import Figure

    from nanochat.plots import COLORS, DPI, GRID, INK, SIZE

    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    ax = figure.subplots()
    flops, bpb = [one["flops"] for one in runs], [one["bpb"] for one in runs]
    line = np.geomspace(min(flops) / 1.5, max(flops) * 1.5, 50)
    ax.plot(line, law[0] * line ** law[1], color=COLORS[1], linewidth=1.2, label=f"{law[0]:.3g} · C^{law[1]:.3f}")
    ax.plot(flops, bpb, "o", color=COLORS[0], markersize=4)
    for one in runs:
        ax.annotate(f"d{one['depth']}", (one["flops"], one["bpb"]), (4, 4), textcoords="offset points", fontsize=8)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.yaxis.set_minor_formatter("{x:.1f}")  # it spans less than a power of ten
    ax.yaxis.set_major_formatter("{x:.0f}")
    ax.set_title(f"{runs[0]['arch']}: validation bits per byte", loc="left", fontsize=10, color=INK)
    ax.set_xlabel("training FLOPs", fontsize=8, color=INK)
    ax.grid(color=GRID, linewidth=0.6, which="both")
    ax.tick_params(colors=INK, labelsize=8, which="both")
    ax.legend(frameon=False, fontsize=8)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    figure.savefig(temporary, format="png", metadata={"Software": None})
    os.replace(temporary, path)


def main(argv: Sequence[str] | None = None) -> None:
    words = [word for word in (sys.argv[1:] if argv is None else argv) if word != "--"]  # torchrun's separator
    try:
        match words:
            case ["run", out, *flags]:
                run(Path(out), flags)
            case ["fit", out, *plot] if len(plot) < 2:
                fit(Path(out), Path(plot[0]) if plot else None)
            case _:
                raise InputError("say `run OUT.jsonl FLAGS` or `fit OUT.jsonl [PLOT.png]`")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
