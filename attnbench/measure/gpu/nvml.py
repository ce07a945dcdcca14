"""What NVIDIA's driver tells of a GPU (NVML): clocks, power, temperature, what holds it back.

`nvidia-ml-py` (module `pynvml`) is imported when first asked. Without it, without a driver, or
where a device does not tell one thing, that reading is left out: a missing sensor must not cost a
point its time. `nvml_missing` says why nothing is there.

Devices are named by UUID, as torch gives it (`torch.cuda.get_device_properties(i).uuid`): NVML
counts all devices of the machine, CUDA only those of CUDA_VISIBLE_DEVICES, in an order of its own.

Nothing here changes a clock. `locked_clocks.py` does, when asked.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

#: Bits of the clocks event reasons and our names for them (nvml.h, `nvmlClocksEventReasons`).
#: Written out, since an older nvidia-ml-py calls them throttle reasons and lacks the last two.
_REASON_NAMES = {
    0x001: "gpu_idle",
    0x002: "applications_clocks_setting",
    0x004: "sw_power_cap",
    0x008: "hw_slowdown",
    0x010: "sync_boost",
    0x020: "sw_thermal_slowdown",
    0x040: "hw_thermal_slowdown",
    0x080: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
    0x200: "board_limit",
    0x400: "reliability",
}
_CLOCK_SETTING_BIT = 0x002

#: Reasons that hold nothing back: nothing runs, and the clocks fall. Between points that is so.
HARMLESS_REASONS = frozenset({"gpu_idle"})

#: Reasons under which a time says more of the machine than of the kernel. A hardware slowdown
#: lowers the clock by a factor of 2 or more: too hot, the power supply asks for it, or the power
#: rose too fast; a thermal one of the driver holds a temperature (nvml.h). `sw_power_cap` is not
#: among them: the heaviest kernels reach the board's power limit every time, and the clock of each
#: sample says what it cost. Neither are settings of clocks: they hold for every point alike.
INVALIDATING_REASONS = frozenset(
    {"hw_slowdown", "sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown"}
)

#: Conditions that count the seconds a policy has held the clocks back, and its reason.
_HELD_BACK = {
    "gpu_held_back_by_power_s": "sw_power_cap",
    "gpu_held_back_by_heat_s": "sw_thermal_slowdown",
}


@dataclass(frozen=True, slots=True)
class NvmlDevice:
    """A device NVML knows: the module and its handle."""

    nvml: Any
    handle: Any


def nvml_missing(uuid: str) -> str:
    """ "" when NVML tells of this device, else why not and what to do."""
    found = find_device(uuid)
    return found if isinstance(found, str) else ""


def find_device(uuid: str) -> NvmlDevice | str:
    """The device of torch's UUID, or why there is none.

    The instance of a MIG device gives the device it is cut from: clocks and power are the whole's.
    """
    # A forked process must ask anew: the driver's connection is its parent's.
    return _find_device(uuid, os.getpid())


@functools.lru_cache(maxsize=64)
def _find_device(uuid: str, pid: int) -> NvmlDevice | str:
    nvml = _start(pid)
    if isinstance(nvml, str):
        return nvml
    if not uuid:
        return "torch does not tell the device's UUID; upgrade torch to 2.8 or later"
    named = uuid.startswith(("GPU-", "MIG-"))
    for name in (uuid,) if named else (f"GPU-{uuid}", f"MIG-{uuid}"):
        try:
            handle = nvml.nvmlDeviceGetHandleByUUID(name)
            if name.startswith("MIG-"):
                handle = nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
        except nvml.NVMLError:
            continue
        return NvmlDevice(nvml, handle)
    return f"NVML does not know the device {uuid}; see `nvidia-smi -L` for those it knows"


@functools.lru_cache(maxsize=64)
def _start(pid: int) -> Any:
    """The module, ready to be asked, or why not."""
    try:
        import pynvml
    except ImportError:
        return "nvidia-ml-py is not installed; pip install nvidia-ml-py"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return f"NVML does not start ({error}); install NVIDIA's driver, or see `nvidia-smi`"
    return pynvml


def _ask(nvml: Any, read: Callable[[], Any]) -> Any:
    """What `read` gives; None where the device, the driver or an old nvidia-ml-py does not tell."""
    try:
        return read()
    # AttributeError: a function this nvidia-ml-py does not have.
    except (nvml.NVMLError, AttributeError):
        return None


def driver_version() -> str:
    """Version of NVIDIA's driver, e.g. `570.86.15`; "": NVML does not tell."""
    nvml = _start(os.getpid())
    if isinstance(nvml, str):
        return ""
    return str(_ask(nvml, nvml.nvmlSystemGetDriverVersion) or "")


def max_sm_clock_hz(uuid: str) -> float:
    """The highest clock the multiprocessors are rated for; 0.0: not known."""
    found = find_device(uuid)
    if isinstance(found, str):
        return 0.0
    nvml = found.nvml
    mhz = _ask(nvml, lambda: nvml.nvmlDeviceGetMaxClockInfo(found.handle, nvml.NVML_CLOCK_SM))
    return float(mhz or 0) * 1e6


