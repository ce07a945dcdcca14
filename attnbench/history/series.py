"""From the table of rows to series: one point and metric over runs, commits or stacks.

A table has the columns of `store/record.py`. Everything here reads; nothing is stored.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from attnbench.history.stacks import stack_key
from attnbench.store.record import FIRST_REFERENCE, SERIES_KEY, Status, short_hash

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

_PER_ROW = (
    "run_id",
    "replicate",
    "status",
    "reasons",
    "suite",
    "stop_reason",
    "discarded",
    "started_at",
    "commit",
    "commit_time",
    "stack_id",
    "driver_version",
    "max_abs_error",
)

#: Facts of a run beside its packages and driver that its stack is told apart by.
_STACK_FACTS = ("cuda_version", "container_digest")


#: What this room reads of a table; `verdict.NEEDED_COLUMNS` adds what it needs of the runs.
SERIES_COLUMNS = tuple(dict.fromkeys((*SERIES_KEY, *IDENTITY, *_PER_ROW, *_STACK_FACTS, "samples")))


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
        return short_hash("series", *(str(part) for part in self))


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


def series_of(
    table: pa.Table, metrics: Sequence[str] | None = None, published: Collection[str] = ()
) -> list[Series]:
    """All series of `table`, sorted by title and key. `published` are ids of published runs.

    A row that carries no samples may not know its timer (a refused point was never timed). It
    joins the series of its exact key if there is one, else every timed series of its point, metric
    and device: so a series shows that it stopped being supported.

    Of the build before, which took turns with a run, only its times count, as `references`.
    """
    table, other = split_references(table)
    starts, facts = _run_starts(table), _stack_facts(table)
    if metrics is not None:
        table = table.filter(pc.is_in(table["metric"], pa.array(list(metrics), pa.string())))
    references = _references(other)
    if table.num_rows == 0:
        return []
    table = with_times_only(table)
    keys = [SeriesKey(*row) for row in zip(*_lists(table, SERIES_KEY), strict=True)]
    columns = dict(zip(_PER_ROW, _lists(table, _PER_ROW), strict=True))
    statuses = [Status(text) for text in columns["status"]]
    medians, noise, counts = sample_statistics(table["samples"])

    members: dict[SeriesKey, list[int]] = defaultdict(list)
    of_point: dict[tuple[str, str, str], set[SeriesKey]] = defaultdict(set)
    for row, key in enumerate(keys):
        if statuses[row].is_timed:
            members[key].append(row)
            of_point[key.point_id, key.metric, key.device_class].add(key)
    for row, key in enumerate(keys):
        if not statuses[row].is_timed:
            timed = of_point.get((key.point_id, key.metric, key.device_class), set())
            for target in [key] if key in timed or not timed else timed:
                members[target].append(row)

    first_rows = [rows[0] for rows in members.values()]
    identities = table.select(IDENTITY).take(pa.array(first_rows, pa.int64())).to_pylist()
    result = []
    for (key, rows), identity in zip(members.items(), identities, strict=True):
        by_run: dict[str, list[int]] = defaultdict(list)
        for row in rows:
            by_run[columns["run_id"][row]].append(row)
        values = []
        for run_id, run_rows in by_run.items():
            ordered = _in_order(run_rows, key, keys, columns)
            value = _run_value(ordered, columns, statuses, medians, noise, counts)
            joined = sorted({keys[row] for row in run_rows} - {key})
            theirs = [key, *joined] if any(keys[row] == key for row in run_rows) else joined
            beside = tuple(v for one in theirs for v in references.get((one, run_id), ()))
            values.append(replace(value, references=beside))
        values.sort(key=lambda v: (v.started_at, v.run_id))
        result.append(Series(key=key, identity=identity, values=tuple(values)))
    _complete(result, starts, facts, published)
    result.sort(key=lambda s: (s.title, s.key))
    return result


def split_references(table: pa.Table) -> tuple[pa.Table, pa.Table]:
    """The rows of the runs' own builds, and those of the builds before that took turns with them.

    `table` has a column `replicate`.
    """
    is_other = pc.greater_equal(table["replicate"], FIRST_REFERENCE)
    if not pc.any(is_other).as_py():
        return table, table.slice(0, 0)
    return table.filter(pc.invert(is_other)), table.filter(is_other)


def _references(table: pa.Table) -> dict[tuple[SeriesKey, str], list[float]]:
    """Seconds per process of the build before, by series and run, in order of the replicates."""
    found: dict[tuple[SeriesKey, str], list[float]] = defaultdict(list)
    table = table.sort_by("replicate")
    keys = zip(*_lists(table, SERIES_KEY), strict=True)
    medians, _, _ = sample_statistics(table["samples"])
    rows = zip(keys, *_lists(table, ("run_id", "status")), medians, strict=True)
    for key, run_id, status, median in rows:
        if median is not None and Status(status).is_timed:
            found[SeriesKey(*key), run_id].append(median)
    return found


def with_times_only(table: pa.Table) -> pa.Table:
    """`table`, its rows with a sample that is no time (NaN, infinite, zero or less) as ERROR.

    `append` stores none; a file from elsewhere may have one, which is neither a quiet night nor a
    level of later ones.
    """
    samples = table["samples"].combine_chunks()
    flat = np.asarray(pc.list_flatten(samples), dtype=np.float64)
    bad = ~(np.isfinite(flat) & (flat > 0))
    if not bad.any():
        return table
    rows = np.zeros(table.num_rows, bool)
    rows[np.asarray(pc.list_parent_indices(samples))[bad]] = True
    mask = pa.array(rows)
    for name, value in (
        ("status", str(Status.ERROR)),
        ("samples", []),
        ("reasons", ["a stored sample is not a time above zero"]),
    ):
        column = table[name].combine_chunks()
        filled = pc.if_else(mask, pa.scalar(value, column.type), column)
        table = table.set_column(table.column_names.index(name), table.schema.field(name), filled)
    return table


def sample_statistics(
    samples: pa.ChunkedArray,
) -> tuple[list[float | None], list[float | None], list[int]]:
    """Per row: median in seconds, interquartile range over the median, number of samples."""
    medians, noise, counts = sample_arrays(samples)
    listed: list[int] = counts.tolist()
    return (
        [value if n else None for value, n in zip(medians.tolist(), listed, strict=True)],
        [None if math.isnan(value) else value for value in noise.tolist()],
        listed,
    )


def sample_arrays(samples: pa.ChunkedArray) -> tuple[Any, Any, Any]:
    """`sample_statistics` as numpy arrays; NaN where it says None."""
    column = samples.combine_chunks() if isinstance(samples, pa.ChunkedArray) else samples
    counts = np.asarray(pc.fill_null(pc.list_value_length(column), 0), dtype=np.int64)
    flat = np.asarray(pc.list_flatten(column), dtype=np.float64)
    starts = np.concatenate(([0], np.cumsum(counts)))[:-1]
    medians = np.full(len(counts), np.nan)
    noise = np.full(len(counts), np.nan)
    # A sample may be inf or NaN, and its row's numbers then are.
    # Rows of one length make a rectangle: one call per length instead of one per row.
    for count in np.unique(counts[counts > 0]):
        rows = np.flatnonzero(counts == count)
        block = flat[starts[rows][:, None] + np.arange(count)]
        with np.errstate(invalid="ignore"):
            low, middle, high = np.percentile(block, (25, 50, 75), axis=1)
            medians[rows] = middle
            known = middle > 0
            noise[rows[known]] = (high[known] - low[known]) / middle[known]
    return medians, noise, counts


def gravest(statuses: Iterable[Status]) -> Status:
    """The status of a point whose rows have these statuses."""
    return max(statuses, key=GRAVITY.index)


def _lists(table: pa.Table, names: Sequence[str]) -> list[list[Any]]:
    return [table[name].to_pylist() for name in names]


def _in_order(
    rows: Sequence[int],
    own: SeriesKey,
    keys: Sequence[SeriesKey],
    columns: Mapping[str, Sequence[Any]],
) -> list[int]:
    """By replicate; of one replicate, rows of the series' own key before those that joined it."""
    return sorted(rows, key=lambda row: (columns["replicate"][row], keys[row] != own, keys[row]))


