"""The two real traces, where a checkout has them, and their schedules on an H200's roofline."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest

from attnbench.traffic.latency import AttentionRoofline, DeviceRates, LinearRoofline, SumOfParts
from attnbench.traffic.latency_linear import linear_sizes
from attnbench.traffic.reduce_features import Batches
from attnbench.traffic.schedule import schedule
from attnbench.traffic.schedule_settings import SchedulerSettings
from attnbench.traffic.trace import first_requests, load_trace
from attnbench.traffic.types import Floats, StepBatches, Trace
from attnbench.workload import Workload

TRACES = {"azure": "azure_llm_2023_code.csv", "mooncake": "mooncake_synthetic.jsonl"}
H200 = DeviceRates(4.8e12, 989.4e12)
LAYER = Workload.parse("q1 shape=llama-3-8b")
_FOLDER = Path(__file__).resolve().parents[3] / "shared" / "traces"


@functools.cache
def real_trace(name: str, num_requests: int = 4000) -> Trace:
    """The first requests of a real trace; skips the test where the file is not."""
    path = _FOLDER / TRACES[name]
    if not path.is_file():
        pytest.skip(f"the trace {path.name} is not beside this checkout, in ../shared/traces")
    return first_requests(load_trace(path), num_requests)


@functools.cache
def real_steps(name: str, num_requests: int = 4000) -> StepBatches:
    """Served by Llama 3 8B on one H200 at its roofline."""
    clock = SumOfParts(
        [AttentionRoofline(LAYER, H200), LinearRoofline(linear_sizes("llama-3-8b"), H200)]
    )
    return schedule(real_trace(name, num_requests), SchedulerSettings(), clock)


def batches_of_workloads(workloads: tuple[Workload, ...]) -> Batches:
    offsets = np.cumsum([0, *(workload.num_reqs for workload in workloads)])
    requests = [request for workload in workloads for request in workload.requests]
    query = np.array([request.query_len for request in requests])
    tokens = np.array([request.seq_len for request in requests])
    return Batches(offsets, query, tokens - query)


def window_of(steps: StepBatches, window: slice) -> Batches:
    offsets = steps.step_offsets[window.start : window.stop + 1]
    entries = slice(int(offsets[0]), int(offsets[-1]))
    return Batches(offsets - offsets[0], steps.query_len[entries], steps.context_len[entries])


def rugged_seconds(batches: Batches) -> Floats:
    """A made-up kernel on 132 multiprocessors, nothing of which is a feature of a step.

    Whole waves of tiles, contexts in chunks of 64 tokens, decodes split over idle multiprocessors
    while there are any, and a step's time jumps where one of these does.
    """
    seconds = np.zeros(len(batches))
    for step in range(len(batches)):
        entries = slice(int(batches.step_offsets[step]), int(batches.step_offsets[step + 1]))
        query, context = batches.query_len[entries], batches.context_len[entries]
        short, tokens = query <= 16, context + query
        time = 3e-6
        if short.any():
            tiles = 8 * int(short.sum())
            splits = 1
            if tiles < 105:
                splits = max(1, min(132 // tiles, int(tokens[short].max()) // 512))
            chunks = np.ceil(tokens[short] / splits / 64) * 64
            waves = np.ceil(tiles * splits / 264)
            time += 8 * splits * chunks.sum() * 512 / 4e12 + 2e-6 * waves + 2e-6 * (splits > 1)
        if not short.all():
            rows = np.ceil(query[~short] / 128)
            tiles = 32 * int(rows.sum())
            work = (rows * 128 * (tokens[~short] - query[~short] / 2)).sum() * 32 * 512
            time += work / 6e14 * np.ceil(tiles / 132) * 132 / tiles + 3e-6
        seconds[step] = time
    return seconds
