"""How often the verdict rule is wrong: the table of docs/verdict.md, as Markdown.

    python benchmarks/verdict_rates.py [--trials N] [--seed N]

Draws made-up histories from a normal distribution and judges the last run of each by the rule as
it is (`attnbench.history.rule`). The same seed prints the same table.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from attnbench.history.rule import (
    TIMER_NOISE,
    Estimate,
    Reason,
    TimerNoise,
    Verdict,
    decide,
    estimate,
)

REPLICATES = 3

#: (timer, standard deviation between runs), both blocks with their steps.
WALL_LINES = (("wall", 0.03), ("wall", 0.08))
EVENT_LINES = (("event", 0.003), ("event", 0.01), ("event", 0.02))
BLOCKS = ((WALL_LINES, (0.1, 0.3, 0.5)), (EVENT_LINES, (0.03, 0.05, 0.1)))
BASELINE_RUNS = (1, 2, 3, 10)

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
    """Judge `trials` series whose last run is slower by `step`. The second look is of that run."""
    noise = TIMER_NOISE[timer]
    shape = (trials, baseline_runs + 2, REPLICATES)
    levels = rng.normal(0, run_spread, shape[:2])
    levels[:, -2] += math.log1p(step)
    levels[:, -1] = levels[:, -2]
    odd = rng.random(shape) < odd_share
    logs = levels[:, :, None] + rng.normal(0, REPLICATE_SPREAD[timer], shape)
    found = Rates()
    for times in np.exp(logs + odd * rng.exponential(ODD_SIZE, shape)):
        *baseline, first, second = times.tolist()
        _judge(estimate(baseline, first, noise), estimate(baseline, second, noise), noise, found)
    found.flagged /= trials
    found.confirmed /= trials
    found.undecided /= trials
    return found


def _judge(first: Estimate, second: Estimate, noise: TimerNoise, found: Rates) -> None:
    """Count one series as `attnbench.history.verdict` ends it."""
    verdict, reason = decide(first, noise)
    if verdict is Verdict.REGRESSION:
        found.flagged += 1
        if decide(second, noise)[0] is Verdict.REGRESSION:
            found.confirmed += 1
        else:
            found.undecided += 1
    elif reason is Reason.INTERVAL_TOO_WIDE:
        suspicious = first.ratio > noise.limit
        found.undecided += not suspicious or second.ratio > noise.limit


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
    parser.add_argument("--trials", type=int, default=1000, help="series a step; six times for A/A")
    parser.add_argument("--seed", type=int, default=20261121)
    options = parser.parse_args()
    print("\n".join(lines(options.trials, options.seed)))


if __name__ == "__main__":
    main()
