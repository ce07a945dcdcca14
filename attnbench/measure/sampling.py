"""From blocks of samples to a timing: one loop for every timer.

A timer opens a `Session` on a `Target`; the session times blocks; `sample` asks for blocks until
the stopping rule is content.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from attnbench.measure.stopping import StoppingRule, StopReason


@dataclass(frozen=True, slots=True)
class Block:
    """Samples timed together, in seconds, in the order taken.

    Attributes:
        sm_clock_hz: clock of the multiprocessors during each sample; empty: not read.
        discarded: samples that were taken and are not among these (throttled, starved).
        give_up: why no further block will do better; None: one may.
        stamped_s: seconds between the stamps around each sample, by the device's global timer, NaN
            where one was not written; empty: not read.
    """

    samples: tuple[float, ...]
    sm_clock_hz: tuple[float, ...] = ()
    discarded: int = 0
    give_up: StopReason | None = None
    stamped_s: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Timing:
    """What is known of one call at the end.

    Attributes:
        l2_state: `cold` where that is proved, `hot` where the call ran over the same data again and
            again, `unknown` where neither can be said.
        reuse_distance_bytes: bytes touched between two uses of the same data; None: not known.
    """

    samples: tuple[float, ...]
    stop_reason: StopReason
    sm_clock_hz: tuple[float, ...] = ()
    discarded: int = 0
    l2_state: str = "hot"
    reuse_distance_bytes: int | None = None
    kernel_names: tuple[str, ...] = ()

    @property
    def is_noisy(self) -> bool:
        """Sampling ended before the median was known to the target."""
        return self.stop_reason is not StopReason.CONVERGED


@dataclass(frozen=True, slots=True)
class Target:
    """What is timed: one call, over one or several copies of its data.

    Attributes:
        call: runs it on the first copy.
        bytes_touched: distinct bytes one call reads and writes.
        copies: makes the same call on that many further copies of everything it touches.
        copy_bytes: device memory of one such copy, which may be far more than a call touches.
        before_block: poisons the outputs, so that each block must write them again.
    """

    call: Callable[[], object]
    bytes_touched: int = 0
    copies: Callable[[int], Sequence[Callable[[], object]]] | None = None
    before_block: Callable[[], object] = field(default=lambda: None)
    copy_bytes: int = 0


class Session(Protocol):
    """One target under one timer, warmed up."""

    l2_state: str
    reuse_distance_bytes: int | None

    @property
    def kernel_names(self) -> tuple[str, ...]:
        """Of one call, in the order of their starts; empty: nobody looked."""
        ...

    def now_s(self) -> float:
        """The clock the budget is counted on."""
        ...

    def block(self) -> Block:
        """Time some calls; at least one is tried."""
        ...


def sample(session: Session, rule: StoppingRule, target: Target) -> Timing:
    """Blocks until `rule` says stop."""
    samples: list[float] = []
    clocks: list[float] = []
    discarded = 0
    started = session.now_s()
    while True:
        target.before_block()
        block = session.block()
        samples += block.samples
        clocks += block.sm_clock_hz
        discarded += block.discarded
        reason = block.give_up or rule.decide(samples, session.now_s() - started)
        if reason is not None:
            return Timing(
                tuple(samples),
                reason,
                tuple(clocks),
                discarded,
                session.l2_state,
                session.reuse_distance_bytes,
                session.kernel_names,
            )
