"""TRITON_MLA under Triton's interpreter against the float64 reference, in both forms."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from attnbench.backends import kv_cache
from attnbench.backends.dtypes import movable
from attnbench.backends.reference import reference_attention
from attnbench.backends.triton_launch import TileShape
from attnbench.backends.triton_mla import TritonMLABackend
from attnbench.backends.triton_mla_metadata import TritonMLAMetadataBuilder
from tests.backends.running import Run
from tests.backends.triton.test_attention_interpreted import poison_scratch

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 from the start"
    ),
]

SMALL = "heads=4/1 mla=128+32:32+16"

WORKLOADS = {
    "decode": f"3q1s70 {SMALL} dtype=fp32",
    "decode, DeepSeek-V3": "2q1s140 shape=deepseek-v3 tp=32 dtype=fp16",
    "decode, odd sizes and block": "2q1s70 heads=3/1 mla=96+24:40+48 dtype=fp32 block=5",
    "decode, fp8": f"2q1s70 {SMALL} dtype=fp16 kv=fp8_e4m3",
    "decode, ragged": f"q1s5_q1s150_q1 {SMALL} dtype=fp16",
    "speculative": f"2q3s70_q5s9 {SMALL} dtype=fp32",
    "prefill": f"q90 {SMALL} dtype=fp32",
    "prefill with context": f"q66s100_q70 {SMALL} dtype=fp16",
    "prefill, fp8": f"q70 {SMALL} dtype=fp32 kv=fp8_e5m2",
    "mixed": f"q80_2q1s70_q3s20 {SMALL} dtype=fp32",
}


@pytest.mark.parametrize("text", WORKLOADS.values(), ids=WORKLOADS.keys())
def test_output_equals_the_reference(text: str) -> None:
    check = Run(TritonMLABackend, text).check()
    assert check.ok, check.reason


@pytest.mark.parametrize("num_sms", [1, 16], ids=["whole", "split"])
@pytest.mark.parametrize(
    "text", [f"q1s100_q3s20 {SMALL} dtype=fp32", "2q1s90 heads=24/1 mla=64+16:16+16 dtype=fp32"]
)
def test_tiles_and_segments_change_nothing_and_lse_is_right(text: str, num_sms: int) -> None:
    run = Run(TritonMLABackend, text)
    builder: Any = run.builder
    builder.latent_tile_shape = lambda rows, is_short: TileShape(16, 16, 4, 1)
    builder.num_sms = num_sms
    run.metadata = builder.build(0, run.batch.metadata)
    poison_scratch(run.metadata.decode_groups)
    assert (num_sms > 1) == (run.metadata.decode_groups[0].num_segments > 1)
    check = run.check()
    assert check.ok, check.reason
    expected = reference_attention(run.batch).lse
    torch.testing.assert_close(run.lse.double(), expected, atol=1e-5, rtol=1e-5)


def test_slots_behind_a_sequence_are_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "HIDDEN_POISON", float("nan"))
    check = Run(TritonMLABackend, f"q1s33_q70s75 {SMALL} dtype=fp32").check()
    assert check.ok, check.reason


def test_a_decode_behind_a_prefill_runs_in_the_expanded_form(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(TritonMLAMetadataBuilder, "reorder_batch_threshold", None)
    run = Run(TritonMLABackend, f"q1s30_q70_q1s40 {SMALL} dtype=fp32")
    assert (run.metadata.num_decodes, run.metadata.num_prefills) == (1, 2)
    check = run.check()
    assert check.ok, check.reason


def test_cache_write_stores_the_new_tokens_and_nothing_else() -> None:
    run = Run(TritonMLABackend, f"2q5s40 {SMALL} dtype=fp32 kv=fp8_e4m3")
    batch = run.batch
    expected = kv_cache.allocate_kv_cache(TritonMLABackend, batch.spec, batch.num_blocks, "cpu")
    kv_cache.fill_context(batch, expected, TritonMLABackend)
    kv_cache.write_new_tokens(batch, expected, TritonMLABackend)
    assert torch.equal(movable(run.kv_cache), movable(expected))


def test_the_most_new_tokens_of_the_absorbed_form() -> None:
    metadata = Run(TritonMLABackend, "q64_q65 heads=1/1 mla=32+16:16+16 dtype=fp32").metadata
    assert (metadata.num_decodes, metadata.num_decode_tokens, metadata.num_prefills) == (1, 64, 1)


@pytest.mark.parametrize("what", ["lengths on the device only", "another block table"])
def test_metadata_made_in_other_ways_is_the_same(what: str) -> None:
    run = Run(TritonMLABackend, f"q3s40_q70s100 {SMALL} dtype=fp32")
    common, builder = run.batch.metadata, run.builder
    if what == "another block table":
        table, slots = common.block_table_tensor, common.slot_mapping
        other = common.replace(block_table_tensor=table * 0, slot_mapping=slots * 0)
        run.metadata = builder.update_block_table(builder.build(0, other), table, slots)
        assert run.metadata.slot_mapping is slots
    else:
        run.metadata = builder.build(0, common.replace(seq_lens_cpu=None))
    check = run.check()
    assert check.ok, check.reason
