"""The gate's own record, from stored runs: how often it is wrong and what it sees.

False alarms: nights on which nothing changed (*A/A*: same commit, packages, driver and container
as the run before) and what was said of them. Power: *replayed*, steps put arithmetically into
stored nights (`replay.py`), and *rehearsed*, nights measured with `--fake-slowdown`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from attnbench.history.gate import LEVEL_RUNS
from attnbench.history.night import comparable, judge_panel
from attnbench.history.panel import NOT_PLANNED, Panel
from attnbench.history.replay import STEPS, replay
from attnbench.history.rule import Reason, Verdict, VerdictSettings
from attnbench.history.runs import environment_change
from attnbench.history.series import DIRTY
from attnbench.history.series_verdict import SeriesVerdict
from attnbench.store.header import RunHeader

#: The newest so many A/A nights are judged again, and so many nights replayed; of many series
#: fewer, so that a night of each is looked at about so often in all.
NIGHTS = 30
_SERIES_NIGHTS = 20_000

_ALARMS = (Reason.CONFIRMED, Reason.SLOWER_THAN_FLOOR)
_STATUS = (Reason.STATUS_CHANGED, Reason.STATUS_UNSTABLE)

#: Run id -> backend -> what the fake timer's times were multiplied with.
Rehearsals = Mapping[str, Mapping[str, float]]


#: Run id -> the part of the plan it measured, `2/4`.
Shards = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class EqualNight:
    """An A/A night: columns of the panel."""

    before: int
    run: int


def gate_record(
    panel: Panel,
    settings: VerdictSettings | None = None,
    rehearsals: Rehearsals | None = None,
    nights: int | None = None,
    seed: int = 0,
    shards: Shards | None = None,
) -> dict[str, Any]:
    """The record as plain values, for JSON and pages. The same panel gives the same record.

    `nights`: how many of each kind are looked at; None: `NIGHTS`, of many series fewer. `shards`:
    what `shards_of` gives; the shards of one night are one night.

    Rates are `{"count", "of", "rate", "low", "high"}`, the last two the 95 % interval of Clopper
    and Pearson (1934), as if series were independent; `rate` is None where `of` is 0.

    - `false_alarms`: `nights` and of them `alarming` ones, a rate (nights, unlike series, are
      independent); `by_timer`: list of `timer` and the rates `picked`, `confirmed`, `undecided`,
      `not_confirmed_yet` of timed series-nights, and the number `standing` left out of them: an
      earlier slow-down, which the A/A twin before already had; `support`: series-nights whose
      status changed, a rate; `listed`: the runs of the A/A nights, newest first.
    - `power`: `label` ("replayed"), `nights` used, `by_timer`: list of `timer`, `step`, `trials`,
      `picked` (first night) and `confirmed`, a rate for each of the nights after the step.
    - `rehearsed`: list of `timer`, `factor`, `runs` and the rates `confirmed`, `undecided`.
    """
    settings = settings or VerdictSettings()
    rehearsals = rehearsals or {}
    if nights is None:
        nights = max(2, min(NIGHTS, _SERIES_NIGHTS // max(1, panel.num_series)))
    return {
        "false_alarms": _false_alarms(panel, settings, rehearsals, shards or {}, nights),
        "power": _power(panel, settings, rehearsals, shards or {}, nights, seed),
        "rehearsed": _rehearsed(panel, settings, rehearsals),
    }


def rehearsals_of(
    headers: Mapping[str, RunHeader], run_ids: Iterable[str]
) -> dict[str, dict[str, float]]:
    """The runs that were started with `--fake-slowdown`, from their headers."""
    found = {}
    for run_id in run_ids:
        slowed = headers[run_id].options.get("fake_slowdown") or ()
        if slowed:
            found[run_id] = {str(backend): float(factor) for backend, factor in slowed}
    return found


def shards_of(headers: Mapping[str, RunHeader], run_ids: Iterable[str]) -> dict[str, str]:
    """The runs that measured a part of their plan, and which: `2/4`. From their headers."""
    found = {run_id: str(headers[run_id].options.get("shard") or "") for run_id in run_ids}
    return {run_id: shard for run_id, shard in found.items() if shard}


def equal_nights(
    panel: Panel, rehearsals: Rehearsals | None = None, shards: Shards | None = None
) -> list[EqualNight]:
    """Own runs of the same clean commit, packages, driver and container as the run before them.

    The run before is of the same device, suites and shard. A rehearsal is on neither side.
    """
    rehearsed, parts = rehearsals or {}, shards or {}
    newest: dict[tuple[str, tuple[str, ...], str], int] = {}
    found = []
    for number, run in enumerate(panel.runs):
        if panel.is_published[number]:
            continue
        key = run.device_class, run.suites, parts.get(run.run_id, "")
        before = newest.get(key)
        newest[key] = number
        if before is None or not run.commit or run.commit.endswith(DIRTY) or not run.stack_id:
            continue
        other = panel.runs[before]
        if other.commit != run.commit or environment_change(other, run) is not None:
            continue
        if run.run_id not in rehearsed and other.run_id not in rehearsed:
            found.append(EqualNight(before, number))
    return found


def clopper_pearson(count: int, of: int, confidence: float = 0.95) -> tuple[float, float]:
    """The exact interval of a share (Clopper and Pearson, 1934); of nothing, all of [0, 1]."""
    from scipy.special import betaincinv  # 0.1 s, where scipy.stats takes 0.7

    tail = (1 - confidence) / 2
    low = float(betaincinv(count, of - count + 1, tail)) if count else 0.0
    high = float(betaincinv(count + 1, of - count, 1 - tail)) if count < of else 1.0
    return low, high


def rate(count: int, of: int) -> dict[str, Any]:
    """A share with its interval, as plain values."""
    low, high = clopper_pearson(count, of)
    return {
        "count": count,
        "of": of,
        "rate": count / of if of else None,
        "low": low,
        "high": high,
    }


def _false_alarms(
    panel: Panel,
    settings: VerdictSettings,
    rehearsals: Rehearsals,
    shards: Shards,
    nights: int,
) -> dict[str, Any]:
    every = _whole_nights(panel, equal_nights(panel, rehearsals, shards), shards)
    chosen = every[-nights:]
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    support = planned = 0
    alarming = set()
    listed = []
    for number, night in reversed([(i, part) for i, whole in enumerate(chosen) for part in whole]):
        found = _verdicts_of(panel, night.run, settings)
        alarms = 0
        for verdict in found:
            index = panel.index_of(verdict.series.key)
            if panel.status[index, night.before] == NOT_PLANNED:
                continue  # no twin: what it is held against may be of another build
            planned += 1
            if verdict.reasons[0] in _STATUS:
                support += 1
            if verdict.estimate is None:
                continue
            of_timer = counts[verdict.series.key.timer]
            picked = verdict.is_flagged or bool(verdict.subject.confirmations)
            if picked and _is_standing(panel, verdict, night):
                of_timer["standing"] += 1
                continue
            of_timer["of"] += 1
            of_timer["picked"] += picked
            of_timer["not_confirmed_yet"] += verdict.is_flagged
            is_alarm = verdict.verdict is Verdict.REGRESSION and verdict.reasons[0] in _ALARMS
            of_timer["confirmed"] += is_alarm
            of_timer["undecided"] += verdict.verdict is Verdict.UNDECIDED
            alarms += is_alarm
        alarming |= {number} if alarms else set()
        run, before = panel.runs[night.run], panel.runs[night.before]
        listed.append(
            {
                "run_id": run.run_id,
                "before": before.run_id,
                "device_class": run.device_class,
                "commit": run.commit,
                "series": len(found),
                "alarms": alarms,
            }
        )
    return {
        "nights": len(chosen),
        "left_out": len(every) - len(chosen),
        "alarming": rate(len(alarming), len(chosen)),
        "by_timer": [
            {
                "timer": timer,
                **{
                    name: rate(of_timer[name], of_timer["of"])
                    for name in ("picked", "confirmed", "undecided", "not_confirmed_yet")
                },
                "standing": of_timer["standing"],
            }
            for timer, of_timer in sorted(counts.items())
        ],
        "support": rate(support, planned),
        "listed": listed,
    }


def _whole_nights(
    panel: Panel, parts: Sequence[EqualNight], shards: Shards
) -> list[list[EqualNight]]:
    """Shards of one night together: of one commit and number of parts, none of them twice."""
    nights: list[list[EqualNight]] = []
    newest: dict[tuple[object, ...], list[EqualNight]] = {}
    for part in parts:
        run = panel.runs[part.run]
        shard = shards.get(run.run_id, "")
        count = shard.partition("/")[2]
        key = run.device_class, run.suites, run.commit, run.stack_key, count
        whole = newest.get(key)
        others = {shards.get(panel.runs[other.run].run_id, "") for other in whole or ()}
        if whole is None or shard in others:
            newest[key] = whole = []
            nights.append(whole)
        whole.append(part)
    return nights


def _is_standing(panel: Panel, verdict: SeriesVerdict, night: EqualNight) -> bool:
    """Whether the A/A twin is nearer to this run than to the level: it was slow before."""
    index = panel.index_of(verdict.series.key)
    tonight, twin = panel.log_s[index, [night.run, night.before]].tolist()
    before = comparable(panel, np.array([index]), np.array([night.run]))[0]
    before[night.before] = False
    level = panel.log_s[index, before]
    level = level[~np.isnan(level)][-LEVEL_RUNS:]
    if not len(level) or np.isnan(twin):
        return False
    return bool(abs(twin - tonight) < abs(twin - float(np.median(level))))


def _power(
    panel: Panel,
    settings: VerdictSettings,
    rehearsals: Rehearsals,
    shards: Shards,
    nights: int,
    seed: int,
) -> dict[str, Any]:
    usable = np.array(
        [
            not theirs and run.run_id not in rehearsals and not run.commit.endswith(DIRTY)
            for run, theirs in zip(panel.runs, panel.is_published, strict=True)
        ],
        bool,
    )
    parts = [shards.get(run.run_id, "") for run in panel.runs]
    found = replay(panel, settings, usable, nights, seed, shards=parts)
    return {
        "label": "replayed",
        "beside": settings.has_reference,
        "nights": found.nights,
        "by_timer": [
            {
                "timer": timer,
                "step": step,
                "trials": counts.trials,
                "picked": rate(counts.picked, counts.trials),
                "confirmed": [rate(count, counts.trials) for count in counts.confirmed],
            }
            for timer, by_step in sorted(found.counts.items())
            for step, counts in zip(STEPS, by_step, strict=True)
        ],
    }


def _rehearsed(
    panel: Panel, settings: VerdictSettings, rehearsals: Rehearsals
) -> list[dict[str, Any]]:
    counts: dict[tuple[str, float], Counter[str]] = defaultdict(Counter)
    runs: dict[tuple[str, float], set[str]] = defaultdict(set)
    for number, run in enumerate(panel.runs):
        slowed = rehearsals.get(run.run_id)
        if not slowed:
            continue
        for verdict in _verdicts_of(panel, number, settings):
            factor = slowed.get(str(verdict.series.identity["backend"]), 1.0)
            if factor <= 1 or verdict.estimate is None:
                continue
            cell = verdict.series.key.timer, factor
            runs[cell].add(run.run_id)
            counts[cell]["of"] += 1
            counts[cell]["confirmed"] += verdict.verdict is Verdict.REGRESSION
            counts[cell]["undecided"] += verdict.verdict is Verdict.UNDECIDED
    return [
        {
            "timer": timer,
            "factor": factor,
            "runs": len(runs[timer, factor]),
            **{name: rate(counted[name], counted["of"]) for name in ("confirmed", "undecided")},
        }
        for (timer, factor), counted in sorted(counts.items())
    ]


def _verdicts_of(panel: Panel, number: int, settings: VerdictSettings) -> Sequence[SeriesVerdict]:
    judged = panel.with_metrics(settings.metrics)
    judged = judged[panel.status[judged, number] != NOT_PLANNED]
    return judge_panel(panel, judged, np.full(len(judged), number), settings)
