"""What every trace format has in common: raw columns, the checks of a row, the finished trace."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

import numpy as np

from attnbench.errors import UsageError
from attnbench.traffic.types import Floats, Ints, Trace

MAX_TOKENS = 100_000_000
"""More tokens than any context has; a larger number is a mistake, not a request."""
MAX_SECONDS = 1e10
"""Three centuries; a larger number is milliseconds, or nanoseconds, taken for seconds."""

_WHOLE = re.compile(r"\+?\d+(\.0*)?", re.ASCII)
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_NONE: Ints = np.empty(0, dtype=np.int64)


@dataclass(slots=True, eq=False)
class Columns:
    """A file's requests as they stand there, in its order.

    Attributes:
        time: (num_requests,) in units of `1 / per_second` seconds from any origin.
        input_tokens, output_tokens: (num_requests,)
        per_second: what `time` is divided by.
        hash_offsets, hash_ids, hash_block_tokens: as in `Trace`.
    """

    time: Ints | Floats
    input_tokens: Ints
    output_tokens: Ints
    per_second: float = 1.0
    hash_offsets: Ints = field(default_factory=lambda: _NONE)
    hash_ids: Ints = field(default_factory=lambda: _NONE)
    hash_block_tokens: int = 0

    def __len__(self) -> int:
        return len(self.time)

    def arrival_s(self) -> Floats:
        """(num_requests,) seconds since the first row."""
        # Integers are subtracted first: nanoseconds since 1970 do not fit a float.
        return np.asarray((self.time - self.time[:1]) / self.per_second, dtype=np.float64)

    def is_valid(self, may_be_unsorted: bool) -> bool:
        """Whether no row would be refused; which one and why is for a `RowChecker` to say."""
        time = self.time
        if not np.isfinite(time).all() or (time < 0).any():
            return False
        if not may_be_unsorted and (np.diff(time) < 0).any():
            return False
        if len(time) and float(time.max() - time.min()) / self.per_second > MAX_SECONDS:
            return False
        return not any(
            (tokens < 0).any() or (tokens > MAX_TOKENS).any()
            for tokens in (self.input_tokens, self.output_tokens)
        )


class RowChecker:
    """Checks one row after the other, and says where the first wrong one is and what to do.

    Args:
        name: of the file.
        may_be_unsorted: whether a time may be before the one above it.
        unit: what the file's times are in, and how many make a second.
    """

    def __init__(
        self, name: str, may_be_unsorted: bool, unit: str = "seconds", per_second: float = 1.0
    ) -> None:
        self._name = name
        self._may_be_unsorted = may_be_unsorted
        self._unit = unit
        self._per_second = per_second
        self._earliest = math.inf
        self._latest = -math.inf
        self._before: float | None = None

    def error(self, line: int, what: str) -> UsageError:
        return UsageError(f"{self._name}, line {line}: {what}")

    def tokens(self, line: int, column: str, value: object) -> int:
        """A number of tokens from a text or a JSON value."""
        if isinstance(value, str) and _WHOLE.fullmatch(value):
            digits = value.partition(".")[0].lstrip("+0") or "0"
            count = int(digits) if len(digits) < 19 else MAX_TOKENS + 1
        elif isinstance(value, int) and not isinstance(value, bool):
            count = value
        elif isinstance(value, float) and value.is_integer():
            count = int(value)
        else:
            raise self._not_a("a whole number of tokens", line, column, value)
        if count < 0:
            raise self.error(line, f"{column} is {shown(value)}: tokens cannot be negative")
        if count > MAX_TOKENS:
            raise self.error(
                line,
                f"{column} is {shown(value)}, more than {MAX_TOKENS:,} tokens: "
                "no model has such a context; correct or remove the row",
            )
        return count

    def number(self, line: int, column: str, value: object) -> float:
        """A finite time from a text or a JSON value, not negative."""
        if isinstance(value, str) and _NUMBER.fullmatch(value):
            number = float(value)
        elif isinstance(value, float):
            number = value
        elif isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**18:
            number = float(value)
        else:
            raise self._not_a(f"a time in {self._unit}", line, column, value)
        if not math.isfinite(number):
            raise self._not_a(f"a time in {self._unit}", line, column, value)
        if number < 0:
            raise self.error(line, f"{column} is {shown(value)}: a time cannot be negative")
        return number

    def order(self, line: int, column: str, time: float, value: object) -> None:
        """Refuse a time before the last one, or centuries away from another."""
        if self._before is not None and time < self._before and not self._may_be_unsorted:
            raise self.error(
                line,
                f"{column} is {shown(value)}, before the line above it: sort the file by time, or "
                "have it sorted (--sort-arrivals)",
            )
        self._before = time
        self._earliest, self._latest = min(self._earliest, time), max(self._latest, time)
        if (self._latest - self._earliest) / self._per_second > MAX_SECONDS:
            raise self.error(
                line,
                f"{column} is {shown(value)}, centuries from another row: "
                f"times are in {self._unit} here",
            )

    def _not_a(self, what: str, line: int, column: str, value: object) -> UsageError:
        if value is None or value == "":
            return self.error(line, f"{column} is missing: every row needs {what}")
        return self.error(line, f"{column} is {shown(value)}: give {what}")


def finish(
    columns: Columns, name: str, max_model_len: int | None, sort_arrivals: bool = False
) -> Trace:
    """The trace of checked columns, without the requests that no engine would run.

    Raises:
        UsageError: there is no request, or none is left.
    """
    if not len(columns):
        raise UsageError(f"{name} has no requests: give a trace with at least one row")
    inputs, outputs = columns.input_tokens, columns.output_tokens
    empty = (inputs == 0) | (outputs == 0)
    too_long = np.zeros(len(columns), dtype=np.bool_)
    if max_model_len is not None:
        too_long = ~empty & (inputs + outputs > max_model_len)
    kept = np.flatnonzero(~(empty | too_long))
    if not len(kept) and not too_long.any():
        raise UsageError(
            f"{name}: none of its {len(columns):,} requests has both a prompt and an output: "
            "check that the columns are the right ones"
        )
    if not len(kept):
        shortest = int((inputs + outputs)[too_long].min())
        raise UsageError(
            f"{name}: all of its {len(columns):,} requests are longer than max_model_len "
            f"{max_model_len} or empty; the shortest has {shortest:,} tokens: "
            "raise --max-model-len"
        )
    arrival = columns.arrival_s()
    if sort_arrivals:
        kept = kept[np.argsort(arrival[kept], kind="stable")]
    offsets, ids = rows_of(columns.hash_offsets, columns.hash_ids, kept)
    return Trace(
        name=name,
        arrival_s=arrival[kept] - arrival[kept[0]],
        input_tokens=inputs[kept],
        output_tokens=outputs[kept],
        hash_offsets=offsets,
        hash_ids=ids,
        hash_block_tokens=columns.hash_block_tokens,
        num_rejected=int(too_long.sum()),
        num_empty=int(empty.sum()),
    )


def rows_of(offsets: Ints, ids: Ints, rows: Ints) -> tuple[Ints, Ints]:
    """The same ragged rows, only these and in this order."""
    if not len(offsets) or np.array_equal(rows, np.arange(len(offsets) - 1)):
        return offsets, ids
    lengths = np.diff(offsets)[rows]
    new_offsets = np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths)))
    within = np.arange(int(new_offsets[-1]), dtype=np.int64) - np.repeat(new_offsets[:-1], lengths)
    return new_offsets, ids[np.repeat(offsets[:-1][rows], lengths) + within]


def shown(value: object) -> str:
    """A value as it may stand in a message: short, control characters escaped."""
    text = value if isinstance(value, str) else str(value)[:100] if _is_short(value) else "a number"
    return ascii(text[:40]) + ("…" if len(text) > 40 else "")


def _is_short(value: object) -> bool:
    # Python refuses to write out an integer of thousands of digits.
    return not isinstance(value, int) or abs(value) < 10**100
