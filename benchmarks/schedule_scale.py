"""How long traffic takes to read and to schedule.

    python benchmarks/schedule_scale.py [--requests N] [--rows N] [--seed N]

Writes a made-up trace of `--rows` requests in each format and times reading it; then schedules
`--requests` of them at a light load, near what the engine can serve, beyond it with too few blocks,
and with a common prefix in a cache. Lengths are log-normal, 600 tokens in and 150 out at the
median; arrivals are Poisson.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv

from attnbench.traffic.schedule import schedule
from attnbench.traffic.schedule_settings import SchedulerSettings
from attnbench.traffic.step_clock import LinearStepSeconds
from attnbench.traffic.trace import load_trace, scale_rate
from attnbench.traffic.types import Ints, Trace

# About Llama-3-8B on one H200: weights read in 5 ms, 15 us of matrix products per new token,
# 128 KiB of keys and values per context token.
MODEL = LinearStepSeconds(5e-3, 15e-6, 3e-8)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="requests to read")
    parser.add_argument("--requests", type=int, default=100_000, help="requests to schedule")
    parser.add_argument("--seed", type=int, default=0, help="of the made-up trace")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="attnbench-traffic-") as folder:
        for path in write_traces(Path(folder), made_trace(options.rows, options.seed)):
            start = time.perf_counter()
            trace = load_trace(path)
            seconds = time.perf_counter() - start
            print(f"parse     {path.name:16} {len(trace):9,} requests  {seconds:6.2f} s")
    trace = made_trace(options.requests, options.seed)
    few = SchedulerSettings(max_num_seqs=256, num_gpu_blocks=20_000)
    shared = with_prefixes(trace, options.seed)
    for name, traffic, settings in (
        ("light load", scale_rate(trace, 0.05), SchedulerSettings()),
        ("near capacity", trace, SchedulerSettings()),
        ("few blocks", trace, few),
        ("prefix cache", shared, few),
    ):
        start = time.perf_counter()
        steps = schedule(traffic, settings, MODEL)
        seconds = time.perf_counter() - start
        print(
            f"simulate  {name:16} {len(traffic):9,} requests  {seconds:6.2f} s  "
            f"{len(steps):10,} steps  {len(steps.request):11,} entries  "
            f"{int(steps.num_preempted.sum()):7,} preempted"
        )


def made_trace(num_requests: int, seed: int) -> Trace:
    """Poisson arrivals at 30 per second, log-normal lengths."""
    random = np.random.default_rng(seed)
    gaps = random.exponential(1 / 30, num_requests)
    gaps[0] = 0.0
    none: Ints = np.empty(0, dtype=np.int64)
    return Trace(
        name="made",
        arrival_s=np.asarray(np.cumsum(gaps).round(6), dtype=np.float64),
        input_tokens=np.clip(random.lognormal(np.log(600), 1.0, num_requests), 1, 16_000).astype(
            np.int64
        ),
        output_tokens=np.clip(random.lognormal(np.log(150), 0.8, num_requests), 1, 4_000).astype(
            np.int64
        ),
        hash_offsets=none,
        hash_ids=none,
    )


def with_prefixes(trace: Trace, seed: int) -> Trace:
    """The same, every prompt beginning with one of 100 system prompts of up to 2048 tokens."""
    random = np.random.default_rng(seed + 1)
    which = random.integers(0, 100, len(trace))
    num_ids = -(-trace.input_tokens // 512)
    offsets = np.concatenate((np.zeros(1, np.int64), np.cumsum(num_ids)))
    place = np.arange(int(offsets[-1])) - np.repeat(offsets[:-1], num_ids)
    common = place < np.repeat(np.minimum(which % 4 + 1, num_ids), num_ids)
    ids = np.where(common, np.repeat(which, num_ids) * 4 + place, 1000 + np.arange(len(place)))
    return replace(trace, hash_offsets=offsets, hash_ids=ids, hash_block_tokens=512)


def write_traces(folder: Path, trace: Trace) -> list[Path]:
    """The same requests in four formats."""
    times = (trace.arrival_s * 1e6).astype(np.int64)
    tokens = (pa.array(trace.input_tokens), pa.array(trace.output_tokens))
    total = pa.array(trace.input_tokens + trace.output_tokens)
    model = pa.array(["GPT-4"] * len(trace))
    kind = pa.array(["API log"] * len(trace))
    dates = pa.array(times + 1_700_000_000_000_000, pa.timestamp("us"))
    tables = {
        "plain.csv": (
            ["arrival_s", "input_tokens", "output_tokens"],
            [pa.array(trace.arrival_s), *tokens],
        ),
        "azure.csv": (["TIMESTAMP", "ContextTokens", "GeneratedTokens"], [dates, *tokens]),
        "burstgpt.csv": (
            ["Timestamp", "Model", "Request tokens", "Response tokens", "Total tokens", "Log Type"],
            [pa.array(times // 1_000_000), model, *tokens, total, kind],
        ),
    }
    paths = []
    for name, (names, columns) in tables.items():
        paths.append(folder / name)
        pyarrow.csv.write_csv(pa.table(columns, names=names), paths[-1])
    paths.append(folder / "mooncake.jsonl")
    shared = with_prefixes(trace, 0)
    with paths[-1].open("w") as file:
        for i in range(len(trace)):
            row = {
                "timestamp": int(times[i] // 1000),
                "input_length": int(trace.input_tokens[i]),
                "output_length": int(trace.output_tokens[i]),
                "hash_ids": shared.hash_ids[
                    shared.hash_offsets[i] : shared.hash_offsets[i + 1]
                ].tolist(),
            }
            file.write(json.dumps(row) + "\n")
    return paths


if __name__ == "__main__":
    main()
