"""The real libraries on a real device: every variant over the same list of workloads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnbench.backends.check import check_output, poison_
from attnbench.backends.device import Device, cuda_device
from attnbench.backends.flash_attn import FlashAttentionBackend as Backend
from attnbench.backends.flash_attn_library import LIBRARIES
from attnbench.backends.reference import reference_attention
from attnbench.backends.registry import backend_status
from attnbench.workload import Workload
from tests.backends.flash_attn.workloads import GPU_WORKLOADS, WORKLOADS
from tests.backends.running import Run, config_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.version.hip is not None, reason="no CUDA device here"
    ),
]
POINTS = [
    pytest.param(variant, text, id=f"{variant} {size} {name}")
    for variant in LIBRARIES
    for size, texts in (("small", WORKLOADS), ("large", GPU_WORKLOADS))
    for name, text in texts.items()
]


def run_or_skip(variant: str, text: str) -> Run:
    """The workload on a variant; skips with the refusal, and where its library is not here."""
    if variant == "FA2_UPSTREAM" and "block=" not in text:
        text = f"{text} block=256"
    device: Device = cuda_device(*torch.cuda.get_device_capability())
    config = config_of(Workload.parse(text))
    reasons = Backend.validate_configuration(config, device)
    if refusal := Backend.variant_refusal(variant, config, device):
        reasons.append(refusal)
    if missing := backend_status("FLASH_ATTN", device, variant):
        reasons.append(missing)
    if reasons:
        pytest.skip("; ".join(reasons))
    return Run(Backend, text, variant, "cuda")


@pytest.mark.parametrize(("variant", "text"), POINTS)
def test_output_equals_the_reference(variant: str, text: str) -> None:
    run = run_or_skip(variant, text)
    check = run.check()
    assert check.ok, check.reason
    again = run.check()
    assert again.ok, f"the second call: {again.reason}"


@pytest.mark.parametrize("text", ["4q1s4k", "q1s5_q1s777_q40s3k", "4q1s4k window=500", "4q4s2k"])
@pytest.mark.parametrize("variant", LIBRARIES)
def test_a_captured_graph_replays_to_the_reference(variant: str, text: str) -> None:
    run = run_or_skip(variant, text)
    metadata: Any = run.builder.build_for_cudagraph_capture(run.batch.metadata)
    run.metadata = metadata
    batch, impl = run.batch, run.impl
    out = torch.empty_like(batch.query)
    arguments = (batch.layer, batch.query, batch.key, batch.value, run.kv_cache, metadata, out)
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


@pytest.mark.parametrize(
    "text", ["4q1s4k", "2q500s3k", "q1s4k softcap=20", "2q1s1k sinks=1 head_size=64"]
)
@pytest.mark.parametrize("variant", LIBRARIES)
def test_lse_equals_the_reference(variant: str, text: str) -> None:
    run = run_or_skip(variant, text)
    batch = run.batch
    out = poison_(torch.empty_like(batch.query))
    lse = run.impl.forward_with_lse(batch.layer, batch.query, run.kv_cache, run.metadata, out)
    truth = reference_attention(batch)
    assert check_output(out, truth, "bf16", "bf16").ok
    torch.testing.assert_close(lse.double(), truth.lse, atol=2e-2, rtol=0)


@pytest.mark.parametrize("variant", ["FA3", "FA3_UPSTREAM"])
def test_a_schedule_made_ahead_changes_nothing_in_the_output(variant: str) -> None:
    for text in ("16q1s2k_q300s1k", "16q1s2k softcap=20", "16q1s2k window=100"):
        run = run_or_skip(variant, text)
        with_schedule = run.attend()
        run.metadata = run.builder.build(0, run.batch.metadata, fast_build=True)
        torch.testing.assert_close(run.attend(), with_schedule, atol=2e-2, rtol=2e-2)
