"""The memory and matrix rates a GPU reaches now, by large operations between two events.

The operations are long (0.3 ms and more on today's largest devices), so that the events' own 2 µs
are under one percent. The best of several is taken: whatever else happens only makes them slower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from attnbench.measure.gpu.runtime import GpuRuntime
from attnbench.store.ceilings import Ceilings

_WARM_UP_CALLS = 2
_SAMPLES = 8

#: Keeps the device busy while the host enqueues all samples.
_DELAY_S = 1e-3

#: A tensor of a copy: many times the L2 cache, and long enough to time.
_COPY_BYTES = 1 << 30
_MIN_L2_FACTOR = 4

#: Edge of the square matrices. fp32 has a tenth of the rate, and needs no more to reach it.
_MATRIX_EDGE = {"fp16": 8192, "bf16": 8192, "fp32": 4096}


@dataclass(frozen=True, slots=True)
class Probe:
    """One operation of known work.

    Attributes:
        name: `copy`, `read`, or the dtype of a matrix product.
        call: enqueues it.
        amount: bytes moved, or floating-point operations.
    """

    name: str
    call: Callable[[], object]
    amount: float


def measure_gpu_ceilings(gpu: GpuRuntime, probes: Iterable[Probe]) -> Ceilings:
    """The best rate of each probe. A probe is asked for when the one before is done with."""
    rates = {probe.name: best_rate(gpu, probe) for probe in probes}
    return Ceilings(
        copy_bytes_per_s=rates.pop("copy", 0.0),
        read_bytes_per_s=rates.pop("read", 0.0),
        matmul_flops_per_s=rates,
    )


def best_rate(gpu: GpuRuntime, probe: Probe) -> float:
    """Amount per second of the fastest of several executions, one behind the other."""
    for _ in range(_WARM_UP_CALLS):
        probe.call()
    gpu.synchronize()
    marks = [gpu.new_event() for _ in range(_SAMPLES + 1)]
    gpu.delay(_DELAY_S)
    marks[0].record()
    for mark in marks[1:]:
        probe.call()
        mark.record()
    gpu.synchronize()
    seconds = min(end.elapsed_s(begin) for begin, end in pairwise(marks))
    return probe.amount / seconds if seconds > 0 else 0.0


def torch_probes(gpu: GpuRuntime, dtypes: Sequence[str], device: str = "cuda") -> Iterator[Probe]:
    """Copy, read and one matrix product per dtype, as torch does them.

    fp32 is multiplied in fp32, as torch does unless told otherwise: a kernel that uses TF32 can
    pass that ceiling.
    """
    yield from _memory_probes(gpu, device)
    for name in dtypes:
        yield _matmul_probe(name, device)


def _memory_probes(gpu: GpuRuntime, device: str) -> tuple[Probe, Probe]:
    import torch

    size = min(max(_COPY_BYTES, _MIN_L2_FACTOR * gpu.l2_bytes), gpu.free_bytes() // 4)
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    total = torch.empty((), dtype=torch.float32, device=device)
    return (
        Probe("copy", partial(target.copy_, source), 2.0 * source.nbytes),
        Probe("read", partial(torch.sum, source, 0, out=total), float(source.nbytes)),
    )


def _matmul_probe(name: str, device: str) -> Probe:
    import torch

    from attnbench.backends.dtypes import torch_dtype

    edge = _MATRIX_EDGE[name]
    dtype = torch_dtype(name)
    # Zeros would draw less power than real numbers, and clock higher.
    left, right = (torch.randn(edge, edge, device=device).to(dtype) for _ in range(2))
    return Probe(name, partial(torch.mm, left, right, out=torch.empty_like(left)), 2.0 * edge**3)
