"""Traces in CSV: Azure LLM inference, BurstGPT, and plain `arrival_s,input_tokens,output_tokens`.

A file is read twice over only where something is wrong with it: pyarrow reads the columns at once
and anything it does not take, or that is out of range, is looked for row by row. The slow reader
accepts whatever the fast one accepts, with the same values.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np

from attnbench.errors import UsageError
from attnbench.traffic.trace_rows import Columns, RowChecker, shown

_DATE = re.compile(
    r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:?\d\d)?", re.ASCII
)


@dataclass(frozen=True, slots=True)
class CsvFormat:
    """A format by the names of its columns; others may stand beside them, in any order."""

    name: str
    time: str
    input_tokens: str
    output_tokens: str
    dated: bool = False

    @property
    def columns(self) -> tuple[str, str, str]:
        return (self.time, self.input_tokens, self.output_tokens)


CSV_FORMATS = (
    CsvFormat("azure", "TIMESTAMP", "ContextTokens", "GeneratedTokens", dated=True),
    CsvFormat("burstgpt", "Timestamp", "Request tokens", "Response tokens"),
    CsvFormat("csv", "arrival_s", "input_tokens", "output_tokens"),
)


def read_csv(data: bytes, name: str, form: CsvFormat, sort_arrivals: bool) -> Columns:
    """Read and check the rows of a file of this format.

    Raises:
        UsageError: the first row that cannot be used, with its line.
    """
    header, body, line = split_header(data, name)
    found = [column.lower() for column in header]
    for column in form.columns:
        count = found.count(column.lower())
        if count != 1:
            problem = "twice or more" if count else "not at all"
            raise UsageError(
                f"{name}, line {line}: the column {column!r} is there {problem}; a {form.name} "
                f"trace needs {', '.join(form.columns)} (found: {shown(','.join(header))})"
            )
    places = [found.index(column.lower()) for column in form.columns]
    columns = _fast(body, form, places, len(header))
    if columns is not None and columns.is_valid(sort_arrivals):
        return columns
    return _slow(data, name, form, places, len(header), sort_arrivals)


def sniff_csv(data: bytes, name: str) -> CsvFormat | None:
    """The format whose columns are all in the first line, if there is one."""
    header, _, _ = split_header(data, name)
    found = {column.lower() for column in header}
    for form in CSV_FORMATS:
        if found.issuperset(column.lower() for column in form.columns):
            return form
    return None


def split_header(data: bytes, name: str) -> tuple[list[str], memoryview, int]:
    """The names in the first line that is not blank, what follows it, and its number."""
    start, line = 0, 0
    while start < len(data):
        line += 1
        ends = [end for end in (data.find(b"\n", start), data.find(b"\r", start)) if end >= 0]
        end = min(ends, default=len(data))
        text = data[start:end].decode("utf-8", "backslashreplace")
        after = end + 2 if data[end : end + 2] == b"\r\n" else end + 1
        if text.strip():
            try:
                header = next(csv.reader([text]))
            except csv.Error as error:
                raise UsageError(
                    f"{name}, line {line}: not a line of CSV ({error}): give a trace"
                ) from None
            return [column.strip() for column in header], memoryview(data)[after:], line
        start = after
    raise UsageError(f"{name} is empty: give a trace with a header and at least one row")


def _fast(body: memoryview, form: CsvFormat, places: list[int], width: int) -> Columns | None:
    """The columns, or None where the rows must be looked at one by one."""
    import pyarrow as pa
    import pyarrow.csv

    if not len(body):
        return None
    if b"0x" in body.obj or b"0X" in body.obj:  # type: ignore[operator]
        return None  # pyarrow reads these as hexadecimal numbers
    names = [str(place) for place in range(width)]
    time, inputs, outputs = (names[place] for place in places)
    for time_type in (
        (pa.timestamp("ns"), pa.timestamp("ns", "UTC")) if form.dated else (pa.float64(),)
    ):
        types = {time: time_type, inputs: pa.int64(), outputs: pa.int64()}
        try:
            table = pyarrow.csv.read_csv(
                pa.py_buffer(body),
                read_options=_one_thread(column_names=names),
                convert_options=pyarrow.csv.ConvertOptions(
                    column_types=types,
                    include_columns=[time, inputs, outputs],
                    null_values=[],
                    **({"timestamp_parsers": [pyarrow.csv.ISO8601]} if form.dated else {}),
                ),
            )
        except (pa.ArrowInvalid, pa.ArrowKeyError, pa.ArrowNotImplementedError):
            continue
        arrays = [_numpy(table[column]) for column in (time, inputs, outputs)]
        return Columns(
            time=arrays[0].view(np.int64) if form.dated else arrays[0],
            input_tokens=arrays[1],
            output_tokens=arrays[2],
            per_second=1e9 if form.dated else 1.0,
        )
    return None


def _one_thread(**options: Any) -> Any:
    """Read options without pyarrow's threads: one still running at exit aborts the process."""
    import pyarrow.csv

    return pyarrow.csv.ReadOptions(use_threads=False, **options)


