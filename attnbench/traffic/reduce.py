"""A schedule of many steps as a few hundred batches to measure. docs/itl.md has the method.

1. Each step is a point of six coordinates (`reduce_features.coordinates`).
2. The steps are cut into cells: the cell with the largest sum of squares along one coordinate,
   each step weighing the fourth root of its cost, is cut there at its mean, until there are enough.
   Steps with prompts get half of the representatives, and the most expensive steps of either kind
   (`TAIL_SHARE`) are cut on their own, so that a p99 has batches of its own.
3. A cell's representative is the step nearest to its mean, its contexts rounded (`rounded`).
4. A representative weighs as many steps as are nearest to it, corrected as little as possible so
   that steps, and every feature, add up to what they are in the whole schedule.

Nothing is random. A window that is held back chooses no representative.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from attnbench.errors import UsageError
from attnbench.traffic.latency_costs import LayerCosts, quantile, sums
from attnbench.traffic.reduce_features import (
    NAMES,
    Batches,
    batches_of,
    coordinates,
    features_of,
    features_of_entries,
)
from attnbench.traffic.types import Floats, Ints, StepBatches
from attnbench.workload import BatchSpec, Request, Workload

#: The most expensive steps, and the part of the representatives they get.
TAIL_SHARE = 0.02
TAIL_REPRESENTATIVES = 0.25
#: A context is rounded to a multiple of the power of two that is between 1/32 and 1/16 of it.
CONTEXT_BITS = 5
MIN_WINDOW_STEPS = 500
#: Larger batches that are added, against the representatives there are at most.
LARGER_SHARE = 0.25
#: Steps weigh less than they cost when cells are cut: a p99 may lie among the cheaper ones.
WORTH_POWER = 0.25
#: FLOPs that take as long as a byte, on a large accelerator: only for what a step weighs.
_FLOPS_PER_BYTE = 300.0
_WEIGHT_BOUNDS = (0.25, 4.0)
_WEIGHT_ROUNDS = 30


@dataclass(frozen=True, slots=True, eq=False)
class Reduction:
    """Representatives of a schedule, and whom they stand for.

    Attributes:
        workloads: (num_representatives,) what to measure, each text once.
        features: (num_representatives, 11) of those batches, as `reduce_features.NAMES`.
        weights: (num_representatives,) steps each stands for; adds up to the schedule's. 0 for
            batches that only another schedule has (`with_larger`).
        num_nearest: (num_representatives,) steps nearest to each.
        totals_error: the largest relative error of a feature's weighted total.
        held_back: steps of the schedule that chose nothing.
    """

    workloads: tuple[Workload, ...]
    features: Floats
    weights: Floats
    num_nearest: Ints
    totals_error: float
    held_back: slice

    def __len__(self) -> int:
        return len(self.workloads)

    def total_seconds(self, seconds: Floats) -> float:
        """The whole schedule's, from (num_representatives,) seconds.

        Totals only: a quantile of so few times is coarse, `MeasuredLatency` predicts every step.
        """
        return float((self.weights * seconds).sum())


def reduce_steps(
    steps: StepBatches,
    layer: Workload,
    num_representatives: int = 512,
    held_back: slice | None = None,
) -> Reduction:
    """Choose representatives of a schedule for one layer.

    Args:
        layer: the attention layer, as a workload; its batch is not looked at.
        num_representatives: at most; fewer where batches become equal.
        held_back: steps (a contiguous slice) that choose no representative; None: all choose.

    Raises:
        UsageError: no steps, none left beside those held back, or fewer than 16 representatives.
    """
    if num_representatives < 16:
        raise UsageError(
            f"{num_representatives} representatives cannot hold the totals; give 16 or more"
        )
    held = held_back or slice(0, 0)
    chosen_from = np.ones(len(steps), dtype=bool)
    chosen_from[held] = False
    if not chosen_from.any():
        raise UsageError(
            f"no steps to choose from: the schedule has {len(steps)} and "
            f"{len(steps) - int(chosen_from.sum())} are held back; give a longer trace"
        )
    costs = LayerCosts(layer)
    batches = batches_of(steps)
    features = features_of(batches, costs)
    places = coordinates(features)
    worth = step_worth(batches, costs)
    has_long = features[:, NAMES.index("long_reqs")] > 0
    steps_to_choose = np.flatnonzero(chosen_from)
    medoids = _medoids(places, worth**WORTH_POWER, has_long, steps_to_choose, num_representatives)
    workloads = tuple(dict.fromkeys(batch_workload(steps, int(m), layer) for m in medoids))
    of_workloads = features_of_workloads(workloads)
    nearest = nearest_of(places, coordinates(of_workloads))
    counts = np.bincount(nearest, minlength=len(workloads))
    weights = calibrated(counts.astype(np.float64), of_workloads, features.sum(axis=0))
    totals = features.sum(axis=0)
    off = np.abs(weights @ of_workloads - totals)[totals > 0] / totals[totals > 0]
    return Reduction(
        workloads=workloads,
        features=of_workloads,
        weights=weights,
        num_nearest=counts,
        totals_error=float(off.max(initial=0.0)),
        held_back=held,
    )


def with_larger(
    reduction: Reduction, denser: StepBatches, layer: Workload, num_representatives: int
) -> Reduction:
    """The same with representatives of what is larger in some feature than all it has.

    They weigh nothing: they are measured so that a slower backend's own schedule, which has such
    batches, need not be extrapolated. The largest batch of each feature is among them.

    Args:
        denser: a schedule of the same trace that piles up more, e.g. at a higher rate.
        num_representatives: as `reduce_steps` was given; at most `LARGER_SHARE` of it, and one for
            each feature, are added.
    """
    costs = LayerCosts(layer)
    batches = batches_of(denser)
    features = features_of(batches, costs)
    larger = np.flatnonzero((features > reduction.features.max(axis=0)).any(axis=1))
    if not len(larger):
        return reduction
    worth = step_worth(batches, costs)
    has_long = features[:, NAMES.index("long_reqs")] > 0
    count = max(int(num_representatives * LARGER_SHARE), 1)
    chosen = _medoids(coordinates(features), worth**WORTH_POWER, has_long, larger, count)
    chosen += larger[features[larger].argmax(axis=0)].tolist()
    known = set(reduction.workloads)
    found = dict.fromkeys(batch_workload(denser, step, layer) for step in sorted(set(chosen)))
    new = tuple(workload for workload in found if workload not in known)
    none = np.zeros(len(new))
    return replace(
        reduction,
        workloads=(*reduction.workloads, *new),
        features=np.concatenate((reduction.features, features_of_workloads(new))),
        weights=np.concatenate((reduction.weights, none)),
        num_nearest=np.concatenate((reduction.num_nearest, none.astype(np.int64))),
    )


def window_to_hold_back(steps: StepBatches) -> slice:
    """The window that `attnbench traffic` checks itself on: contiguous, a twentieth of the steps,
    500 at least, in the middle of the schedule.

    Raises:
        UsageError: fewer steps than four windows.
    """
    length = max(MIN_WINDOW_STEPS, len(steps) // 20)
    if len(steps) < 4 * MIN_WINDOW_STEPS:
        raise UsageError(
            f"a schedule of {len(steps)} steps is too short to hold {MIN_WINDOW_STEPS} back; "
            f"give a trace of {4 * MIN_WINDOW_STEPS} steps or more"
        )
    first = (len(steps) - length) // 2
    return slice(first, first + length)


def window_to_check(reduction: Reduction, num_steps: int) -> slice:
    """The first so many steps of those held back: few enough to measure every one of them.

    Raises:
        UsageError: fewer than `MIN_WINDOW_STEPS`, or more than are held back.
    """
    held = reduction.held_back
    most = held.stop - held.start
    if not MIN_WINDOW_STEPS <= num_steps <= most:
        raise UsageError(
            f"a window of {num_steps} steps: of this trace {most} steps are held back; give "
            f"{MIN_WINDOW_STEPS} to {most}"
        )
    return slice(held.start, held.start + num_steps)


def window_workloads(steps: StepBatches, window: slice, layer: Workload) -> tuple[Workload, ...]:
    """(num_steps,) every step of a window as it is: nothing rounded, its requests in their order.

    Equal steps are equal workloads: each need be measured once.
    """
    found = []
    for step in range(window.start, window.stop):
        entries = steps.entries_of(step)
        pairs = zip(
            steps.query_len[entries].tolist(), steps.context_len[entries].tolist(), strict=True
        )
        requests = tuple(Request(new, cached + new) for new, cached in pairs)
        found.append(layer.replace(batch_spec=BatchSpec(requests)))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class WindowError:
    """Predicted against measured over a window: relative errors, signed."""

    num_steps: int
    total: float
    p99: float


def window_error(predicted: Floats, measured: Floats) -> WindowError:
    """Both (num_steps,) seconds of the same steps."""
    high = quantile(measured, 0.99)
    return WindowError(
        num_steps=len(measured),
        total=float(predicted.sum() / measured.sum() - 1.0),
        p99=quantile(predicted, 0.99) / high - 1.0,
    )


def rounded(context_len: Ints) -> Ints:
    """Contexts to `CONTEXT_BITS` significant bits, to the nearest (halves up)."""
    bits = np.floor(np.log2(np.maximum(context_len, 1))).astype(np.int64) + 1
    quantum = np.left_shift(np.int64(1), np.maximum(bits - CONTEXT_BITS, 0))
    whole: Ints = (context_len + quantum // 2) // quantum * quantum
    return whole


def batch_workload(steps: StepBatches, step: int, layer: Workload) -> Workload:
    """The step as a workload of `layer`: contexts rounded, fewest new tokens first, then longest
    context first, so that batches that differ only in order are one."""
    entries = steps.entries_of(step)
    query, context = steps.query_len[entries], rounded(steps.context_len[entries])
    order = np.lexsort((-context, query))
    pairs = zip(query[order].tolist(), context[order].tolist(), strict=True)
    requests = tuple(Request(new, cached + new) for new, cached in pairs)
    return layer.replace(batch_spec=BatchSpec(requests))


def features_of_workloads(workloads: tuple[Workload, ...]) -> Floats:
    """(num_workloads, 11) features of batches of one layer, from their texts' requests."""
    counts = [0, *(workload.num_reqs for workload in workloads)]
    requests = [request for workload in workloads for request in workload.requests]
    query = np.array([request.query_len for request in requests], dtype=np.int64)
    tokens = np.array([request.seq_len for request in requests], dtype=np.int64)
    offsets = np.cumsum(np.array(counts, dtype=np.int64))
    return features_of_entries(offsets, query, tokens - query, LayerCosts(workloads[0]))


