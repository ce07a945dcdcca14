"""The gate beside change-point methods as nightly alarms: the tables of docs/verdict.md.

    python benchmarks/alarm_rates.py HISTORY.parquet [--series N] [--seed N]    # about 4 minutes

All follow the same series over the same nights. Of each series (residuals as in gate_rates.py) one
random night is the first of `NIGHTS` that are followed, once as they are and once with each step
from that night on.

The gate judges them as in gate_rates.py, among all series of the night, and measures again what it
picks and what is too restless to tell. "First look" is what it picks.

A change-point method sees each night the newest `WINDOW` nights, this one included. It alarms when
it reports a slow-down that it has not reported before: further than `TOLERANCE` nights from every
one reported since, or on, the night before the first. A slow-down is a change point after which
the median is higher by more than a floor. asv's are those of its regressions page and feed, its
own threshold in the floor's place: steps of the fit that the latest level has not come back from.
"Confirmed": the floor is half of the gate's, as in the gate's first look; each night the gate's
second look follows where there is something new, and only what it confirms is reported.

    False     alarms in 10,000 series-nights as they are, second looks drawn `SECOND_LOOKS` times
    Again     share of these series-nights that were measured again
    Recall    share of the steps with an alarm in the first 3, and the first 20 nights
    Precision true alarms over all, if every 200 nights of a series had one step: the first alarm
              in the 20 nights from the step on is true, whatever it names; any in the 180 others
              is false
    Delay     median and mean nights to the alarm (1: the first that is slower), of those within 20
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from change_points import TOLERANCE, Array, Detector, attnbench, e_divisive, pelt
from gate_rates import (
    AS_IS,
    NOISE,
    SECOND_LOOKS,
    Nights,
    is_untold,
    look,
    looked_again,
    rows_of,
    stepped,
)
from numpy.typing import NDArray
from real_noise import STEADY_CV, STEPS, residuals, robust_cv

from attnbench.history.confirm import LARGEST_P, LARGEST_P_UNPICKED
from attnbench.history.gate import DEPTH
from attnbench.history.looks import looks_of

#: What became of each series-night: [num_cases, num_draws, NIGHTS].
Outcomes = NDArray[np.int8]
NOTHING, AGAIN, ALARM = range(3)

#: One series' slow-downs beyond a floor, as indices into the nights the method saw.
Report = Callable[[float], list[int]]

WINDOW, NIGHTS = 150, 20
SOON = 3
NIGHTS_PER_STEP = 200


@dataclass(frozen=True, slots=True)
class Case:
    """One series of all, and the first night followed."""

    series: int
    place: int


@dataclass(frozen=True, slots=True)
class Rule:
    """What of a report is an alarm."""

    name: str
    floor: float
    is_confirmed: bool


@dataclass(frozen=True, slots=True)
class Peer:
    """A change-point method: what it reports of each row, [num_rows, WINDOW] log seconds."""

    name: str
    report: Callable[[Array], list[Report]]
    floors: tuple[float, ...] = (NOISE.floor,)

    def rules(self) -> list[Rule]:
        alone = [Rule(f"{self.name}, {floor * 100:.0f} %", floor, False) for floor in self.floors]
        return [*alone, Rule(f"{self.name}, confirmed", NOISE.floor / 2, True)]


class Watch:
    """One series followed night by night: each slow-down is reported once."""

    def __init__(self, known: Sequence[int]) -> None:
        self._known = list(known)

    def outcome(self, slower: Sequence[int], is_confirmed: Callable[[], bool]) -> int:
        """Of one night's `slower`, all counted from the start of the series.

        `AGAIN`: something new was measured again and not confirmed.
        """
        new = [at for at in slower if all(abs(at - old) > TOLERANCE for old in self._known)]
        if not new:
            return NOTHING
        if not is_confirmed():
            return AGAIN
        self._known += new
        return ALARM


def levels(detect: Detector) -> Callable[[Array], list[Report]]:
    """Reports of a method that only says where a level changes."""

    def report_of(y: Array, changes: list[int]) -> Report:
        parts = np.split(y, changes)
        middle = np.array([np.median(part) for part in parts])
        return lambda floor: [
            at for at, rise in zip(changes, np.diff(middle), strict=True) if rise > np.log1p(floor)
        ]

    return lambda block: [report_of(*one) for one in zip(block, detect(block), strict=True)]


def asv(block: Array) -> list[Report]:
    """What `asv publish` calls regressions, at a threshold."""
    from asv.step_detect import detect_regressions, detect_steps

    def report_of(y: Array) -> Report:
        steps = detect_steps(np.exp(y).tolist())
        return lambda floor: [jump[1] for jump in detect_regressions(steps, floor)[2] or ()]

    return [report_of(y) for y in block]


PEERS = (
    Peer("asv", asv, (0.05, NOISE.floor)),  # 5 % unless regressions_thresholds says otherwise
    Peer("e-divisive", levels(e_divisive)),
    Peer("pelt", levels(pelt)),
    Peer("pelt, ar", levels(lambda block: pelt(block, aware=True))),
    Peer("change points", levels(attnbench)),
)


def follow(
    peer: Peer,
    series: Sequence[Array],
    cases: Sequence[Case],
    step: float,
    rng: np.random.Generator,
    draws: int = 1,
) -> dict[str, Outcomes]:
    """Every rule of `peer`; of cases with a step only until each has alarmed.

    Second looks are drawn `draws` times.
    """
    rules = peer.rules()
    outcomes = {rule.name: np.zeros((len(cases), draws, NIGHTS), np.int8) for rule in rules}
    values = [stepped(series[case.series], case.place, step) for case in cases]

    def reports(rows: Sequence[int], night: int) -> list[tuple[int, Report]]:
        """Of the window that ends with `night`, each with where it starts in its series."""
        starts = [cases[row].place + night + 1 - WINDOW for row in rows]
        seen = [values[row][at : at + WINDOW] for row, at in zip(rows, starts, strict=True)]
        return list(zip(starts, peer.report(np.array(seen)), strict=True))

    before = reports(range(len(cases)), -1)
    watches = {
        rule.name: [
            [Watch([start + at for at in report(rule.floor)]) for _ in range(draws)]
            for start, report in before
        ]
        for rule in rules
    }
    followed = list(range(len(cases)))
    for night in range(NIGHTS):
        for row, (start, report) in zip(followed, reports(followed, night), strict=True):
            noise = series[cases[row].series]
            for rule in rules:
                slower = [start + at for at in report(rule.floor)]
                confirms = partial(is_confirmed, noise, step, rng) if rule.is_confirmed else yes
                for draw, watch in enumerate(watches[rule.name][row]):
                    outcomes[rule.name][row, draw, night] = watch.outcome(slower, confirms)
        if step:
            alarms = [(found == ALARM).any(axis=2).all(axis=1) for found in outcomes.values()]
            followed = np.flatnonzero(~np.all(alarms, axis=0)).tolist()
        if not followed:
            break
    return outcomes


def yes() -> bool:
    return True


def is_confirmed(
    noise: Array, step: float, rng: np.random.Generator, largest_p: float = LARGEST_P
) -> bool:
    """The gate's second look, judged alone: change-point methods pick few of a night."""
    found = looked_again(noise, step, rng)
    return found is not None and found.is_slower(NOISE, largest_p)


