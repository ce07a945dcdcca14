"""The kernels that read a GPU's clocks: compiled here, and held against a real clock on a GPU.

Not yet run on hardware; on a machine with a GPU: `pytest -m gpu tests/measure/gpu/test_stamps.py`.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime.driver import driver

from attnbench.backends import triton_aot
from attnbench.backends.triton_launch import is_interpreted
from attnbench.measure.gpu import stamps
from attnbench.measure.gpu.clock import sm_clock_hz
from attnbench.measure.gpu.stamp_kernel import (
    attnbench_empty,
    attnbench_stamp,
    attnbench_timer_step,
)
from attnbench.measure.gpu.stamps import STAMP_KERNEL, StampBuffer, empty_kernel, has_stamps

compiles = pytest.mark.skipif(is_interpreted(), reason="TRITON_INTERPRET=1 excludes compiling")

BUFFER = torch.empty((4096, 3), dtype=torch.int64, device="meta")


class CompileOnly:
    """Compiles kernels for a GPU that is not here."""

    def __init__(self, target: str, tmp_path: Path) -> None:
        self.device = triton_aot.aot_device(target)
        self._cubin = tmp_path / "kernel.cubin"

    def stamp(self, slot: int, has_clocks: bool = True) -> Any:
        return attnbench_stamp.warmup(BUFFER, slot, HAS_CLOCKS=has_clocks, grid=(132,), num_warps=1)

    def instructions(self, compiled: Any) -> list[str]:
        """Machine instructions in the order they lie in, without their predicates."""
        self._cubin.write_bytes(compiled.asm["cubin"])
        text = subprocess.run(
            [triton_aot._cuobjdump(), "-sass", str(self._cubin)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        return re.findall(r"/\*[0-9a-f]{4}\*/\s+(?:@!?U?P\d\s+)?([^;]*?)\s*;", text)


@pytest.fixture(params=["sm80", "sm90", "sm100"])
def target(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> CompileOnly:
    found = CompileOnly(request.param, tmp_path)
    monkeypatch.setattr(driver, "_active", triton_aot._AbsentDevice(found.device))
    return found


def statements(ptx: str) -> list[str]:
    """The statements of a kernel's body."""
    body = re.sub(r"//.*", "", ptx[ptx.index("{") :])
    return [line.strip() for line in re.split(r"[;\n]", body) if line.strip()]


@compiles
def test_a_stamp_reads_each_register_once_side_by_side(target: CompileOnly) -> None:
    compiled = target.stamp(5)
    assert compiled.name == STAMP_KERNEL
    reads = [s for s in statements(compiled.asm["ptx"]) if re.search(r"%(smid|clock|globaltim)", s)]
    # Whole 64-bit registers: half of one wraps within seconds.
    assert [re.sub(r"%rd?\d+", "R", s) for s in reads] == [
        "mov.u32 R, %smid",
        "mov.u64 R, %clock64",
        "mov.u64 R, %globaltimer",
    ]

    code = target.instructions(compiled)
    clock = [i for i, line in enumerate(code) if "SR_CLOCK" in line]
    timer = [i for i, line in enumerate(code) if "SR_GLOBALTIMER" in line]
    where = [i for i, line in enumerate(code) if "SMID" in line]
    assert [len(clock), len(timer), len(where)] == [1, 1, 1]
    # Nothing between the two: what lay there would be in one span and not in the other.
    assert timer[0] == clock[0] + 1
    # CS2R on a register pair is one read of all 64 bits.
    assert code[clock[0]].startswith("CS2R R")
    assert code[timer[0]].startswith("CS2R R")
    # The clocks are read before anything is stored, and stored they are.
    stores = [i for i, line in enumerate(code) if line.startswith("STG")]
    assert len(stores) == 3
    assert timer[0] < min(stores)
    for index in (clock[0], timer[0]):
        register = code[index].split()[1].rstrip(",")
        assert any(code[i].endswith(f", {register}") for i in stores), code


@compiles
def test_all_slots_are_one_compiled_kernel(target: CompileOnly) -> None:
    # Triton would compile slot 1 and multiples of 16 anew, in the middle of a timing.
    code = {bytes(target.stamp(slot).asm["cubin"]) for slot in (0, 1, 5, 16, 4095)}
    assert len(code) == 1


@compiles
def test_the_empty_kernel_does_nothing(target: CompileOnly) -> None:
    compiled = attnbench_empty.warmup(grid=(1,), num_warps=1)
    code = target.instructions(compiled)
    # It loads its stack pointer, as all do, leaves, and pads the line.
    body = code[: code.index("EXIT")]
    assert all(re.match(r"(LDC|IMAD\.MOV\.U32|MOV|NOP)\b.*", line) for line in body), body
    assert len(body) <= 2
    assert not [line for line in code if re.match(r"(ST|LD\b|LDG|BAR|S2|CS2)", line)]


@compiles
def test_the_timers_step_is_sought_in_a_loop_of_reads(target: CompileOnly) -> None:
    compiled = attnbench_timer_step.warmup(BUFFER, NUM_READS=4096, grid=(1,), num_warps=1)
    code = target.instructions(compiled)
    assert sum("SR_GLOBALTIMER" in line for line in code) >= 2
    reads = [i for i, line in enumerate(code) if "SR_GLOBALTIMER" in line]
    stored = next(i for i, line in enumerate(code) if line.startswith("STG"))
    assert any(code[i].startswith("BRA") for i in range(reads[-1], stored))


