"""Rows as a nightly would store them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pyarrow as pa

from attnbench.store.record import Measurement, point_id, stack_id, workload_id
from attnbench.store.schema import rows_to_table

START = datetime(2026, 11, 1, tzinfo=UTC)
STACK = ("python==3.11.7", "torch==2.13.0")
SHA = {n: f"{n:x}" * 40 for n in range(1, 9)}

SMALL, LARGE = "q1s1k", "8q1s4k"
SECONDS = {(SMALL, "CPU_ATTN"): 1e-3, (LARGE, "CPU_ATTN"): 4e-3, (LARGE, "TORCH_SDPA"): 9e-3}


def row(
    night: int,
    workload: str = LARGE,
    backend: str = "CPU_ATTN",
    seconds: float = 1e-3,
    **changes: object,
) -> Measurement:
    """One point of the run of one night, at the commit of that night."""
    made = Measurement(
        run_id=f"202611{night:02d}T000000Z-00000{night}",
        point_id=point_id(workload, backend, ""),
        workload_id=workload_id(workload),
        workload=workload,
        backend=backend,
        suite="decode",
        batch_spec=workload,
        shape="llama-3-8b",
        num_heads=32,
        num_kv_heads=8,
        head_size=128,
        v_head_size=128,
        dtype="bf16",
        kv_cache_dtype="bf16",
        block_size=16,
        phase="decode",
        num_reqs=1,
        num_tokens=1,
        metric="attention",
        samples=tuple(seconds * (1 + i / 1000) for i in (-1, 0, 1)),
        bytes_moved={SMALL: 10, LARGE: 1000}.get(workload, 0),
        timer="fake",
        l2_state="hot",
        started_at=START + timedelta(days=night),
        device_kind="cpu",
        device_name="Xeon",
        device_class="cpu-xeon-2c",
        stack=STACK,
        stack_id=stack_id(STACK),
        commit=SHA[night],
        commit_time=START + timedelta(days=night, hours=-3),
        status="OK",
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def history(nights: Sequence[int], slower_from: int = 99) -> list[Measurement]:
    return [
        row(night, workload, backend, seconds * (1.1 if night >= slower_from else 1.0))
        for night in nights
        for (workload, backend), seconds in SECONDS.items()
    ]


def table_of(rows: Sequence[Measurement]) -> pa.Table:
    return rows_to_table(rows)
