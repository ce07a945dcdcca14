"""TRITON_ATTN on drawn shapes, caches and features, under Triton's interpreter.

bf16 arithmetic is wrong there and bf16 loads are not, so that bf16 caches are read by fp32 queries,
and bf16 queries are drawn with fp8 caches, whose products are made in fp16.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attnbench.backends import kv_cache
from attnbench.backends.check import check_output, poison_
from attnbench.backends.reference import reference_attention
from attnbench.backends.triton_attn import TritonAttentionBackend
from attnbench.backends.triton_launch import TileShape
from attnbench.backends.triton_mla import TritonMLABackend
from tests.backends.running import Run
from tests.backends.triton.test_attention_interpreted import poison_scratch

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 from the start"
    ),
]

CACHES = {
    "fp32": ("auto", "fp16", "bf16", "fp8_e4m3", "fp8_e5m2"),
    "fp16": ("auto", "fp8_e4m3", "fp8_e5m2"),
    "bf16": ("fp8_e4m3", "fp8_e5m2"),
}
#: Sizes models have, and any other.
HEAD_SIZES = st.sampled_from([32, 64, 80, 96, 112, 120, 128, 192, 256, 512]) | st.integers(32, 300)


@st.composite
def points(draw: st.DrawFn) -> tuple[str, TileShape, int]:
    """(workload, tile shape, multiprocessors to fill)."""
    attn = draw(st.sampled_from(["decoder"] * 6 + ["encoder", "encoder_only", "encoder_decoder"]))
    dtype = draw(st.sampled_from(["fp32", "fp16", "bf16"]))
    has_cache = attn in ("decoder", "encoder_decoder")
    if dtype == "bf16" and not has_cache:
        dtype = "fp16"
    query_lens = draw(st.lists(st.sampled_from([1, 1, 2, 7, 20]), min_size=1, max_size=3))
    requests = []
    for query_len in query_lens:
        context = draw(
            st.sampled_from([0, 1, 15, 16, 17, 40, 63, 64, 70]) if has_cache else st.just(0)
        )
        requests.append(f"q{query_len}s{query_len + context}")
    num_kv_heads = draw(st.integers(1, 2))
    heads = num_kv_heads * draw(st.sampled_from([1, 2, 3, 5, 20]))
    words = ["_".join(requests), f"dtype={dtype}", f"heads={heads}/{num_kv_heads}"]
    words.append(f"head_size={draw(HEAD_SIZES)}")
    if draw(st.integers(0, 3)) == 0:
        words.append(f"v_head_size={draw(HEAD_SIZES)}")
    if has_cache:
        words.append(f"kv={draw(st.sampled_from(CACHES[dtype]))}")
        words.append(f"block={draw(st.sampled_from([1, 3, 16, 16, 32, 64, 64, 256]))}")
        words.append(f"layout={draw(st.sampled_from(['NHD', 'HND']))}")
    if attn != "decoder":
        words.append(f"attn={attn}")
    if attn != "encoder_decoder" and draw(st.booleans()):
        words.append(f"window={draw(st.sampled_from([1, 2, 5, 16, 33, 64, 1000]))}")
    words += [word for word in ("softcap=20", "alibi=1") if draw(st.booleans())]
    if attn == "decoder" and draw(st.booleans()):
        words.append("sinks=1")
    shape = TileShape(draw(st.sampled_from([16, 32])), draw(st.sampled_from([16, 32, 64])), 4, 1)
    return " ".join(words), shape, draw(st.sampled_from([1, 16, 64]))


@settings(
    deadline=None,
    max_examples=25,
    suppress_health_check=list(HealthCheck),
)
@given(points())
def test_any_point_equals_the_reference(point: tuple[str, TileShape, int]) -> None:
    text, shape, num_sms = point
    run = Run(TritonAttentionBackend, text)
    builder: Any = run.builder
    builder.tile_shape = lambda rows, is_short: shape
    builder.num_sms = num_sms
    batch = run.batch
    metadata = builder.build(0, batch.metadata)
    poison_scratch(metadata.groups)
    size = (len(batch.query), run.workload.shape.num_heads, run.workload.shape.v_head_size)
    # Stores of bf16 are wrong in the interpreter.
    is_bf16 = batch.query.dtype == torch.bfloat16
    out = poison_(torch.empty(size, dtype=torch.float32 if is_bf16 else batch.query.dtype))
    lse = torch.full(size[:2], float("nan"))
    for launch in run.impl.launches(
        batch.layer, batch.query, batch.key, batch.value, run.kv_cache, metadata, out, lse
    ):
        launch.run()
    reference = reference_attention(batch)
    dtype = "fp16" if is_bf16 else run.workload.dtype
    check = check_output(out, reference, dtype, run.workload.resolved_kv_cache_dtype)
    assert check.ok, f"{text} {shape} {num_sms}: {check.reason}"
    tolerance = 1e-5 if dtype == "fp32" else 2e-3
    torch.testing.assert_close(lse.double(), reference.lse, atol=tolerance, rtol=tolerance)


def test_queries_of_any_size_survive_the_way_through_fp16() -> None:
    """bf16 queries reach 1e38: scaled by a power of two a row, they lose nothing."""
    run = Run(TritonAttentionBackend, "3q1s40 dtype=bf16 kv=fp8_e5m2 heads=4/2 head_size=64")
    batch = run.batch
    batch.query[0] *= 2.0**100
    batch.query[1] *= 2.0**-100
    batch.query[2, 0] = 0.0
    out = poison_(torch.empty(batch.query.shape))
    for launch in run.impl.launches(
        batch.layer, batch.query, batch.key, batch.value, run.kv_cache, run.metadata, out
    ):
        launch.run()
    check = check_output(out, reference_attention(batch), "fp16", "fp8_e5m2")
    assert check.ok, check.reason


def test_large_scores_neither_overflow_nor_vanish() -> None:
    run = Run(TritonAttentionBackend, "2q1s150 dtype=fp32 heads=4/2 head_size=64")
    run.batch.query.mul_(2.0**10)
    check = run.check()
    assert check.ok, check.reason


def latent_output(run: Run, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(latent output, LSE) of absorbed queries, in float32."""
    out = poison_(torch.empty((*query.shape[:2], run.workload.shape.kv_lora_rank)))
    lse = torch.full(query.shape[:2], float("nan"))
    for launch in run.impl.mqa_launches(
        run.batch.layer, query, run.kv_cache, run.metadata, out, lse
    ):
        launch.run()
    return out, lse


