"""Where a series changed its level, over its whole history: to say when and why, never to alarm.

Robust and deterministic; chosen by measurement on real noise (docs/change-points.md,
`python benchmarks/change_points.py`). Three stages per series, on the logarithm of its values:

1. *Candidates*: the piecewise constant signal on a grid of the series' own levels that minimises
   bounded squared loss (Tukey's biweight in its simplest form: Fearnhead and Rigaill, 2019,
   "Changepoint detection in the presence of outliers") plus a price per change, found exactly by
   dynamic programming. The loss is bounded, so one odd night never buys a change.
2. *Selection*: of the nested models from all candidates down to none, the one with the least
   `price * changes * log(n) / n + log(sum of absolute errors)`: an information criterion that
   learns the noise from what is left over, as asv's step fit does. The price grows with the
   autocorrelation of what is left over, (1 + rho) / (1 - rho).
3. *Location*: the index of least absolute error between its neighbours, with the set of indices
   that together hold 95 % of the likelihood.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

#: Fewer values show no change of level that could be told from noise.
MIN_VALUES = 8

#: A change smaller than this is not reported: 0.4 %.
MIN_CHANGE = 0.004

#: Each level has at least so many values.
_MIN_LENGTH = 2

#: Beyond so many standard deviations a value is odd, and costs no more.
_BOUND = 3.0

#: Price of a candidate, times log(n), in units of the squared standard deviation.
_CANDIDATE_PRICE = 3.0

#: Price of a change, times log(n), in the information criterion.
_PRICE = 3.0

#: Levels of the grid.
_LEVELS = 64

#: No series is trusted to be quieter than 0.05 %: a constant one would make a change of anything.
_QUIETEST = 0.0005

#: Share of the likelihood of the location between `low` and `high`.
CONFIDENCE = 0.95

#: Series of one length are worked on together, so many at a time: their tables stay in the cache.
_TOGETHER = 256

_RHO = np.linspace(0.0, 0.9, 19)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangePoint:
    """One change of level. Indices count all values given, missing ones too.

    Attributes:
        index: the first value of the new level, at the most likely place.
        low: the last value that is of the old level with confidence; the change is after it.
        high: the first value that is of the new level with confidence; the change is not after it.
        before_s, after_s: the medians of the levels to either side, in the unit of the values.
        ratio: new over old level; above 1 is slower.
        p: chance of so large a step in noise of this series' spread and autocorrelation, at any
            of its places (Bonferroni). It describes; `attnbench.history` alarms by other means.
    """

    index: int
    low: int
    high: int
    before_s: float
    after_s: float
    ratio: float
    p: float


def change_points(values: ArrayLike) -> tuple[ChangePoint, ...]:
    """The change points of one series, oldest first.

    `values` are seconds per run, [num_runs], oldest first; NaN, infinite and not positive ones
    count as missing.
    """
    given = np.asarray(values, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(given > 0, np.log(given), np.nan)
    return change_points_of_panel(logs[None, :])[0]


def change_points_of_panel(log_values: ArrayLike) -> list[tuple[ChangePoint, ...]]:
    """The change points of many series: `log_values` is [num_series, num_runs], log seconds.

    What is not finite is missing. The result of a series does not depend on the others.
    """
    table = np.asarray(log_values, dtype=np.float64)
    found: list[tuple[ChangePoint, ...]] = [()] * len(table)
    is_there = np.isfinite(table)
    counts = is_there.sum(axis=1)
    for rows in _batches(counts):
        size = int(counts[rows[0]])
        block = table[rows][is_there[rows]].reshape(len(rows), size)
        middle = np.median(block, axis=1)
        block = block - middle[:, None]
        sigma = np.maximum(_noise(block), _QUIETEST)
        marks = _candidates(block, sigma)
        for i in np.flatnonzero(marks.any(axis=1)):
            row = int(rows[i])
            places = np.flatnonzero(is_there[row])
            edges, rho = _select(block[i], [0, *np.flatnonzero(marks[i]).tolist(), size])
            found[row] = tuple(_describe(block[i], edges, rho, places, float(middle[i])))
    return found


def _batches(counts: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Rows of one length, at most `_TOGETHER` at a time; rows that are too short are left out."""
    for size in np.unique(counts[counts >= MIN_VALUES]):
        rows = np.flatnonzero(counts == size)
        for start in range(0, len(rows), _TOGETHER):
            yield rows[start : start + _TOGETHER]


