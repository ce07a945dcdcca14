"""How a verb prints: results on stdout in one of four formats, everything else on stderr."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from attnbench.errors import UsageError


class Format(StrEnum):
    """Output formats every reading verb offers."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"
    MARKDOWN = "markdown"


FormatOption = Annotated[
    Format, typer.Option("--format", "-f", help="How to print results on stdout.")
]


def _results_path(text: str) -> Path:
    """Raises UsageError for "", which is what an unset variable leaves: it would be this folder."""
    if not text:
        raise UsageError("--results '': name a folder, e.g. --results results, or leave it out")
    return Path(text)


ResultsOption = Annotated[
    Path | None,
    typer.Option(help="Results folder. Default: settings.", parser=_results_path, metavar="FOLDER"),
]


def note(message: str) -> None:
    """A line for the person at the terminal; never mixed into results."""
    print(visible(message), file=sys.stderr)


def visible(text: str) -> str:
    """Control characters written out: names in a results folder may be commands to a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def emit(rows: Iterable[Mapping[str, Any]], format: Format, columns: Sequence[str] = ()) -> None:
    """Print `rows` on stdout. `columns` fixes the order; default: the keys of the first row."""
    listed = list(rows)
    names = list(columns) or (list(listed[0]) if listed else [])
    if format is Format.JSON:
        plain = [{n: _finite(row.get(n)) for n in names} for row in listed]
        print(json.dumps(plain, indent=2, default=str, allow_nan=False))
    elif format is Format.CSV:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(names)
        writer.writerows([_cell(row.get(n)) for n in names] for row in listed)
    elif format is Format.MARKDOWN:
        print("| " + " | ".join(names) + " |")
        print("|" + "---|" * len(names))
        for row in listed:
            print(
                "| "
                + " | ".join(visible(_cell(row.get(n))).replace("|", "\\|") for n in names)
                + " |"
            )
    else:
        _emit_table(listed, names)


def _emit_table(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in names:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(escape(visible(_cell(row.get(n)))) for n in names))
    # A pipe has no width: let every column be as wide as it needs.
    Console(width=None if sys.stdout.isatty() else 400, soft_wrap=False).print(table)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    return value


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return "; ".join(str(v) for v in value)
    return str(value)
