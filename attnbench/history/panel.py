"""A history as dense arrays, series by runs; objects are made of the few values that are looked at.

`Panel.of(folder)` reads the digests of the runs (`digest.py`), not their samples. The values it
gives are those of `series_of`, which stays the rule in words and the oracle of the tests.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from attnbench.history.digest import CORE, DETAILS, digest_of, summary_of_digest
from attnbench.history.digests import Digest, Digests, HeldDigest
from attnbench.history.grouping import Floats, Ints, tables_by_run
from attnbench.history.panel_keys import described_keys, in_order, key_ranks, targets
from attnbench.history.run_values import Part, run_value
from attnbench.history.runs import RunSummary
from attnbench.history.series import GRAVITY, IDENTITY, RunValue, Series, SeriesKey
from attnbench.history.series_rows import split_references
from attnbench.store import ResultsFolder
from attnbench.store.record import SERIES_KEY
from attnbench.store.sources import RunSource

#: `Panel.status` where the run did not plan the point.
NOT_PLANNED = -1

#: Codes of `Panel.status` from here on are not timed.
_TIMED_CODES = sum(status.is_timed for status in GRAVITY)


@dataclass(frozen=True, slots=True)
class _Joined:
    """Rows without a time that joined the timed series of their point, in one run."""

    series: Ints
    rows: Ints  # of the run's digest


class LazyValues(Sequence[RunValue]):
    """The values of one series, read when the first of them is looked at."""

    __slots__ = ("_loaded", "_panel", "_series")

    def __init__(self, panel: Panel, series: int) -> None:
        self._panel = panel
        self._series = series
        self._loaded: tuple[RunValue, ...] | None = None

    def _all(self) -> tuple[RunValue, ...]:
        if self._loaded is None:
            (self._loaded,) = self._panel.values([self._series])
        return self._loaded

    def __len__(self) -> int:
        return int(self._panel.num_values[self._series])

    @overload
    def __getitem__(self, index: int) -> RunValue: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[RunValue, ...]: ...
    def __getitem__(self, index: int | slice) -> RunValue | tuple[RunValue, ...]:
        return self._all()[index]

    def __iter__(self) -> Iterator[RunValue]:
        return iter(self._all())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (tuple, LazyValues)) and self._all() == tuple(other)

    def __hash__(self) -> int:
        return hash(self._all())


@dataclass(frozen=True, eq=False, kw_only=True)
class Panel:
    """All series of a history over all of its runs. Arrays are [num_series, num_runs].

    Attributes:
        runs: ordered by (started_at, run_id): the columns.
        keys: the rows, in the order of `series_of`: by title, then key.
        identity: a table of IDENTITY, one row per series.
        status: the gravest, a position in `series.GRAVITY`; NOT_PLANNED: no row.
        log_s: natural logarithm of the median over the replicates, in seconds; NaN where nothing
            was timed, or not to a number above 0.
        num_replicates: processes that timed the point at first look.
        num_confirmations: fresh processes that timed it again.
        is_dirty: measured in a tree with local edits.
        is_published: per run, whether it was read from `published/`.
    """

    runs: tuple[RunSummary, ...]
    keys: tuple[SeriesKey, ...]
    identity: pa.Table
    status: NDArray[np.int8]
    log_s: Floats
    num_replicates: NDArray[np.int16]
    num_confirmations: NDArray[np.int16]
    is_dirty: NDArray[np.bool_]
    is_published: NDArray[np.bool_]
    _rows: NDArray[np.int32]  # of each run's digest; -1: none under the series' own key
    _joined: Mapping[int, _Joined]  # by run
    _digests: tuple[Digest, ...] = field(repr=False)
    _sources: tuple[RunSource | pa.Table, ...] = field(repr=False)
    _folder: ResultsFolder | None = None
    _kept: Digests | None = None

    @classmethod
    def of(cls, folder: ResultsFolder) -> Panel:
        """All runs of `folder` that ended. Raises as `ResultsFolder.table` does."""
        kept = Digests(folder.path)
        with folder.reading() as sources:
            found = kept.of(sources)
            published = {source.run_id for source, _, _ in found if source.is_published}
            return _build(found, published, folder, kept)

    @classmethod
    def of_table(cls, table: pa.Table, published: Collection[str] = ()) -> Panel:
        """The runs of `table`, which has the columns `runs.NEEDED_COLUMNS`."""
        found: list[tuple[pa.Table, Digest, pa.Table]] = []
        for run_id, own in tables_by_run(table):
            if split_references(own)[0].num_rows == 0:
                continue
            digest = digest_of(run_id, own)
            held = HeldDigest(digest, summary_of_digest(digest))
            found.append((own, held, held.read(CORE)))
        return _build(found, published)

    @property
    def num_series(self) -> int:
        return len(self.keys)

    @property
    def num_runs(self) -> int:
        return len(self.runs)

    @cached_property
    def num_values(self) -> Ints:
        """Per series, how many runs planned it."""
        return np.asarray((self.status != NOT_PLANNED).sum(axis=1), dtype=np.int64)

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """`SeriesKey.id` of each series."""
        return tuple(key.id for key in self.keys)

    @cached_property
    def newest(self) -> Ints:
        """Per series, the run of `Series.newest`: of one's own runs where there is one."""
        planned = self.status != NOT_PLANNED
        own = planned & ~self.is_published
        chosen = np.where(own.any(axis=1)[:, None], own, planned)
        return np.asarray(self.num_runs - 1 - chosen[:, ::-1].argmax(axis=1), dtype=np.int64)

    @cached_property
    def _index(self) -> dict[SeriesKey, int]:
        return {key: index for index, key in enumerate(self.keys)}

    @cached_property
    def _run_numbers(self) -> dict[str, int]:
        return {run.run_id: number for number, run in enumerate(self.runs)}

    def index_of(self, key: SeriesKey) -> int:
        """The row of a series. Raises KeyError for one that is not there."""
        return self._index[key]

    def run_number(self, run_id: str) -> int:
        """The column of a run. Raises KeyError for one that is not there."""
        return self._run_numbers[run_id]

    def with_metrics(self, metrics: Collection[str]) -> Ints:
        """The series of these metrics."""
        return np.flatnonzero([key.metric in metrics for key in self.keys]).astype(np.int64)

    @cached_property
    def _identities(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.identity.to_pylist()
        return rows

    @cached_property
    def _outlines(self) -> tuple[Series, ...]:
        return tuple(
            Series(key=key, identity=identity, values=LazyValues(self, index))
            for index, (key, identity) in enumerate(zip(self.keys, self._identities, strict=True))
        )

    def outline(self, index: int) -> Series:
        """The series, its values read when they are looked at: cheap for all of them."""
        return self._outlines[index]

    def series(self, index: int) -> Series:
        """The series with its values, equal to that of `series_of`."""
        return self.all_series([index])[0]

    def all_series(self, indices: Sequence[int] | Ints) -> list[Series]:
        """Several at once: every run is read once for all of them."""
        return [
            Series(key=self.keys[index], identity=self._identities[index], values=values)
            for index, values in zip(indices, self.values(indices), strict=True)
        ]

    def values(
        self, indices: Sequence[int] | Ints, wanted: NDArray[np.bool_] | None = None
    ) -> list[tuple[RunValue, ...]]:
        """The values of each of the series `indices`; `wanted` [num_indices, num_runs]: only those.

        Raises ResultsFolderError if the results changed since the panel was made.
        """
        chosen = np.asarray(indices, dtype=np.int64)
        planned = self.status[chosen] != NOT_PLANNED
        found: list[list[RunValue]] = [[] for _ in range(len(chosen))]
        read = planned if wanted is None else planned & wanted
        for run in np.flatnonzero(read.any(axis=0)).tolist():
            places = np.flatnonzero(read[:, run])
            for place, value in zip(places, self.values_of_run(chosen[places], run), strict=True):
                found[place].append(value)
        return [tuple(values) for values in found]

    def values_of_run(self, indices: Ints, run: int) -> list[RunValue]:
        """One run's value of each of the series `indices`, all of which it planned."""
        if len(indices) == 0:
            return []
        parts = self.parts_of_run(indices, run)
        wanted = np.unique(np.concatenate([np.asarray(p, dtype=np.int64) for p in parts]))
        rows = self._digests[run].read(DETAILS).take(pa.array(wanted)).to_pylist()
        part_of = {int(row): Part.of(values) for row, values in zip(wanted, rows, strict=True)}
        summary = self.runs[run]
        is_published = bool(self.is_published[run])
        return [run_value(summary, is_published, [part_of[row] for row in own]) for own in parts]

    def parts_of_run(self, indices: Ints, run: int) -> list[list[int]]:
        """Rows of the run's digest that make each series' value: its own, then joined ones."""
        parts = [[row] if row >= 0 else [] for row in self._rows[indices, run].tolist()]
        if run in self._joined:
            joined = self._joined[run]
            place = {int(index): number for number, index in enumerate(indices)}
            for series, row in zip(joined.series.tolist(), joined.rows.tolist(), strict=True):
                if series in place:
                    parts[place[series]].append(row)
        return parts

    def own_rows(self, run: int) -> NDArray[np.int32]:
        """Per series, the row of the run's digest under the series' own key; -1: none."""
        return np.ascontiguousarray(self._rows[:, run])

    def joined_series(self, run: int) -> Ints:
        """The series that rows without a time joined in this run."""
        return np.unique(self._joined[run].series) if run in self._joined else np.empty(0, np.int64)

    def digest(self, run: int, columns: Sequence[str]) -> pa.Table:
        """Columns of the digest of a run, in the order that `own_rows` points into."""
        return self._digests[run].read(columns)

    def stamp(self, run: int) -> str:
        """Changes when the run's stored rows do; "" where that is not known."""
        return self._digests[run].stamp

    def rows(self, run: int, columns: Sequence[str]) -> pa.Table:
        """The stored rows of a run. Raises as `ResultsFolder.table` does."""
        source = self._sources[run]
        if isinstance(source, pa.Table):
            return source.select(list(columns))
        assert self._folder is not None
        with self._folder.reading_lock():
            return source.read(columns)


def _build(
    found: Sequence[tuple[RunSource | pa.Table, Digest, pa.Table]],
    published: Collection[str],
    folder: ResultsFolder | None = None,
    kept: Digests | None = None,
) -> Panel:
    found = sorted(found, key=lambda one: (one[1].summary.started_at, one[1].summary.run_id))
    digests = [digest for _, digest, _ in found]
    cores = [core for _, _, core in found]
    runs = tuple(digest.summary for digest in digests)
    numbers = [np.asarray(core["series"], dtype=np.uint64) for core in cores]
    known, described = described_keys(digests, cores, numbers)
    is_series, joins = targets(described)
    ordered = in_order(described, is_series)
    ranks = key_ranks(described, joins)
    place = np.full(len(known), -1, np.int64)
    place[ordered] = np.arange(len(ordered))

    shape = (len(ordered), len(runs))
    status = np.full(shape, NOT_PLANNED, np.int8)
    log_s = np.full(shape, np.nan)
    rows = np.full(shape, -1, np.int32)
    is_dirty = np.zeros(shape, bool)
    counts = {name: np.zeros(shape, np.int16) for name in ("num_replicates", "num_confirmations")}
    joined: dict[int, _Joined] = {}
    for run, (core, own) in enumerate(zip(cores, numbers, strict=True)):
        at = np.searchsorted(known, own)
        series = place[at]
        here = np.flatnonzero(series >= 0)
        into = series[here]
        codes = np.asarray(core["status"], dtype=np.int8)
        status[into, run] = codes[here]
        rows[into, run] = here
        dirty = np.asarray(core["is_dirty"], dtype=bool)
        is_dirty[into, run] = dirty[here]
        log_s[into, run] = _logs(np.asarray(core["median_s"], dtype=np.float64)[here])
        for name, array in counts.items():
            array[into, run] = np.minimum(np.asarray(core[name])[here], np.iinfo(np.int16).max)
        if len(here) < len(own):
            joining = np.flatnonzero(series < 0)
            keys_of = dict(zip(joining.tolist(), at[joining].tolist(), strict=True))
            pairs = [
                (int(place[target]), row)
                for row in sorted(keys_of, key=lambda row: ranks[keys_of[row]])
                for target in joins[keys_of[row]]
            ]
            joined[run] = _Joined(*np.array(pairs, np.int64).T)
            cells = joined[run].series, np.full(len(pairs), run)
            np.maximum.at(status, cells, codes[joined[run].rows])
            np.logical_or.at(is_dirty, cells, dirty[joined[run].rows])
    log_s[(status < 0) | (status >= _TIMED_CODES)] = np.nan
    chosen = described.take(pa.array(ordered))
    keys = tuple(
        SeriesKey(*key)
        for key in zip(*(chosen[name].to_pylist() for name in SERIES_KEY), strict=True)
    )
    return Panel(
        runs=runs,
        keys=keys,
        identity=chosen.select(IDENTITY).combine_chunks(),
        status=status,
        log_s=log_s,
        **counts,
        is_dirty=is_dirty,
        is_published=np.array([run.run_id in published for run in runs], bool),
        _rows=rows,
        _joined=joined,
        _digests=tuple(digests),
        _sources=tuple(source for source, _, _ in found),
        _folder=folder,
        _kept=kept,
    )


def _logs(seconds: Floats) -> Floats:
    usable = np.isfinite(seconds) & (seconds > 0)
    return np.log(seconds, out=np.full(len(seconds), np.nan), where=usable)
