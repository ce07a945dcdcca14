"""Real launches: bf16, fp16 and fp8, sizes where contexts are split. Needs a device."""

from __future__ import annotations

import os

import pytest
import torch

from attnbench.backends.abstract import AttentionBackend
from attnbench.backends.triton_attn import TritonAttentionBackend
from attnbench.backends.triton_launch import launch_device
from attnbench.backends.triton_mla import TritonMLABackend
from tests.backends.running import Run, config_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device here"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 excludes launches"
    ),
]

ATTENTION = {
    "decode": "4q1s4k",
    "decode, ragged": "q1s5_q1s4k_q1s777_q1",
    "decode, fp8 e4m3": "4q1s4k kv=fp8_e4m3",
    "decode, fp8 e5m2": "4q1s4k kv=fp8_e5m2",
    "speculative": "4q4s2k",
    "prefill": "2q2k",
    "prefill, fp16": "q1500 dtype=fp16",
    "prefill, fp32": "q300 dtype=fp32",
    "prefill, fp8": "q1k kv=fp8_e4m3",
    "extend, everything": "2q500s3k window=1000 softcap=30 sinks=1 alibi=1 layout=HND block=32",
    "mixed": "16q1s2k_q1k_q100s3k",
    "head size 96": "2q1s2k_q500 heads=32/32 head_size=96",
    "head size 256": "2q1s2k_q500 heads=16/8 head_size=256",
    "head size 512": "2q1s2k_q500 heads=8/1 head_size=512",
    "block 7": "2q1s2k_q500 block=7",
    "encoder": "2q500 attn=encoder_only heads=16/16 head_size=64",
    "cross": "4q1s1500 attn=encoder_decoder heads=16/16 head_size=64",
}
LATENT = {
    "decode": "4q1s4k shape=deepseek-v3 block=64",
    "decode, 16 heads": "16q1s2k shape=deepseek-v3 tp=8 block=64",
    "decode, fp8": "4q1s4k shape=deepseek-v3 tp=4 block=64 kv=fp8_e4m3",
    "speculative": "4q4s2k shape=deepseek-v3 tp=4 block=64",
    "prefill": "q1k shape=deepseek-v3 tp=8 block=64",
    "mixed": "8q1s2k_q500s2k shape=deepseek-v3 tp=8 block=64",
}
POINTS = [
    pytest.param(backend, text, id=f"{backend.get_name()} {name}")
    for backend, texts in ((TritonAttentionBackend, ATTENTION), (TritonMLABackend, LATENT))
    for name, text in texts.items()
]


@pytest.mark.parametrize(("backend", "text"), POINTS)
def test_output_equals_the_reference(backend: type[AttentionBackend], text: str) -> None:
    run = Run(backend, text, device="cuda")
    device = launch_device(torch.device("cuda", torch.cuda.current_device()))
    if reasons := backend.validate_configuration(config_of(run.workload), device):
        pytest.skip("; ".join(reasons))
    check = run.check()
    assert check.ok, check.reason


@pytest.mark.parametrize(
    ("backend", "text"),
    [
        (TritonAttentionBackend, "4q1s4k"),
        (TritonMLABackend, "4q1s4k shape=deepseek-v3 tp=8 block=64"),
    ],
)
def test_a_captured_graph_replays_to_the_same_output(
    backend: type[AttentionBackend], text: str
) -> None:
    run = Run(backend, text, device="cuda")
    run.metadata = run.builder.build_for_cudagraph_capture(run.batch.metadata)
    expected = run.attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run.attend()
    captured.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(captured, expected, atol=0, rtol=0)
