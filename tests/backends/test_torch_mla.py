"""TORCH_MLA against the float64 reference: latent decode, expanded prefill, both in one batch."""

from __future__ import annotations

import pytest
import torch

from attnbench.backends.reference import reference_attention
from attnbench.backends.torch_mla import TorchMLABackend
from tests.backends.running import Run, refusals

SMALL = "dtype=fp32 heads=4/1 mla=64+16:32+24"

WORKLOADS = {
    "decode": f"3q1s70 {SMALL}",
    "decode, first token": f"2q1 {SMALL}",
    "decode, several splits": f"q1s1200_q1s90 {SMALL}",
    "decode, block 1": f"2q1s37 {SMALL} block=1",
    "decode, block 33": f"2q1s70 {SMALL} block=33",
    "decode, fp8": f"3q1s70 {SMALL} kv=fp8_e4m3",
    "decode, bf16": "3q1s70 heads=4/1 mla=64+16:32+24",
    "decode, fp16": "3q1s70 heads=4/1 mla=64+16:32+24 dtype=fp16",
    "decode, prefix": f"3q1s70 {SMALL} prefix=32",
    "decode, DeepSeek sizes": "2q1s50 dtype=fp32 heads=4/1 mla=512+64:128+128",
    "speculative": f"2q4s70_q2s9 {SMALL}",
    "longest decode": f"q16s70 {SMALL}",
    "prefill": f"2q40 {SMALL}",
    "prefill, bf16": "2q40 heads=4/1 mla=64+16:32+24",
    "prefill, fp8": f"q40 {SMALL} kv=fp8_e4m3",
    "prefill, DeepSeek sizes": "q40 dtype=fp32 heads=4/1 mla=512+64:128+128",
    "extend": f"2q30s100 {SMALL}",
    "extend, block 33": f"2q30s100 {SMALL} block=33",
    "mixed": f"q40_3q1s70_q20s60_q4s9 {SMALL}",
}


@pytest.mark.parametrize("name", WORKLOADS)
def test_right(name: str) -> None:
    assert refusals(TorchMLABackend, WORKLOADS[name]) == []
    result = Run(TorchMLABackend, WORKLOADS[name]).check()
    assert result.ok, result.reason


def test_decode_lse_is_the_references() -> None:
    run = Run(TorchMLABackend, f"2q1s700_q3s40 {SMALL}")
    run.attend()
    assert run.lse.dtype == torch.float32
    torch.testing.assert_close(
        run.lse.double(), reference_attention(run.batch).lse, rtol=0, atol=1e-4
    )


def test_a_context_is_expanded_chunk_by_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnbench.backends.torch_mla._CHUNK_BYTES", 7 * 4 * 48 * 4)
    result = Run(TorchMLABackend, f"q30s100_q20 {SMALL}").check()
    assert result.ok, result.reason


def test_decodes_come_first_and_are_counted() -> None:
    metadata = Run(TorchMLABackend, f"q17_3q1s70_q16s19 {SMALL}").metadata
    assert (metadata.num_decodes, metadata.num_decode_tokens) == (4, 19)
    assert (metadata.num_prefills, metadata.num_prefill_tokens) == (1, 17)


def test_refuses_what_is_not_mla() -> None:
    assert refusals(TorchMLABackend, "2q1s70 dtype=fp32 heads=4/2 head_size=64 sinks=1") == [
        "non-MLA not supported",
        "attention sinks not supported",
    ]
