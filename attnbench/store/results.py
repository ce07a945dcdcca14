"""A results folder: what was measured, kept so that nothing is lost, doubled or changed unseen."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
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
from attnbench.store.query import parse_select, run_query
from attnbench.store.run import Run as Run
from attnbench.store.runs import RUN_COLUMNS, RunInfo, list_runs
from attnbench.store.schema import ROW_KEY, SCHEMA
from attnbench.store.sealing import SealedRun, seal_orphans

#: Column -> the value wanted, or several values any of which will do.
Where = Mapping[str, Any]


class ResultsFolder:
    """Safe for several processes at once. Nothing is made on disk before the first `open_run`.

    Rows are read from sealed files and from the journals of runs that ended; a run that is being
    written is not seen before it ends.
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
    ) -> pa.Table:
        """Rows as an Arrow table of `schema.SCHEMA` (or its `columns`), in no promised order.

        `where={"backend": "FLASH_ATTN", "status": ["OK", "NOISY"]}` or an Arrow expression.
        Page checksums are verified. Raises UsageError for an unknown column, CorruptDataError,
        SchemaError, or ResultsFolderError if there is no such folder.
        """
        names = list(SCHEMA.names if columns is None else columns)
        _check_columns(names)
        expression = _expression(where) if isinstance(where, Mapping) else where
        schema = pa.schema([SCHEMA.field(name) for name in names])
        with self._layout.locked(exclusive=False):
            segments = self._layout.segments()
            tables = [segment.file.read(names, segment.visible(expression)) for segment in segments]
            for _, rest in self._layout.remains(segments):
                rows = rest if expression is None else rest.filter(expression)
                tables.append(rows.select(names))
        return pa.concat_tables([schema.empty_table(), *tables])

    def query(self, sql: str) -> pa.Table:
        """The result of one SELECT in DuckDB's SQL over the view `results`.

        Sealed files are read by DuckDB itself: only the columns and row groups that are needed, and
        without page checksums. Raises UsageError for SQL that DuckDB refuses or that is no SELECT.
        """
        parse_select(sql)  # before anything is read
        with self._layout.locked(exclusive=False):
            segments = self._layout.segments()
            rests = [rest for _, rest in self._layout.remains(segments)]
            return run_query(sql, segments, pa.concat_tables([SCHEMA.empty_table(), *rests]))

    def export(
        self,
        path: Path | str,
        format: ExportFormat | None = None,
        sql: str | None = None,
    ) -> int:
        """Write all rows, or the result of `sql`, to one file; gives the number of rows.

        The format is told by the file name's ending unless given. Raises UsageError for an unknown
        ending, ResultsFolderError or InfrastructureError if the file cannot be written.
        """
        target = Path(path)
        chosen = format or format_of(target)
        table = self.table() if sql is None else self.query(sql)
        export_table(table, target, chosen)
        return int(table.num_rows)

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
        headers = self._headers()
        unsealed = frozenset(run_id_of(path) for path in self._layout.ended_journals())
        return list_runs(headers.values(), table, unsealed)

    def header(self, run_id: str) -> RunHeader:
        """The header of a stored run that ended; `last` is the newest one.

        Raises UsageError if there is none, ResultsFolderError if a process is still writing it.
        """
        headers = self._headers() if self.path.is_dir() else {}
        if run_id == "last" and headers:
            return headers[max(headers)]
        if run_id != "last" and is_live(self._layout.journal(check_run_id(run_id))):
            raise _still_written(run_id)
        if run_id not in headers:
            raise UsageError(f"no run {run_id} in {self.path}; {_newest(headers)}")
        return headers[run_id]

    def ceilings(self) -> dict[str, Ceilings]:
        """Run id -> the rates its device reached, for the runs that measured them."""
        headers = self._headers() if self.path.is_dir() else {}
        return {run_id: h.ceilings for run_id, h in headers.items() if h.ceilings is not None}

    def _headers(self) -> dict[str, RunHeader]:
        with self._layout.locked(exclusive=False):
            segments = self._layout.segments()
            headers = {h.run_id: h for segment in segments for h in segment.file.headers()}
            for contents, _ in self._layout.remains(segments):
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
