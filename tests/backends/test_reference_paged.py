"""Online softmax over the paged cache equals the dense reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnbench.backends.batch import make_batch
from attnbench.backends.kv_cache import allocate_kv_cache, fill_context, write_new_tokens
from attnbench.backends.paged_reference import paged_attention
from attnbench.backends.reference import ReferenceResult, reference_attention
from attnbench.workload import Workload
from tests.backends.layouts import BlockFirst, HeadsFirst, Latent, PairFirst, small_workloads


def through_the_cache(workload: Workload, layout: type[PairFirst]) -> ReferenceResult:
    layout = Latent if workload.shape.is_mla else layout
    batch = make_batch(workload)
    cache = allocate_kv_cache(layout, batch.spec, batch.num_blocks, "cpu")
    fill_context(batch, cache, layout)
    write_new_tokens(batch, cache, layout)
    return paged_attention(batch, cache, layout)


@settings(deadline=None, max_examples=40)
@given(
    workload=small_workloads(
        attn_types=("decoder", "encoder_decoder"),
        dtypes=("fp32", "fp16", "bf16"),
        kv_cache_dtypes=("auto", "fp16", "bf16", "fp8_e4m3", "fp8_e5m2"),
        max_block_size=256,
    ),
    layout=st.sampled_from([PairFirst, BlockFirst, HeadsFirst]),
)
def test_online_softmax_over_the_paged_cache_equals_dense(
    workload: Workload, layout: type[PairFirst]
) -> None:
    paged, dense = through_the_cache(workload, layout), reference_attention(make_batch(workload))
    torch.testing.assert_close(paged.output, dense.output, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(paged.lse, dense.lse, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("block_size", [1, 7, 16, 100, 256])
@pytest.mark.parametrize(
    "text",
    ["2q1s300_q20s150 heads=8/2 head_size=32", "2q3s270 heads=4/1 mla=32+8:16+16"],
)
def test_longer_contexts_in_every_block_size(text: str, block_size: int) -> None:
    workload = Workload.parse(f"{text} block={block_size} dtype=fp32 kv=fp8_e4m3")
    paged, dense = through_the_cache(workload, PairFirst), reference_attention(make_batch(workload))
    torch.testing.assert_close(paged.output, dense.output, rtol=1e-9, atol=1e-11)


def test_encoder_attention_is_refused() -> None:
    workload = Workload.parse("q5 attn=encoder heads=2/1 head_size=8")
    with pytest.raises(ValueError, match="use reference_attention"):
        through_the_cache(workload, PairFirst)
