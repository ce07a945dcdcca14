"""The arithmetic of the verdict rule: two groups of seconds in, an interval of their ratio out.

docs/verdict.md states the rule in words and with its measured false-alarm rate and power. Series
with more than two runs are looked at by `gate.py` and confirmed by `confirm.py`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum


class Verdict(StrEnum):
    """What is said of one series, and of a run."""

    REGRESSION = "REGRESSION"
    IMPROVEMENT = "IMPROVEMENT"
    UNCHANGED = "UNCHANGED"
    UNDECIDED = "UNDECIDED"
    INVALID = "INVALID"


class Reason(StrEnum):
    """Why a verdict is what it is. The first reason of a verdict decided it."""

    SLOWER_THAN_FLOOR = "slower_than_floor"
    FASTER_THAN_FLOOR = "faster_than_floor"
    WITHIN_FLOOR = "within_floor"
    WITHIN_NOISE = "within_noise"
    INTERVAL_TOO_WIDE = "interval_too_wide"
    NO_BASELINE = "no_baseline"
    TOO_FEW_REPLICATES = "too_few_replicates"
    STATUS_CHANGED = "status_changed"
    STATUS_RECOVERED = "status_recovered"
    STATUS_SAME = "status_same"
    STATUS_UNSTABLE = "status_unstable"
    THROTTLED = "throttled"
    CONFIRMED = "confirmed"
    NOT_CONFIRMED = "not_confirmed"
    NOT_CONFIRMED_YET = "not_confirmed_yet"
    ENVIRONMENT_CHANGED = "environment_changed"
    INCOMPARABLE_TIMER = "incomparable:timer"
    INCOMPARABLE_L2_STATE = "incomparable:l2_state"
    INCOMPARABLE_EXECUTION = "incomparable:execution"
    INCOMPARABLE_DEVICE_CLASS = "incomparable:device_class"
    INCOMPARABLE_PROTOCOL_VERSION = "incomparable:protocol_version"


@dataclass(frozen=True, slots=True)
class TimerNoise:
    """What is assumed of a timer before any run is seen. All are relative (0.1 is 10 %).

    Attributes:
        floor: a change smaller than this is of no practical interest, and no alarm.
        spread: typical standard deviation between runs on one machine.
        min_replicates: processes each side needs where runs are too few to show their spread.
    """

    floor: float
    spread: float
    min_replicates: int

    @property
    def limit(self) -> float:
        """Ratios above it are slower, below its inverse faster."""
        return 1 + self.floor

    def blind_spot(self, ratio: float) -> float:
        """The largest ratio that may hide in an interval called unchanged.

        Five floors where the ratio itself is beyond the floor, for that is a suspicion and is
        measured again. Else twenty: then only an interval that says nothing at all is undecided.
        """
        return 1 + (5 if ratio > self.limit else 20) * self.floor


#: Wall clock on a shared CPU: medians of separate processes were seen to spread by 8 %. Kernel
#: timers: run-to-run spread of 0.3 to 2 % in series of real benchmarks. The fake timer's
#: replicates differ by 0.1 % by construction.
TIMER_NOISE: Mapping[str, TimerNoise] = {
    "wall": TimerNoise(floor=0.10, spread=0.08, min_replicates=3),
    "event": TimerNoise(floor=0.02, spread=0.01, min_replicates=2),
    "graph": TimerNoise(floor=0.02, spread=0.01, min_replicates=2),
    "cupti_span": TimerNoise(floor=0.02, spread=0.01, min_replicates=2),
    "cupti_sum": TimerNoise(floor=0.02, spread=0.01, min_replicates=2),
    "fake": TimerNoise(floor=0.005, spread=0.001, min_replicates=1),
}

#: How many runs' worth of evidence the assumed spread counts for.
PRIOR_RUNS = 4

#: From this many baseline runs on, their own spread is the yardstick.
MIN_RUNS = 3

#: Processes of one run that count in the interval of a series with fewer runs.
_MOST_PROCESSES = 3

#: A second look of such a series may err so many times less often than a first one: it is of the
#: same run, and of whatever was odd about it.
_SHARED_RUN = 20


@dataclass(frozen=True, slots=True)
class VerdictSettings:
    """Settings of the rule.

    Attributes:
        window: how many earlier runs make the baseline.
        confidence: of the interval of the ratio, two-sided.
        metrics: which metrics are judged; the others are shown.
        floors: timer -> relative floor, in place of the documented one.
        has_reference: the build before can be measured beside the new one, so that more may be
            picked to be measured again. Of a run that timed it, its rows say so themselves.
    """

    window: int = 10
    confidence: float = 0.99
    metrics: tuple[str, ...] = ("attention",)
    floors: Mapping[str, float] = field(default_factory=dict)
    has_reference: bool = False

    def noise(self, timer: str) -> TimerNoise:
        """What is assumed of `timer`; of an unknown one, the worst."""
        known = TIMER_NOISE.get(timer, TIMER_NOISE["wall"])
        if timer in self.floors:
            return TimerNoise(self.floors[timer], known.spread, known.min_replicates)
        return known


@dataclass(frozen=True, slots=True)
class Estimate:
    """Subject over baseline, as a ratio of seconds: above 1 is slower. `low` <= ratio <= `high`."""

    ratio: float
    low: float
    high: float
    enough: bool = True  # False: too few replicates for an interval; low and high are the ratio

    @property
    def inverse(self) -> Estimate:
        return Estimate(1 / self.ratio, 1 / self.high, 1 / self.low, self.enough)


def estimate(
    baseline: Sequence[Sequence[float]],
    subject: Sequence[float],
    noise: TimerNoise,
    confidence: float = 0.99,
) -> Estimate:
    """Ratio of `subject` to a `baseline` of fewer runs than make a level (`gate.MIN_LEVEL_RUNS`).

    `baseline` is one sequence per run and `subject` one run, of seconds per replicate, all > 0.
    The replicates are compared, see `_few_runs`; more than `_MOST_PROCESSES` of one run say no more
    about how runs differ.
    """
    own = [math.log(value) for value in subject]
    other = [math.log(value) for run in baseline for value in run]
    counted = sum(min(len(run), _MOST_PROCESSES) for run in baseline)
    return _few_runs(
        other, own, noise, confidence, counts=(counted, min(len(own), _MOST_PROCESSES))
    )


def estimate_again(
    baseline: Sequence[Sequence[float]],
    again: Sequence[float],
    noise: TimerNoise,
    confidence: float = 0.99,
) -> Estimate:
    """`estimate` for the second look: `again` are seconds per process that re-measured the run."""
    return estimate(baseline, again, noise, 1 - (1 - confidence) / _SHARED_RUN)


def estimate_groups(
    a: Sequence[Sequence[float]],
    b: Sequence[Sequence[float]],
    noise: TimerNoise,
    confidence: float = 0.99,
) -> Estimate:
    """Ratio of group `b` to group `a`, each of one or more runs of replicates, in seconds.

    Three or more runs on both sides: Welch's interval of the runs' log medians. Otherwise the
    replicates are compared, see `_few_runs`.
    """
    if min(len(a), len(b)) >= MIN_RUNS:
        first = [math.log(statistics.median(run)) for run in a]
        second = [math.log(statistics.median(run)) for run in b]
        shift = statistics.median(second) - statistics.median(first)
        return _estimate(shift, _welch_half_width(first, second, confidence))
    first = [math.log(value) for run in a for value in run]
    second = [math.log(value) for run in b for value in run]
    return _few_runs(first, second, noise, confidence, counts=(len(first), len(second)))


def decide(found: Estimate, noise: TimerNoise) -> tuple[Verdict, Reason]:
    """The verdict an estimate alone allows; confirmation comes after it.

    Slower: the interval is above 1 and the ratio beyond the floor. Faster: the mirror image.
    Unchanged: neither, and the interval excludes a slow-down beyond the blind spot. Else undecided.
    """
    if not found.enough:
        return Verdict.UNDECIDED, Reason.TOO_FEW_REPLICATES
    limit = noise.limit
    if found.low > 1 and found.ratio > limit:
        return Verdict.REGRESSION, Reason.SLOWER_THAN_FLOOR
    if found.high < 1 and found.ratio < 1 / limit:
        return Verdict.IMPROVEMENT, Reason.FASTER_THAN_FLOOR
    if found.low <= 1 and found.high > noise.blind_spot(found.ratio):
        return Verdict.UNDECIDED, Reason.INTERVAL_TOO_WIDE
    if 1 / limit <= found.ratio <= limit:
        return Verdict.UNCHANGED, Reason.WITHIN_FLOOR
    return Verdict.UNCHANGED, Reason.WITHIN_NOISE


def _few_runs(
    a: Sequence[float],
    b: Sequence[float],
    noise: TimerNoise,
    confidence: float,
    counts: tuple[int, int],
) -> Estimate:
    """`b` over `a`, log seconds of replicates, where runs are too few to show how they differ.

    Each side's spread is its scaled median absolute deviation: one odd process of three must not
    blow up the interval, as it does a variance. They are pooled and moderated by the timer's
    assumed spread as for many runs (Smyth, 2004), s^2 = (4 s0^2 + (n1-1) mad1^2 + (n2-1) mad2^2)
    / (4 + n1 + n2 - 2), with as many degrees of freedom. Half width: t s sqrt(1/c1 + 1/c2)
    + log(1 + floor), `counts` being c1 and c2; the floor because processes of one run do not show
    how runs differ.
    """
    shift = statistics.median(b) - statistics.median(a)
    if min(len(a), len(b)) < noise.min_replicates:
        return Estimate(math.exp(shift), math.exp(shift), math.exp(shift), enough=False)
    freedom = PRIOR_RUNS + len(a) + len(b) - 2
    squares = sum((len(side) - 1) * _scaled_mad(side) ** 2 for side in (a, b))
    variance = (PRIOR_RUNS * noise.spread**2 + squares) / freedom
    half = _t_quantile(confidence, freedom) * math.sqrt(variance * sum(1 / c for c in counts))
    return _estimate(shift, half + math.log1p(noise.floor))


def _estimate(shift: float, half: float) -> Estimate:
    return Estimate(math.exp(shift), math.exp(shift - half), math.exp(shift + half))


def _scaled_mad(values: Sequence[float]) -> float:
    """The median absolute deviation, scaled to the standard deviation of a normal distribution."""
    middle = statistics.median(values)
    return 1.4826 * statistics.median(abs(value - middle) for value in values)


def _welch_half_width(a: Sequence[float], b: Sequence[float], confidence: float) -> float:
    """Welch's t interval of two groups of two or more."""
    total, squares = 0.0, 0.0
    for group in (a, b):
        share = statistics.variance(group) / len(group)
        total += share
        squares += share**2 / (len(group) - 1)
    if total == 0.0:
        return 0.0
    return _t_quantile(confidence, total**2 / squares) * math.sqrt(total)


def _t_quantile(confidence: float, freedom: float) -> float:
    from scipy.special import stdtrit  # 0.1 s, where scipy.stats takes 0.7

    return float(stdtrit(freedom, 0.5 + confidence / 2))
