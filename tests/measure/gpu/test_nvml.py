"""GPU conditions: every reading in its unit, each missing one left out, the right device asked."""

from __future__ import annotations

import builtins
from typing import Any

import pynvml
import pytest

from attnbench.measure.environment import read_conditions, read_driver_version
from attnbench.measure.gpu import nvml
from attnbench.measure.gpu.nvml import (
    clocks_are_locked,
    driver_version,
    invalidating_reasons,
    max_sm_clock_hz,
    nvml_missing,
    read_gpu_conditions,
    read_throttle_reasons,
    reason_names,
    throttle_reasons,
)
from tests.measure.gpu.fake_nvml import MIG_UUID, UUID, FakeNvml, nvml_error

NOT_SUPPORTED = nvml_error(pynvml.NVML_ERROR_NOT_SUPPORTED)

#: What the fake's answers are in SI units, worked out by hand.
EXPECTED = {
    "gpu_sm_clock_hz": 1.755e9,
    "gpu_memory_clock_hz": 3.201e9,
    "gpu_power_w": 312.4,
    "gpu_power_limit_w": 700.0,
    "gpu_temperature_c": 41.0,
    "gpu_memory_temperature_c": 52.0,
    "gpu_utilization_ratio": 0.87,
    "gpu_held_back_by_power_s": 5.0,
    "gpu_held_back_by_heat_s": 0.0,
    "gpu_throttle_bits": 1.0,
    "gpu_clocks_locked": 0.0,
}


def test_every_reading_in_its_unit(fake: FakeNvml) -> None:
    assert read_gpu_conditions(UUID) == pytest.approx(EXPECTED)
    assert max_sm_clock_hz(UUID) == 1.98e9
    assert driver_version() == "570.86.15"
    assert nvml_missing(UUID) == ""


@pytest.mark.parametrize("name", [UUID, f"GPU-{UUID}", MIG_UUID, f"MIG-{MIG_UUID}"])
def test_torchs_uuid_finds_the_device_and_that_of_an_instance_the_whole(
    fake: FakeNvml, name: str
) -> None:
    assert read_gpu_conditions(name) == pytest.approx(EXPECTED)


def test_an_unknown_device_is_said_and_has_no_readings(fake: FakeNvml) -> None:
    other = "00000000-0000-0000-0000-000000000000"
    assert other in nvml_missing(other)
    assert "nvidia-smi -L" in nvml_missing(other)
    assert read_gpu_conditions(other) == {}
    assert max_sm_clock_hz(other) == 0.0
    assert "UUID" in nvml_missing("")


@pytest.mark.parametrize(
    ("question", "keys"),
    [
        ("sm_mhz", {"gpu_sm_clock_hz"}),
        ("memory_mhz", {"gpu_memory_clock_hz"}),
        ("nvmlDeviceGetPowerUsage", {"gpu_power_w"}),
        ("nvmlDeviceGetEnforcedPowerLimit", {"gpu_power_limit_w"}),
        ("memory_temperature", {"gpu_memory_temperature_c"}),
        ("utilization", {"gpu_utilization_ratio"}),
        ("violation_ns", {"gpu_held_back_by_power_s", "gpu_held_back_by_heat_s"}),
    ],
)
def test_what_a_device_does_not_tell_is_left_out_alone(
    fake: FakeNvml, question: str, keys: set[str]
) -> None:
    fake.values[question] = NOT_SUPPORTED
    assert set(read_gpu_conditions(UUID)) == set(EXPECTED) - keys


def test_a_lost_device_costs_the_readings_and_nothing_else(fake: FakeNvml) -> None:
    read_gpu_conditions(UUID)
    for question in fake.values:
        fake.values[question] = nvml_error(pynvml.NVML_ERROR_GPU_IS_LOST)
    assert read_gpu_conditions(UUID) == {}
    assert driver_version() == ""
    assert max_sm_clock_hz(UUID) == 0.0
    assert "memory_available_bytes" in read_conditions(UUID)


def test_a_memory_sensor_that_is_not_there_has_junk_for_a_value(fake: FakeNvml) -> None:
    fake.values["memory_temperature"] = (pynvml.NVML_ERROR_NOT_SUPPORTED, 0)
    assert "gpu_memory_temperature_c" not in read_gpu_conditions(UUID)


