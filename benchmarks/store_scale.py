"""How the store behaves at a million rows.

    python benchmarks/store_scale.py [--rows N] [--folder DIR]

Writes ten sealed runs of made-up but realistic rows (20 samples each), then times what people wait
for: a filtered query, a point look-up, `results check`, a compaction, and the same query after it.
Files just written are in the page cache, so these are times without a slow disk.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from attnbench.store import ResultsFolder, RunHeader
from attnbench.store.record import point_id, stack_id, workload_id
from attnbench.store.schema import SCHEMA, default_of
from attnbench.store.sealed import write_sealed

NUM_FILES = 10
NUM_SAMPLES = 20
REPLICATES = 4
BACKENDS = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "FLEX_ATTENTION", "TORCH_SDPA")
SHAPES = (("llama-3-8b", 32, 8, 128), ("llama-3-70b", 64, 8, 128), ("phi-3-mini", 32, 32, 96))
STACK = tuple(sorted(f"package-{number}=={number}.{number % 7}.1" for number in range(40)))

FILTERED = """
    SELECT backend, phase, count(*) AS num_rows,
        median(list_aggregate(samples, 'median')) AS median_s
    FROM results
    WHERE shape = 'llama-3-8b' AND dtype = 'bf16' AND status = 'OK'
    GROUP BY backend, phase
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows in all")
    parser.add_argument("--folder", type=Path, help="an empty folder to keep; default: temporary")
    options = parser.parse_args(arguments)
    if options.folder is not None:
        measure(options.folder, options.rows)
        return
    with tempfile.TemporaryDirectory(prefix="attnbench-store-") as folder:
        measure(Path(folder), options.rows)


