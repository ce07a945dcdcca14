"""A sealed file that was changed, cut, rewritten, or is of another version, or not ours."""

from __future__ import annotations

import contextlib
import hashlib
import random
import resource
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from attnbench.errors import (
    CorruptDataError,
    DataError,
    InfrastructureError,
    ResultsFolderError,
    SchemaError,
)
from attnbench.store import ResultsFolder, schema, sealed
from attnbench.store.schema import SCHEMA_VERSION, rows_to_table
from attnbench.store.sealed import SealedFile, write_sealed
from tests.store.rows import make_header, make_row, numbers, store_run

HEADER = make_header()


@pytest.fixture
def folder(tmp_path: Path) -> ResultsFolder:
    return ResultsFolder(tmp_path / "results")


@pytest.fixture
def file(folder: ResultsFolder) -> Path:
    return store_run(folder, HEADER, 30)


def test_the_digests_are_where_the_docs_say(file: Path) -> None:
    data = file.read_bytes()
    assert data[:4] == data[-4:] == b"PAR1"
    after = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    block = data[after - 80 : after]
    assert block[:16] == b"attnbench sha256"
    assert block[16:48] == hashlib.sha256(data[: after - 80]).digest()
    assert block[48:] == hashlib.sha256(data[after:]).digest()


def test_other_parquet_readers_read_it(file: Path) -> None:
    assert numbers(pq.read_table(file)) == list(range(30))
    pages = pq.ParquetFile(file).metadata.metadata
    assert pages[b"attnbench.schema_version"] == str(SCHEMA_VERSION).encode()
    assert b"attnbench.schema_history" in pages


def test_each_of_100_flipped_bits_is_found(folder: ResultsFolder, file: Path) -> None:
    data = file.read_bytes()
    stored = folder.table()
    chance = random.Random(2026)
    bits = [chance.randrange(len(data) * 8) for _ in range(70)]
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    bits += [chance.randrange((footer - 80) * 8, len(data) * 8) for _ in range(30)]
    for bit in bits:
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        report = folder.check()
        assert report.bad_files == (file,), bit
        assert not report.is_ok
        with contextlib.suppress(DataError):  # reading may not need the bit, but is never wrong
            assert folder.table().equals(stored), bit
    file.write_bytes(data)
    assert folder.check().is_ok


def test_a_file_cut_at_any_length_is_named_with_the_mend(folder: ResultsFolder, file: Path) -> None:
    data = file.read_bytes()
    for length in [0, 1, 7, 8, 100, len(data) // 2, len(data) - 1]:
        file.write_bytes(data[:length])
        for reading in (folder.table, lambda: folder.query("SELECT 1 FROM results"), folder.runs):
            with pytest.raises(CorruptDataError) as caught:
                reading()
            assert str(file) in str(caught.value)
            assert "restore it from a backup" in str(caught.value)
            assert "\n" not in str(caught.value)
        assert folder.check().bad_files == (file,)


def test_a_corrupt_file_stops_a_new_run_before_it_measures(
    folder: ResultsFolder, file: Path
) -> None:
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CorruptDataError):
        folder.open_run(make_header(22))


def test_a_file_another_tool_rewrote_is_reported(folder: ResultsFolder, file: Path) -> None:
    table = pq.read_table(file)
    kept = {k: v for k, v in pq.read_metadata(file).metadata.items() if k.startswith(b"attn")}
    pq.write_table(table.replace_schema_metadata(kept), file)
    with pytest.raises(CorruptDataError, match="lacks its SHA-256"):
        folder.table()
    assert folder.check().bad_files == (file,)


def test_a_parquet_file_that_is_not_ours_is_refused(folder: ResultsFolder, file: Path) -> None:
    other = file.with_name("holiday.parquet")
    pq.write_table(pa.table({"a": list(range(1000))}), other)
    with pytest.raises(SchemaError, match=r"holiday\.parquet: not a results file of attnbench"):
        folder.table()
    (problem,) = folder.check().problems
    assert (problem.path, problem.text.split(";")[0]) == (other, "not a results file of attnbench")


