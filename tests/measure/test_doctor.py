"""The self-test as a whole: what repeats mean, and that no breakage ends it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from attnbench.backends.device import Device
from attnbench.measure import doctor, machine_checks
from attnbench.measure.checks import Check, CheckResult, can_measure

CPU = Device("cpu")


def test_the_difference_that_means_nothing_is_missed_by_one_pair_in_twenty() -> None:
    # Against the thing itself: pairs of processes of a known spread.
    random = np.random.default_rng(0)
    stated = [
        doctor.judge_repeats("p", [float(m) for m in row], 0.1).values["difference"]
        for row in random.normal(1.0, 0.03, (4000, 3))
    ]
    pairs = random.normal(1.0, 0.03, (100_000, 2))
    differences = np.abs(pairs[:, 0] - pairs[:, 1])
    assert float(np.mean(stated)) == pytest.approx(float(np.quantile(differences, 0.95)), rel=0.03)


def test_repeats_of_a_quiet_machine() -> None:
    found = doctor.judge_repeats("CPU_ATTN 4q1s1k", [100e-6, 101e-6, 102e-6], 0.1)
    assert found.result is CheckResult.OK
    assert found.measured == "CPU_ATTN 4q1s1k in 3 processes: 100 µs, 101 µs, 102 µs"
    # range 1.98 %, sigma 1.17 %, 95 % of differences below 2.77 sigma
    assert found.meaning == "between two runs, differences below about 3.2 % mean nothing"


def test_three_values_that_agree_by_chance_prove_little() -> None:
    found = doctor.judge_repeats("p", [1e-3, 1e-3, 1e-3], 0.1)
    assert found.values["difference"] == 0.01


@pytest.mark.parametrize(
    ("medians", "said"),
    [([1.0, 1.1, 1.2], "below about 30 %"), ([1.0, 200.0, 3.0], "cannot be compared")],
)
def test_repeats_that_do_not(medians: list[float], said: str) -> None:
    found = doctor.judge_repeats("p", medians, 0.1)
    assert found.result is CheckResult.WARN
    assert said in found.meaning
    assert "--replicates" in found.mend


def test_times_that_all_waited_for_the_same_program_agree_and_are_doubted() -> None:
    doubts = ["other processes kept 0.8 cores busy while it was timed"]
    found = doctor.judge_repeats("p", [0.0919, 0.0918, 0.0919], 0.1, doubts=doubts)
    assert found.result is CheckResult.WARN
    assert doubts[0] in found.meaning


def test_a_point_that_cannot_be_measured_is_a_failure() -> None:
    found = doctor.judge_repeats("p", [1.0, 1.0], 0.1, failures=["CRASH: signal 11"] * 2)
    assert found.result is CheckResult.FAIL
    assert found.measured == "p: CRASH: signal 11"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the processes of the A/A test."""
    ok = Check(name="A/A", result=CheckResult.OK, measured="left out")
    monkeypatch.setattr(doctor, "check_repeats", lambda device, timer: ok)


@pytest.mark.usefixtures("quick")
def test_this_machine_can_measure(tmp_path: Path) -> None:
    found = list(doctor.examine(tmp_path, CPU))
    assert can_measure(found), found
    assert [check.name for check in found if check.name != "backend"] == [
        *("software", "device", "backends", "compiler", "results folder"),
        *("timers", "canary", "rates", "quiet", "A/A"),
    ]


@pytest.mark.usefixtures("quick")
def test_what_a_check_raises_is_its_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Check:
        raise OSError("libcuda.so: cannot open\nmore")

    monkeypatch.setattr(machine_checks, "check_cpu_canary", broken)
    found = {check.name: check for check in doctor.examine(tmp_path, CPU)}
    assert found["canary"].result is CheckResult.FAIL
    assert found["canary"].measured == "OSError: libcuda.so: cannot open"
    assert found["A/A"].result is CheckResult.OK  # the rest goes on
    assert not can_measure(found.values())


def test_several_checks_keep_what_came_before_the_breakage() -> None:
    def checks() -> Iterator[Check]:
        yield Check(name="first", result=CheckResult.OK, measured="")
        raise ValueError("broken")

    assert [c.name for c in doctor._several("rest", checks)] == ["first", "rest"]


def test_a_device_without_timers_cannot_be_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_checks, "check_device", lambda device: _ok("device"))
    monkeypatch.setattr(machine_checks, "check_backends", lambda device: iter([_ok("backends")]))
    found = {check.name: check for check in doctor.examine(tmp_path, Device("rocm", "gfx942"))}
    assert found["timers"].result is CheckResult.FAIL
    assert found["A/A"].result is CheckResult.NOT_RUN


def _ok(name: str) -> Check:
    return Check(name=name, result=CheckResult.OK, measured="")


def test_other_processes_of_a_gpu() -> None:
    class NVMLError(Exception):
        pass

    def device(read: Any) -> Any:
        nvml = SimpleNamespace(NVMLError=NVMLError, nvmlDeviceGetComputeRunningProcesses=read)
        return SimpleNamespace(nvml=nvml, handle=0)

    def refused(handle: object) -> None:
        raise NVMLError

    assert doctor.other_gpu_processes(device(lambda handle: ["ours"])) == 0
    assert doctor.other_gpu_processes(device(lambda handle: ["ours", "a", "b"])) == 2
    assert doctor.other_gpu_processes(device(refused)) is None
    assert doctor.other_gpu_processes("nvidia-ml-py is not installed") is None


@pytest.mark.usefixtures("quick")
def test_the_checks_of_a_gpu_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from attnbench.backends.device import cuda_device
    from attnbench.measure.gpu import ceilings, cuda
    from attnbench.measure.gpu.ceilings import Probe
    from tests.measure.gpu.simulated import SimulatedGpu

    gpu = SimulatedGpu()
    monkeypatch.setattr(cuda, "CudaRuntime", lambda: gpu)
    monkeypatch.setattr(
        ceilings,
        "torch_probes",
        lambda gpu, dtypes: [Probe("copy", lambda: gpu.kernel("copy", 1e-3), 4.2e9)],
    )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="no-such-device")
    )
    monkeypatch.setattr(machine_checks, "check_device", lambda device: _ok("device"))
    monkeypatch.setattr(machine_checks, "check_backends", lambda device: iter([_ok("backends")]))
    timers = []

    def repeats(device: Device, timer: str) -> Check:
        timers.append(timer)
        return _ok("A/A")

    monkeypatch.setattr(doctor, "check_repeats", repeats)
    found = list(doctor.examine(tmp_path, cuda_device(9, 0)))
    assert [check.name for check in found][5:] == [
        *("SM clock", "timers", "canary", "rates", "conditions", "quiet", "A/A"),
    ]
    assert can_measure(found), found
    assert timers == ["event"]
