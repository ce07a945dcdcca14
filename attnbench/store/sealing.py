"""From journal to sealed file, in steps that may each be the last one before a kill.

1. The sealed file is written under another name (journal intact: nothing happened).
2. It gets its name in one step (journal and file hold the same rows: they count once).
3. The journal is removed, or set aside if a line of it is corrupt.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from attnbench.store import disk
from attnbench.store.header import RunHeader, month_of
from attnbench.store.journal import JournalContents, read_journal
from attnbench.store.layout import Layout, Segment, run_id_of, stored_rows, unsealed_rows
from attnbench.store.sealed import SealedFile, write_sealed


@dataclass(frozen=True, slots=True)
class SealedRun:
    """A run that was sealed. `set_aside` is its journal if some lines of it were corrupt."""

    run_id: str
    path: Path
    num_rows: int  # rows of the journal
    set_aside: Path | None = None
    corrupt_lines: tuple[int, ...] = ()


def seal_orphans(layout: Layout) -> list[SealedRun]:
    """Seal the journals of killed runs. The caller holds the folder's lock exclusively."""
    for folder in (layout.runs, layout.months):
        for leftover in folder.glob(".*.tmp"):
            disk.remove_file(leftover)
    sealed = []
    for path in layout.ended_journals():
        contents = read_journal(path)
        if contents.is_blank:
            disk.remove_file(path)
        else:
            sealed.append(seal_journal(layout, contents))
    return sealed


def seal_journal(layout: Layout, contents: JournalContents) -> SealedRun:
    """Seal one journal, together with what is sealed of its run already.

    The caller holds the folder's lock exclusively. Raises CorruptDataError if the sealed part is
    corrupt: sealing it again would give the damage a fresh checksum.
    """
    run_id = run_id_of(contents.path)
    segments = _segments_of(layout, run_id)
    for segment in segments:
        segment.file.verify()
    header = contents.header or _stored_header(segments, run_id) or RunHeader.salvaged(run_id)
    path = layout.sealed(run_id)
    write_sealed(path, [stored_rows(run_id, segments), unsealed_rows(contents, segments)], [header])
    set_aside = layout.set_aside(run_id) if contents.corrupt_lines else None
    with disk.writing(contents.path):
        if set_aside is not None:
            os.replace(contents.path, set_aside)
        else:
            disk.remove_file(contents.path)
        disk.sync_file(layout.runs)
    return SealedRun(run_id, path, len(contents.rows), set_aside, contents.corrupt_lines)


def _segments_of(layout: Layout, run_id: str) -> list[Segment]:
    """The files that hold the run, and no others: a bad file elsewhere must not stop a seal."""
    own = layout.sealed(run_id)
    if own.exists():
        return [Segment(SealedFile.open(own))]
    month = layout.month(month_of(run_id))
    if month.exists():
        segment = Segment(SealedFile.open(month))
        return [segment] if run_id in segment.run_ids else []
    return []


def _stored_header(segments: list[Segment], run_id: str) -> RunHeader | None:
    for segment in segments:
        for header in segment.file.headers():
            if header.run_id == run_id:
                return header
    return None
