"""The clock of the multiprocessors beside every sample, and no sample of a throttled device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import compress

from attnbench.measure.gpu.clock import ThrottleRule, ThrottleVerdict, sample_clocks_hz
from attnbench.measure.gpu.runtime import GpuRuntime, Stamp
from attnbench.measure.sampling import Block
from attnbench.measure.stopping import StopReason


class ThrottleGuard:
    """Judges the blocks of one session, and rests where the rule says so.

    `rule`: what is thrown away; None: nothing.
    """

    def __init__(self, gpu: GpuRuntime, rule: ThrottleRule | None) -> None:
        self._gpu = gpu
        self._rule = rule

    def judge(self, seconds: Sequence[float], discarded: int = 0) -> Block:
        """The block of `seconds`, read with stamps 2i and 2i + 1 around sample i.

        A sample whose clock could not be read is kept, with NaN beside it. `discarded` samples were
        lost before and are counted too.
        """
        gpu = self._gpu
        if not gpu.has_stamps:
            return Block(tuple(seconds), discarded=discarded)
        stamps = gpu.read_stamps(2 * len(seconds))
        clocks = sample_clocks_hz(stamps, gpu.timer_step_ns)
        spans = [_span_s(*pair) for pair in zip(stamps[::2], stamps[1::2], strict=True)]
        if self._rule is None:
            verdict = ThrottleVerdict((True,) * len(clocks), rest_s=0.0, give_up=False)
        else:
            verdict = self._rule.judge(clocks)
        if verdict.rest_s:
            gpu.pause(verdict.rest_s)
        kept = [math.nan if clock is None else clock for clock in compress(clocks, verdict.keep)]
        return Block(
            tuple(compress(seconds, verdict.keep)),
            tuple(kept),
            discarded + verdict.keep.count(False),
            StopReason.THROTTLED if verdict.give_up else None,
            tuple(compress(spans, verdict.keep)),
        )


def _span_s(begin: Stamp, end: Stamp) -> float:
    if min(begin.sm, end.sm) < 0:
        return math.nan
    return (end.time_ns - begin.time_ns) * 1e-9
