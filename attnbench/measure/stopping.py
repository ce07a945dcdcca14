"""When to stop sampling: the interval of the median is narrow, or the budget is spent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum

#: Two-sided 95 % quantile of the normal distribution.
_Z95 = 1.959963984540054


class StopReason(StrEnum):
    """Why sampling ended; stored with every row."""

    CONVERGED = "converged"  # the interval of the median is narrower than the target
    NOISE_STABLE = "noise_stable"  # what is left of the budget could not make it so
    MAX_SAMPLES = "max_samples"
    BUDGET = "budget"
    THROTTLED = "throttled"  # the device would not run at its clock


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


#: Sampling is in vain when even the smallest of the last estimates of the noise, less this much,
#: calls for more samples than can be had. (nvbench's stdrel criterion stops when the noise has
#: settled, too; it looks at the standard deviation, which one outlier moves.)
_ESTIMATES = 5
_DOUBT = 0.2

#: Samples before the first estimate: what settles in after a start must not speak for the rest.
_FIRST_ESTIMATE = 30

#: Samples between two estimates, as a factor: estimates of nearly the same samples agree always.
_ESTIMATE_STEP = 1.15


class StoppingRule:
    """Stop when converged, at `max_samples`, when `budget_s` of sampling is spent, or when it is
    foreseeable that it will be spent in vain. One object for one timing.

    The half width of the median's interval falls as 1/sqrt(n). Once the factor in front is known
    from several estimates, so is the number of samples that would converge; when neither budget nor
    `max_samples` allows it, sampling on would only cost time.

    `min_samples` are always taken, whatever they cost: the point's timeout is the guard there.
    """

    def __init__(
        self, target_rel_ci: float, budget_s: float, min_samples: int, max_samples: int
    ) -> None:
        self.target_rel_ci = target_rel_ci
        self.budget_s = budget_s
        self.min_samples = min_samples
        self.max_samples = max_samples
        self._estimates: list[float] = []
        self._next_estimate = max(2 * min_samples, _FIRST_ESTIMATE)

    def decide(self, samples: Sequence[float], spent_s: float) -> StopReason | None:
        """None: take another sample. `samples` in the order taken, `spent_s` wall seconds."""
        n = len(samples)
        if n < self.min_samples:
            return None
        ordered = sorted(samples)
        low, high = median_interval(ordered)
        half_width = (high - low) / 2
        accepted = self.target_rel_ci * median(ordered)
        if half_width <= accepted:
            return StopReason.CONVERGED
        if n >= self.max_samples:
            return StopReason.MAX_SAMPLES
        if spent_s >= self.budget_s:
            return StopReason.BUDGET
        if self._is_in_vain(n, spent_s, half_width / accepted):
            return StopReason.NOISE_STABLE
        return None

    def _is_in_vain(self, n: int, spent_s: float, excess: float) -> bool:
        if n < self._next_estimate:
            return False
        self._next_estimate = math.ceil(n * _ESTIMATE_STEP)
        self._estimates.append(excess * math.sqrt(n))
        recent = self._estimates[-_ESTIMATES:]
        if len(recent) < _ESTIMATES:
            return False
        needed = ((1 - _DOUBT) * min(recent)) ** 2  # samples until the half width is accepted
        affordable = min(self.max_samples, n * self.budget_s / spent_s if spent_s > 0 else math.inf)
        return needed > affordable
