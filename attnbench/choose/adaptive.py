"""Measuring where the ranking is still open: successive elimination with a stated confidence.

A round measures every remaining arm once, one after the other, so that rounds are pairs: of two
arms the differences of log seconds, one a round, are compared with zero by a t interval. From the
third round on, after each, an arm is dropped whose difference to another has its lower limit above
zero. The level of a limit at the m-th look is `delta / (2 (K - 1) m (m + 1))`: over all looks
(their sum is 1), both sides, and all K - 1 arms that the best can be compared with, the limits that
concern the best arm are all right with probability 1 - delta (union bound; Even-Dar et al., 2006,
"Action elimination and stopping conditions for the multi-armed and reinforcement learning
problems"). So with at least that probability the best arm is never dropped, and what the race ends
with is the best arm or one within the practical floor of it. The bound is for differences that are
normal in logarithms; no spread is assumed.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

MIN_ROUNDS = 3
"""Rounds before the first look: fewer say nothing of the spread."""

_BOOTSTRAPS = 2000


class Stop(StrEnum):
    """Why a race ended."""

    DECIDED = "decided"
    TIE = "tie"
    """All that remain are within the floor of the fastest."""
    BUDGET = "budget spent"
    NOBODY = "every backend failed"


@dataclass(frozen=True, slots=True)
class Dropped:
    """An arm that was given up: in which round, behind whom, and at least how much slower."""

    arm: str
    round: int
    behind: str
    at_least: float


@dataclass(slots=True)
class Race:
    """Arms and the rounds they ran. `add` a round until `stop` is not None.

    Attributes:
        confidence: of the whole race, e.g. 0.95.
        floor: relative difference that is of no practical interest, of the timer.
        rounds: log seconds by arm, one mapping a round.
    """

    arms: tuple[str, ...]
    confidence: float = 0.95
    floor: float = 0.02
    remaining: list[str] = field(init=False)
    rounds: list[dict[str, float]] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.remaining = list(self.arms)

    def add(self, seconds: Mapping[str, float], failed: Mapping[str, str] | None = None) -> None:
        """One round of all remaining arms; those in `failed` (and why) are out of the race.

        Who was dropped behind one of these comes back: that it is slower than a backend nobody can
        take says nothing. Rounds it did not run are compared with nobody's.
        """
        for arm, why in (failed or {}).items():
            self.failed[arm] = why
        self.remaining = [arm for arm in self.remaining if arm not in self.failed]
        self.rounds.append({arm: math.log(seconds[arm]) for arm in self.remaining})
        while back := next((one for one in self.dropped if one.behind in self.failed), None):
            self.dropped.remove(back)
            if back.arm not in self.failed:
                self.remaining.append(back.arm)
        if len(self.rounds) < MIN_ROUNDS:
            return
        for arm in list(self.remaining):
            behind = max(
                ((self._limits(arm, other)[0], other) for other in self.remaining if other != arm),
                default=(0.0, ""),
            )
            if behind[0] > 0:
                self.remaining.remove(arm)
                self.dropped.append(Dropped(arm, len(self.rounds), behind[1], math.exp(behind[0])))

    @property
    def leader(self) -> str:
        """The remaining arm with the least mean log seconds; "" without one."""
        if not self.remaining or not self.rounds:
            return ""
        rounds = self._shared(self.remaining)
        return min(
            self.remaining, key=lambda arm: (statistics.fmean(one[arm] for one in rounds), arm)
        )

    @property
    def stop(self) -> Stop | None:
        """Why no round need follow; None: one should, if there is budget."""
        if not self.remaining:
            return Stop.NOBODY
        if len(self.remaining) == 1:
            return Stop.DECIDED
        if len(self.rounds) < MIN_ROUNDS:
            return None
        first = self.leader
        widest = max(self._limits(first, arm)[1] for arm in self.remaining if arm != first)
        return Stop.TIE if widest <= math.log1p(self.floor) else None

    def probability(self, seed: int = 0) -> float:
        """Share of bootstrap resamples of the rounds in which the leader is the fastest.

        An estimate for a person, where the bound of the module is the guarantee.
        """
        first = self.leader
        if not first or len(self.remaining) == 1:
            return 1.0 if first else 0.0
        draw = random.Random(seed)
        rounds = self._shared(self.remaining)
        wins = 0
        for _ in range(_BOOTSTRAPS):
            sample = draw.choices(rounds, k=len(rounds))
            sums = {arm: sum(one[arm] for one in sample) for arm in self.remaining}
            wins += min(sums, key=lambda arm: sums[arm]) == first
        return wins / _BOOTSTRAPS

    def _shared(self, arms: Sequence[str]) -> list[dict[str, float]]:
        """The rounds that all of these ran."""
        return [one for one in self.rounds if all(arm in one for arm in arms)]

    def _limits(self, arm: str, other: str) -> tuple[float, float]:
        """Of the mean difference `arm` minus `other`, in logarithms."""
        from scipy.special import stdtrit

        differences = [one[arm] - one[other] for one in self._shared((arm, other))]
        count = len(differences)
        look = count - MIN_ROUNDS + 1
        alpha = (1 - self.confidence) / (2 * (len(self.arms) - 1) * look * (look + 1))
        half = float(stdtrit(count - 1, 1 - alpha)) * statistics.stdev(differences)
        half /= math.sqrt(count)
        middle = statistics.fmean(differences)
        return middle - half, middle + half


Sample = Callable[[Sequence[str], int], tuple[Mapping[str, float], Mapping[str, str]]]
"""Measures these arms in this round: seconds by arm, and why the others failed."""


def run_race(
    race: Race,
    sample: Sample,
    budget_s: float,
    clock: Callable[[], float],
    max_rounds: int = 99,
) -> tuple[Stop, float]:
    """Rounds until the race is over or another would not fit the budget; and the seconds spent.

    `MIN_ROUNDS` rounds are measured whatever the budget is: without them there is no answer.
    """
    start = clock()
    last = 0.0
    while (stop := race.stop) is None:
        spent = clock() - start
        done = len(race.rounds)
        if (done >= MIN_ROUNDS and spent + last > budget_s) or done >= max_rounds:
            return Stop.BUDGET, spent
        seconds, failed = sample(tuple(race.remaining), done)
        race.add(seconds, failed)
        last = clock() - start - spent
    return stop, clock() - start


def statement(race: Race, stop: Stop) -> str:
    """How sure it is, in a sentence; those that failed are named, for nothing is said of them."""
    out = "; ".join(f"{arm}: {why}" for arm, why in race.failed.items())
    if stop is Stop.NOBODY:
        return f"no backend could be measured: {out}"
    text = _sure(race, stop)
    return f"{text}; out of the race: {out}" if out else text


def _sure(race: Race, stop: Stop) -> str:
    sure = f"at least {race.confidence:.0%}".replace(".0%", "%")
    rounds = f"{len(race.rounds)} rounds"
    if stop is Stop.DECIDED and len(race.arms) - len(race.failed) == 1:
        return f"{race.leader} is the only backend that could be measured"
    if stop is Stop.DECIDED:
        return f"{race.leader} is the fastest with a probability of {sure} ({rounds})"
    others = ", ".join(arm for arm in race.remaining if arm != race.leader)
    if stop is Stop.TIE:
        return (
            f"{race.leader} is the fastest or within {race.floor:.1%} of it with a probability of "
            f"{sure}; so are {others} ({rounds})"
        )
    gone = ", ".join(one.arm for one in race.dropped)
    slower = f"; {gone} is slower with a probability of {sure}" if gone else ""
    return (
        f"the budget was spent after {rounds}: {race.leader} leads, fastest in "
        f"{race.probability():.0%} of bootstrap resamples; still open: {others}{slower}"
    )
