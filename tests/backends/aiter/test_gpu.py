"""AITER itself on an AMD GPU: every backend over the same list of workloads, vLLM's beside ours."""

from __future__ import annotations

import pytest
import torch

from attnbench.backends.registry import backend_status, get_backend_class
from attnbench.selection.builtin_platforms import RocmPlatform
from attnbench.workload import Workload
from tests.backends.aiter.workloads import (
    GPU_WORKLOADS,
    LATENT_GPU_WORKLOADS,
    LATENT_WORKLOADS,
    WORKLOADS,
)
from tests.backends.running import Run, config_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.version.hip is None, reason="torch is not a build for ROCm"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
]
PLAIN = (
    *("ROCM_AITER_FA", "ROCM_AITER_UNIFIED_ATTN", "TRITON_ATTN"),
    *("VLLM:ROCM_ATTN", "VLLM:ROCM_AITER_FA", "VLLM:ROCM_AITER_UNIFIED_ATTN"),
)
LATENT = ("ROCM_AITER_MLA", "ROCM_AITER_TRITON_MLA", "TRITON_MLA", "VLLM:ROCM_AITER_MLA")
POINTS = [
    pytest.param(backend, text, id=f"{backend} {size} {name}")
    for backends, tables in (
        (PLAIN, {"small": WORKLOADS, "large": GPU_WORKLOADS}),
        (LATENT, {"small": LATENT_WORKLOADS, "large": LATENT_GPU_WORKLOADS}),
    )
    for backend in backends
    for size, texts in tables.items()
    for name, text in texts.items()
]


def run_or_skip(name: str, text: str) -> Run:
    device = RocmPlatform().present_device()
    assert device is not None
    if missing := backend_status(name, device):
        pytest.skip(missing)
    backend = get_backend_class(name)
    if reasons := backend.validate_configuration(config_of(Workload.parse(text)), device):
        pytest.skip("; ".join(reasons))
    return Run(backend, text, "", "cuda")


@pytest.mark.parametrize(("name", "text"), POINTS)
def test_output_equals_the_reference(name: str, text: str) -> None:
    run = run_or_skip(name, text)
    check = run.check()
    assert check.ok, check.reason
    again = run.check()
    assert again.ok, f"the second call: {again.reason}"
