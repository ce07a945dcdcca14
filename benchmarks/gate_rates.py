"""False alarms and power of the nightly gate on real noise: the tables of docs/verdict.md.

    python benchmarks/gate_rates.py HISTORY.parquet [--seed N] [--halves]

HISTORY has the columns series, commit_time_ms and seconds: real benchmark series over commits.
Noise is what is left of a series' log seconds after its running median over 21 commits. Every
commit is a night, every series looked at in every night (first look: all series together); what
is picked is confirmed with a stretch of noise of that series from elsewhere, its values dealt in
turn to the build before and the new one, and all confirmations of a night are judged together.
Steps are injected at eight places of every series, one series at a time, and followed for three
nights. The same seed prints the same table.

With --halves the limits of both looks are chosen anew on a random half of the series and measured
on the other half, both ways round, `SPLITS` times. Nights are of all series. The rule: of the
limits of `GRID`, strictest first, with at most one false alarm in 10,000 series-nights, the first
with a power of 0.9 three nights after a step of 3 % in a steady series; if none has it, the one
with most.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from real_noise import STEADY_CV, STEPS, Floats, residuals, robust_cv

from attnbench.history import confirm, gate
from attnbench.history.confirm import (
    FALSE_ALARMS,
    FUTILITY_ROUNDS,
    ROUNDS,
    SecondLook,
    is_futile,
    second_look,
)
from attnbench.history.gate import DEPTH, PICKED_NOISE, Screen, accepted, pick, screen
from attnbench.history.looks import FirstLook, looks_of
from attnbench.history.rule import TIMER_NOISE, Verdict
from attnbench.history.series_verdict import first_verdict

PLACES, NIGHTS = 8, 3
NOISE = TIMER_NOISE["event"]
SECOND_LOOKS = 20
SPLITS = 200


@dataclass(frozen=True, slots=True)
class Limits:
    """What was chosen by measurement, in both looks; as the gate has it."""

    share: float = PICKED_NOISE
    first_p: float = gate.LARGEST_P
    second_p: float = confirm.LARGEST_P

    def __str__(self) -> str:
        return f"{self.share:.0%}, {self.first_p:.1%}; {self.second_p:.2%}"


AS_IS = Limits()

#: Strictest first look first, and with each the strictest second look first.
GRID = tuple(
    Limits(share, first_p, second_p)
    for share, first_p in ((0.2, 0.005), (0.3, 0.01), (0.5, 0.01), (0.5, 0.02), (0.5, 0.05))
    for second_p in (0.0025, 0.005, 0.01)
)


def rolling(noise: Floats) -> Floats:
    """Each night of a series as a row of its newest values: [num_nights, DEPTH]."""
    return sliding_window_view(noise, DEPTH)


def looked_again(noise: Floats, step: float, rng: np.random.Generator) -> SecondLook | None:
    """One confirmation: a stretch of the series' noise, dealt in turn to both builds.

    None: given up as futile.
    """
    start = rng.integers(0, len(noise) - 2 * ROUNDS)
    stretch = np.exp(noise[start : start + 2 * ROUNDS])
    reference, subject = stretch[0::2].tolist(), (stretch[1::2] * (1 + step)).tolist()
    if is_futile(subject[:FUTILITY_ROUNDS], reference[:FUTILITY_ROUNDS], NOISE):
        return None
    return second_look(subject, reference)


def alarms(looks: list[SecondLook | None], largest_p: float) -> list[bool]:
    """Of one night's second looks, in order: which are alarms (`looks.alarm_limit`)."""
    p = np.array([look.p if look is not None else 1.0 for look in looks])
    passing = p[accepted(p, FALSE_ALARMS)]
    limit = min(largest_p, passing.max()) if len(passing) else 0.0
    return [look is not None and look.is_slower(NOISE, limit) for look in looks]


