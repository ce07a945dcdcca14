"""A made-up history for the pages of the night watch: levels that change, groups, lost support."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from attnbench.store.record import Measurement
from tests.history.fake import HOSTILE, row

RUNS = 40
STEP_AT = 25  # the levels of CPU_ATTN rise by 8 %
DRIVER_AT = 33  # a new driver, and 7 % less time everywhere
SLOW_SINCE = 38  # TORCH_SDPA is slower by a quarter
LOST_AT = 36  # FLEX_ATTENTION refuses softcap
SPECS = ("16q1s4k", "4q1s4k", "8q1s2k", "1q1s1k")
OLD_WAY = "2q1s8k dtype=fp32"  # measured with the timer event until the newest run
STEPPED = ("CPU_ATTN", "16q1s4k dtype=fp32")
SLOWED = ("TORCH_SDPA", "16q1s4k dtype=fp32")
SOFTCAP = "4q1s4k dtype=fp32 softcap=30"


def commit_of(run: int) -> str:
    """Two runs in turn are of one commit, so that sides have several runs."""
    return f"{run // 4:02x}c0ffee{run // 4:032x}"


def watched_rows(runs: int = RUNS) -> list[Measurement]:
    """`runs` nights; spread between runs 0.6 %, between processes 0.3 %."""
    rng = random.Random(3)
    rows: list[Measurement] = []
    for run in range(runs):
        facts: dict[str, Any] = {
            "timer": "graph",
            "driver_version": "580.1" if run < DRIVER_AT else "590.2",
            "commit": commit_of(run),
        }
        for backend in ("CPU_ATTN", "TORCH_SDPA", "FLEX_ATTENTION"):
            for text in [f"{spec} dtype=fp32" for spec in SPECS]:
                level = _level(run, backend) * (1 + rng.gauss(0, 0.006))
                rows += _processes(rng, run, 3, level, backend=backend, workload=text, **facts)
                if run == RUNS - 1 and backend == "TORCH_SDPA":
                    rows += [
                        row(
                            run,
                            100 + r,
                            seconds=level * (1 + rng.gauss(0, 0.003)),
                            backend=backend,
                            workload=text,
                            **facts,
                        )
                        for r in range(10)
                    ]
        rows += _softcap(rng, run, facts)
        timer = {"timer": "event" if run < RUNS - 1 else "graph"}
        rows += _processes(rng, run, 3, 1e-3, backend="CPU_ATTN", workload=OLD_WAY, **facts | timer)
        # One process only, and a run that throttled.
        rows += _processes(rng, run, 1, 2e-3, backend="CPU_ATTN", workload="32q1s1k", **facts)
        status = "THROTTLED" if run == 7 else "OK"
        rows += _processes(
            rng, run, 2, 3e-3, backend="CPU_ATTN", workload="32q1s2k", status=status, **facts
        )
    return rows


def _level(run: int, backend: str) -> float:
    level = 1e-3
    if backend == "CPU_ATTN" and run >= STEP_AT:
        level *= 1.08
    if run >= DRIVER_AT:
        level *= 0.93
    if backend == "TORCH_SDPA" and run >= SLOW_SINCE:
        level *= 1.25
    return level


def _softcap(rng: random.Random, run: int, facts: dict[str, Any]) -> Sequence[Measurement]:
    if run >= LOST_AT:
        reasons = (f"softcap is not supported {HOSTILE}",)
        return [
            row(
                run,
                0,
                backend="FLEX_ATTENTION",
                workload=SOFTCAP,
                status="UNSUPPORTED",
                reasons=reasons,
                **facts,
            )
        ]
    return _processes(rng, run, 3, 1e-3, backend="FLEX_ATTENTION", workload=SOFTCAP, **facts)


def _processes(
    rng: random.Random, run: int, count: int, level: float, **more: Any
) -> list[Measurement]:
    return [row(run, r, seconds=level * (1 + rng.gauss(0, 0.003)), **more) for r in range(count)]
