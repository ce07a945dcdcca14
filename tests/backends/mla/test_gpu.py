"""The real libraries on a real device: every variant over the same list of workloads."""

from __future__ import annotations

import pytest
import torch

from attnbench.backends.check import check_output, poison_
from attnbench.backends.device import cuda_device
from attnbench.backends.mla_libraries import MLA_LIBRARIES
from attnbench.backends.reference import reference_attention
from attnbench.backends.registry import backend_status
from attnbench.errors import BackendUnavailableError
from tests.backends.mla.cases import BACKENDS, refused, with_block
from tests.backends.mla.workloads import GPU_WORKLOADS, WORKLOADS
from tests.backends.running import Run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.version.hip is not None, reason="no CUDA device here"
    ),
]
VARIANTS = [(name, variant) for name in BACKENDS for variant in MLA_LIBRARIES[name]]
PREFILLS = [
    ("FLASHMLA", "VLLM+FA4"),
    ("FLASHMLA", "VLLM+FA2"),
    ("FLASH_ATTN_MLA", "FA3+FA4"),
    ("FLASH_ATTN_MLA", "FA3+FA2"),
]
POINTS = [
    pytest.param(backend, variant, text, id=f"{backend} {variant} {size} {name}")
    for backend, variant in [*VARIANTS, *PREFILLS]
    for size, texts in (("small", WORKLOADS), ("large", GPU_WORKLOADS))
    for name, text in texts.items()
]


def run_or_skip(backend: str, variant: str, text: str) -> Run:
    """The workload on a variant; skips with the refusal, and where a library is not here."""
    text = with_block(backend, text)
    device = cuda_device(*torch.cuda.get_device_capability())
    if reason := refused(backend, variant, text, device):
        pytest.skip(reason)
    if missing := backend_status(backend, device, variant):
        pytest.skip(missing)
    try:
        return Run(BACKENDS[backend], text, variant, "cuda")
    except BackendUnavailableError as error:
        pytest.skip(str(error))


def compare(run: Run, out: torch.Tensor) -> str:
    workload = run.workload
    return check_output(
        out,
        reference_attention(run.batch),
        workload.dtype,
        workload.resolved_kv_cache_dtype,
        lse=run.lse,
    ).reason


@pytest.mark.parametrize(("backend", "variant", "text"), POINTS)
def test_output_and_lse_equal_the_reference(backend: str, variant: str, text: str) -> None:
    run = run_or_skip(backend, variant, text)
    run.lse = None
    assert compare(run, run.attend()) == ""
    assert compare(run, run.attend()) == "", "the second call"


@pytest.mark.parametrize("name", ["decode", "decode, many", "decode, fp8", "speculative"])
@pytest.mark.parametrize(("backend", "variant"), VARIANTS)
def test_a_captured_graph_replays_to_the_reference(backend: str, variant: str, name: str) -> None:
    run = run_or_skip(backend, variant, GPU_WORKLOADS[name])
    run.metadata = run.builder.build_for_cudagraph_capture(run.batch.metadata)
    batch, shape, impl = run.batch, run.workload.shape, run.impl
    if run.metadata.num_prefills:
        pytest.skip(f"{backend}:{variant} runs this batch as a prefill, which is not captured")
    nope, rope = torch.split(batch.query, [shape.qk_nope_head_dim, shape.qk_rope_head_dim], dim=-1)
    query = torch.cat([torch.einsum("thn,hnl->thl", nope, batch.layer.W_UK), rope], -1)
    latent = query.new_empty((*query.shape[:2], shape.kv_lora_rank))
    impl.forward_mqa(batch.layer, query, run.kv_cache, run.metadata, latent)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run.lse = impl.forward_mqa(batch.layer, query, run.kv_cache, run.metadata, latent)
    for _ in range(3):
        poison_(latent)
        if run.lse is not None:
            poison_(run.lse)
        graph.replay()
        torch.cuda.synchronize()
        assert compare(run, torch.einsum("thl,hlv->thv", latent, batch.layer.W_UV)) == ""
