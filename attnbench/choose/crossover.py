"""Where the winner changes over batch, query and context, within what is stored of one layer.

Along a line of stored points that differ in one number only, two neighbouring points with clear
and different winners bracket a crossover; points between them that are a tie widen the bracket.
The place is where log(time A / time B), drawn straight over log(number), is zero.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from attnbench.choose.stored import Point, unstable
from attnbench.choose.tries import Choice
from attnbench.history.rule import Verdict, VerdictSettings, decide, estimate_groups
from attnbench.workload import Workload

_AXES = ("requests", "query", "context")


@dataclass(frozen=True, slots=True)
class Crossover:
    """`below` wins up to `low` on `axis`, `above` from `high` on; between, about at `at`.

    `fixed` are the other two numbers, by name.
    """

    axis: str
    fixed: Mapping[str, int]
    below: str
    above: str
    low: int
    high: int
    at: float

    @property
    def text(self) -> str:
        """`between 8 and 32 requests (about 15; query 1, context 4096): A below, B above`."""
        fixed = ", ".join(f"{name} {value}" for name, value in self.fixed.items())
        unit = self.axis if self.axis == "requests" else f"tokens of {self.axis}"
        return (
            f"between {self.low} and {self.high} {unit} (about {self.at:.3g}, interpolated; "
            f"{fixed}): {self.below} below, {self.above} above"
        )


def crossovers(
    grid: Mapping[str, Point],
    valid: Sequence[Choice],
    timer: str,
    settings: VerdictSettings,
) -> list[Crossover]:
    """All crossovers of a layer's stored grid among `valid` choices."""
    places: dict[tuple[int, int, int], Point] = {}
    for text, point in grid.items():
        if (place := place_of(Workload.parse(text))) is not None:
            places[place] = point
    found = []
    for axis, name in enumerate(_AXES):
        lines: dict[tuple[int, ...], list[tuple[int, int, int]]] = defaultdict(list)
        for place in places:
            lines[place[:axis] + place[axis + 1 :]].append(place)
        others = [one for one in _AXES if one != name]
        for fixed, members in sorted(lines.items()):
            members.sort(key=lambda place: place[axis])
            numbers = dict(zip(others, fixed, strict=True))
            points = [(place[axis], places[place]) for place in members if place[axis] > 0]
            found += _along(name, numbers, points, valid, timer, settings)
    return found


def place_of(workload: Workload) -> tuple[int, int, int] | None:
    """(requests, query, context) of a batch of equal requests; None for any other."""
    alike = {(one.query_len, one.seq_len) for one in workload.requests}
    if len(alike) != 1 or workload.common_prefix_len:
        return None
    query, seq = alike.pop()
    return len(workload.requests), query, seq - query


def _along(
    axis: str,
    fixed: Mapping[str, int],
    points: Sequence[tuple[int, Point]],
    valid: Sequence[Choice],
    timer: str,
    settings: VerdictSettings,
) -> list[Crossover]:
    found = []
    last: tuple[int, Choice] | None = None
    for place, (number, point) in enumerate(points):
        winner = _clear_winner(point, valid, timer, settings)
        if winner is None:
            continue
        if last is not None and last[1] != winner:
            start = next(i for i, (n, _) in enumerate(points) if n == last[0])
            at = _zero(points[start : place + 1], last[1], winner)
            found.append(Crossover(axis, fixed, last[1].text, winner.text, last[0], number, at))
        last = (number, winner)
    return found


def _clear_winner(
    point: Point, valid: Sequence[Choice], timer: str, settings: VerdictSettings
) -> Choice | None:
    timed = sorted(
        (one for choice, one in point.timed.items() if choice in valid and not unstable([one])),
        key=lambda one: (one.seconds, one.choice),
    )
    if len(timed) < 2:
        return None
    noise = settings.noise(timer)
    best = timed[0]
    for other in timed[1:]:
        ratio = estimate_groups([best.replicates], [other.replicates], noise, settings.confidence)
        if decide(ratio, noise)[0] is not Verdict.REGRESSION:
            return None
    return best.choice


def _zero(points: Sequence[tuple[int, Point]], below: Choice, above: Choice) -> float:
    """Where `below` becomes slower than `above`; the middle of the bracket where not both ran."""
    logs = [
        (number, math.log(point.timed[below].seconds / point.timed[above].seconds))
        for number, point in points
        if below in point.timed and above in point.timed
    ]
    for (x0, y0), (x1, y1) in pairwise(logs):
        if y0 <= 0 < y1:
            share = -y0 / (y1 - y0)
            return math.exp(math.log(x0) + share * (math.log(x1) - math.log(x0)))
    return math.sqrt(points[0][0] * points[-1][0])
