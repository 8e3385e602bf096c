"""Numerical guards: a step whose loss or gradient is not finite, or far off the last ones, changes nothing.

The limits of a step are known before it begins, from the steps before, so that the optimizer decides on the device
whether to take it (`MuonAdamW.step`), and nobody waits for the answer. Skipping what lies beyond six standard
deviations of the last 128 steps is OLMo's rule (Walsh et al. 2024, "2 OLMo 2 Furious", arXiv 2501.00656).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

SIGMA = 6.0
WINDOW = 128  # steps
FEWEST = 64  # of them, below which there is no limit
MOST_IN_A_ROW = 10
LARGEST = torch.finfo(torch.float32).max  # what is not finite lies above it, or is no number and compares to nothing


@dataclass
class History:
    """What a run knows of its last steps. Stored with the loop's state."""

    losses: list[float] = field(default_factory=list)  # of the last steps that were taken, nats per target
    norms: list[float] = field(default_factory=list)  # their gradient norms
    skipped: int = 0
    in_a_row: int = 0

    def limits(self, sigma: float | None) -> tuple[float, float]:
        """The largest loss and gradient norm of a step to be taken; None = any finite ones."""
        return _limit(self.losses, sigma), _limit(self.norms, sigma)

    def take(self, loss: float, norm: float) -> None:
        self.in_a_row = 0
        self.losses = [*self.losses, loss][-WINDOW:]
        self.norms = [*self.norms, norm][-WINDOW:]

    def facts(self) -> dict[str, int]:
        """Lines of the report."""
        return {"Skipped steps": self.skipped} if self.skipped else {}

    def skip(self, norm: float) -> None:
        self.skipped += 1
        self.in_a_row += norm != 0  # without a target, or a reward that differs, there is nothing to learn: no error


def _limit(values: Sequence[float], sigma: float | None) -> float:
    if sigma is None or len(values) < FEWEST:
        return LARGEST
    return min(LARGEST, statistics.fmean(values) + sigma * statistics.pstdev(values))


def reason(loss: float, norm: float, limits: tuple[float, float]) -> str:
    """Why a step was skipped."""
    if norm == 0:
        return "no gradient"
    if not math.isfinite(loss + norm):
        return f"loss {loss}, gradient norm {norm}"
    return f"loss {loss:.4f} (limit {limits[0]:.4f}), gradient norm {norm:.4g} (limit {limits[1]:.4g})"
