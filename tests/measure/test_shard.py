"""Shards of one plan are disjoint, complete, balanced, and do not move when points come."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnbench.errors import UsageError
from attnbench.measure import PlannedPoint
from attnbench.measure.shard import parse_shard, shard_of, take_shard
from attnbench.workload.suite import expand_workloads

POINTS = [
    PlannedPoint(workload, backend)
    for workload in expand_workloads(["{1..60}q1s{100..500+100}"])
    for backend in ("CPU_ATTN", "TORCH_SDPA")
]


@settings(deadline=None, max_examples=50)
@given(st.sets(st.integers(0, len(POINTS) - 1), min_size=1), st.integers(1, 9))
def test_shards_are_disjoint_complete_and_stable(chosen: set[int], count: int) -> None:
    plan = [POINTS[n] for n in sorted(chosen)]
    shards = []
    for index in range(1, count + 1):
        try:
            shards.append(take_shard(plan, f"{index}/{count}"))
        except UsageError:
            shards.append([])
    ids = [point.point_id for shard in shards for point in shard]
    assert sorted(ids) == sorted(point.point_id for point in plan)
    # Each in the plan's order, and where it is among all points too.
    for index, shard in enumerate(shards, start=1):
        assert shard == [p for p in take_shard(POINTS, f"{index}/{count}") if p in shard]


@pytest.mark.parametrize("count", [2, 3, 8])
def test_shards_are_balanced(count: int) -> None:
    sizes = Counter(shard_of(point.point_id, count) for point in POINTS)
    mean = len(POINTS) / count
    assert set(sizes) == set(range(1, count + 1))
    # Five standard deviations of a fair choice.
    assert all(abs(size - mean) < 5 * mean**0.5 for size in sizes.values()), sizes


def test_a_shard_of_a_point_never_changes() -> None:
    # Golden: machines of different versions must cut one plan alike.
    assert [shard_of(text, 4) for text in ("a", "b", "c", "d", "0123456789abcdef")] == [
        3,
        3,
        2,
        1,
        2,
    ]


def test_no_shard_is_the_whole_plan() -> None:
    assert take_shard(POINTS, "") == POINTS
    assert take_shard(POINTS, "1/1") == POINTS
    assert parse_shard("2/4") == (2, 4)


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "1/0", "a/b", "1/2/3", "-1/2", "01/2", " 1/2"])
def test_a_text_that_is_no_shard_says_how_to_write_one(text: str) -> None:
    with pytest.raises(UsageError, match=r"write i/n with 1 <= i <= n, e\.g\. 2/4"):
        take_shard(POINTS, text)


def test_an_empty_shard_is_refused() -> None:
    (only,) = POINTS[:1]
    other = shard_of(only.point_id, 2) % 2 + 1
    with pytest.raises(UsageError, match="none of the 1 points falls into it; use fewer"):
        take_shard([only], f"{other}/2")
