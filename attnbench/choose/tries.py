"""Stored rows as tries: a point measured in one way in one run, by a process a replicate.

A row of Arrow is read once, and never becomes a Python object: what tells a point is looked at once
for all runs, and a row gives its status, its median and, where it has some, its reasons.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from attnbench.errors import ResultsFolderError
from attnbench.history.grouping import encoded
from attnbench.history.series_rows import sample_arrays
from attnbench.store import ResultsFolder
from attnbench.store.record import Metric, Status
from attnbench.upgrade.stored import PHYSICAL

ENGINES_OWN = ("block_size", "kv_cache_layout")
"""Columns that follow from the backend where the user asks for none: part of a choice."""

BATCH = ("batch_spec", "common_prefix_len", "lengths", "seed")
LAYER = tuple(name for name in PHYSICAL if name not in (*ENGINES_OWN, *BATCH))

Key = tuple[Any, ...]


@dataclass(frozen=True, slots=True, order=True)
class Choice:
    """What can be taken: a backend's kernels over a cache of this block size and layout."""

    backend: str
    variant: str = ""
    block_size: int = 16
    kv_cache_layout: str = "NHD"

    @property
    def request(self) -> str:
        """As `--backend` takes it."""
        return f"{self.backend}:{self.variant}" if self.variant else self.backend

    @property
    def text(self) -> str:
        """`FLASHINFER:FA3 block=32`; a block of 16 and NHD are left out."""
        words = [self.request]
        if self.block_size != 16:
            words.append(f"block={self.block_size}")
        if self.kv_cache_layout != "NHD":
            words.append(self.kv_cache_layout)
        return " ".join(words)


@dataclass(frozen=True, slots=True, order=True)
class How:
    """What must be the same for two times to be compared; the newest driver sorts last."""

    device_class: str
    timer: str
    l2_state: str
    execution: str
    driver_version: str

    @property
    def text(self) -> str:
        """`nvidia-h200, timer event, L2 cold, eager`."""
        parts = (self.device_class, f"timer {self.timer}", f"L2 {self.l2_state}", self.execution)
        return ", ".join(part for part in parts if part != "L2 ")


@dataclass(frozen=True, slots=True, eq=False)
class What:
    """What was measured, and how: the same object in every run. `workload`: as it is stored."""

    layer: Key
    batch: Key
    choice: Choice
    how: How
    workload: str
    device_kind: str
    compute_capability: str
    protocol_version: int


@dataclass(frozen=True, slots=True, eq=False)
class Try:
    """One point in one run; a replicate each in `statuses`, `seconds` (its median), `reasons`.

    `stack`: `name==version` of the packages.
    """

    what: What
    run_id: str
    started_at: datetime
    stack: tuple[str, ...]
    statuses: tuple[Status, ...]
    seconds: tuple[float, ...]
    reasons: tuple[tuple[str, ...], ...]

    @property
    def age(self) -> tuple[datetime, str]:
        """The newest sorts last."""
        return self.started_at, self.run_id


_OF_WHAT = (
    *PHYSICAL,
    *("workload", "backend", "variant", *How.__slots__),
    *("device_kind", "compute_capability", "protocol_version"),
)
COLUMNS = (
    *_OF_WHAT,
    *("run_id", "started_at", "stack", "status", "samples", "reasons"),
)


def layer_key(columns: Mapping[str, Any]) -> Key:
    return tuple(columns[name] for name in LAYER)


def batch_key(columns: Mapping[str, Any]) -> Key:
    return tuple(columns[name] for name in BATCH)


def read_tries(
    folder: ResultsFolder,
    timer: str = "",
    l2_state: str = "",
    metric: Metric = Metric.ATTENTION,
    runs: Collection[str] | None = None,
) -> list[Try]:
    """Tries of `metric`, made-up times only where timer `fake` is named; `runs`: only of these.

    A folder that is not there holds nothing.
    """
    where: dict[str, Any] = {"metric": str(metric)}
    if timer:
        where["timer"] = timer
    if l2_state:
        where["l2_state"] = l2_state
    if runs is not None:
        where["run_id"] = list(runs)
    try:
        table = folder.table(COLUMNS, where)
    except ResultsFolderError:
        if folder.path.exists():
            raise
        return []
    return tries_of(table if timer else table.filter(pc.field("timer") != "fake"))


