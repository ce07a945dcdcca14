"""How judging and the pages behave over years of nights.

    python benchmarks/history_scale.py [--series N] [--nights N] [--seed N] [--folder DIR]

Writes sealed runs of made-up nights, then times, each in a fresh process, what people wait for:
judging without and with digests of the runs, the pages, and one night more. `--folder` keeps the
files, and goes on with those that are there.

The noise is that of real machines in form: samples of a process around its level (the upper tail
is heavier), a level per process, and a level per night that remembers the nights before
(first-order autoregression of 0.5, steps by Student's t with 4 degrees of freedom). Spreads differ
between series, from 0.1 to 2 %. One series in a hundred is refused, one in 2,000 gets 10 % slower
in the last night.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from attnbench.store import RunHeader
from attnbench.store.record import point_id, stack_id, workload_id
from attnbench.store.schema import SCHEMA, default_of
from attnbench.store.sealed import write_sealed

NUM_SAMPLES = 20
REPLICATES = (2, 3)  # one or the other, by point
BACKENDS = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "FLEX_ATTENTION", "TORCH_SDPA")
SHAPES = (("llama-3-8b", 32, 8, 128), ("llama-3-70b", 64, 8, 128), ("phi-3-mini", 32, 32, 96))
NIGHTS_PER_STACK = 40
MEMORY = 0.5  # how much of a night's level stays the next night
_MOST_BYTES = 12 * 2**30
FIRST = datetime(2026, 1, 1, 1, 0, tzinfo=UTC)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--series", type=int, default=10_000)
    parser.add_argument("--nights", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="a folder to keep; default: temporary")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.step:
        run_step(options.step, options.folder)
    elif options.folder is not None:
        measure(options.folder, options.series, options.nights, options.seed)
    else:
        with tempfile.TemporaryDirectory(prefix="attnbench-history-") as folder:
            measure(Path(folder), options.series, options.nights, options.seed)


def measure(folder: Path, num_series: int, nights: int, seed: int) -> None:
    """Fill `folder` and print a table of times."""
    results = folder / "results"
    later = folder / "later"
    start = time.perf_counter()
    made = generate(results, later, num_series, nights, seed)
    took = time.perf_counter() - start
    size = sum(file.stat().st_size for file in results.rglob("runs/*.parquet"))
    print(f"{num_series} series x {nights} nights, {size / 1e6:.0f} MB of runs, seed {seed}")
    print(f"wrote {made} nights in {took:.0f} s\n")
    shutil.rmtree(results / ".digests", ignore_errors=True)
    shutil.rmtree(folder / "site", ignore_errors=True)
    lines = [("judge, no digests", "", _fresh("judge", folder))]
    lines.append(("judge", "<= 15 s, <= 2 GB", _fresh("judge", folder)))
    lines.append(("history, one backend", "", _fresh("history", folder)))
    lines.append(("pages, none before", "<= 30 s", _fresh("pages", folder)))
    for file in later.iterdir():
        shutil.move(file, results / "runs" / file.name)
    lines.append(("judge, a night more", "", _fresh("judge", folder)))
    lines.append(("pages, a night more", "<= 5 s", _fresh("pages", folder)))
    lines.append(("attnbench dashboard", "", _fresh("dashboard", folder)))
    print(
        f"| {'what':<22} | {'seconds':>8} | {'CPU s':>6} | {'peak MB':>8} | {'target':<16} | found"
    )
    print(f"|{'-' * 24}|{'-' * 9}:|{'-' * 7}:|{'-' * 9}:|{'-' * 18}|{'-' * 6}")
    for what, target, told in lines:
        seconds, peak = f"{told['seconds']:8.2f}", f"{told['peak_mb']:8.0f}"
        cpu = f"{told['cpu']:6.2f}"
        print(f"| {what:<22} | {seconds} | {cpu} | {peak} | {target:<16} | {told['found']}")


def _fresh(step: str, folder: Path) -> dict[str, Any]:
    """One step in its own process: wall and processor time with imports, most memory held."""
    command = [sys.executable, __file__, "--step", step, "--folder", str(folder)]
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if done.returncode:
        raise SystemExit(f"{step}: {done.stderr.strip()[-2000:]}")
    return {"seconds": seconds, "cpu": cpu, **json.loads(done.stdout)}


def run_step(step: str, folder: Path) -> None:
    """Print what a step found and the most memory it held, as JSON."""
    # Others may be at work on this machine: too much memory ends the step, not them.
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_BYTES, _MOST_BYTES))
    found = STEPS[step](folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"found": found, "peak_mb": peak}))


def judge_step(folder: Path) -> str:
    from attnbench.history import judge
    from attnbench.history.panel import Panel
    from attnbench.store import ResultsFolder

    panel = Panel.of(ResultsFolder(folder / "results"))
    found = judge(panel)
    counts = {str(v): len(found.of(v)) for v in {v.verdict for v in found.verdicts}}
    listed = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))
    return f"{found.run.run_id[:8]}: {listed}"


def history_step(folder: Path) -> str:
    from typer.testing import CliRunner

    from attnbench.cli.main import app

    words = ["history", "--backend", "FLEX_ATTENTION", "--results", str(folder / "results")]
    done = CliRunner().invoke(app, [*words, "--format", "csv"], catch_exceptions=False)
    return f"{len(done.stdout.splitlines()) - 1} lines"


def dashboard_step(folder: Path) -> str:
    """The whole command: also who wins where, and the gate's own record."""
    from typer.testing import CliRunner

    from attnbench.cli.main import app

    words = ["dashboard", "--results", str(folder / "results"), "--site", str(folder / "site")]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    if done.exit_code:
        raise SystemExit(done.output)
    return f"{len(list((folder / 'site').glob('*.html')))} pages"


