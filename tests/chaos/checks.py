"""What must hold after a life. Read from files and logs; code of its own decides what is whole."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nanochat import checkpoint
from nanochat.curves import read_curve

# The saver prints from a thread of its own, so that a line of another may begin behind its text.
SAVED = re.compile(r"Saved \S*/step_(\d+)")
RESUMED = re.compile(r"^Resuming from (.*)$", re.MULTILINE)
TRAINED = re.compile(r"Saved \S*/step_|step \d{5}")
STOPPED = re.compile(r"Stopped by .* after step (\d+);")
EVAL_FAILED = re.compile(r"warning: the evaluation .* failed")
REFUSED = re.compile(r"skipping: .*")
SKIPPED = re.compile(r"step \d+ skipped")
CLOCK = "seconds"  # in the name of what no two runs have in common
EVALUATED = ("val_bpb", "min_val_bpb", "outcome")  # what an evaluation that failed leaves out
TIMINGS = ("dt", "tok_per_sec", "mfu")  # of a curve


class Broken(AssertionError):
    """Something that must hold does not."""


def must(holds: bool, message: str) -> None:
    if not holds:
        raise Broken(message)


def whole_lines(log: Path) -> str:
    """The log without a line that its process died in."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return text[: text.rfind("\n") + 1]


def is_good(path: Path) -> bool:
    """Whether each file has the size and the hash that the manifest tells."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        for name, expected in manifest["files"].items():
            content = (path / name).read_bytes()
            if len(content) != expected["bytes"] or hashlib.sha256(content).hexdigest() != expected["sha256"]:
                return False
        return {"model.safetensors", "optim.safetensors"} <= manifest["files"].keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def good(directory: Path) -> dict[int, Path]:
    """The whole checkpoints by step. One that is being replaced counts where the new one is not in place."""
    found: dict[int, Path] = {}
    for path in sorted(directory.glob("step_*"), reverse=True):  # step_000003.old before step_000003
        match = re.fullmatch(r"step_(\d{6,})(\.old)?", path.name)
        if match and is_good(path) and not (match[2] and path.with_name(f"step_{match[1]}").exists()):
            found[int(match[1])] = path
    return found


def damaged(directory: Path, newer_than: int) -> list[str]:
    """Checkpoints, by their manifests, that are not whole."""
    found = [p for p in directory.glob("step_*") if (p / "manifest.json").exists() and not is_good(p)]
    return [p.name for p in found if p.suffix != ".old" and int(p.name[5:]) > newer_than]


def differences(ours: Path, theirs: Path, ignored: Sequence[str] = ()) -> list[str]:
    """What two checkpoints do not have in common to the bit: tensors, loop state, cursor, random state. Clocks may
    differ, and keys that are ignored."""
    a, b = (checkpoint.load(path, with_optimizer=True) for path in (ours, theirs))
    found = []
    for part, x, y in (("weights", a.model, b.model), ("optimizer", a.optimizer or {}, b.optimizer or {})):
        found += [f"{part} {name} is in one only" for name in x.keys() ^ y.keys()]
        found += [f"{part} {name}" for name in x.keys() & y.keys() if not same_bits(x[name], y[name])]
    for part in ("loop_state", "loader_cursor", "rng"):
        found += _different(part, a.meta.get(part), b.meta.get(part), ignored)
    return found


def same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    return x.dtype == y.dtype and x.shape == y.shape and x.numpy().tobytes() == y.numpy().tobytes()


def _different(name: str, x: Any, y: Any, ignored: Sequence[str] = ()) -> list[str]:
    if isinstance(x, list) and isinstance(y, list):
        x, y = dict(enumerate(x)), dict(enumerate(y))
    if isinstance(x, dict) and isinstance(y, dict):
        keys = [k for k in {**x, **y} if CLOCK not in str(k) and k not in ignored]
        return [line for k in keys for line in _different(f"{name}.{k}", x.get(k), y.get(k), ignored)]
    same = x == y or (isinstance(x, float) and isinstance(y, float) and math.isnan(x) and math.isnan(y))
    return [] if same else [f"{name}: {str(x)[:60]} and {str(y)[:60]}"]


def curve(base: Path, ignored: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The points of a run's curve without clocks and ignored values; none of a step where nothing else was logged."""
    path = base / "report" / "curves" / "base.jsonl"
    points = read_curve(path) if path.exists() else []
    points = [{k: v for k, v in point.items() if k not in (*TIMINGS, *ignored)} for point in points]
    return [point for point in points if len(point) > 1]


def curve_differences(ours: Path, theirs: Path, ignored: Sequence[str] = ()) -> list[str]:
    a, b = curve(ours, ignored), curve(theirs, ignored)
    found = [f"{len(a)} points and {len(b)}"] if len(a) != len(b) else []
    return found + [line for x, y in zip(a, b, strict=False) for line in _different(f"step {x['step']}", x, y)]
