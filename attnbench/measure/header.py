"""A run's header: plan, options and environment, so that `--resume` needs nothing retyped."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, fields

from attnbench.errors import DataError, UsageError
from attnbench.measure.environment import Environment
from attnbench.measure.options import MeasureOptions
from attnbench.measure.plan import PlannedPoint
from attnbench.store.header import RunHeader

#: What must be the same when a run goes on: rows of one run are judged together.
_SAME = (
    "device_class",
    "stack_id",
    "driver_version",
    "cuda_version",
    "container_digest",
    "commit",
)


def new_header(
    plan: Sequence[PlannedPoint], options: MeasureOptions, environment: Environment
) -> RunHeader:
    """The header of a run about to start."""
    suites = sorted({point.suite for point in plan if point.suite})
    workloads = dict.fromkeys(point.workload.text for point in plan)
    return RunHeader.new(
        argv=tuple(sys.argv[1:]),
        spec=" ".join(suites) if suites else " | ".join(workloads),
        plan=tuple(point.to_json() for point in plan),
        options=asdict(options),
        environment={name: getattr(environment, name) for name in _SAME},
    )


def read_header(header: RunHeader) -> tuple[list[PlannedPoint], MeasureOptions]:
    """The plan and options of a stored run.

    Raises DataError for a run stored without them, or by a version with other options.
    """
    if not header.plan:
        raise DataError(
            f"run {header.run_id} has no stored plan and cannot be resumed; start a new one"
        )
    options = dict(header.options)
    if unknown := set(options) - {field.name for field in fields(MeasureOptions)}:
        raise DataError(
            f"run {header.run_id} was started by another version of attnbench, with "
            f"{', '.join(sorted(unknown))}; it cannot be resumed, start a new one"
        )
    if "l2_states" in options:
        options["l2_states"] = tuple(options["l2_states"])
    options["fake_slowdown"] = tuple((n, f) for n, f in options.get("fake_slowdown", ()))
    return [PlannedPoint.from_json(dict(row)) for row in header.plan], MeasureOptions(**options)


def check_same_environment(header: RunHeader, environment: Environment) -> None:
    """Raises UsageError naming what changed since the run of `header` was started."""
    for name in _SAME:
        before, now = header.environment.get(name), getattr(environment, name)
        if before is not None and before != now:
            raise UsageError(
                f"--resume {header.run_id}: its {name} is {before or 'unknown'}, and is "
                f"{now or 'unknown'} now; rows of both would be judged as one, start a new run"
            )
