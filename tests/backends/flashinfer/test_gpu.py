"""The real library on a real device: every variant over the same list of workloads."""

from __future__ import annotations

import pytest
import torch

from attnbench.backends.batch import make_batch
from attnbench.backends.check import check_output, poison_
from attnbench.backends.device import cuda_device
from attnbench.backends.flashinfer_library import VARIANTS
from attnbench.backends.reference import reference_attention
from attnbench.backends.registry import backend_status
from attnbench.workload import Workload
from tests.backends.flashinfer.running import FlashInferRun, fitted, refused
from tests.backends.flashinfer.workloads import GPU_WORKLOADS, WORKLOADS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.version.hip is not None, reason="no CUDA device here"
    ),
]
POINTS = [
    pytest.param(variant, text, id=f"{variant} {size} {name}")
    for variant in VARIANTS
    for size, texts in (("small", WORKLOADS), ("large", GPU_WORKLOADS))
    for name, text in texts.items()
]
GRAPH_TEXTS = ["4q1s4k", "q1s5_q1s777_q40s3k", "4q1s4k window=500", "4q1s2k kv=fp8_e4m3"]


def run_or_skip(variant: str, text: str) -> FlashInferRun:
    """The workload on a variant; skips with the refusal, and where the library is not here."""
    device = cuda_device(*torch.cuda.get_device_capability())
    if device.capability is not None and device.capability.major == 10 and "layout=" not in text:
        text = f"{text} layout=HND"
    text = fitted(variant, text)
    reason = refused(variant, text, device) or backend_status("FLASHINFER", device, variant)
    if reason:
        pytest.skip(reason)
    return FlashInferRun(text, variant, "cuda")


@pytest.mark.parametrize(("variant", "text"), POINTS)
def test_output_equals_the_reference(variant: str, text: str) -> None:
    run = run_or_skip(variant, text)
    check = run.check()
    assert check.ok, check.reason
    again = run.check()
    assert again.ok, f"the second call: {again.reason}"


@pytest.mark.parametrize("text", GRAPH_TEXTS)
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "CASCADE"])
def test_a_captured_graph_replays_to_the_reference(variant: str, text: str) -> None:
    """Also after the wrappers were planned anew for another batch, and back."""
    run = run_or_skip(variant, text)
    run.metadata = run.builder.build_for_cudagraph_capture(run.batch.metadata)
    batch, impl = run.batch, run.impl
    out = torch.empty_like(batch.query)
    arguments = (batch.layer, batch.query, batch.key, batch.value, run.kv_cache, run.metadata, out)
    impl.forward(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        impl.forward(*arguments)
    shorter = batch.metadata.replace(
        seq_lens=(batch.metadata.seq_lens - 1).clamp_min(1),
        seq_lens_cpu=None,
    )
    truth = reference_attention(batch)
    kv = run.workload.resolved_kv_cache_dtype
    for _ in range(3):
        run.builder.build_for_cudagraph_capture(shorter)
        run.builder.build_for_cudagraph_capture(batch.metadata)
        poison_(out)
        graph.replay()
        torch.cuda.synchronize()
        found = check_output(out, truth, "bf16", kv)
        assert found.ok, found.reason


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_plain_call_can_be_captured_too(variant: str) -> None:
    """How the `graph` timer times it: the wrapper is not planned again while the graph lives."""
    run = run_or_skip(variant, "4q1s4k prefix=1024")
    out = poison_(torch.empty_like(run.batch.query))
    batch = run.batch
    arguments = (batch.layer, batch.query, batch.key, batch.value, run.kv_cache, run.metadata, out)
    run.impl.forward(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run.impl.forward(*arguments)
    # Another batch of the same builder must not take its wrapper.
    other = make_batch(Workload.parse(f"{run.workload.text} seed=5"), "cuda", 1)
    kept = run.builder.build(0, other.metadata)
    poison_(out)
    graph.replay()
    torch.cuda.synchronize()
    found = check_output(out, reference_attention(batch), "bf16", "bf16")
    assert found.ok, found.reason
    assert kept is not run.metadata


@pytest.mark.parametrize("text", ["4q1s4k", "2q500s3k", "q1s4k softcap=20", "8q1s2k_q300s1k"])
@pytest.mark.parametrize("variant", ["FA2", "FA3", "FA3_DECODE", "CUDA_CORES"])
def test_lse_equals_the_reference(variant: str, text: str) -> None:
    run = run_or_skip(variant, text)
    batch = run.batch
    out = poison_(torch.empty_like(batch.query))
    lse = run.impl.forward_with_lse(batch.layer, batch.query, run.kv_cache, run.metadata, out)
    truth = reference_attention(batch)
    assert check_output(out, truth, "bf16", "bf16").ok
    torch.testing.assert_close(lse.double(), truth.lse, atol=2e-2, rtol=0)