def follow_gate(
    nights: Nights, cases: Sequence[Case], step: float, rng: np.random.Generator, draws: int = 1
) -> dict[str, Outcomes]:
    """The gate and its first look, as `follow`."""
    first = np.zeros((len(cases), draws, NIGHTS), np.int8)
    both = first.copy()
    for row, case in enumerate(cases):
        noise = nights.series[case.series]
        ends = case.place + 1 + np.arange(NIGHTS)
        values = stepped(noise, case.place, step)
        found = look(np.array([values[end - DEPTH : end] for end in ends]))
        firsts = looks_of(found, np.full(NIGHTS, NOISE.floor))
        for night, (end, alone) in enumerate(zip(ends.tolist(), firsts, strict=True)):
            assert alone is not None  # DEPTH runs make a level
            own = rows_of(found, np.array([night]))
            others = nights.picked_with(case.series, own, end - 1 - len(noise), AS_IS)
            if others is None:
                if is_untold(replace(alone, is_picked=False, is_sure=False)):
                    for draw in range(draws):
                        again = is_confirmed(noise, step, rng, LARGEST_P_UNPICKED)
                        both[row, draw, night] = ALARM if again else AGAIN
                continue
            first[row, :, night] = ALARM
            for draw in range(draws):
                is_alarm = nights.confirmed(case.series, others, step, AS_IS, rng)
                both[row, draw, night] = ALARM if is_alarm else AGAIN
            if step and (both[row] == ALARM).any(axis=1).all():
                break
    return {"gate": both, "gate, first look": first}


