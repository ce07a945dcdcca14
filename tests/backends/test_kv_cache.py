"""KV caches: every slot of every layout against a slow oracle that indexes the raw cache."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnbench.backends.abstract import AttentionBackend
from attnbench.backends.batch import AttentionBatch, make_batch
from attnbench.backends.builder import KVCacheSpec
from attnbench.backends.cache_shapes import LatentCacheBackend, PairedCacheBackend
from attnbench.backends.kv_cache import (
    HIDDEN_POISON,
    allocate_kv_cache,
    fill_context,
    key_value_views,
    read_slots,
    write_new_tokens,
    write_slots,
)
from attnbench.backends.paging import NULL_BLOCK
from attnbench.errors import WorkloadError
from attnbench.workload import AttentionShape, Workload
from tests.backends.layouts import BlockFirst, HeadsFirst, Latent, PairFirst, small_workloads

LAYOUTS = (PairFirst, BlockFirst, HeadsFirst)


def raw_row(
    kv_cache: torch.Tensor, backend: type[AttentionBackend], block: int, offset: int, head: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stored K and V of one slot, by the documented logical shape of each layout."""
    if backend is PairFirst:
        return kv_cache[0, block, offset, head], kv_cache[1, block, offset, head]
    if backend is BlockFirst:
        return kv_cache[block, 0, offset, head], kv_cache[block, 1, offset, head]
    return kv_cache[0, block, head, offset], kv_cache[1, block, head, offset]


@settings(deadline=None, max_examples=40)
@given(
    workload=small_workloads(attn_types=("decoder", "encoder_decoder"), mla=False),
    backend=st.sampled_from(LAYOUTS),
)
def test_every_slot_holds_what_it_should(
    workload: Workload, backend: type[AttentionBackend]
) -> None:
    batch = make_batch(workload)
    shape, block_size = workload.shape, workload.block_size
    cache = allocate_kv_cache(backend, batch.spec, batch.num_blocks, "cpu")
    fill_context(batch, cache, backend)
    holders = slots_of(batch)
    for block in range(batch.num_blocks):
        for offset in range(block_size):
            for head in range(shape.num_kv_heads):
                key, value = raw_row(cache, backend, block, offset, head)
                key, value = key[: shape.head_size], value[: shape.v_head_size]
                holder = holders.get((block, offset))
                if holder is None or holder[2] == "new":
                    assert (
                        (key == HIDDEN_POISON).all() and (value == HIDDEN_POISON).all()
                        if block == NULL_BLOCK
                        else key.float().isnan().all() and value.float().isnan().all()
                    )
                elif holder[2] == "far behind":
                    assert (key.float() == HIDDEN_POISON).all()
                    assert (value.float() == HIDDEN_POISON).all()
                else:
                    request, position, _ = holder
                    want = batch.keys_values(request, position, position + 1)
                    assert torch.equal(key.float() * batch.layer._k_scale, want[0][0, head])
                    assert torch.equal(value.float() * batch.layer._v_scale, want[1][0, head])


