"""One run at a time: where its rows are, and a stamp that changes when they do."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from attnbench.store.layout import Layout, run_id_of
from attnbench.store.schema import SCHEMA, SCHEMA_VERSION
from attnbench.store.sealed import SealedFile


@dataclass(frozen=True, slots=True)
class RunSource:
    """The rows of one run.

    Attributes:
        stamp: the schema version and the SHA-256 of the pages of every file that has rows of the
            run, as those files declare it. It follows the bytes, not the file's name or times: a
            copied folder keeps its stamps, and a file that was written again has another one.
            "" for a run with rows in a journal, which no digest covers.
        is_published: read from `published/`.
    """

    run_id: str
    stamp: str
    is_published: bool
    files: tuple[SealedFile, ...]
    rest: pa.Table | None = None

    def read(self, columns: Sequence[str]) -> pa.Table:
        """The run's rows, page checksums verified. Raises CorruptDataError or SchemaError."""
        tables = [
            file.read(
                columns, None if len(file.run_ids) == 1 else pc.field("run_id") == self.run_id
            )
            for file in self.files
        ]
        if self.rest is not None:
            tables.append(self.rest.select(list(columns)))
        schema = pa.schema([SCHEMA.field(name) for name in columns])
        return pa.concat_tables([schema.empty_table(), *tables])


def run_sources(layout: Layout) -> tuple[RunSource, ...]:
    """The runs of a locked folder, in order of their ids. Raises DataError as `readable` does."""
    segments, rests = layout.readable()
    published = {run_id for run_id, _ in layout.published_of(segments)}
    files: dict[str, list[SealedFile]] = {}
    for segment in segments:
        for run_id in segment.run_ids:
            files.setdefault(run_id, []).append(segment.file)
    rest_of = {run_id_of(contents.path): rest for contents, rest in rests}
    return tuple(
        RunSource(
            run_id=run_id,
            stamp="" if run_id in rest_of else _stamp(files[run_id]),
            is_published=run_id in published,
            files=tuple(files.get(run_id, ())),
            rest=rest_of.get(run_id),
        )
        for run_id in sorted(files.keys() | rest_of.keys())
    )


def _stamp(files: Sequence[SealedFile]) -> str:
    digest = hashlib.sha256(str(SCHEMA_VERSION).encode())
    for file in files:
        digest.update(file.body_digest)
    return digest.hexdigest()