def test_latents_of_fp8_are_multiplied_in_fp16() -> None:
    run = Run(TritonMLABackend, "2q1s70 heads=4/1 mla=128+32:32+16 dtype=bf16 kv=fp8_e4m3")
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 160, generator=generator).bfloat16()
    query[0, :, :128] *= 2.0**-9  # the rotary part decides the factor
    query[1] *= 2.0**20
    query[1, 1] *= 2.0**-50
    found, expected = latent_output(run, query), latent_output(run, query.float())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("block", [64, 128])
def test_latent_tiles_within_one_block(block: int) -> None:
    run = Run(TritonMLABackend, f"q1s70_q3s130 heads=4/1 mla=128+32:32+16 dtype=fp32 block={block}")
    builder: Any = run.builder
    builder.latent_tile_shape = lambda rows, is_short: TileShape(16, 32, 4, 1)
    run.metadata = builder.build(0, run.batch.metadata)
    check = run.check()
    assert check.ok, check.reason


@pytest.mark.parametrize("block", [16, 64, 128])
def test_a_tile_within_one_block_reads_nothing_behind_the_sequence(
    monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(kv_cache, "HIDDEN_POISON", float("nan"))
    run = Run(
        TritonAttentionBackend, f"q1s33_q20s90 dtype=fp32 heads=4/2 head_size=40 block={block}"
    )
    builder: Any = run.builder
    builder.tile_shape = lambda rows, is_short: TileShape(16, 32, 4, 1)
    run.metadata = builder.build(0, run.batch.metadata)
    check = run.check()
    assert check.ok, check.reason
