"""Where things lie in a results folder, and which file's rows count when two hold the same run.

    results/
    ├── .lock                            readers share it, sealing and compacting exclude them
    ├── runs/<run id>.journal            a run being written, or one that was killed
    ├── runs/<run id>.parquet            a sealed run
    ├── runs/<run id>.journal.corrupt    set aside: what could be read of it is sealed
    ├── months/<YYYY-MM>.parquet         sealed runs, compacted
    ├── published/<any name>.parquet     runs anybody may see, of this machine and others; only read
    └── .publish-salt                    what their names were hashed with; never leaves this folder

A run's own file counts, not the month file that holds the run as well: that is so after a
compaction was killed before it removed the run files, and after a compacted run was resumed. A
journal's rows count beside the run's sealed rows, without those that are sealed already. A
published run counts where the folder has no rows of its own of it, and from the first file that
holds it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from attnbench.errors import ResultsFolderError
from attnbench.store import disk
from attnbench.store.journal import JournalContents, is_live, read_journal
from attnbench.store.schema import ROW_KEY, SCHEMA, rows_to_table
from attnbench.store.sealed import SealedFile


@dataclass(frozen=True, slots=True)
class Segment:
    """A sealed file and the runs of it that do not count, because they have a file of their own."""

    file: SealedFile
    hidden: frozenset[str] = frozenset()

    @property
    def run_ids(self) -> tuple[str, ...]:
        return tuple(run_id for run_id in self.file.run_ids if run_id not in self.hidden)

    def visible(self, where: pc.Expression | None = None) -> pc.Expression | None:
        """`where`, and not one of the hidden runs."""
        if not self.hidden:
            return where
        shown = ~pc.field("run_id").isin(sorted(self.hidden))
        return shown if where is None else where & shown


@dataclass(frozen=True, slots=True)
class Layout:
    """The paths of one results folder."""

    root: Path

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def months(self) -> Path:
        return self.root / "months"

    @property
    def published(self) -> Path:
        return self.root / "published"

    @property
    def publish_salt(self) -> Path:
        return self.root / ".publish-salt"

    def sealed(self, run_id: str) -> Path:
        return self.runs / f"{run_id}.parquet"

    def journal(self, run_id: str) -> Path:
        return self.runs / f"{run_id}.journal"

    def set_aside(self, run_id: str) -> Path:
        """A name not taken yet for a journal with corrupt lines."""
        taken = len(list(self.runs.glob(f"{run_id}.journal*.corrupt")))
        return self.runs / f"{run_id}.journal{taken or ''}.corrupt"

    def set_aside_paths(self) -> list[Path]:
        return sorted(self.runs.glob("*.journal*.corrupt"))

    def month(self, month: str) -> Path:
        return self.months / f"{month}.parquet"

    def create(self) -> None:
        """Make the folders. Raises ResultsFolderError where they cannot be made."""
        disk.make_folder(self.runs)
        disk.make_folder(self.months)

    def locked(self, exclusive: bool) -> AbstractContextManager[None]:
        """Hold the folder's lock. Raises ResultsFolderError if there is no such folder."""
        if not self.root.is_dir():
            raise ResultsFolderError(
                f"{self.root}: no such results folder; measure something first, e.g. "
                "`attnbench run 8q1s4k`, or name another with --results"
            )
        return disk.locked(self.root / ".lock", exclusive)

    def month_paths(self) -> list[Path]:
        return sorted(self.months.glob("[!.]*.parquet"))

    def run_paths(self) -> list[Path]:
        return sorted(self.runs.glob("[!.]*.parquet"))

    def published_paths(self) -> list[Path]:
        return sorted(self.published.glob("[!.]*.parquet"))

    def journal_paths(self) -> list[Path]:
        return sorted(self.runs.glob("[!.]*.journal"))

    def ended_journals(self) -> list[Path]:
        """Journals whose process finished or was killed."""
        return [path for path in self.journal_paths() if not is_live(path)]

    def segments(self) -> list[Segment]:
        """This folder's own sealed files, months first: all that is ever merged or resumed.

        Raises DataError for any that cannot be read.
        """
        run_files = [SealedFile.open(path) for path in self.run_paths()]
        own = frozenset(run_id for file in run_files for run_id in file.run_ids)
        month_files = [SealedFile.open(path) for path in self.month_paths()]
        return [
            *(Segment(file, own.intersection(file.run_ids)) for file in month_files),
            *(Segment(file) for file in run_files),
        ]

    def remains(self, segments: list[Segment]) -> Iterator[tuple[JournalContents, pa.Table]]:
        """Journals of ended runs, each with its rows that no sealed file of the run has yet.

        Raises CorruptDataError for a journal with a corrupt line.
        """
        for path in self.ended_journals():
            contents = read_journal(path)
            contents.refuse_corrupt()
            if not contents.is_blank:
                yield contents, unsealed_rows(contents, segments)

    def readable(self) -> tuple[list[Segment], list[tuple[JournalContents, pa.Table]]]:
        """Everything rows are read from: own and published files, and `remains`.

        Raises DataError for a file that cannot be read.
        """
        segments = self.segments()
        rests = list(self.remains(segments))
        counted = {run_id for segment in segments for run_id in segment.run_ids}
        counted.update(run_id_of(contents.path) for contents, _ in rests)
        for path in self.published_paths():
            file = SealedFile.open(path)
            published = Segment(file, frozenset(counted.intersection(file.run_ids)))
            if published.run_ids:
                segments.append(published)
            counted.update(file.run_ids)
        return segments, rests

    def published_of(self, segments: list[Segment]) -> list[tuple[str, Path]]:
        """Each run whose rows are read from a published one of `segments`, with its file."""
        return [
            (run_id, segment.file.path)
            for segment in segments
            if segment.file.path.parent == self.published
            for run_id in segment.run_ids
        ]


def run_id_of(path: Path) -> str:
    """The run a sealed file or journal of `runs/` belongs to."""
    return path.name.partition(".")[0]


def stored_rows(
    run_id: str, segments: list[Segment], columns: tuple[str, ...] = tuple(SCHEMA.names)
) -> pa.Table:
    """The sealed rows of one run."""
    schema = pa.schema([SCHEMA.field(name) for name in columns])
    tables = [
        segment.file.read(columns, segment.visible(pc.field("run_id") == run_id))
        for segment in segments
        if run_id in segment.run_ids
    ]
    return pa.concat_tables([schema.empty_table(), *tables])


def row_keys(table: pa.Table) -> set[tuple[str, ...]]:
    """`Measurement.key` of each row of a table that has the columns of ROW_KEY."""
    return {tuple(str(part) for part in row.values()) for row in table.to_pylist()}


def unsealed_rows(contents: JournalContents, segments: list[Segment]) -> pa.Table:
    """The journal's rows whose keys are not sealed yet, each key once."""
    known = row_keys(stored_rows(run_id_of(contents.path), segments, ROW_KEY))
    fresh = {row.key: row for row in reversed(contents.rows) if row.key not in known}
    return rows_to_table(list(reversed(fresh.values())))
