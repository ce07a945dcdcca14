"""The digest of a run: one row per series, everything a `RunValue` holds, without the samples.

A digest follows from the rows of its run alone. What a row without a time belongs to depends on
other runs as well (`series_of`), so a digest keeps rows of different keys apart; `panel.py` joins
them. Made with Arrow and numpy: no Python step per row.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from attnbench.history.grouping import (
    Floats,
    Ints,
    encoded,
    floats,
    group_numbers,
    lists_of_groups,
    medians_of_groups,
)
from attnbench.history.runs import RunSummary, from_json, summary_of_run, to_json
from attnbench.history.series import DIRTY, FIRST_CONFIRMATION, GRAVITY, IDENTITY, SeriesKey
from attnbench.history.series_rows import sample_arrays, split_references, with_times_only
from attnbench.store.record import SERIES_KEY, Status
from attnbench.store.schema import SCHEMA

#: Raised by every change of what a digest holds: older ones are made again.
DIGEST_VERSION = 2

_SUMMARY_KEY = b"attnbench.run_summary"

#: Columns of a digest that are texts of the run's rows: the distinct ones, each with the replicate
#: it was first seen in, for they are told in order of replicates.
TEXTS = {"reasons": "reasons", "suites": "suite", "stop_reasons": "stop_reason"}

#: Those of the first replicate's row.
HEAD = ("commit", "commit_time", "stack_id", "driver_version")

#: What the dense arrays of a panel are made of.
CORE = (
    "series",
    "status",
    "has_timed_row",
    "is_dirty",
    "median_s",
    "num_replicates",
    "num_confirmations",
)

#: What a `RunValue` is made of, the core aside.
DETAILS = (
    "replicate",
    "statuses",
    "replicates",
    "confirmations",
    "references",
    *TEXTS,
    *(f"{name}_at" for name in TEXTS),
    *HEAD,
    "num_samples",
    "noise",
    "discarded",
    "max_abs_error",
)

_INTS = pa.list_(pa.int32())
_SECONDS = pa.list_(pa.float64())

DIGEST_SCHEMA = pa.schema(
    [
        ("series", pa.uint64()),  # the key's id, as a number; rows are in its order
        ("status", pa.int8()),  # the gravest, a position in GRAVITY
        ("has_timed_row", pa.bool_()),
        ("is_dirty", pa.bool_()),  # the commit is that of a tree with local edits
        ("median_s", pa.float64()),  # over the replicates; NaN without any
        ("num_replicates", pa.int32()),
        ("num_confirmations", pa.int32()),
        ("replicate", _INTS),  # of each row, ascending
        ("statuses", pa.list_(pa.int8())),
        ("replicates", _SECONDS),
        ("confirmations", _SECONDS),
        ("references", _SECONDS),
        *((name, pa.list_(pa.string())) for name in TEXTS),
        *((f"{name}_at", _INTS) for name in TEXTS),
        *((name, SCHEMA.field(name).type) for name in HEAD),
        ("num_samples", pa.int64()),
        ("noise", pa.float64()),  # NaN: unknown
        ("discarded", pa.int64()),
        ("max_abs_error", pa.float64()),  # NaN: unknown
        *((name, SCHEMA.field(name).type) for name in (*SERIES_KEY, *IDENTITY)),
    ]
)


def digest_of(run_id: str, rows: pa.Table) -> pa.Table:
    """The digest of one run: a table of DIGEST_SCHEMA, in order of `series`.

    `rows` are all rows of the run with the columns `verdict.NEEDED_COLUMNS`; one or more are of its
    own build.
    """
    rows, other = split_references(with_times_only(rows))
    summary = to_json(summary_of_run(run_id, rows))
    groups, first = group_numbers(rows, SERIES_KEY)
    ids = series_numbers(rows.select(SERIES_KEY).take(pa.array(first)))
    # Groups in order of their series' number from here on.
    rank = np.empty(len(ids), np.int64)
    rank[np.argsort(ids)] = np.arange(len(ids))
    groups, count = rank[groups], len(ids)

    codes, names = encoded(rows["status"])
    statuses = [Status(name) for name in names.to_pylist()]
    grave = np.array([GRAVITY.index(status) for status in statuses], np.int8)[codes]
    timed = np.array([status.is_timed for status in statuses])[codes]
    replicate = np.asarray(rows["replicate"].combine_chunks(), dtype=np.int64)
    medians, noise, counts = sample_arrays(rows["samples"])
    discarded, errors = floats(rows["discarded"]), floats(rows["max_abs_error"])

    # All arrays by series, then replicate, from here on; `order` points into the rows.
    order = np.lexsort((replicate, groups))
    groups, grave, timed, replicate = groups[order], grave[order], timed[order], replicate[order]
    medians, noise, counts = medians[order], noise[order], counts[order]
    is_first_look = timed & (counts > 0) & (replicate < FIRST_CONFIRMATION)
    is_again = timed & (counts > 0) & (replicate >= FIRST_CONFIRMATION)
    known_noise = ~np.isnan(noise)
    columns: dict[str, pa.Array] = {
        "series": pa.array(np.sort(ids)),
        "status": pa.array(_largest(grave, groups, count)),
        "has_timed_row": pa.array(_sums(timed, groups, count) > 0),
        "median_s": pa.array(
            medians_of_groups(medians[is_first_look], groups[is_first_look], count)
        ),
        "num_replicates": pa.array(_sums(is_first_look, groups, count), pa.int32()),
        "num_confirmations": pa.array(_sums(is_again, groups, count), pa.int32()),
        "replicate": lists_of_groups(pa.array(replicate, pa.int32()), groups, count),
        "statuses": lists_of_groups(pa.array(grave, pa.int8()), groups, count),
        "num_samples": pa.array(_sums(counts, groups, count)),
        "noise": pa.array(medians_of_groups(noise[known_noise], groups[known_noise], count)),
        "discarded": pa.array(_sums(discarded[order], groups, count)),
        "max_abs_error": pa.array(_largest_known(errors[order], groups, count)),
    }
    for name, chosen in (("replicates", is_first_look), ("confirmations", is_again)):
        columns[name] = lists_of_groups(pa.array(medians[chosen]), groups[chosen], count)
    columns["references"] = _references(other, np.sort(ids))
    for name, column in TEXTS.items():
        texts, seen_at = _texts(rows[column], order, groups, replicate, count)
        columns[name], columns[f"{name}_at"] = texts, seen_at
    starts = np.searchsorted(groups, np.arange(count))
    heads = pa.array(order[starts])
    for name in HEAD:
        column = rows[name].take(heads).combine_chunks()
        columns[name] = pc.fill_null(column, "") if pa.types.is_string(column.type) else column
    columns["is_dirty"] = pc.ends_with(columns["commit"], DIRTY)
    # A timed row knows what was measured: bytes and FLOPs, where a refused one may not.
    by_timed = np.lexsort((np.arange(len(groups)), ~timed, groups))
    knowing = pa.array(order[by_timed[starts]])
    described = rows.select((*SERIES_KEY, *IDENTITY)).take(knowing)
    for name in described.column_names:
        columns[name] = described[name].combine_chunks()
    arrays = [columns[field.name].cast(field.type) for field in DIGEST_SCHEMA]
    table = pa.Table.from_arrays(arrays, schema=DIGEST_SCHEMA)
    return table.replace_schema_metadata({_SUMMARY_KEY: summary.encode()})


def summary_of_digest(digest: pa.Table) -> RunSummary:
    """The run's summary. Raises ValueError, KeyError or TypeError where it lacks one."""
    return from_json((digest.schema.metadata or {})[_SUMMARY_KEY].decode())