def step_worth(batches: Batches, costs: LayerCosts) -> Floats:
    """(num_steps,) roughly what each costs, in bytes."""
    flops = sums(costs.flops(batches.query_len, batches.context_len), batches.step_offsets)
    moved = sums(costs.bytes(batches.query_len, batches.context_len), batches.step_offsets)
    return moved + flops / _FLOPS_PER_BYTE


def nearest_of(places: Floats, representatives: Floats) -> Ints:
    """(num_steps,) index of the nearest representative."""
    from scipy.spatial import cKDTree

    _, found = cKDTree(representatives).query(places)
    return np.asarray(found, dtype=np.int64)


def _medoids(
    places: Floats, worth: Floats, has_long: npt.NDArray[np.bool_], steps: Ints, count: int
) -> list[int]:
    found = []
    for group, number in _strata(worth, has_long, steps, count):
        for cell in _cells(places, worth, group, number):
            centre = np.average(places[cell], axis=0, weights=worth[cell])
            distance = ((places[cell] - centre) ** 2).sum(axis=1)
            found.append(int(cell[int(distance.argmin())]))
    return sorted(found)


def _strata(
    worth: Floats, has_long: npt.NDArray[np.bool_], steps: Ints, count: int
) -> list[tuple[Ints, int]]:
    """Steps that are cut on their own, with the representatives each gets."""
    kinds = [kind for kind in (steps[~has_long[steps]], steps[has_long[steps]]) if len(kind)]
    strata = []
    for kind in kinds:
        tail = worth[kind] > quantile(worth[kind], 1.0 - TAIL_SHARE)
        number = count // len(kinds)
        for_tail = int(number * TAIL_REPRESENTATIVES) if tail.any() else 0
        strata += [(kind[~tail], number - for_tail), (kind[tail], for_tail)]
    return strata