class Nights:
    """The first look at every night of every series, without steps.

    Series end together: night -1 is the last commit of each.
    """

    def __init__(self, series: list[Floats]) -> None:
        self.series = series
        rows = np.concatenate([rolling(noise) for noise in series])
        self.of_row = np.concatenate(
            [np.full(len(noise) - DEPTH + 1, i) for i, noise in enumerate(series)]
        )
        self.night = np.concatenate(
            [np.arange(len(noise) - DEPTH + 1) - (len(noise) - DEPTH + 1) for noise in series]
        )
        self.found = look(rows)

    def nights_of(self) -> NDArray[np.int64]:
        """How many nights each series has."""
        return np.bincount(self.of_row, minlength=len(self.series))

    def picked(self, limits: Limits = AS_IS) -> NDArray[np.bool_]:
        """Row -> picked in its night."""
        result = np.zeros(len(self.night), bool)
        for night in np.unique(self.night):
            rows = np.flatnonzero(self.night == night)
            result[rows] = picks(rows_of(self.found, rows), limits)
        return result

    def picked_with(self, i: int, own: Screen, night: int, limits: Limits) -> list[int] | None:
        """The other series picked in `night` when series `i` shows `own`; None: `i` is not."""
        others = np.flatnonzero((self.night == night) & (self.of_row != i))
        rest = rows_of(self.found, others)
        both = Screen(
            *(
                np.concatenate([getattr(own, field.name), getattr(rest, field.name)])
                for field in fields(Screen)
            )
        )
        chosen = picks(both, limits)
        return self.of_row[others[chosen[1:]]].tolist() if chosen[0] else None

    def confirmed(
        self, i: int, others: list[int], step: float, limits: Limits, rng: np.random.Generator
    ) -> bool:
        """Whether series `i`, slower by `step`, is an alarm, `others` being measured again too."""
        again = [looked_again(self.series[i], step, rng)]
        again += [looked_again(self.series[other], 0.0, rng) for other in others]
        return alarms(again, limits.second_p)[0]


def picks(found: Screen, limits: Limits) -> NDArray[np.bool_]:
    floors = np.full(len(found.p), NOISE.floor)
    return pick(found, floors, limits.share, limits.first_p)


def look(rows: Floats) -> Screen:
    return screen(rows, np.full(len(rows), NOISE.spread))


def rows_of(found: Screen, rows: NDArray[np.int64]) -> Screen:
    return Screen(*(getattr(found, name)[rows] for name in Screen.__dataclass_fields__))


@dataclass(frozen=True, slots=True)
class Quiet:
    """What the gate did in nights without a step.

    `picked` is a share of the series-nights, `given_up` of the second looks; `undecided` in 10,000
    series-nights, `false_alarms` in 10,000 nights of each series.
    """

    picked: float
    given_up: float
    undecided: float
    false_alarms: Floats


def quiet(nights: Nights, rng: np.random.Generator, limits: Limits = AS_IS) -> Quiet:
    picked = nights.picked(limits)
    looks = futile = open_ = 0
    false = np.zeros(len(nights.series))
    for night in np.unique(nights.night):
        rows = np.flatnonzero(picked & (nights.night == night))
        for _ in range(SECOND_LOOKS):
            found = [looked_again(nights.series[nights.of_row[row]], 0.0, rng) for row in rows]
            is_alarm = np.array(alarms(found, limits.second_p), bool)
            looks += len(found)
            futile += sum(look is None for look in found)
            false[nights.of_row[rows[is_alarm]]] += 1
            open_ += sum(
                look is not None and look.is_open(NOISE) and not alarm
                for look, alarm in zip(found, is_alarm, strict=True)
            )
    times = nights.nights_of() * SECOND_LOOKS / 1e4
    return Quiet(
        picked=float(picked.mean()),
        given_up=futile / max(looks, 1),
        undecided=open_ / times.sum(),
        false_alarms=false / times,
    )


@dataclass(frozen=True, slots=True)
class Untold:
    """What is too restless to tell: `share` of the series-nights, the others in 10,000 of them."""

    share: float
    false_alarms: float
    undecided: float


