"""Series: one point and metric over runs, commits or stacks, as objects.

`series_rows.py` and `panel.py` read them. Everything here reads; nothing is stored.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import lru_cache
from typing import Any, NamedTuple

from attnbench.history.stacks import stack_key
from attnbench.store.record import Status, short_hash

#: Replicates numbered from here on re-measure a flagged point in fresh processes.
FIRST_CONFIRMATION = 100

#: What ends the commit of a run whose tree had local edits (`measure.environment` writes it).
DIRTY = "+dirty"

#: From harmless to grave. The status of a point in a run is the gravest of its rows, so that one
#: wrong output among many right ones is never hidden.
GRAVITY = (
    Status.OK,
    Status.NOISY,
    Status.UNTIMED,
    Status.THROTTLED,
    Status.UNSUPPORTED,
    Status.ERROR,
    Status.TIMEOUT,
    Status.OOM,
    Status.CRASH,
    Status.INCORRECT,
)

#: Columns that say what a series measured: equal in all of its rows.
IDENTITY = (
    "backend",
    "variant",
    "workload",
    "workload_id",
    "batch_spec",
    "shape",
    "tensor_parallel_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_size",
    "dtype",
    "kv_cache_dtype",
    "block_size",
    "phase",
    "num_reqs",
    "num_tokens",
    "bytes_moved",
    "flops",
    "device_name",
)


class SeriesKey(NamedTuple):
    """The columns of `record.SERIES_KEY`, in its order."""

    point_id: str
    metric: str
    timer: str
    l2_state: str
    execution: str
    device_class: str
    protocol_version: int

    @property
    def id(self) -> str:
        """16 hex digits, the name of the series in links."""
        return _series_id(self)


@lru_cache(maxsize=2**18)
def _series_id(key: SeriesKey) -> str:
    return short_hash("series", *(str(part) for part in key))


@dataclass(frozen=True, slots=True, kw_only=True)
class RunValue:
    """One run of a series.

    `replicates` and `confirmations` are the medians, in seconds, of the samples of each process;
    the latter of the processes that re-measured the point because it was flagged, and `references`
    of those of the build before that took turns with them. `noise` is the
    interquartile range of the samples over their median (median over the replicates).
    `is_published`: read from `results/published/`, perhaps of somebody else's machine.
    """

    run_id: str
    started_at: datetime
    status: Status
    statuses: tuple[Status, ...] = ()
    replicates: tuple[float, ...] = ()
    confirmations: tuple[float, ...] = ()
    references: tuple[float, ...] = ()
    reasons: tuple[str, ...] = ()
    suites: tuple[str, ...] = ()
    commit: str = ""
    commit_time: datetime | None = None
    stack_id: str = ""
    driver_version: str = ""
    cuda_version: str = ""
    container_digest: str = ""
    num_samples: int = 0
    noise: float | None = None
    discarded: int = 0
    stop_reasons: tuple[str, ...] = ()
    max_abs_error: float | None = None
    is_published: bool = False

    @property
    def is_timed(self) -> bool:
        return bool(self.replicates) and self.status.is_timed

    @property
    def median_s(self) -> float | None:
        """Seconds: the median over the replicates, None where nothing was timed."""
        return statistics.median(self.replicates) if self.replicates else None

    @property
    def stack_key(self) -> str:
        """What the stack axis goes by: packages, driver, CUDA and container."""
        return stack_key(
            self.stack_id, self.driver_version, self.cuda_version, self.container_digest
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """A series at one commit or one stack: the values of all runs there, oldest first."""

    label: str
    started_at: datetime
    values: tuple[RunValue, ...]

    @property
    def median_s(self) -> float | None:
        medians = [v.median_s for v in self.values if v.is_timed and v.median_s is not None]
        return statistics.median(medians) if medians else None


class Axis(StrEnum):
    """What history is drawn over."""

    COMMIT = "commit"
    STACK = "stack"


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One point and metric over runs; `values` are in order of the runs' start."""

    key: SeriesKey
    identity: Mapping[str, Any]
    values: Sequence[RunValue]

    @property
    def id(self) -> str:
        return self.key.id

    @property
    def title(self) -> str:
        """`BACKEND[variant] workload`, for people."""
        backend = self.identity["backend"]
        variant = self.identity["variant"]
        name = f"{backend}[{variant}]" if variant else str(backend)
        return f"{name} {self.identity['workload']}"

    @property
    def newest(self) -> RunValue:
        """Of one's own runs; of published ones where there is no other."""
        own = [value for value in self.values if not value.is_published]
        return own[-1] if own else self.values[-1]

    def at(self, run_id: str) -> RunValue | None:
        """The value of one run, None if the run did not plan this point."""
        return next((v for v in self.values if v.run_id == run_id), None)

    def before(self, value: RunValue) -> tuple[RunValue, ...]:
        """The values of earlier runs, oldest first."""
        mark = (value.started_at, value.run_id)
        return tuple(v for v in self.values if (v.started_at, v.run_id) < mark)

    def levels(self, axis: Axis) -> tuple[Level, ...]:
        """The series over commits (in order of commit time) or stacks (of first appearance).

        A stack that was left and came back is one level, at its first appearance.
        """
        grouped: dict[str, list[RunValue]] = defaultdict(list)
        for value in self.values:
            grouped[value.commit if axis is Axis.COMMIT else value.stack_key].append(value)
        levels = [
            Level(label=label, started_at=values[0].started_at, values=tuple(values))
            for label, values in grouped.items()
        ]
        if axis is Axis.COMMIT:
            # A commit without a time stands where it was first measured.
            levels.sort(key=lambda level: level.values[0].commit_time or level.started_at)
        return tuple(levels)


def gravest(statuses: Iterable[Status]) -> Status:
    """The status of a point whose rows have these statuses."""
    return max(statuses, key=GRAVITY.index)


def utc(at: datetime) -> datetime:
    """`at` in UTC; one without a zone is taken to be UTC already."""
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)


def moment(microseconds: int) -> datetime:
    """The time so many microseconds after the epoch."""
    return _EPOCH + timedelta(microseconds=microseconds)


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
