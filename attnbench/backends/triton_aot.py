"""Compiles every Triton kernel ahead of time, for GPUs that are not here, and says what it costs.

The kernels are compiled from the very launches the backends make (`TritonAttentionImpl.launches`
and its like, over meta tensors), through Triton's own argument specialisation: a launch that does
not fit its kernel fails here. No GPU and no driver is needed.

    python -m attnbench.backends.triton_aot --targets sm90,gfx942 --format markdown
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver as triton_driver

from attnbench.backends.device import Device, parse_device
from attnbench.backends.triton_aot_cases import AOT_CASES, NUMBER_FORMATS, AotCase
from attnbench.backends.triton_launch import Launch, is_interpreted, shared_memory_limit
from attnbench.errors import AttnBenchError, DeviceError, UsageError

TARGETS = ("sm75", "sm80", "sm89", "sm90", "sm100", "sm120", "gfx942", "gfx950")
OK = "ok"
NOT_ON_TARGET = "not on this target"
TOO_LARGE = "too much shared memory"
FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class AotRow:
    """One kernel of one case, compiled for one target. Sizes in bytes, registers of 32 bits."""

    case: str
    kernel: str
    target: str
    number_format: str
    status: str
    reason: str = ""
    refusal: str = ""
    """Why the backend refuses this workload on this target, whatever the compiler says."""
    block_m: int = 0
    tile_n: int = 0
    num_warps: int = 0
    num_stages: int = 0
    programs: int = 0
    """Of the launch's grid."""
    registers: int = 0
    """Per thread; on AMD vector registers, accumulation registers included."""
    spilled_registers: int = 0
    """To memory, per thread. NVIDIA: words of stack, for which the kernels have no other use."""
    shared_bytes: int = 0
    shared_limit_bytes: int = 0


@dataclass(frozen=True, slots=True)
class _Job:
    case: AotCase
    target: str
    number_format: str


def compile_report(
    targets: Sequence[str] = TARGETS,
    number_formats: Sequence[str] = NUMBER_FORMATS,
    *,
    full: bool = False,
    workers: int | None = None,
    cases: Sequence[AotCase] = AOT_CASES,
) -> list[AotRow]:
    """Compile every kernel for every target and number format.

    Args:
        targets: device texts such as `sm90` or `gfx942`.
        number_formats: `fp16`, `bf16`, `fp32`, or an fp8 KV cache (`fp8_e4m3`, `fp8_e5m2`)
            beside bf16 queries (fp16 below compute capability 8.0).
        full: all cases; else those that stand for them.
        workers: processes; None: one a core, at most one a job.
        cases: what is compiled, those `only_in_full` where asked for.

    Raises:
        DeviceError, UsageError: an unknown target or format, or kernels under the interpreter.
    """
    if is_interpreted():
        raise UsageError("TRITON_INTERPRET=1 excludes compiling; unset it and start again")
    for name in number_formats:
        if name not in (*NUMBER_FORMATS, "fp32"):
            raise UsageError(f"number format {name!r}: write one of {', '.join(NUMBER_FORMATS)}")
    for target in targets:
        aot_device(target)
    jobs = [
        _Job(case, target, number_format)
        for target in targets
        for number_format in number_formats
        for case in cases
        if full or not case.only_in_full
    ]
    workers = min(workers or os.cpu_count() or 1, len(jobs))
    if workers <= 1:
        return [row for job in jobs for row in _compile_job(job)]
    # Fresh interpreters: a fork would copy the threads torch has started.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return [row for rows in pool.map(_compile_job, jobs) for row in rows]


def aot_device(target: str) -> Device:
    """The device of a target's text. Raises DeviceError where Triton has no compiler for it."""
    device = parse_device(target)
    if device is None or device.kind == "cpu":
        raise DeviceError(f"target {target!r} is no GPU; write one of {', '.join(TARGETS)}")
    return device


class _AbsentDevice:
    """What Triton asks of a driver before it compiles: the target, and nothing of a device."""

    def __init__(self, device: Device) -> None:
        if device.capability is not None:
            arch = device.capability.major * 10 + device.capability.minor
            self.target = GPUTarget("cuda", arch, 32)
        else:
            self.target = GPUTarget("hip", device.arch, 64)

    def get_current_device(self) -> str:
        """The key of Triton's cache of compiled kernels."""
        return str(self.target)

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def _compile_job(job: _Job) -> list[AotRow]:
    device = aot_device(job.target)
    torch.set_num_threads(1)
    triton_driver.set_active(_AbsentDevice(device))
    refusal = "; ".join(job.case.refusals(device, job.number_format))
    return [
        _compile_launch(job, launch, device, refusal)
        for launch in job.case.launches(device, job.number_format)
    ]


def _compile_launch(job: _Job, launch: Launch, device: Device, refusal: str) -> AotRow:
    row = AotRow(
        case=job.case.name,
        kernel=launch.kernel.__name__,
        target=job.target,
        number_format=job.number_format,
        status=OK,
        refusal=refusal,
        block_m=launch.arguments.get("BLOCK_M", 0),
        tile_n=launch.arguments.get("TILE_N", 0),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        programs=math.prod(launch.grid),
        shared_limit_bytes=shared_memory_limit(device),
    )
    try:
        compiled = launch.kernel.warmup(
            grid=launch.grid,
            **launch.arguments,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
    # Triton raises its own errors, MLIR's as RuntimeError, and ptxas's as another: all of them
    # are the outcome to report.
    except Exception as error:
        return replace(row, status=_failure(error), reason=_first_line(error))
    registers, spilled = _resources(compiled, device)
    shared = int(compiled.metadata.shared)
    fits = shared <= row.shared_limit_bytes
    return replace(
        row,
        status=OK if fits else TOO_LARGE,
        reason="" if fits else f"{shared} bytes of shared memory of {row.shared_limit_bytes}",
        registers=registers,
        spilled_registers=spilled,
        shared_bytes=shared,
    )


def _messages(error: BaseException) -> str:
    parts = []
    current: BaseException | None = error
    while current is not None:
        parts.append(str(current))
        current = current.__cause__
    return "\n".join(parts)


def _failure(error: BaseException) -> str:
    return NOT_ON_TARGET if "not supported in this architecture" in _messages(error) else FAILED


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in _messages(error).splitlines() if line.strip()]
    telling = [line for line in lines if "not supported" in line or "rror" in line] or lines
    return telling[-1] if telling else type(error).__name__


_USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")


def _resources(compiled: CompiledKernel, device: Device) -> tuple[int, int]:
    """(registers, spilled registers) of a compiled kernel."""
    if device.kind == "rocm":
        assembly = compiled.asm["amdgcn"]
        # Scalar registers spill into lanes of vector registers, not to memory.
        return _amd_field(assembly, "vgpr_count"), _amd_field(assembly, "vgpr_spill_count")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run(
            [_cuobjdump(), "-res-usage", str(cubin)], capture_output=True, text=True, check=True
        ).stdout
    match = _USAGE.search(usage)
    if match is None:
        raise UsageError(f"cuobjdump printed no resource usage: {usage.strip()!r}")
    return int(match[1]), int(match[2]) // 4


def _amd_field(assembly: str, name: str) -> int:
    match = re.search(rf"\.{name}:\s+(\d+)", assembly)
    return int(match[1]) if match else 0


def _cuobjdump() -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


_COLUMNS = {
    "case": "case",
    "kernel": "kernel",
    "target": "target",
    "number_format": "format",
    "block_m": "M",
    "tile_n": "N",
    "num_warps": "warps",
    "num_stages": "stages",
    "registers": "registers",
    "spilled_registers": "spilled",
    "shared_bytes": "shared B",
    "status": "status",
}


def summary(rows: Sequence[AotRow]) -> str:
    """The kernels that attend, one column a target: registers / spilled / KiB of shared memory,
    and the tile. Of a case's several launches, each has a line."""
    targets = list(dict.fromkeys(row.target for row in rows))
    lines: dict[tuple[str, str, int], dict[str, str]] = {}
    for row in rows:
        if row.block_m == 0:
            continue
        earlier = [line for line in lines if line[:2] == (row.case, row.number_format)]
        number = sum(row.target in lines[line] for line in earlier)
        numbers = f"{row.registers} / {row.spilled_registers} / {row.shared_bytes / 1024:.0f}"
        tile = f"{row.block_m}x{row.tile_n}, {row.num_warps}w, {row.num_stages}s"
        shown = "refused" if row.refusal else f"{numbers}: {tile}"
        if row.status != OK and not row.refusal:
            shown = row.status
        lines.setdefault((row.case, row.number_format, number), {})[row.target] = shown
    table = ["| case | format | " + " | ".join(targets) + " |", "| --- " * (len(targets) + 2) + "|"]
    for (case, number_format, _), cells in lines.items():
        shown = " | ".join(cells.get(target, "") for target in targets)
        table.append(f"| {case} | {number_format} | {shown} |")
    return "\n".join(table)


def format_report(rows: Sequence[AotRow], fmt: str) -> str:
    """The rows as `table`, `markdown` or `json`; `summary`: only what attends, by target."""
    if fmt == "summary":
        return summary(rows)
    if fmt == "json":
        return json.dumps([asdict(row) for row in rows], indent=2)
    cells = [list(_COLUMNS.values())]
    for row in rows:
        values: dict[str, Any] = asdict(row)
        if row.status not in (OK, TOO_LARGE):
            values |= dict.fromkeys(("registers", "spilled_registers", "shared_bytes"), "")
        if row.status == FAILED:
            values["status"] = f"{FAILED}: {row.reason}"
        if row.status != OK and row.refusal:
            values["status"] += f" (refused: {row.refusal})"
        cells.append([str(values[name]) for name in _COLUMNS])
    if fmt == "markdown":
        cells.insert(1, ["---"] * len(_COLUMNS))
        return "\n".join("| " + " | ".join(line) + " |" for line in cells)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report. Exit 0: all the backends accept compiles and fits; else 4; 2: usage."""
    parser = argparse.ArgumentParser(
        prog="python -m attnbench.backends.triton_aot",
        description="Compile our Triton kernels for GPUs that are not here.",
    )
    parser.add_argument("--targets", default=",".join(TARGETS), help="e.g. sm90,gfx942")
    parser.add_argument(
        "--formats", default=",".join(NUMBER_FORMATS), help="number formats, e.g. bf16,fp8_e4m3"
    )
    parser.add_argument("--full", action="store_true", help="all cases, not only typical ones")
    parser.add_argument("--workers", type=int, default=None, help="processes; default: one a core")
    parser.add_argument(
        "--format", choices=("table", "json", "markdown", "summary"), default="table"
    )
    arguments = parser.parse_args(argv)
    try:
        rows = compile_report(
            arguments.targets.split(","),
            arguments.formats.split(","),
            full=arguments.full,
            workers=arguments.workers,
        )
    except AttnBenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    print(format_report(rows, arguments.format))
    return 0 if all(row.status == OK or row.refusal for row in rows) else 4


if __name__ == "__main__":
    raise SystemExit(main())