def measure(path: Path, num_rows: int) -> None:
    """Fill `path` and print a table of times."""
    folder = ResultsFolder(path)
    results: list[tuple[str, float, str]] = []

    def timed(what: str, target: str, action: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        value = action()
        results.append((what, time.perf_counter() - start, target))
        return value

    timed("write 10 sealed runs", "", lambda: generate(path, num_rows))
    size = sum(file.stat().st_size for file in path.rglob("*.parquet"))
    timed("first query (loads duckdb)", "", lambda: folder.query(FILTERED))
    found = timed("filtered query", "<= 1 s", lambda: folder.query(FILTERED))
    if num_rows >= 1000:
        assert found.num_rows == len(BACKENDS) * 2
    one = folder.query("SELECT point_id FROM results LIMIT 1").to_pylist()[0]["point_id"]
    look_up = f"SELECT samples FROM results WHERE point_id = '{one}'"
    timed("look up one point", "", lambda: folder.query(look_up))
    columns = ["run_id", "point_id", "metric", "status", "samples"]
    timed("table of 5 columns, OK only", "", lambda: folder.table(columns, {"status": "OK"}))
    timed("runs", "", folder.runs)
    report = timed("results check", "<= 30 s", folder.check)
    assert report.is_ok, report.problems
    assert report.num_rows == num_rows
    timed("results compact", "", folder.compact)
    timed("filtered query, compacted", "<= 1 s", lambda: folder.query(FILTERED))
    report = timed("results check, compacted", "<= 30 s", folder.check)
    assert report.is_ok, report.problems
    assert report.num_rows == num_rows

    print(f"{num_rows} rows x {NUM_SAMPLES} samples x {len(SCHEMA)} columns")
    print(f"{NUM_FILES} files, {size / 1e6:.0f} MB, {os.cpu_count()} cores\n")
    print(f"| {'what':<28} | {'seconds':>8} | {'target':<7} |")
    print(f"|{'-' * 30}|{'-' * 9}:|{'-' * 9}|")
    for what, seconds, target in results:
        print(f"| {what:<28} | {seconds:8.2f} | {target:<7} |")


def generate(path: Path, num_rows: int) -> None:
    """Write NUM_FILES sealed runs, one a day, as a nightly of that size would."""
    (path / "runs").mkdir(parents=True)
    (path / "months").mkdir()
    per_file = [len(part) for part in np.array_split(np.arange(num_rows), NUM_FILES)]
    points = _points(-(-per_file[0] // REPLICATES))
    random = np.random.default_rng(0)
    first = datetime(2026, 11, 1, 1, 0, tzinfo=UTC)
    for day, rows in enumerate(per_file):
        header = RunHeader.new(argv=("attnbench", "nightly"), now=first + timedelta(days=day))
        table = _run_table(header, points, rows, day, random)
        write_sealed(path / "runs" / f"{header.run_id}.parquet", [table], [header])


def _points(count: int) -> dict[str, pa.Array]:
    """The identity columns of `count` points."""
    rows = []
    for number in range(count):
        backend = BACKENDS[number % len(BACKENDS)]
        cell = number // len(BACKENDS)
        shape, num_heads, num_kv_heads, head_size = SHAPES[cell % len(SHAPES)]
        dtype = ("bf16", "fp16")[cell // 3 % 2]
        decode = cell // 6 % 2 == 0
        num_reqs, seq_len = cell % 256 + 1, 16 * (cell // 256 + 1)
        query_len = 1 if decode else seq_len
        spec = f"{num_reqs}q{query_len}s{seq_len}"
        text = f"{spec} dtype={dtype} seed={cell} shape={shape}"
        rows.append(
            {
                "workload": text,
                "workload_id": workload_id(text),
                "point_id": point_id(text, backend, ""),
                "backend": backend,
                "batch_spec": spec,
                "shape": shape,
                "num_layers": 32,
                "num_heads": num_heads,
                "num_kv_heads": num_kv_heads,
                "head_size": head_size,
                "v_head_size": head_size,
                "dtype": dtype,
                "kv_cache_dtype": dtype,
                "block_size": 16,
                "seed": cell,
                "phase": "decode" if decode else "prefill",
                "num_reqs": num_reqs,
                "num_tokens": num_reqs * query_len,
                "bytes_moved": 2 * num_reqs * seq_len * num_kv_heads * head_size * 2,
                "flops": 4 * num_reqs * query_len * seq_len * num_heads * head_size,
            }
        )
    return {
        name: pa.array([row[name] for row in rows], SCHEMA.field(name).type) for name in rows[0]
    }


def _run_table(
    header: RunHeader,
    points: dict[str, pa.Array],
    rows: int,
    day: int,
    random: np.random.Generator,
) -> pa.Table:
    """One run: every point REPLICATES times, one row in a hundred refused."""
    index = np.arange(rows)
    refused = index % 100 == 99
    offsets = np.concatenate([[0], np.cumsum(np.where(refused, 0, NUM_SAMPLES))]).astype(np.int32)
    base = np.repeat(random.lognormal(-9, 1, rows), np.diff(offsets))
    samples = base * random.normal(1, 0.01, len(base))
    clocks = random.normal(1.755e9, 5e6, len(base)).astype(np.float32)
    started = np.datetime64(header.started_at.replace(tzinfo=None), "us")
    constant: dict[str, Any] = {
        "run_id": header.run_id,
        "metric": "attention",
        "suite": "decode",
        "timer": "cupti_span",
        "timer_floor_s": 1.1e-6,
        "l2_state": "cold",
        "reuse_distance_bytes": 2**28,
        "stop_reason": "narrow",
        "duration_s": 0.3,
        "device_kind": "cuda",
        "device_name": "NVIDIA H200",
        "device_class": "h200",
        "compute_capability": "9.0",
        "hostname": "gpu-1",
        "conditions_before": [("sm_clock_hz", 1.98e9), ("temperature_c", 41.0)],
        "conditions_after": [("sm_clock_hz", 1.755e9), ("temperature_c", 48.0)],
        "stack": list(STACK),
        "stack_id": stack_id(STACK),
        "commit": f"{day:040x}",
        "commit_time": header.started_at,
        "max_abs_error": 0.002,
        "rel_error": 0.001,
        "checked": ["before", "after"],
    }
    varying = {
        "replicate": pa.array(index % REPLICATES),
        "samples": pa.ListArray.from_arrays(pa.array(offsets), pa.array(samples)),
        "sm_clock_hz": pa.ListArray.from_arrays(pa.array(offsets), pa.array(clocks)),
        "started_at": pa.array(started + index * np.timedelta64(300, "ms")),
        "status": pa.array(np.where(refused, "UNSUPPORTED", "OK")),
    }
    columns = []
    for field in SCHEMA:
        if field.name in points:
            column = points[field.name].take(pa.array(index // REPLICATES))
        elif field.name in varying:
            column = varying[field.name].cast(field.type)
        else:
            value = constant[field.name] if field.name in constant else default_of(field.name)
            plain = list(value.items()) if isinstance(value, dict) else value
            column = pa.array([plain], field.type).take(pa.array(np.zeros(rows, np.int64)))
        columns.append(column)
    return pa.Table.from_arrays(columns, schema=SCHEMA)


if __name__ == "__main__":
    main()
