"""Many run files into one file a month, so that a history of years opens as fast as one of days.

Each month in steps that may each be the last one before a kill: the month file is written under
another name; it gets its name in one step (from now on each run of it is in two files, and its own
counts); the run files are removed. The next compaction finishes what a kill left.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from attnbench.store import disk
from attnbench.store.header import RunHeader, month_of
from attnbench.store.layout import Layout, Segment
from attnbench.store.sealed import write_sealed


@dataclass(frozen=True, slots=True)
class CompactedMonth:
    """A month file and what went into it now."""

    path: Path
    num_runs: int  # run files merged into it now
    num_rows: int  # rows it has now


def compact(layout: Layout) -> list[CompactedMonth]:
    """Merge the sealed run files into month files. The caller holds the lock exclusively.

    Month files of an older schema version are written anew. Raises DataError for a file that is
    corrupt or of a newer version, and then changes nothing of that month.
    """
    by_month: dict[str, list[Segment]] = defaultdict(list)
    for segment in layout.segments():
        is_run = segment.file.path.parent == layout.runs
        month = month_of(segment.file.run_ids[0]) if is_run else segment.file.path.stem
        by_month[month].append(segment)
    compacted = []
    for month, segments in sorted(by_month.items()):
        run_files = [s.file.path for s in segments if s.file.path.parent == layout.runs]
        if not run_files and all(segment.file.is_current for segment in segments):
            continue
        for segment in segments:
            segment.file.verify()
        path = layout.month(month)
        rows = _Rows(segments)
        write_sealed(path, rows, _headers(segments))
        for run_file in run_files:
            with disk.writing(run_file):
                disk.remove_file(run_file)
        with disk.writing(layout.runs):
            disk.sync_file(layout.runs)
        compacted.append(CompactedMonth(path, len(run_files), rows.num_rows))
    return compacted


class _Rows:
    """The visible rows of segments, a row group at a time, counted as they pass."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = segments
        self.num_rows = 0

    def __iter__(self) -> Iterator[pa.Table]:
        for segment in self._segments:
            hidden = pa.array(sorted(segment.hidden), pa.string())
            for table in segment.file.row_groups():
                if segment.hidden:
                    table = table.filter(pc.invert(pc.is_in(table["run_id"], hidden)))
                self.num_rows += table.num_rows
                yield table


def _headers(segments: Sequence[Segment]) -> list[RunHeader]:
    headers = [
        header
        for segment in segments
        for header in segment.file.headers()
        if header.run_id not in segment.hidden
    ]
    return sorted(headers, key=lambda header: header.run_id)
