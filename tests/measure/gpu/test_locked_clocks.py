"""Clocks are locked when asked, to a clock the device has, and set free however the block ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pynvml
import pytest

from attnbench.errors import InfrastructureError, UsageError
from attnbench.measure.gpu.locked_clocks import locked_clocks
from tests.measure.gpu.fake_nvml import UUID, FakeNvml, nvml_error


def test_locked_inside_and_free_after(fake: FakeNvml) -> None:
    with locked_clocks(UUID, 1.2e9) as hz:
        assert fake.calls == [("lock", 1200, 1200)]
        assert hz == 1.2e9
    assert fake.calls == [("lock", 1200, 1200), ("unlock",)]


def test_the_nearest_clock_of_the_device_is_taken(fake: FakeNvml) -> None:
    with locked_clocks(UUID, 1.960e9) as hz:
        assert hz == 1.965e9
    assert fake.calls[0] == ("lock", 1965, 1965)


@pytest.mark.parametrize("mhz", [0, -1, 344, 1981, 1.2e9])
def test_a_clock_the_device_does_not_have_is_refused(fake: FakeNvml, mhz: float) -> None:
    with pytest.raises(UsageError, match="345 to 1980 MHz"), locked_clocks(UUID, mhz * 1e6):
        pytest.fail("entered")
    assert fake.calls == []


@pytest.mark.parametrize("told", [[], nvml_error(pynvml.NVML_ERROR_NOT_SUPPORTED)])
def test_a_device_that_lists_no_clocks_gets_what_was_asked(fake: FakeNvml, told: object) -> None:
    fake.values["nvmlDeviceGetSupportedMemoryClocks"] = told
    with locked_clocks(UUID, 1.2004e9) as hz:
        assert hz == 1.2e9


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), UsageError("y")])
def test_free_after_an_exception_which_goes_on(fake: FakeNvml, error: BaseException) -> None:
    with pytest.raises(type(error)), locked_clocks(UUID, 1.2e9):
        raise error
    assert fake.calls == [("lock", 1200, 1200), ("unlock",)]


def test_without_permission_it_says_what_to_do_and_undoes_nothing(fake: FakeNvml) -> None:
    fake.values["nvmlDeviceSetGpuLockedClocks"] = nvml_error(pynvml.NVML_ERROR_NO_PERMISSION)
    with (
        pytest.raises(UsageError, match=r"run as root.*leave --lock-clocks out"),
        locked_clocks(UUID, 1.2e9),
    ):
        pytest.fail("entered")
    assert fake.calls == [("lock", 1200, 1200)]


def test_a_device_without_locks_is_refused(fake: FakeNvml) -> None:
    fake.values["nvmlDeviceSetGpuLockedClocks"] = nvml_error(pynvml.NVML_ERROR_NOT_SUPPORTED)
    with pytest.raises(UsageError, match="does not take a lock"), locked_clocks(UUID, 1.2e9):
        pytest.fail("entered")


def test_without_nvml_it_says_what_is_missing(fake: FakeNvml) -> None:
    fake.values["nvmlInit"] = nvml_error(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
    with (
        pytest.raises(InfrastructureError, match="install NVIDIA's driver"),
        locked_clocks(UUID, 1.2e9),
    ):
        pytest.fail("entered")


def test_clocks_that_cannot_be_set_free_are_reported(fake: FakeNvml) -> None:
    fake.values["nvmlDeviceResetGpuLockedClocks"] = nvml_error(pynvml.NVML_ERROR_UNKNOWN)
    with (
        pytest.raises(InfrastructureError, match=r"stay locked.*--reset-gpu-clocks"),
        locked_clocks(UUID, 1.2e9),
    ):
        pass


def test_signals_are_as_before_afterwards_and_others_are_left_alone(fake: FakeNvml) -> None:
    def mine(number: int, frame: object) -> None:
        return None

    before = signal.signal(signal.SIGTERM, mine)
    try:
        with locked_clocks(UUID, 1.2e9):
            assert signal.getsignal(signal.SIGTERM) is mine
        assert signal.getsignal(signal.SIGTERM) is mine
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with locked_clocks(UUID, 1.2e9):
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_it_works_in_another_thread(fake: FakeNvml) -> None:
    def lock() -> None:
        with locked_clocks(UUID, 1.2e9):
            pass

    thread = threading.Thread(target=lock)
    thread.start()
    thread.join()
    assert fake.calls == [("lock", 1200, 1200), ("unlock",)]


CHILD = """
import time
from tests.measure.gpu.fake_nvml import UUID, install
from attnbench.measure.gpu.locked_clocks import locked_clocks

fake = install()
try:
    with locked_clocks(UUID, 1.2e9):
        print("locked", flush=True)
        time.sleep(60)
finally:
    print(fake.calls[-1], flush=True)
"""


def test_a_process_that_is_told_to_end_sets_them_free() -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):
        child = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        assert child.stdout.readline() == "locked\n"
        child.send_signal(number)
        output, _ = child.communicate(timeout=60)
        assert output == "('unlock',)\n"
        assert child.returncode == 128 + number