@compiles
def test_on_rocm_a_stamp_is_a_name_and_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    device = triton_aot.aot_device("gfx942")
    monkeypatch.setattr(driver, "_active", triton_aot._AbsentDevice(device))
    compiled = attnbench_stamp.warmup(BUFFER, 0, HAS_CLOCKS=False, grid=(132,), num_warps=1)
    assert compiled.name == STAMP_KERNEL
    assert "s_endpgm" in compiled.asm["amdgcn"]
    assert "global_store" not in compiled.asm["amdgcn"]
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not has_stamps(torch.device("cuda"))


def test_stamps_are_nvidias(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not has_stamps(torch.device("cpu"))
    monkeypatch.setattr(torch.version, "hip", None)
    assert has_stamps(torch.device("cuda"))


class FakeKernel:
    """A kernel that runs on the host: a stamp writes what a multiprocessor 0 would."""

    def __init__(self, clock: list[tuple[int, int]]) -> None:
        self.launches: list[tuple[tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = []
        self._clock = clock

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **constants: Any) -> None:
            self.launches.append((grid, args, constants))
            if constants.get("HAS_CLOCKS") and self._clock:
                buffer, slot = args
                cycles, nanoseconds = self._clock.pop(0)
                buffer[slot] = torch.tensor([1, cycles, nanoseconds])
            if "NUM_READS" in constants:
                args[0][0] = 32

        return launch


@pytest.fixture
def on_the_host(monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    """`StampBuffer` in host memory. The first stamp is the one that compiles."""
    epoch = 1_795_000_000_000_000_000
    kernel = FakeKernel([(1, 1), *((7_000 + 2 * t, epoch + t) for t in (3, 50_003, 60_003))])
    for name in ("attnbench_stamp", "attnbench_timer_step", "attnbench_empty"):
        monkeypatch.setattr(stamps, name, kernel)
    monkeypatch.setattr(stamps, "has_stamps", lambda device: True)
    properties = type("Properties", (), {"multi_processor_count": 132})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return kernel


def test_slots_are_read_exactly_and_emptied(on_the_host: FakeKernel) -> None:
    buffer = StampBuffer(torch.device("cpu"), slots=8)
    assert buffer.timer_step_ns == 32
    assert all(stamp.sm == -1 for stamp in buffer.read(8))  # the one that compiled is gone
    for slot in (0, 1):
        buffer.stamp(slot)
    first, second, third = buffer.read(3)
    assert (first.sm, second.sm, third.sm) == (0, 0, -1)
    # In integers: a float of 1.8e18 ns has steps of 256.
    assert (first.time_ns, second.time_ns - first.time_ns) == (1_795_000_000_000_000_003, 50_000)
    assert sm_clock_hz(first, second, buffer.timer_step_ns) == pytest.approx(2e9)
    assert [stamp.sm for stamp in buffer.read(3)] == [-1] * 3
    buffer.stamp(1)
    assert [stamp.sm for stamp in buffer.read(2)] == [-1, 0]


def test_a_stamp_has_a_program_for_every_multiprocessor(on_the_host: FakeKernel) -> None:
    buffer = StampBuffer(torch.device("cpu"), slots=8)
    on_the_host.launches.clear()
    buffer.stamp(3)
    empty_kernel()
    assert [grid for grid, _, _ in on_the_host.launches] == [(132,), (1,)]
    for slot in (-1, 8):
        with pytest.raises(IndexError, match="use 0 to 7"):
            buffer.stamp(slot)


@pytest.mark.gpu
@pytest.mark.skipif(not has_stamps(torch.device("cuda")), reason="stamps read NVIDIA's registers")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnAGpu:
    def test_the_clock_over_a_delay_is_one_the_device_has(self) -> None:
        from attnbench.measure.gpu.nvml import max_sm_clock_hz

        delay: Any = torch.cuda._sleep  # untyped in torch
        device = torch.device("cuda")
        buffer = StampBuffer(device)
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        rated = max_sm_clock_hz(uuid)
        assert rated > 0, "NVML does not tell the rated clock"
        assert 1 <= buffer.timer_step_ns <= 2000
        for _ in range(3):
            buffer.stamp(0)
            delay(int(rated * 2e-3))
            buffer.stamp(1)
            begin, end = buffer.read(2)
            assert begin.sm == end.sm == 0
            clock = sm_clock_hz(begin, end, buffer.timer_step_ns)
            assert clock is not None
            assert 0.2 * rated <= clock <= 1.1 * rated
            # The delay counts cycles: the span must be what they last at that clock.
            assert end.cycles - begin.cycles >= rated * 2e-3
            assert (end.time_ns - begin.time_ns) * 1e-9 >= 2e-3

    def test_every_slot_is_written_also_by_a_replayed_graph(self) -> None:
        buffer = StampBuffer(torch.device("cuda"))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for slot in range(64):
                buffer.stamp(slot)
                empty_kernel()
        for _ in range(2):
            graph.replay()
            torch.cuda.synchronize()
            read = buffer.read(65)
            assert [stamp.sm for stamp in read] == [0] * 64 + [-1]
            times = [stamp.time_ns for stamp in read[:64]]
            assert times == sorted(times)
            assert times[-1] > times[0]
