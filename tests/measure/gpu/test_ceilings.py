"""Ceilings of a device whose every kernel takes a known time, and of the real one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from attnbench.measure.gpu import ceilings
from attnbench.measure.gpu.ceilings import Probe, best_rate, measure_gpu_ceilings, torch_probes
from tests.measure.gpu.simulated import SimulatedGpu


def _probe(gpu: SimulatedGpu, name: str, amount: float, seconds: float) -> Probe:
    return Probe(name, lambda: gpu.kernel(name, seconds), amount)


def test_rates_are_amounts_by_true_times() -> None:
    gpu = SimulatedGpu()
    found = measure_gpu_ceilings(
        gpu,
        [
            _probe(gpu, "copy", 2e9, 0.5e-3),
            _probe(gpu, "read", 1e9, 0.25e-3),
            _probe(gpu, "bf16", 1.1e12, 1.4e-3),
            _probe(gpu, "fp32", 0.14e12, 2.5e-3),
        ],
    )
    assert found.copy_bytes_per_s == pytest.approx(4e12, rel=0.01)
    assert found.read_bytes_per_s == pytest.approx(4e12, rel=0.01)
    assert found.matmul_flops_per_s == {
        "bf16": pytest.approx(1.1e12 / 1.4e-3, rel=0.01),
        "fp32": pytest.approx(0.14e12 / 2.5e-3, rel=0.01),
    }


def test_the_host_has_no_part_in_a_rate() -> None:
    slow_host = SimulatedGpu(launch_s=1e-4)  # ten launches last longer than ten kernels
    rate = best_rate(slow_host, _probe(slow_host, "copy", 2e8, 5e-5))
    assert rate == pytest.approx(2e8 / 5e-5, rel=0.05)


def test_a_throttled_spell_does_not_lower_a_ceiling() -> None:
    gpu = SimulatedGpu()
    gpu.clock_hz = lambda at_s: 1e9 if int(at_s / 3e-3) % 2 else 2e9
    rate = best_rate(gpu, _probe(gpu, "bf16", 1e12, 1e-3))
    assert rate == pytest.approx(1e15, rel=0.01)


def test_one_probe_is_done_with_before_the_next_is_made() -> None:
    gpu = SimulatedGpu()
    log = []

    def probes() -> Iterator[Probe]:
        for name in ("copy", "bf16"):
            log.append(f"make {name}")
            yield Probe(name, lambda name=name: log.append(f"run {name}"), 1.0)  # type: ignore[misc]

    measure_gpu_ceilings(gpu, probes())
    assert log.index("make bf16") > max(i for i, line in enumerate(log) if line == "run copy")


def test_what_torch_is_asked_for_is_what_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch's own calls, on its CPU and small, beside a device that only counts.
    import torch

    monkeypatch.setattr(ceilings, "_COPY_BYTES", 1 << 12)
    monkeypatch.setattr(ceilings, "_MATRIX_EDGE", {"bf16": 32, "fp32": 16})
    gpu = SimulatedGpu(l2_bytes=1 << 11)
    found = {probe.name: probe for probe in torch_probes(gpu, ("bf16", "fp32"), "cpu")}
    assert {name: probe.amount for name, probe in found.items()} == {
        "copy": 2 * (1 << 13),  # four times the cache, read and written
        "read": 1 << 13,
        "bf16": 2 * 32**3,
        "fp32": 2 * 16**3,
    }
    copied = found["copy"].call()
    assert isinstance(copied, torch.Tensor)
    assert copied.nbytes == 1 << 13
    assert bool((copied == 1).all())
    total, product = found["read"].call(), found["bf16"].call()
    assert isinstance(total, torch.Tensor)
    assert isinstance(product, torch.Tensor)
    assert total.item() == (1 << 13) / 4
    assert (product.shape, product.dtype) == ((32, 32), torch.bfloat16)


@pytest.mark.gpu
def test_a_real_device_reaches_most_of_its_peak() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    from attnbench.measure.gpu.cuda import CudaRuntime
    from attnbench.measure.peaks import peak_of

    gpu = CudaRuntime()
    found = measure_gpu_ceilings(gpu, torch_probes(gpu, ("bf16", "fp32")))
    assert found.memory_bytes_per_s > 1e10
    assert found.matmul_flops_per_s["bf16"] > found.matmul_flops_per_s["fp32"] > 0
    if peak := peak_of(torch.cuda.get_device_name()):
        assert 0.7 < found.memory_bytes_per_s / peak.memory_bytes_per_s < 1.03
        assert 0.5 < found.matmul_flops_per_s["bf16"] / peak.matmul_flops_per_s < 1.03