def test_a_newer_version_is_refused_naming_both_and_the_mend(
    folder: ResultsFolder, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sealed, "SCHEMA_VERSION", SCHEMA_VERSION + 6)
        write_sealed(file, [rows_to_table([make_row(HEADER.run_id, 0)])], [HEADER])
    ours, theirs = f"up to {SCHEMA_VERSION};", f"version {SCHEMA_VERSION + 6},"
    for reading in (folder.table, lambda: folder.open_run(make_header(22)), folder.compact):
        with pytest.raises(SchemaError, match="pip install --upgrade attnbench") as caught:
            reading()
        assert ours in str(caught.value)
        assert theirs in str(caught.value)
    assert folder.check().bad_files == (file,)


def _older_file(path: Path, monkeypatch: pytest.MonkeyPatch, missing: list[str]) -> None:
    """A file as an attnbench before the columns `missing` would have written it."""
    table = rows_to_table([make_row(HEADER.run_id, number) for number in range(5)])
    older = pa.schema([f for f in table.schema if f.name not in missing])
    with monkeypatch.context() as patch:
        patch.setattr(sealed, "SCHEMA_VERSION", 0)
        patch.setattr(sealed, "SCHEMA", older)
        write_sealed(path, [table.select(older.names)], [HEADER])


def test_an_older_version_is_read_with_the_records_defaults(
    folder: ResultsFolder, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = ["kv_cache_layout", "reasons", "conditions_after", "rel_error"]
    _older_file(file, monkeypatch, missing)
    store_run(folder, make_header(22), 2)
    table = folder.table()
    assert table.schema.equals(schema.SCHEMA)
    assert numbers(table) == [0, 0, 1, 1, 2, 3, 4]
    old = folder.table(["reasons", "kv_cache_layout", "rel_error"], {"run_id": HEADER.run_id})
    assert set(old["kv_cache_layout"].to_pylist()) == {"NHD"}
    assert old["reasons"].to_pylist() == [[]] * 5
    assert old["rel_error"].to_pylist() == [None] * 5
    counted = folder.query("SELECT kv_cache_layout, count(*) AS n FROM results GROUP BY ALL")
    assert counted.to_pylist() == [{"kv_cache_layout": "NHD", "n": 7}]
    assert folder.check().is_ok
    folder.compact()
    assert SealedFile.open(folder.path / "months" / "2026-11.parquet").is_current
    assert numbers(folder.table()) == [0, 0, 1, 1, 2, 3, 4]


def test_a_file_without_a_column_that_has_no_default_is_refused(
    folder: ResultsFolder, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _older_file(file, monkeypatch, ["backend"])
    with pytest.raises(SchemaError, match="column backend is missing"):
        folder.table()
    assert folder.check().bad_files == (file,)


def test_a_full_disk_leaves_the_old_file_and_nothing_else(file: Path) -> None:
    before = file.read_bytes()
    rows = [make_row(HEADER.run_id, n, hostname=str(random.random())) for n in range(2000)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    table = rows_to_table(rows)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(InfrastructureError, match=rf"{file.name}.*free some space"):
            write_sealed(file, [table], [HEADER])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ResultsFolderError, match=r"none/a\.parquet"):
        write_sealed(tmp_path / "none" / "a.parquet", [], [HEADER])
    with pytest.raises(ResultsFolderError, match=r"a\.parquet: cannot be read"):
        SealedFile.open(tmp_path / "a.parquet")


def test_a_flipped_bit_in_the_samples_never_reads_as_other_numbers(file: Path) -> None:
    data = file.read_bytes()
    group = pq.read_metadata(file).row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    samples = columns["samples.list.element"]
    assert not samples.has_dictionary_page
    end = samples.data_page_offset + samples.total_compressed_size
    for offset in range(end - 100, end):
        damaged = bytearray(data)
        damaged[offset] ^= 0x10
        file.write_bytes(damaged)
        with pytest.raises(CorruptDataError, match=str(file)):
            SealedFile.open(file).read(["samples"])
