"""The second look: what the first look picked, measured again in fresh processes.

Where the build before can still be run, its processes take turns with the new build's: whatever is
odd about the night is then on both sides. Else the runs of the series' level are the other side.
docs/verdict.md states the rule and what it was measured to do.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from attnbench.history.rule import Estimate, TimerNoise

#: Fresh processes of each side that a confirmed slow-down takes.
ROUNDS = 10

#: After so many, a point that shows less than a quarter of the floor is not measured further.
FUTILITY_ROUNDS = 4

#: One arrangement of both sides' times in so many may look like a slow-down by chance.
LARGEST_P = 0.005

#: The same for what the first look could not tell and did not pick. A night measures a few hundred
#: points again: of all of them together, one in a hundred nights has one by chance.
LARGEST_P_UNPICKED = LARGEST_P / 100

#: A second look with a larger p ends the matter.
_SURPRISING_P = 0.05

#: Of a night's alarms this share may be false: Benjamini and Hochberg's procedure again, over what
#: was picked. What was given up counts as looked at.
FALSE_ALARMS = 0.05


@dataclass(frozen=True, slots=True)
class SecondLook:
    """`subject` over `reference`, in fresh processes.

    Attributes:
        estimate: the median of the ratios of each of one side to each of the other (Hodges and
            Lehmann, 1963), and the interval that belongs to the rank sum.
        p: exact, of the rank sum (Wilcoxon, 1945): the chance that times which do not differ are
            arranged so, or more so. It assumes nothing of how times spread.
        is_enough: so many times can show a slow-down at all.
    """

    estimate: Estimate
    p: float
    is_enough: bool

    def is_slower(self, noise: TimerNoise, largest_p: float = LARGEST_P) -> bool:
        """Beyond the floor, and by no more than `largest_p` by chance."""
        return self.estimate.ratio > noise.limit and self.p <= largest_p

    def is_open(self, noise: TimerNoise) -> bool:
        """Beyond the floor, and nobody would be surprised either way."""
        return self.estimate.ratio > noise.limit and (self.p <= _SURPRISING_P or not self.is_enough)


def second_look(
    subject: Sequence[float], reference: Sequence[float], confidence: float = 0.99
) -> SecondLook:
    """`subject` over `reference`: seconds, one per process or run, all > 0."""
    first, second = len(subject), len(reference)
    ratios = sorted(one / other for one in subject for other in reference)
    tail = _upper_tail(first, second)
    smallest = first * (first + 1) // 2
    beyond = sum(1 for p in tail[smallest:] if p <= (1 - confidence) / 2)
    ratio = statistics.median(ratios)
    low, high = (ratios[beyond - 1], ratios[-beyond]) if beyond else (ratio, ratio)
    found = Estimate(ratio, low, high, enough=beyond > 0)
    return SecondLook(found, rank_sum_p(subject, reference), tail[-1] <= LARGEST_P)


def is_futile(subject: Sequence[float], reference: Sequence[float], noise: TimerNoise) -> bool:
    """Whether to give up after `FUTILITY_ROUNDS`: what was seen first is not there any more."""
    if len(subject) < FUTILITY_ROUNDS:
        return False
    return statistics.median(subject) / statistics.median(reference) < 1 + noise.floor / 4


def rank_sum_p(subject: Sequence[float], reference: Sequence[float]) -> float:
    """Exact one-sided p that `subject` is larger; equal values share their mean rank."""
    merged = sorted((value, i) for i, value in enumerate((*subject, *reference)))
    doubled = 0  # twice the rank sum, a whole number with shared ranks too
    start = 0
    while start < len(merged):
        end = start
        while end < len(merged) and merged[end][0] == merged[start][0]:
            end += 1
        doubled += (start + 1 + end) * sum(i < len(subject) for _, i in merged[start:end])
        start = end
    return _upper_tail(len(subject), len(reference))[doubled // 2]


@lru_cache
def _upper_tail(first: int, second: int) -> tuple[float, ...]:
    """Chance that the rank sum of `first` among `first + second` is at least s, for each s."""
    total = first + second
    largest = sum(range(second + 1, total + 1))
    ways = [[0] * (largest + 1) for _ in range(first + 1)]
    ways[0][0] = 1
    for rank in range(1, total + 1):
        for taken in range(min(rank, first), 0, -1):
            for value in range(largest, rank - 1, -1):
                ways[taken][value] += ways[taken - 1][value - rank]
    tail = list(accumulate(reversed(ways[first])))[::-1]
    return tuple(count / math.comb(total, first) for count in tail)
