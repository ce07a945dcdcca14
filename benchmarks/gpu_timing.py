"""How far GPU times can be trusted, and what a sweep costs: the tables of docs/gpu-timing.md.

    python benchmarks/gpu_timing.py [--part timers|repeat|rate|memory] [--backend FLASH_ATTN]

    timers   every timer on the same calls, cold and hot, beside triton.testing's two
    repeat   medians of separate processes against each other
    rate     points a second over a decode sweep, the GPU's busy share, the same by do_bench
    memory   host memory over 10,000 points (runs on a CPU too: --backend CPU_ATTN)

Prints Markdown with date, device and versions. Each part takes minutes; without --part all four
run. `memory` needs as long as the rate says: --points 3000 shows a leak too.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch

from attnbench.backends.batch import make_batch
from attnbench.backends.registry import get_backend_class
from attnbench.errors import TimerError
from attnbench.measure import MeasureOptions, PlannedPoint, plan_workloads, run_sweep
from attnbench.measure.environment import read_environment
from attnbench.measure.gpu.timers import GpuTimer
from attnbench.measure.header import new_header
from attnbench.measure.options import GPU_TIMERS, default_timer
from attnbench.measure.prepare import PreparedPoint, prepare
from attnbench.measure.sampling import Target, sample
from attnbench.measure.stopping import StoppingRule
from attnbench.measure.timers import Subject
from attnbench.selection import current_device
from attnbench.store import ResultsFolder
from attnbench.store.record import Measurement, Metric
from attnbench.workload import Workload
from attnbench.workload.cost import attention_bytes

SPECS = ("1q1s1k", "1q1s32k", "16q1s4k", "64q1s1k", "64q1s8k", "256q1s2k", "q2k", "2q2k_32q1s1k")
BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256)
CONTEXTS = range(512, 8192 + 1, 256)
PROCESSES = 5

#: Kernels at least this long are held to a relative bound, shorter ones to an absolute one.
LONG_S = 20e-6


def prepared(spec: str, backend: str) -> tuple[PlannedPoint, PreparedPoint]:
    (planned,) = plan_workloads([Workload.parse(spec)], [backend], current_device())
    threshold = get_backend_class(planned.backend).get_builder_cls().reorder_batch_threshold
    return planned, prepare(planned, make_batch(planned.workload, "cuda", threshold))


def median_us(
    planned: PlannedPoint, point: PreparedPoint, timer: GpuTimer, l2_state: str, rotate: bool
) -> float:
    """NaN where the timer cannot time the call. Without `rotate` every timer flushes the cache."""

    def twins(count: int) -> list[Callable[[], object]]:
        return [point.twin().attend for _ in range(count)]

    target = Target(
        point.attend,
        attention_bytes(planned.workload),
        twins if rotate else None,
        point.poison,
        point.twin_bytes,
    )
    subject = Subject(planned.workload, planned.backend, Metric.ATTENTION, 0)
    rule = StoppingRule(target_rel_ci=0.003, budget_s=1.0, min_samples=30, max_samples=2000)
    try:
        timing = sample(timer.open(target, subject, l2_state), rule, target)
    except TimerError as error:
        print(f"{timer.name}, {planned.workload.text}: {error}", file=sys.stderr)
        return math.nan
    return statistics.median(timing.samples or [math.nan]) * 1e6


def timers_table(backend: str) -> Iterator[str]:
    from triton.testing import do_bench, do_bench_cudagraph

    timers = {name: GpuTimer(name) for name in GPU_TIMERS}
    floors = {name: timer.floor_s() * 1e6 for name, timer in timers.items()}
    yield "Floor (empty kernel), µs: " + ", ".join(f"{n} {f:.2f}" for n, f in floors.items())
    yield "Net: less the timer's floor, but for the empty kernel itself as `cupti_span` reads it."
    yield ""
    yield (
        "| workload | L2 | cupti_span | cupti_sum | graph | event | graph off | graph net off | "
        "event off | event net off | graph, rotating | do_bench | do_bench_cudagraph |"
    )
    yield "|---|---|" + "---:|" * 11
    for spec in SPECS:
        planned, point = prepared(spec, backend)
        others = [
            f"{bench(point.attend, return_mode='median') * 1e3:.2f}"
            for bench in (do_bench, do_bench_cudagraph)
        ]
        for l2_state in ("cold", "hot"):
            us = {n: median_us(planned, point, t, l2_state, False) for n, t in timers.items()}
            span = us["cupti_span"]
            shown = [f"{us[name]:.2f}" for name in ("cupti_span", "cupti_sum", "graph", "event")]
            for name in ("graph", "event"):
                own = floors[name] - floors["cupti_span"]
                shown += [offset(us[name], span), offset(us[name] - own, span)]
            if l2_state == "cold":
                rotating = median_us(planned, point, timers["graph"], l2_state, True)
                shown += [f"{rotating:.2f}", *others]
            else:
                shown += ["", "", ""]
            yield f"| {spec} | {l2_state} | " + " | ".join(shown) + " |"


def offset(us: float, span_us: float) -> str:
    """Distance to the CUPTI span, and whether it is within 1 % (0.3 µs below 20 µs)."""
    off = us - span_us
    within = abs(off) <= (0.01 * span_us if span_us >= LONG_S * 1e6 else 0.3)
    return f"{off:+.2f} µs ({off / span_us:+.1%}) {'ok' if within else 'MISSED'}"


def sweep(
    plan: Sequence[PlannedPoint],
    options: MeasureOptions,
    progress: Callable[[Sequence[Measurement], int, int], None],
) -> float:
    """Wall seconds of a sweep into a folder that is thrown away."""
    device = current_device()
    environment = read_environment(device)
    with tempfile.TemporaryDirectory() as folder:
        header = new_header(plan, options, environment)
        with ResultsFolder(Path(folder)).open_run(header) as run:
            started = time.perf_counter()
            run_sweep(plan, run, options, device, environment, progress)
            seconds = time.perf_counter() - started
            run.seal()
    return seconds


def decode_plan(backend: str, limit: int | None = None) -> list[PlannedPoint]:
    specs = [f"{batch}q1s{context}" for context in CONTEXTS for batch in BATCHES]
    workloads = [Workload.parse(spec) for spec in specs]
    step = 1 if limit is None else max(1, len(workloads) // limit)
    return plan_workloads(workloads[::step], [backend], current_device())


def repeat_table(backend: str) -> Iterator[str]:
    plan = decode_plan(backend, limit=60)
    yield "| timer | points >= 20 µs | within 1 % | worst |"
    yield "|---|---|---|---|"
    for timer in GPU_TIMERS:
        options = MeasureOptions(timer=timer, replicates=PROCESSES, target_rel_ci=0.005)
        medians: dict[str, list[float]] = {}

        def keep(
            rows: Sequence[Measurement],
            done: int,
            total: int,
            medians: dict[str, list[float]] = medians,
        ) -> None:
            if rows[0].samples:
                medians.setdefault(rows[0].point_id, []).append(statistics.median(rows[0].samples))

        sweep(plan, options, keep)
        spreads = [
            max(abs(m / statistics.median(many) - 1) for m in many)
            for many in medians.values()
            if statistics.median(many) >= LONG_S
        ]
        share = sum(spread <= 0.01 for spread in spreads) / max(1, len(spreads))
        yield f"| {timer} | {len(spreads)} | {share:.0%} | {max(spreads, default=0):.2%} |"


@contextmanager
def busy_share() -> Iterator[list[float]]:
    """Percent of time the GPU ran a kernel, by NVML, ten times a second; empty without NVML."""
    seen: list[float] = []
    stop = threading.Event()

    def watch() -> None:
        try:
            import pynvml

            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        except Exception:  # no NVML: the share is not printed
            return
        while not stop.wait(0.1):
            seen.append(float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def rate_table(backend: str) -> Iterator[str]:
    from triton.testing import do_bench

    plan = decode_plan(backend)
    options = MeasureOptions(timer=default_timer("cuda"), budget_s=0.05)
    statuses: Counter[str] = Counter()
    timed_s = 0.0

    def count(rows: Sequence[Measurement], done: int, total: int) -> None:
        nonlocal timed_s
        statuses[rows[0].status] += 1
        timed_s += sum(sum(row.samples) for row in rows)

    sweep(plan[:5], options, lambda *_: None)
    with busy_share() as busy:
        seconds = sweep(plan, options, count)
    share = f"{statistics.mean(busy):.0f} %" if busy else "unknown (no NVML)"
    yield f"{len(plan)} points in {seconds:.1f} s: {len(plan) / seconds:.1f} points/s, checked;"
    found = ", ".join(f"{status} {number}" for status, number in statuses.most_common())
    yield (
        f"GPU busy {share} of the time, inputs, reference, delays and flushes included; in timed "
        f"calls {timed_s / seconds:.1%}. Statuses: {found}."
    )
    started = time.perf_counter()
    for planned in plan:
        _, point = prepared(planned.workload.text, backend)
        do_bench(point.attend)
    looped = time.perf_counter() - started
    yield f"The same points by do_bench, unchecked: {looped:.1f} s, ratio {looped / seconds:.2f}."


def memory_table(backend: str, count: int) -> Iterator[str]:
    workloads = [Workload.parse(f"1q1s64 tp=8 seed={index}") for index in range(count)]
    plan = plan_workloads(workloads, [backend], current_device())
    options = MeasureOptions(
        timer=default_timer(current_device().kind), budget_s=0.001, min_samples=3, max_samples=3
    )
    seen: dict[int, float] = {}

    def look(rows: Sequence[Measurement], done: int, total: int) -> None:
        if done in (count // 10, count):
            mine = psutil.Process()
            every = [mine, *mine.children(recursive=True)]
            seen[done] = sum(process.memory_info().rss for process in every) / 2**20

    seconds = sweep(plan, options, look)
    first, last = seen[count // 10], seen[count]
    yield f"{count} points in {seconds:.0f} s: host memory of the program and its worker"
    yield f"{first:.0f} MiB after a tenth, {last:.0f} MiB at the end: {last - first:+.1f} MiB."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", choices=["timers", "repeat", "rate", "memory"], action="append")
    parser.add_argument("--backend", default="FLASH_ATTN")
    parser.add_argument("--points", type=int, default=10_000, help="of part memory")
    args = parser.parse_args()
    environment = read_environment(current_device())
    print(
        f"{datetime.now(UTC):%Y-%m-%d}, {environment.device_name}, driver "
        f"{environment.driver_version or 'none'}; {', '.join(environment.stack)}"
    )
    tables = {
        "timers": lambda: timers_table(args.backend),
        "repeat": lambda: repeat_table(args.backend),
        "rate": lambda: rate_table(args.backend),
        "memory": lambda: memory_table(args.backend, args.points),
    }
    for part in args.part or tables:
        print(f"\n## {part}, {args.backend}\n", flush=True)
        with torch.no_grad():
            for line in tables[part]():
                print(line, flush=True)


if __name__ == "__main__":
    main()
