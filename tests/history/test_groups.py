"""One cause is one alarm: what is told together, on nights with a known cause."""

from __future__ import annotations

from typing import Any

import pytest

from attnbench.history.groups import AlarmGroup, group_alarms
from attnbench.history.verdict import judge
from attnbench.store.record import Measurement
from tests.history.fake import DEVICE, row, table_of, timed

DECODES = [f"{n}q1s1k dtype=fp32" for n in (2, 4, 8, 16)]
PREFILLS = [f"{n}q1k dtype=fp32" for n in (2, 4, 8, 16)]
KERNELS = ("CPU_ATTN", "TORCH_SDPA", "TRITON_ATTN")


def night(
    slow: dict[tuple[str, str], float], kernels: tuple[str, ...] = KERNELS
) -> list[Measurement]:
    """Six nights of every kernel and batch; on the last some are slower by a factor, confirmed."""
    rows = []
    for kernel in kernels:
        for text in DECODES + PREFILLS:
            factor = slow.get((kernel, text), 1.0)
            point: dict[str, Any] = {"backend": kernel, "workload": text}
            rows += timed([1e-3] * 6 + [factor * 1e-3], **point)
            rows += [row(6, 100 + r, seconds=factor * 1e-3, **point) for r in range(10)]
    return rows


def groups_of(rows: list[Measurement]) -> tuple[AlarmGroup, ...]:
    return group_alarms(judge(table_of(rows)).verdicts)


def titles(rows: list[Measurement]) -> list[tuple[str, int, int]]:
    return [(g.title, len(g.members), g.judged) for g in groups_of(rows)]


def test_a_quiet_night_has_no_groups() -> None:
    assert groups_of(night({})) == ()


def test_a_kernel_that_broke_everywhere_is_one_alarm() -> None:
    slow = {("CPU_ATTN", text): 1.5 for text in DECODES + PREFILLS}
    assert titles(night(slow)) == [("CPU_ATTN", 8, 8)]


def test_a_phase_of_a_kernel_is_one_alarm_and_names_how_many() -> None:
    slow = {("CPU_ATTN", text): 1.5 + i / 10 for i, text in enumerate(DECODES[:3])}
    (group,) = groups_of(night(slow))
    assert (group.title, len(group.members), group.judged) == ("CPU_ATTN decode", 3, 4)
    assert group.common == (DEVICE, "CPU_ATTN", "decode")
    assert group.ratio is not None
    assert abs(group.ratio - 1.6) < 1e-6
    assert group.worst.series.identity["workload"] == DECODES[2]
    assert group.since is not None
    assert group.since.commit == row(6).commit


def test_a_device_that_broke_is_one_alarm_whatever_it_ran() -> None:
    slow = {(kernel, text): 1.5 for kernel in KERNELS for text in DECODES + PREFILLS}
    assert titles(night(slow)) == [(f"everything on {DEVICE}", 24, 24)]


def test_the_only_kernel_measured_is_not_a_device() -> None:
    slow = {("CPU_ATTN", text): 1.5 for text in DECODES + PREFILLS}
    assert titles(night(slow, ("CPU_ATTN",))) == [("CPU_ATTN", 8, 8)]


def test_single_points_stand_alone_and_the_worst_is_first() -> None:
    slow = {("CPU_ATTN", DECODES[0]): 1.3, ("TRITON_ATTN", PREFILLS[0]): 1.9}
    assert titles(night(slow)) == [
        (f"TRITON_ATTN {PREFILLS[0]}", 1, 1),
        (f"CPU_ATTN {DECODES[0]}", 1, 1),
    ]


def test_lost_support_is_never_told_with_a_slow_down() -> None:
    rows = night({("CPU_ATTN", text): 1.5 for text in DECODES})
    lost: dict[str, Any] = {"backend": "CPU_ATTN", "status": "CRASH", "reasons": ("killed",)}
    rows = [
        r
        for r in rows
        if not (r.backend == "CPU_ATTN" and r.workload in PREFILLS and r.run_id == row(6).run_id)
    ]
    rows += [row(6, workload=text, **lost) for text in PREFILLS]
    found = groups_of(rows)
    assert [(g.title, g.is_support_change, g.ratio is None) for g in found] == [
        ("CPU_ATTN prefill", True, True),
        ("CPU_ATTN decode", False, False),
    ]


def two_causes(sdpa: list[str], later: int) -> list[Measurement]:
    """CPU_ATTN is slower from run 10, these batches of TORCH_SDPA from 11; `later` more runs."""
    rows = []
    for kernel in KERNELS:
        for text in DECODES + PREFILLS:
            point: dict[str, Any] = {"backend": kernel, "workload": text}
            first = 1.5e-3 if kernel == "CPU_ATTN" else 1e-3
            then = 1.3e-3 if kernel == "TORCH_SDPA" and text in sdpa else first
            rows += timed([1e-3] * 10 + [first] + [then] * (1 + later), **point)
            rows += [row(11 + later, 100 + r, seconds=then, **point) for r in range(10)]
    return rows


@pytest.mark.parametrize("texts", [DECODES + PREFILLS, DECODES[:1]], ids=len)
def test_what_broke_tonight_is_told_before_what_stays_broken_and_apart(texts: list[str]) -> None:
    found = groups_of(two_causes(texts, later=0))
    assert [(g.title, len(g.members), g.judged) for g in found] == [
        ("TORCH_SDPA", 8, 8) if len(texts) == 8 else (f"TORCH_SDPA {texts[0]}", 1, 1),
        ("CPU_ATTN", 8, 8),
    ]
    assert [g.since and g.since.commit for g in found] == [row(11).commit, row(10).commit]
    assert [round(g.ratio or 0, 2) for g in found] == [1.3, 1.5]


def test_kernels_that_broke_on_different_nights_stay_two_alarms() -> None:
    found = groups_of(two_causes(DECODES + PREFILLS, later=1))
    assert [g.title for g in found] == ["CPU_ATTN", "TORCH_SDPA"]
    assert [g.since and g.since.commit for g in found] == [row(10).commit, row(11).commit]


def test_a_kernel_that_broke_again_in_another_phase_is_two_alarms() -> None:
    rows = []
    for text in DECODES + PREFILLS:
        first, then = (1.5e-3, 1.5e-3) if text in DECODES else (1e-3, 1.3e-3)
        rows += timed([1e-3] * 10 + [first, then], workload=text)
        rows += [row(11, 100 + r, seconds=then, workload=text) for r in range(10)]
    assert titles(rows) == [("CPU_ATTN prefill", 4, 4), ("CPU_ATTN decode", 4, 4)]
