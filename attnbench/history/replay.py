"""Stored nights replayed with a slow-down put in: what the gate would have said of it.

The step is put into one series at a time, from one night on; all others stay as they were stored,
so that the night's picks are decided among as many series as there were. The second look is
simulated: the night's own value and the deviations of the series' stored processes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from attnbench.history.confirm import (
    FALSE_ALARMS,
    FUTILITY_ROUNDS,
    LARGEST_P,
    ROUNDS,
    is_futile,
    second_look,
)
from attnbench.history.gate import (
    DEPTH,
    LARGEST_P_ALONE,
    LEVEL_RUNS,
    MIN_LEVEL_RUNS,
    PICKED_NOISE,
    Bools,
    Floats,
    Screen,
    pick,
    screen,
)
from attnbench.history.gate import LARGEST_P as LARGEST_P_BESIDE
from attnbench.history.panel import Panel
from attnbench.history.rule import TimerNoise, VerdictSettings

#: Slow-downs that are put in, as shares.
STEPS = (0.02, 0.03, 0.05, 0.10)

#: A step is followed for so many nights.
FOLLOWED = 3

#: At most so many series and nights get a step, drawn at random.
TRIALS = 1000

#: Processes of so many newest runs show how a series' processes differ.
_NOISE_RUNS = 20

#: With fewer deviations than this, those of runs are taken.
_MIN_DEVIATIONS = 5

Ints = NDArray[np.int64]


@dataclass(slots=True)
class StepCounts:
    """`picked`: by the first look, on the first night; `confirmed`: until the first, second ..."""

    trials: int = 0
    picked: int = 0
    confirmed: list[int] = field(default_factory=lambda: [0] * FOLLOWED)


@dataclass(frozen=True, slots=True)
class Replayed:
    """`counts`: timer -> one entry for each of `STEPS`. `nights`: on which a step began."""

    nights: int
    counts: dict[str, list[StepCounts]]


@dataclass(frozen=True, slots=True)
class _Device:
    """The series and runs of one device class; `log_s` is [num_series, num_runs] of these."""

    series: Ints
    runs: Ints
    log_s: Floats
    noises: Sequence[TimerNoise]

    @property
    def spread(self) -> Floats:
        return np.array([noise.spread for noise in self.noises])

    @property
    def floors(self) -> Floats:
        return np.array([noise.floor for noise in self.noises])


def replay(
    panel: Panel,
    settings: VerdictSettings,
    usable: Bools,
    nights: int,
    seed: int,
    trials: int = TRIALS,
    shards: Sequence[str] | None = None,
) -> Replayed:
    """Replay the newest `nights` of each device class among the runs `usable` [num_runs].

    `shards` [num_runs]: the part of the plan that a run measured, `2/4`. Each part has nights of
    its own, as it is judged; the parts of one night count as one.

    Only nights with `FOLLOWED` - 1 runs after them, and series with enough runs before for a level
    that none of these nights picks as it is: they would be seen whatever the step.
    With `settings.has_reference` the second look is of both builds in turn, else of the new one
    against the level's runs. Deterministic for a `seed`.
    """
    counts: dict[str, list[StepCounts]] = {}
    used: Counter[tuple[str, str]] = Counter()
    of_run = [
        (run.device_class, shard)
        for run, shard in zip(panel.runs, shards or [""] * panel.num_runs, strict=True)
    ]
    for device_class, shard in sorted(set(of_run)):
        is_part = np.array([one == (device_class, shard) for one in of_run], bool)
        device = _device(panel, settings, usable & is_part, device_class)
        last = len(device.runs) - FOLLOWED
        starts = range(max(MIN_LEVEL_RUNS, last + 1 - nights), last + 1)
        if len(starts):
            rng = np.random.default_rng([seed, len(counts), len(device.runs)])
            parts = device_class, shard.partition("/")[2]
            used[parts] = max(used[parts], len(starts))
            _replay_device(panel, device, starts, settings, trials, rng, counts)
    return Replayed(nights=used.total(), counts=counts)


def accepted_beside(p: Floats, rows: Ints, stepped: Floats, share: float) -> Bools:
    """`gate.accepted` of each p of `stepped`, put alone in the place of `p[rows]`: [len(rows)].

    `p` are of a night, without nan. Every candidate threshold is a p of the night or the stepped
    one itself; those below the replaced p have one more p beneath them than before.
    """
    ordered = np.sort(p)
    total = len(p)
    ranks = np.arange(1, total + 1)
    # Whether the threshold at each p passes as it is, and with one more beneath it.
    plain = ordered * total <= share * ranks
    one_more = ordered * total <= share * (ranks + 1)
    plain_after = np.append(np.cumsum(plain[::-1])[::-1], 0)
    more_before = np.concatenate(([0], np.cumsum(one_more)))
    replaced = p[rows]
    from_replaced = np.searchsorted(ordered, np.maximum(replaced, stepped), side="left")
    from_stepped = np.searchsorted(ordered, stepped, side="left")
    until = np.maximum(np.searchsorted(ordered, replaced, side="left"), from_stepped)
    beneath = np.searchsorted(ordered, stepped, side="right") + (replaced > stepped)
    own = stepped * total <= share * np.maximum(beneath, 1)
    between = more_before[until] - more_before[from_stepped] > 0
    return np.asarray(own | between | (plain_after[from_replaced] > 0))


def _device(panel: Panel, settings: VerdictSettings, usable: Bools, device_class: str) -> _Device:
    runs = np.flatnonzero(
        [
            ok and run.device_class == device_class
            for ok, run in zip(usable, panel.runs, strict=True)
        ]
    )
    chosen = panel.with_metrics(settings.metrics)
    chosen = np.array(
        [i for i in chosen.tolist() if panel.keys[i].device_class == device_class], np.int64
    )
    return _Device(
        series=chosen,
        runs=runs,
        log_s=panel.log_s[np.ix_(chosen, runs)],
        noises=[settings.noise(panel.keys[i].timer) for i in chosen.tolist()],
    )


def _replay_device(
    panel: Panel,
    device: _Device,
    starts: range,
    settings: VerdictSettings,
    trials: int,
    rng: np.random.Generator,
    counts: dict[str, list[StepCounts]],
) -> None:
    followed = range(starts.start, starts.stop + FOLLOWED - 1)
    every = np.arange(len(device.series))
    nights = {t: _look(device, every, device.log_s, t, settings) for t in followed}
    limit = LARGEST_P_BESIDE if settings.has_reference else LARGEST_P_ALONE
    picked = {
        t: pick(night, device.floors) & (np.nan_to_num(night.p, nan=1.0) <= limit)
        for t, night in nights.items()
    }
    pairs = []
    for start in starts:
        is_quiet = ~np.any([picked[start + later] for later in range(FOLLOWED)], axis=0)
        has_level = nights[start].level_runs >= MIN_LEVEL_RUNS
        pairs += [(row, start) for row in np.flatnonzero(is_quiet & has_level).tolist()]
    if not pairs:
        return
    order = rng.permutation(len(pairs))[:trials]
    chosen = np.array([pairs[i] for i in sorted(order.tolist())], np.int64)
    rows, begins = chosen[:, 0], chosen[:, 1]
    noise = _deviations(panel, device, np.unique(rows))
    for number, step in enumerate(STEPS):
        waiting = np.ones(len(rows), bool)
        for later in range(FOLLOWED):
            is_seen = np.zeros(len(rows), bool)
            for start in starts:
                mine = np.flatnonzero((begins == start) & waiting)
                t = start + later
                seen = _seen(device, rows[mine], start, t, step, nights[t], limit, settings)
                if later == 0:
                    for row in rows[mine][seen].tolist():
                        _counts_of(counts, panel, device, row)[number].picked += 1
                among = 1 + int(picked[t].sum())
                for trial in mine[seen].tolist():
                    row = int(rows[trial])
                    is_seen[trial] = _is_confirmed(
                        device, row, start, t, step, noise[row], among, settings, rng
                    )
            for row in rows[waiting & is_seen].tolist():
                confirmed = _counts_of(counts, panel, device, row)[number].confirmed
                for night in range(later, FOLLOWED):
                    confirmed[night] += 1
            waiting &= ~is_seen
        for row in rows.tolist():
            _counts_of(counts, panel, device, row)[number].trials += 1


def _counts_of(
    counts: dict[str, list[StepCounts]], panel: Panel, device: _Device, row: int
) -> list[StepCounts]:
    timer = panel.keys[int(device.series[row])].timer
    return counts.setdefault(timer, [StepCounts() for _ in STEPS])


def _look(device: _Device, rows: Ints, log_s: Floats, t: int, settings: VerdictSettings) -> Screen:
    """The first look at night `t` of `rows`, whose times are `log_s`; nan where it has no time."""
    found = screen(
        log_s[:, max(0, t + 1 - 2 * DEPTH) : t + 1], device.spread[rows], settings.confidence
    )
    is_absent = np.isnan(log_s[:, t])
    return replace(
        found,
        p=np.where(is_absent, np.nan, found.p),
        largest_change=np.where(is_absent, np.nan, found.largest_change),
        level_runs=np.where(is_absent, 0, found.level_runs),
    )


def _seen(
    device: _Device,
    rows: Ints,
    start: int,
    t: int,
    step: float,
    night: Screen,
    limit: float,
    settings: VerdictSettings,
) -> Bools:
    """Which of `rows`, one at a time, the first look picks on night `t` of a step from `start`."""
    picked = np.zeros(len(rows), bool)
    known = np.flatnonzero(~np.isnan(night.p))
    place = np.full(len(night.p), -1, np.int64)
    place[known] = np.arange(len(known))
    measured = np.flatnonzero(place[rows] >= 0)
    if not len(measured):
        return picked
    own = rows[measured]
    stepped = device.log_s[own].copy()
    stepped[:, start:] += math.log1p(step)
    found = _look(device, own, stepped, t, settings)
    is_accepted = accepted_beside(night.p[known], place[own], found.p, PICKED_NOISE)
    beyond = np.nan_to_num(found.largest_change) > np.log1p(device.floors[own]) / 2
    picked[measured] = is_accepted & (found.p <= limit) & beyond
    return picked


def _is_confirmed(
    device: _Device,
    row: int,
    start: int,
    t: int,
    step: float,
    deviations: Floats,
    among: int,
    settings: VerdictSettings,
    rng: np.random.Generator,
) -> bool:
    """A simulated second look; `among` so many picked of the night, the others harmless."""
    tonight = device.log_s[row, t]
    drawn = np.exp(tonight + rng.choice(deviations, 2 * ROUNDS))
    subject = (drawn[:ROUNDS] * (1 + step)).tolist()
    if settings.has_reference:
        reference = drawn[ROUNDS:].tolist()
    else:
        level = device.log_s[row, :t].copy()
        level[start:] += math.log1p(step)
        reference = np.exp(level[~np.isnan(level)][-LEVEL_RUNS:]).tolist()
    noise = device.noises[row]
    first = reference[:FUTILITY_ROUNDS] if settings.has_reference else reference
    if is_futile(subject[:FUTILITY_ROUNDS], first, noise):
        return False
    limit = min(LARGEST_P, FALSE_ALARMS / among)
    return second_look(subject, reference, settings.confidence).is_slower(noise, limit)


def _deviations(panel: Panel, device: _Device, rows: Ints) -> dict[int, Floats]:
    """Row -> how its processes deviate from each other within a run, in log seconds.

    Of first looks, of confirmations and of the build before beside them. Where a run has one
    process only: how neighbouring runs deviate, which is more.
    """
    found: dict[int, list[float]] = {row: [] for row in rows.tolist()}
    for column in device.runs[-_NOISE_RUNS:].tolist():
        place = np.searchsorted(device.runs, column)
        timed = rows[~np.isnan(device.log_s[rows, place])]
        for row, value in zip(
            timed.tolist(), panel.values_of_run(device.series[timed], column), strict=True
        ):
            for seconds in (value.replicates, value.confirmations, value.references):
                if len(seconds) > 1:
                    logs = np.log(seconds)
                    # The mean takes a share of the spread with it.
                    share = math.sqrt(len(logs) / (len(logs) - 1))
                    found[row] += ((logs - logs.mean()) * share).tolist()
    result = {}
    for row, values in found.items():
        if len(values) < _MIN_DEVIATIONS:
            known = device.log_s[row][~np.isnan(device.log_s[row])]
            values = (np.diff(known) / math.sqrt(2)).tolist() or [0.0]
        result[row] = np.array(values)
    return result
