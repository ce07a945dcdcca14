"""Traces of real traffic from files, by format, and the parts of a trace.

trace = load_trace("azure_code.csv.gz", max_model_len=8192)
trace = scale_rate(window(trace, 0.0, 600.0), 2.0)
"""

from __future__ import annotations

import math
import stat
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from attnbench.errors import UsageError
from attnbench.traffic.trace_csv import CSV_FORMATS, read_csv, sniff_csv
from attnbench.traffic.trace_json import read_mooncake, read_sharegpt, sniff_json
from attnbench.traffic.trace_rows import MAX_SECONDS, Columns, finish, rows_of
from attnbench.traffic.types import Ints, Trace

TRACE_FORMATS = (*(form.name for form in CSV_FORMATS), "mooncake", "sharegpt")
"""Names that `load_trace` and `--trace-format` take."""

MAX_BYTES = 2 << 30
"""Of a file once unpacked: a small file can unpack to more than any memory."""

_PACKED = {b"PK\x03\x04": "zip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz", b"BZh": "bzip2"}


def load_trace(
    path: Path | str,
    format: str | None = None,
    max_model_len: int | None = None,
    *,
    sort_arrivals: bool = False,
    request_rate: float | None = None,
    seed: int = 0,
) -> Trace:
    """Read a trace from a file, gzipped or not.

    Args:
        path: of the file.
        format: one of `TRACE_FORMATS`; None: by the contents.
        max_model_len: requests of more tokens, input and output together, are left out and counted
            (`Trace.num_rejected`).
        sort_arrivals: sort by time a file that is not sorted.
        request_rate: requests per second of the Poisson arrivals that a ShareGPT file gets, which
            has no times of its own; needed there, refused elsewhere.
        seed: of those arrivals.

    Raises:
        UsageError: a file that cannot be read, a format nobody knows, a row that is wrong (with its
            line), or no request left. Nothing is guessed and no wrong row is skipped.
    """
    if max_model_len is not None and max_model_len < 2:
        raise UsageError(f"max_model_len is {max_model_len}: give 2 or more")
    name = Path(path).name
    data = _contents(Path(path))
    format = format if format is not None else _sniff(data, name)
    if format not in TRACE_FORMATS:
        raise UsageError(
            f"trace format {format!r} is not known: give one of {', '.join(TRACE_FORMATS)}"
        )
    if format == "sharegpt":
        if request_rate is None:
            raise UsageError(
                f"{name}: a ShareGPT file has no arrival times: give --request-rate, the requests "
                "per second to arrive at random"
            )
        trace = finish(read_sharegpt(data, name), name, max_model_len)
        return poisson_arrivals(trace, request_rate, seed)
    if request_rate is not None:
        raise UsageError(
            f"{name} has arrival times of its own: leave --request-rate out, or change its rate "
            "with --rate-scale"
        )
    return finish(_read(data, name, format, sort_arrivals), name, max_model_len, sort_arrivals)


def poisson_arrivals(trace: Trace, request_rate: float, seed: int = 0) -> Trace:
    """The same requests, arriving at random at so many per second on average.

    Raises:
        UsageError: a rate that is not above zero.
    """
    if not (math.isfinite(request_rate) and request_rate > 0):
        raise UsageError(f"the request rate is {request_rate}: give requests per second, above 0")
    gaps = np.random.default_rng(seed).exponential(1.0 / request_rate, len(trace))
    gaps[0] = 0.0
    return replace(trace, arrival_s=np.cumsum(gaps))


def scale_rate(trace: Trace, factor: float) -> Trace:
    """The same requests, `factor` times as many per second.

    Raises:
        UsageError: a factor that is not above zero.
    """
    if not (math.isfinite(factor) and factor > 0):
        raise UsageError(f"the rate scale is {factor}: give a number above 0, such as 2 or 0.5")
    if float(trace.arrival_s[-1]) > MAX_SECONDS * factor:
        raise UsageError(
            f"the rate scale is {factor}, which spreads {trace.name} over centuries: give a larger "
            "one, such as 0.5"
        )
    return replace(trace, arrival_s=trace.arrival_s / factor)


