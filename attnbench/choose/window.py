"""The reduction against the whole: every step of a window measured, and predicted from the batches.

The window chose no batch. Its steps are stored as any point is; the prediction is what `itl` uses,
`MeasuredLatency` from the batches that stand for the trace, on the very steps that were measured.
Both are times of one backend, measured alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from attnbench.choose.itl import Unanswered, with_all_times
from attnbench.choose.stored import Measured
from attnbench.choose.tries import Choice
from attnbench.traffic.latency_measured import MeasuredLatency
from attnbench.traffic.reduce import WindowError, window_error
from attnbench.traffic.reduced import ReducedTrace
from attnbench.workload import Workload

TOTAL_WITHIN = 0.03
P99_WITHIN = 0.05
"""What the prediction of a window may be off by, relatively."""


@dataclass(frozen=True, slots=True)
class WindowCheck:
    """One backend's error. `num_batches`: different ones among the window's steps."""

    choice: Choice
    error: WindowError
    num_batches: int

    @property
    def is_within(self) -> bool:
        return abs(self.error.total) <= TOTAL_WITHIN and abs(self.error.p99) <= P99_WITHIN

    def row(self) -> dict[str, Any]:
        """For people and programs."""
        return {
            "backend": self.choice.text,
            "steps": self.error.num_steps,
            "batches": self.num_batches,
            "total_error_pct": round(100 * self.error.total, 3),
            "p99_error_pct": round(100 * self.error.p99, 3),
            "within": self.is_within,
        }


def check_window(
    reduced: ReducedTrace,
    window: Sequence[Workload],
    measured: Measured,
    requests: Sequence[str],
) -> tuple[list[WindowCheck], list[Unanswered]]:
    """Of each backend with all times, how far off the prediction is; and who lacks what.

    Args:
        window: (num_steps,) the steps, of `window_workloads`.
        requests: as of `choose.itl.answer`.
    """
    batches = reduced.reduction.workloads
    workloads = tuple(dict.fromkeys((*batches, *window)))
    points, chosen, lacking = with_all_times(workloads, measured, requests)
    place = {workload: number for number, workload in enumerate(workloads)}
    at = np.array([place[workload] for workload in window])
    lengths = [request for workload in window for request in workload.requests]
    query = np.array([request.query_len for request in lengths], dtype=np.int64)
    tokens = np.array([request.seq_len for request in lengths], dtype=np.int64)
    offsets = np.cumsum([0, *(workload.num_reqs for workload in window)])
    found = []
    for choice in chosen:
        seconds = np.array([point.timed[choice].seconds for point in points])
        model = MeasuredLatency(batches, seconds[: len(batches)], 1)
        predicted = model.of_entries(offsets, query, tokens - query)
        error = window_error(predicted, seconds[at])
        found.append(WindowCheck(choice, error, len(set(window))))
    return found, lacking