def _run_value(
    rows: Sequence[int],
    columns: Mapping[str, Sequence[Any]],
    statuses: Sequence[Status],
    medians: Sequence[float | None],
    noise: Sequence[float | None],
    counts: Sequence[int],
) -> RunValue:
    first: list[float] = []
    again: list[float] = []
    for row in rows:
        median = medians[row]
        if median is not None and statuses[row].is_timed:
            is_confirmation = columns["replicate"][row] >= FIRST_CONFIRMATION
            (again if is_confirmation else first).append(median)
    spreads = [n for row in rows if (n := noise[row]) is not None]
    errors = [e for row in rows if (e := columns["max_abs_error"][row]) is not None]
    head = rows[0]
    return RunValue(
        run_id=columns["run_id"][head],
        started_at=utc(min(columns["started_at"][row] for row in rows)),
        status=gravest(statuses[row] for row in rows),
        statuses=tuple(statuses[row] for row in rows),
        replicates=tuple(first),
        confirmations=tuple(again),
        reasons=_unique(reason for row in rows for reason in columns["reasons"][row] or ()),
        suites=_unique(columns["suite"][row] for row in rows),
        commit=columns["commit"][head] or "",
        commit_time=utc(columns["commit_time"][head]) if columns["commit_time"][head] else None,
        stack_id=columns["stack_id"][head] or "",
        driver_version=columns["driver_version"][head] or "",
        num_samples=sum(counts[row] for row in rows),
        noise=statistics.median(spreads) if spreads else None,
        discarded=sum(columns["discarded"][row] or 0 for row in rows),
        stop_reasons=_unique(columns["stop_reason"][row] for row in rows),
        max_abs_error=max(errors) if errors else None,
    )