def cells(quiet: Outcomes, slower: Sequence[Outcomes]) -> list[str]:
    """One line of the table, of the cases of one group: without and with each step."""
    false = float((quiet == ALARM).mean())
    found = [f"{false * 1e4:.1f}"]
    for outcomes in slower:
        alarms = outcomes == ALARM
        is_found = alarms.any(axis=2)
        delays = alarms.argmax(axis=2)[is_found] + 1
        recall = float(is_found.mean())
        soon = float(alarms[:, :, :SOON].any(axis=2).mean())
        alarmed = recall + false * (NIGHTS_PER_STEP - NIGHTS)
        precision = f"{recall / alarmed:.2f}" if alarmed else "-"
        delay = f"{np.median(delays):.0f}, {delays.mean():.1f}" if len(delays) else "-"
        found.append(f"{precision} / {soon:.2f}, {recall:.2f} / {delay}")
    return found


def sample(series: Sequence[Array], count: int, rng: np.random.Generator) -> list[Case]:
    """`count` series, evenly out of all, and a night of each."""
    chosen = np.linspace(0, len(series) - 1, min(count, len(series))).astype(int)
    return [
        Case(i, int(rng.integers(WINDOW, len(series[i]) - NIGHTS + 1)))
        for i in chosen.tolist()
        if len(series[i]) >= WINDOW + NIGHTS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("history", type=Path)
    parser.add_argument("--series", type=int, default=200, help="followed, of all")
    parser.add_argument("--seed", type=int, default=20261121)
    options = parser.parse_args()
    series = residuals(options.history)
    cases = sample(series, options.series, np.random.default_rng(options.seed))
    steady = np.array([robust_cv(series[case.series]) <= STEADY_CV for case in cases])
    nights = Nights(series)
    lines: dict[str, list[Outcomes]] = {}
    looks_again = {"gate", *(r.name for peer in PEERS for r in peer.rules() if r.is_confirmed)}
    for step in (0.0, *STEPS):
        draws = 1 if step else SECOND_LOOKS
        rng = np.random.default_rng(options.seed)
        found = follow_gate(nights, cases, step, rng, draws)
        for peer in PEERS:
            found |= follow(peer, series, cases, step, rng, draws)
        for name, outcomes in found.items():
            lines.setdefault(name, []).append(outcomes)
    head = " | ".join(["method", "false", "again", *(f"{step * 100:.0f} %" for step in STEPS)])
    print("With a step: precision / recall in 3, in 20 nights / delay, median and mean")
    for title, rows in (("All", steady | True), ("cv <= 0.5 %", steady)):
        print(f"\n{title}: {rows.sum()} series, {rows.sum() * NIGHTS} series-nights\n")
        print(f"| {head} |\n|" + "---|" * (len(STEPS) + 3))
        for name, (quiet, *slower) in lines.items():
            false, *rest = cells(quiet[rows], [outcomes[rows] for outcomes in slower])
            again = (quiet[rows] != NOTHING).mean() * 100
            share = f"{again:.1f} %" if name in looks_again else "-"
            print(f"| {name} | {' | '.join([false, share, *rest])} |")


if __name__ == "__main__":
    main()
