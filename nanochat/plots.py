"""The report's plots, drawn from the curves and the summary's scores. Small PNGs, one question each."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nanochat.curves import read_curve

Points = list[dict[str, Any]]

SIZE = (5.2, 2.9)  # inches; at DPI about 680 x 380 pixels
DPI = 130
INK, GRID = "#333333", "#dddddd"
COLORS = ("#4269d0", "#e07a2f", "#3a9a5b", "#8f5bb5")  # told apart in print and by most colour-blind readers
STAGES = ("base", "mid", "sft", "rl")
STAGE_NAMES = {"base": "Base training", "mid": "Midtraining", "sft": "SFT", "rl": "RL"}
PASS_AT = {f"pass_at_{k}": f"pass@{k}" for k in range(1, 65)}
# name of the plot -> (its title, axis label, the logged values drawn in it with their legends)
LINES: dict[str, tuple[str, str, dict[str, str]]] = {
    "loss": ("loss", "nats per token", {"loss": "training", "val_loss": "validation"}),
    "bpb": ("validation bits per byte", "bits per byte", {"val_bpb": "validation"}),
    "lr": ("learning rate", "share of its peak", {"lrm": "multiplier"}),
    "reward": ("reward", "mean over the rollouts of a step", {"reward": "training"}),
    "pass": ("validation problems solved", "share of problems", PASS_AT),
}
SMOOTHED = ("loss", "reward")  # one batch is noisy: the raw values are drawn pale behind their average


def draw_all(curves: Path, scores: Mapping[str, Mapping[str, str]], folder: Path) -> list[Path]:
    """Draw everything that has data.

    Args:
        curves: folder of <stage>.jsonl.
        scores: rows of the report's Summary: metric -> column -> value.
        folder: where the PNGs go; it is made.
    Returns: their paths, in the order of the stages, the scores last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted((p.stem for p in curves.glob("*.jsonl")), key=lambda s: (_order(s), s))
    paths = []
    for stage in names:
        points = read_curve(curves / f"{stage}.jsonl")
        for name, (title, label, legends) in LINES.items():
            figure = draw_lines(f"{STAGE_NAMES.get(stage, stage)}: {title}", label, legends, points)
            if figure is not None:
                paths.append(_save(figure, folder / f"{stage}_{name}.png"))
    figure = draw_scores(scores)
    if figure is not None:
        paths.append(_save(figure, folder / "scores.png"))
    return paths


def _order(stage: str) -> int:
    return STAGES.index(stage) if stage in STAGES else len(STAGES)


def smooth(values: Sequence[float], beta: float = 0.9) -> list[float]:
    """Exponential moving average, debiased: value i has weight beta^(n - i) among those up to n."""
    average, out = 0.0, []
    for i, value in enumerate(values, start=1):
        average = beta * average + (1 - beta) * value
        out.append(average / (1 - beta**i))
    return out


def series(points: Points, key: str) -> tuple[list[int], list[float]]:
    """(steps, values) where the value was logged and is a number."""
    kept = [(p["step"], p[key]) for p in points if key in p and math.isfinite(p[key])]
    return [step for step, _ in kept], [value for _, value in kept]


def _figure(title: str) -> tuple[Figure, Axes]:
    # Figure without pyplot: no display is looked for and nothing stays open
    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    ax = figure.subplots()
    ax.set_title(title, loc="left", fontsize=10, color=INK)
    ax.tick_params(colors=INK, labelsize=8)
    ax.grid(axis="y", color=GRID, linewidth=0.6)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    return figure, ax


def draw_lines(title: str, label: str, legends: Mapping[str, str], points: Points) -> Figure | None:
    """Values over optimizer steps; None when fewer than two points of each were logged."""
    drawn = {key: series(points, key) for key in legends}
    drawn = {key: xy for key, xy in drawn.items() if len(xy[0]) >= 2}
    if not drawn:
        return None
    figure, ax = _figure(title)
    for color, (key, (steps, values)) in zip(COLORS, drawn.items(), strict=False):
        legend = legends[key]
        if key in SMOOTHED and len(values) > 20:
            ax.plot(steps, values, color=color, linewidth=0.7, alpha=0.25)
            values, legend = smooth(values), f"{legend}, smoothed"
        marker = "o" if len(values) <= 20 else None
        ax.plot(steps, values, color=color, linewidth=1.5, marker=marker, markersize=3, label=legend)
    ax.set_xlabel("optimizer step", fontsize=8, color=INK)
    ax.set_ylabel(label, fontsize=8, color=INK)
    if len(drawn) > 1 or "smoothed" in ax.get_legend_handles_labels()[1][0]:
        ax.legend(frameon=False, fontsize=8)
    ax.set_xlim(left=0)
    if "lrm" in drawn:
        ax.set_ylim(bottom=0)
    return figure


def draw_scores(scores: Mapping[str, Mapping[str, str]]) -> Figure | None:
    """One bar a task and chat stage, from 0 to 1; None without a chat score."""
    stages = [s for s in ("MID", "SFT", "RL") if any(s in row for row in scores.values())]
    tasks = [t for t, row in scores.items() if any(s in row for s in stages)]
    if not tasks:
        return None
    figure, ax = _figure("Chat scores after each stage")
    figure.set_size_inches(SIZE[0], 0.9 + 0.42 * len(tasks))
    height = 0.8 / len(stages)
    for n, (stage, color) in enumerate(zip(stages, COLORS, strict=False)):
        rows = [(i, float(scores[t][stage])) for i, t in enumerate(tasks) if stage in scores[t]]
        y = [i + (n - (len(stages) - 1) / 2) * height for i, _ in rows]
        values = [value for _, value in rows]
        bars = ax.barh(y, values, height=height * 0.9, color=color, label=stage)
        ax.bar_label(bars, labels=[f"{v:.3f}" for v in values], padding=2, fontsize=7, color=INK)
    ax.set_yticks(range(len(tasks)), tasks)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.grid(axis="x", color=GRID, linewidth=0.6)
    ax.set_xlim(min(0, *ax.get_xlim()), 1.08)
    ax.set_xlabel("accuracy (ChatCORE: centered on guessing)", fontsize=8, color=INK)
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _save(figure: Figure, path: Path) -> Path:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    figure.savefig(temporary, format="png", metadata={"Software": None})  # same data, same bytes
    os.replace(temporary, path)
    return path
