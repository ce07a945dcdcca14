"""`attnbench results`: query, export, check and compact what is stored."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnbench.cli.output import Format, FormatOption, ResultsOption, emit, note
from attnbench.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from attnbench.store import ResultsFolder

results_app = typer.Typer(
    help="Query, export, check and compact stored results.", no_args_is_help=True
)


@results_app.command()
def query(
    sql: Annotated[
        str,
        typer.Argument(
            help="One SELECT in DuckDB's SQL over the view `results`, e.g. "
            "'SELECT backend, count(*) FROM results GROUP BY ALL'; "
            "'DESCRIBE results' lists the columns; the view `published` lists the published runs."
        ),
    ],
    results: ResultsOption = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """Print the result of a SQL query over all stored rows. Files are only read."""
    table = _folder(results).query(sql)
    rows = ({name: _plain(value) for name, value in row.items()} for row in table.to_pylist())
    emit(rows, format, table.column_names)


@results_app.command()
def export(
    path: Annotated[Path, typer.Argument(help="File to write: .csv, .json, .parquet or .md.")],
    sql: Annotated[
        str, typer.Option(help="Export the result of this SELECT over `results`, not all rows.")
    ] = "",
    run: Annotated[
        list[str] | None,
        typer.Option(help="Only this run (its id, or `last`); repeat for several."),
    ] = None,
    public: Annotated[
        bool,
        typer.Option(
            "--public",
            help="Write this folder's own runs so that anybody may see them: names of machines and "
            "GPUs hashed, paths and user names taken out. Into results/published/ to be shown.",
        ),
    ] = False,
    results: ResultsOption = None,
    format: Annotated[
        str, typer.Option(help="csv, json, parquet or markdown. Default: the file's ending.")
    ] = "",
) -> None:
    """Write all stored rows, those of some runs, or the result of a query, into one file."""
    from attnbench.store.export import ExportFormat

    if sql and (run or public):
        raise UsageError("--sql chooses its own rows; leave out --run and --public beside it")
    if public:
        if format not in ("", ExportFormat.PARQUET):
            raise UsageError(f"--format {format!r}: --public writes Parquet; leave --format out")
        _export_public(_folder(results), path, run or [])
        return
    if format and format not in list(ExportFormat):
        raise UsageError(f"--format {format!r}: write one of {', '.join(ExportFormat)}")
    chosen = ExportFormat(format) if format else None
    count = _folder(results).export(path, chosen, sql or None, run or [])
    note(f"{count} rows written to {path}")


@results_app.command()
def check(
    results: ResultsOption = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """Read every stored byte, compare it with its checksums, and name every bad file (exit 2)."""
    report = _folder(results).check()
    problems = [{"file": str(p.path), "problem": p.text} for p in report.problems]
    if problems or format is not Format.TABLE:
        emit(problems, format, ("file", "problem"))
    verdict = "all good" if report.is_ok else f"{len(report.bad_files)} of them bad"
    note(f"{report.num_files} files, {report.num_rows} rows: {verdict}")
    raise typer.Exit(ExitCode.OK if report.is_ok else ExitCode.USAGE)


@results_app.command()
def compact(
    results: ResultsOption = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """Seal killed runs and merge sealed runs into one file a month. Loses nothing if killed."""
    months = _folder(results).compact()
    columns = ("file", "runs_merged", "rows")
    rows = [(str(month.path), month.num_runs, month.num_rows) for month in months]
    if rows or format is not Format.TABLE:
        emit((dict(zip(columns, row, strict=True)) for row in rows), format, columns)
    else:
        note("nothing to compact")


def _export_public(folder: ResultsFolder, path: Path, runs: list[str]) -> None:
    from attnbench.store.publish import MAX_BYTES

    done = folder.publish(path, runs)
    size = f"{done.num_bytes / 1e6:.2f} MB"
    note(f"{done.num_rows} rows of {done.num_runs} run(s) written to {path}, {size}")
    if done.is_too_big:
        note(
            f"{path}: more than {MAX_BYTES / 1e6:g} MB, and a repository keeps every version of it "
            "for ever; publish fewer runs with --run, or do not commit it"
        )


def _folder(results: Path | None) -> ResultsFolder:
    from attnbench.settings import load_settings
    from attnbench.store import ResultsFolder

    return ResultsFolder(results or load_settings().results)


def _plain(value: Any) -> Any:
    """Whole numbers as such: DuckDB's sums are 128 bits wide, which Arrow has as decimals."""
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    return value
