"""False alarms and power of the nightly gate on real noise: the table of docs/verdict.md.

    python benchmarks/gate_rates.py HISTORY.parquet [--seed N]

HISTORY has the columns series, commit_time_ms and seconds: real benchmark series over commits.
Noise is what is left of a series' log seconds after its running median over 21 commits. Every
commit is a night, every series looked at in every night (first look: all series together); what
is picked is confirmed with a stretch of noise of that series from elsewhere, its values dealt in
turn to the build before and the new one, and all confirmations of a night are judged together.
Steps are injected at eight places of every series, one series at a time, and followed for three
nights. The same seed prints the same table.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from attnbench.history.confirm import (
    FALSE_ALARMS,
    FUTILITY_ROUNDS,
    LARGEST_P,
    ROUNDS,
    SecondLook,
    is_futile,
    second_look,
)
from attnbench.history.gate import DEPTH, Screen, accepted, pick, screen
from attnbench.history.rule import TIMER_NOISE

Floats = NDArray[np.float64]

STEPS = (0.02, 0.03, 0.05, 0.10)
PLACES, NIGHTS = 8, 3
SMOOTHED = 21
STEADY_CV = 0.005
NOISE = TIMER_NOISE["event"]
SECOND_LOOKS = 20


def residuals(path: Path) -> list[Floats]:
    """One array of log seconds around zero per series, in order of commit time."""
    import pandas as pd

    found = []
    for _, rows in pd.read_parquet(path).groupby("series"):
        logs = np.log(rows.sort_values("commit_time_ms").seconds.to_numpy())
        padded = np.pad(logs, SMOOTHED // 2, mode="reflect")
        found.append(logs - np.median(sliding_window_view(padded, SMOOTHED), axis=1))
    return found


def robust_cv(noise: Floats) -> float:
    """Scaled median absolute deviation: the standard deviation without the odd runs."""
    return float(1.4826 * np.median(np.abs(noise)))


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


def alarms(looks: list[SecondLook | None]) -> list[bool]:
    """Of one night's second looks, in order: which are alarms (`looks.alarm_limit`)."""
    p = np.array([look.p if look is not None else 1.0 for look in looks])
    passing = p[accepted(p, FALSE_ALARMS)]
    limit = min(LARGEST_P, passing.max()) if len(passing) else 0.0
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

    def picked(self) -> NDArray[np.bool_]:
        """Row -> picked in its night."""
        result = np.zeros(len(self.night), bool)
        for night in np.unique(self.night):
            rows = np.flatnonzero(self.night == night)
            result[rows] = pick(rows_of(self.found, rows), np.full(len(rows), NOISE.floor))
        return result


def look(rows: Floats) -> Screen:
    return screen(rows, np.full(len(rows), NOISE.spread))


def rows_of(found: Screen, rows: NDArray[np.int64]) -> Screen:
    return Screen(*(getattr(found, name)[rows] for name in Screen.__dataclass_fields__))


def false_alarms(nights: Nights, rng: np.random.Generator) -> str:
    picked = nights.picked()
    looks = futile = false = open_ = 0
    for night in np.unique(nights.night):
        rows = np.flatnonzero(picked & (nights.night == night))
        for _ in range(SECOND_LOOKS):
            found = [looked_again(nights.series[nights.of_row[row]], 0.0, rng) for row in rows]
            is_alarm = alarms(found)
            looks += len(found)
            futile += sum(look is None for look in found)
            false += sum(is_alarm)
            open_ += sum(
                look is not None and look.is_open(NOISE) and not alarm
                for look, alarm in zip(found, is_alarm, strict=True)
            )
    total = len(nights.night)
    times = total * SECOND_LOOKS
    return (
        f"{len(nights.series)} series, {total} series-nights: {picked.mean():.2%} picked by the "
        f"first look, of these {futile / max(looks, 1):.0%} given up after {FUTILITY_ROUNDS} "
        f"rounds; in 10,000 series-nights {false / times * 1e4:.2f} false alarms after "
        f"confirmation and {open_ / times * 1e4:.2f} left undecided"
    )


def power(nights: Nights, step: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """[num_series, NIGHTS]: share of the steps confirmed by the first, second, third night."""
    result = np.zeros((len(nights.series), NIGHTS))
    for i, noise in enumerate(nights.series):
        first = DEPTH
        places = np.linspace(first, len(noise) - NIGHTS, PLACES).astype(int)
        rows = []
        for place in places:
            stepped = noise.copy()
            stepped[place:] += np.log1p(step)
            rows += [stepped[place + n + 1 - DEPTH : place + n + 1] for n in range(NIGHTS)]
        found = look(np.array(rows))
        for p, place in enumerate(places):
            for n in range(NIGHTS):
                row = p * NIGHTS + n
                others = np.flatnonzero(
                    (nights.night == place + n - len(noise)) & (nights.of_row != i)
                )
                own = rows_of(found, np.array([row]))
                rest = rows_of(nights.found, others)
                both = Screen(
                    *(
                        np.concatenate([getattr(own, name), getattr(rest, name)])
                        for name in Screen.__dataclass_fields__
                    )
                )
                is_picked = pick(both, np.full(len(others) + 1, NOISE.floor))
                if not is_picked[0]:
                    continue
                again = [looked_again(noise, step, rng)]
                again += [
                    looked_again(nights.series[nights.of_row[other]], 0.0, rng)
                    for other in others[is_picked[1:]]
                ]
                if alarms(again)[0]:
                    result[i, n:] += 1 / PLACES
                    break
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("history", type=Path)
    parser.add_argument("--seed", type=int, default=20261121)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    nights = Nights(residuals(options.history))
    print(false_alarms(nights, rng))
    cv = np.array([robust_cv(noise) for noise in nights.series])
    steady = cv <= STEADY_CV
    print(f"\n| step | series | after 1 night | 2 | {NIGHTS} |\n|---|---|---|---|---|")
    for step in STEPS:
        found = power(nights, step, rng)
        for name, chosen in ((f"cv <= 0.5 % ({steady.sum()})", steady), ("all", steady | True)):
            cells = " | ".join(f"{share:.3f}" for share in found[chosen].mean(axis=0))
            print(f"| {step:.0%} | {name} | {cells} |")


if __name__ == "__main__":
    main()
