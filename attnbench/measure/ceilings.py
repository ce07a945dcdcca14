"""The memory and matrix rates a device reaches now: the roof of every roofline of the run.

Measured once, when a run starts, and stored in its header. On a CPU in this process, in half a
second; on a GPU in a process of its own, since the one that supervises workers holds no device.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from attnbench.backends.device import Device
from attnbench.backends.dtypes import torch_dtype
from attnbench.measure.environment import OtherLoad
from attnbench.measure.options import MeasureOptions
from attnbench.measure.plan import PlannedPoint
from attnbench.store.ceilings import Ceilings

if TYPE_CHECKING:
    import torch

#: What `FakeTimer` computes with, so that percentages of a rehearsal are exact too.
FAKE_CEILINGS_RATES = (100e9, 1e12)

#: Seconds one CPU rate may take, when nothing else runs. A few samples are always taken: on a busy
#: machine most of them waited for another process, and the best is what counts.
_BUDGET_S = 0.15
_MIN_SAMPLES = 4
_MAX_SAMPLES = 12

#: A tensor of a copy: several times the last-level cache.
_MIN_COPY_BYTES = 64 << 20
_MAX_COPY_BYTES = 256 << 20
_CACHE_FACTOR = 2

_MATRIX_EDGES = (128, 256, 512, 1024)

#: Cores other processes may use while a CPU's ceilings are measured.
MAX_OTHER_CORES = 0.5

_CHILD_TIMEOUT_S = 120.0


def ceilings_of_run(
    plan: Iterable[PlannedPoint], options: MeasureOptions, device: Device
) -> tuple[Ceilings | None, str]:
    """The ceilings a run of `plan` is to be read with, or None and why there are none."""
    dtypes = sorted({point.workload.dtype for point in plan})
    if options.timer == "fake":
        bandwidth, rate = FAKE_CEILINGS_RATES
        return (
            Ceilings(
                copy_bytes_per_s=bandwidth,
                read_bytes_per_s=bandwidth,
                matmul_flops_per_s=dict.fromkeys(dtypes, rate),
            ),
            "",
        )
    if device.kind == "cpu":
        return measure_quiet_cpu_ceilings(dtypes)
    if device.kind == "cuda":
        return _measure_apart(dtypes)
    return None, f"nobody measures what a device of kind {device.kind} can do at most"


def measure_quiet_cpu_ceilings(dtypes: Iterable[str]) -> tuple[Ceilings | None, str]:
    """`measure_cpu_ceilings`, unless others used the processor meanwhile: no ceiling then.

    One other busy process on two cores turns a product of 20 µs into one of 20 ms, in every sample:
    percentages of such a rate would be thousands.
    """
    others = OtherLoad()
    found = measure_cpu_ceilings(dtypes)
    cores = others.cores()
    if cores is not None and cores > MAX_OTHER_CORES:
        return None, f"other processes kept {cores:.1f} cores busy while ceilings were measured"
    return found, ""


def measure_cpu_ceilings(dtypes: Iterable[str]) -> Ceilings:
    """Rates of torch on all of its threads."""
    import torch

    with torch.no_grad():
        copy, read = _memory_rates()
        return Ceilings(
            copy_bytes_per_s=copy,
            read_bytes_per_s=read,
            matmul_flops_per_s={name: _matmul_rate(torch_dtype(name)) for name in dtypes},
        )


def _memory_rates() -> tuple[float, float]:
    import torch

    size = min(max(_MIN_COPY_BYTES, _CACHE_FACTOR * _last_level_cache_bytes()), _MAX_COPY_BYTES)
    # Written, since pages nobody wrote to are all the same page of zeros.
    source = torch.ones(size // 4, dtype=torch.float32)
    target = torch.zeros_like(source)
    copy_s = _best_s(lambda: target.copy_(source))
    read_s = _best_s(source.sum)
    return 2 * size / copy_s, size / read_s


def _matmul_rate(dtype: torch.dtype) -> float:
    """FLOP/s of the best of growing square products: small ones do not keep all units busy.

    A type the processor has no instructions for (fp16 on most) is a hundred times slower: it is not
    asked for a product that would take seconds. How the time grew from one size to the next says
    how long the next one will take, also where most of it is waiting for another process.
    """
    import torch

    best, seconds, growth = 0.0, 0.0, 1.0
    for edge in _MATRIX_EDGES:
        if _MIN_SAMPLES * seconds * growth > _BUDGET_S:
            break
        left, right = (torch.randn(edge, edge).to(dtype) for _ in range(2))
        before, seconds = (
            seconds,
            _best_s(partial(torch.mm, left, right, out=torch.empty_like(left))),
        )
        growth = min(8.0, max(1.0, seconds / before)) if before else 1.0
        best = max(best, 2.0 * edge**3 / seconds)
    return best


def _best_s(call: Callable[[], object]) -> float:
    """Seconds of the fastest of several calls, the first thrown away."""
    call()
    best = float("inf")
    started = time.perf_counter()
    for taken in range(1, _MAX_SAMPLES + 1):
        before = time.perf_counter_ns()
        call()
        best = min(best, (time.perf_counter_ns() - before) * 1e-9)
        if taken >= _MIN_SAMPLES and time.perf_counter() - started > _BUDGET_S:
            break
    return best


def _last_level_cache_bytes() -> int:
    """The largest cache of the first processor, as Linux tells it; 0: it does not."""
    largest = 0
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        try:
            text = path.read_text(encoding="ascii").strip()
            largest = max(largest, int(text.rstrip("KMG")) << {"K": 10, "M": 20}.get(text[-1], 0))
        except (OSError, ValueError):
            continue
    return largest


def _measure_apart(dtypes: list[str]) -> tuple[Ceilings | None, str]:
    code = "from attnbench.measure.ceilings import main; main()"
    mend = "attnbench doctor says what is wrong with the device"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, *dtypes],
            capture_output=True,
            text=True,
            timeout=_CHILD_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None, f"the GPU did not copy and multiply within {_CHILD_TIMEOUT_S:g} s; {mend}"
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        return None, f"the GPU cannot copy and multiply ({last}); {mend}"
    return Ceilings.from_json(json.loads(done.stdout.strip().splitlines()[-1])), ""


def main() -> None:
    """Body of the process `_measure_apart` starts: dtypes as arguments, JSON on stdout."""
    from attnbench.measure.gpu.ceilings import measure_gpu_ceilings, torch_probes
    from attnbench.measure.gpu.cuda import CudaRuntime

    gpu = CudaRuntime()
    print(json.dumps(measure_gpu_ceilings(gpu, torch_probes(gpu, sys.argv[1:])).to_json()))
