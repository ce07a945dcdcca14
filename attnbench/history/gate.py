"""The first look at a night: which series look slower than their own past changes allow.

Every series' newest value is held against the distribution of that series' own changes from run to
run, all series of a night at once and on arrays. What is picked is measured again (`confirm.py`)
before anybody is alarmed, so the pick is generous: of what it picks, half may be noise.

docs/verdict.md states the rule and what it was measured to do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

#: So many runs before a value make its level (their median).
LEVEL_RUNS = 10

#: So many past changes of a series make the distribution its newest change is held against.
PAST_CHANGES = 60

#: The newest run alone, and the newest three together: a small step that stays shows in their
#: median before it shows in any one of them.
SPANS = (1, 3)

#: Of what is picked to be measured again, this share may be noise (Benjamini and Hochberg, 1995,
#: over all series of the night).
PICKED_NOISE = 0.5

#: Nothing above it is picked, however few series a night has.
LARGEST_P = 0.05

#: The same where the build before cannot be measured beside the new one: the second look then
#: shares the night with the first, and whatever was odd about it.
LARGEST_P_ALONE = 0.005

#: How many runs' worth of evidence the spread assumed of a timer counts for.
PRIOR_RUNS = 4

#: With fewer past changes than this the spread of the level's own runs is the yardstick.
_MIN_CHANGES = 8

#: A level of fewer runs is none: the processes of the runs are compared instead (`rule.py`).
MIN_LEVEL_RUNS = 3

#: Tails are never taken to be lighter than those of Student's t with so many degrees of freedom.
_MAX_FREEDOM = 30

#: How many of a series' newest values are looked at.
DEPTH = LEVEL_RUNS + PAST_CHANGES + 2 * max(SPANS)

#: Rows looked at together; bounds the memory.
_CHUNK = 8192


@dataclass(frozen=True, slots=True)
class Screen:
    """What the first look found, one entry per series; all logarithms are natural.

    Attributes:
        change: log of the newest value over its level; nan where there is no level yet.
        half_width: of the interval of `change` at the confidence asked for.
        largest_change: the largest of the changes over `SPANS`.
        p: of a slow-down, over `SPANS` (Bonferroni); nan as `change`.
        p_faster: of the mirror image, of the newest run alone.
        level_runs: how many runs made the level.
        level_half_width: as `half_width`, by how the level's own runs differ. After a step that
            stays it is narrow as soon as most of the level is behind the step; the step is among
            the past changes for long.
    """

    change: Floats
    half_width: Floats
    largest_change: Floats
    p: Floats
    p_faster: Floats
    level_runs: NDArray[np.int64]
    level_half_width: Floats


def screen(log_s: Floats, spread: Floats, confidence: float = 0.99) -> Screen:
    """Hold the newest run of every series against that series' own past.

    `log_s` is [num_series, num_runs], oldest run first, nan where a run has no time; the newest
    value of a row is its last that is not nan. `spread` [num_series] is the standard deviation of
    log seconds between runs that is assumed of each series' timer before any run is seen.

    The change is the median of the newest run (or three) minus the median of up to `LEVEL_RUNS`
    runs before it. Its yardstick is the same difference taken at up to `PAST_CHANGES` earlier runs,
    each divided by what an independent normal series would give it, so that autocorrelation, odd
    runs and a restless level are in it by themselves. Their spread is the larger of the scaled
    median absolute value and of the 90 % quantile over 1.645 (a series with two levels has a small
    one and a large other), moderated by `spread`, which counts for `PRIOR_RUNS` runs (Smyth, 2004).
    Series with fewer than `_MIN_CHANGES` past changes take the median absolute deviation of the
    level's own runs. p is of Student's t.
    """
    num_series = log_s.shape[0]
    parts = [
        _screen_rows(log_s[start : start + _CHUNK], spread[start : start + _CHUNK], confidence)
        for start in range(0, num_series, _CHUNK)
    ]
    if not parts:
        none = np.empty(0)
        return Screen(none, none, none, none, none, np.empty(0, np.int64), none)
    columns = zip(*parts, strict=True)
    change, half_width, largest, p, p_faster, level_runs, calm = map(np.concatenate, columns)
    return Screen(change, half_width, largest, p, p_faster, level_runs.astype(np.int64), calm)


def pick(
    found: Screen, floors: Floats, share: float = PICKED_NOISE, largest_p: float = LARGEST_P
) -> Bools:
    """Which series to measure again: [num_series].

    Slower with a p that Benjamini and Hochberg's procedure accepts at `share` over the night (and
    at most `largest_p`), by more than half of the floor (`floors`, relative): a step at the floor
    is seen half of the time as less.
    """
    beyond = np.nan_to_num(found.largest_change) > np.log1p(floors) / 2
    return accepted(found.p, share) & (np.nan_to_num(found.p, nan=1.0) <= largest_p) & beyond


def accepted(p: Floats, share: float) -> Bools:
    """Benjamini and Hochberg (1995): the false share of what is accepted is at most `share`.

    Holds for independent series and for those that err together in one direction (Benjamini and
    Yekutieli, 2001), as points of one machine in one night do. nan is never accepted, nor counted.
    """
    known = np.flatnonzero(~np.isnan(p))
    result = np.zeros(p.shape, bool)
    if not len(known):
        return result
    ordered = np.sort(p[known])
    passing = np.flatnonzero(ordered <= share * np.arange(1, len(known) + 1) / len(known))
    if len(passing):
        result[known] = p[known] <= ordered[passing[-1]]
    return result


def _screen_rows(
    log_s: Floats, spread: Floats, confidence: float
) -> tuple[NDArray[np.float64], ...]:
    from scipy.special import stdtr, stdtrit  # 0.1 s, where scipy.stats takes 0.7

    values = newest_values(log_s, DEPTH)
    level, level_runs = _rolling_median(values, LEVEL_RUNS)
    ps, changes = [], []
    for span in SPANS:
        change, scale, freedom = _change(values, level, level_runs, span, spread)
        changes.append(change)
        ps.append(stdtr(freedom, -change / scale))
        if span == 1:
            half_width = stdtrit(freedom, 0.5 + confidence / 2) * scale
            p_faster = stdtr(freedom, change / scale)
    p = np.minimum(1.0, len(SPANS) * np.fmin.reduce(ps))
    largest = np.fmax.reduce(changes)
    first = changes[0]
    runs = np.where(np.isnan(first), 0, level_runs[:, -2]).astype(np.float64)
    p = np.where(np.isnan(first), np.nan, p)
    deviation = _level_deviation(values[:, :-1], level[:, -2])
    evidence = np.maximum(runs - 1, 0)
    freedom = PRIOR_RUNS + evidence
    scale = np.sqrt((PRIOR_RUNS * spread**2 + np.nan_to_num(evidence * deviation**2)) / freedom)
    scale *= np.sqrt(1 + _median_variance(np.maximum(runs, 1)))
    calm = stdtrit(np.minimum(freedom, _MAX_FREEDOM), 0.5 + confidence / 2) * scale
    return first, half_width, largest, p, p_faster, runs, calm


def newest_values(log_s: Floats, depth: int) -> Floats:
    """The last `depth` values of each row that are not nan, oldest first: [num_series, depth].

    Rows with fewer begin with nan.
    """
    order = np.argsort(~np.isnan(log_s), axis=1, kind="stable")[:, -depth:]
    values = np.take_along_axis(log_s, order, axis=1)
    missing = depth - values.shape[1]
    return np.pad(values, ((0, 0), (max(missing, 0), 0)), constant_values=np.nan)


def _rolling_median(values: Floats, window: int) -> tuple[Floats, NDArray[np.int64]]:
    """Medians of each value and the `window` - 1 before it, and of how many: two [n, depth]."""
    padded = np.pad(values, ((0, 0), (window - 1, 0)), constant_values=np.nan)
    ordered = np.sort(sliding_window_view(padded, window, axis=1), axis=2)  # nan is last
    count = (~np.isnan(ordered)).sum(axis=2)
    return _middle(ordered, count), count


def _middle(ordered: Floats, count: NDArray[np.int64]) -> Floats:
    low = np.maximum(count - 1, 0) // 2
    high = np.minimum(count // 2, ordered.shape[-1] - 1)
    pair = np.stack([low, high], axis=-1)
    middle: Floats = np.take_along_axis(ordered, pair, axis=-1).mean(axis=-1)
    return middle


def _change(
    values: Floats, level: Floats, level_runs: NDArray[np.int64], span: int, spread: Floats
) -> tuple[Floats, Floats, Floats]:
    """The newest change over `span` runs, its scale, and the degrees of freedom: three [n]."""
    newest = _whole_median(values, span)
    before = np.full_like(level, np.nan)
    before[:, span:] = level[:, :-span]
    runs = np.zeros_like(level_runs)
    runs[:, span:] = level_runs[:, :-span]
    # What the difference of two medians of independent normal values spreads by, over theirs.
    unit = np.sqrt(_median_variance(span) + _median_variance(np.maximum(runs, 1)))
    changes = np.where(runs >= MIN_LEVEL_RUNS, newest - before, np.nan)
    past = np.abs(changes / unit)[:, -PAST_CHANGES - span : -span]
    ordered = np.sort(past, axis=1)
    count = (~np.isnan(past)).sum(axis=1)
    own = np.maximum(1.4826 * _middle(ordered, count), _quantile(ordered, count, 0.9) / 1.645)
    # The three newest values of a span overlap with those of its neighbours.
    evidence = count / span
    short = count < _MIN_CHANGES
    deviation = _level_deviation(values[:, :-span], before[:, -1])
    own = np.where(short, deviation, own)
    evidence = np.where(short, np.maximum(runs[:, -1] - 1, 0), evidence)
    own = np.where(evidence > 0, own, 0.0)
    freedom = PRIOR_RUNS + evidence
    scale = np.sqrt((PRIOR_RUNS * spread**2 + evidence * own**2) / freedom) * unit[:, -1]
    return changes[:, -1], scale, np.minimum(freedom, _MAX_FREEDOM)


def _whole_median(values: Floats, span: int) -> Floats:
    """The median of each value and the `span` - 1 before it, nan unless all are there."""
    if span == 1:
        return values
    padded = np.pad(values, ((0, 0), (span - 1, 0)), constant_values=np.nan)
    median: Floats = np.median(sliding_window_view(padded, span, axis=1), axis=2)
    return median


def _median_variance(count: int | NDArray[np.int64]) -> Floats:
    """Variance of the median of `count` independent standard normal values, nearly.

    pi / (2 n + pi - 2): exact for one and for very many, within 4 % between for odd n.
    """
    variance: Floats = np.asarray(math.pi / (2 * np.asarray(count) + math.pi - 2))
    return variance


def _quantile(ordered: Floats, count: NDArray[np.int64], share: float) -> Floats:
    """The value that `share` of the `count` first ones of each sorted row do not exceed."""
    index = np.clip(np.ceil(share * count).astype(int) - 1, 0, ordered.shape[1] - 1)
    taken: Floats = np.take_along_axis(ordered, index[:, None], axis=1)[:, 0]
    return taken


def _level_deviation(values: Floats, level: Floats) -> Floats:
    """Scaled median absolute deviation of the level's own runs: [n]."""
    window = np.sort(np.abs(values[:, -LEVEL_RUNS:] - level[:, None]), axis=1)
    return 1.4826 * _middle(window, (~np.isnan(window)).sum(axis=1))