def slots_of(batch: AttentionBatch) -> dict[tuple[int, int], tuple[int, int, str]]:
    """(block, offset) -> (request, position, context / new / next / far behind), by plain loops."""
    block_size = batch.spec.block_size
    table = batch.metadata.block_table_tensor.tolist()
    holders: dict[tuple[int, int], tuple[int, int, str]] = {}
    for i, request in enumerate(batch.requests):
        end = math.ceil(request.seq_len / block_size) * block_size
        for position in range(end):
            if position < batch.num_computed(i):
                kind = "context"
            elif position < request.seq_len:
                kind = "new"
            else:
                kind = "next" if position == request.seq_len else "far behind"
            place = (table[i][position // block_size], position % block_size)
            holders[place] = (i, position, kind)
    return holders


@settings(deadline=None, max_examples=30)
@given(
    workload=small_workloads(attn_types=("decoder",), max_block_size=256),
    backend=st.sampled_from(LAYOUTS),
)
def test_after_the_write_the_whole_sequence_is_read_back(
    workload: Workload, backend: type[AttentionBackend]
) -> None:
    backend = Latent if workload.shape.is_mla else backend
    batch = make_batch(workload)
    cache = allocate_kv_cache(backend, batch.spec, batch.num_blocks, "cpu")
    fill_context(batch, cache, backend)
    write_new_tokens(batch, cache, backend)
    views = key_value_views(backend, batch.spec, cache)
    scales = (batch.layer._k_scale_float, batch.layer._v_scale_float)
    for i, request in enumerate(batch.requests):
        row = batch.metadata.block_table_tensor[i].tolist()
        slots = torch.tensor(
            [
                row[p // workload.block_size] * workload.block_size + p % workload.block_size
                for p in range(request.seq_len)
            ]
        )
        for view, scale, want in zip(views, scales, batch.keys_values(i), strict=True):
            assert torch.equal(read_slots(view, slots, scale), want.double())


def test_mla_stores_the_latent_and_the_rotary_key_in_one_row() -> None:
    batch = make_batch(Workload.parse("q1s20 shape=deepseek-v2-lite dtype=fp32 kv=fp8_e4m3"))
    cache = allocate_kv_cache(Latent, batch.spec, batch.num_blocks, "cpu")
    fill_context(batch, cache, Latent)
    write_new_tokens(batch, cache, Latent)
    assert cache.shape == (batch.num_blocks, 16, 512 + 64)
    assert cache.dtype == torch.float8_e4m3fn
    block, offset = divmod(int(batch.metadata.slot_mapping[0]), 16)
    row = cache[block, offset].float() * batch.layer._k_scale
    assert torch.equal(row, torch.cat([batch.kv_c_normed[0], batch.k_pe[0, 0]]))
    assert batch.layer._k_scale_float != 1.0


def spec_of(layout: str = "NHD", v_head_size: int = 8) -> KVCacheSpec:
    shape = AttentionShape(num_heads=4, num_kv_heads=2, head_size=8, v_head_size=v_head_size)
    return KVCacheSpec(
        shape=shape,
        dtype=torch.float32,
        kv_cache_dtype="fp16",
        block_size=16,
        kv_cache_layout=layout,
    )


def test_the_layout_is_the_physical_order() -> None:
    nhd = allocate_kv_cache(PairFirst, spec_of("NHD"), 5, "cpu")
    hnd = allocate_kv_cache(PairFirst, spec_of("HND"), 5, "cpu")
    assert nhd.shape == hnd.shape == (2, 5, 16, 2, 8)
    assert nhd.is_contiguous()
    assert hnd.stride() == (5 * 16 * 2 * 8, 16 * 2 * 8, 8, 16 * 8, 1)
    assert hnd.dtype == torch.float16


def test_rows_are_as_wide_as_the_wider_of_key_and_value() -> None:
    spec = spec_of(v_head_size=12)
    cache = allocate_kv_cache(PairFirst, spec, 5, "cpu")
    assert cache.shape[-1] == 12
    key, value = key_value_views(PairFirst, spec, cache)
    assert (key.shape[-1], value.shape[-1]) == (8, 12)


def test_negative_slots_are_skipped() -> None:
    cache = torch.zeros(3, 4, 1, 2)
    values = torch.arange(6.0).view(3, 1, 2) + 1
    write_slots(cache, values, torch.tensor([5, -1, 0]), 0.5)
    assert cache[1, 1, 0].tolist() == [2.0, 4.0]
    assert cache[0, 0, 0].tolist() == [10.0, 12.0]
    assert cache.count_nonzero() == 4


class BadOrder(PairFirst):
    @staticmethod
    def get_kv_cache_stride_order(
        include_num_layers_dimension: bool = False, kv_cache_layout: str = "NHD"
    ) -> tuple[int, ...]:
        return (0, 1, 2, 3, 3)


class BadShape(PairFirst):
    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        return (num_blocks, block_size, num_kv_heads * head_size)


@pytest.mark.parametrize(
    ("backend", "mend"),
    [(BadOrder, "mend get_kv_cache_stride_order"), (BadShape, "mend get_kv_cache_shape")],
)
def test_a_layout_that_makes_no_sense_is_refused(
    backend: type[AttentionBackend], mend: str
) -> None:
    with pytest.raises(WorkloadError, match=mend):
        allocate_kv_cache(backend, spec_of(), 5, "cpu")


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("base", [PairedCacheBackend, LatentCacheBackend])
def test_one_block_of_all_layers_is_one_piece(
    base: type[PairedCacheBackend | LatentCacheBackend], layout: str
) -> None:
    shape = (3, *base.get_kv_cache_shape(5, 16, 2, 8))
    order = base.get_kv_cache_stride_order(True, layout)
    physical = torch.arange(math.prod(shape)).reshape([shape[dim] for dim in order])
    logical = physical.permute([order.index(dim) for dim in range(len(order))])
    assert logical.shape == shape
    block = logical.select(1 + base.get_kv_cache_block_dim(16, 2, 8), 2).flatten().sort().values
    assert torch.equal(block, torch.arange(block.numel()) + 2 * block.numel())
