"""What a run was: when, of which commit, on which machine and stack, and how its points ended."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from attnbench.errors import DataError
from attnbench.history.grouping import encoded, floats, group_numbers, microseconds, tables_by_run
from attnbench.history.series import GRAVITY, moment, utc
from attnbench.history.series_rows import SERIES_COLUMNS, split_references
from attnbench.history.stacks import (
    Changed,
    change_text,
    changed_versions,
    stack_key,
    versions_of,
)
from attnbench.store.record import Status

#: Columns that are equal in all rows of a run on one machine.
_CONSTANT = (
    "commit",
    "commit_time",
    "commit_subject",
    "stack",
    "stack_id",
    "harness_version",
    "device_kind",
    "device_name",
    "device_class",
    "device_uuid",
    "compute_capability",
    "driver_version",
    "cuda_version",
    "hostname",
    "container_digest",
)

_FACTS = (
    "hostname",
    "harness_version",
    "device_kind",
    "device_uuid",
    "compute_capability",
    "cuda_version",
    "container_digest",
)

_PER_ROW = (
    "run_id",
    "replicate",
    "started_at",
    "duration_s",
    "suite",
    "point_id",
    "device_class",
    "status",
)

#: What `runs_of` reads of a table.
RUN_COLUMNS = tuple(dict.fromkeys((*_PER_ROW, *_CONSTANT)))

#: The columns of the record that judging and comparing read: `folder.table(NEEDED_COLUMNS)`.
NEEDED_COLUMNS = tuple(dict.fromkeys((*SERIES_COLUMNS, *RUN_COLUMNS)))


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """One run. `points` counts its points by the gravest status of their rows."""

    run_id: str
    started_at: datetime
    ended_at: datetime
    commit: str
    commit_time: datetime | None
    commit_subject: str
    stack: tuple[str, ...]
    stack_id: str
    driver_version: str
    device_class: str
    device_name: str
    suites: tuple[str, ...]
    points: Mapping[Status, int]
    facts: Mapping[str, str] = field(default_factory=dict)  # the rest of what is constant

    @property
    def duration_s(self) -> float:
        """Seconds from the start of the first row to the end of the last."""
        return (self.ended_at - self.started_at).total_seconds()

    @property
    def num_points(self) -> int:
        return sum(self.points.values())

    @property
    def stack_key(self) -> str:
        """What the stack axis goes by: packages, driver, CUDA and container."""
        facts = (self.facts.get(name, "") for name in ("cuda_version", "container_digest"))
        return stack_key(self.stack_id, self.driver_version, *facts)


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentChange:
    """What differs between the machines' software of two runs."""

    before: str  # run id
    after: str
    changed: Changed

    @property
    def text(self) -> str:
        """`torch 2.12.0 -> 2.13.0, + triton 3.7.1`, for people."""
        return change_text(self.changed)


def runs_of(table: pa.Table) -> list[RunSummary]:
    """The runs of `table`, oldest first."""
    own, _ = split_references(table)
    runs = [summary_of_run(run_id, rows) for run_id, rows in tables_by_run(own)]
    runs.sort(key=lambda run: (run.started_at, run.run_id))
    return runs


def newest_run(runs: Sequence[RunSummary]) -> RunSummary:
    """The run that started last. Raises DataError if there is none."""
    if not runs:
        raise DataError("no runs are stored; measure first: attnbench run 8q1s4k")
    return max(runs, key=lambda run: (run.started_at, run.run_id))


def find_run(runs: Sequence[RunSummary], run_id: str) -> RunSummary:
    """The run called `run_id`. Raises DataError naming the newest runs."""
    for run in runs:
        if run.run_id == run_id:
            return run
    known = ", ".join(run.run_id for run in list(runs)[-3:]) or "none"
    raise DataError(f"run {run_id!r} is not stored; newest: {known}; see attnbench history")


def environment_change(before: RunSummary, after: RunSummary) -> EnvironmentChange | None:
    """Packages, driver and container that differ; None if nothing does."""
    changed = changed_versions(_versions(before), _versions(after))
    if not changed and before.stack_id != after.stack_id:
        changed = (("stack", before.stack_id, after.stack_id),)
    if not changed:
        return None
    return EnvironmentChange(before=before.run_id, after=after.run_id, changed=changed)


def _versions(run: RunSummary) -> dict[str, str]:
    facts = (run.facts.get(name, "") for name in ("cuda_version", "container_digest"))
    return versions_of(run.stack, run.driver_version, *facts)


def summary_of_run(run_id: str, rows: pa.Table) -> RunSummary:
    """The summary of a run, of all rows of its own build (one or more), with RUN_COLUMNS."""
    (constant,) = rows.slice(0, 1).select(_CONSTANT).to_pylist()
    starts = microseconds(rows["started_at"])
    lengths = np.rint(np.nan_to_num(floats(rows["duration_s"])) * 1e6).astype(np.int64)
    codes, names = encoded(rows["status"])
    grave = np.array([GRAVITY.index(Status(name)) for name in names.to_pylist()])[codes]
    points, first = group_numbers(rows, ("point_id", "device_class"))
    gravest_of = np.zeros(len(first), np.int64)
    np.maximum.at(gravest_of, points, grave)
    totals = np.bincount(gravest_of, minlength=len(GRAVITY)).tolist()
    counts = {status: total for status, total in zip(GRAVITY, totals, strict=True) if total}
    suites = pc.unique(rows["suite"]).to_pylist()
    return RunSummary(
        run_id=run_id,
        started_at=moment(int(starts.min())),
        ended_at=moment(int((starts + lengths).max())),
        commit=constant["commit"] or "",
        commit_time=utc(constant["commit_time"]) if constant["commit_time"] else None,
        commit_subject=constant["commit_subject"] or "",
        stack=tuple(constant["stack"] or ()),
        stack_id=constant["stack_id"] or "",
        driver_version=constant["driver_version"] or "",
        device_class=constant["device_class"],
        device_name=constant["device_name"],
        suites=tuple(sorted(suite for suite in suites if suite)),
        points=dict(sorted(counts.items())),
        facts={key: str(constant[key]) for key in _FACTS if constant[key]},
    )


def to_json(run: RunSummary) -> str:
    """A summary as text; `from_json` gives an equal one back."""
    values = {f.name: getattr(run, f.name) for f in fields(run)}
    for name in ("started_at", "ended_at", "commit_time"):
        values[name] = values[name] and values[name].isoformat()
    return json.dumps(values)


def from_json(text: str) -> RunSummary:
    """Raises ValueError, KeyError or TypeError for text that `to_json` did not write."""
    values = json.loads(text)
    for name in ("started_at", "ended_at", "commit_time"):
        values[name] = values[name] and datetime.fromisoformat(values[name])
    for name in ("stack", "suites"):
        values[name] = tuple(values[name])
    values["points"] = {Status(name): count for name, count in values["points"].items()}
    return RunSummary(**values)
