"""How sure a score is: intervals, pass@k, and whether two models that answered the same problems differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z95 = 1.959964  # two-sided 95% of the normal distribution
SIGNIFICANT = 0.05  # p below which a difference counts as shown: habit


def wilson(passed: int, total: int) -> tuple[float, float]:
    """95% confidence interval of a share (Wilson 1927), from having drawn only `total` problems."""
    n, p = total, passed / total
    center = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
    return max(0.0, center - half), min(1.0, center + half)


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """The chance that k of the samples of a problem, drawn without putting back, have a right one among them:
    1 - C(n - c, k) / C(n, k), an unbiased estimate of pass@k (Chen et al. 2021, arXiv 2107.03374).

    Raises:
        ValueError: k is not in 1..num_samples.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} cannot be estimated from {num_samples} samples")
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and its standard error from having drawn only these values (NaN for one value)."""
    n = len(values)
    mean = sum(values) / n
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else math.nan


@dataclass(frozen=True)
class Paired:
    """Two models on the same problems."""

    both: int
    only_first: int
    only_second: int
    neither: int

    @property
    def total(self) -> int:
        return self.both + self.only_first + self.only_second + self.neither

    @property
    def p_value(self) -> float:
        """Two-sided exact test that a problem which only one solves is as often the first's (McNemar 1947): the
        chance of a split at least as uneven under a fair coin."""
        n = self.only_first + self.only_second
        tail = sum(math.comb(n, i) for i in range(min(self.only_first, self.only_second) + 1))
        return min(1.0, 2 * tail / 2**n)

    @property
    def verdict(self) -> str:
        """Whether the second is better: "real", "worse" or "not shown", with p."""
        p = self.p_value
        word = "not shown" if p >= SIGNIFICANT else "real" if self.only_second > self.only_first else "worse"
        return f"{word} (p = {p:.4f})" if p >= 1e-4 else f"{word} (p < 0.0001)"

    @property
    def interval(self) -> tuple[float, float]:
        """95% confidence interval of the second's accuracy less the first's (Bonett and Price 2012: Wald's, with one
        problem added to each uneven cell, so that few problems give a wide interval and never one of width 0)."""
        n = self.total + 2
        up, down = (self.only_second + 1) / n, (self.only_first + 1) / n
        half = Z95 * math.sqrt((up + down - (up - down) ** 2) / n)
        return max(-1.0, up - down - half), min(1.0, up - down + half)
