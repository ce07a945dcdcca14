"""The clock of the multiprocessors beside every sample, and no sample of a throttled device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import compress

from attnbench.measure.gpu.clock import ThrottleRule, sample_clocks_hz
from attnbench.measure.gpu.runtime import GpuRuntime
from attnbench.measure.sampling import Block
from attnbench.measure.stopping import StopReason


class ThrottleGuard:
    """Judges the blocks of one session, and rests where the rule says so.

    `locked_clock_hz`: what the clocks are locked to; 0.0: they are not, and the device's rated
    clock is the reference.
    """

    def __init__(self, gpu: GpuRuntime, locked_clock_hz: float = 0.0) -> None:
        self._gpu = gpu
        self._rule = ThrottleRule(locked_clock_hz or gpu.rated_clock_hz)

    def judge(self, seconds: Sequence[float], discarded: int = 0) -> Block:
        """The block of `seconds`, read with stamps 2i and 2i + 1 around sample i.

        A sample whose clock could not be read is kept, with NaN beside it. `discarded` samples were
        lost before and are counted too.
        """
        gpu = self._gpu
        if not gpu.has_stamps:
            return Block(tuple(seconds), discarded=discarded)
        clocks = sample_clocks_hz(gpu.read_stamps(2 * len(seconds)), gpu.timer_step_ns)
        verdict = self._rule.judge(clocks)
        if verdict.rest_s:
            gpu.pause(verdict.rest_s)
        kept = [math.nan if clock is None else clock for clock in compress(clocks, verdict.keep)]
        return Block(
            tuple(compress(seconds, verdict.keep)),
            tuple(kept),
            discarded + verdict.keep.count(False),
            StopReason.THROTTLED if verdict.give_up else None,
        )
