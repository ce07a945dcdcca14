"""The rest of a step, around attention, from measured steps of a model of few layers.

Of a batch, steps of `k1` and `k2` layers took `s1` and `s2` seconds, and attention of one layer,
measured by itself, `a`. The slope `(s2 - s1) / (k2 - k1)` is what a layer takes, and a model of `L`
layers

    step = s1 + (L - k1) * slope          rest = step - L * a

With attention by any backend the sum is a step of that backend; by the one that was subtracted it
is the step as extrapolated, whatever else attention inside a step takes than by itself. Where all L
layers were measured, `step` is that time.

The rest follows the number of new tokens alone: what varies with contexts is attention's. Between
measured numbers of tokens it is a straight line, below the smallest it stays, beyond the largest
the last line goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from attnbench.errors import UsageError
from attnbench.traffic.latency import StepModel
from attnbench.traffic.latency_costs import sums
from attnbench.traffic.types import Floats, Ints, StepBatches

if TYPE_CHECKING:
    from numpy.random import Generator

#: A left-out error above this says nothing about how much faster a step could be.
_MOST_ERROR = 0.9


@dataclass(frozen=True, slots=True)
class StepTimes:
    """A batch's times, in seconds: medians of each process that measured it.

    Attributes:
        batch: how it is called in messages.
        steps: by number of layers, of a step.
        attention: of one layer's attention by itself.
    """

    batch: str
    num_tokens: int
    steps: Mapping[int, Sequence[float]]
    attention: Sequence[float]


class MeasuredRest(StepModel):
    """Everything of a step but attention.

    Args:
        times: of batches of two numbers of tokens, or more.
        num_layers: of the whole model.

    Raises:
        UsageError: fewer, a batch with steps of one number of layers that is not the model's, or a
            step that takes no longer than its attention.
    """

    def __init__(self, times: Sequence[StepTimes], num_layers: int) -> None:
        self.num_layers = num_layers
        self.times = tuple(sorted(times, key=lambda one: one.num_tokens))
        for one in self.times:
            if len(one.steps) < 2 and num_layers not in one.steps:
                raise UsageError(
                    f"{one.batch}: steps of {len(one.steps)} number of layers; measure two, e.g. "
                    "--step-layers 2 --step-layers 4"
                )
        tokens = np.array([one.num_tokens for one in self.times], dtype=np.float64)
        self.tokens, self._place = np.unique(tokens, return_inverse=True)
        if len(self.tokens) < 2:
            raise UsageError(
                f"measured steps of {len(self.tokens)} number of tokens say nothing of others; "
                "measure batches of several, e.g. '{q1s1k,64q1s1k,q512,q4k}'"
            )
        each = self._rests([_medians(one) for one in self.times])
        if (each <= 0).any():
            worst = self.times[int(each.argmin())]
            raise UsageError(
                f"{worst.batch}: a step takes no longer than the attention of its {num_layers} "
                "layers by itself; measure both again, with more --step-layers and --replicates"
            )
        self.seconds = self._by_tokens(each)

    def of_entries(self, step_offsets: Ints, query_lens: Ints, context_lens: Ints) -> Floats:
        return self.at(sums(query_lens, step_offsets).astype(np.float64), self.seconds)

    def at(self, tokens: Floats, seconds: Floats) -> Floats:
        """(n,) seconds of steps of so many tokens; `seconds` are those of `self.tokens`."""
        found = np.interp(tokens, self.tokens, seconds)
        slope = max(seconds[-1] - seconds[-2], 0.0) / (self.tokens[-1] - self.tokens[-2])
        return np.asarray(found + slope * np.maximum(tokens - self.tokens[-1], 0.0))

    def left_out_errors(self) -> Floats:
        """(num_tokens,) relative error of each but the ends, predicted from its neighbours."""
        errors = np.zeros(len(self.tokens))
        for index in range(1, len(self.tokens) - 1):
            kept = np.delete(np.arange(len(self.tokens)), index)
            line = np.interp(self.tokens[index], self.tokens[kept], self.seconds[kept])
            errors[index] = line / self.seconds[index] - 1.0
        return errors

    def drawn(self, steps: StepBatches, rng: Generator) -> Floats:
        """(num_steps,) seconds in one draw of the errors of this model.

        Every time of every batch is the median of its processes' drawn again with replacement; and
        all steps around a measured number of tokens are wrong together by a normal error, half as
        large as leaving it out was: that leaves a gap twice as wide.
        """
        drawn = [
            _medians(
                StepTimes(
                    one.batch,
                    one.num_tokens,
                    {k: rng.choice(list(s), len(s)).tolist() for k, s in one.steps.items()},
                    rng.choice(list(one.attention), len(one.attention)).tolist(),
                )
            )
            for one in self.times
        ]
        seconds = np.maximum(self._by_tokens(self._rests(drawn)), 0.0)
        spread = np.minimum(np.abs(self.left_out_errors()) / 2.0, _MOST_ERROR)
        wrong = np.maximum(1.0 + spread * rng.standard_normal(len(spread)), 1.0 - _MOST_ERROR)
        tokens = sums(steps.query_len, steps.step_offsets).astype(np.float64)
        return self.at(tokens, seconds * wrong)

    def _rests(self, medians: Sequence[tuple[Mapping[int, float], float]]) -> Floats:
        return np.array([_rest(steps, one, self.num_layers) for steps, one in medians])

    def _by_tokens(self, each: Floats) -> Floats:
        """Mean of the batches of one number of tokens."""
        return np.bincount(self._place, each) / np.bincount(self._place)


def _medians(times: StepTimes) -> tuple[dict[int, float], float]:
    steps = {layers: float(np.median(list(found))) for layers, found in times.steps.items()}
    return steps, float(np.median(list(times.attention)))


def _rest(steps: Mapping[int, float], attention: float, num_layers: int) -> float:
    if num_layers in steps:
        return steps[num_layers] - num_layers * attention
    few, many = min(steps), max(steps)
    slope = (steps[many] - steps[few]) / (many - few)
    return steps[few] + (num_layers - few) * slope - num_layers * attention
