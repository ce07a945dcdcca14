"""A sweep: every planned point, every replicate, one journal line a row, whatever happens."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from attnbench.backends.device import Device
from attnbench.backends.registry import get_backend_class
from attnbench.measure.environment import Environment
from attnbench.measure.options import MeasureOptions
from attnbench.measure.plan import PlannedPoint
from attnbench.measure.point import is_interpreted
from attnbench.measure.worker import WorkerSetup, make_executor
from attnbench.store.record import Measurement, Metric
from attnbench.store.results import Run

#: Called after each point with its rows, the number done and the number planned.
Progress = Callable[[Sequence[Measurement], int, int], None]


@dataclass(frozen=True, slots=True)
class SweepOutcome:
    """What a sweep did, counted over points and replicates."""

    run_id: str
    counts: Counter[str]  # status of the metric `attention` -> number of rows
    duration_s: float
    skipped: int  # rows an earlier start of the same run had already stored

    @property
    def measured(self) -> int:
        return sum(self.counts.values())


def run_sweep(
    plan: Sequence[PlannedPoint],
    run: Run,
    options: MeasureOptions,
    device: Device,
    environment: Environment,
    progress: Progress | None = None,
) -> SweepOutcome:
    """Measure `plan` into `run`. Points already in the run are skipped, so a resumed run goes on.

    Replicates are the outer loop: two measurements of a point are as far apart in time as the run
    allows, and each is from a process of its own. Points of interpreted kernels have no times, so
    one replicate says all they can say.
    """
    started = time.perf_counter()
    counts: Counter[str] = Counter()
    rounds = [
        (options.first_replicate + r, interpret, points)
        for r in range(options.replicates)
        for interpret, points in _split(plan, device, first_round=r == 0)
    ]
    total = sum(len(points) for _, _, points in rounds)
    done = skipped = 0
    stored = {(key[1], key[-1]) for key in run.done if key[2] == Metric.ATTENTION}
    with tempfile.TemporaryDirectory(prefix="attnbench-") as folder:
        for replicate, interpret, points in rounds:
            setup = WorkerSetup(
                run_id=run.run_id,
                replicate=replicate,
                device=device,
                environment=environment,
                options=replace(options, replicates=1),
                truth_folder=Path(folder),
                interpret=interpret,
            )
            with make_executor(setup) as executor:
                for planned in points:
                    done += 1
                    if (planned.point_id, str(replicate)) in stored:
                        skipped += 1
                        continue
                    rows = executor.measure(planned)
                    # The row with the status goes last: a point counts as stored when it is there,
                    # and the others may be there already if the last start was killed in between.
                    for row in sorted(rows, key=lambda r: r.metric == Metric.ATTENTION):
                        if row.key not in run.done:
                            run.append(row)
                    counts[rows[0].status] += 1
                    if progress is not None:
                        progress(rows, done, total)
    return SweepOutcome(run.run_id, counts, time.perf_counter() - started, skipped)


def _split(
    plan: Sequence[PlannedPoint], device: Device, first_round: bool
) -> list[tuple[bool, list[PlannedPoint]]]:
    """Points for an ordinary worker, and points for one under Triton's interpreter."""
    ordinary: list[PlannedPoint] = []
    interpreted: list[PlannedPoint] = []
    for planned in plan:
        backend = get_backend_class(planned.backend)
        (interpreted if is_interpreted(backend, device) else ordinary).append(planned)
    parts = [(False, ordinary)]
    if first_round and interpreted:
        parts.append((True, interpreted))
    return [(interpret, points) for interpret, points in parts if points]
