"""Ceilings of a run: of this CPU, of the fake timer, and none where nobody measures them."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from attnbench.backends.device import Device
from attnbench.measure import ceilings
from attnbench.measure.options import MeasureOptions
from attnbench.measure.plan import PlannedPoint
from attnbench.measure.timers import FakeTimer, Subject
from attnbench.workload import Workload
from attnbench.workload.cost import attention_bytes, attention_flops

PLAN = [
    PlannedPoint(Workload.parse("8q1s4k dtype=fp32"), "CPU_ATTN"),
    PlannedPoint(Workload.parse("8q1s4k"), "CPU_ATTN"),
]


def _others(monkeypatch: pytest.MonkeyPatch, cores: float | None) -> None:
    load = type("Load", (), {"cores": lambda self: cores})
    monkeypatch.setattr(ceilings, "OtherLoad", load)


@pytest.mark.parametrize("cores", [0.0, 0.4, None])
def test_a_cpus_rates_are_those_of_the_dtypes_that_run(
    monkeypatch: pytest.MonkeyPatch, cores: float | None
) -> None:
    _others(monkeypatch, cores)
    found, why_not = ceilings.ceilings_of_run(PLAN, MeasureOptions(timer="wall"), Device("cpu"))
    assert found is not None
    assert why_not == ""
    assert set(found.matmul_flops_per_s) == {"bf16", "fp32"}
    # Wide: other tests run meanwhile.
    assert 1e7 < found.copy_bytes_per_s < 2e12
    assert 1e7 < found.read_bytes_per_s < 2e12
    assert all(1e7 < rate < 1e15 for rate in found.matmul_flops_per_s.values())


def test_a_rate_measured_beside_other_programs_is_no_ceiling(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _others(monkeypatch, 1.3)
    found, why_not = ceilings.ceilings_of_run(PLAN, MeasureOptions(timer="wall"), Device("cpu"))
    assert found is None
    assert "other processes kept 1.3 cores busy" in why_not


def test_a_rate_is_the_work_by_the_time_of_the_fastest_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # 1 µs a step of the clock: a call that moves it by n steps takes n µs.
    now = [0]
    monkeypatch.setattr(time, "perf_counter_ns", lambda: now[0] * 1000)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0] * 1e-6)
    spans = iter([500, 70, 20, 30, 90, *[40] * 100])

    def call() -> None:
        now[0] += next(spans)

    assert ceilings._best_s(call) == pytest.approx(20e-6)


def test_a_type_without_instructions_is_not_asked_for_large_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    edges: list[int] = []

    def seconds(call: Callable[[], object]) -> float:
        edges.append(call.args[0].shape[0])  # type: ignore[attr-defined]
        return float(2 * edges[-1] ** 3 / 4e9)

    monkeypatch.setattr(ceilings, "_best_s", seconds)
    assert ceilings._matmul_rate(torch.float16) == pytest.approx(4e9)
    assert edges == [128, 256]


def test_waiting_for_another_program_does_not_end_the_growth(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    def seconds(call: Callable[[], object]) -> float:
        edge = call.args[0].shape[0]  # type: ignore[attr-defined]
        return float(16e-3 + 2 * edge**3 / 2e11)

    monkeypatch.setattr(ceilings, "_best_s", seconds)
    assert ceilings._matmul_rate(torch.float32) > 5e10


def test_a_rehearsal_has_the_rates_the_fake_timer_computes_with() -> None:
    found, _ = ceilings.ceilings_of_run(PLAN, MeasureOptions(timer="fake"), Device("cuda"))
    assert found is not None
    assert found.matmul_flops_per_s == {"bf16": 1e12, "fp32": 1e12}
    # Times that are all memory and all compute, without the 1 µs of every call.
    timer = FakeTimer()
    decode = Workload.parse("64q1s128k")
    seconds = timer.seconds(Subject(decode, "CPU_ATTN", "attention", 0)) - 1e-6
    bound = attention_bytes(decode) / found.memory_bytes_per_s + attention_flops(decode) / 1e12
    assert seconds == pytest.approx(bound)


def test_a_device_nobody_measures_has_none_and_says_so() -> None:
    found, why_not = ceilings.ceilings_of_run(PLAN, MeasureOptions(timer="wall"), Device("xpu"))
    assert found is None
    assert "xpu" in why_not


def test_a_gpu_that_cannot_copy_leaves_the_run_without_ceilings() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    found, why_not = ceilings.ceilings_of_run(PLAN, MeasureOptions(timer="event"), Device("cuda"))
    assert found is None
    assert "torch finds no GPU" in why_not
    assert "attnbench doctor" in why_not
