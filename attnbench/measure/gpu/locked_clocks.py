"""`--lock-clocks`: the one place that changes a clock, and sets it back."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from attnbench.errors import InfrastructureError, UsageError
from attnbench.measure.gpu.nvml import NvmlDevice, find_device

#: Signals that would end the process without running what stands in `finally`.
_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def locked_clocks(uuid: str, hz: float) -> Iterator[float]:
    """Hold the multiprocessors at one clock inside the block. Yields that clock, in hertz.

    The clock is the one of the device that is nearest to `hz`. At the end, also after an exception,
    ctrl-C, SIGTERM or SIGHUP, clocks are free again, a lock from before included: NVML cannot be
    asked for one. After SIGKILL they stay locked until `nvidia-smi --reset-gpu-clocks`.

    Raises:
        UsageError: not permitted, not a clock of this device, or a device without locks.
        InfrastructureError: NVML is missing, or the clocks could not be set free.
    """
    device = find_device(uuid)
    if isinstance(device, str):
        raise InfrastructureError(f"--lock-clocks: {device}; or leave --lock-clocks out")
    mhz = _nearest_mhz(device, hz)
    with _ended_by_exceptions(), contextlib.ExitStack() as undo:
        # Before the change, not after: a signal may come between the two.
        undo.callback(_unlock, device, uuid)
        try:
            _lock(device, mhz)
        except UsageError:
            undo.pop_all()  # refused: there is nothing to undo
            raise
        yield mhz * 1e6


def _lock(device: NvmlDevice, mhz: int) -> None:
    nvml = device.nvml
    try:
        nvml.nvmlDeviceSetGpuLockedClocks(device.handle, mhz, mhz)
    except nvml.NVMLError_NoPermission as error:
        raise UsageError(
            "--lock-clocks: the driver lets only root lock clocks; run as root, lock them yourself "
            f"(sudo nvidia-smi --lock-gpu-clocks={mhz}) and give --rated-clock {mhz} instead, or "
            "leave --lock-clocks out"
        ) from error
    except nvml.NVMLError as error:
        raise UsageError(
            f"--lock-clocks: this device does not take a lock at {mhz} MHz ({error}); leave "
            "--lock-clocks out"
        ) from error


def _unlock(device: NvmlDevice, uuid: str) -> None:
    try:
        device.nvml.nvmlDeviceResetGpuLockedClocks(device.handle)
    except device.nvml.NVMLError as error:
        raise InfrastructureError(
            f"the clocks of {uuid} stay locked ({error}); run as root: "
            "nvidia-smi --reset-gpu-clocks"
        ) from error


def _nearest_mhz(device: NvmlDevice, hz: float) -> int:
    """The device's clock nearest to `hz`; rounded to whole MHz where it does not list them."""
    nvml, handle = device.nvml, device.handle
    mhz = hz / 1e6
    try:
        memory_mhz = max(nvml.nvmlDeviceGetSupportedMemoryClocks(handle))
        known = sorted(nvml.nvmlDeviceGetSupportedGraphicsClocks(handle, memory_mhz))
    except (nvml.NVMLError, ValueError):  # ValueError: an empty list
        known = []
    lowest, highest = (known[0], known[-1]) if known else (1, 10_000)
    if not lowest <= mhz <= highest:
        raise UsageError(
            f"--lock-clocks {mhz:g} MHz: this device has {lowest} to {highest} MHz; name one of "
            "them, or leave --lock-clocks out"
        )
    return min(known, key=lambda clock: abs(clock - mhz), default=round(mhz))


@contextlib.contextmanager
def _ended_by_exceptions() -> Iterator[None]:
    """Inside, `_SIGNALS` raise SystemExit, so that `finally` runs. Only those nobody handles yet,
    and only in the main thread: Python takes handlers from no other."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    free: list[signal.Signals] = []
    if threading.current_thread() is threading.main_thread():
        free = [number for number in _SIGNALS if signal.getsignal(number) is signal.SIG_DFL]
    for number in free:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in free:
            signal.signal(number, signal.SIG_DFL)
