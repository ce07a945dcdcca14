"""Partial states: split-KV in any partition and order, cascade, empty parts, sinks."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnbench.backends.batch import AttentionBatch, make_batch
from attnbench.backends.merge import PartialState, merge_all, merge_attn_states
from attnbench.backends.paged_reference import absorb_query, block_state
from attnbench.backends.reference import reference_attention
from attnbench.workload import Workload
from tests.backends.layouts import small_workloads


def part(batch: AttentionBatch, request: int, start: int, end: int) -> PartialState:
    """State of one request over the keys `start` to `end`, from the dense data."""
    a, b = batch.query_range(request)
    query = batch.query[a:b].double()
    key, value = (t.double() for t in batch.keys_values(request, start, end))
    if batch.shape.is_mla:
        query = absorb_query(batch, query)
        key, value = torch.cat([key, value[:, 0]], dim=-1)[:, None], key[:, None]
    return block_state(batch, request, query, key, value, start)


def finish(batch: AttentionBatch, state: PartialState) -> tuple[torch.Tensor, torch.Tensor]:
    if batch.sinks is not None:
        state = state.merge(PartialState.from_sink(batch.sinks, state))
    output, lse = state.finish()
    if batch.shape.is_mla:
        output = torch.einsum("thl,hlv->thv", output, batch.layer.W_UV.double())
    return output, lse


@settings(deadline=None, max_examples=60)
@given(workload=small_workloads(), data=st.data())
def test_split_kv_merges_for_any_partition_and_order(
    workload: Workload, data: st.DataObject
) -> None:
    batch = make_batch(workload)
    whole = reference_attention(batch)
    request = data.draw(st.integers(0, len(batch.requests) - 1))
    seq_len = batch.requests[request].seq_len
    # Repeated cuts make empty parts.
    cuts = sorted(data.draw(st.lists(st.integers(0, seq_len), max_size=8)))
    edges = [0, *cuts, seq_len]
    states = [part(batch, request, a, b) for a, b in itertools.pairwise(edges)]
    states = data.draw(st.permutations(states))
    while len(states) > 1:  # any tree, not only left to right
        i = data.draw(st.integers(0, len(states) - 2))
        states[i : i + 2] = [states[i].merge(states[i + 1])]
    output, lse = finish(batch, states[0])
    start, end = batch.query_range(request)
    torch.testing.assert_close(output, whole.output[start:end], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(lse, whole.lse[start:end], rtol=1e-9, atol=1e-11)


@settings(deadline=None, max_examples=25)
@given(small_workloads(attn_types=("decoder",)))
def test_cascade_equals_the_whole(workload: Workload) -> None:
    """A shared prefix, finished on its own for all requests, merged by LSE with each rest."""
    batch = make_batch(workload)
    whole = reference_attention(batch)
    prefix = batch.common_prefix_len
    for request, r in enumerate(batch.requests):
        shared = part(batch, request, 0, prefix).finish()
        rest = part(batch, request, prefix, r.seq_len).finish()
        output, lse = merge_attn_states(*shared, *rest)
        state = PartialState.from_output(output, lse)
        output, lse = finish(batch, state)
        start, end = batch.query_range(request)
        torch.testing.assert_close(output, whole.output[start:end], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(lse, whole.lse[start:end], rtol=1e-9, atol=1e-11)


def test_an_empty_part_is_neutral_and_nothing_at_all_is_zero() -> None:
    value = torch.randn(3, 4, dtype=torch.float64)
    some = PartialState.from_logits(torch.randn(2, 3, dtype=torch.float64), value)
    hidden = PartialState.from_logits(torch.full((2, 3), float("-inf")).double(), value)
    none = PartialState.from_logits(torch.zeros(2, 0).double(), value[:0])
    for merged in (some.merge(hidden), hidden.merge(some), merge_all([none, some, none])):
        for mine, its in zip(some.finish(), merged.finish(), strict=True):
            assert torch.equal(mine, its)
    output, lse = hidden.merge(none).finish()
    assert torch.equal(output, torch.zeros(2, 4).double())
    assert torch.equal(lse, torch.full((2,), float("-inf")).double())
    # A kernel may leave garbage in the output of a part it did not work on.
    garbage = torch.full((2, 4), float("nan")).double()
    output, lse = merge_attn_states(garbage, torch.full((2,), float("-inf")), *some.finish())
    torch.testing.assert_close(output, some.finish()[0])


def test_huge_logits_do_not_overflow() -> None:
    value = torch.eye(2, dtype=torch.float64)
    one = PartialState.from_logits(torch.tensor([[2000.0]]).double(), value[:1])
    two = PartialState.from_logits(torch.tensor([[2000.0]]).double(), value[1:])
    output, lse = one.merge(two).finish()
    assert output.tolist() == [[0.5, 0.5]]
    torch.testing.assert_close(lse, torch.tensor([2000.0 + 0.6931471805599453]).double())
