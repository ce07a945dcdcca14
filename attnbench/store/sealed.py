"""A sealed file: Parquet with page checksums, and two digests that cover every one of its bytes.

    PAR1 · pages · [ magic | SHA-256 of all before | SHA-256 of all after ] · footer · length · PAR1

Page checksums cover the data of pages, but neither their headers nor the footer. The block between
the last page and the footer does; Parquet readers find pages by offset and the footer from the end,
so they never see it. It is part of the file, hence never missing after a crash and never out of
step as a file beside it could be. The footer's digest is checked at every open, before it is
parsed; the pages' digest by `verify`; page checksums whenever pages are read.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from attnbench.errors import CorruptDataError, DataError, ResultsFolderError, SchemaError
from attnbench.store import disk
from attnbench.store.header import RunHeader
from attnbench.store.schema import HISTORY, SCHEMA, SCHEMA_VERSION, check_version, upgrade

_BLOCK_MAGIC = b"attnbench sha256"
_DIGEST_SIZE = hashlib.sha256().digest_size
_BLOCK_SIZE = len(_BLOCK_MAGIC) + 2 * _DIGEST_SIZE
_TAIL_SIZE = 8  # footer length and "PAR1"
_PARQUET_MAGIC = b"PAR1"

_ROW_GROUP_ROWS = 64 * 1024
_UNCODED = ("samples.list.element", "sm_clock_hz.list.element")  # no two alike: no dictionary

_VERSION_KEY = b"attnbench.schema_version"
_HISTORY_KEY = b"attnbench.schema_history"
_RUN_IDS_KEY = b"attnbench.run_ids"
_HEADERS_KEY = b"attnbench.run_headers"


def write_sealed(path: Path, tables: Iterable[pa.Table], headers: Sequence[RunHeader]) -> None:
    """Write `tables` (of SCHEMA) and the headers of their runs to `path`, whole or not at all.

    Raises InfrastructureError for a full disk, ResultsFolderError for any other failed write.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with disk.writing(path):
        try:
            _write_parquet(temporary, tables, headers)
            insert_digests(temporary)
            disk.replace_file(temporary, path)
        except Exception:
            if temporary.parent.is_dir():
                disk.remove_file(temporary)
            raise


def _write_parquet(path: Path, tables: Iterable[pa.Table], headers: Sequence[RunHeader]) -> None:
    coded = [name for name in _leaf_paths(SCHEMA) if name not in _UNCODED]
    packed = zlib.compress(json.dumps([header.to_json() for header in headers]).encode())
    with pq.ParquetWriter(
        path,
        SCHEMA,
        compression="zstd",
        use_dictionary=coded,
        write_page_checksum=True,
    ) as writer:
        for table in _gathered(tables):
            writer.write_table(table, row_group_size=_ROW_GROUP_ROWS)
        writer.add_key_value_metadata(
            {
                _VERSION_KEY.decode(): str(SCHEMA_VERSION),
                _HISTORY_KEY.decode(): json.dumps({str(k): v for k, v in HISTORY.items()}),
                _RUN_IDS_KEY.decode(): json.dumps([header.run_id for header in headers]),
                _HEADERS_KEY.decode(): base64.b64encode(packed).decode(),
            }
        )


