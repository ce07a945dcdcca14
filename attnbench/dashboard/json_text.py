"""JSON text of Arrow columns, without a Python object per value.

The rules are those of `script.to_json`: ASCII, without `<`, `>` and `&`, NaN becomes null, seven
digits of a number that is no whole one.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from attnbench.dashboard.script import to_json

#: Columns from this length on name their distinct values once, where that is shorter.
_CODED_FROM = 1000


def value_texts(column: pa.Array | pa.ChunkedArray) -> pa.StringArray:
    """The JSON text of each value: texts, numbers, times, lists and maps of these."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    kind = array.type
    if pa.types.is_map(kind):
        pairs = joined_texts([value_texts(array.keys), value_texts(array.items)], ":")
        texts = _wrapped("{", _regrouped(pairs, _lengths_of_map(array)), "}")
    elif pa.types.is_list(kind):
        flat = value_texts(pc.list_flatten(array))
        texts = _wrapped("[", _regrouped(flat, pc.list_value_length(array)), "]")
    elif pa.types.is_string(kind):
        coded = pc.dictionary_encode(array)
        words = [to_json(word) for word in coded.dictionary.to_pylist()]
        texts = pa.array(words, pa.string()).take(coded.indices)
    elif pa.types.is_floating(kind):
        short = array.cast(pa.float32(), safe=False)
        texts = pc.if_else(pc.is_finite(short), short.cast(pa.string()), "null")
    elif pa.types.is_timestamp(kind):
        seconds = pc.floor_temporal(array, unit="second").cast(pa.timestamp("s", tz=kind.tz))
        coded = pc.dictionary_encode(seconds)
        words = pc.strftime(coded.dictionary, format='"%Y-%m-%dT%H:%M:%S+00:00"')
        texts = words.take(coded.indices)
    else:
        texts = array.cast(pa.string())
    return pc.if_else(pc.is_valid(array), texts, "null")


def array_text(texts: pa.StringArray) -> str:
    """A JSON array of values that are texts already."""
    whole = pa.LargeListArray.from_arrays(pa.array([0, len(texts)], pa.int64()), texts)
    return f"[{pc.binary_join(whole, ',')[0].as_py()}]"


def column_text(column: pa.Array | pa.ChunkedArray) -> str:
    """A JSON array, or of a long column with few distinct ones `{"words": [...], "at": [...]}`."""
    texts = value_texts(column)
    if len(texts) >= _CODED_FROM:
        coded = pc.dictionary_encode(texts)
        if len(coded.dictionary) * 2 < len(texts):
            words = array_text(coded.dictionary)
            return f'{{"words":{words},"at":{array_text(coded.indices.cast(pa.string()))}}}'
    return array_text(texts)


def joined_texts(parts: list[pa.StringArray | str], separator: str = "") -> pa.StringArray:
    """The texts side by side, value by value; a plain string stands in all of them."""
    return pc.binary_join_element_wise(*parts, separator)


def _wrapped(before: str, texts: pa.StringArray, after: str) -> pa.StringArray:
    return joined_texts([before, texts, after])


def _regrouped(flat: pa.StringArray, lengths: pa.Array) -> pa.StringArray:
    counts = np.asarray(pc.fill_null(lengths, 0), dtype=np.int64)
    bounds = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    return pc.binary_join(pa.ListArray.from_arrays(pa.array(bounds), flat), ",")


def _lengths_of_map(array: pa.MapArray) -> pa.Array:
    offsets = np.asarray(array.offsets, dtype=np.int64)
    return pa.array(np.diff(offsets))
