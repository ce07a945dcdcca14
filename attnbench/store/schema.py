"""The one Arrow schema of the store, derived from `record.Measurement`, and its versions.

A column without None in its type is not nullable. A file of an older version is read: columns it
lacks get the record's default. A newer file is refused, since nobody here knows what it means.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from attnbench.errors import SchemaError
from attnbench.store.header import SCHEMA_VERSION as SCHEMA_VERSION
from attnbench.store.record import Measurement

#: What each version changed. A new column in the record needs a new version and a line here.
HISTORY: Mapping[int, str] = {
    1: "the first columns",
    2: "topk_tokens and topk_pattern: sparse attention; rows of before are dense",
}

#: Columns that make a row's key (`Measurement.key`), in its order.
ROW_KEY = ("run_id", "point_id", "metric", "timer", "l2_state", "execution", "replicate")

_ARROW_TYPES: Mapping[Any, pa.DataType] = {
    str: pa.string(),
    int: pa.int64(),
    float: pa.float64(),
    bool: pa.bool_(),
    datetime: pa.timestamp("us", tz="UTC"),
    tuple[str, ...]: pa.list_(pa.string()),
    tuple[float, ...]: pa.list_(pa.float64()),
    Mapping[str, float]: pa.map_(pa.string(), pa.float64()),
}

#: Clocks of some GHz need no more than seven digits.
_NARROW: Mapping[str, pa.DataType] = {"sm_clock_hz": pa.list_(pa.float32())}


def _arrow_field(name: str, annotation: Any) -> pa.Field:
    nullable = False
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        (annotation,) = (arg for arg in typing.get_args(annotation) if arg is not type(None))
        nullable = True
    return pa.field(name, _NARROW.get(name, _ARROW_TYPES[annotation]), nullable=nullable)


_HINTS = typing.get_type_hints(Measurement)
_FIELDS: Mapping[str, Field[Any]] = {f.name: f for f in fields(Measurement)}

SCHEMA: pa.Schema = pa.schema([_arrow_field(name, _HINTS[name]) for name in _FIELDS])

_TIMES = frozenset(f.name for f in SCHEMA if pa.types.is_timestamp(f.type))
_LISTS = frozenset(f.name for f in SCHEMA if pa.types.is_list(f.type))
_MAPS = frozenset(f.name for f in SCHEMA if pa.types.is_map(f.type))


def default_of(name: str) -> Any:
    """The record's default of a column, or MISSING."""
    field = _FIELDS[name]
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default


def check_version(version: int, where: object) -> None:
    """Raises SchemaError for a version newer than ours."""
    if version > SCHEMA_VERSION:
        raise SchemaError(
            f"{where}: written with schema version {version}, this attnbench reads up to "
            f"{SCHEMA_VERSION}; upgrade it: pip install --upgrade attnbench"
        )


def rows_to_table(rows: Sequence[Measurement]) -> pa.Table:
    """Rows as a table of SCHEMA. Raises TypeError or ValueError for a value of a wrong kind."""
    arrays = []
    for field in SCHEMA:
        values = [getattr(row, field.name) for row in rows]
        if field.name in _MAPS:
            values = [list(value.items()) for value in values]
        elif field.name in _TIMES:
            values = [_utc(value, field.name) for value in values]
        array = pa.array(values, field.type)
        if array.null_count and not field.nullable:
            raise ValueError(f"column {field.name} holds None")
        arrays.append(array)
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def _utc(value: datetime | None, name: str) -> datetime | None:
    if value is not None and value.tzinfo is None:
        raise ValueError(f"column {name} holds a time without a time zone: {value.isoformat()}")
    return value


def table_to_rows(table: pa.Table) -> list[Measurement]:
    """The rows of a table of SCHEMA as records."""
    rows = []
    for values in table.to_pylist():
        for name in _LISTS:
            values[name] = tuple(values[name])
        for name in _MAPS:
            values[name] = dict(values[name])
        for name in _TIMES:
            if values[name] is not None:
                values[name] = values[name].astimezone(UTC)
        rows.append(Measurement(**values))
    return rows


def row_to_json(row: Measurement) -> dict[str, Any]:
    """A row for the journal. Times as ISO text; NaN and infinities as Python's json spells them."""
    values: dict[str, Any] = {name: getattr(row, name) for name in _FIELDS}
    for name in _TIMES:
        if values[name] is not None:
            values[name] = values[name].astimezone(UTC).isoformat()
    for name in _MAPS:
        values[name] = dict(values[name])
    return values


def row_from_json(values: Mapping[str, Any]) -> Measurement:
    """A journal's row, of this or an older version: unknown columns go, missing get defaults."""
    known = {name: value for name, value in values.items() if name in _FIELDS}
    for name in _LISTS & known.keys():
        known[name] = tuple(known[name])
    for name in _TIMES & known.keys():
        if known[name] is not None:
            known[name] = datetime.fromisoformat(known[name])
    return Measurement(**known)


def upgrade(table: pa.Table, where: object, columns: Iterable[str] = SCHEMA.names) -> pa.Table:
    """`table` of this or an older version, with `columns` in the types of SCHEMA.

    Raises SchemaError if a column without a default is missing or holds another type.
    """
    names = list(columns)
    arrays = []
    for name in names:
        field = SCHEMA.field(name)
        if name in table.column_names:
            try:
                column = table[name]
                arrays.append(column if column.type == field.type else column.cast(field.type))
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise SchemaError(
                    f"{where}: column {name} is {table[name].type}, expected {field.type}; "
                    "move the file out of the folder"
                ) from error
            continue
        default = default_of(name)
        if default is MISSING:
            raise SchemaError(f"{where}: column {name} is missing; move the file out of the folder")
        if name in _MAPS:
            default = list(default.items())
        elif name in _LISTS:
            default = list(default)
        arrays.append(pa.array([default] * table.num_rows, field.type))
    return pa.Table.from_arrays(arrays, schema=pa.schema([SCHEMA.field(name) for name in names]))
