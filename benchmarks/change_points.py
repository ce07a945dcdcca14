"""Change points beside their peers on the noise of real benchmarks: the table of the docs.

    python benchmarks/change_points.py [--history FILE] [--series N] [--seed N]

Noise: the residuals of real series (FILE: Parquet with columns series, commit_time_ms, seconds),
a running median of 21 taken away, in windows of 200 nights. Where FILE is absent it says so and
makes noise up. One step is put into each window at a random night; another run has none. The same
seed prints the same table, times excepted.

    asv           asv.step_detect.detect_steps, as asv publish calls it
    e-divisive    Matteson and James (2014), 199 permutations of a fixed seed, p <= 0.01
    pelt          the optimum PELT finds (squared error, 3 log n), by dynamic programming; its
                  noise from differences, or with "ar" also from their autocorrelation
    attnbench     attnbench.history.change_points
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from real_noise import STEADY_CV, STEPS, residuals, robust_cv

from attnbench.history.change_points import change_points_of_panel

Array = NDArray[np.float64]
Detector = Callable[[Array], list[list[int]]]

NIGHTS = 200
DELAYS = (3, 5, 10, 20)
#: A change point so near to the step found it.
TOLERANCE = 5
_LOWER = np.tri(NIGHTS)


def made_up(num_series: int, rng: np.random.Generator) -> list[Array]:
    """Noise with what real series have: spreads of 0.1 to 5 %, autocorrelation, odd nights."""
    found = []
    for _ in range(num_series):
        spread, rho = np.exp(rng.normal(np.log(0.007), 0.9)), rng.uniform(0, 0.8)
        y = rng.standard_t(4, size=NIGHTS + 50) * spread * np.sqrt(1 - rho**2)
        for t in range(1, len(y)):
            y[t] += rho * y[t - 1]
        y[rng.random(len(y)) < 0.01] += 0.3
        found.append(y)
    return found


def windows(series: Sequence[Array], rng: np.random.Generator) -> Array:
    """One window of `NIGHTS` of each series that is long enough."""
    chosen = []
    for y in series:
        if len(y) >= NIGHTS:
            start = int(rng.integers(0, len(y) - NIGHTS + 1))
            chosen.append(y[start : start + NIGHTS])
    return np.array(chosen)


def attnbench(block: Array) -> list[list[int]]:
    return [[c.index for c in found] for found in change_points_of_panel(block)]


def asv(block: Array) -> list[list[int]]:
    from asv.step_detect import detect_steps

    # As seconds: its noise floor is relative to the values.
    return [[step[0] for step in detect_steps(np.exp(y).tolist())[1:]] for y in block]


def pelt(block: Array, aware: bool = False) -> list[list[int]]:
    rows, size = block.shape
    one = 1.4826 * np.median(np.abs(np.diff(block, axis=1)), axis=1)
    two = 1.4826 * np.median(np.abs(block[:, 2:] - block[:, :-2]), axis=1)
    rho = np.clip((two / np.maximum(one, 1e-9)) ** 2 - 1, 0, 0.9) * aware
    sigma = np.maximum(one / np.sqrt(2 * (1 - rho)), 0.0005)
    price = 3 * np.log(size) * (1 + rho) / (1 - rho)
    total = np.pad(np.cumsum(block, 1), ((0, 0), (1, 0)))
    square = np.pad(np.cumsum(block**2, 1), ((0, 0), (1, 0)))
    best = np.zeros((rows, size + 1))
    best[:, 0] = -price
    last = np.zeros((rows, size + 1), dtype=np.int64)
    for t in range(1, size + 1):
        sums = total[:, t, None] - total[:, :t]
        cost = (square[:, t, None] - square[:, :t] - sums**2 / (t - np.arange(t))) / sigma[
            :, None
        ] ** 2
        cost += best[:, :t] + price[:, None]
        last[:, t] = cost.argmin(axis=1)
        best[:, t] = cost.min(axis=1)
    found = []
    for row in last:
        changes, t = [], size
        while row[t] > 0:
            t = int(row[t])
            changes.append(t)
        found.append(changes[::-1])
    return found


def e_divisive(block: Array, level: float = 0.01, permutations: int = 199) -> list[list[int]]:
    found = []
    for y in block:
        rng = np.random.default_rng(0)
        distance = np.abs(y[:, None] - y[None, :])
        changes, open_parts = [], [(0, len(y))]
        while open_parts:
            start, end = open_parts.pop()
            part = distance[start:end, start:end]
            statistic, place = _energy(part)
            if place == 0:
                continue
            beaten, allowed = 0, int(level * (permutations + 1)) - 1
            for _ in range(permutations):
                order = rng.permutation(end - start)
                beaten += _energy(part[np.ix_(order, order)])[0] >= statistic
                if beaten > allowed:
                    break
            else:
                changes.append(start + place)
                open_parts += [(start, start + place), (start + place, end)]
        found.append(sorted(changes))
    return found


def _energy(distance: Array, shortest: int = 5) -> tuple[float, int]:
    """The largest two-sample energy statistic over all places, and the place (0: too short)."""
    size = len(distance)
    k = np.arange(shortest, size - shortest + 1)
    if not len(k):
        return -1.0, 0
    joint = distance.sum(axis=1).cumsum()
    within_old = 2 * np.einsum("ij,ij->i", distance, _LOWER[:size, :size]).cumsum()[k - 1]
    m = size - k
    between = joint[k - 1] - within_old
    within_new = joint[-1] - 2 * joint[k - 1] + within_old
    q = 2 * between / (k * m) - within_old / (k * (k - 1)) - within_new / (m * (m - 1))
    q *= k * m / size
    return float(q.max()), int(k[q.argmax()])


def line(name: str, detect: Detector, block: Array, seed: int) -> str:
    """A row of the table."""
    rng = np.random.default_rng(seed)
    quiet = np.array([robust_cv(y) <= STEADY_CV for y in block])
    places = rng.integers(30, NIGHTS - 30, size=len(block))
    start = time.perf_counter()
    null = detect(block)
    ms = (time.perf_counter() - start) / len(block) * 1e3
    cells = [f"{sum(map(len, null)) / block.size * 1000:.2f}"]
    for step in STEPS:
        stepped = block + np.log1p(step) * (np.arange(NIGHTS) >= places[:, None])
        found = detect(stepped)
        nearest = np.array(
            [
                min((abs(c - p) for c in f), default=NIGHTS)
                for f, p in zip(found, places, strict=True)
            ]
        )
        hit = nearest <= TOLERANCE
        precision = hit.sum() / max(sum(map(len, found)), 1)
        cells.append(
            f"{precision:.2f} / {hit.mean():.2f} ({hit[quiet].mean():.2f}) / "
            f"{nearest[hit].mean() if hit.any() else np.nan:.1f}"
        )
    seen = []
    begin = NIGHTS - 50
    for nights in DELAYS:
        cut = block[:, : begin + nights].copy()
        cut[:, begin:] += np.log1p(0.03)
        hit = np.array([any(abs(c - begin) <= TOLERANCE for c in f) for f in detect(cut)])
        seen.append(f"{hit.mean():.2f} ({hit[quiet].mean():.2f})")
    return f"| {name} | " + " | ".join([*cells, *seen, f"{ms:.1f}"]) + " |"


def coverage(block: Array, seed: int) -> str:
    """How often the range of a change point of ours holds the true night."""
    rng = np.random.default_rng(seed)
    places = rng.integers(30, NIGHTS - 30, size=len(block))
    parts = []
    for step in STEPS:
        stepped = block + np.log1p(step) * (np.arange(NIGHTS) >= places[:, None])
        inside, widths = [], []
        for found, place in zip(change_points_of_panel(stepped), places, strict=True):
            near = [c for c in found if abs(c.index - place) <= TOLERANCE]
            if near:
                one = min(near, key=lambda c: abs(c.index - place))
                inside.append(one.low < place <= one.high)
                widths.append(one.high - one.low)
        parts.append(f"{step:.0%}: {np.mean(inside):.1%} (median width {np.median(widths):.0f})")
    return "range holds the true night: " + ", ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--history", type=Path, default=Path("../shared/history"))
    parser.add_argument("--series", type=int, default=0, help="only so many; 0: all")
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    files = (
        sorted(options.history.glob("*.parquet"))
        if options.history.is_dir()
        else [options.history]
        if options.history.is_file()
        else []
    )
    if files:
        series = [y for path in files for y in residuals(path)]
    else:
        print(f"{options.history} is absent: made-up noise instead", file=sys.stderr)
        series = made_up(options.series or 200, rng)
    block = windows(series, rng)
    if options.series:
        block = block[np.linspace(0, len(block) - 1, min(options.series, len(block))).astype(int)]
    print(f"{len(block)} series x {NIGHTS} nights, seed {options.seed}\n")
    head = [f"{s:.0%}: precision / recall (quiet) / nights off" for s in STEPS]
    head = ["method", "false per 1,000", *head, *(f"3 % seen after {n}" for n in DELAYS)]
    print("| " + " | ".join([*head, "ms a series"]) + " |")
    print("|" + "---|" * (len(head) + 1))
    methods: list[tuple[str, Detector]] = [
        ("attnbench", attnbench),
        ("asv", asv),
        ("pelt", pelt),
        ("pelt, ar", lambda y: pelt(y, aware=True)),
        ("e-divisive", e_divisive),
    ]
    for name, detect in methods:
        print(line(name, detect, block, options.seed), flush=True)
    print("\n" + coverage(block, options.seed))


if __name__ == "__main__":
    main()