def _run_starts(table: pa.Table) -> dict[str, datetime]:
    """Of all rows of a run, so that its start does not depend on which metrics are looked at."""
    starts: dict[str, datetime] = {}
    for run_id, at in zip(*_lists(table, ("run_id", "started_at")), strict=True):
        start = utc(at)
        if run_id not in starts or start < starts[run_id]:
            starts[run_id] = start
    return starts


def _stack_facts(table: pa.Table) -> dict[str, tuple[str, str]]:
    """CUDA version and container of each run, as its first row has them."""
    facts: dict[str, tuple[str, str]] = {}
    for run_id, cuda, container in zip(*_lists(table, ("run_id", *_STACK_FACTS)), strict=True):
        facts.setdefault(run_id, (cuda or "", container or ""))
    return facts


def _complete(
    series: list[Series],
    starts: Mapping[str, datetime],
    facts: Mapping[str, tuple[str, str]],
    published: Collection[str],
) -> None:
    """Give every value the start of its run, so that all series order the runs alike, the rest of
    its stack, and whether that run is a published one."""
    for i, one in enumerate(series):
        values = [
            replace(
                v,
                started_at=starts[v.run_id],
                is_published=v.run_id in published,
                cuda_version=facts[v.run_id][0],
                container_digest=facts[v.run_id][1],
            )
            for v in one.values
        ]
        values.sort(key=lambda v: (v.started_at, v.run_id))
        series[i] = replace(one, values=tuple(values))


def _unique(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(value for value in values if value))


def utc(at: datetime) -> datetime:
    """`at` in UTC; one without a zone is taken to be UTC already."""
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)


def moment(microseconds: int) -> datetime:
    """The time so many microseconds after the epoch."""
    return _EPOCH + timedelta(microseconds=microseconds)


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
