"""The schema against the record it is derived from, and rows through every form they take."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any, get_type_hints

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnbench.store.journal import Journal, read_journal
from attnbench.store.record import Measurement, Status
from attnbench.store.schema import (
    HISTORY,
    ROW_KEY,
    SCHEMA,
    SCHEMA_VERSION,
    row_from_json,
    row_to_json,
    rows_to_table,
    table_to_rows,
    upgrade,
)
from attnbench.store.sealed import SealedFile, write_sealed
from tests.store.rows import make_header, make_row

# Text that UTF-8 can hold; what it cannot is tested where rows are appended.
_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
_TIMES = st.datetimes(
    datetime(1970, 1, 1),
    datetime(2200, 1, 1),
    timezones=st.sampled_from([UTC, timezone(timedelta(hours=5, minutes=30))]),
)
_FLOATS = st.floats(allow_nan=False)
_VALUES: dict[Any, st.SearchStrategy[Any]] = {
    str: _TEXT,
    int: st.integers(-(2**63), 2**63 - 1),
    float: _FLOATS,
    bool: st.booleans(),
    datetime: _TIMES,
    datetime | None: st.none() | _TIMES,
    float | None: st.none() | _FLOATS,
    int | None: st.none() | st.integers(-(2**63), 2**63 - 1),
    tuple[str, ...]: st.lists(_TEXT, max_size=3).map(tuple),
    tuple[float, ...]: st.lists(_FLOATS, max_size=3).map(tuple),
    Mapping[str, float]: st.dictionaries(_TEXT, _FLOATS, max_size=3),
}


def measurements() -> st.SearchStrategy[Measurement]:
    hints = get_type_hints(Measurement)
    values = {name: _VALUES[hint] for name, hint in hints.items()}
    values["sm_clock_hz"] = st.lists(st.floats(allow_nan=False, width=32), max_size=3).map(tuple)
    return st.builds(Measurement, **values)


@settings(deadline=None, max_examples=60)
@given(rows=st.lists(measurements(), max_size=3))
def test_every_field_comes_back_from_journal_and_parquet(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Measurement]
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    header = make_header()
    journal = Journal(folder / "a.journal", header)
    for row in rows:
        journal.append(row)
    journal.close()
    read = read_journal(folder / "a.journal")
    assert read.header == header
    assert list(read.rows) == rows

    write_sealed(folder / "a.parquet", [rows_to_table(rows)], [header])
    file = SealedFile.open(folder / "a.parquet")
    table = file.read()
    assert table.schema.equals(SCHEMA)
    assert table_to_rows(table) == rows
    assert file.headers() == [header]


def test_nan_and_infinities_come_back() -> None:
    row = make_row("r", 0, samples=(float("nan"), float("inf")), max_abs_error=float("-inf"))
    again = row_from_json(json.loads(json.dumps(row_to_json(row))))
    (stored,) = table_to_rows(rows_to_table([again]))
    assert str(stored.samples) == "(nan, inf)"
    assert stored.max_abs_error == float("-inf")


def test_columns_are_the_fields_of_the_record_in_order() -> None:
    assert SCHEMA.names == [field.name for field in fields(Measurement)]


def test_types_are_the_ones_agreed() -> None:
    types = {field.name: str(field.type) for field in SCHEMA}
    assert pa.types.is_float64(SCHEMA.field("samples").type.value_type)
    assert pa.types.is_float32(SCHEMA.field("sm_clock_hz").type.value_type)
    assert types["reasons"].startswith("list<")
    assert pa.types.is_string(SCHEMA.field("reasons").type.value_type)
    assert types["conditions_before"] == "map<string, double>"
    assert types["started_at"] == "timestamp[us, tz=UTC]"
    assert types["seed"] == "int64"
    assert types["has_sink"] == "bool"


def test_only_what_may_be_none_is_nullable() -> None:
    assert {field.name for field in SCHEMA if field.nullable} == {
        "timer_floor_s",
        "reuse_distance_bytes",
        "commit_time",
        "max_abs_error",
        "rel_error",
    }


def test_the_columns_of_a_version_do_not_change() -> None:
    # Red here: a column was added, renamed or retyped. Raise SCHEMA_VERSION, say in HISTORY what
    # changed, give a new column a default, and put the new digest here beside the older ones.
    digests = {1: "058dd5bdf99270ae", 2: "3e8c022e2efbf0cb"}
    described = "\n".join(f"{f.name}: {f.type}" for f in fields(Measurement))
    assert hashlib.sha256(described.encode()).hexdigest()[:16] == digests[SCHEMA_VERSION]
    assert sorted(HISTORY) == sorted(digests)


def test_rows_of_the_first_version_are_dense() -> None:
    new = ["topk_tokens", "topk_pattern"]
    old = rows_to_table([make_row("run", 0, topk_tokens=64, topk_pattern="random")])
    (row,) = table_to_rows(upgrade(old.drop_columns(new), "old.parquet"))
    assert (row.topk_tokens, row.topk_pattern) == (0, "")
    (row,) = table_to_rows(upgrade(old, "new.parquet"))
    assert (row.topk_tokens, row.topk_pattern) == (64, "random")


def test_the_row_key_is_the_records() -> None:
    row = make_row("run", 3, replicate=2, l2_state="cold")
    assert tuple(str(getattr(row, name)) for name in ROW_KEY) == row.key


@pytest.mark.parametrize(
    "changes",
    [
        {"started_at": datetime(2026, 1, 1)},  # no time zone
        {"num_reqs": None},
        {"num_reqs": 2**63},
        {"backend": None},
        {"samples": ("a",)},
    ],
)
def test_a_value_of_a_wrong_kind_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError, OverflowError)):
        rows_to_table([make_row("run", 0, **changes)])


def test_a_journal_row_of_another_version_gets_defaults_and_loses_what_is_unknown() -> None:
    values = row_to_json(make_row("run", 0))
    del values["kv_cache_layout"]
    values["of_tomorrow"] = 1
    row = row_from_json(values)
    assert row.kv_cache_layout == "NHD"
    assert row.status == Status.OK


def test_a_row_is_one_line_of_json(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a.journal", make_header())
    journal.append(make_row("run", 0, reasons=("two\nlines",)))
    journal.close()
    lines = (tmp_path / "a.journal").read_bytes().splitlines()
    assert len(lines) == 2
    checksum, payload = lines[1].split(b" ", 1)
    assert hashlib.blake2b(payload, digest_size=8).hexdigest().encode() == checksum
    assert json.loads(payload)["row"]["reasons"] == ["two\nlines"]
