"""The AITER backends against the float64 reference, through the library as recorded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnbench.backends import aiter_flash_attn
from attnbench.backends.abstract import AttentionBackend
from attnbench.backends.aiter_flash_attn import RocmAiterFlashAttentionBackend as Flash
from attnbench.backends.aiter_mla import RocmAiterMLABackend, RocmAiterTritonMLABackend
from attnbench.backends.aiter_unified import RocmAiterUnifiedAttentionBackend as Unified
from attnbench.backends.builder import AttentionCGSupport
from attnbench.backends.check import check_output
from attnbench.backends.device import Device
from attnbench.backends.reference import reference_attention
from attnbench.errors import UsageError
from attnbench.workload import Workload
from tests.backends.aiter.conftest import Install
from tests.backends.aiter.fake_library import RECORDS
from tests.backends.aiter.workloads import LATENT, LATENT_WORKLOADS, SMALL, WORKLOADS
from tests.backends.running import Run, config_of, formula_not_causal

MI350 = Device("rocm", "gfx950")
MI300 = Device("rocm", "gfx942")
CAUSAL = (
    "AITER's unified_attention is causal only; VLLM:ROCM_AITER_UNIFIED_ATTN runs encoders by a "
    "kernel of vLLM"
)
DECODER_ONLY = "attention type encoder{} not supported"
NOT_16 = "block_size not supported"
EXACT = "AITER's paged_attention_v1 is compiled for blocks of 16 or 32; use block=16"
SIZE = "head_size not supported"
CAP = (
    "AITER's assembly prefill is taken whether or not there is a soft cap, and has none; "
    "ROCM_AITER_UNIFIED_ATTN has"
)
E5M2 = "AITER reads e4m3 from an fp8 KV cache; use kv=fp8_e4m3"

#: Every workload a backend refuses on gfx950, and why. All others it must get right.
REFUSED: dict[type[AttentionBackend], dict[str, list[str]]] = {
    Unified: {
        "decode, fp8 e5m2": [E5M2],
        "decode, many query heads": ["AITER takes at most 128 query heads a KV head"],
        "mixed, block 48": [
            "AITER's decode tile is one block: block_size must be a power of two, not 48"
        ],
        "encoder": [CAUSAL],
        "cross": [CAUSAL],
    },
    Flash: {
        "decode, head size 32": [SIZE],
        "decode, head size 96": [SIZE],
        "decode, soft cap": [CAP],
        "decode, sinks": ["attention sinks not supported"],
        "prefill, sinks": ["attention sinks not supported"],
        "decode, fp8 e5m2": [E5M2],
        "mixed, block 48": [EXACT],
        "mixed, block 64": [EXACT],
        "encoder": [DECODER_ONLY.format("")],
        "cross": [DECODER_ONLY.format("_decoder")],
    },
}
_HEADS = (
    "AITER's latent decode has kernels for 16 and 128 query heads (a divisor of 16 is padded), "
    "not 32; use another tp="
)
LATENT_REFUSED = {
    "decode, 32 heads": [_HEADS],
    "decode, fp16": ["AITER's latent decode is bf16 or fp8; use dtype=bf16"],
    "decode, rank 256": ["AITER takes latents of 512+64 numbers, not 256+64"],
}


def refusals(backend: type[AttentionBackend], text: str, device: Device = MI350) -> list[str]:
    return backend.validate_configuration(config_of(Workload.parse(text)), device)


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("backend", [Unified, Flash], ids=lambda b: b.name)
def test_right_or_refused(install: Install, backend: Any, record: str, name: str) -> None:
    install(record)
    text = WORKLOADS[name]
    expected = REFUSED[backend].get(name, [])
    assert refusals(backend, text) == expected
    if not expected:
        result = Run(backend, text).check()
        assert result.ok, result.reason


@pytest.mark.parametrize("name", LATENT_WORKLOADS)
@pytest.mark.parametrize(
    ("backend", "record"),
    [
        (RocmAiterMLABackend, RECORDS[0]),
        (RocmAiterMLABackend, RECORDS[1]),
        (RocmAiterTritonMLABackend, RECORDS[0]),
        (RocmAiterTritonMLABackend, RECORDS[1]),
    ],
    ids=lambda x: x if isinstance(x, str) else x.name,
)
def test_latent_right_or_refused(install: Install, backend: Any, record: str, name: str) -> None:
    install(record)
    text = LATENT_WORKLOADS[name]
    expected = LATENT_REFUSED.get(name, [])
    assert refusals(backend, text) == expected
    if not expected:
        result = Run(backend, text).check()
        assert result.ok, result.reason


# --- which kernel serves which request ------------------------------------------------------------
def test_flash_splits_the_batch_by_new_tokens(install: Install) -> None:
    calls = install("aiter-main")
    run = Run(Flash, f"q40_3q1s70_q20s60 {SMALL}")
    calls.clear()
    run.attend()
    assert [call.name for call in calls] == ["flash_attn_varlen_func", "paged_attention_v1"]
    dense, paged = (call.arguments for call in calls)
    assert len(paged.query) == 3
    assert dense.cu_seqlens_q.diff().tolist() == [40, 20]
    assert dense.cu_seqlens_k.diff().tolist() == [40, 60]


def test_flash_gathers_what_a_window_shows_and_nothing_without_a_context(install: Install) -> None:
    calls = install("aiter-main")
    windowed = Run(Flash, f"q20s200_q5s8 {SMALL} window=16")
    windowed.attend()
    assert calls[-1].arguments.cu_seqlens_k.diff().tolist() == [35, 8]
    arguments = (windowed.batch.layer, windowed.batch.query, windowed.kv_cache)
    parts = windowed.impl.parts(*arguments, windowed.metadata)
    assert list(parts) == ["page_gather"]
    ((keys, values),) = parts["page_gather"]()
    assert tuple(keys.shape) == tuple(values.shape) == (43, 2, 64)
    fresh = Run(Flash, f"2q20 {SMALL}")
    assert fresh.impl.parts(*arguments, fresh.metadata) == {}
    fresh.attend()
    assert calls[-1].arguments.k.data_ptr() == fresh.batch.key.data_ptr()


def test_flash_takes_requests_together_up_to_a_number_of_keys(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = install("aiter-main")
    monkeypatch.setattr(aiter_flash_attn, "CHUNK_TOKENS", 100)
    run = Run(Flash, f"2q20s50_q30s110_q10s20 {SMALL}")
    calls.clear()
    result = run.check()
    assert result.ok, result.reason
    lengths = [call.arguments.cu_seqlens_k.diff().tolist() for call in calls]
    assert sorted(lengths) == sorted([[50, 50], [110], [20]])


@pytest.mark.parametrize("window", [0, 6])
def test_flash_not_causal(install: Install, window: int) -> None:
    install("aiter-main")
    run = Run(Flash, f"q12s40_q8s20_q1s9 {SMALL} {f'window={window}' if window else ''}")
    run.metadata = run.builder.build(0, run.batch.metadata.replace(causal=False))
    output = run.attend()
    expected = formula_not_causal(run.batch, window)
    torch.testing.assert_close(output.double(), expected, rtol=2e-2, atol=2e-2)


def test_unified_is_one_call_and_refuses_a_batch_that_is_not_causal(install: Install) -> None:
    calls = install("aiter-main")
    run = Run(Unified, f"q40_3q1s70_q20s60 {SMALL} sinks=1")
    run.attend()
    assert [call.name for call in calls] == ["unified_attention"]
    assert "backend" not in calls[0].given
    with pytest.raises(UsageError, match="causal only; use TRITON_ATTN"):
        run.builder.build(0, run.batch.metadata.replace(causal=False))


def test_latent_forms_by_new_tokens_and_each_by_its_library(install: Install) -> None:
    calls = install("aiter-main")
    for backend, prefill in (
        (RocmAiterMLABackend, "flash_attn_varlen_func"),
        (RocmAiterTritonMLABackend, "triton flash_attn_varlen_func"),
    ):
        calls.clear()
        run = Run(backend, f"q30_3q1s70_q4s70 {LATENT}")
        run.attend()
        assert [call.name for call in calls] == ["mla_decode_fwd", prefill]
        decode = calls[0].arguments
        assert tuple(decode.q.shape) == (3, 16, 576)
        assert decode.kv_indptr.tolist() == [0, 70, 140, 210]


@pytest.mark.parametrize("backend", [RocmAiterMLABackend, RocmAiterTritonMLABackend])
def test_a_context_attended_to_in_parts_merges_to_the_same(
    install: Install, monkeypatch: pytest.MonkeyPatch, backend: Any
) -> None:
    calls = install("aiter-main")
    monkeypatch.setattr("attnbench.backends.mla_prefill.CHUNK_TOKENS", 64)
    run = Run(backend, f"q20s150_2q10s30 {LATENT}")
    calls.clear()
    result = run.check()
    assert result.ok, result.reason
    assert sum(call.arguments.return_lse for call in calls) == 4


def test_the_query_of_an_fp8_cache_is_quantised_once(install: Install) -> None:
    calls = install("aiter-main")
    run = Run(RocmAiterMLABackend, f"3q1s70 {LATENT} kv=fp8_e4m3")
    run.attend()
    assert calls[-1].arguments.q.dtype is torch.float8_e4m3fn
    assert float(calls[-1].arguments.kv_scale) == run.batch.layer._k_scale_float


# --- graphs ---------------------------------------------------------------------------------------
def test_metadata_of_a_graph_is_for_any_context_and_keeps_its_memory(install: Install) -> None:
    calls = install("aiter-main")
    run = Run(Flash, f"3q1s70 {SMALL}")
    assert run.builder.cudagraph_support is AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    first = run.builder.build_for_cudagraph_capture(run.batch.metadata)
    assert first.max_seq_len == run.batch.metadata.block_table_tensor.shape[1] * 16 >= 70
    again = run.builder.build_for_cudagraph_capture(run.batch.metadata)
    assert again.workspace.data_ptr() == first.workspace.data_ptr()
    run.metadata = again
    assert run.check().ok
    assert calls[-1].arguments.max_context_len == first.max_seq_len

    run = Run(RocmAiterMLABackend, f"3q1s70 {LATENT}")
    assert run.builder.cudagraph_support is AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    common = run.batch.metadata
    first = run.builder.build_for_cudagraph_capture(common).decode
    assert common.seq_lens_cpu is not None
    shorter = common.replace(seq_lens=common.seq_lens - 3, seq_lens_cpu=common.seq_lens_cpu - 3)
    again = run.builder.build_for_cudagraph_capture(shorter).decode
    for name in ("kv_indptr", "kv_indices"):
        assert getattr(again, name).data_ptr() == getattr(first, name).data_ptr()
    assert again.kv_indptr.tolist() == [0, 67, 134, 201]
    run.metadata = run.builder.build_for_cudagraph_capture(common)
    assert run.check().ok


def test_a_quantised_output_is_refused(install: Install) -> None:
    install("aiter-main")
    for backend in (Unified, Flash):
        run = Run(backend, f"q1s20 {SMALL}")
        batch, out = run.batch, torch.empty_like(run.batch.query)
        arguments = (batch.layer, batch.query, batch.key, batch.value, run.kv_cache, run.metadata)
        with pytest.raises(UsageError, match="does not quantise its output"):
            run.impl.forward(*arguments, out, output_scale=torch.ones(1))


def test_update_block_table(install: Install) -> None:
    install("aiter-main")
    run = Run(Unified, f"3q1s70 {SMALL}")
    table, slots = run.metadata.block_table.clone(), run.metadata.slot_mapping.clone()
    run.metadata = run.builder.update_block_table(run.metadata, table, slots)
    assert run.metadata.block_table is table
    truth = reference_attention(run.batch)
    assert check_output(run.attend(), truth, "bf16", "bf16").ok
