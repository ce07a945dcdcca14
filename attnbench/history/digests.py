"""Digests kept beside the runs they follow from: `<results>/.digests/<run id>.parquet`.

A kept digest counts only if it carries the stamp of its run (`RunSource.stamp`: the SHA-256 of the
run's own bytes) and this version of digests, and equals its own SHA-256. Any other is made again
from the run. They are derived: remove them whenever you like. Where they cannot be kept (a folder
that is only read, a full disk) they are made again by every process.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from attnbench.errors import DataError, ResultsFolderError
from attnbench.history.digest import (
    CORE,
    DIGEST_SCHEMA,
    DIGEST_VERSION,
    digest_of,
    summary_of_digest,
)
from attnbench.history.runs import NEEDED_COLUMNS, RunSummary
from attnbench.history.series_rows import split_references
from attnbench.store.disk import remove_file
from attnbench.store.record import short_hash
from attnbench.store.sealed import check_body, insert_digests, read_digests
from attnbench.store.sources import RunSource

FOLDER = ".digests"

#: What a digest holds and in which columns.
_FORM = f"{DIGEST_VERSION}:{short_hash('digest', str(DIGEST_SCHEMA))}"

_STAMP_KEY = b"attnbench.digest_stamp"

#: Series are opened one by one: a row group is what is read of a run for one of them.
_ROW_GROUP_ROWS = 16 * 1024

#: Reading and sorting release the interpreter's lock; more threads only take more memory.
_THREADS = 2


class Digest(Protocol):
    """One run's digest, wherever it lies."""

    @property
    def stamp(self) -> str: ...

    @property
    def summary(self) -> RunSummary: ...

    def read(self, columns: Sequence[str]) -> pa.Table:
        """These columns of it, all rows."""
        ...


@dataclass(frozen=True, slots=True)
class HeldDigest:
    """In memory."""

    table: pa.Table
    summary: RunSummary
    stamp: str = ""

    def read(self, columns: Sequence[str]) -> pa.Table:
        return self.table.select(list(columns))


@dataclass(frozen=True, slots=True)
class KeptDigest:
    """In a file."""

    path: Path
    stamp: str
    summary: RunSummary

    def read(self, columns: Sequence[str]) -> pa.Table:
        """Raises ResultsFolderError if the file was removed or replaced since it was opened."""
        try:
            return _read(self.path, self.stamp, columns)
        except (DataError, OSError, pa.ArrowException, ValueError, KeyError) as error:
            raise ResultsFolderError(
                f"{self.path}: changed while it was read (another attnbench wrote it?); "
                "run the command again"
            ) from error


class Digests:
    """The digests of one results folder. `folder` None: in memory only."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder and folder / FOLDER

    def of(self, sources: Sequence[RunSource]) -> list[tuple[RunSource, Digest, pa.Table]]:
        """Each run that has rows, with its digest and the columns CORE of it.

        A digest is made where there is none that counts.

        Raises CorruptDataError or SchemaError for a run that cannot be read.
        """
        if self._folder is not None and not _can_write(self._folder):
            # Not in memory: the digests of years of nights may be bigger than that.
            self._folder = Path(tempfile.mkdtemp(prefix="attnbench-digests-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        with ThreadPoolExecutor(_THREADS) as pool:
            found = list(pool.map(self._one, sources))
        return [(source, *one) for source, one in zip(sources, found, strict=True) if one]

    def _one(self, source: RunSource) -> tuple[Digest, pa.Table] | None:
        if not source.stamp or self._folder is None:
            return (held, held.read(CORE)) if (held := _held(source)) else None
        path = self._folder / f"{_file_name(source.run_id)}.parquet"
        stamp = f"{_FORM}:{source.stamp}"
        try:
            check_body(path, *read_digests(path))
            core = _read(path, stamp, CORE)
            return KeptDigest(path, stamp, summary_of_digest(core)), core
        except (DataError, OSError, pa.ArrowException, ValueError, KeyError, TypeError):
            held = _held(source)
            if held is None:
                return None
            kept = _write(path, stamp, held.table)
            core = held.read(CORE)
            return (KeptDigest(path, stamp, held.summary) if kept else held), core


def _held(source: RunSource) -> HeldDigest | None:
    rows = source.read(NEEDED_COLUMNS)
    if split_references(rows)[0].num_rows == 0:
        return None
    table = digest_of(source.run_id, rows)
    return HeldDigest(table, summary_of_digest(table), source.stamp)


def _file_name(run_id: str) -> str:
    """A published run may have been called anything."""
    return run_id if re.fullmatch(r"\w[\w-]{0,99}", run_id) else short_hash("run", run_id)


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def _read(path: Path, stamp: str, columns: Sequence[str]) -> pa.Table:
    """Raises ValueError for another stamp; see `read_digests` for the rest."""
    read_digests(path)
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        metadata = file.schema_arrow.metadata or {}
        if metadata.get(_STAMP_KEY, b"").decode() != stamp:
            raise ValueError(f"{path}: of another run, or of its rows before")
        return file.read(list(columns))


def _write(path: Path, stamp: str, table: pa.Table) -> bool:
    """Whole or not at all; False if it cannot be written, which costs time and nothing else."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    metadata = {**(table.schema.metadata or {}), _STAMP_KEY: stamp.encode()}
    try:
        pq.write_table(
            table.replace_schema_metadata(metadata),
            temporary,
            compression="zstd",
            row_group_size=_ROW_GROUP_ROWS,
            write_page_checksum=True,
        )
        insert_digests(temporary)
        os.replace(temporary, path)
    except (OSError, pa.ArrowException):
        remove_file(temporary)
        return False
    return True
