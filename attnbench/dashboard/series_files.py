"""The files of the series page, written from the arrays of a panel.

A chunk is some series whose ids begin alike. `series-XX` has what changes every night: verdicts and
the newest values. Older values are in `values-XX`, which the page loads beside it: rewritten once
in `_NIGHTS_TOGETHER` nights, another sixteenth of the chunks every night.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from attnbench.dashboard.json_text import joined_texts, value_texts
from attnbench.dashboard.script import to_json
from attnbench.history.panel import NOT_PLANNED, Panel
from attnbench.history.series import GRAVITY, RunValue

#: A chunk of series is one file, loaded when one of its series is opened: about this many in each.
_CHUNK_SERIES = 40

_NIGHTS_TOGETHER = 16

#: Histories of fewer runs are in one file a chunk.
_SHORT_HISTORY = 2 * _NIGHTS_TOGETHER

#: Values whose texts are held at once; bounds the memory.
_BLOCK_VALUES = 6_000_000

_THREADS = 2

_FORM = "1"  # of the files: raised when what is in them changes

_SHOWN = ("replicates", "confirmations", "noise", "num_samples", "discarded", "reasons")


def chunk_digits(num_series: int) -> int:
    """How many digits of a series' id name its chunk."""
    digits = 0
    while digits < 4 and num_series > _CHUNK_SERIES * 16**digits:
        digits += 1
    return digits


@dataclass(frozen=True)
class Chunk:
    """Some series of a panel. `name` is what their ids begin with, `split` the first newer run."""

    panel: Panel
    name: str
    series: NDArray[np.int64]
    split: int

    @property
    def is_split(self) -> bool:
        return bool(self.split)

    def file(self, kind: str) -> str:
        """The name of one of its data files."""
        return f"{kind}-{self.name or 'all'}"

    @cached_property
    def stamp(self) -> str:
        """Changes when the older values do; "" where that cannot be told."""
        stamps = [self.panel.stamp(run) for run in range(self.split)]
        if not all(stamps):
            return ""
        parts = [_FORM, *(self.panel.ids[index] for index in self.series.tolist()), *stamps]
        for run in range(self.split):
            if len(joined := self.panel.joined_series(run)):
                own = np.intersect1d(joined, self.series)
                parts += [f"{run}:{self.panel.ids[index]}" for index in own.tolist()]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def chunks_of(panel: Panel) -> list[Chunk]:
    """The chunks of a panel; those with older values differ in when they are rewritten."""
    digits = chunk_digits(panel.num_series)
    members: dict[str, list[int]] = {}
    for index, name in enumerate(panel.ids):
        members.setdefault(name[:digits], []).append(index)
    return [
        Chunk(panel, name, np.array(series, np.int64), _split(panel.num_runs, name))
        for name, series in sorted(members.items())
    ]


def _split(num_runs: int, name: str) -> int:
    if num_runs < _SHORT_HISTORY:
        return 0
    turn = int(name or "0", 16) % _NIGHTS_TOGETHER
    return (num_runs + turn) // _NIGHTS_TOGETHER * _NIGHTS_TOGETHER - turn


def older_files(
    chunks: Sequence[Chunk], written: Callable[[str, str], str | None]
) -> Iterator[tuple[str, str]]:
    """Name and JSON text of each chunk's older values: series id -> list of values.

    `written(name, stamp)` is the text of a file of an earlier rendering (`DataFiles.text`): where
    there is one of the chunk's last turn, only the nights since then are added to it.
    """
    for block in _blocks(chunks):
        panel = block[0].panel
        before = [_written_before(chunk, written) for chunk in block]
        series = np.concatenate([chunk.series for chunk in block])
        starts = np.concatenate([np.full(len(texts), start) for start, texts in before])
        ends = np.concatenate([np.full(len(chunk.series), chunk.split) for chunk in block])
        added = _values_text(panel, series, starts, ends)
        texts = [
            _lists_joined(old, new)
            for old, new in zip((text for _, texts in before for text in texts), added, strict=True)
        ]
        yield from _by_chunk(block, texts, "values")


def _written_before(
    chunk: Chunk, written: Callable[[str, str], str | None]
) -> tuple[int, list[str]]:
    """The first run that an earlier file does not have, and its text of each series."""
    earlier = replace(chunk, split=max(0, chunk.split - _NIGHTS_TOGETHER))
    text = written(chunk.file("values"), earlier.stamp) if earlier.is_split else None
    if text is None:
        return 0, ["[]"] * len(chunk.series)
    # No text of a value has this: a quote inside a text is escaped, and none of them is a key.
    marks = [f'"{chunk.panel.ids[index]}":' for index in chunk.series.tolist()]
    places = [text.index(mark) for mark in marks]
    bounds = zip(marks, places, [*places[1:], len(text)], strict=True)
    return earlier.split, [text[start + len(mark) : end - 1] for mark, start, end in bounds]


