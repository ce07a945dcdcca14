"""When to stop sampling: the interval of the median is narrow, or the budget is spent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

#: Two-sided 95 % quantile of the normal distribution.
_Z95 = 1.959963984540054


class StopReason(StrEnum):
    """Why sampling ended; stored with every row."""

    CONVERGED = "converged"  # the interval of the median is narrower than the target
    MAX_SAMPLES = "max_samples"
    BUDGET = "budget"


def median_interval(ordered: Sequence[float]) -> tuple[float, float]:
    """Distribution-free 95 % interval of the median from sorted samples.

    Order statistics at `n/2 -+ z*sqrt(n)/2` (normal approximation of the binomial; Conover,
    *Practical Nonparametric Statistics*, 3rd ed., 3.2). Fewer than six samples give their range.
    """
    n = len(ordered)
    half = _Z95 * math.sqrt(n) / 2
    low = max(0, math.floor(n / 2 - half))
    high = min(n - 1, math.ceil(n / 2 + half) - 1)
    return ordered[low], ordered[max(low, high)]


def median(ordered: Sequence[float]) -> float:
    """Median of sorted samples."""
    n = len(ordered)
    middle = n // 2
    return ordered[middle] if n % 2 else (ordered[middle - 1] + ordered[middle]) / 2


@dataclass(frozen=True, slots=True)
class StoppingRule:
    """Stop when converged, at `max_samples`, or when `budget_s` of sampling is spent.

    `min_samples` are always taken, whatever they cost: the point's timeout is the guard there.
    """

    target_rel_ci: float
    budget_s: float
    min_samples: int
    max_samples: int

    def decide(self, samples: Sequence[float], spent_s: float) -> StopReason | None:
        """None: take another sample. `samples` in the order taken, `spent_s` wall seconds."""
        n = len(samples)
        if n < self.min_samples:
            return None
        ordered = sorted(samples)
        low, high = median_interval(ordered)
        middle = median(ordered)
        if high - low <= 2 * self.target_rel_ci * middle:
            return StopReason.CONVERGED
        if n >= self.max_samples:
            return StopReason.MAX_SAMPLES
        if spent_s >= self.budget_s:
            return StopReason.BUDGET
        return None
