"""Checks of the machine, each against a machine that is healthy and one that is not."""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from attnbench.backends import registry
from attnbench.backends.device import Device, cuda_device
from attnbench.measure import machine_checks as machine
from attnbench.measure.checks import CheckResult, rate_text, seconds_text
from attnbench.measure.sampling import Block, Target
from attnbench.measure.timers import Subject, WallTimer
from attnbench.store.ceilings import Ceilings

CPU = Device("cpu")


def test_versions_are_those_installed() -> None:
    found = machine.check_software()
    assert f"torch {importlib.metadata.version('torch')}" in found.measured


def test_a_triton_that_torch_was_not_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ['triton==3.0.1; platform_system == "Linux"', "filelock"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: wanted)
    found = machine.check_software()
    assert found.result is CheckResult.WARN
    assert found.mend == "pip install triton==3.0.1"


def test_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(machine, "allowed_cores", lambda: 1.5)
    found = machine.check_device(CPU)
    assert found.result is CheckResult.WARN
    assert found.mend == "export OMP_NUM_THREADS=1"


@pytest.mark.parametrize(
    ("text", "cores"), [("50000 100000", 0.5), ("max 100000", None), ("", None)]
)
def test_a_containers_quota_counts(tmp_path: Path, text: str, cores: float | None) -> None:
    quota = tmp_path / "cpu.max"
    quota.write_text(text)
    everything = machine.allowed_cores(tmp_path / "absent")
    assert machine.allowed_cores(quota) == (everything if cores is None else cores)


def test_a_backend_that_is_absent_says_why_and_what_to_install() -> None:
    registry.register_backend("GONE", "no_such_package.Gone", install="pip install no-such")
    try:
        first, *absent = machine.check_backends(CPU)
    finally:
        registry.unregister_backend("GONE")
    assert first.result is CheckResult.OK
    assert "CPU_ATTN" in first.measured
    gone = next(check for check in absent if "GONE" in check.measured)
    assert "no_such_package" in gone.measured
    assert "pip install no-such" in gone.measured + gone.mend


def test_no_backend_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "runnable_backend_names", lambda: ())
    (found,) = machine.check_backends(CPU)
    assert found.result is CheckResult.FAIL


@pytest.mark.parametrize(("device", "variable"), [(CPU, "CXX"), (cuda_device(9, 0), "CC")])
def test_a_compiler_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, device: Device, variable: str
) -> None:
    monkeypatch.setenv(variable, "no-such-compiler")
    found = machine.check_compiler(device)
    assert found.result is CheckResult.WARN
    assert "'no-such-compiler' is not found" in found.measured
    monkeypatch.setenv(variable, "false")  # is there, and does nothing it is asked
    assert machine.check_compiler(device).result is CheckResult.WARN
    monkeypatch.setenv(variable, sys.executable)  # any program that answers
    assert machine.check_compiler(device).result is CheckResult.OK


def test_a_folder_that_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    found = machine.check_results_folder(tmp_path / "new" / "results")
    assert found.result is CheckResult.OK
    assert "will be made" in found.measured
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = machine.check_results_folder(tmp_path / "file" / "results")
    assert found.result is CheckResult.FAIL
    assert "--results" in found.mend


def test_a_disk_that_is_nearly_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 99, 1 << 20))
    assert machine.check_results_folder(tmp_path).result is CheckResult.WARN


class _Lying(WallTimer):
    """Reads `scale` times the time, and `floor` for nothing."""

    def __init__(self, scale: float = 1.0, floor: float = 1e-7) -> None:
        super().__init__(warm_up_s=0.001)
        self._scale = scale
        self._floor = floor

    def floor_s(self) -> float:
        return self._floor

    def open(self, target: Target, subject: Subject, l2_state: str):  # type: ignore[no-untyped-def]
        session = super().open(target, subject, l2_state)
        honest: Callable[[], Block] = session.block
        session.block = lambda: Block(tuple(self._scale * s for s in honest().samples))  # type: ignore[method-assign]
        return session


@pytest.mark.parametrize(
    ("scale", "result"),
    [(1.0, CheckResult.OK), (1.1, CheckResult.FAIL), (0.9, CheckResult.FAIL)],
)
def test_a_wall_clock_that_does_not_tell_the_time(scale: float, result: CheckResult) -> None:
    found = machine.check_cpu_canary(lambda: _Lying(scale))
    assert found.result is result, found
    assert found.values["wall_ratio"] == pytest.approx(scale, rel=0.04)


def test_the_floor_of_the_wall_clock() -> None:
    assert machine.check_cpu_timers().result is CheckResult.OK
    slow = machine.check_cpu_timers(lambda: _Lying(floor=5e-5))
    assert slow.result is CheckResult.WARN
    assert "50 µs" in slow.measured


def test_rates_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Ceilings(
        copy_bytes_per_s=3.5e10, read_bytes_per_s=4e10, matmul_flops_per_s={"fp32": 2e11}
    )
    monkeypatch.setattr(machine, "measure_quiet_cpu_ceilings", lambda dtypes: (found, ""))
    check = machine.check_cpu_rates()
    assert check.result is CheckResult.OK
    assert check.measured == "copy 35 GB/s, read 40 GB/s, fp32 product 200 GFLOP/s"
    assert check.values["matmul_fp32_flops_per_s"] == 2e11

    monkeypatch.setattr(machine, "measure_quiet_cpu_ceilings", lambda dtypes: (None, "too loud"))
    loud = machine.check_cpu_rates()
    assert loud.result is CheckResult.WARN
    assert loud.measured == "too loud"


@pytest.mark.parametrize(
    ("cores", "result"),
    [(None, CheckResult.NOT_RUN), (0.1, CheckResult.OK), (1.2, CheckResult.WARN)],
)
def test_other_processes(cores: float | None, result: CheckResult) -> None:
    assert machine.check_quiet(cores).result is result


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (seconds_text(8.3e-8), "83 ns"),
        (seconds_text(4.21e-6), "4.21 µs"),
        (seconds_text(0.0125), "12.5 ms"),
        (seconds_text(-3e-6), "-3 µs"),
        (rate_text(4.24e12, "B"), "4.24 TB/s"),
        (rate_text(198e9, "FLOP"), "198 GFLOP/s"),
        (rate_text(5e6, "B"), "5 MB/s"),
    ],
)
def test_numbers_in_words(text: str, expected: str) -> None:
    assert text == expected
