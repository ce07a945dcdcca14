"""Backends that fell silent: measured on a workload before, and not any more, while others are.

A backend whose library breaks is not planned any more, so that its points are neither missing nor
failed: nobody would see it go.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attnbench.history.panel import NOT_PLANNED, Panel

#: So many nights on which a workload was measured, and not by a backend, are an alarm.
STALE_NIGHTS = 7

#: After so many times that, the backend is taken to be gone for good, and it is said no longer.
_GONE = 4

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StalePoint:
    """`series`: the row of the panel that was measured last, in the run `last_run`."""

    series: int
    nights: int
    last_run: str


def stale_points(
    panel: Panel, number: int, metrics: Collection[str], nights: int = STALE_NIGHTS
) -> list[StalePoint]:
    """What is stale on the night of the run `number`, one entry per workload, metric and backend.

    Whatever the variant and timer: a backend that is measured in another way has not fallen silent,
    and a workload that no backend is measured on has left the suite. A night is a day, UTC, so that
    the shards and runs of one day are one. A run without a suite is no night.
    """
    run = panel.runs[number]
    counted = [
        i
        for i, other in enumerate(panel.runs[: number + 1])
        if other.device_class == run.device_class and other.suites and not panel.is_published[i]
    ]
    chosen = [
        index
        for index, key in enumerate(panel.keys)
        if key.device_class == run.device_class and key.metric in metrics
    ]
    if not chosen or number not in counted:
        return []
    days = [panel.runs[i].started_at.date() for i in counted]
    begins = np.flatnonzero([i == 0 or days[i] != days[i - 1] for i in range(len(days))])
    is_planned = panel.status[np.ix_(chosen, counted)] != NOT_PLANNED
    measured = np.logical_or.reduceat(is_planned, begins, axis=1)
    columns = panel.identity.select(["workload", "backend"]).take(chosen)
    workloads, backends = (columns[name].to_pylist() for name in ("workload", "backend"))
    texts = [(w, panel.keys[i].metric) for w, i in zip(workloads, chosen, strict=True)]
    by_workload, of_workload = _joined(texts, measured)
    by_backend, of_backend = _joined(
        [(*text, backend) for text, backend in zip(texts, backends, strict=True)], measured
    )
    workload_of = np.zeros(len(by_backend), np.int64)
    workload_of[of_backend] = of_workload
    theirs = by_workload[workload_of]
    last = by_backend.shape[1] - 1 - by_backend[:, ::-1].argmax(axis=1)
    without = (theirs & (np.arange(theirs.shape[1]) > last[:, None])).sum(axis=1)
    is_stale = by_backend.any(axis=1) & theirs[:, -1]
    is_stale &= (without >= nights) & (without < _GONE * nights)
    found = []
    for group in np.flatnonzero(is_stale).tolist():
        row = int(np.flatnonzero((of_backend == group) & measured[:, last[group]])[0])
        newest = counted[int(np.flatnonzero(is_planned[row])[-1])]
        found.append(StalePoint(chosen[row], int(without[group]), panel.runs[newest].run_id))
    return found


def _joined(names: Sequence[tuple[str, ...]], measured: Bools) -> tuple[Bools, Ints]:
    """Rows of equal name as one: [num_names, num_nights], and the name's number of each row."""
    numbers: dict[tuple[str, ...], int] = {}
    of_row = np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int64)
    joined = np.zeros((len(numbers), measured.shape[1]), bool)
    np.logical_or.at(joined, of_row, measured)
    return joined, of_row