def _numpy(column: Any) -> Any:
    return column.to_numpy() if column.num_chunks != 1 else column.chunk(0).to_numpy()


def _slow(
    data: bytes, name: str, form: CsvFormat, places: list[int], width: int, sort_arrivals: bool
) -> Columns:
    per_second = 1e9 if form.dated else 1.0
    check = RowChecker(name, sort_arrivals, per_second=per_second)
    times: list[float] = []
    inputs: list[int] = []
    outputs: list[int] = []
    rows = _rows(data, check)
    next(rows, None)
    for line, row in rows:
        if len(row) != width:
            raise check.error(line, f"{len(row)} fields where the header has {width}")
        time, input_tokens, output_tokens = (row[place].strip() for place in places)
        moment: float
        if form.dated:
            moment = _nanoseconds(check, line, form.time, time)
        else:
            moment = check.number(line, form.time, time)
        check.order(line, form.time, moment, time)
        times.append(moment)
        inputs.append(check.tokens(line, form.input_tokens, input_tokens))
        outputs.append(check.tokens(line, form.output_tokens, output_tokens))
    return Columns(
        time=np.array(times, dtype=np.int64) if form.dated else np.array(times, dtype=np.float64),
        input_tokens=np.array(inputs, dtype=np.int64),
        output_tokens=np.array(outputs, dtype=np.int64),
        per_second=per_second,
    )


def _rows(data: bytes, check: RowChecker) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not blank, with the line each ends in."""
    text = io.TextIOWrapper(
        io.BytesIO(data), encoding="utf-8", errors="backslashreplace", newline=""
    )
    reader = csv.reader(text)
    try:
        for row in reader:
            if row and not (len(row) == 1 and not row[0].strip()):
                yield reader.line_num, row
    except csv.Error as error:
        raise check.error(reader.line_num, f"not a line of CSV ({error}): correct it") from None


def _nanoseconds(check: RowChecker, line: int, column: str, value: str) -> int:
    """Nanoseconds since 1970 of a date and time; without a zone it is taken as UTC."""
    if not value:
        raise check.error(line, f"{column} is missing: every row needs a date and time")
    match = _DATE.fullmatch(value)
    try:
        if match is None:
            raise ValueError
        day, time, fraction, zone = match.groups()
        moment = datetime.fromisoformat(f"{day}T{time}{'+00:00' if zone in (None, 'Z') else zone}")
        seconds = (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(seconds=1)
    except (ValueError, OverflowError):
        raise check.error(
            line,
            f"{column} is {shown(value)}: give a date and time such as 2023-11-16 18:17:03.97",
        ) from None
    nanoseconds = seconds * 10**9 + int((fraction or "").ljust(9, "0"))
    if not 0 <= nanoseconds < 2**63:
        raise check.error(line, f"{column} is {shown(value)}: give a year from 1970 to 2261")
    return nanoseconds