def _lists_joined(first: str, second: str) -> str:
    """The JSON text of two lists, one after the other."""
    if first == "[]" or second == "[]":
        return second if first == "[]" else first
    return f"{first[:-1]},{second[1:]}"


def newer_files(
    chunks: Sequence[Chunk], heads: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, str]]:
    """Name and JSON text of each chunk: series id -> its entry of `heads` and its newer values.

    `heads` has an entry for every series of the panel.
    """
    for block in _blocks(chunks):
        panel = block[0].panel
        series = np.concatenate([chunk.series for chunk in block])
        starts = np.concatenate([np.full(len(chunk.series), chunk.split) for chunk in block])
        values = _values_text(panel, series, starts, np.full_like(starts, panel.num_runs))
        has_older = (starts > 0).tolist()
        texts = [
            f'{to_json({**heads[index], "older": older})[:-1]},"values":{text}}}'
            for index, older, text in zip(series.tolist(), has_older, values, strict=True)
        ]
        yield from _by_chunk(block, texts, "series")


def _blocks(chunks: Sequence[Chunk]) -> Iterator[list[Chunk]]:
    block: list[Chunk] = []
    count = 0
    for chunk in chunks:
        block.append(chunk)
        count += len(chunk.series) * chunk.panel.num_runs
        if count >= _BLOCK_VALUES:
            yield block
            block, count = [], 0
    if block:
        yield block


def _by_chunk(block: Sequence[Chunk], texts: Sequence[str], kind: str) -> Iterator[tuple[str, str]]:
    at = 0
    for chunk in block:
        own = texts[at : at + len(chunk.series)]
        at += len(chunk.series)
        entries = (
            f'"{chunk.panel.ids[index]}":{text}'
            for index, text in zip(chunk.series.tolist(), own, strict=True)
        )
        yield chunk.file(kind), "{" + ",".join(entries) + "}"


def _values_text(
    panel: Panel,
    series: NDArray[np.int64],
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
) -> list[str]:
    """The JSON array of the values of each series in its runs from `starts` up to `ends`."""

    def column(run: int) -> pa.StringArray | None:
        planned = panel.status[series, run] != NOT_PLANNED
        wanted = np.flatnonzero(planned & (starts <= run) & (run < ends))
        if not len(wanted):
            return None
        at = np.full(len(series), -1)
        at[wanted] = np.arange(len(wanted))
        return _run_texts(panel, series[wanted], run).take(pa.array(at, mask=at < 0))

    # Reading and joining release the interpreter's lock; more threads only take more memory.
    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(column, range(int(starts.min()), int(ends.max()))))
    columns = [texts for texts in found if texts is not None]
    if not columns:
        return ["[]"] * len(series)
    # Rows without any value are dropped from a join: the bracket is one that all have.
    first = pa.array(["["] * len(series))
    joined = pc.binary_join_element_wise(first, *columns, ",", null_handling="skip")
    opened = pc.replace_substring(joined, "[,", "[", max_replacements=1)
    texts: list[str] = joined_texts([opened, "]"]).to_pylist()
    return texts


def _run_texts(panel: Panel, series: NDArray[np.int64], run: int) -> pa.StringArray:
    """[run, status, replicates, confirmations, noise, samples, discarded, reasons] of each."""
    own = panel.own_rows(run)[series]
    joined = np.isin(series, panel.joined_series(run))
    digest = panel.digest(run, _SHOWN).take(pa.array(np.maximum(own, 0)))
    codes = pa.array(panel.status[series, run].astype(np.int64))
    parts: list[pa.StringArray | str] = [f"[{run}", _STATUS_TEXTS.take(codes)]
    parts += [value_texts(_rounded(digest[name], name)) for name in _SHOWN[:-1]]
    parts += [joined_texts([value_texts(digest["reasons"]), "]"])]
    texts = joined_texts(parts, ",")
    if joined.any():
        # Of several digest rows: few, and merged as everywhere else.
        values = panel.values_of_run(series[joined], run)
        merged = pa.array([to_json(value_data(value, run)) for value in values], pa.string())
        texts = pc.replace_with_mask(texts, pa.array(joined), merged)
    return texts


def _rounded(column: pa.ChunkedArray, name: str) -> pa.Array:
    """Nobody reads more of a spread than four digits after the point of a percentage."""
    array = column.combine_chunks()
    if name != "noise":
        return array
    # Many times as fast as Arrow's; what is missing is NaN, which becomes null as well.
    return pa.array(np.round(array.to_numpy(zero_copy_only=False), 6))


def value_data(value: RunValue, run: int) -> list[Any]:
    """One value as the series page has it."""
    return [
        run,
        str(value.status),
        list(value.replicates),
        list(value.confirmations),
        None if value.noise is None else round(value.noise, 6),
        value.num_samples,
        value.discarded,
        list(value.reasons),
    ]


_STATUS_TEXTS = pa.array([to_json(str(status)) for status in GRAVITY])
