"""Contenders put in order over a mix of batches, by the rule of `compare` (docs/verdict.md).

A contender's total is the sum over batches and kinds of layers of weight, number of layers and
seconds. Each batch's ratio has the interval of the rule; the mix's limits are the weighted means
of the batches' limits, which holds however their errors go together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from attnbench.choose.stored import Timed
from attnbench.history.rule import (
    Estimate,
    Verdict,
    VerdictSettings,
    decide,
    estimate_groups,
)
from attnbench.upgrade.cost import weighted_ratio
from attnbench.workload import Workload

Times = Mapping[int, Timed]
"""What a contender takes on each part, by its place among the parts."""


class Standing(StrEnum):
    """How a contender stands to the winner."""

    WINNER = "winner"
    TIED = "tied"
    """The difference is within the timer's practical floor, or within noise."""
    LINKED = "linked"
    """Slower than the winner, and tied with one that is tied with it."""
    OPEN = "open"
    """The interval is too wide to say, or the processes are too few."""
    SLOWER = "slower"


class Outcome(StrEnum):
    """What is said of a ranking."""

    DECIDED = "decided"
    TIE = "tie"
    ONLY = "only one"
    OPEN = "open"
    NOT_MEASURED = "not measured"


@dataclass(frozen=True, slots=True)
class Part:
    """A batch on one kind of layer; `weight` is the batch's, `layers` how many are of this kind."""

    kind: int
    batch: str
    weight: float
    layers: int
    workload: Workload

    @property
    def phase(self) -> str:
        return str(self.workload.phase)

    @property
    def factor(self) -> float:
        return self.weight * self.layers


@dataclass(frozen=True, slots=True)
class Line:
    """One contender. `seconds` are the weighted mean of a step; `ratio` is it over the winner."""

    name: str
    seconds: float
    standing: Standing
    ratio: Estimate
    through: str = ""


@dataclass(frozen=True, slots=True)
class Ranking:
    """Contenders of one scope (`whole`, or a phase), the fastest first.

    `margin` is the second over the first. `missing` are valid contenders without times of all.
    """

    scope: str
    lines: tuple[Line, ...]
    missing: tuple[str, ...] = ()

    @property
    def winner(self) -> Line | None:
        return self.lines[0] if self.lines else None

    @property
    def margin(self) -> Estimate | None:
        return self.lines[1].ratio if len(self.lines) > 1 else None

    @property
    def tied(self) -> tuple[Line, ...]:
        """The tie class, the winner included."""
        inside = (Standing.WINNER, Standing.TIED, Standing.LINKED)
        return tuple(line for line in self.lines if line.standing in inside)

    @property
    def verdict(self) -> Outcome:
        if not self.lines:
            return Outcome.NOT_MEASURED
        if any(line.standing is Standing.OPEN for line in self.lines):
            return Outcome.OPEN
        if len(self.lines) == 1:
            return Outcome.ONLY
        return Outcome.TIE if len(self.tied) > 1 else Outcome.DECIDED


def total(parts: Sequence[tuple[int, Part]], times: Times) -> float:
    """Seconds of attention in a mean step."""
    weight = sum({one.batch: one.weight for _, one in parts}.values())
    return sum(part.factor * times[place].seconds for place, part in parts) / weight


def ratio_of(
    parts: Sequence[tuple[int, Part]],
    base: Times,
    other: Times,
    timer: str,
    settings: VerdictSettings,
) -> Estimate:
    """Seconds of `other` over those of `base`, with the interval of the rule."""
    noise = settings.noise(timer)
    ratios, seconds = [], []
    for place, part in parts:
        a, b = base[place], other[place]
        if a == b:
            ratios.append(Estimate(1.0, 1.0, 1.0))
        else:
            ratios.append(
                estimate_groups([a.replicates], [b.replicates], noise, settings.confidence)
            )
        seconds.append(part.factor * a.seconds)
    return weighted_ratio(ratios, seconds)


def rank(
    scope: str,
    parts: Sequence[tuple[int, Part]],
    contenders: Mapping[str, Times],
    timer: str,
    settings: VerdictSettings,
    missing: Sequence[str] = (),
) -> Ranking:
    """Put `contenders`, each with a time of every part, in order."""
    order = sorted(contenders, key=lambda name: (total(parts, contenders[name]), name))
    if not order:
        return Ranking(scope, (), tuple(missing))
    noise = settings.noise(timer)
    verdicts: dict[tuple[str, str], Verdict] = {}
    ratios: dict[tuple[str, str], Estimate] = {}
    for i, first in enumerate(order):
        for second in order[i + 1 :]:
            found = ratio_of(parts, contenders[first], contenders[second], timer, settings)
            ratios[first, second] = found
            verdicts[first, second] = decide(found, noise)[0]
    winner = order[0]
    through = _component(order, verdicts)
    lines = [Line(winner, total(parts, contenders[winner]), Standing.WINNER, Estimate(1, 1, 1))]
    for name in order[1:]:
        verdict = verdicts[winner, name]
        if verdict is Verdict.UNDECIDED:
            standing = Standing.OPEN
        elif verdict is not Verdict.REGRESSION:
            standing = Standing.TIED
        else:
            standing = Standing.LINKED if name in through else Standing.SLOWER
        seconds = total(parts, contenders[name])
        link = through.get(name, "") if standing is Standing.LINKED else ""
        lines.append(Line(name, seconds, standing, ratios[winner, name], link))
    return Ranking(scope, tuple(lines), tuple(missing))


def _component(order: Sequence[str], verdicts: Mapping[tuple[str, str], Verdict]) -> dict[str, str]:
    """Who hangs together with the first by ties, and by whom each was reached."""
    ties = {
        pair
        for pair, verdict in verdicts.items()
        if verdict not in (Verdict.REGRESSION, Verdict.UNDECIDED)
    }
    reached = {order[0]: ""}
    queue = [order[0]]
    while queue:
        one = queue.pop(0)
        for other in order:
            if other not in reached and ((one, other) in ties or (other, one) in ties):
                reached[other] = one
                queue.append(other)
    return reached
