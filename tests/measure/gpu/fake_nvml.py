"""A stand-in for `pynvml`, no wider than the real one: same names, same parameters, same errors."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from ctypes import c_uint
from types import ModuleType, SimpleNamespace
from typing import Any

import pynvml

UUID = "6a3c0f3e-0000-1111-2222-333344445555"
MIG_UUID = "71b0a9c2-0000-1111-2222-333344445555"


class FakeNvml(ModuleType):
    """One GPU and a MIG instance of it.

    Attributes:
        values: what each question is answered; an error's number raises it instead.
        calls: names of the functions that change something, with their arguments, in order.
        absent: functions this version of nvidia-ml-py does not have.
    """

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.calls: list[tuple[Any, ...]] = []
        self.absent: set[str] = set()
        self.values: dict[str, Any] = {
            "nvmlInit": None,
            "nvmlSystemGetDriverVersion": "570.86.15",
            "sm_mhz": 1755,
            "memory_mhz": 3201,
            "max_sm_mhz": 1980,
            "nvmlDeviceGetPowerUsage": 312_400,
            "nvmlDeviceGetEnforcedPowerLimit": 700_000,
            "nvmlDeviceGetTemperatureV": 41,
            "nvmlDeviceGetTemperature": 40,
            "memory_temperature": (pynvml.NVML_SUCCESS, 52),
            "utilization": 87,
            "violation_ns": {
                pynvml.NVML_PERF_POLICY_POWER: 5_000_000_000,
                pynvml.NVML_PERF_POLICY_THERMAL: 0,
            },
            "nvmlDeviceGetCurrentClocksEventReasons": 0x1,
            "nvmlDeviceGetCurrentClocksThrottleReasons": 0x1,
            "nvmlDeviceGetSupportedMemoryClocks": [3201, 1593],
            "nvmlDeviceGetSupportedGraphicsClocks": [1980, 1965, 1950, 1200, 345],
            "nvmlDeviceSetGpuLockedClocks": None,
            "nvmlDeviceResetGpuLockedClocks": None,
        }

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in self.absent:
            raise AttributeError(f"module 'pynvml' has no attribute {name!r}")
        real = getattr(pynvml, name)  # AttributeError: nobody has it
        if not inspect.isfunction(real):
            return real  # constants and errors
        stand_in: Callable[..., Any] | None = getattr(type(self), f"fake_{name}", None)

        def call(*args: Any) -> Any:
            inspect.signature(inspect.unwrap(real)).bind(*args)
            return stand_in(self, *args) if stand_in else self.answer(name)

        return call

    def answer(self, name: str) -> Any:
        value = self.values[name]
        if isinstance(value, pynvml.NVMLError):
            raise value
        return value

    def fake_nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid not in (f"GPU-{UUID}", f"MIG-{MIG_UUID}"):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return uuid

    def fake_nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: str) -> str:
        assert handle == f"MIG-{MIG_UUID}"
        return f"GPU-{UUID}"

    def _check(self, handle: str) -> None:
        assert handle == f"GPU-{UUID}"

    def fake_nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> Any:
        self._check(handle)
        return self.answer(
            {pynvml.NVML_CLOCK_SM: "sm_mhz", pynvml.NVML_CLOCK_MEM: "memory_mhz"}[kind]
        )

    def fake_nvmlDeviceGetMaxClockInfo(self, handle: str, kind: int) -> Any:
        self._check(handle)
        assert kind == pynvml.NVML_CLOCK_SM
        return self.answer("max_sm_mhz")

    def fake_nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        self._check(handle)
        return SimpleNamespace(gpu=self.answer("utilization"), memory=3)

    def fake_nvmlDeviceGetFieldValues(self, handle: str, fields: list[int]) -> Any:
        self._check(handle)
        assert fields == [pynvml.NVML_FI_DEV_MEMORY_TEMP]
        values = (pynvml.c_nvmlFieldValue_t * 1)()
        code, value = self.answer("memory_temperature")
        values[0].nvmlReturn = code
        values[0].value.uiVal = c_uint(value)
        return values

    def fake_nvmlDeviceGetViolationStatus(self, handle: str, policy: int) -> Any:
        self._check(handle)
        return SimpleNamespace(violationTime=self.answer("violation_ns")[policy])

    def fake_nvmlDeviceSetGpuLockedClocks(self, handle: str, low: int, high: int) -> None:
        self._check(handle)
        self.calls.append(("lock", low, high))
        self.answer("nvmlDeviceSetGpuLockedClocks")

    def fake_nvmlDeviceResetGpuLockedClocks(self, handle: str) -> None:
        self._check(handle)
        self.calls.append(("unlock",))
        self.answer("nvmlDeviceResetGpuLockedClocks")


def nvml_error(code: int) -> pynvml.NVMLError:
    """The error the real module raises for a return code."""
    return pynvml.NVMLError(code)


def install() -> FakeNvml:
    """Put a fake in the place of `pynvml`, in this process."""
    from attnbench.measure.gpu import nvml

    fake = FakeNvml()
    sys.modules["pynvml"] = fake
    nvml._find_device.cache_clear()
    nvml._start.cache_clear()
    return fake