def read_gpu_conditions(uuid: str, locked_clock_hz: float = 0.0) -> dict[str, float]:
    """How a GPU is doing right now; the unit is in each key. Empty where `nvml_missing`.

    Args:
        uuid: the device's, as torch gives it.
        locked_clock_hz: the clock this run has locked it to; 0.0: it has not.

    `gpu_throttle_bits` is the mask `throttle_reasons` reads. `gpu_held_back_by_*_s` count up since
    the driver was loaded: the difference of two readings is what happened between them, which a
    look at an idle device before and after would miss. `gpu_clocks_locked` is 1 where this run has
    locked them, or the driver says that a setting limits them; NVML has no question for a lock by
    somebody else, and an idle device may not tell of it.
    """
    found = find_device(uuid)
    if isinstance(found, str):
        return {}
    nvml, handle = found.nvml, found.handle
    readings: dict[str, tuple[Callable[[], Any], float]] = {
        "gpu_sm_clock_hz": (
            lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            1e6,
        ),
        "gpu_memory_clock_hz": (
            lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            1e6,
        ),
        "gpu_power_w": (lambda: nvml.nvmlDeviceGetPowerUsage(handle), 1e-3),
        "gpu_power_limit_w": (lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle), 1e-3),
        "gpu_temperature_c": (lambda: _temperature_c(found), 1.0),
        "gpu_memory_temperature_c": (lambda: _memory_temperature_c(found), 1.0),
        "gpu_utilization_ratio": (lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu, 1e-2),
        "gpu_held_back_by_power_s": (
            lambda: _violation_ns(found, nvml.NVML_PERF_POLICY_POWER),
            1e-9,
        ),
        "gpu_held_back_by_heat_s": (
            lambda: _violation_ns(found, nvml.NVML_PERF_POLICY_THERMAL),
            1e-9,
        ),
        "gpu_throttle_bits": (lambda: _reason_bits(found), 1.0),
    }
    conditions = {}
    for key, (read, unit) in readings.items():
        value = _ask(nvml, read)
        if value is not None:
            conditions[key] = float(value) * unit
    bits = int(conditions.get("gpu_throttle_bits", 0))
    locked = locked_clock_hz > 0 or bool(bits & _CLOCK_SETTING_BIT)
    if locked or "gpu_throttle_bits" in conditions:
        conditions["gpu_clocks_locked"] = float(locked)
    if locked_clock_hz > 0:
        conditions["gpu_locked_clock_hz"] = locked_clock_hz
    return conditions


def _temperature_c(device: NvmlDevice) -> Any:
    nvml = device.nvml
    value = _ask(
        nvml, lambda: nvml.nvmlDeviceGetTemperatureV(device.handle, nvml.NVML_TEMPERATURE_GPU)
    )
    if value is None:  # a driver or an nvidia-ml-py before this name
        value = nvml.nvmlDeviceGetTemperature(device.handle, nvml.NVML_TEMPERATURE_GPU)
    return value


def _memory_temperature_c(device: NvmlDevice) -> int | None:
    nvml = device.nvml
    (field,) = nvml.nvmlDeviceGetFieldValues(device.handle, [nvml.NVML_FI_DEV_MEMORY_TEMP])
    # The call succeeds for a device without the sensor; the field's own code says so.
    return int(field.value.uiVal) if field.nvmlReturn == nvml.NVML_SUCCESS else None


def _violation_ns(device: NvmlDevice, policy: int) -> int:
    """Nanoseconds a policy has held the clocks back (nvml.h, `nvmlViolationTime_t`)."""
    return int(device.nvml.nvmlDeviceGetViolationStatus(device.handle, policy).violationTime)


def _reason_bits(device: NvmlDevice) -> Any:
    nvml = device.nvml
    bits = _ask(nvml, lambda: nvml.nvmlDeviceGetCurrentClocksEventReasons(device.handle))
    if bits is None:  # the same under its name before driver 535
        bits = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(device.handle)
    return bits


def reason_names(bits: int) -> tuple[str, ...]:
    """Names of the bits of a mask, without `HARMLESS_REASONS`; hexadecimal where there is none."""
    names = []
    for position in range(bits.bit_length()):
        bit = 1 << position
        if bits & bit:
            name = _REASON_NAMES.get(bit, f"{bit:#x}")
            if name not in HARMLESS_REASONS:
                names.append(name)
    return tuple(names)


def read_throttle_reasons(uuid: str) -> tuple[str, ...]:
    """What holds the clocks back right now; empty: nothing, or NVML does not tell."""
    return throttle_reasons(read_gpu_conditions(uuid))


def throttle_reasons(*conditions: Mapping[str, float]) -> tuple[str, ...]:
    """What held the clocks back, from readings in the order they were taken. Sorted.

    Whatever a reading names, and whatever has been counted between two of them.
    """
    names: set[str] = set()
    for reading in conditions:
        names.update(reason_names(int(reading.get("gpu_throttle_bits", 0))))
    for key, name in _HELD_BACK.items():
        counts = [reading[key] for reading in conditions if key in reading]
        if any(later > earlier for earlier, later in itertools.pairwise(counts)):
            names.add(name)
    return tuple(sorted(names))


def invalidating_reasons(reasons: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `reasons` that make a time the machine's and not the kernel's."""
    return tuple(name for name in reasons if name in INVALIDATING_REASONS)


def clocks_are_locked(uuid: str) -> bool:
    """Whether the driver says that a setting limits the clocks (see `read_gpu_conditions`)."""
    return read_gpu_conditions(uuid).get("gpu_clocks_locked", 0.0) > 0
