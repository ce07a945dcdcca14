"""From stamps to the clock of every sample, and from clocks to what is thrown away. Pure logic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from attnbench.measure.gpu.runtime import Stamp

#: Largest relative error a clock may have from the steps of the global timer.
MAX_CLOCK_ERROR = 0.05

#: Step of the global timer where nobody has measured it: 1 µs, the coarsest in use. PTX names no
#: step ("behavior is target-specific", PTX ISA, `%globaltimer`).
COARSEST_TIMER_STEP_NS = 1000

#: Part of the reference clock below which a sample is thrown away, and seconds of rest after that:
#: nvbench's defaults of `--throttle-threshold` and `--throttle-recovery-delay` (its
#: `docs/cli_help.md`; there the reference is the device's clock rate as CUDA tells it, its peak).
THROTTLE_THRESHOLD = 0.75
RECOVERY_S = 0.05

#: Blocks lost in a row before rests grow, by what factor, and to what. After as many, nvbench adds
#: 1.5 times the last rest, at most half a second (`record_measurements` in its
#: `nvbench/detail/measure_cold.cu`); ours end there.
_PATIENT_BLOCKS = 3
_RECOVERY_GROWTH = 2.5
_MAX_RECOVERY_S = 0.5

#: Blocks lost in a row, about three seconds of rest, after which no further one will do better.
#: nvbench has no such limit but its timeout.
MAX_LOST_BLOCKS = 10


#: Stamps a window over a short sample takes in at most: a clock further away says little of it.
_MAX_WINDOW = 64


def shortest_span_ns(timer_step_ns: int = COARSEST_TIMER_STEP_NS) -> float:
    """Shortest span between two stamps that a clock is computed over, in nanoseconds.

    Each end is read at most one step late, so a span is wrong by less than one step either way, and
    its clock by less than `MAX_CLOCK_ERROR` from 20 steps on.
    """
    return timer_step_ns / MAX_CLOCK_ERROR


def sm_clock_hz(
    begin: Stamp, end: Stamp, timer_step_ns: int = COARSEST_TIMER_STEP_NS
) -> float | None:
    """Mean clock of a multiprocessor between two stamps, in hertz.

    None: a stamp was not written, they are of two multiprocessors (whose counters have nothing to
    do with each other), a counter ran backwards, or the span is below `shortest_span_ns`.
    """
    span_ns = end.time_ns - begin.time_ns
    cycles = end.cycles - begin.cycles
    if (
        begin.sm < 0
        or begin.sm != end.sm
        or cycles <= 0
        or span_ns < shortest_span_ns(timer_step_ns)
    ):
        return None
    return cycles / span_ns * 1e9


def sample_clocks_hz(
    stamps: Sequence[Stamp], timer_step_ns: int = COARSEST_TIMER_STEP_NS
) -> list[float | None]:
    """The clock of each sample of one block.

    Args:
        stamps: 2i before and 2i + 1 after sample i, in the order they were enqueued.
        timer_step_ns: step of the device's global timer, in nanoseconds.

    A sample too short for the timer takes neighbouring stamps in, by turns after and before it,
    until the span suffices: a clock changes over milliseconds, and microseconds around a sample
    say what it ran at. None: its neighbours are no help either.
    """
    return [_widened_clock(stamps, 2 * i, timer_step_ns) for i in range(len(stamps) // 2)]


def _widened_clock(stamps: Sequence[Stamp], first: int, timer_step_ns: int) -> float | None:
    begin, end = first, first + 1
    while end - begin < _MAX_WINDOW:
        clock = sm_clock_hz(stamps[begin], stamps[end], timer_step_ns)
        if clock is not None:
            return clock
        can_begin, can_end = begin > 0, end < len(stamps) - 1
        if can_end and (end - first - 1 <= first - begin or not can_begin):
            end += 1
        elif can_begin:
            begin -= 1
        else:
            break
    return None


@dataclass(frozen=True, slots=True)
class ThrottleVerdict:
    """What to do with one block.

    Attributes:
        keep: of each sample, whether it stays.
        rest_s: seconds to let the device cool down; 0.0: none.
        give_up: the device will not come back to its clock.
    """

    keep: tuple[bool, ...]
    rest_s: float
    give_up: bool


class ThrottleRule:
    """Throws away samples below a part of the reference clock. One object for one timing.

    The reference is the highest clock the device is rated for; where clocks are locked, the clock
    they are locked to; where neither is known, the best clock seen so far. A sample whose clock is
    not known stays.

    A board at its power limit lowers its clock for the heaviest kernels, for as long as they run:
    that is a property of the kernel and the board, and stays above the threshold as a rule. What
    falls below is a board that is too hot or short of power.

    Attributes:
        discarded: samples thrown away so far.
        lost_blocks: blocks in a row of which nothing was left.
    """

    def __init__(
        self,
        reference_clock_hz: float = 0.0,
        threshold: float = THROTTLE_THRESHOLD,
        recovery_s: float = RECOVERY_S,
        max_lost_blocks: int = MAX_LOST_BLOCKS,
    ) -> None:
        self._reference_hz = reference_clock_hz
        self._best_seen_hz = 0.0
        self._threshold = threshold
        self._recovery_s = recovery_s
        self._max_lost_blocks = max_lost_blocks
        self._rest_s = recovery_s
        self.discarded = 0
        self.lost_blocks = 0

    def judge(self, clocks_hz: Sequence[float | None]) -> ThrottleVerdict:
        """Judge the samples of one block by their clocks, in the order they were taken."""
        known = [clock for clock in clocks_hz if clock is not None and not math.isnan(clock)]
        self._best_seen_hz = max([self._best_seen_hz, *known])
        lowest = self._threshold * (self._reference_hz or self._best_seen_hz)
        keep = tuple(clock is None or not clock < lowest for clock in clocks_hz)
        lost = keep.count(False)
        self.discarded += lost
        if lost < len(keep) or not lost:
            self.lost_blocks = 0
            self._rest_s = self._recovery_s
            return ThrottleVerdict(keep, self._recovery_s if lost else 0.0, give_up=False)
        self.lost_blocks += 1
        if self.lost_blocks > _PATIENT_BLOCKS:
            self._rest_s = min(self._rest_s * _RECOVERY_GROWTH, _MAX_RECOVERY_S)
        give_up = self.lost_blocks >= self._max_lost_blocks
        return ThrottleVerdict(keep, 0.0 if give_up else self._rest_s, give_up)