def is_untold(first: FirstLook) -> bool:
    """Whether it is measured again though it was not picked; the build before is at hand."""
    found = first_verdict(first, NOISE, True)[0]
    return found is Verdict.UNDECIDED and first.estimate.ratio > NOISE.limit


def untold(nights: Nights, rng: np.random.Generator) -> Untold:
    """Nights without a step; the build before takes turns."""
    rows_again: list[int] = []
    for night in np.unique(nights.night):
        rows = np.flatnonzero(nights.night == night)
        firsts = looks_of(rows_of(nights.found, rows), np.full(len(rows), NOISE.floor))
        rows_again += [
            row
            for row, first in zip(rows.tolist(), firsts, strict=True)
            if first is not None and is_untold(first)
        ]
    false = open_ = 0
    for _ in range(SECOND_LOOKS):
        for row in rows_again:
            found = looked_again(nights.series[nights.of_row[row]], 0.0, rng)
            if found is not None:
                false += (is_alarm := found.is_slower(NOISE, confirm.LARGEST_P_UNPICKED))
                open_ += found.is_open(NOISE) and not is_alarm
    times = len(nights.night) * SECOND_LOOKS / 1e4
    return Untold(len(rows_again) / len(nights.night), false / times, open_ / times)


def power(
    nights: Nights,
    step: float,
    rng: np.random.Generator,
    limits: Limits = AS_IS,
    chosen: list[int] | None = None,
) -> Floats:
    """[num_series, NIGHTS]: share of the steps confirmed by the first, second, third night.

    Only of the `chosen` series where there are some.
    """
    chosen = list(range(len(nights.series))) if chosen is None else chosen
    result = np.zeros((len(chosen), NIGHTS))
    for row, i in enumerate(chosen):
        noise = nights.series[i]
        places = np.linspace(DEPTH, len(noise) - NIGHTS, PLACES).astype(int).tolist()
        found = look(
            np.array(
                [
                    stepped(noise, place, step)[place + n + 1 - DEPTH : place + n + 1]
                    for place in places
                    for n in range(NIGHTS)
                ]
            )
        )
        for p, place in enumerate(places):
            for n in range(NIGHTS):
                own = rows_of(found, np.array([p * NIGHTS + n]))
                others = nights.picked_with(i, own, place + n - len(noise), limits)
                if others is not None and nights.confirmed(i, others, step, limits, rng):
                    result[row, n:] += 1 / PLACES
                    break
    return result


def stepped(noise: Floats, place: int, step: float) -> Floats:
    """`noise` with all from `place` on slower by `step`."""
    slower: Floats = noise + np.log1p(step) * (np.arange(len(noise)) >= place)
    return slower


def steady_of(series: list[Floats]) -> list[int]:
    return [i for i, noise in enumerate(series) if robust_cv(noise) <= STEADY_CV]


Choice = tuple[float, float]  # false alarms in 10,000 series-nights, power


def chosen_limits(found: Mapping[Limits, Choice]) -> Limits:
    """By the rule above, of limits strictest first."""
    allowed = [limits for limits, (false, _) in found.items() if false <= 1]
    if not allowed:
        raise SystemExit("every setting gives more than one false alarm in 10,000 series-nights")
    enough = [limits for limits in allowed if found[limits][1] >= 0.9]
    return enough[0] if enough else max(allowed, key=lambda limits: found[limits][1])


