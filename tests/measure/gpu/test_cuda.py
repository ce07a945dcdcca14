"""The real device behind `GpuRuntime`: what the simulated one assumes, seen on hardware."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import pytest
import torch

from attnbench.backends.batch import make_batch
from attnbench.backends.registry import get_backend_class
from attnbench.errors import TimerError
from attnbench.measure.gpu.cuda import CudaRuntime
from attnbench.measure.gpu.layout import COLD_FACTOR
from attnbench.measure.gpu.runtime import GpuRuntime
from attnbench.measure.gpu.timers import GpuTimer
from attnbench.measure.options import GPU_TIMERS
from attnbench.measure.plan import PlannedPoint
from attnbench.measure.point import refusals
from attnbench.measure.prepare import prepare
from attnbench.measure.sampling import Target, sample
from attnbench.measure.stopping import StoppingRule
from attnbench.measure.timers import Subject
from attnbench.selection import current_device
from attnbench.workload import Workload

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device here"),
]

SUBJECT = Subject(Workload.parse("8q1s4k"), "FLASH_ATTN", "attention", 0)
MIB = 1 << 20


class Copy:
    """Reads and writes `size` bytes each; the output tells whether it ran."""

    def __init__(self, size: int = 8 * MIB) -> None:
        self.source = torch.ones(size, dtype=torch.uint8, device="cuda")
        self.target = torch.zeros_like(self.source)

    def __call__(self) -> None:
        self.target.copy_(self.source)

    def twins(self, count: int) -> Sequence[Callable[[], object]]:
        return [Copy(self.source.numel()) for _ in range(count)]


def median_us(timer: str, call: Copy, l2_state: str) -> float:
    target = Target(call, 2 * call.source.numel(), call.twins, call.target.zero_)
    session = GpuTimer(timer).open(target, SUBJECT, l2_state)
    timing = sample(session, StoppingRule(0.01, 1.0, 30, 2000), target)
    assert timing.l2_state == l2_state
    if l2_state == "cold":
        l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
        assert timing.reuse_distance_bytes is not None
        assert timing.reuse_distance_bytes >= COLD_FACTOR * l2_bytes
    assert bool((call.target == 1).all())
    assert all(5e8 < clock < 3e9 for clock in timing.sm_clock_hz if clock == clock)
    return statistics.median(timing.samples) * 1e6


@pytest.mark.parametrize("l2_state", ["cold", "hot"])
def test_timers_agree(l2_state: str) -> None:
    call = Copy()
    times = {timer: median_us(timer, call, l2_state) for timer in GPU_TIMERS}
    assert times["graph"] == pytest.approx(times["cupti_span"], rel=0.1, abs=3.0)
    assert times["event"] == pytest.approx(times["cupti_span"], rel=0.1, abs=6.0)
    assert times["cupti_sum"] == pytest.approx(times["cupti_span"], rel=0.02, abs=0.2)


@pytest.mark.parametrize("timer", GPU_TIMERS)
def test_cold_is_slower_than_hot_for_data_that_fits_the_cache(timer: str) -> None:
    call = Copy()
    assert median_us(timer, call, "cold") > 1.1 * median_us(timer, call, "hot")


@pytest.mark.parametrize("timer", GPU_TIMERS)
def test_floor_is_microseconds(timer: str) -> None:
    assert 0 < GpuTimer(timer).floor_s() < 20e-6


@pytest.mark.parametrize("timer", GPU_TIMERS)
def test_a_call_that_waits_for_the_device_is_refused(timer: str) -> None:
    source = torch.ones(1000, device="cuda")

    def call() -> None:
        float(source.sum())

    with pytest.raises(TimerError):
        GpuTimer(timer).open(Target(call), SUBJECT, "hot").block()
    torch.cuda.synchronize()  # a failed capture leaves nothing behind
    assert float(source.sum()) == 1000
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert bool(torch.rand(1000, device="cuda").isfinite().all())
    assert GpuTimer(timer).floor_s() > 0


@pytest.mark.parametrize("backend", ["TORCH_SDPA", "TRITON_ATTN", "FLASH_ATTN"])
def test_twice_the_cache_flushes_it_as_well_as_eight_times(backend: str) -> None:
    """Kernels may ask the cache to keep what they read; then bytes written would prove little."""
    planned = PlannedPoint(Workload.parse("16q1s1k block=64"), backend)
    device = current_device()
    if reasons := refusals(planned, device):
        pytest.skip(f"{backend}: {reasons[0]}")
    threshold = get_backend_class(backend).get_builder_cls().reorder_batch_threshold
    with torch.no_grad():
        point = prepare(planned, make_batch(planned.workload, "cuda", threshold))
        gpu = CudaRuntime()
        times: dict[int, list[float]] = {}
        for flushes in (1, 4, 1, 4):
            often = FlushingOften(gpu, flushes)
            timer = GpuTimer("event", make_gpu=partial(cast, GpuRuntime, often))
            target = Target(point.attend, 64 * MIB)
            timing = sample(
                timer.open(target, SUBJECT, "cold"), StoppingRule(0.003, 1.0, 30, 2000), target
            )
            times.setdefault(flushes, []).append(statistics.median(timing.samples))
    assert min(times[1]) == pytest.approx(min(times[4]), rel=0.02, abs=0.5e-6)


class FlushingOften:
    """A runtime that writes over the cache several times."""

    def __init__(self, gpu: CudaRuntime, times: int) -> None:
        self._gpu = gpu
        self._times = times

    def __getattr__(self, name: str) -> Any:
        return getattr(self._gpu, name)

    def flush_l2(self) -> int:
        return sum(self._gpu.flush_l2() for _ in range(self._times))


def test_events_read_a_delay_of_known_length() -> None:
    gpu = GpuTimer("event").gpu
    start, end = gpu.new_event(), gpu.new_event()
    for _ in range(2):
        start.record()
        gpu.delay(5e-3)
        end.record()
        gpu.synchronize()
    # Cycles at the rated clock: longer where the device runs slower, never shorter.
    assert 0.95 * 5e-3 < end.elapsed_s(start) < 5 * 5e-3
