"""A run's header: the plan and the options as JSON, so that `--resume` needs nothing retyped."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict

from attnbench.errors import DataError
from attnbench.measure.options import MeasureOptions
from attnbench.measure.plan import PlannedPoint
from attnbench.store.header import RunHeader


def new_header(plan: Sequence[PlannedPoint], options: MeasureOptions) -> RunHeader:
    """The header of a run about to start."""
    return RunHeader.new(
        argv=tuple(sys.argv[1:]),
        spec=" ".join(sorted({point.suite for point in plan if point.suite})),
        plan=tuple(point.to_json() for point in plan),
        options=asdict(options),
    )


def read_header(header: RunHeader) -> tuple[list[PlannedPoint], MeasureOptions]:
    """The plan and options of a stored run.

    Raises DataError for a run that was stored without them.
    """
    if not header.plan:
        raise DataError(
            f"run {header.run_id} has no stored plan and cannot be resumed; start a new one"
        )
    options = dict(header.options)
    options["fake_slowdown"] = tuple((n, f) for n, f in options.get("fake_slowdown", ()))
    return [PlannedPoint.from_json(dict(row)) for row in header.plan], MeasureOptions(**options)