def pages_step(folder: Path) -> str:
    from attnbench.dashboard import render
    from attnbench.history import judge
    from attnbench.history.panel import Panel
    from attnbench.store import ResultsFolder

    panel = Panel.of(ResultsFolder(folder / "results"))
    site = folder / "site"
    start = time.time()
    render(panel, panel.runs, judge(panel), site)
    files = [file for file in site.rglob("*") if file.is_file()]
    written = [file for file in files if file.stat().st_mtime >= start]
    overview = ["index.html", "data/index.js", "data/runs.js", "assets/style.css"]
    overview += [f"assets/{name}.js" for name in ("common", "charts", "overview")]
    size = sum((site / name).stat().st_size for name in overview)
    total = sum(file.stat().st_size for file in files)
    return (
        f"overview {size / 1e6:.2f} MB, {total / 1e6:.0f} MB in {len(files)} files, "
        f"{len(written)} written"
    )


STEPS: dict[str, Callable[[Path], str]] = {
    "judge": judge_step,
    "history": history_step,
    "pages": pages_step,
    "dashboard": dashboard_step,
}


def generate(results: Path, later: Path, num_series: int, nights: int, seed: int) -> int:
    """Write the nights that are not there, and one more into `later`; gives how many."""
    (results / "runs").mkdir(parents=True, exist_ok=True)
    (results / "months").mkdir(exist_ok=True)
    later.mkdir(exist_ok=True)
    last = f"{FIRST + timedelta(days=nights):%Y%m%d}"
    for file in (results / "runs").glob(f"{last}*.parquet"):
        shutil.move(file, later / file.name)
    there = {file.name[:8] for file in [*(results / "runs").iterdir(), *later.iterdir()]}
    points = _points(num_series)
    random = np.random.default_rng(seed)
    level = random.lognormal(-9, 1, num_series)
    spread = np.exp(random.uniform(np.log(0.001), np.log(0.02), num_series))
    night_level = np.zeros(num_series)
    made = 0
    for night in range(nights + 1):
        random = np.random.default_rng((seed, night))
        step = random.standard_t(4, num_series) * spread
        night_level = MEMORY * night_level + np.sqrt(1 - MEMORY**2) * step
        at = FIRST + timedelta(days=night)
        if f"{at:%Y%m%d}" in there:
            continue
        slower = np.where((np.arange(num_series) % 2000 == 7) & (night == nights), 1.1, 1.0)
        run_id = f"{at:%Y%m%dT%H%M%SZ}-{night:06x}"
        header = RunHeader(run_id=run_id, started_at=at)
        tables = _night(header, points, level * np.exp(night_level) * slower, spread, night, random)
        folder = later if night == nights else results / "runs"
        write_sealed(folder / f"{run_id}.parquet", tables, [header])
        made += 1
    return made