def tries_of(table: pa.Table) -> list[Try]:
    """Tries of a table with `COLUMNS`; their order is that of their first rows."""
    if not table.num_rows:
        return []
    kinds, names = _whats(table)
    runs, run_ids = encoded(table["run_id"])
    numbers = kinds * len(run_ids) + runs
    order = np.argsort(numbers, kind="stable")
    starts = np.flatnonzero(np.diff(numbers[order], prepend=-1))
    ends = np.append(starts[1:], len(order)).tolist()
    first = order[starts]
    statuses = _decoded(table["status"], order, Status)
    seconds = sample_arrays(table["samples"])[0][order].tolist()
    reasons = _reasons(table["reasons"], order)
    started = table["started_at"].take(pa.array(first)).to_pylist()
    stacks = _stacks(table["stack"], first)
    ids = run_ids.to_pylist()
    places = zip(
        starts.tolist(),
        ends,
        kinds[first].tolist(),
        runs[first].tolist(),
        started,
        stacks,
        strict=True,
    )
    found = [
        Try(
            what=names[kind],
            run_id=ids[run],
            started_at=at,
            stack=stack,
            statuses=tuple(statuses[start:end]),
            seconds=tuple(seconds[start:end]),
            reasons=tuple(reasons[start:end]),
        )
        for start, end, kind, run, at, stack in places
    ]
    return [found[place] for place in np.argsort(first).tolist()]


def _whats(table: pa.Table) -> tuple[np.ndarray[Any, np.dtype[np.int64]], list[What]]:
    """(num_rows,) number of what each row measured, and those."""
    numbers = np.zeros(table.num_rows, dtype=np.int64)
    for name in _OF_WHAT:
        codes, values = encoded(table[name])
        if len(values) > 1:
            # Made dense after every column, so that the product never overflows.
            _, numbers = np.unique(numbers * len(values) + codes, return_inverse=True)
    _, first = np.unique(numbers, return_index=True)
    rows = table.select(_OF_WHAT).take(pa.array(first)).to_pylist()
    return numbers, [
        What(
            layer=layer_key(row),
            batch=batch_key(row),
            choice=Choice(*(row[name] for name in Choice.__slots__)),
            how=How(*(row[name] or "" for name in How.__slots__)),
            workload=row["workload"],
            device_kind=row["device_kind"],
            compute_capability=row["compute_capability"] or "",
            protocol_version=row["protocol_version"],
        )
        for row in rows
    ]


def _decoded(column: pa.ChunkedArray, order: Any, kind: type[Status]) -> list[Status]:
    codes, values = encoded(column)
    known = [kind(value) for value in values.to_pylist()]
    return [known[code] for code in codes[order].tolist()]


def _reasons(column: pa.ChunkedArray, order: Any) -> list[tuple[str, ...]]:
    """Of each row in `order`; most have none, and are not looked at."""
    array = column.combine_chunks()
    counts = np.asarray(pc.fill_null(pc.list_value_length(array), 0))
    found: list[tuple[str, ...]] = [()] * len(counts)
    some = np.flatnonzero(counts)
    for place, texts in zip(some.tolist(), array.take(pa.array(some)).to_pylist(), strict=True):
        found[place] = tuple(texts)
    return [found[place] for place in order.tolist()]


def _stacks(column: pa.ChunkedArray, places: Sequence[int] | Any) -> Iterable[tuple[str, ...]]:
    """Of the rows at `places`: few stacks are many rows'."""
    lists = column.take(pa.array(places)).combine_chunks()
    codes, _ = encoded(pc.binary_join(lists, "\n"))
    _, first = np.unique(codes, return_index=True)
    known = [tuple(one or ()) for one in lists.take(pa.array(first)).to_pylist()]
    return [known[code] for code in codes.tolist()]
