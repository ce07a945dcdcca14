"""The gate's own record against slow oracles: judged tables, brute force, scipy's interval."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnbench.history.gate import accepted
from attnbench.history.panel import Panel
from attnbench.history.replay import STEPS, accepted_beside, replay
from attnbench.history.rule import VerdictSettings
from attnbench.history.self_record import (
    clopper_pearson,
    equal_nights,
    gate_record,
    rehearsals_of,
    shards_of,
)
from attnbench.history.verdict import judge
from attnbench.store import ResultsFolder, RunHeader
from attnbench.store.record import Measurement
from tests.history.fake import row, table_of, timed

TEXTS = [f"{n}q1s512 dtype=fp32" for n in range(2, 8)]
TEXT_NUMBER = {row(0, workload=text).workload: number for number, text in enumerate(TEXTS)}


def panel_of(rows: list[Measurement]) -> Panel:
    return Panel.of_table(table_of(rows))


@pytest.mark.parametrize(("count", "of"), [(0, 1), (1, 1), (0, 203), (3, 40), (40, 40), (7, 9)])
def test_the_interval_is_scipys(count: int, of: int) -> None:
    from scipy.stats import binomtest

    expected = binomtest(count, of).proportion_ci(0.95, method="exact")
    assert clopper_pearson(count, of) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_of_nothing_nothing_is_known() -> None:
    assert clopper_pearson(0, 0) == (0.0, 1.0)
    record = gate_record(panel_of(timed([1e-3] * 2, workload=TEXTS[0])))
    assert record["false_alarms"]["nights"] == 0
    assert record["false_alarms"]["alarming"]["rate"] is None
    assert record["power"]["by_timer"] == []
    json.dumps(record, allow_nan=False)


P = st.floats(0, 1).map(lambda p: round(p, 2)) | st.floats(0, 1)


@settings(deadline=None, max_examples=400)
@given(st.lists(P, min_size=1, max_size=12), st.data(), st.sampled_from([0.05, 0.5]))
def test_one_p_in_the_place_of_another_as_by_the_whole_procedure(
    p: list[float], data: st.DataObject, share: float
) -> None:
    night = np.array(p)
    rows = np.arange(len(p))
    stepped = np.array(data.draw(st.lists(P, min_size=len(p), max_size=len(p))))
    expected = []
    for i in rows:
        changed = night.copy()
        changed[i] = stepped[i]
        expected.append(bool(accepted(changed, share)[i]))
    assert accepted_beside(night, rows, stepped, share).tolist() == expected


def noisy(runs: int, seed: int, spread: float = 0.004, **more: Any) -> list[Measurement]:
    """Six series, two processes a run."""
    rng = random.Random(seed)
    return [
        row(
            run,
            process,
            workload=text,
            seconds=1e-3 * math.exp(level + rng.gauss(0, spread / 2)),
            timer="event",
            **more,
        )
        for run in range(runs)
        for text in TEXTS
        for level in [rng.gauss(0, spread)]
        for process in range(2)
    ]


def stepped(rows: list[Measurement], text: str, run_ids: set[str], step: float) -> Panel:
    return panel_of(
        [
            replace(one, samples=tuple(s * (1 + step) for s in one.samples))
            if one.workload == text and one.run_id in run_ids
            else one
            for one in rows
        ]
    )


@pytest.mark.parametrize("has_reference", [True, False])
def test_a_replayed_pick_is_that_of_a_judged_night(has_reference: bool) -> None:
    rows = noisy(14, 3)
    panel = panel_of(rows)
    ids = [run.run_id for run in panel.runs]
    rule = VerdictSettings(has_reference=has_reference)
    found = replay(panel, rule, np.ones(14, bool), nights=1, seed=0)
    assert found.nights == 1
    (by_step,) = found.counts.values()
    expected = 0
    for text in TEXTS:
        workload = row(0, workload=text).workload
        judged = judge(stepped(rows, workload, set(ids[11:]), STEPS[1]), ids[11], rule)
        (own,) = [v for v in judged.verdicts if v.series.identity["workload"] == workload]
        expected += own.is_flagged and "slower_than_floor" in own.reasons
    assert (by_step[1].trials, by_step[1].picked) == (6, expected)
    assert expected > 0


def test_power_grows_with_the_step_and_the_nights_and_is_repeatable() -> None:
    panel = panel_of(noisy(16, 5))
    first = replay(panel, VerdictSettings(has_reference=True), np.ones(16, bool), 6, seed=1)
    again = replay(panel, VerdictSettings(has_reference=True), np.ones(16, bool), 6, seed=1)
    (counts,) = first.counts.values()
    (same,) = again.counts.values()
    assert counts == same
    assert [c.trials for c in counts] == [36] * 4
    shares = [c.confirmed for c in counts]
    assert all(nights == sorted(nights) for nights in shares)
    assert shares[0][0] < shares[2][0] <= shares[3][0]
    assert shares[3][2] == 36
    few = replay(panel, VerdictSettings(), np.ones(16, bool), 6, seed=1, trials=5)
    assert [c.trials for c in few.counts["event"]] == [5] * 4


def test_a_step_within_the_noise_is_not_confirmed() -> None:
    panel = panel_of(noisy(12, 7, spread=0.1))
    (counts,) = replay(panel, VerdictSettings(), np.ones(12, bool), 4, seed=1).counts.values()
    assert counts[0].trials > 12
    assert counts[0].confirmed[2] <= counts[0].trials / 5


def test_what_was_picked_as_it_was_gets_no_step() -> None:
    """It would be counted as seen, whatever the step."""
    rows = noisy(12, 9)
    slow = stepped(rows, row(0, workload=TEXTS[0]).workload, {row(9).run_id}, 0.2)
    both = [
        replay(panel, VerdictSettings(), np.ones(12, bool), 1, seed=1).counts["event"][0].trials
        for panel in (panel_of(rows), slow)
    ]
    assert both == [6, 5]


SAME: dict[str, Any] = {"commit": "a" * 40}


def equal_pair() -> list[Measurement]:
    """Ten runs, then two of one commit. One series is slow in the last only, one in both."""
    rows = timed([1e-3] * 10, workload=TEXTS[0]) + timed(
        [1e-3, 1.5e-3], 10, workload=TEXTS[0], **SAME
    )
    rows += timed([1e-3] * 10, workload=TEXTS[1]) + timed(
        [1.5e-3] * 2, 10, workload=TEXTS[1], **SAME
    )
    rows += timed([1e-3] * 10, workload=TEXTS[2]) + timed([1e-3] * 2, 10, workload=TEXTS[2], **SAME)
    for text in TEXTS[:2]:
        rows += [row(11, 100 + r, workload=text, seconds=1.5e-3, **SAME) for r in range(10)]
    return rows


def test_an_alarm_of_an_equal_night_is_false_unless_it_stood_before() -> None:
    panel = panel_of(equal_pair())
    assert [(n.before, n.run) for n in equal_nights(panel)] == [(10, 11)]
    found = gate_record(panel)["false_alarms"]
    assert (found["nights"], found["alarming"]["count"]) == (1, 1)
    (wall,) = found["by_timer"]
    assert wall["timer"] == "wall"
    assert wall["standing"] == 1
    assert (wall["picked"]["count"], wall["confirmed"]["count"]) == (1, 1)
    assert wall["confirmed"]["of"] == 2
    assert wall["undecided"]["count"] == 0
    (listed,) = found["listed"]
    assert (listed["run_id"], listed["before"]) == (row(11).run_id, row(10).run_id)
    json.dumps(gate_record(panel), allow_nan=False)


@pytest.mark.parametrize(
    "changes",
    [
        {"commit": "b" * 40},
        {"commit": ""},
        {"commit": "a" * 40 + "+dirty"},
        {"stack": ("torch==9",), "stack_id": "other"},
        {"driver_version": "999"},
        {"device_class": "h200"},
        {"suite": "prefill"},
    ],
)
def test_what_is_no_equal_night(changes: dict[str, Any]) -> None:
    first = timed([1e-3], 10, workload=TEXTS[0], **SAME)
    assert len(equal_nights(panel_of(first + timed([1e-3], 11, workload=TEXTS[0], **SAME)))) == 1
    second = timed([1e-3], 11, workload=TEXTS[0], **{**SAME, **changes})
    assert equal_nights(panel_of(first + second)) == []


def test_a_rehearsal_is_a_record_of_its_own() -> None:
    panel = panel_of(equal_pair())
    rehearsals = {row(11).run_id: {"CPU_ATTN": 1.5}}
    assert equal_nights(panel, rehearsals) == []
    record = gate_record(panel, rehearsals=rehearsals)
    (rehearsed,) = record["rehearsed"]
    assert (rehearsed["timer"], rehearsed["factor"], rehearsed["runs"]) == ("wall", 1.5, 1)
    assert (rehearsed["confirmed"]["count"], rehearsed["confirmed"]["of"]) == (2, 3)
    assert record["false_alarms"]["nights"] == 0


def test_a_lost_support_of_an_equal_night_is_counted() -> None:
    rows = timed([1e-3] * 10, workload=TEXTS[0]) + timed([1e-3], 10, workload=TEXTS[0], **SAME)
    rows += [row(11, r, workload=TEXTS[0], status="CRASH", **SAME) for r in range(3)]
    found = gate_record(panel_of(rows))["false_alarms"]
    assert (found["support"]["count"], found["support"]["of"]) == (1, 1)


def test_rehearsals_are_read_from_headers(tmp_path: Path) -> None:
    folder = ResultsFolder(tmp_path)
    ids = []
    slowed = {"fake_slowdown": [["CPU_ATTN", 1.3]]}
    every: list[dict[str, Any]] = [{}, slowed, {"fake_slowdown": []}]
    for options in every:
        header = RunHeader.new(options=options)
        with folder.open_run(header) as run:
            run.append(replace(row(0), run_id=header.run_id))
        ids.append(header.run_id)
    assert rehearsals_of(folder.headers(), ids) == {ids[1]: {"CPU_ATTN": 1.3}}


def test_shards_are_read_from_headers(tmp_path: Path) -> None:
    folder = ResultsFolder(tmp_path)
    ids = []
    for options in ({}, {"shard": "2/3"}, {"shard": ""}):
        header = RunHeader.new(options=options)
        with folder.open_run(header) as run:
            run.append(replace(row(0), run_id=header.run_id))
        ids.append(header.run_id)
    assert shards_of(folder.headers(), ids) == {ids[1]: "2/3"}


def sharded(levels: dict[int, tuple[float, float]], **of: str) -> list[Measurement]:
    """Nights of two parts, a series each: run 2 n is the first part of night n."""
    return [
        one
        for night, seconds in levels.items()
        for part in (0, 1)
        for one in timed(
            [seconds[part]],
            2 * night + part,
            workload=TEXTS[part],
            commit=of.get(f"night{night}", f"{night:040x}"),
        )
    ]


def test_the_parts_of_a_night_are_one_night_and_no_twins_of_each_other() -> None:
    same = {"night5": "a" * 40, "night6": "a" * 40}
    rows = sharded(dict.fromkeys(range(7), (0.001, 0.001)), **same)
    panel = panel_of(rows)
    shards = {run.run_id: f"{i % 2 + 1}/2" for i, run in enumerate(panel.runs)}
    assert [(n.before, n.run) for n in equal_nights(panel, None, shards)] == [(10, 12), (11, 13)]
    found = gate_record(panel, shards=shards)["false_alarms"]
    assert (found["nights"], found["alarming"]["of"]) == (1, 1)
    assert [night["series"] for night in found["listed"]] == [1, 1]
    assert found["by_timer"][0]["picked"]["of"] == 2


def test_a_slow_down_of_a_new_commit_is_no_false_alarm_of_its_second_part() -> None:
    rows = sharded({n: (1e-3, 1e-3 if n < 5 else 1.5e-3) for n in range(6)})
    rows += [
        row(11, 100 + r, workload=TEXTS[1], seconds=1.5e-3, commit=f"{5:040x}") for r in range(10)
    ]
    panel = panel_of(rows)
    shards = {run.run_id: f"{i % 2 + 1}/2" for i, run in enumerate(panel.runs)}
    assert gate_record(panel, shards=shards)["false_alarms"]["nights"] == 0
    # Nor where nobody says that they are parts: a series without a twin is not counted.
    found = gate_record(panel)["false_alarms"]
    assert found["alarming"]["count"] == 0
    assert found["by_timer"] == []


def test_a_step_is_followed_for_three_nights_of_its_part() -> None:
    whole = panel_of(noisy(16, 5))
    parted = panel_of(
        [
            replace(one, run_id=row(2 * night + part).run_id, started_at=start)
            for one in noisy(16, 5)
            for night in [int(one.run_id[-6:], 16)]
            for part in [TEXT_NUMBER[one.workload] % 2]
            for start in [row(2 * night + part).started_at]
        ]
    )
    shards = [f"{i % 2 + 1}/2" for i in range(32)]
    rule = VerdictSettings(has_reference=True)
    one = replay(whole, rule, np.ones(16, bool), 6, seed=1)
    two = replay(parted, rule, np.ones(32, bool), 6, seed=1, shards=shards)
    assert (two.nights, one.nights) == (6, 6)
    assert [c.trials for c in two.counts["event"]] == [c.trials for c in one.counts["event"]]
    assert two.counts["event"][3].confirmed[2] == 36