def _noise(block: Array) -> Array:
    """Standard deviation of each row around its levels.

    From differences of neighbours, which a few steps do not reach. Autocorrelation makes those too
    small: var(x[t] - x[t-2]) / var(x[t] - x[t-1]) is 1 + rho where noise is of first order.
    """
    one = 1.4826 * np.median(np.abs(np.diff(block, axis=1)), axis=1)
    two = 1.4826 * np.median(np.abs(block[:, 2:] - block[:, :-2]), axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        rho = np.where(one > 0, (two / one) ** 2 - 1, 0.0)
    # Twenty values say nothing of it.
    rho = np.clip(rho, 0.0, 0.9) if block.shape[1] >= 20 else np.zeros(len(block))
    return np.asarray(one / np.sqrt(2 * (1 - rho)))


def _candidates(block: Array, sigma: Array) -> NDArray[np.bool_]:
    """[rows, n], true where a new level begins; exact for levels out of the rows' own grid."""
    rows, size = block.shape
    padded = np.pad(block, ((0, 0), (2, 2)), mode="edge")
    middles = np.median(np.lib.stride_tricks.sliding_window_view(padded, 5, axis=1), axis=2)
    grid = np.quantile(middles, np.linspace(0, 1, _LEVELS), axis=1).T / sigma[:, None]
    scaled = block / sigma[:, None]
    bound = _BOUND**2
    price = max(_CANDIDATE_PRICE * math.log(size), 1.01 * bound)
    cost = np.minimum((scaled[:, :1] - grid) ** 2, bound)
    jumped = np.zeros((size, rows, _LEVELS), dtype=bool)
    best = np.zeros((size, rows), dtype=np.int64)
    every = np.arange(rows)
    for t in range(1, size):
        best[t] = cost.argmin(axis=1)
        new = cost[every, best[t]][:, None] + price
        np.less(new, cost, out=jumped[t])
        cost = np.minimum(cost, new) + np.minimum((scaled[:, t, None] - grid) ** 2, bound)
    level = cost.argmin(axis=1)
    marks = np.zeros((rows, size), dtype=bool)
    for t in range(size - 1, 0, -1):
        before = np.where(jumped[t, every, level], best[t], level)
        marks[:, t] = grid[every, before] != grid[every, level]
        level = before
    return marks


def _select(y: Array, edges: list[int]) -> tuple[list[int], float]:
    """The best of the nested models below `edges` ([0, changes..., n]), and its autocorrelation."""
    size = len(y)
    edges = _drop_short(y, edges)
    chosen, least = [0, size], math.inf
    rho, price = 0.0, 0.0
    while True:
        edges = _relocate(y, edges)
        levels = _levels(y, edges)
        errors = y - np.repeat(levels, np.diff(edges))
        if not price:
            rho = _autocorrelation(errors)
            price = _PRICE * (1 + rho) / (1 - rho) * math.log(size) / size
        criterion = price * (len(edges) - 2) + math.log(
            0.6 * _QUIETEST * size + float(np.abs(errors).sum())
        )
        steps = np.abs(np.diff(levels))
        if criterion < least and (steps >= MIN_CHANGE).all():
            chosen, least = edges, criterion
        if len(edges) == 2:
            return chosen, rho
        edges = _merge_cheapest(y, edges)


def _autocorrelation(errors: Array) -> float:
    """The rho of least absolute innovations: odd values count once."""
    innovations = errors[1:, None] - errors[:-1, None] * _RHO
    return float(_RHO[np.abs(innovations).sum(axis=0).argmin()])


def _levels(y: Array, edges: Sequence[int]) -> Array:
    return np.array([_median(y[a:b]) for a, b in itertools.pairwise(edges)])


def _median(y: Array) -> float:
    """np.median spends ten times as long on its checks; nothing here is NaN or empty."""
    ordered = np.sort(y)
    size = len(y)
    return float(ordered[(size - 1) // 2] + ordered[size // 2]) / 2


def _absolute(y: Array) -> float:
    """Sum of the absolute errors to the median."""
    ordered = np.sort(y)
    half = len(y) // 2
    return float(ordered[len(y) - half :].sum() - ordered[:half].sum())


def _merge_cheapest(y: Array, edges: list[int]) -> list[int]:
    """`edges` without the change whose loss adds least absolute error."""
    alone = [_absolute(y[a:b]) for a, b in itertools.pairwise(edges)]
    added = [
        _absolute(y[edges[j - 1] : edges[j + 1]]) - alone[j - 1] - alone[j]
        for j in range(1, len(edges) - 1)
    ]
    weakest = 1 + int(np.argmin(added))
    return edges[:weakest] + edges[weakest + 1 :]


def _drop_short(y: Array, edges: list[int]) -> list[int]:
    while len(edges) > 2:
        lengths = np.diff(edges)
        short = int(lengths.argmin())
        if lengths[short] >= _MIN_LENGTH:
            break
        # Join it to the neighbour it is nearer to.
        levels = _levels(y, edges)
        sides = [j for j in (short, short + 1) if 0 < j < len(edges) - 1]
        edges = list(edges)
        edges.pop(min(sides, key=lambda j: abs(levels[j] - levels[j - 1])))
    return edges


def _gains(y: Array, edges: Sequence[int], j: int) -> Array:
    """Cost of beginning level `j` at each place from `edges[j-1] + 1` to `edges[j+1] - 1`.

    Absolute errors, bounded by the step: a value beyond both levels is for neither.
    """
    start, here, end = edges[j - 1], edges[j], edges[j + 1]
    old, new = _median(y[start:here]), _median(y[here:end])
    part = y[start:end]
    return np.asarray(np.cumsum(np.abs(part - old) - np.abs(part - new))[:-1])


def _relocate(y: Array, edges: list[int]) -> list[int]:
    """Each change moved to where the absolute error to its two levels is least."""
    edges = list(edges)
    for j in range(1, len(edges) - 1):
        allowed = _gains(y, edges, j)[_MIN_LENGTH - 1 : 1 - _MIN_LENGTH]
        if len(allowed):
            edges[j] = edges[j - 1] + _MIN_LENGTH + int(allowed.argmin())
    return edges


def _describe(
    y: Array, edges: Sequence[int], rho: float, places: NDArray[Any], middle: float
) -> Iterator[ChangePoint]:
    levels = _levels(y, edges)
    errors = y - np.repeat(levels, np.diff(edges))
    scale = max(float(np.abs(errors).mean()), _QUIETEST)
    inflation = (1 + rho) / (1 - rho)
    for j in range(1, len(edges) - 1):
        cost = _gains(y, edges, j) / (scale * inflation)
        first, last = _likely(cost, CONFIDENCE)
        shift = float(levels[j] - levels[j - 1])
        n_old, n_new = edges[j] - edges[j - 1], edges[j + 1] - edges[j]
        # pi/2: the price of medians; 1.2533: mean absolute error to standard deviation.
        spread = 1.2533 * scale * math.sqrt(math.pi / 2 * inflation * (1 / n_old + 1 / n_new))
        yield ChangePoint(
            index=int(places[edges[j]]),
            low=int(places[edges[j - 1] + first]),
            high=int(places[edges[j - 1] + 1 + last]),
            before_s=math.exp(levels[j - 1] + middle),
            after_s=math.exp(levels[j] + middle),
            ratio=math.exp(shift),
            p=min(1.0, len(y) * math.erfc(abs(shift) / spread / math.sqrt(2))),
        )


def _likely(cost: Array, share: float) -> tuple[int, int]:
    """First and last index of the fewest places that hold `share` of exp(-cost)."""
    weights = np.exp(cost.min() - cost)
    order = np.argsort(-weights, kind="stable")
    held = np.cumsum(weights[order]) / weights.sum()
    kept = order[: int(np.searchsorted(held, share)) + 1]
    return int(kept.min()), int(kept.max())