def _points(count: int) -> pa.Table:
    """The identity columns of `count` points."""
    rows = []
    for number in range(count):
        backend = BACKENDS[number % len(BACKENDS)]
        cell = number // len(BACKENDS)
        shape, num_heads, num_kv_heads, head_size = SHAPES[cell % len(SHAPES)]
        dtype = ("bf16", "fp16")[cell // 3 % 2]
        decode = cell // 6 % 2 == 0
        num_reqs, kilo = cell // 12 % 256 + 1, cell // 12 // 256 + 1
        query_len = "1" if decode else f"{kilo}k"
        tokens = num_reqs * (1 if decode else kilo * 1024)
        spec = f"{num_reqs}q{query_len}s{kilo}k"
        text = spec if dtype == "bf16" else f"{spec} dtype={dtype}"
        text += "" if shape == "llama-3-8b" else f" shape={shape}"
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
                "phase": "decode" if decode else "prefill",
                "num_reqs": num_reqs,
                "num_tokens": tokens,
                "bytes_moved": 2 * num_reqs * kilo * 1024 * num_kv_heads * head_size * 2,
                "flops": 4 * tokens * kilo * 1024 * num_heads * head_size,
            }
        )
    names = list(rows[0])
    return pa.table({n: pa.array([row[n] for row in rows], SCHEMA.field(n).type) for n in names})


def _night(
    header: RunHeader,
    points: pa.Table,
    level: np.ndarray[Any, np.dtype[np.float64]],
    spread: np.ndarray[Any, np.dtype[np.float64]],
    night: int,
    random: np.random.Generator,
) -> list[pa.Table]:
    """The rows of one run, point after point."""
    replicates = np.where(np.arange(len(level)) % 2 == 0, *REPLICATES)
    point = np.repeat(np.arange(len(level)), replicates)
    starts = np.cumsum(replicates) - replicates
    replicate = np.arange(len(point)) - np.repeat(starts, replicates)
    refused = point % 100 == 99
    offsets = np.concatenate([[0], np.cumsum(np.where(refused, 0, NUM_SAMPLES))]).astype(np.int32)
    process = level[point] * np.exp(random.standard_normal(len(point)) * spread[point] / 2)
    counts = np.diff(offsets)
    tail = np.exp(random.standard_normal(int(offsets[-1])) * 1.5 - 1.5)
    samples = np.repeat(process, counts) * (1 + np.repeat(spread[point], counts) * tail)
    clocks = random.normal(1.755e9, 5e6, int(offsets[-1])).astype(np.float32)
    stack = tuple(
        sorted(f"package-{n}=={n}.{(n + night // NIGHTS_PER_STACK) % 7}.1" for n in range(40))
    )
    started = np.datetime64(header.started_at.replace(tzinfo=None), "us")
    constant: dict[str, Any] = {
        "run_id": header.run_id,
        "metric": "attention",
        "block_size": 16,
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
        "driver_version": "550.54",
        "hostname": "gpu-1",
        "conditions_before": [("sm_clock_hz", 1.98e9), ("temperature_c", 41.0)],
        "conditions_after": [("sm_clock_hz", 1.755e9), ("temperature_c", 48.0)],
        "stack": list(stack),
        "stack_id": stack_id(stack),
        "commit": f"{night:040x}",
        "commit_subject": f"Change number {night}",
        "commit_time": header.started_at,
        "max_abs_error": 0.002,
        "rel_error": 0.001,
        "checked": ["before", "after"],
    }
    varying = {
        "replicate": pa.array(replicate),
        "samples": pa.ListArray.from_arrays(pa.array(offsets), pa.array(samples)),
        "sm_clock_hz": pa.ListArray.from_arrays(pa.array(offsets), pa.array(clocks)),
        "started_at": pa.array(started + np.arange(len(point)) * np.timedelta64(300, "ms")),
        "status": pa.array(np.where(refused, "UNSUPPORTED", "OK")),
        "reasons": pa.array([["head size 96 is not supported"] if r else [] for r in refused]),
    }
    rows = pa.array(point)
    columns = []
    for field in SCHEMA:
        if field.name in points.column_names:
            column = points[field.name].take(rows).combine_chunks()
        elif field.name in varying:
            column = varying[field.name].cast(field.type)
        else:
            value = constant[field.name] if field.name in constant else default_of(field.name)
            plain = list(value.items()) if isinstance(value, dict) else value
            column = pa.array([plain], field.type).take(pa.array(np.zeros(len(point), np.int64)))
        columns.append(column)
    return [pa.Table.from_arrays(columns, schema=SCHEMA)]


if __name__ == "__main__":
    main()
