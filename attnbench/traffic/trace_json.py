"""Traces in JSON: Mooncake's lines with prefix hashes, and ShareGPT-style conversations."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from attnbench.errors import UsageError
from attnbench.traffic.trace_rows import Columns, RowChecker, shown
from attnbench.traffic.types import Ints

MOONCAKE_BLOCK_TOKENS = 512
"""Tokens one of Mooncake's `hash_ids` stands for."""
BYTES_PER_TOKEN = 4
"""Of UTF-8 text, where a message does not say how many tokens it has."""

_MOONCAKE = ("timestamp", "input_length", "output_length")
_TURNS = ("conversations", "messages")
_BLOCK_BYTES = 1 << 24


def read_mooncake(data: bytes, name: str, sort_arrivals: bool) -> Columns:
    """Read and check the lines of a Mooncake trace: times in milliseconds, blocks of 512 tokens.

    Raises:
        UsageError: the first line that cannot be used, with its number.
    """
    columns = _fast_mooncake(data)
    if columns is not None and columns.is_valid(sort_arrivals):
        return columns
    check = RowChecker(name, sort_arrivals, unit="milliseconds", per_second=1e3)
    times: list[float] = []
    inputs: list[int] = []
    outputs: list[int] = []
    lengths: list[int] = []
    ids: list[int] = []
    for line, row in _lines(data, check):
        time = check.number(line, "timestamp", row.get("timestamp"))
        check.order(line, "timestamp", time, row.get("timestamp"))
        times.append(time)
        inputs.append(check.tokens(line, "input_length", row.get("input_length")))
        outputs.append(check.tokens(line, "output_length", row.get("output_length")))
        hashes = row.get("hash_ids")
        if hashes is None:
            hashes = []
        if not isinstance(hashes, list):
            raise check.error(line, f"hash_ids is {shown(hashes)}: give a list of whole numbers")
        for number in hashes:
            if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 2**63:
                raise check.error(
                    line, f"hash_ids has {shown(number)}: give whole numbers below 2^63"
                )
        lengths.append(len(hashes))
        ids.extend(hashes)
    return Columns(
        time=np.array(times, dtype=np.float64),
        input_tokens=np.array(inputs, dtype=np.int64),
        output_tokens=np.array(outputs, dtype=np.int64),
        per_second=1e3,
        **_hashes(np.array(lengths, dtype=np.int64), np.array(ids, dtype=np.int64)),
    )


def read_sharegpt(data: bytes, name: str) -> Columns:
    """Read conversations: the first message is the prompt, the second one the output.

    That is what vLLM's `ShareGPTDataset` takes of them. A message has `num_tokens`, or as many
    tokens as its UTF-8 text has bytes, divided by four and rounded up. Conversations of fewer than
    two messages count as empty. All times are zero.

    Raises:
        UsageError: JSON that cannot be read, or the first conversation that is none.
    """
    lengths: list[tuple[int, int]] = []
    for place, conversation in _conversations(data, name):
        turns = next((conversation[key] for key in _TURNS if key in conversation), None)
        if not isinstance(turns, list):
            raise UsageError(
                f"{name}, {place}: has no list of {' or '.join(_TURNS)}: give a conversation"
            )
        tokens = [_message_tokens(turn, name, place) for turn in turns[:2]]
        lengths.append((tokens[0], tokens[1]) if len(tokens) == 2 else (0, 0))
    table: Ints = np.array(lengths, dtype=np.int64).reshape(-1, 2)
    return Columns(time=np.zeros(len(table)), input_tokens=table[:, 0], output_tokens=table[:, 1])


def sniff_json(data: bytes) -> str | None:
    """`mooncake` or `sharegpt` by the first object of the file, None where it is neither."""
    start = data.lstrip()
    if start.startswith(b"["):
        return "sharegpt"
    try:
        first = json.loads(start.partition(b"\n")[0])
    except (ValueError, RecursionError):
        # An object over several lines is a conversation file, if it is anything.
        return "sharegpt" if b'"conversations"' in start[:10_000] else None
    if not isinstance(first, dict):
        return None
    if any(key in first for key in _TURNS):
        return "sharegpt"
    return "mooncake" if any(key in first for key in _MOONCAKE) else None


def _fast_mooncake(data: bytes) -> Columns | None:
    """The columns, or None where the lines must be looked at one by one."""
    import pyarrow as pa
    import pyarrow.compute
    import pyarrow.json

    schema = pa.schema(
        [
            ("timestamp", pa.float64()),
            ("input_length", pa.int64()),
            ("output_length", pa.int64()),
            ("hash_ids", pa.list_(pa.int64())),
        ]
    )
    try:
        table = pyarrow.json.read_json(
            pa.BufferReader(data),
            read_options=pyarrow.json.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES),
            parse_options=pyarrow.json.ParseOptions(
                explicit_schema=schema, unexpected_field_behavior="ignore"
            ),
        )
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None
    if any(table[name].null_count for name in _MOONCAKE):
        return None
    hashes = table["hash_ids"].combine_chunks()
    values = hashes.flatten()
    lengths = pyarrow.compute.fill_null(pyarrow.compute.list_value_length(hashes), 0)
    if values.null_count:
        return None
    ids: Ints = values.to_numpy()
    if (ids < 0).any():
        return None
    return Columns(
        time=table["timestamp"].to_numpy(),
        input_tokens=table["input_length"].to_numpy(),
        output_tokens=table["output_length"].to_numpy(),
        per_second=1e3,
        **_hashes(lengths.to_numpy(zero_copy_only=False).astype(np.int64), ids),
    )


def _hashes(lengths: Ints, ids: Ints) -> dict[str, Any]:
    if not len(ids):
        return {}
    return {
        "hash_offsets": np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths))),
        "hash_ids": ids,
        "hash_block_tokens": MOONCAKE_BLOCK_TOKENS,
    }


def _lines(data: bytes, check: RowChecker) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of the lines that are not blank, with their line numbers."""
    for line, text in enumerate(data.split(b"\n"), start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise check.error(line, f"not JSON ({_why(error)}): correct or remove it") from None
        if not isinstance(row, dict):
            raise check.error(line, f"{shown(row)} is not a JSON object: give one per line")
        yield line, row


def _conversations(data: bytes, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The conversations of a JSON array, or of one object per line, and where each is."""
    check = RowChecker(name, may_be_unsorted=True)
    if not data.lstrip().startswith(b"["):
        for line, row in _lines(data, check):
            yield f"line {line}", row
        return
    try:
        rows = json.loads(data)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise check.error(line, f"not JSON ({_why(error)}): give a whole file") from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UsageError(
                f"{name}, conversation {number}: {shown(row)} is not a JSON object: "
                "give a list of conversations"
            )
        yield f"conversation {number}", row


def _message_tokens(turn: object, name: str, place: str) -> int:
    if not isinstance(turn, dict):
        raise UsageError(f"{name}, {place}: a message is {shown(turn)}: give an object with a text")
    count = turn.get("num_tokens")
    if count is not None:
        # The checker's line is unused: a conversation has no line of its own in an array.
        try:
            return RowChecker(name, may_be_unsorted=True).tokens(0, "num_tokens", count)
        except UsageError as error:
            raise UsageError(str(error).replace(", line 0:", f", {place}:", 1)) from None
    text = turn.get("value", turn.get("content"))
    if not isinstance(text, str):
        raise UsageError(
            f"{name}, {place}: a message has the text {shown(text)}: "
            "give a string under value or content, or num_tokens"
        )
    return -(-len(text.encode("utf-8", "surrogatepass")) // BYTES_PER_TOKEN)


def _why(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return shown(str(error)).strip("'")