@pytest.mark.parametrize("by", ["driver", "package"])
def test_older_names_are_asked_where_the_newer_are_missing(fake: FakeNvml, by: str) -> None:
    fake.values["nvmlDeviceGetCurrentClocksThrottleReasons"] = 0x40
    newer = {"nvmlDeviceGetTemperatureV", "nvmlDeviceGetCurrentClocksEventReasons"}
    if by == "package":
        fake.absent = newer
    for name in newer:
        fake.values[name] = nvml_error(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
    conditions = read_gpu_conditions(UUID)
    assert conditions["gpu_temperature_c"] == 40.0
    assert read_throttle_reasons(UUID) == ("hw_thermal_slowdown",)


@pytest.mark.parametrize(
    "code", [pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED]
)
def test_without_a_driver_it_is_said(fake: FakeNvml, code: int) -> None:
    fake.values["nvmlInit"] = nvml_error(code)
    assert "install NVIDIA's driver" in nvml_missing(UUID)
    assert read_gpu_conditions(UUID) == {}
    assert driver_version() == ""
    assert not clocks_are_locked(UUID)


def test_without_the_package_it_is_said(fake: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "pynvml":
            raise ModuleNotFoundError("No module named 'pynvml'")
        return real_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "pip install nvidia-ml-py" in nvml_missing(UUID)
    assert read_gpu_conditions(UUID) == {}


def test_the_real_package_fails_softly_where_there_is_no_driver() -> None:
    nvml._find_device.cache_clear()
    nvml._start.cache_clear()
    missing = nvml_missing(UUID)
    if missing:
        assert "; " in missing
        assert read_gpu_conditions(UUID) == {}
    nvml._find_device.cache_clear()
    nvml._start.cache_clear()


def test_names_are_those_of_nvidias_own_header() -> None:
    ours = {
        "gpu_idle": pynvml.nvmlClocksEventReasonGpuIdle,
        "applications_clocks_setting": pynvml.nvmlClocksEventReasonApplicationsClocksSetting,
        "sw_power_cap": pynvml.nvmlClocksEventReasonSwPowerCap,
        "hw_slowdown": pynvml.nvmlClocksEventReasonHwSlowdown,
        "sync_boost": pynvml.nvmlClocksEventReasonSyncBoost,
        "sw_thermal_slowdown": pynvml.nvmlClocksEventReasonSwThermalSlowdown,
        "hw_thermal_slowdown": pynvml.nvmlClocksEventReasonHwThermalSlowdown,
        "hw_power_brake_slowdown": pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown,
        "display_clock_setting": pynvml.nvmlClocksEventReasonDisplayClockSetting,
        "board_limit": pynvml.nvmlClocksThrottleReasonBoardLimit,
        "reliability": pynvml.nvmlClocksThrottleReasonReliability,
    }
    for name, bit in ours.items():
        assert reason_names(bit) == (() if name == "gpu_idle" else (name,))
    assert reason_names(0) == ()
    assert reason_names(0x44) == ("sw_power_cap", "hw_thermal_slowdown")
    assert reason_names(0x1000) == ("0x1000",)
    assert ours.keys() >= nvml.INVALIDATING_REASONS


def test_reasons_of_two_readings_and_of_the_time_between_them() -> None:
    idle = {"gpu_throttle_bits": 1.0, "gpu_held_back_by_power_s": 5.0}
    later = {"gpu_throttle_bits": 1.0, "gpu_held_back_by_power_s": 5.2}
    assert throttle_reasons(idle, idle) == ()
    assert throttle_reasons(idle, later) == ("sw_power_cap",)
    assert throttle_reasons(later, idle) == ()  # counted anew: the driver was loaded anew
    hot = later | {"gpu_throttle_bits": float(0x21)}
    assert throttle_reasons(idle, hot) == ("sw_power_cap", "sw_thermal_slowdown")
    assert throttle_reasons(hot, idle) == ("sw_thermal_slowdown",)
    assert throttle_reasons({}, later) == ()
    assert invalidating_reasons(throttle_reasons(idle, hot)) == ("sw_thermal_slowdown",)
    assert invalidating_reasons(("sw_power_cap", "applications_clocks_setting")) == ()


def test_locks_are_recorded_by_us_and_as_the_driver_tells(fake: FakeNvml) -> None:
    assert not clocks_are_locked(UUID)
    fake.values["nvmlDeviceGetCurrentClocksEventReasons"] = 0x2
    assert clocks_are_locked(UUID)
    fake.values["nvmlDeviceGetCurrentClocksEventReasons"] = 0x1
    ours = read_conditions(UUID, locked_clock_hz=1.2e9)
    assert (ours["gpu_clocks_locked"], ours["gpu_locked_clock_hz"]) == (1.0, 1.2e9)


def test_conditions_of_a_gpu_stand_beside_those_of_its_host(fake: FakeNvml) -> None:
    host, both = read_conditions(), read_conditions(UUID)
    assert not [key for key in host if key.startswith("gpu_")]
    assert set(both) >= set(host) | set(EXPECTED)
    units = ("_hz", "_w", "_c", "_s", "_ratio", "_bits", "_locked")
    assert all(key.endswith(units) for key in set(both) - set(host))


def test_the_driver_is_nvmls_where_the_kernel_hides_it(
    fake: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attnbench.measure import environment

    monkeypatch.setattr(environment, "_first_line", lambda path: "")
    assert read_driver_version() == "570.86.15"
    monkeypatch.setattr(environment, "_first_line", lambda path: "NVRM version: 1")
    assert read_driver_version() == "NVRM version: 1"
