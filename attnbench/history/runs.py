"""What a run was: when, of which commit, on which machine and stack, and how its points ended."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import pyarrow as pa

from attnbench.errors import DataError
from attnbench.history.series import gravest, utc
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

_PER_ROW = ("run_id", "started_at", "duration_s", "suite", "point_id", "device_class", "status")

#: What `runs_of` reads of a table.
RUN_COLUMNS = tuple(dict.fromkeys((*_PER_ROW, *_CONSTANT)))


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


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentChange:
    """What differs between the machines' software of two runs."""

    before: str  # run id
    after: str
    changed: tuple[tuple[str, str, str], ...]  # (package, old version, new version); "" is absent

    @property
    def text(self) -> str:
        """`torch 2.12.0 -> 2.13.0, + triton 3.7.1`, for people."""
        parts = []
        for name, old, new in self.changed:
            if old and new:
                parts.append(f"{name} {old} -> {new}")
            else:
                parts.append(f"+ {name} {new}" if new else f"- {name} {old}")
        return ", ".join(parts)


def runs_of(table: pa.Table) -> list[RunSummary]:
    """The runs of `table`, oldest first."""
    columns = {name: table[name].to_pylist() for name in _PER_ROW}
    rows: dict[str, list[int]] = defaultdict(list)
    for row, run_id in enumerate(columns["run_id"]):
        rows[run_id].append(row)
    first_rows = pa.array([members[0] for members in rows.values()], pa.int64())
    constants = table.select(_CONSTANT).take(first_rows).to_pylist() if rows else []
    runs = [
        _summary(run_id, members, columns, constant)
        for (run_id, members), constant in zip(rows.items(), constants, strict=True)
    ]
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
    old, new = _versions(before), _versions(after)
    changed = tuple(
        (name, old.get(name, ""), new.get(name, ""))
        for name in sorted(old.keys() | new.keys())
        if old.get(name, "") != new.get(name, "")
    )
    if not changed and before.stack_id != after.stack_id:
        changed = (("stack", before.stack_id, after.stack_id),)
    if not changed:
        return None
    return EnvironmentChange(before=before.run_id, after=after.run_id, changed=changed)


def _versions(run: RunSummary) -> dict[str, str]:
    versions = {}
    for entry in run.stack:
        name, _, version = entry.partition("==")
        versions[name] = version
    if run.driver_version:
        versions["driver"] = run.driver_version
    for key in ("cuda_version", "container_digest"):
        if run.facts.get(key):
            versions[key.partition("_")[0]] = run.facts[key]
    return versions


def _summary(
    run_id: str,
    rows: Sequence[int],
    columns: Mapping[str, Sequence[Any]],
    constant: Mapping[str, Any],
) -> RunSummary:
    starts = [utc(columns["started_at"][row]) for row in rows]
    ends = [
        start + timedelta(seconds=columns["duration_s"][row] or 0.0)
        for start, row in zip(starts, rows, strict=True)
    ]
    by_point: dict[tuple[str, str], list[Status]] = defaultdict(list)
    for row in rows:
        point = (columns["point_id"][row], columns["device_class"][row])
        by_point[point].append(Status(columns["status"][row]))
    counts = Counter(gravest(statuses) for statuses in by_point.values())
    return RunSummary(
        run_id=run_id,
        started_at=min(starts),
        ended_at=max(ends),
        commit=constant["commit"] or "",
        commit_time=utc(constant["commit_time"]) if constant["commit_time"] else None,
        commit_subject=constant["commit_subject"] or "",
        stack=tuple(constant["stack"] or ()),
        stack_id=constant["stack_id"] or "",
        driver_version=constant["driver_version"] or "",
        device_class=constant["device_class"],
        device_name=constant["device_name"],
        suites=tuple(sorted({columns["suite"][row] for row in rows if columns["suite"][row]})),
        points=dict(sorted(counts.items())),
        facts={
            key: str(constant[key])
            for key in (
                "hostname",
                "harness_version",
                "device_kind",
                "device_uuid",
                "compute_capability",
                "cuda_version",
                "container_digest",
            )
            if constant[key]
        },
    )
