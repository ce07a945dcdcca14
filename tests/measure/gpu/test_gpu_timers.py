"""GPU timers on a simulated device: every duration they should read is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from attnbench.errors import TimerError
from attnbench.measure.gpu.clock import MAX_LOST_BLOCKS, RECOVERY_S
from attnbench.measure.gpu.layout import COLD_FACTOR, plan_layout
from attnbench.measure.gpu.timers import GpuTimer
from attnbench.measure.options import GPU_TIMERS
from attnbench.measure.sampling import Target, Timing, sample
from attnbench.measure.stopping import StoppingRule, StopReason
from attnbench.measure.timers import Subject, WallTimer
from attnbench.workload import Workload
from tests.measure.gpu.simulated import SimulatedGpu

SUBJECT = Subject(Workload.parse("8q1s4k"), "FLASH_ATTN", "attention", 0)
MB = 1_000_000


class Attention:
    """A call of two kernels over 20 MB: 20 + 10 µs from the cache, 30 + 15 µs from memory."""

    hot_s = (20e-6, 10e-6)
    cold_s = (30e-6, 15e-6)

    def __init__(self, gpu: SimulatedGpu, name: str = "kv0", size: int = 20 * MB) -> None:
        self.gpu = gpu
        self.name = name
        self.size = size
        self.copies_made = 0

    def __call__(self) -> None:
        names = ("split", "combine")
        for kernel, hot, cold in zip(names, self.hot_s, self.cold_s, strict=True):
            # The second kernel reads what the first left in the cache, and its own data.
            self.gpu.kernel(kernel, hot, cold, {f"{self.name}-{kernel}": self.size // 2})

    def copies(self, count: int) -> Sequence[Callable[[], object]]:
        self.copies_made = count
        return [Attention(self.gpu, f"kv{1 + index}", self.size) for index in range(count)]


def rule() -> StoppingRule:
    return StoppingRule(target_rel_ci=0.01, budget_s=1.0, min_samples=5, max_samples=500)


def timed(
    gpu: SimulatedGpu, timer: str, call: Callable[[], object], l2_state: str = "cold"
) -> Timing:
    copies = call.copies if isinstance(call, Attention) else None
    size = getattr(call, "size", 0)
    target = Target(call, size, copies, copy_bytes=size)
    session = GpuTimer(timer, make_gpu=lambda: gpu).open(target, SUBJECT, l2_state)
    return sample(session, rule(), target)


def true_seconds(gpu: SimulatedGpu, timer: str, kernels: tuple[float, ...]) -> float:
    """What an ideal device would let each timer read."""
    gaps = gpu.gap_s * (len(kernels) - 1)
    if timer == "cupti_sum":
        return sum(kernels)
    if timer == "cupti_span":
        return sum(kernels) + gaps
    # An event pair also holds the gap before the first kernel and the second event.
    return sum(kernels) + gaps + gpu.gap_s + gpu.event_cost_s


@pytest.mark.parametrize("l2_state", ["cold", "hot"])
@pytest.mark.parametrize("timer", GPU_TIMERS)
def test_reads_the_kernel_and_nothing_of_the_host(timer: str, l2_state: str) -> None:
    gpu = SimulatedGpu(launch_s=50e-6)  # a host far slower than the kernels
    call = Attention(gpu)
    timing = timed(gpu, timer, call, l2_state)
    kernels = call.cold_s if l2_state == "cold" else call.hot_s
    assert timing.samples == pytest.approx(
        [true_seconds(gpu, timer, kernels)] * len(timing.samples), rel=1e-6
    )
    assert timing.l2_state == l2_state
    assert timing.stop_reason is StopReason.CONVERGED
    assert timing.sm_clock_hz == pytest.approx([2e9] * len(timing.samples), rel=1e-3)


@pytest.mark.parametrize("timer", GPU_TIMERS)
def test_floor_is_what_an_empty_kernel_reads(timer: str) -> None:
    gpu = SimulatedGpu()
    floor = GpuTimer(timer, make_gpu=lambda: gpu).floor_s()
    assert floor == pytest.approx(true_seconds(gpu, timer, (gpu.empty_kernel_s,)), rel=1e-6)


@pytest.mark.parametrize("timer", ["event", "cupti_span"])
def test_a_full_launch_queue_shrinks_the_block_instead_of_reading_the_host(timer: str) -> None:
    gpu = SimulatedGpu(launch_s=20e-6, queue_depth=40)
    call = Attention(gpu)
    timing = timed(gpu, timer, call)
    right = true_seconds(gpu, timer, call.cold_s)
    assert timing.samples == pytest.approx([right] * len(timing.samples), rel=1e-6)
    assert timing.discarded > 0


@pytest.mark.parametrize("timer", ["event", "cupti_span", "cupti_sum", "graph"])
def test_a_call_that_waits_for_the_device_is_refused(timer: str) -> None:
    gpu = SimulatedGpu()

    def call() -> None:
        gpu.kernel("first", 10e-6)
        gpu.sync_call()
        gpu.kernel("second", 10e-6)

    with pytest.raises(TimerError, match=r"use --timer (wall|event)"):
        timed(gpu, timer, call)


def test_rotation_reaches_twice_the_cache_before_a_copy_comes_again() -> None:
    gpu = SimulatedGpu()
    call = Attention(gpu)
    timing = timed(gpu, "graph", call)
    assert call.copies_made * call.size >= COLD_FACTOR * gpu.l2_bytes
    assert timing.reuse_distance_bytes == call.copies_made * call.size
    assert timing.l2_state == "cold"
    assert "memset" not in {record.name for record in gpu.log}
    assert timing.kernel_names == ("split", "combine")


def test_a_small_input_that_cannot_rotate_is_flushed_inside_the_graph() -> None:
    gpu = SimulatedGpu()
    call = Attention(gpu, size=MB)  # would need 120 copies
    timing = timed(gpu, "graph", call)
    assert call.copies_made == 0
    assert timing.reuse_distance_bytes == 2 * gpu.l2_bytes
    assert timing.samples[0] == pytest.approx(true_seconds(gpu, "graph", call.cold_s), rel=1e-6)


def test_copies_that_do_not_fit_the_memory_are_not_made() -> None:
    # A window over a long context: a call touches little of what a copy holds.
    gpu = SimulatedGpu()
    call = Attention(gpu)
    share = gpu.memory_bytes // 4 // 6  # six copies of 20 MB are twice the cache
    fits = plan_layout(Target(call, call.size, call.copies, copy_bytes=share), gpu, "cold", True)
    assert (fits.flush, len(fits.calls), call.copies_made) == (False, 7, 6)
    call.copies_made = 0
    target = Target(call, call.size, call.copies, copy_bytes=share + 1)
    too_large = plan_layout(target, gpu, "cold", True)
    assert (too_large.flush, len(too_large.calls), call.copies_made) == (True, 1, 0)
    assert too_large.l2_state == "cold"


def test_the_flush_takes_over_where_others_hold_the_memory() -> None:
    gpu = SimulatedGpu()

    def copies(count: int) -> Sequence[Callable[[], object]]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    layout = plan_layout(Target(Attention(gpu), 20 * MB, copies), gpu, "cold", True)
    assert (layout.flush, layout.l2_state) == (True, "cold")


def test_a_flush_that_is_too_small_proves_nothing() -> None:
    gpu = SimulatedGpu(flush_factor=1)
    layout = plan_layout(Target(Attention(gpu)), gpu, "cold")
    assert (layout.l2_state, layout.reuse_distance_bytes) == ("unknown", gpu.l2_bytes)
    unknown = SimulatedGpu(l2_bytes=0)
    assert plan_layout(Target(Attention(unknown)), unknown, "cold").l2_state == "unknown"


@pytest.mark.parametrize("timer", GPU_TIMERS)
def test_samples_below_the_clock_are_thrown_away_and_counted(timer: str) -> None:
    # Every millisecond the device runs at half its clock for 0.3 ms.
    gpu = SimulatedGpu(clock_hz=lambda at_s: 1e9 if at_s % 1e-3 < 3e-4 else 2e9)
    call = Attention(gpu)
    timing = timed(gpu, timer, call)
    right = true_seconds(gpu, timer, call.cold_s)
    slow = sum(sample_s > 1.2 * right for sample_s in timing.samples)
    assert timing.discarded > 0
    assert slow <= 0.1 * len(timing.samples)  # only those that began at full clock
    assert min(timing.sm_clock_hz) >= 0.75 * gpu.rated_clock_hz


def test_a_device_that_never_runs_at_its_clock_ends_throttled() -> None:
    gpu = SimulatedGpu(clock_hz=lambda at_s: 1.2e9)
    timing = timed(gpu, "event", Attention(gpu))
    assert timing.stop_reason is StopReason.THROTTLED
    assert timing.samples == ()
    assert timing.discarded > 0
    assert gpu.host_s >= (MAX_LOST_BLOCKS - 1) * RECOVERY_S  # it was left to rest


def test_a_graph_that_runs_other_kernels_than_the_call_is_refused() -> None:
    gpu = SimulatedGpu()

    def call() -> None:
        # A library that falls back while it is being captured.
        gpu.kernel("slow" if gpu.is_capturing else "fast", 10e-6)

    with pytest.raises(TimerError, match=r"\['slow'\], the call \['fast'\]"):
        timed(gpu, "graph", call)


def test_what_a_captured_call_returned_is_what_replays_write_to() -> None:
    gpu = SimulatedGpu()
    returned: list[str] = []

    def call() -> None:
        gpu.kernel("attention", 10e-6)
        returned.append("captured" if gpu.is_capturing else "eager")

    timed(gpu, "graph", call, "hot")
    assert returned[0] == "eager"
    assert returned[-1] == "captured"


def test_running_out_of_memory_is_not_called_a_call_that_cannot_be_captured() -> None:
    gpu = SimulatedGpu()

    def call() -> None:
        if gpu.is_capturing:
            raise torch.OutOfMemoryError("CUDA out of memory")
        gpu.kernel("attention", 10e-6)

    with pytest.raises(torch.OutOfMemoryError):
        timed(gpu, "graph", call, "hot")


@pytest.mark.parametrize("timer", ["cupti_span", "cupti_sum"])
def test_a_lost_kernel_in_the_middle_of_a_call_is_not_a_shorter_time(timer: str) -> None:
    gpu = SimulatedGpu(lose="combine")
    with pytest.raises(TimerError, match="CUPTI lost records, or the call"):
        timed(gpu, timer, Attention(gpu))
    whole = SimulatedGpu()
    assert timed(whole, timer, Attention(whole)).kernel_names == ("split", "combine")


def test_lost_trace_records_are_not_a_time() -> None:
    gpu = SimulatedGpu(lose_every=7)
    with pytest.raises(TimerError, match="CUPTI lost records"):
        timed(gpu, "cupti_span", Attention(gpu))


@pytest.mark.parametrize("timer", GPU_TIMERS)
def test_a_slow_device_has_a_floor_too(timer: str) -> None:
    gpu = SimulatedGpu(clock_hz=lambda at_s: 1e9)
    floor = GpuTimer(timer, make_gpu=lambda: gpu).floor_s()
    assert floor == pytest.approx(true_seconds(gpu, timer, (gpu.empty_kernel_s,)), rel=1e-6)


def test_a_call_that_launches_nothing_is_refused() -> None:
    gpu = SimulatedGpu()
    with pytest.raises(TimerError, match="left no kernel"):
        timed(gpu, "cupti_sum", lambda: None)


def test_outputs_are_poisoned_before_every_block() -> None:
    gpu = SimulatedGpu()
    poisoned: list[int] = []
    call = Attention(gpu)
    target = Target(call, call.size, call.copies, lambda: poisoned.append(gpu.launches))
    session = GpuTimer("graph", make_gpu=lambda: gpu).open(target, SUBJECT, "hot")
    blocks = 4
    tight = StoppingRule(0.01, 1.0, min_samples=64 * blocks, max_samples=1000)
    sample(session, tight, target)
    assert len(poisoned) == blocks


def test_host_time_is_the_launch_and_not_the_kernel() -> None:
    gpu = SimulatedGpu(launch_s=5e-6)
    timer = GpuTimer("event", make_gpu=lambda: gpu)
    assert timer.host.name == "wall"
    backlog_s: list[float] = []

    def call() -> None:
        backlog_s.append(gpu.device_s - gpu.host_s)
        gpu.kernel("attention", 0.2)

    target = Target(call)
    session = timer.host.open(target, SUBJECT, "cold")
    assert len(backlog_s) == 1  # seconds of kernels are not for warming up a launch
    session.block()
    gpu.synchronize()
    WallTimer(0.005, gpu.synchronize).open(target, SUBJECT, "cold")
    assert max(backlog_s) <= 0  # no call waits behind another
