"""The order of a plan: fair to every backend, the same for the same seed."""

from __future__ import annotations

from collections import Counter
from itertools import groupby

from attnbench.measure.plan import PlannedPoint, interleave
from attnbench.workload import Workload

WORKLOADS = [Workload.parse(spec) for spec in ("1q1s1k", "8q1s1k", "q2k")]
BACKENDS = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN")
PLAN = [PlannedPoint(workload, backend) for workload in WORKLOADS for backend in BACKENDS]


def test_every_backend_comes_first_about_as_often() -> None:
    first: Counter[str] = Counter()
    for seed in range(600):
        order = interleave(PLAN, str(seed))
        assert sorted(p.point_id for p in order) == sorted(p.point_id for p in PLAN)
        groups = [list(g) for _, g in groupby(order, key=lambda p: p.workload.text)]
        assert [g[0].workload for g in groups] == WORKLOADS  # none is torn apart
        first.update(g[0].backend for g in groups)
    # 1,800 draws of three: a share of 1/3 has a standard deviation of 1.1 %.
    assert all(abs(first[backend] / 1800 - 1 / 3) < 0.045 for backend in BACKENDS)


def test_the_same_seed_gives_the_same_order() -> None:
    assert interleave(PLAN, "run-0") == interleave(PLAN, "run-0")
    assert len({tuple(interleave(PLAN, f"run-{r}")) for r in range(20)}) > 10
