"""How long a step takes, as the scheduler's clock asks for it: a model, a table, a recording."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from attnbench.errors import UsageError
from attnbench.traffic.types import Floats, Ints


class StepSeconds(Protocol):
    """Seconds of one step from its entries' (num_reqs,) query and context lengths.

    It is called once per step in order of time, so it must be cheap and must depend on nothing
    else, or the schedule is not reproducible.
    """

    def __call__(self, query_lens: Ints, context_lens: Ints, /) -> float: ...


@runtime_checkable
class DecodeRunSeconds(Protocol):
    """A model that answers for a run of decode steps at once; the scheduler asks where it can."""

    def decode_run(self, context_lens: Ints, num_steps: int) -> Floats:
        """(num_steps,) seconds: every request computes one token, each step one later.

        Step i has the contexts `context_lens + i`; the same numbers as as many single calls.
        """
        ...


@dataclass(frozen=True, slots=True)
class LinearStepSeconds:
    """A step's time linear in what it computes and what it reads.

    Attributes:
        base_s: of any step: launches, weights.
        per_query_token_s: per new token.
        per_context_token_s: per token read from the cache, the new ones of the same step included.
    """

    base_s: float
    per_query_token_s: float
    per_context_token_s: float

    def __call__(self, query_lens: Ints, context_lens: Ints, /) -> float:
        num_new = int(query_lens.sum())
        return self._seconds(num_new, int(context_lens.sum()) + num_new)

    def decode_run(self, context_lens: Ints, num_steps: int) -> Floats:
        num_new = len(context_lens)
        first = int(context_lens.sum()) + num_new
        # The same operations in the same order as one call, so that a run changes no time.
        read = np.arange(first, first + num_new * num_steps, num_new, dtype=np.float64)
        return (self.base_s + self.per_query_token_s * num_new) + self.per_context_token_s * read

    def _seconds(self, num_new: int, num_read: int) -> float:
        return (
            self.base_s + self.per_query_token_s * num_new
        ) + self.per_context_token_s * num_read


@dataclass(frozen=True, slots=True, eq=False)
class StepTable:
    """Measured times on a grid of new tokens and tokens read, bilinear between them.

    Beyond the grid the last cell is continued; below its first value the first one holds.

    Attributes:
        query_tokens: (num_rows,) new tokens of the step, increasing.
        context_tokens: (num_columns,) tokens in the cache before the step, increasing.
        seconds: (num_rows, num_columns) measured.

    Raises:
        UsageError: axes that do not increase, a shape that does not fit, a time that is none.
    """

    query_tokens: Floats
    context_tokens: Floats
    seconds: Floats

    def __post_init__(self) -> None:
        for name, axis in (("query", self.query_tokens), ("context", self.context_tokens)):
            if axis.ndim != 1 or len(axis) < 2 or not np.all(np.diff(axis) > 0):
                raise UsageError(
                    f"the table's {name} tokens are {axis.tolist()}: give two or more, increasing"
                )
        shape = (len(self.query_tokens), len(self.context_tokens))
        if self.seconds.shape != shape:
            raise UsageError(
                f"the table has the shape {self.seconds.shape}: give {shape} as its axes say"
            )
        if not np.all(np.isfinite(self.seconds) & (self.seconds > 0)):
            raise UsageError("the table has a time that is not above zero: measure it again")

    def __call__(self, query_lens: Ints, context_lens: Ints, /) -> float:
        row, down = _cell(self.query_tokens, float(query_lens.sum()))
        column, right = _cell(self.context_tokens, float(context_lens.sum()))
        grid = self.seconds
        left = grid[row, column] * (1 - down) + grid[row + 1, column] * down
        next_ = grid[row, column + 1] * (1 - down) + grid[row + 1, column + 1] * down
        # A noisy last cell may fall; continued far enough it would leave no time at all.
        return max(float(left * (1 - right) + next_ * right), float(grid.min()))


class RecordedSeconds:
    """Times measured step by step, given out in order: the schedule of a recorded run.

    Raises:
        UsageError: when called, once there are more steps than times.
    """

    def __init__(self, seconds: Floats) -> None:
        self._seconds = seconds
        self._next = 0

    def __call__(self, query_lens: Ints, context_lens: Ints, /) -> float:
        if self._next >= len(self._seconds):
            raise UsageError(
                f"there are {len(self._seconds)} recorded step times and more steps than that: "
                "record the whole trace, or cut the trace to what was recorded"
            )
        self._next += 1
        return float(self._seconds[self._next - 1])


def checked_seconds(seconds: float, step: int) -> float:
    """The time of the step as a float above zero.

    Raises:
        UsageError: it is none.
    """
    seconds = float(seconds)
    if not (math.isfinite(seconds) and seconds > 0):
        raise UsageError(
            f"the step time of step {step} is {seconds}: give a latency model or measured times "
            "that are above zero"
        )
    return seconds


def _cell(axis: Floats, value: float) -> tuple[int, float]:
    """The cell that holds the value, and how far into it, above 1 beyond the last."""
    index = min(max(int(np.searchsorted(axis, value, side="right")) - 1, 0), len(axis) - 2)
    return index, max(float((value - axis[index]) / (axis[index + 1] - axis[index])), 0.0)