def held_back(
    false: Floats, power: Floats, weights: Floats, rng: np.random.Generator
) -> tuple[NDArray[np.int64], Floats, Floats]:
    """Choose on one half of the series, measure on the other, both ways, `SPLITS` times.

    `false` and `power` are [num_limits, num_series] in the order of `GRID`, `weights` the nights of
    each series; power is nan for a series that is not steady. Three: the limits chosen, as indices
    [2 * SPLITS], and what the other half's figures are with these limits, and as the gate has
    them, [2 * SPLITS, 2] each.
    """
    chosen, found, as_is = [], [], []
    for _ in range(SPLITS):
        order = rng.permutation(false.shape[1])
        halves = (order[: len(order) // 2], order[len(order) // 2 :])
        measured = [
            np.stack(
                [
                    np.average(false[:, half], axis=1, weights=weights[half]),
                    np.nanmean(power[:, half], axis=1),
                ],
                axis=1,
            )
            for half in halves
        ]
        for own, other in (measured, measured[::-1]):
            rows = {limits: (row[0], row[1]) for limits, row in zip(GRID, own, strict=True)}
            at = GRID.index(chosen_limits(rows))
            chosen.append(at)
            found.append(other[at])
            as_is.append(other[GRID.index(AS_IS)])
    return np.array(chosen), np.array(found), np.array(as_is)


def halves(series: list[Floats], seed: int) -> list[str]:
    """The tables of --halves."""
    nights, steady = Nights(series), steady_of(series)
    weights = nights.nights_of().astype(float)
    false = np.zeros((len(GRID), len(series)))
    shares = np.full((len(GRID), len(series)), np.nan)
    picked = []
    for at, limits in enumerate(GRID):
        still = quiet(nights, np.random.default_rng(seed), limits)
        picked.append(still.picked)
        false[at] = still.false_alarms
        found = power(nights, 0.03, np.random.default_rng(seed), limits, steady)
        shares[at, steady] = found[:, -1]
    chosen, other, as_is = held_back(false, shares, weights, np.random.default_rng(seed))
    lines = ["| share, p; p again | picked | false in 10,000 | power | chosen |", "|" + "---|" * 5]
    lines += [
        f"| {limits} | {picked[at]:.1%} | {np.average(false[at], weights=weights):.2f} "
        f"| {np.nanmean(shares[at]):.3f} | {(chosen == at).mean():.0%} |"
        for at, limits in enumerate(GRID)
    ]
    lines.append("\n| on the half held back | false in 10,000 | power | at least 0.9 |")
    lines.append("|---|---|---|---|")
    for name, (rates, powers) in (("as chosen", other.T), (f"always {AS_IS}", as_is.T)):
        spread = [
            f"{row.mean():.{digits}f} ({np.quantile(row, 0.05):.{digits}f} to "
            f"{np.quantile(row, 0.95):.{digits}f})"
            for row, digits in ((rates, 2), (powers, 3))
        ]
        lines.append(f"| {name} | {' | '.join(spread)} | {(powers >= 0.9).mean():.0%} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("history", type=Path)
    parser.add_argument("--seed", type=int, default=20261121)
    parser.add_argument("--halves", action="store_true", help="choose on one half, measure on two")
    options = parser.parse_args()
    series = residuals(options.history)
    if options.halves:
        print("\n".join(halves(series, options.seed)))
        return
    rng = np.random.default_rng(options.seed)
    nights = Nights(series)
    found = quiet(nights, rng)
    false = float(np.average(found.false_alarms, weights=nights.nights_of()))
    print(
        f"{len(series)} series, {len(nights.night)} series-nights: {found.picked:.2%} picked by "
        f"the first look, of these {found.given_up:.0%} given up after {FUTILITY_ROUNDS} rounds; "
        f"in 10,000 series-nights {false:.2f} false alarms after confirmation and "
        f"{found.undecided:.2f} left undecided"
    )
    rest = untold(nights, np.random.default_rng(options.seed))
    print(
        f"{rest.share:.2%} more are measured again because their past is too restless to tell: "
        f"{rest.false_alarms:.2f} false alarms and {rest.undecided:.2f} left undecided"
    )
    steady = steady_of(series)
    print(f"\n| step | series | after 1 night | 2 | {NIGHTS} |\n|---|---|---|---|---|")
    for step in STEPS:
        shares = power(nights, step, rng)
        for name, rows in (
            (f"cv <= 0.5 % ({len(steady)})", steady),
            ("all", list(range(len(series)))),
        ):
            cells = " | ".join(f"{share:.3f}" for share in shares[rows].mean(axis=0))
            print(f"| {step:.0%} | {name} | {cells} |")


if __name__ == "__main__":
    main()
