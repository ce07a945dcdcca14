"""Rows to store, written in the plainest way."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa

from attnbench.store import Measurement, ResultsFolder, RunHeader
from attnbench.store.record import point_id, stack_id, workload_id
from attnbench.store.schema import rows_to_table
from attnbench.store.sealed import write_sealed

STACK = ("torch==2.13.0", "triton==3.7.1")


def make_row(run_id: str, number: int, **changes: Any) -> Measurement:
    """Row `number` of a run: the rows of two numbers differ in workload and samples."""
    workload = f"{number + 1}q1s1k"
    values: dict[str, Any] = {
        "run_id": run_id,
        "point_id": point_id(workload, "CPU_ATTN", ""),
        "workload_id": workload_id(workload),
        "workload": workload,
        "backend": "CPU_ATTN",
        "batch_spec": workload,
        "shape": "llama-3-8b",
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_size": 128,
        "v_head_size": 128,
        "dtype": "fp32",
        "kv_cache_dtype": "fp32",
        "block_size": 16,
        "phase": "decode",
        "num_reqs": number + 1,
        "num_tokens": number + 1,
        "metric": "attention",
        "samples": (number + 0.125, number + 0.25),
        "timer": "fake",
        "started_at": datetime(2026, 11, 21, 1, 55, tzinfo=UTC) + timedelta(seconds=number),
        "device_kind": "cpu",
        "device_name": "a processor",
        "device_class": "cpu-2c",
        "stack": STACK,
        "stack_id": stack_id(STACK),
        "status": "OK",
        **changes,
    }
    return Measurement(**values)


def make_header(day: int = 21, number: int = 0, month: int = 11, **changes: Any) -> RunHeader:
    """A header whose run id is known."""
    values: dict[str, Any] = {
        "run_id": f"2026{month:02d}{day:02d}T015500Z-{number:06x}",
        "started_at": datetime(2026, month, day, 1, 55, tzinfo=UTC),
        "argv": ("attnbench", "run", "8q1s4k"),
        "plan": ({"workload": "8q1s4k", "backend": "CPU_ATTN"},),
        **changes,
    }
    return RunHeader(**values)


def store_run(folder: ResultsFolder, header: RunHeader, count: int) -> Path:
    """Store rows 0 to `count` of a run and seal it; the sealed file."""
    with folder.open_run(header) as run:
        for number in range(count):
            run.append(make_row(run.run_id, number))
        return run.seal()


def write_file(path: Path, header: RunHeader, rows: list[Measurement]) -> Path:
    """A sealed file with any rows, also rows `append` would refuse."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_sealed(path, [rows_to_table(rows)], [header])
    return path


def numbers(table: pa.Table) -> list[int]:
    """Which rows a table holds, doubles included, sorted."""
    return sorted(int(value) - 1 for value in table["num_reqs"].to_pylist())
