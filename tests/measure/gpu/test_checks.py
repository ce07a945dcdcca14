"""The self-test against simulated devices: healthy ones pass, each lie is found out and named."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from attnbench.measure.checks import CheckResult
from attnbench.measure.gpu.ceilings import Probe
from attnbench.measure.gpu.checks import (
    check_canary,
    check_clock,
    check_conditions,
    check_rates,
    check_timers,
)
from attnbench.measure.gpu.runtime import Event, KernelRecord, Stamp
from attnbench.measure.options import GPU_TIMERS
from tests.measure.gpu.simulated import SimulatedEvent, SimulatedGpu


def _probes(gpu: SimulatedGpu, bytes_per_s: float, flops_per_s: float) -> Iterable[Probe]:
    def probe(name: str, amount: float, rate: float) -> Probe:
        return Probe(name, lambda: gpu.kernel(name, amount / rate), amount)

    return [
        probe("copy", 2e9, bytes_per_s),
        probe("read", 1e9, 0.99 * bytes_per_s),
        probe("bf16", 1e12, flops_per_s),
    ]


def test_a_healthy_device_passes() -> None:
    gpu = SimulatedGpu()
    found, timers = check_timers(gpu)
    assert found.result is CheckResult.OK, found
    assert set(timers) == set(GPU_TIMERS)
    assert all(0 < floor < 5e-6 for floor in found.values.values())
    canary = check_canary(gpu, timers)
    assert canary.result is CheckResult.OK, canary
    assert canary.values["true_s"] == pytest.approx(8e-3, rel=1e-3)
    for name in timers:
        assert canary.values[f"{name}_ratio"] == pytest.approx(1.0, abs=1e-3)
        assert abs(canary.values[f"{name}_short_error_s"]) < 3e-7
    clock = check_clock(gpu)
    assert clock.result is CheckResult.OK, clock
    assert clock.values["sm_clock_hz"] == pytest.approx(2e9, rel=1e-3)


def test_without_a_profiler_the_other_timers_go_on() -> None:
    gpu = SimulatedGpu(trace_missing="no CUPTI; pip install cupti-python")
    found, timers = check_timers(gpu)
    assert found.result is CheckResult.WARN
    assert set(timers) == {"event", "graph"}
    assert "cupti_span, cupti_sum: no CUPTI; pip install cupti-python" in found.meaning
    assert check_canary(gpu, timers).result is CheckResult.OK


def test_no_timer_at_all_is_a_failure_and_the_canary_is_not_run() -> None:
    class Deaf(SimulatedGpu):
        def new_event(self) -> Event:
            raise RuntimeError("CUDA error: operation not supported\nsecond line")

    gpu = Deaf(trace_missing="no CUPTI")
    found, timers = check_timers(gpu)
    assert (found.result, timers) == (CheckResult.FAIL, {})
    assert "CUDA error: operation not supported" in found.measured
    assert "second line" not in found.measured
    assert check_canary(gpu, timers).result is CheckResult.NOT_RUN


def test_events_that_stretch_time_are_named() -> None:
    class Stretched(SimulatedEvent):
        def elapsed_s(self, since: Event) -> float:
            return 1.03 * super().elapsed_s(since)

    class Gpu(SimulatedGpu):
        def new_event(self) -> Event:
            return Stretched(self)

    gpu = Gpu()
    _, timers = check_timers(gpu)
    canary = check_canary(gpu, timers)
    assert canary.result is CheckResult.FAIL
    assert "event, graph do not tell the device's time" in canary.meaning
    assert canary.mend.endswith("--timer cupti_span")
    assert canary.values["event_ratio"] == pytest.approx(1.03, abs=1e-3)


def test_a_trace_that_loses_a_few_microseconds_is_named() -> None:
    class Gpu(SimulatedGpu):
        def trace(self):  # type: ignore[no-untyped-def]
            from contextlib import contextmanager

            @contextmanager
            def clipped():  # type: ignore[no-untyped-def]
                with SimulatedGpu.trace(self) as records:
                    yield records
                records[:] = [
                    KernelRecord(r.name, r.start_s, r.end_s - 3e-6 * (r.name == "spin"))
                    for r in records
                ]

            return clipped()

    gpu = Gpu()
    _, timers = check_timers(gpu)
    canary = check_canary(gpu, timers)
    assert canary.result is CheckResult.WARN
    assert "cupti_span" in canary.meaning
    assert "event" not in canary.meaning
    assert canary.values["cupti_sum_short_error_s"] == pytest.approx(-3e-6, abs=3e-7)


def test_a_device_without_stamps_is_held_against_the_hosts_clock() -> None:
    gpu = SimulatedGpu(has_stamps=False)
    _, timers = check_timers(gpu)
    canary = check_canary(gpu, timers)
    assert canary.result is CheckResult.OK, canary
    assert "by the host's clock" in canary.measured
    assert check_clock(gpu).result is CheckResult.NOT_RUN


def test_a_wandering_clock_changes_timer_and_witness_alike() -> None:
    class Gpu(SimulatedGpu):
        """Counts cycles when it waits, as the real one does."""

        def delay(self, seconds: float) -> None:
            self.kernel("spin", seconds)

    gpu = Gpu(clock_hz=lambda at_s: 2e9 * (0.9 + 0.1 * (int(at_s * 37) % 2)))
    _, timers = check_timers(gpu)
    canary = check_canary(gpu, timers)
    assert canary.result is CheckResult.OK, canary


def test_a_slow_clock_is_a_warning_and_an_impossible_one_a_failure() -> None:
    slow = check_clock(SimulatedGpu(clock_hz=lambda at_s: 1.2e9))
    assert slow.result is CheckResult.WARN
    assert "60 % of the rated" in slow.measured
    fast = check_clock(SimulatedGpu(clock_hz=lambda at_s: 2.3e9))
    assert fast.result is CheckResult.FAIL


def test_cycles_of_two_multiprocessors_are_not_compared() -> None:
    class Gpu(SimulatedGpu):
        def read_stamps(self, count: int) -> list[Stamp]:
            stamps = super().read_stamps(count)
            return [Stamp(i, s.cycles, s.time_ns) for i, s in enumerate(stamps)]

    assert check_clock(Gpu()).result is CheckResult.WARN


def test_rates_of_a_healthy_device() -> None:
    gpu = SimulatedGpu()
    found = check_rates(gpu, _probes(gpu, 4.24e12, 800e12), "NVIDIA H200")
    assert found.result is CheckResult.OK, found
    assert "88 % of the published bandwidth, 81 % of the published matrix rate" in found.meaning
    assert found.values["copy_bytes_per_s"] == pytest.approx(4.24e12, rel=0.01)


@pytest.mark.parametrize(
    ("bytes_per_s", "flops_per_s", "result"),
    [
        (2.4e12, 800e12, CheckResult.WARN),
        (4.24e12, 400e12, CheckResult.WARN),
        (6e12, 800e12, CheckResult.FAIL),  # more than the device can do
        (4.24e12, 1200e12, CheckResult.FAIL),
    ],
)
def test_rates_that_a_healthy_device_does_not_have(
    bytes_per_s: float, flops_per_s: float, result: CheckResult
) -> None:
    gpu = SimulatedGpu()
    found = check_rates(gpu, _probes(gpu, bytes_per_s, flops_per_s), "NVIDIA H200")
    assert found.result is result
    assert found.mend


def test_an_unknown_device_is_said_and_not_judged() -> None:
    gpu = SimulatedGpu()
    found = check_rates(gpu, _probes(gpu, 1e12, 1e15), "NVIDIA H200 MIG 1g.18gb")
    assert found.result is CheckResult.OK
    assert "no published peak of 'NVIDIA H200 MIG 1g.18gb' is known" in found.meaning


HEALTHY = {"gpu_temperature_c": 41.0, "gpu_power_w": 312.4, "gpu_clocks_locked": 0.0}


def test_conditions_of_a_healthy_device_of_ones_own() -> None:
    found = check_conditions("", [HEALTHY, HEALTHY], ["sw_power_cap"], 0)
    assert found.result is CheckResult.OK
    assert found.measured == (
        "41 °C, 312 W, clocks not locked, held back by sw_power_cap, no other process"
    )
    locked = check_conditions("", [HEALTHY | {"gpu_clocks_locked": 1.0}], [], None)
    assert locked.measured == "41 °C, 312 W, clocks locked, other processes not known"


def test_heat_and_other_processes_are_warnings() -> None:
    hot = check_conditions("", [HEALTHY], ["hw_thermal_slowdown"], 0)
    shared = check_conditions("", [HEALTHY], [], 2)
    assert (hot.result, shared.result) == (CheckResult.WARN, CheckResult.WARN)
    assert "cooling" in hot.mend
    assert "2 other processes" in shared.measured


def test_a_driver_that_tells_nothing_says_what_to_install() -> None:
    found = check_conditions("nvidia-ml-py is not installed; pip install nvidia-ml-py", [{}], [], 0)
    assert found.result is CheckResult.WARN
    assert found.measured.count("pip install") == 1
