"""Batches: block tables, slot mappings and metadata against slow oracles."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnbench.backends import queries
from attnbench.backends.batch import (
    AttentionBatch,
    flat_positions,
    get_alibi_slopes,
    make_batch,
    num_computed_tokens,
)
from attnbench.backends.dtypes import torch_dtype
from attnbench.backends.paging import NULL_BLOCK, shuffled_block_table
from attnbench.backends.reference import masked_logits, query_positions
from attnbench.backends.token_pool import Rounding, TokenPool, seeded_generator
from attnbench.workload import AttentionType, Workload
from tests.backends.layouts import small_workloads

CACHED = ("decoder", "encoder_decoder")


@settings(deadline=None, max_examples=60)
@given(small_workloads(attn_types=CACHED, max_block_size=256))
def test_block_table_and_slot_mapping_follow_the_slow_oracle(workload: Workload) -> None:
    batch = make_batch(workload)
    metadata, block_size = batch.metadata, workload.block_size
    table = metadata.block_table_tensor.tolist()
    owner: dict[int, tuple[int, int]] = {}
    expected_slots = []
    for i, request in enumerate(batch.requests):
        num_blocks = -(-request.seq_len // block_size)
        assert all(block == NULL_BLOCK for block in table[i][num_blocks:])
        for logical, block in enumerate(table[i][:num_blocks]):
            assert NULL_BLOCK < block < batch.num_blocks
            shared = (logical + 1) * block_size <= workload.common_prefix_len
            mine = (-1 if shared else i, logical)
            assert owner.setdefault(block, mine) == mine, "a block belongs to one place only"
        if workload.attn_type is AttentionType.DECODER:
            for position in range(request.seq_len - request.query_len, request.seq_len):
                block = table[i][position // block_size]
                expected_slots.append(block * block_size + position % block_size)
    assert metadata.slot_mapping.tolist() == expected_slots
    assert metadata.slot_mapping.dtype == torch.int64
    assert metadata.block_table_tensor.dtype == torch.int32
    assert len(owner) + 1 < batch.num_blocks, "there are spare blocks"


@settings(deadline=None, max_examples=200)
@given(
    seq_lens=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    block_size=st.integers(1, 256),
    seed=st.integers(0, 10**6),
)
def test_a_block_table_is_never_the_identity(
    seq_lens: list[int], block_size: int, seed: int
) -> None:
    table = shuffled_block_table(seq_lens, block_size, 0, torch.Generator().manual_seed(seed))
    counts = [-(-n // block_size) for n in seq_lens]
    used = [b for row, n in zip(table.table.tolist(), counts, strict=True) for b in row[:n]]
    assert used != list(range(len(used)))
    assert used != list(range(1, len(used) + 1))


@settings(deadline=None, max_examples=40)
@given(small_workloads())
def test_metadata_says_the_lengths(workload: Workload) -> None:
    batch = make_batch(workload)
    metadata = batch.metadata
    starts = [0]
    for request in batch.requests:
        starts.append(starts[-1] + request.query_len)
    assert metadata.query_start_loc.tolist() == starts
    assert metadata.query_start_loc_cpu.tolist() == starts
    assert metadata.seq_lens.tolist() == [r.seq_len for r in batch.requests]
    assert metadata.num_reqs == len(batch.requests)
    assert metadata.num_actual_tokens == starts[-1] == len(batch.query)
    assert metadata.max_query_len == max(r.query_len for r in batch.requests)
    assert metadata.max_seq_len == max(r.seq_len for r in batch.requests)
    assert metadata.causal == (workload.attn_type is AttentionType.DECODER)
    cross = workload.attn_type is AttentionType.ENCODER_DECODER
    assert (metadata.encoder_seq_lens is not None) == cross
    if workload.attn_type is AttentionType.DECODER:
        assert metadata.compute_num_computed_tokens().tolist() == [
            batch.num_computed(i) for i in range(len(batch.requests))
        ]
    assert len(batch.key) == len(batch.value) == (0 if cross else starts[-1])
    assert len(metadata.slot_mapping) == len(batch.key)
    assert torch.isfinite(batch.query).all()


def test_encoders_have_no_cache() -> None:
    batch = make_batch(Workload.parse("2q5_q3 attn=encoder_only heads=2/1 head_size=8"))
    assert batch.metadata.slot_mapping.tolist() == [-1] * 13
    assert batch.metadata.block_table_tensor.tolist() == [[NULL_BLOCK]] * 3
    assert batch.num_computed(0) == 0


def test_cross_attention_has_its_keys_in_the_cache_and_none_new() -> None:
    batch = make_batch(Workload.parse("2q3s50 attn=encoder_decoder heads=2/1 head_size=8"))
    assert batch.num_computed(1) == 50
    assert batch.key.shape == (0, 1, 8)
    assert batch.metadata.encoder_seq_lens is not None
    assert batch.metadata.encoder_seq_lens.tolist() == [50, 50]
    assert batch.metadata.block_table_tensor.shape == (2, 4)


def test_context_and_new_tokens_join_into_the_whole_sequence() -> None:
    batch = make_batch(Workload.parse("q4s30_q2s9 heads=2/1 head_size=8"))
    start, end = batch.query_range(1)
    context, whole = batch.context(1), batch.keys_values(1)
    assert torch.equal(whole[0], torch.cat([context[0], batch.key[start:end]]))
    assert torch.equal(whole[1], torch.cat([context[1], batch.value[start:end]]))


def test_decodes_come_first_and_requests_keep_their_data() -> None:
    workload = Workload.parse("q8s20_q1s30_q2s40_q1s10 heads=2/1 head_size=8 prefix=8 block=4")
    plain, reordered = make_batch(workload), make_batch(workload, reorder_batch_threshold=2)
    assert [r.query_len for r in reordered.requests] == [1, 2, 1, 8]
    for new, old in enumerate([1, 2, 3, 0]):
        a, b = reordered.query_range(new), plain.query_range(old)
        assert torch.equal(reordered.query[a[0] : a[1]], plain.query[b[0] : b[1]])
        assert torch.equal(reordered.keys_values(new)[1], plain.keys_values(old)[1])


def test_a_shared_prefix_is_the_same_blocks_and_the_same_tokens() -> None:
    batch = make_batch(Workload.parse("3q1s40 prefix=24 block=8 heads=2/1 head_size=8"))
    table = batch.metadata.block_table_tensor
    assert (table[:, :3] == table[0, :3]).all()
    assert len(set(table[:, 3:].flatten().tolist())) == 3 * 2
    first, second = batch.keys_values(0)[0], batch.keys_values(1)[0]
    assert torch.equal(first[:24], second[:24])
    assert not torch.isclose(first[24:], second[24:]).all(dim=-1).any()
    assert batch.common_prefix_len == 24


def test_the_token_that_would_come_next_belongs_to_nobody() -> None:
    batch = make_batch(Workload.parse("3q2s20 heads=2/1 head_size=8 prefix=4 block=4"))
    everybody = torch.cat([batch.keys_values(i)[0] for i in range(3)])
    for i in range(3):
        following = batch.keys_values(i, 20, 21)[0]
        assert not (following == everybody).flatten(1).all(dim=1).any()


def test_data_depend_on_the_workload_only() -> None:
    workload = Workload.parse("2q3s20 heads=4/2 head_size=8 sinks=1")
    first, again = make_batch(workload), make_batch(workload)
    other = make_batch(workload.replace(seed=1))
    for name in ("query", "key", "value", "sinks"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))
    assert torch.equal(first.metadata.slot_mapping, again.metadata.slot_mapping)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("cache", ["fp32", "fp16", "bf16", "fp8_e4m3", "fp8_e5m2"])
def test_new_tokens_are_exact_in_the_cache_format(dtype: str, cache: str) -> None:
    workload = Workload.parse(f"2q9s30 heads=4/2 head_size=64 dtype={dtype} kv={cache}")
    batch = make_batch(workload)
    for values, scale in (
        (batch.key, batch.layer._k_scale_float),
        (batch.value, batch.layer._v_scale_float),
    ):
        assert values.dtype == torch_dtype(dtype)
        stored = (values / scale).to(torch_dtype(cache))
        assert torch.equal(stored.to(values.dtype) * scale, values)
        assert values.float().std() == pytest.approx(1.0, abs=0.1)


def test_rows_are_drawn_once_and_signs_for_every_workload() -> None:
    exact = Rounding(torch.float32, torch.float32, 1.0)
    cpu, ids = torch.device("cpu"), torch.arange(500)

    def pool(name: str, seed: str) -> torch.Tensor:
        return TokenPool(name, 500, (2, 32), seeded_generator(seed), exact, cpu).take(ids)

    one, other, values = pool("key", "a"), pool("key", "b"), pool("value", "a")
    assert torch.equal(one.abs(), other.abs())
    # Products of 64 signs, and of 32,000 normal numbers.
    assert abs(float((one * other).mean())) < 4 / 64**0.5
    assert abs(float((one * values).mean())) < 4 / 32_000**0.5


def test_a_pool_repeats_no_row() -> None:
    exact = Rounding(torch.float32, torch.float32, 1.0)
    pool = TokenPool("key", 30_000, (4, 64), seeded_generator("x"), exact, torch.device("cpu"))
    rows = pool.take(torch.arange(30_000)).flatten(1)
    assert len(torch.unique(rows, dim=0)) == 30_000
    ids, heads = torch.tensor([[5, 20_000]]), torch.tensor([[1, 0]])
    by_head = pool.take(ids, heads)
    assert torch.equal(by_head[0, 0], pool.take(torch.tensor([5]))[0, 1])
    assert torch.equal(by_head[0, 1], pool.take(torch.tensor([20_000]))[0, 0])
    repeats = rows[: pool.num_rows] * rows[pool.num_rows : 2 * pool.num_rows]
    assert abs(float(repeats.mean())) < 3 * 256**-0.5, "rows of the same remainder: random signs"


def weights_of_last_token(batch: AttentionBatch) -> torch.Tensor:
    """Softmax weights (heads, keys) of the last query of request 0, without sinks."""
    key = batch.keys_values(0)[0].double()
    group = batch.shape.num_heads // batch.shape.num_kv_heads
    last = batch.query_range(0)[1] - 1
    query, positions = batch.query[last : last + 1].double(), query_positions(batch, 0)[-1:]
    rows = [
        masked_logits(
            batch,
            query[:, h : h + 1],
            key[:, h // group],
            positions,
            0,
            slice(h, h + 1),
        )
        for h in range(batch.shape.num_heads)
    ]
    return torch.cat(rows, dim=1)[0].softmax(dim=-1)


@pytest.mark.parametrize("spec", ["q1s64", "q1s4k", "q1s32k", "q16s2k window=512"])
def test_edges_of_the_mask_carry_weight_and_the_rest_is_spread(spec: str) -> None:
    batch = make_batch(Workload.parse(f"{spec} heads=8/2 head_size=128 dtype=fp32"))
    weights = weights_of_last_token(batch)
    assert weights[:, -1].median() > 0.05, "the token itself"
    window = batch.shape.sliding_window
    if window:
        assert weights[:, -window].median() > 0.05, "the oldest token inside the window"
    ordinary = weights.sort(dim=-1).values[:, :-4].sum(dim=-1)
    assert 0.05 < ordinary.median() < 0.95, "neither one-hot nor only ordinary keys"


def test_alibi_slopes_are_those_of_the_paper() -> None:
    assert get_alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert get_alibi_slopes(1).tolist() == [2.0**-8]
    # 12 heads: the 8 slopes above, then every other one of the 16-head sequence 2^(-i/2).
    assert get_alibi_slopes(12).tolist() == pytest.approx(
        [2.0**-i for i in range(1, 9)] + [2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5]
    )


def test_computed_tokens_per_attention_type() -> None:
    request = Workload.parse("q4s9").requests[0]
    assert num_computed_tokens(request, AttentionType.DECODER) == 5
    assert num_computed_tokens(request, AttentionType.ENCODER_DECODER) == 9


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5)), min_size=1, max_size=6))
def test_flat_positions_are_all_of_them_in_order(pieces: list[tuple[int, int]]) -> None:
    spans = [(first, first + count) for first, count in pieces]
    requests, positions = flat_positions(spans, torch.device("cpu"))
    wanted = [(i, p) for i, (first, last) in enumerate(spans) for p in range(first, last)]
    assert list(zip(requests.tolist(), positions.tolist(), strict=True)) == wanted


@pytest.mark.parametrize(
    "spec", ["3q1s40_q300_2q5s5 window=9", "q260s300_2q1s30 attn=encoder_decoder"]
)
def test_queries_do_not_depend_on_which_are_made_together(
    spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = Workload.parse(f"{spec} heads=4/2 head_size=8 dtype=fp32")
    together = make_batch(workload).query
    joined = queries._Draws.joined
    monkeypatch.setattr(
        queries._Draws, "joined", lambda pieces, limit, device: joined(pieces, 1, device)
    )
    assert torch.equal(make_batch(workload).query, together)
