"""A results folder: what was measured, kept so that nothing is lost, doubled or changed unseen."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from attnbench.errors import ResultsFolderError, UsageError
from attnbench.store.ceilings import Ceilings
from attnbench.store.check import CheckReport, check_folder
from attnbench.store.compact import CompactedMonth, compact
from attnbench.store.export import ExportFormat, export_table, format_of
from attnbench.store.header import RunHeader, check_run_id
from attnbench.store.journal import Journal, is_live
from attnbench.store.layout import Layout, row_keys, run_id_of, stored_rows
from attnbench.store.publish import PublishedFile, chosen_runs, publish
from attnbench.store.query import parse_select, run_query
from attnbench.store.record import FIRST_REFERENCE
from attnbench.store.run import Run as Run
from attnbench.store.runs import RUN_COLUMNS, RunInfo, list_runs
from attnbench.store.schema import ROW_KEY, SCHEMA
from attnbench.store.sealed import SealedFile
from attnbench.store.sealing import SealedRun, seal_orphans
from attnbench.store.sources import RunSource, run_sources

#: Column -> the value wanted, or several values any of which will do.
Where = Mapping[str, Any]


class ResultsFolder:
    """Safe for several processes at once. Nothing is made on disk before the first `open_run`.

    Rows are read from sealed files, from the journals of runs that ended, and from `published/`; a
    run that is being written is not seen before it ends.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._layout = Layout(self.path)

    def open_run(self, header: RunHeader, resume: bool = False) -> Run:
        """Start the run of `header`, or with `resume` go on with it, sealed or killed.

        A resumed run keeps its stored header. Killed runs are sealed first (`Run.orphans`).
        Raises UsageError for a run that is not there to resume, or there already,
        ResultsFolderError if another process is writing it or the folder cannot be written,
        SchemaError or CorruptDataError for a file in the folder that cannot be read,
        InfrastructureError for a full disk.
        """
        run_id = check_run_id(header.run_id)
        self._layout.create()
        with self._layout.locked(exclusive=True):
            if is_live(self._layout.journal(run_id)):
                raise _still_written(run_id)
            orphans = seal_orphans(self._layout)
            segments = self._layout.segments()
            stored = [
                stored
                for segment in segments
                if run_id in segment.run_ids
                for stored in segment.file.headers()
                if stored.run_id == run_id
            ]
            if resume and not stored:
                if any(
                    run_id in SealedFile.open(p).run_ids for p in self._layout.published_paths()
                ):
                    raise UsageError(
                        f"--resume {run_id}: a published run, which is only read; start a new one"
                    )
                newest = _newest(run_id for segment in segments for run_id in segment.run_ids)
                raise UsageError(f"--resume {run_id}: no such run in {self.path}; {newest}")
            if stored and not resume:
                raise UsageError(f"run {run_id} is in {self.path} already; go on with --resume")
            done = row_keys(stored_rows(run_id, segments, ROW_KEY)) if resume else set()
            journal = Journal(self._layout.journal(run_id), stored[0] if stored else header)
        return Run(self._layout, stored[0] if stored else header, journal, done, tuple(orphans))

    def seal_orphans(self) -> list[SealedRun]:
        """Seal the journals of runs that were killed. `open_run` does so itself."""
        with self._layout.locked(exclusive=True):
            self._layout.create()
            return seal_orphans(self._layout)

    def table(
        self,
        columns: Sequence[str] | None = None,
        where: Where | pc.Expression | None = None,
        references: bool = False,
    ) -> pa.Table:
        """Rows as an Arrow table of `schema.SCHEMA` (or its `columns`), in no promised order.

        Without `references` not those of the build before, which are no answer of the run they are
        in (`record.FIRST_REFERENCE`).
        `where={"backend": "FLASH_ATTN", "status": ["OK", "NOISY"]}` or an Arrow expression.
        Page checksums are verified. Raises UsageError for an unknown column, CorruptDataError,
        SchemaError, or ResultsFolderError if there is no such folder.
        """
        names = list(SCHEMA.names if columns is None else columns)
        _check_columns(names)
        expression = _expression(where) if isinstance(where, Mapping) else where
        if not references:
            own = pc.field("replicate") < FIRST_REFERENCE
            expression = own if expression is None else expression & own
        schema = pa.schema([SCHEMA.field(name) for name in names])
        with self._layout.locked(exclusive=False):
            segments, rests = self._layout.readable()
            tables = [segment.file.read(names, segment.visible(expression)) for segment in segments]
            for _, rest in rests:
                rows = rest if expression is None else rest.filter(expression)
                tables.append(rows.select(names))
        return pa.concat_tables([schema.empty_table(), *tables])

    @contextmanager
    def reading(self) -> Iterator[tuple[RunSource, ...]]:
        """Every run that `table` reads rows of, for reading one after another.

        Nothing is sealed, merged or compacted meanwhile. Raises as `table` does.
        """
        with self._layout.locked(exclusive=False):
            yield run_sources(self._layout)

    @contextmanager
    def reading_lock(self) -> Iterator[None]:
        """Nothing is sealed, merged or compacted while this is held."""
        with self._layout.locked(exclusive=False):
            yield

    def query(self, sql: str) -> pa.Table:
        """The result of one SELECT in DuckDB's SQL over the view `results`.

        The view `published` (`run_id`, `file`) lists the runs whose rows are published ones.

        Sealed files are read by DuckDB itself: only the columns and row groups that are needed, and
        without page checksums. Raises UsageError for SQL that DuckDB refuses or that is no SELECT.
        """
        parse_select(sql)  # before anything is read
        with self._layout.locked(exclusive=False):
            segments, rests = self._layout.readable()
            remains = pa.concat_tables([SCHEMA.empty_table(), *(rest for _, rest in rests)])
            files = self._layout.published_of(segments)
            published = pa.table(
                {
                    "run_id": pa.array([run_id for run_id, _ in files], pa.string()),
                    "file": pa.array([path.name for _, path in files], pa.string()),
                }
            )
            return run_query(sql, segments, remains, published)

    def export(
        self,
        path: Path | str,
        format: ExportFormat | None = None,
        sql: str | None = None,
        runs: Sequence[str] = (),
    ) -> int:
        """Write all rows, those of some `runs`, or the result of `sql`; gives the number of rows.

        The format is told by the file name's ending unless given. Raises UsageError for an unknown
        ending or run, ResultsFolderError or InfrastructureError if the file cannot be written.
        """
        target = Path(path)
        chosen = format or format_of(target)
        if sql is not None:
            table = self.query(sql)
        else:
            chosen_ids = chosen_runs(runs, self.headers(), self.path) if runs else []
            table = self.table(where={"run_id": chosen_ids} if runs else None, references=True)
        export_table(table, target, chosen)
        return int(table.num_rows)

    def publish(self, path: Path | str, runs: Sequence[str] = ()) -> PublishedFile:
        """Write this folder's own rows, or those of some `runs`, so that anybody may see them.

        See `attnbench.store.publish` for what is taken out. Raises UsageError for a run that is not
        there or a name that does not end in .parquet, DataError if a name would be left in it,
        ResultsFolderError or InfrastructureError if it cannot be written.
        """
        with self._layout.locked(exclusive=True):
            return publish(self._layout, Path(path), runs)

    def published_runs(self) -> frozenset[str]:
        """Ids of the runs whose rows are read from `published/`."""
        if not self.path.is_dir():
            return frozenset()
        with self._layout.locked(exclusive=False):
            segments, _ = self._layout.readable()
            return frozenset(run_id for run_id, _ in self._layout.published_of(segments))

    def check(self) -> CheckReport:
        """Read everything and name every file that is not what was written."""
        with self._layout.locked(exclusive=False):
            return check_folder(self._layout)

    def compact(self) -> list[CompactedMonth]:
        """Seal killed runs, then merge sealed runs into one file a month."""
        with self._layout.locked(exclusive=True):
            self._layout.create()
            seal_orphans(self._layout)
            return compact(self._layout)

    def runs(self) -> list[RunInfo]:
        """The stored runs that ended, newest last."""
        table = self.table(RUN_COLUMNS)
        headers = self.headers()
        unsealed = frozenset(run_id_of(path) for path in self._layout.ended_journals())
        return list_runs(headers.values(), table, unsealed, self.published_runs())

    def header(self, run_id: str) -> RunHeader:
        """The header of a stored run that ended; `last` is the newest of this folder's own.

        Raises UsageError if there is none, ResultsFolderError if a process is still writing it.
        """
        headers = self.headers() if self.path.is_dir() else {}
        if run_id == "last" and (own := headers.keys() - self.published_runs()):
            return headers[max(own)]
        if run_id != "last" and is_live(self._layout.journal(check_run_id(run_id))):
            raise _still_written(run_id)
        if run_id not in headers:
            raise UsageError(f"no run {run_id} in {self.path}; {_newest(headers)}")
        return headers[run_id]

    def ceilings(self) -> dict[str, Ceilings]:
        """Run id -> the rates its device reached, for the runs that measured them."""
        headers = self.headers() if self.path.is_dir() else {}
        return {run_id: h.ceilings for run_id, h in headers.items() if h.ceilings is not None}

    def headers(self) -> dict[str, RunHeader]:
        """Run id -> header of every stored run that ended, all read at once.

        Raises ResultsFolderError if there is no such folder.
        """
        with self._layout.locked(exclusive=False):
            segments, rests = self._layout.readable()
            headers = {
                header.run_id: header
                for segment in segments
                for header in segment.file.headers()
                if header.run_id not in segment.hidden
            }
            for contents, _ in rests:
                run_id = run_id_of(contents.path)
                headers.setdefault(run_id, contents.header or RunHeader.salvaged(run_id))
        return headers


def _newest(run_ids: Iterable[str]) -> str:
    newest = max(run_ids, default="")
    return f"the newest is {newest}" if newest else "it holds no run yet"


def _still_written(run_id: str) -> ResultsFolderError:
    return ResultsFolderError(
        f"run {run_id} is being written by another process; wait for it, "
        "or leave out --resume to start another run"
    )


def _check_columns(names: Iterable[str]) -> None:
    for name in names:
        if name not in SCHEMA.names:
            close = difflib.get_close_matches(name, SCHEMA.names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(SCHEMA.names)}"
            raise UsageError(f"no column {name!r} in the results; {hint}")


def _expression(where: Where) -> pc.Expression | None:
    _check_columns(where)
    expression: pc.Expression | None = None
    for name, wanted in where.items():
        several = isinstance(wanted, (list, tuple, set, frozenset))
        values = pa.array(list(wanted) if several else [wanted], SCHEMA.field(name).type)
        term = pc.field(name).isin(values)
        expression = term if expression is None else expression & term
    return expression