def _gathered(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Small tables together: a row group each would make the footer bigger than the rows."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(part.num_rows for part in waiting) >= _ROW_GROUP_ROWS:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


def _leaf_paths(schema: pa.Schema) -> Iterator[str]:
    """Parquet's names of the leaf columns of a schema."""
    for field in schema:
        if pa.types.is_map(field.type):
            yield from (f"{field.name}.key_value.key", f"{field.name}.key_value.value")
        elif pa.types.is_list(field.type):
            yield f"{field.name}.list.element"
        else:
            yield field.name


def insert_digests(path: Path) -> None:
    """Put the block of digests into a Parquet file that was just written."""
    with path.open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(size - _TAIL_SIZE)
        body_size = size - _TAIL_SIZE - int.from_bytes(file.read(4), "little")
        file.seek(body_size)
        footer = file.read()
        body = _digest(file, body_size)
        file.seek(body_size)
        file.write(_BLOCK_MAGIC + body + hashlib.sha256(footer).digest() + footer)


def _digest(file: Any, size: int) -> bytes:
    """SHA-256 of the first `size` bytes of an open binary file."""
    digest = hashlib.sha256()
    file.seek(0)
    while size > 0:
        chunk = file.read(min(size, 1 << 20))
        if not chunk:
            break
        digest.update(chunk)
        size -= len(chunk)
    return digest.digest()


@dataclass(frozen=True, slots=True)
class SealedFile:
    """A sealed file whose footer is proved; its pages are proved when they are read."""

    path: Path
    schema_version: int
    run_ids: tuple[str, ...]
    columns: tuple[str, ...]
    num_rows: int
    body_size: int  # bytes before the block of digests
    body_digest: bytes
    packed_headers: bytes

    @classmethod
    def open(cls, path: Path) -> SealedFile:
        """Read and prove the footer.

        Raises CorruptDataError for a truncated or changed file, SchemaError for a newer version or
        for a Parquet file that is not ours, ResultsFolderError for a file that cannot be read.
        """
        try:
            body_size, body_digest = read_digests(path)
            metadata = pq.read_metadata(path)
        except (OSError, pa.ArrowException) as error:
            raise _read_error(path, error) from error
        known: Mapping[bytes, bytes] = metadata.metadata or {}
        try:
            version = int(known[_VERSION_KEY])
            check_version(version, path)
            return cls(
                path=path,
                schema_version=version,
                run_ids=tuple(json.loads(known[_RUN_IDS_KEY])),
                columns=tuple(metadata.schema.to_arrow_schema().names),
                num_rows=metadata.num_rows,
                body_size=body_size,
                body_digest=body_digest,
                packed_headers=known[_HEADERS_KEY],
            )
        except (KeyError, ValueError) as error:
            raise SchemaError(_not_ours(path)) from error

    def headers(self) -> list[RunHeader]:
        """The headers of the runs in the file."""
        unpacked = zlib.decompress(base64.b64decode(self.packed_headers))
        return [RunHeader.from_json(value) for value in json.loads(unpacked)]

    @property
    def is_current(self) -> bool:
        """Whether the file has exactly the columns of this version."""
        return self.columns == tuple(SCHEMA.names)

    def verify(self) -> None:
        """Prove every byte before the footer. Raises CorruptDataError."""
        try:
            check_body(self.path, self.body_size, self.body_digest)
        except OSError as error:
            raise _read_error(self.path, error) from error

    def read(
        self, columns: Sequence[str] = SCHEMA.names, where: pc.Expression | None = None
    ) -> pa.Table:
        """Rows as a table of `columns` in SCHEMA's types, page checksums verified.

        Raises CorruptDataError, or SchemaError for a column of another type.
        """
        options = ds.ParquetFragmentScanOptions(page_checksum_verification=True)
        data_format = ds.ParquetFileFormat(default_fragment_scan_options=options)
        try:
            dataset = ds.dataset(self.path, format=data_format)
            if self.is_current:
                table = dataset.to_table(columns=list(columns), filter=where)
                return upgrade(table, self.path, columns)
            table = upgrade(dataset.to_table(), self.path)
        except (OSError, pa.ArrowException) as error:
            raise _read_error(self.path, error) from error
        return (table if where is None else table.filter(where)).select(list(columns))

    def row_groups(self) -> Iterator[pa.Table]:
        """The file piece by piece, as `read` would give it, for files too big to hold."""
        try:
            with pq.ParquetFile(self.path, page_checksum_verification=True) as file:
                for index in range(file.num_row_groups):
                    yield upgrade(file.read_row_group(index), self.path)
        except (OSError, pa.ArrowException) as error:
            raise _read_error(self.path, error) from error


def check_body(path: Path, size: int, digest: bytes) -> None:
    """Prove the bytes that `read_digests` tells of. Raises CorruptDataError or OSError."""
    with path.open("rb") as file:
        found = _digest(file, size)
    if found != digest:
        raise CorruptDataError(_corrupt(path, "its bytes differ from its SHA-256"))


def read_digests(path: Path) -> tuple[int, bytes]:
    """Size and SHA-256 of the body, once the footer is proved. Raises DataError or OSError."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _TAIL_SIZE))
        tail = file.read()
        if len(tail) < _TAIL_SIZE or tail[4:] != _PARQUET_MAGIC:
            raise CorruptDataError(_corrupt(path, "it does not end as a Parquet file does"))
        after_size = _TAIL_SIZE + int.from_bytes(tail[:4], "little")
        body_size = size - after_size - _BLOCK_SIZE
        if body_size < len(_PARQUET_MAGIC):
            return _explain_no_block(path)
        file.seek(body_size)
        block = file.read(_BLOCK_SIZE)
        after = file.read()
    if not block.startswith(_BLOCK_MAGIC):
        return _explain_no_block(path)
    digests = block[len(_BLOCK_MAGIC) :]
    if hashlib.sha256(after).digest() != digests[_DIGEST_SIZE:]:
        raise CorruptDataError(_corrupt(path, "its footer differs from its SHA-256"))
    return body_size, digests[:_DIGEST_SIZE]


def _explain_no_block(path: Path) -> tuple[int, bytes]:
    try:
        known = pq.read_metadata(path).metadata or {}
    except (OSError, pa.ArrowException) as error:
        raise CorruptDataError(_corrupt(path, "its footer cannot be read")) from error
    if _VERSION_KEY not in known:
        raise SchemaError(_not_ours(path))
    check_version(int(known[_VERSION_KEY]), path)
    raise CorruptDataError(_corrupt(path, "it lacks its SHA-256 (rewritten by another tool?)"))


def _read_error(path: Path, error: Exception) -> DataError:
    if isinstance(error, OSError) and error.errno is not None:
        return ResultsFolderError(
            f"{path}: cannot be read: {error.strerror}; make it readable, "
            "or name another folder with --results"
        )
    first_line = str(error).strip().splitlines()[0]
    return CorruptDataError(_corrupt(path, first_line))


def _corrupt(path: Path, what: str) -> str:
    return (
        f"{path}: corrupt: {what}; restore it from a backup or move it out of the folder "
        "(`attnbench results check` names every bad file)"
    )


def _not_ours(path: Path) -> str:
    return f"{path}: not a results file of attnbench; move it out of the folder"
