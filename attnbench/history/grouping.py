"""Rows of a table into groups, without a Python step per row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def encoded(column: pa.ChunkedArray | pa.Array) -> tuple[Ints, pa.Array]:
    """A number per row, and the values they number; null is a value of its own."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    coded = pc.dictionary_encode(array, null_encoding="encode")
    if isinstance(coded, pa.ChunkedArray):
        coded = coded.combine_chunks()
    return np.asarray(coded.indices).astype(np.int64), coded.dictionary


def group_numbers(table: pa.Table, names: Sequence[str]) -> tuple[Ints, Ints]:
    """Rows that are equal in the columns `names` get the same number, from 0 in no promised order.

    Also the first row of each group, in order of the table.
    """
    numbers = np.zeros(table.num_rows, np.int64)
    for name in names:
        codes, values = encoded(table[name])
        # Made dense after every column, so that the product never overflows.
        _, numbers = np.unique(numbers * max(1, len(values)) + codes, return_inverse=True)
    _, first = np.unique(numbers, return_index=True)
    return numbers.astype(np.int64), first.astype(np.int64)


def tables_by_run(table: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    """The rows of each run, in order of the table; runs in order of their first row."""
    if table.num_rows == 0:
        return
    codes, names = encoded(table["run_id"])
    order = np.argsort(codes, kind="stable")
    bounds = np.searchsorted(codes[order], np.arange(len(names) + 1))
    for run_id, start, end in zip(names.to_pylist(), bounds, bounds[1:], strict=False):
        yield run_id, table.take(pa.array(order[start:end]))


def microseconds(column: pa.ChunkedArray) -> Ints:
    """Times as microseconds of the epoch, UTC; one without a zone is taken to be UTC already."""
    kind = column.type
    zone = kind.tz if pa.types.is_timestamp(kind) else None
    whole = column.cast(pa.timestamp("us", tz=zone)).cast(pa.int64())
    return np.asarray(pc.fill_null(whole, 0).combine_chunks(), dtype=np.int64)


def floats(column: pa.ChunkedArray) -> Floats:
    """Numbers, NaN where there is none."""
    filled = pc.fill_null(column.cast(pa.float64()), float("nan"))
    return np.asarray(filled.combine_chunks(), dtype=np.float64)


def medians_of_groups(values: Floats, groups: Ints, num_groups: int) -> Floats:
    """The median of each group's values, as `statistics.median` has it; NaN of an empty group."""
    order = np.lexsort((values, groups))
    ordered = values[order]
    bounds = np.searchsorted(groups[order], np.arange(num_groups + 1))
    starts, counts = bounds[:-1], np.diff(bounds)
    result = np.full(num_groups, np.nan)
    filled = np.flatnonzero(counts)
    low = ordered[starts[filled] + (counts[filled] - 1) // 2]
    high = ordered[starts[filled] + counts[filled] // 2]
    result[filled] = np.where(counts[filled] % 2 == 1, low, (low + high) / 2)
    return result


def lists_of_groups(values: pa.Array, groups: Ints, num_groups: int) -> pa.ListArray:
    """One list per group of `values`, whose `groups` are in ascending order."""
    bounds = np.searchsorted(groups, np.arange(num_groups + 1)).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(bounds), values)
