"""All rows into one file another program reads."""

from __future__ import annotations

import csv
import json
import math
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from attnbench.errors import UsageError
from attnbench.store import disk


class ExportFormat(StrEnum):
    """What `results export` writes."""

    CSV = "csv"
    JSON = "json"
    PARQUET = "parquet"
    MARKDOWN = "markdown"


_SUFFIXES = {
    ".csv": ExportFormat.CSV,
    ".json": ExportFormat.JSON,
    ".parquet": ExportFormat.PARQUET,
    ".md": ExportFormat.MARKDOWN,
}


def format_of(path: Path) -> ExportFormat:
    """The format a file name's ending stands for. Raises UsageError for an ending unknown."""
    try:
        return _SUFFIXES[path.suffix.lower()]
    except KeyError:
        raise UsageError(
            f"{path}: no format has this ending; end it in {', '.join(_SUFFIXES)} or give --format"
        ) from None


def export_table(table: pa.Table, path: Path, format: ExportFormat) -> None:
    """Write `table` to `path`, whole or not at all.

    CSV and Markdown hold lists and maps as JSON text; JSON is one list of objects. Times are ISO
    texts in UTC; NaN and infinities, which JSON lacks, are empty. Raises ResultsFolderError or
    InfrastructureError if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with disk.writing(path):
        try:
            if format is ExportFormat.PARQUET:
                pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)
            else:
                _write_text(table, temporary, format)
            disk.replace_file(temporary, path)
        except Exception:
            if temporary.parent.is_dir():
                disk.remove_file(temporary)
            raise


def _write_text(table: pa.Table, path: Path, format: ExportFormat) -> None:
    names = table.column_names
    with path.open("w", encoding="utf-8", newline="") as file:
        if format is ExportFormat.CSV:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(names)
            for batch in table.to_batches(max_chunksize=10_000):
                writer.writerows([_text(v) for v in row.values()] for row in _rows(batch))
        elif format is ExportFormat.JSON:
            separator = "[\n"
            for batch in table.to_batches(max_chunksize=10_000):
                for row in _rows(batch):
                    file.write(separator + json.dumps(row))
                    separator = ",\n"
            file.write("[]\n" if table.num_rows == 0 else "\n]\n")
        else:
            file.write("| " + " | ".join(names) + " |\n|" + "---|" * len(names) + "\n")
            for batch in table.to_batches(max_chunksize=10_000):
                for row in _rows(batch):
                    cells = (_text(v).replace("|", "\\|").replace("\n", " ") for v in row.values())
                    file.write("| " + " | ".join(cells) + " |\n")


def _rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    return [{name: _plain(value) for name, value in row.items()} for row in batch.to_pylist()]


def _plain(value: Any) -> Any:
    """A value JSON has a word for. A map is a list of pairs in Arrow, an object here."""
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        if value and all(isinstance(item, tuple) for item in value):
            return {str(key): _plain(item) for key, item in value}
        return [_plain(item) for item in value]
    return value


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, (list, dict)):
        return json.dumps(value)
    return str(value)
