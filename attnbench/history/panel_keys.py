"""The keys that the runs of a history have: what they stand for, which are series, their order.

The rules are those of `series_rows.series_of`: rows without a time join the timed series of their
point, and series are ordered by title, then key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from attnbench.history.digest import DIGEST_SCHEMA
from attnbench.history.digests import Digest
from attnbench.history.grouping import Ints, group_numbers
from attnbench.history.series import IDENTITY
from attnbench.store.record import SERIES_KEY


def described_keys(
    digests: Sequence[Digest], cores: Sequence[pa.Table], numbers: Sequence[NDArray[np.uint64]]
) -> tuple[NDArray[np.uint64], pa.Table]:
    """Every key of any run by its number, ascending, with what it stands for and `is_timed`.

    Described by the first run that timed it, else by the first that has it.
    """
    columns = (*SERIES_KEY, *IDENTITY)
    known = np.unique(np.concatenate([np.empty(0, np.uint64), *numbers]))
    is_timed = np.zeros(len(known), bool)
    described_by = np.full((2, len(known)), -1, np.int64)  # by a timed run, by any
    for run in reversed(range(len(digests))):
        at = np.searchsorted(known, numbers[run])
        timed = at[np.asarray(cores[run]["has_timed_row"], dtype=bool)]
        is_timed[timed] = True
        described_by[1, at] = run
        described_by[0, timed] = run
    chosen = np.where(described_by[0] >= 0, described_by[0], described_by[1])
    empty = pa.schema([DIGEST_SCHEMA.field(name) for name in columns]).empty_table()
    tables, order = [empty], [np.empty(0, np.int64)]
    for run in np.unique(chosen).tolist():
        own = np.flatnonzero(chosen == run)
        rows = np.searchsorted(numbers[run], known[own])
        tables.append(digests[run].read(columns).take(pa.array(rows)).replace_schema_metadata())
        order.append(own)
    together = pa.concat_tables(tables)
    described = together.take(pa.array(np.argsort(np.concatenate(order))))
    return known, described.append_column("is_timed", pa.array(is_timed))


def targets(described: pa.Table) -> tuple[NDArray[np.bool_], dict[int, list[int]]]:
    """Which keys are series, and of each other key the timed ones that its rows join."""
    is_timed = np.asarray(described["is_timed"].combine_chunks(), dtype=bool)
    points, _ = group_numbers(described, ("point_id", "metric", "device_class"))
    timed_points = np.zeros(int(points.max(initial=-1)) + 1, bool)
    timed_points[points[is_timed]] = True
    is_series = is_timed | ~timed_points[points]
    joins: dict[int, list[int]] = {}
    members: dict[int, list[int]] = {}
    for index in np.flatnonzero(is_timed & np.isin(points, points[~is_series])).tolist():
        members.setdefault(int(points[index]), []).append(index)
    for index in np.flatnonzero(~is_series).tolist():
        joins[index] = members[int(points[index])]
    return is_series, joins


def key_ranks(described: pa.Table, joins: Mapping[int, Sequence[int]]) -> dict[int, int]:
    """The order of the keys whose rows join others."""
    chosen = described.select(SERIES_KEY).take(pa.array(list(joins), pa.int64())).to_pylist()
    keys = dict(zip(joins, (tuple(row.values()) for row in chosen), strict=True))
    return {index: rank for rank, index in enumerate(sorted(keys, key=keys.__getitem__))}


def in_order(described: pa.Table, is_series: NDArray[np.bool_]) -> Ints:
    """The series by title, then key: `Series.title` for all of them at once."""
    chosen = np.flatnonzero(is_series)
    own = described.take(pa.array(chosen))
    variant = own["variant"]
    bracketed = pc.binary_join_element_wise("[", variant, "]", "")
    shown = pc.if_else(pc.equal(variant, ""), "", bracketed)
    title = pc.binary_join_element_wise(
        pc.binary_join_element_wise(own["backend"], shown, ""), own["workload"], " "
    )
    columns = [title.to_pylist(), *(own[name].to_pylist() for name in SERIES_KEY)]
    ranked = sorted(range(len(chosen)), key=list(zip(*columns, strict=True)).__getitem__)
    return np.asarray(chosen[np.array(ranked, np.int64)], dtype=np.int64)
