"""Series as objects, read from a table of rows: the plain way, for tables of few rows.

`panel.py` reads the same from digests, for many; a property test holds both together.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from attnbench.history.series import (
    FIRST_CONFIRMATION,
    IDENTITY,
    RunValue,
    Series,
    SeriesKey,
    gravest,
    utc,
)
from attnbench.store.record import FIRST_REFERENCE, SERIES_KEY, Status

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