def window(trace: Trace, start_s: float = 0.0, end_s: float = math.inf) -> Trace:
    """The requests that arrive from `start_s` on and before `end_s`, timed from the first of them.

    Raises:
        UsageError: bounds that enclose nothing.
    """
    if math.isnan(start_s) or math.isnan(end_s) or start_s >= end_s:
        raise UsageError(f"the window is {start_s:g} to {end_s:g} s: give a start before its end")
    first, last = np.searchsorted(trace.arrival_s, [start_s, end_s], side="left").tolist()
    if first == last:
        raise UsageError(
            f"{trace.name}: nothing arrives from {start_s:g} to {end_s:g} s: give a window inside "
            f"0 to {trace.arrival_s[-1]:g} s"
        )
    return _part(trace, np.arange(first, last, dtype=np.int64))


def first_requests(trace: Trace, count: int) -> Trace:
    """The first so many requests, or all where there are fewer.

    Raises:
        UsageError: a count below 1.
    """
    if count < 1:
        raise UsageError(f"{count} requests are asked for: give 1 or more")
    return _part(trace, np.arange(min(count, len(trace)), dtype=np.int64))


def _part(trace: Trace, rows: Ints) -> Trace:
    offsets, ids = rows_of(trace.hash_offsets, trace.hash_ids, rows)
    arrival = trace.arrival_s[rows]
    return replace(
        trace,
        arrival_s=arrival - arrival[0],
        input_tokens=trace.input_tokens[rows],
        output_tokens=trace.output_tokens[rows],
        hash_offsets=offsets,
        hash_ids=ids,
    )


def _read(data: bytes, name: str, format: str, sort_arrivals: bool) -> Columns:
    if format == "mooncake":
        return read_mooncake(data, name, sort_arrivals)
    form = next(form for form in CSV_FORMATS if form.name == format)
    return read_csv(data, name, form, sort_arrivals)


def _sniff(data: bytes, name: str) -> str:
    if data.lstrip()[:1] in (b"{", b"["):
        found = sniff_json(data)
    else:
        form = sniff_csv(data, name)
        found = form.name if form is not None else None
    if found is None:
        first = data.lstrip()[:60].partition(b"\n")[0].decode("utf-8", "backslashreplace")
        raise UsageError(
            f"{name}: its first line is {first.strip()!a}, of no known trace format: "
            f"name it with --trace-format ({', '.join(TRACE_FORMATS)})"
        )
    return found


def _contents(path: Path) -> bytes:
    """The file's bytes, unpacked, without a byte order mark."""
    try:
        found = path.stat()
        if stat.S_ISCHR(found.st_mode) or stat.S_ISBLK(found.st_mode):
            # /dev/zero never ends.
            raise UsageError(f"{str(path)!a} is a device: give a trace file")
        if found.st_size > MAX_BYTES:
            raise _too_large(path)
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{str(path)!a} cannot be read ({why}): give a trace file") from None
    if data[:2] == b"\x1f\x8b":
        data = _gunzip(data, path)
    for magic, kind in _PACKED.items():
        if data.startswith(magic):
            raise UsageError(f"{path.name} is a {kind} file: unpack it, or pack it with gzip")
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UsageError(f"{path.name} is not in UTF-8: save it as UTF-8")
    data = data.removeprefix(b"\xef\xbb\xbf")
    if b"\0" in data[:4096]:
        raise UsageError(f"{path.name} is not a text file: give a trace in CSV or JSON")
    if not data.strip():
        raise UsageError(f"{path.name} is empty: give a trace with at least one request")
    return data


def _gunzip(data: bytes, path: Path) -> bytes:
    parts: list[bytes] = []
    size = 0
    rest = data
    try:
        # A file may be several gzip files one after the other; padding of zeros may follow.
        while rest.strip(b"\0") if len(rest) < 1024 else rest:
            unpack = zlib.decompressobj(wbits=31)
            part = unpack.decompress(rest, MAX_BYTES - size + 1)
            parts.append(part)
            size += len(part)
            if size > MAX_BYTES:
                raise _too_large(path)
            if not unpack.eof:
                raise UsageError(f"{path.name} is a gzip file cut short: fetch it again")
            rest = unpack.unused_data
    except zlib.error as error:
        raise UsageError(f"{path.name} is a damaged gzip file ({error}): fetch it again") from None
    return b"".join(parts) if len(parts) != 1 else parts[0]


def _too_large(path: Path) -> UsageError:
    return UsageError(f"{path.name} is larger than {MAX_BYTES >> 30} GiB: split it")