def series_numbers(keys: pa.Table) -> NDArray[np.uint64]:
    """`SeriesKey.id` of each row of a table of SERIES_KEY, as a number."""
    global _newest
    last_keys, last_numbers = _newest
    if last_keys is not None and keys.equals(last_keys):
        return last_numbers
    columns = [keys[name].to_pylist() for name in SERIES_KEY]
    ids = [SeriesKey(*key).id for key in zip(*columns, strict=True)]
    numbers = np.array([int(text, 16) for text in ids], dtype=np.uint64)
    _newest = keys, numbers
    return numbers


#: The keys of the newest run and their numbers: the nights of a history measure the same series.
_newest: tuple[pa.Table | None, NDArray[np.uint64]] = (None, np.empty(0, np.uint64))


def _references(rows: pa.Table, ids: NDArray[np.uint64]) -> pa.ListArray:
    """Of each series, the seconds per process of the build before, in order of the replicates."""
    codes, names = encoded(rows["status"])
    timed = np.array([Status(name).is_timed for name in names.to_pylist()], bool)[codes]
    medians, _, counts = sample_arrays(rows["samples"])
    groups, first = group_numbers(rows, SERIES_KEY)
    keys = rows.select(SERIES_KEY).take(pa.array(first)).to_pylist()
    own = np.array([int(SeriesKey(**key).id, 16) for key in keys], np.uint64)
    place = np.minimum(np.searchsorted(ids, own), len(ids) - 1)
    place = np.where(ids[place] == own, place, -1)[groups] if len(own) else groups
    order = np.lexsort((np.asarray(rows["replicate"].combine_chunks(), dtype=np.int64), place))
    order = order[(timed & (counts > 0) & (place >= 0))[order]]
    return lists_of_groups(pa.array(medians[order]), place[order], len(ids))


def _sums(values: NDArray[np.generic], groups: Ints, count: int) -> Ints:
    return np.rint(np.bincount(groups, weights=values, minlength=count)).astype(np.int64)


def _largest(values: NDArray[np.int8], groups: Ints, count: int) -> NDArray[np.int8]:
    return np.maximum.reduceat(values, np.searchsorted(groups, np.arange(count)))


def _largest_known(values: Floats, groups: Ints, count: int) -> Floats:
    """Of each group, NaN aside; NaN where there is nothing else."""
    filled = np.where(np.isnan(values), -np.inf, values)
    largest = np.maximum.reduceat(filled, np.searchsorted(groups, np.arange(count)))
    return np.where(np.isneginf(largest), np.nan, largest)


def _texts(
    column: pa.ChunkedArray, order: Ints, groups: Ints, replicate: Ints, count: int
) -> tuple[pa.ListArray, pa.ListArray]:
    """The distinct texts of each group that are not empty, in order, and where each was first."""
    array = column.combine_chunks()
    parents = np.arange(len(array))
    if not pa.types.is_list(array.type):
        codes, words = encoded(array)
        codes = codes[order]
    else:
        array = array.take(pa.array(order))
        parents = np.asarray(pc.list_parent_indices(array), dtype=np.int64)
        codes, words = encoded(pc.list_flatten(array))
    full = np.array([bool(word) for word in words.to_pylist()], bool)
    kept = np.flatnonzero(full[codes]) if len(codes) else np.empty(0, np.int64)
    pairs = groups[parents[kept]] * max(1, len(words)) + codes[kept]
    _, first = np.unique(pairs, return_index=True)
    chosen = kept[np.sort(first)]
    own = parents[chosen]
    texts = pa.array(words.take(pa.array(codes[chosen])), pa.string())
    return (
        lists_of_groups(texts, groups[own], count),
        lists_of_groups(pa.array(replicate[own], pa.int32()), groups[own], count),
    )
