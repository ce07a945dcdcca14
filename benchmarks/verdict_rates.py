"""How often the verdict rule is wrong: the table of docs/verdict.md, as Markdown.

    python benchmarks/verdict_rates.py [--trials N] [--seed N]

Draws made-up histories from a normal distribution and judges the last run of each, alone, by the
rules as they are in `attnbench.history`. The same seed prints the same table.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attnbench.history.confirm import ROUNDS, second_look
from attnbench.history.gate import MIN_LEVEL_RUNS, Screen, screen
from attnbench.history.looks import looks_of
from attnbench.history.rule import (
    TIMER_NOISE,
    Estimate,
    Reason,
    TimerNoise,
    Verdict,
    decide,
    estimate,
    estimate_again,
)
from attnbench.history.series_verdict import first_verdict

REPLICATES = 3

#: (timer, standard deviation between runs), both blocks with their steps.
WALL_LINES = (("wall", 0.03), ("wall", 0.08))
EVENT_LINES = (("event", 0.003), ("event", 0.01), ("event", 0.02))
BLOCKS = ((WALL_LINES, (0.1, 0.3, 0.5)), (EVENT_LINES, (0.03, 0.05, 0.1)))
BASELINE_RUNS = (1, 2, 3, 10, 40)

#: How far the replicates of one run spread.
REPLICATE_SPREAD = {"wall": 0.05, "event": 0.005}

#: One process in so many is slower by an exponential of this mean (log): a busy moment.
ODD_SHARE, ODD_SIZE = 0.2, 0.5


@dataclass(slots=True)
class Rates:
    """Shares of the trials."""

    flagged: float = 0.0  # the first look calls it slower
    confirmed: float = 0.0  # the second look as well
    undecided: float = 0.0  # what is left after both


def rates(
    timer: str,
    baseline_runs: int,
    run_spread: float,
    step: float,
    trials: int,
    rng: np.random.Generator,
    odd_share: float = 0.0,
) -> Rates:
    """Judge `trials` series, each alone, whose last run is slower by `step`.

    The second look is of that run: it has the run's own deviation, as it has where the build
    before cannot be measured beside it.
    """
    noise = TIMER_NOISE[timer]
    shape = (trials, baseline_runs + 1, REPLICATES)
    levels = rng.normal(0, run_spread, shape[:2])
    levels[:, -1] += math.log1p(step)

    def times(level: NDArray[np.float64], spread: float) -> NDArray[np.float64]:
        odd = rng.random(level.shape) < odd_share
        noisy = level + rng.normal(0, spread, level.shape)
        return np.exp(noisy + odd * rng.exponential(ODD_SIZE, level.shape))

    spread = REPLICATE_SPREAD[timer]
    runs = times(np.repeat(levels[:, :, None], REPLICATES, axis=2), spread)
    again = times(np.repeat(levels[:, -1:], ROUNDS, axis=1), spread)
    judged = _judge_alone(runs, noise)
    found = Rates()
    for (first, verdict, reason), values, second in zip(judged, runs, again, strict=True):
        _count(first, verdict, reason, values, second, noise, found)
    found.flagged /= trials
    found.confirmed /= trials
    found.undecided /= trials
    return found


def _judge_alone(
    runs: NDArray[np.float64], noise: TimerNoise
) -> list[tuple[Estimate, Verdict, Reason]]:
    """The first look at [trials, runs, replicates], as `history.series_verdict` has it."""
    few = [estimate(list(values[:-1]), list(values[-1]), noise) for values in runs]
    if runs.shape[1] - 1 < MIN_LEVEL_RUNS:
        return [(found, *decide(found, noise)) for found in few]
    floor = np.array([noise.floor])
    result = []
    whole = screen(np.log(np.median(runs, axis=2)), np.full(len(runs), noise.spread))
    for row in range(len(runs)):
        (look,) = looks_of(
            Screen(*(getattr(whole, name)[row : row + 1] for name in Screen.__dataclass_fields__)),
            floor,
        )
        assert look is not None
        result.append((look.estimate, *first_verdict(look, noise, beside=False)))
    return result


def _count(
    first: Estimate,
    verdict: Verdict,
    reason: Reason,
    runs: NDArray[np.float64],
    again: NDArray[np.float64],
    noise: TimerNoise,
    found: Rates,
) -> None:
    """Count one series as `attnbench.history.series_verdict` ends it."""
    suspicious = reason is Reason.INTERVAL_TOO_WIDE and first.ratio > noise.limit
    if verdict is not Verdict.REGRESSION and not suspicious:
        found.undecided += reason is Reason.INTERVAL_TOO_WIDE
        return
    found.flagged += verdict is Verdict.REGRESSION
    if len(runs) - 1 < MIN_LEVEL_RUNS:
        second = estimate_again(list(runs[:-1]), list(again), noise)
        is_slower = decide(second, noise)[0] is Verdict.REGRESSION
        is_open = decide(second, noise)[0] is Verdict.UNDECIDED and second.ratio > noise.limit
    else:
        look = second_look(list(again), list(np.median(runs[:-1], axis=1)))
        is_slower, is_open = look.is_slower(noise), look.is_open(noise)
    if is_slower and verdict is Verdict.REGRESSION:
        found.confirmed += 1
    else:
        found.undecided += is_slower or is_open


def lines(trials: int, seed: int) -> list[str]:
    """The table; A/A takes six times as many trials as a step."""
    rng = np.random.default_rng(seed)
    head = "timer, spread between runs | baseline runs | A/A first look | A/A confirmed"
    table = [f"| {head} | A/A undecided | step | step | step |", "|---" * 8 + "|"]
    for block, steps in BLOCKS:
        table.append("| | | | | | " + " | ".join(f"**{step:.0%}**" for step in steps) + " |")
        for timer, spread in block:
            label = f"{timer}, {spread * 100:g} %"
            for runs in BASELINE_RUNS:
                table.append(_line(label, timer, runs, spread, steps, trials, rng))
                label = ""
    table.append("| | | | | | " + " | ".join(f"**{step:.0%}**" for step in BLOCKS[0][1]) + " |")
    label = f"wall, 8 %, {ODD_SHARE:.0%} odd processes"
    for runs in BASELINE_RUNS:
        table.append(_line(label, "wall", runs, 0.08, BLOCKS[0][1], trials, rng, ODD_SHARE))
        label = ""
    return [line.replace("%**", " %**").replace("20%", "20 %") for line in table]


def _line(
    label: str,
    timer: str,
    runs: int,
    spread: float,
    steps: Sequence[float],
    trials: int,
    rng: np.random.Generator,
    odd_share: float = 0.0,
) -> str:
    same = rates(timer, runs, spread, 0.0, 6 * trials, rng, odd_share)
    cells = [f"{share * 100:.2f} %" for share in (same.flagged, same.confirmed, same.undecided)]
    for step in steps:
        found = rates(timer, runs, spread, step, trials, rng, odd_share)
        cells.append(f"{found.confirmed * 100:.0f} %")
    return " | ".join((f"| {label}" if label else "|", str(runs), *cells)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=300, help="series a step; six times for A/A")
    parser.add_argument("--seed", type=int, default=20261121)
    options = parser.parse_args()
    print("\n".join(lines(options.trials, options.seed)))


if __name__ == "__main__":
    main()
