"""Curves of a run: one JSON line a point in <base>/report/curves/<stage>.jsonl, drawn by the report."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from nanochat.environment import base_dir, is_master, print0


def log_curve(stage: str, step: int, **values: float) -> None:
    """Append the values at an optimizer step: `log_curve("base", 100, loss=3.2, lrm=1.0)`. Rank 0 only. A full disk
    costs the point, not the run."""
    if not is_master():
        return
    path = base_dir() / "report" / "curves" / f"{stage}.jsonl"
    point = {"step": int(step), **{name: float(value) for name, value in values.items()}}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as f:
            f.write(json.dumps(point) + "\n")
    except OSError as error:
        _warn(f"warning: {path} is not written: {error.strerror}")


@functools.cache  # once is enough
def _warn(line: str) -> None:
    print0(line)


def read_curve(path: Path) -> list[dict[str, Any]]:
    """The points of one stage, one dict a step, in rising order of step.

    A step lower than the one before it means that the stage was started again or resumed there: what an
    earlier try logged after that step is dropped. A line torn by a crash is skipped.
    """
    points: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            point = json.loads(line)
        except json.JSONDecodeError:
            continue
        if points and point["step"] < points[-1]["step"]:
            points = [p for p in points if p["step"] <= point["step"]]
        if points and point["step"] == points[-1]["step"]:
            points[-1].update(point)
        else:
            points.append(point)
    return points