def _cells(places: Floats, worth: Floats, steps: Ints, count: int) -> list[Ints]:
    """`steps` cut into at most `count` cells, the worst one at a time."""
    if not len(steps) or not count:
        return []
    heap = [_cut(places, worth, steps, 0)]
    made = 1
    while len(heap) < count and heap[0][0] < 0.0:
        _, _, axis, at, cell = heapq.heappop(heap)
        low = places[cell, axis] <= at
        for part in (cell[low], cell[~low]):
            heapq.heappush(heap, _cut(places, worth, part, made))
            made += 1
    return [cell for *_, cell in heap]


def _cut(
    places: Floats, worth: Floats, cell: Ints, number: int
) -> tuple[float, int, int, float, Ints]:
    """Minus the sum of squares along the worst axis, a number for ties, that axis, its mean."""
    inside, weights = places[cell], worth[cell][:, None]
    mean = (inside * weights).sum(axis=0) / weights.sum()
    squares = ((inside - mean) ** 2 * weights).sum(axis=0)
    # Nothing to cut along an axis where all are alike, whatever rounding makes of it.
    squares[inside.max(axis=0) - inside.min(axis=0) < 1e-9] = 0.0
    axis = int(squares.argmax())
    return -float(squares[axis]), number, axis, float(mean[axis]), cell


def calibrated(counts: Floats, features: Floats, totals: Floats) -> Floats:
    """Weights near `counts` whose number and weighted features add up to `totals`.

    The smallest change `sum (w - n)^2 / n` under the totals (survey statistics call it calibration,
    Deville and Sarndal 1992), no weight below a quarter or above four times its count; where these
    bounds do not allow the totals, they are met as nearly as they do.
    """
    columns = np.column_stack((np.ones(len(counts)), features))
    wanted = np.concatenate((np.array([counts.sum()]), totals))
    scale = np.maximum(wanted, 1e-300)
    columns, used = columns / scale, wanted > 0
    columns = columns[:, used]
    low, high = _WEIGHT_BOUNDS[0] * counts, _WEIGHT_BOUNDS[1] * counts
    weights, free = counts.copy(), counts > 0
    for _ in range(_WEIGHT_ROUNDS):
        missing = 1.0 - columns.T @ np.where(free, counts, weights)
        spread = columns[free].T @ (columns[free] * counts[free, None])
        change = np.linalg.lstsq(spread, missing, rcond=1e-10)[0]
        weights[free] = counts[free] * (1.0 + columns[free] @ change)
        beyond = free & ((weights < low) | (weights > high))
        if not beyond.any():
            break
        weights = np.clip(weights, low, high)
        free &= ~beyond
    return np.clip(weights, low, high)
