"""A slow-down that no night's gate saw is on the overview once its level shows, and only then."""

from __future__ import annotations

import random
import re
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from attnbench.dashboard import render
from attnbench.dashboard.late_levels import late_section
from attnbench.dashboard.level_changes import level_changes
from attnbench.dashboard.watch import Watch
from attnbench.history.acknowledge import Acknowledgement, AlarmKind
from attnbench.history.night import judge_newest
from attnbench.history.panel import Panel
from attnbench.history.rule import VerdictSettings
from attnbench.history.verdict import judge
from attnbench.store.record import Measurement
from tests.history.fake import HOSTILE, row, table_of

NIGHTS, STEP_AT = 40, 30
SETTINGS = VerdictSettings()


def nights(size: float, at: int = STEP_AT, count: int = NIGHTS, **more: Any) -> list[Measurement]:
    """One series, slower by `size` from night `at` on; runs differ by 0.4 %."""
    rng = random.Random(5)
    levels = [1e-3 * (1 + size * (n >= at)) * (1 + rng.gauss(0, 0.004)) for n in range(count)]
    facts: dict[str, Any] = {"timer": "graph", "commit_subject": HOSTILE, **more}
    return [row(n, seconds=level, **facts) for n, level in enumerate(levels)]


def found_in(
    rows: list[Measurement],
    folder: Path,
    told: tuple[str, ...] = (),
    accepted: tuple[Acknowledgement, ...] = (),
) -> dict[str, Any]:
    panel = Panel.of_table(table_of(rows))
    verdicts = judge_newest(panel, range(panel.num_series), SETTINGS)
    by_id = {verdict.series.id: verdict for verdict in verdicts}
    changes = level_changes(panel, folder)
    return late_section(panel, by_id, changes, SETTINGS, Watch(accepted=accepted), told)


def percent_of(entry: dict[str, Any]) -> float:
    return float(entry["change"].removesuffix(" % level"))


def again(run: int, rounds: int) -> list[Measurement]:
    return [row(run, 100 + r, seconds=1.04e-3, timer="graph") for r in range(rounds)]


def test_a_slower_level_is_told_with_its_range_and_how_to_prove_it(tmp_path: Path) -> None:
    rows = nights(0.04)
    found = found_in(rows, tmp_path)
    assert found["total"] == 1
    (entry,) = found["entries"]
    assert entry["point"].startswith("CPU_ATTN decode 4q1s4k")
    assert percent_of(entry) == pytest.approx(4, abs=0.3)
    # Noise is a tenth of the step: the night is known.
    assert entry["since"] == row(STEP_AT).commit[:7]
    commits = f"--commits {row(STEP_AT - 1).commit}..{row(STEP_AT).commit}"
    assert entry["bisect"].endswith(commits)


@pytest.mark.parametrize(
    ("rows", "total"),
    [
        (nights(0.015), 0),  # within the timer's floor
        (nights(-0.05), 0),
        (nights(0.04, count=52), 0),  # 22 nights ago
        (nights(0.04, count=48), 1),
    ],
)
def test_only_what_is_new_and_clear(rows: list[Measurement], total: int, tmp_path: Path) -> None:
    found = found_in(rows, tmp_path)
    assert (found["total"], len(found["entries"])) == (total, total)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (again(33, 10), "last measured again on 2026-12-12"),
        (again(33, 10) + again(35, 10), "last measured again on 2026-12-14"),
        (again(33, 4), "not measured again since"),  # given up
        (again(25, 10), "not measured again since"),  # before the change
    ],
)
def test_what_was_told_and_not_mended_says_when(
    rows: list[Measurement], said: str, tmp_path: Path
) -> None:
    (entry,) = found_in(nights(0.04) + rows, tmp_path)["entries"]
    assert said in entry["detail"]


@pytest.mark.parametrize(
    ("more", "total"),
    [
        ({}, 0),
        ({"patterns": {"backend": "CPU_*"}}, 0),
        ({"patterns": {"backend": "TORCH_SDPA"}}, 1),
        ({"expires": date(2026, 12, 1)}, 1),
        ({"kind": AlarmKind.STATUS}, 1),
        ({"up_to": 1.02}, 1),  # it is worse than that
    ],
)
def test_what_somebody_accepted_is_not_told(
    more: dict[str, Any], total: int, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {
        "kind": AlarmKind.SLOWER,
        "patterns": {"phase": "decode"},
        "since": "2026-12-09",
        "reason": "known",
        "by": "me",
        "expires": date(2027, 1, 1),
        "up_to": 1.1,
        **more,
    }
    accepted = (Acknowledgement(**fields),)
    assert found_in(nights(0.04), tmp_path, accepted=accepted)["total"] == total


def test_what_the_page_names_already_is_not_said_twice(tmp_path: Path) -> None:
    rows = nights(0.04)
    (name,) = Panel.of_table(table_of(rows)).ids
    assert found_in(rows, tmp_path, told=(name,))["total"] == 0


def test_the_largest_come_first_and_the_rest_is_counted(tmp_path: Path) -> None:
    rows = [
        one for n in range(1, 8) for one in nights(0.03 + 0.01 * n, workload=f"{n}q1s1k dtype=fp32")
    ]
    found = found_in(rows, tmp_path)
    assert found["total"] == 7
    assert [percent_of(entry) for entry in found["entries"]] == [
        pytest.approx(size, abs=0.3) for size in (10, 9, 8, 7, 6)
    ]


def test_the_overview_shows_it(tmp_path: Path) -> None:
    panel = Panel.of_table(table_of(nights(0.04)))
    judgement = judge(panel)
    assert not judgement.exit_code
    page = render(panel, panel.runs, judgement, tmp_path).read_text(encoding="utf-8")
    assert "Slower for some time, and no alarm tonight" in page
    assert re.search(r"\+(3\.9|4\.\d) % level", page)
    assert "Slower for some time: 1, below." in page
    assert HOSTILE not in page
