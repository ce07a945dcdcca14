"""An installed vLLM on a real device: its backends over the same list of workloads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnbench.backends.check import check_output, poison_
from attnbench.backends.device import cuda_device
from attnbench.backends.reference import reference_attention
from attnbench.backends.registry import backend_status
from attnbench.backends.vllm_bridge import vllm_backend
from attnbench.backends.vllm_bridge_cache import CacheApiBefore030
from attnbench.backends.vllm_bridge_engine import load_vllm
from attnbench.backends.vllm_bridge_install import missing_reason
from attnbench.workload import Workload
from tests.backends.running import Run, config_of
from tests.backends.vllm.workloads import (
    GPU_MLA_WORKLOADS,
    GPU_WORKLOADS,
    MLA_WORKLOADS,
    WORKLOADS,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.version.hip is not None, reason="no CUDA device here"
    ),
]
ORDINARY = ("TRITON_ATTN", "FLASH_ATTN", "FLASHINFER", "FLEX_ATTENTION")
MLA = ("TRITON_MLA", "FLASHMLA", "FLASH_ATTN_MLA", "FLASHINFER_MLA", "CUTLASS_MLA")
POINTS = [
    pytest.param(name, text, id=f"{name} {what}")
    for names, lists in ((ORDINARY, (WORKLOADS, GPU_WORKLOADS)), (MLA, (GPU_MLA_WORKLOADS,)))
    for name in names
    for texts in lists
    for what, text in texts.items()
] + [
    pytest.param("TRITON_MLA", f"{text} block=64", id=f"TRITON_MLA small {what}")
    for what, text in MLA_WORKLOADS.items()
]


def run_or_skip(name: str, text: str) -> Run:
    """The workload on a backend; skips with vLLM's refusal, and where it is not here."""
    if missing := missing_reason():
        pytest.skip(missing)
    device = cuda_device(*torch.cuda.get_device_capability())
    backend = vllm_backend(name)
    reasons = backend.validate_configuration(config_of(Workload.parse(text)), device)
    if not reasons and (unable := backend_status(f"VLLM:{name}", device)):
        reasons.append(unable)
    if reasons:
        pytest.skip("; ".join(reasons))
    return Run(backend, text, device="cuda")


def has_causal_kernel_only() -> bool:
    """vLLM's Triton kernel of 0.22.1 masks cross attention as if it were causal."""
    return isinstance(load_vllm().api, CacheApiBefore030)


@pytest.mark.parametrize(("name", "text"), POINTS)
def test_output_equals_the_reference(name: str, text: str) -> None:
    run = run_or_skip(name, text)
    try:
        check = run.check()
    except NotImplementedError as error:
        # What vLLM's predicates accept and its kernels do not: a row ends as ERROR with its words.
        pytest.skip(f"vLLM: {error}")
    if name == "TRITON_ATTN" and "encoder_decoder" in text and has_causal_kernel_only():
        assert not check.ok
        return
    assert check.ok, check.reason
    again = run.check()
    assert again.ok, f"the second call: {again.reason}"


@pytest.mark.parametrize("text", ["4q1s4k", "q1s5_q1s777_q40s3k", "4q1s4k window=500"])
@pytest.mark.parametrize("name", ["TRITON_ATTN", "FLASH_ATTN", "FLASHINFER"])
def test_a_captured_graph_replays_to_the_reference(name: str, text: str) -> None:
    run = run_or_skip(name, text)
    batch, impl = run.batch, run.impl
    out = torch.empty_like(batch.query)
    arguments: tuple[Any, ...] = (
        *(batch.layer, batch.query, batch.key, batch.value),
        *(run.kv_cache, run.metadata, out),
    )
    impl.forward(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        impl.forward(*arguments)
    for _ in range(3):
        poison_(out)
        graph.replay()
        torch.cuda.synchronize()
        found = check_output(out, reference_attention(batch), "bf16", "bf16")
        assert found.ok, found.reason
