"""A sweep: every planned point, every replicate, one journal line a row, whatever happens."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from attnbench.backends.device import Device
from attnbench.backends.registry import get_backend_class
from attnbench.errors import InfrastructureError
from attnbench.measure.compile_ahead import Compiled, Tell, compile_ahead
from attnbench.measure.environment import Environment
from attnbench.measure.executor import make_executor
from attnbench.measure.health import HealthCheck, check_device
from attnbench.measure.options import MeasureOptions
from attnbench.measure.plan import PlannedPoint, interleave
from attnbench.measure.point import is_interpreted
from attnbench.measure.quarantine import Quarantine
from attnbench.measure.worker import WorkerSetup
from attnbench.store.record import Measurement, Metric
from attnbench.store.results import Run

#: Called after each point with its rows, the number done and the number planned.
Progress = Callable[[Sequence[Measurement], int, int], None]


@dataclass(frozen=True, slots=True)
class SweepOutcome:
    """What a sweep did, counted over points and replicates."""

    run_id: str
    counts: Counter[str]  # status of a point -> number of rows
    duration_s: float
    skipped: int  # rows an earlier start of the same run had already stored
    quarantined: tuple[PlannedPoint, ...] = ()  # failed twice
    compiled: Compiled = field(default_factory=Compiled)  # before anything was timed

    @property
    def measured(self) -> int:
        return sum(self.counts.values())


@dataclass(frozen=True, slots=True)
class Isolation:
    """How workers are kept and proved.

    Attributes:
        health: proves that the device works, in a worker; it is called at a worker's start and
            after errors.
        always: a worker process even where points could run in this one.
        start_method: of the workers; see `WorkerSetup`.
    """

    health: HealthCheck = check_device
    always: bool = False
    start_method: str = "spawn"


def run_sweep(
    plan: Sequence[PlannedPoint],
    run: Run,
    options: MeasureOptions,
    device: Device,
    environment: Environment,
    progress: Progress | None = None,
    tell: Tell = lambda line: None,
    isolation: Isolation | None = None,
    truths: Path | None = None,
) -> SweepOutcome:
    """Measure `plan` into `run`. Points already in the run are skipped, so a resumed run goes on.

    Replicates are the outer loop: two measurements of a point are as far apart in time as the run
    allows, and each is from a process of its own. Within a round the backends of a workload follow
    each other in random order. Points of interpreted kernels have no times, so one replicate says
    all they can say. `tell` gets lines about what is done besides measuring. `truths` is a folder
    in which references are kept for sweeps of the same points that follow.

    Raises:
        InfrastructureError: the machine failed: no worker works on the device, a fresh one neither.
            What was measured is stored, the rest has no rows, so that `--resume` measures it on a
            machine that works: rows that say ERROR would be taken for answers.
    """
    started = time.perf_counter()
    counts: Counter[str] = Counter()
    isolation = isolation or Isolation()
    stored = stored_points(run, options)
    rounds = [
        (replicate, interpret, interleave(points, f"{run.run_id} {replicate}"))
        for replicate in range(
            options.first_replicate, options.first_replicate + options.replicates
        )
        for interpret, points in _split(
            plan, device, first_round=replicate == options.first_replicate
        )
    ]
    total = sum(len(points) for _, _, points in rounds)
    done = skipped = 0
    quarantine = Quarantine()
    with tempfile.TemporaryDirectory(prefix="attnbench-") as folder:
        setup = WorkerSetup(
            run_id=run.run_id,
            replicate=options.first_replicate,
            device=device,
            environment=environment,
            options=replace(options, replicates=1),
            truth_folder=truths or Path(folder),
            health=isolation.health,
            start_method=isolation.start_method,
        )
        rest = [
            point
            for replicate, _, points in rounds
            for point in points
            if (point.point_id, str(replicate)) not in stored
        ]
        compiled = compile_ahead(rest, setup, tell)
        unnoted = dict(compiled.seconds)
        for replicate, interpret, points in rounds:
            setup = replace(setup, replicate=replicate, interpret=interpret)
            with make_executor(setup, isolation.always) as executor:
                for planned in points:
                    done += 1
                    if (planned.point_id, str(replicate)) in stored:
                        skipped += 1
                        continue
                    rows = quarantine.measure(planned, executor)
                    _note_compilation(rows, unnoted)
                    _store(rows, run)
                    counts[rows[0].status] += 1
                    if progress is not None:
                        progress(rows, done, total)
                    if quarantine.broken is not None:
                        raise InfrastructureError(str(quarantine.broken)) from quarantine.broken
    quarantined = tuple(quarantine.points.values())
    duration_s = time.perf_counter() - started
    return SweepOutcome(run.run_id, counts, duration_s, skipped, quarantined, compiled)


def stored_points(run: Run, options: MeasureOptions) -> set[tuple[str, str]]:
    """(point, replicate) of the points that are stored whole.

    The row with the status is written last; others of its metric are in later L2 states.
    """
    return {
        (point_id, replicate)
        for _, point_id, metric, _, l2_state, _, replicate in run.done
        if metric in (Metric.ATTENTION, Metric.STEP) and l2_state not in options.l2_states[1:]
    }


def _store(rows: Sequence[Measurement], run: Run) -> None:
    # The row with the status goes last: a point counts as stored when it is there, and the others
    # may be there already if the last start was killed in between.
    for row in (*rows[1:], rows[0]):
        if row.key not in run.done:
            run.append(row)


def _note_compilation(rows: list[Measurement], unnoted: dict[str, float]) -> None:
    """Keep with a point what compiling its kernel took, once."""
    seconds = unnoted.pop(rows[0].point_id, None)
    if seconds is not None:
        conditions = {**rows[0].conditions_before, "compile_ahead_s": seconds}
        rows[0] = replace(rows[0], conditions_before=conditions)


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
