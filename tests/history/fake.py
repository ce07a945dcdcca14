"""A made-up history: 12 commits, 2 stacks, 3 backends, one slow-down and one lost support.

Also a script: `python -m tests.history.fake results/` fills a results folder with it.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa

from attnbench.store.record import Measurement, point_id, stack_id
from attnbench.workload import Workload

HOSTILE = "</script><img src=x onerror=alert(1)> & \"quotes\" 'too'"
START = datetime(2026, 11, 9, 2, 0, tzinfo=UTC)
DEVICE = "cpu-xeon-2c"
BACKENDS = {"TORCH_SDPA": 1.0, "CPU_ATTN": 1.4, "FLEX_ATTENTION": 0.8}
WORKLOADS = (
    "1q1s1k dtype=fp32",
    "4q1s4k dtype=fp32",
    "16q1s4k dtype=fp32",
    "16q1s4k dtype=bf16",
    "2q1ks1k dtype=fp32",
    "4q1s4k dtype=fp32 shape=phi-3-mini",
    "4q1s4k dtype=fp32 softcap=30",
)
SLOW = ("CPU_ATTN", "16q1s4k dtype=fp32")
SLOW_SINCE = 10  # the commits 10 and 11
LOST = ("FLEX_ATTENTION", "4q1s4k dtype=fp32 shape=phi-3-mini")
REFUSED = ("CPU_ATTN", "4q1s4k dtype=fp32 softcap=30")
OLD_STACK = ("python==3.11.7", "torch==2.12.0", "triton==3.6.0")
NEW_STACK = ("gxx==12.2.0", "python==3.11.7", "torch==2.13.0", "triton==3.7.1")
NEW_STACK_SINCE = 7


def row(
    run: int = 0,
    replicate: int = 0,
    *,
    backend: str = "CPU_ATTN",
    workload: str = "4q1s4k dtype=fp32",
    seconds: float | Sequence[float] | None = 1e-3,
    status: str = "OK",
    **more: Any,
) -> Measurement:
    """One row of run number `run`; five samples around `seconds` unless samples are given."""
    parsed = Workload.parse(workload)
    if isinstance(seconds, float):
        samples = tuple(seconds * (1 + s) for s in (-0.002, -0.001, 0.0, 0.001, 0.002))
    else:
        samples = tuple(seconds or ())
    stack = NEW_STACK if run >= NEW_STACK_SINCE else OLD_STACK
    started = START + timedelta(days=run, seconds=replicate % 100 * 40 + replicate // 100 * 120)
    if status not in ("OK", "NOISY"):
        samples = ()
    columns: dict[str, Any] = {
        **parsed.columns(),
        "run_id": f"{START + timedelta(days=run):%Y%m%dT%H%M%SZ}-{run:06x}",
        "point_id": point_id(parsed.text, backend, more.get("variant", "")),
        "replicate": replicate,
        "backend": backend,
        "suite": "decode",
        "metric": "attention",
        "samples": samples,
        "bytes_moved": 64_000_000,
        "flops": 512_000_000,
        "timer": "wall",
        "timer_floor_s": 1e-7,
        "l2_state": "hot",
        "stop_reason": "converged" if samples else "",
        "started_at": started,
        "duration_s": 0.9,
        "device_kind": "cpu",
        "device_name": "Xeon",
        "device_class": DEVICE,
        "hostname": "night-1",
        "conditions_before": {"load_1m": 0.4, "temperature_c": 51.0, "cpu_clock_hz": 2.6e9},
        "conditions_after": {"load_1m": 1.1, "temperature_c": 58.0, "cpu_clock_hz": 2.6e9},
        "stack": stack,
        "stack_id": stack_id(stack),
        "harness_version": "0.1.0",
        "commit": f"{run:02x}c0ffee{run:032x}",
        "commit_time": START + timedelta(days=run, hours=-3),
        "commit_subject": HOSTILE if run == 3 else f"Change number {run}",
        "status": status,
        "max_abs_error": 1e-6 if samples else None,
        "checked": ("before", "after") if samples else (),
    }
    return Measurement(**{**columns, **more})


def timed(
    levels: Sequence[float], first_run: int = 0, replicates: int = 3, **more: Any
) -> list[Measurement]:
    """One point over runs: replicates 1 % apart around each level."""
    return [
        row(first_run + i, r, seconds=level * (1 + 0.01 * (r - 1)), **more)
        for i, level in enumerate(levels)
        for r in range(replicates)
    ]


def history(runs: int = 12, seed: int = 1, with_confirmations: bool = True) -> list[Measurement]:
    """The made-up history; run-to-run spread 1.5 %, replicate spread 1 %."""
    rng = random.Random(seed)
    rows = []
    for run in range(runs):
        for text in WORKLOADS:
            parsed = Workload.parse(text)
            base = 2e-6 * len(parsed.requests) * (1 + 9 * (parsed.phase == "prefill"))
            for backend, factor in BACKENDS.items():
                point = (backend, text)
                level = base * factor * 40 * (1 + rng.gauss(0, 0.015))
                if point == SLOW and run >= SLOW_SINCE:
                    level *= 1.3
                rows += _point_rows(run, point, level, rng)
                if point == SLOW and run == runs - 1 and with_confirmations:
                    rows += [
                        row(run, 100 + r, backend=backend, workload=text, seconds=level)
                        for r in range(10)
                    ]
    return rows


def _point_rows(
    run: int, point: tuple[str, str], level: float, rng: random.Random
) -> list[Measurement]:
    backend, text = point
    if point == REFUSED:
        reasons = ("logits soft cap is not supported", "and a second <b>reason</b>")
        return [
            row(run, r, backend=backend, workload=text, status="UNSUPPORTED", reasons=reasons)
            for r in range(3)
        ]
    if point == LOST and run >= 11:
        return [
            row(
                run,
                0,
                backend=backend,
                workload=text,
                status="INCORRECT",
                max_abs_error=0.31,
                reasons=("max error 0.31",),
            )
        ]
    return [
        row(run, r, backend=backend, workload=text, seconds=level * (1 + rng.gauss(0, 0.01)))
        for r in range(3)
    ]


def table_of(rows: Sequence[Measurement]) -> pa.Table:
    """Rows as the store gives them."""
    from attnbench.store.schema import rows_to_table

    return rows_to_table(rows)


def fill(folder: Path) -> None:
    """Write the made-up history into a results folder, one run at a time."""
    from attnbench.store import ResultsFolder, RunHeader

    rows = history()
    results = ResultsFolder(folder)
    for run_id in dict.fromkeys(r.run_id for r in rows):
        own = [r for r in rows if r.run_id == run_id]
        with results.open_run(RunHeader(run_id=run_id, started_at=own[0].started_at)) as run:
            for measured in own:
                run.append(measured)


if __name__ == "__main__":
    fill(Path(sys.argv[1]))
