"""Which tokens a sparse query attends to, against walking over them one by one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnbench.backends.batch import AttentionBatch, make_batch
from attnbench.backends.decode_steps import DecodeSteps
from attnbench.backends.kv_cache import allocate_kv_cache, fill_context, write_new_tokens
from attnbench.backends.paged_reference import paged_attention
from attnbench.backends.reference import reference_attention
from attnbench.backends.topk import draw_topk_indices, selected_keys, topk_slots
from attnbench.backends.torch_mla import TorchMLABackend
from attnbench.workload import Request, Workload
from tests.backends.running import Run

PATTERNS = ["random", "prefix", "window"]
SHAPE = "heads=3 mla=16+8:8+12 dtype=fp32"
_lengths = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 30)), min_size=1, max_size=4)


def _requests(lengths: list[tuple[int, int]]) -> list[Request]:
    return [Request(query, query + context) for query, context in lengths]


@given(_lengths, st.integers(1, 50), st.sampled_from(PATTERNS), st.integers(0, 99))
@settings(deadline=None)
def test_each_row_one_by_one(
    lengths: list[tuple[int, int]], topk: int, pattern: str, seed: int
) -> None:
    requests = _requests(lengths)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(requests))]
    rows = iter(draw_topk_indices(requests, topk, pattern, generators).tolist())
    for request in requests:
        for own in range(request.seq_len - request.query_len, request.seq_len):
            row = next(rows)
            count = min(topk, own + 1)
            assert row[count:] == [-1] * (topk - count)
            chosen = row[:count]
            assert len(set(chosen)) == count
            assert all(0 <= position <= own for position in chosen)
            if pattern == "prefix":
                assert chosen == list(range(count))
            if pattern == "window":
                assert chosen == list(range(own + 1 - count, own + 1))
    assert next(rows, None) is None


def test_random_is_uniform_and_in_no_order(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    rows = draw_topk_indices([Request(4000, 4009)], 5, "random", [generator])[-2000:]
    relative = rows.double() / torch.arange(2009, 4009)[:, None]
    assert abs(float(relative.mean()) - 0.5) < 0.02
    assert abs(float((relative < 0.25).double().mean()) - 0.25) < 0.02
    ascending = (rows[:, 1:] > rows[:, :-1]).double().mean()
    assert abs(float(ascending) - 0.5) < 0.03
    # The same whatever is drawn at a time.
    monkeypatch.setattr("attnbench.backends.topk._DRAWN_AT_ONCE", 4009 * 7)
    again = draw_topk_indices([Request(4000, 4009)], 5, "random", [generator.manual_seed(3)])
    assert torch.equal(again[-2000:], rows)


@given(_lengths, st.integers(1, 20), st.integers(0, 9))
@settings(deadline=None, max_examples=30)
def test_slots_and_masks(lengths: list[tuple[int, int]], topk: int, seed: int) -> None:
    spec = "_".join(f"q{r.query_len}s{r.seq_len}" for r in _requests(lengths))
    batch = make_batch(Workload.parse(f"{spec} {SHAPE} block=4 topk={topk}:random seed={seed}"))
    assert batch.topk_indices is not None
    request = [i for i, r in enumerate(batch.requests) for _ in range(r.query_len)]
    table = batch.metadata.block_table_tensor
    slots = topk_slots(batch.topk_indices, torch.tensor(request), table, 4)
    mask = selected_keys(batch.topk_indices, 2, 9)
    for token, row in enumerate(batch.topk_indices.tolist()):
        blocks = table[request[token]].tolist()
        assert slots[token].tolist() == [
            -1 if position < 0 else blocks[position // 4] * 4 + position % 4 for position in row
        ]
        assert mask[token].tolist() == [key in row for key in range(2, 11)]


def oracle(batch: AttentionBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and LSE, one query token and head at a time over its chosen tokens, expanded."""
    shape, layer = batch.shape, batch.layer
    assert batch.topk_indices is not None
    output = torch.empty((len(batch.query), shape.num_heads, shape.v_head_size)).double()
    lse = torch.empty((len(batch.query), shape.num_heads)).double()
    token = 0
    for i, request in enumerate(batch.requests):
        latent, rope = (x.double() for x in batch.keys_values(i))
        for _ in range(request.query_len):
            chosen = [p for p in batch.topk_indices[token].tolist() if p >= 0]
            for head in range(shape.num_heads):
                nope = latent[chosen] @ layer.W_UK[head].double().T
                key = torch.cat([nope, rope[chosen, 0]], dim=1)
                logits = key @ batch.query[token, head].double() * shape.scale
                value = latent[chosen] @ layer.W_UV[head].double()
                output[token, head] = logits.softmax(0) @ value
                lse[token, head] = logits.logsumexp(0)
            token += 1
    return output, lse


@given(
    _lengths,
    st.integers(1, 50),
    st.sampled_from(PATTERNS),
    st.integers(0, 9),
    st.sampled_from([0, 8]),
)
@settings(deadline=None, max_examples=40)
def test_both_references_and_torch_mla_equal_the_oracle(
    lengths: list[tuple[int, int]], topk: int, pattern: str, seed: int, prefix: int
) -> None:
    lengths = [(query, context + prefix) for query, context in lengths]
    spec = "_".join(f"q{r.query_len}s{r.seq_len}" for r in _requests(lengths))
    text = f"{spec} {SHAPE} block=4 topk={topk}:{pattern} seed={seed} prefix={prefix}"
    run = Run(TorchMLABackend, text)
    expected, lse = oracle(run.batch)
    for form in ("expanded", "absorbed"):
        found = reference_attention(run.batch, form)
        torch.testing.assert_close(found.output, expected, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(found.lse, lse, rtol=1e-9, atol=1e-11)
    paged = paged_attention(run.batch, run.kv_cache, TorchMLABackend)
    torch.testing.assert_close(paged.output, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(paged.lse, lse, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(run.attend().double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(run.lse.double(), lse, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kv", ["", " kv=fp8_e4m3"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_requests_keep_their_positions_when_they_are_reordered(pattern: str, kv: str) -> None:
    workload = Workload.parse(f"q9s20_q1s30_q2s12 {SHAPE} topk=5:{pattern}{kv}")
    plain, moved = make_batch(workload), make_batch(workload, reorder_batch_threshold=2)
    assert plain.topk_indices is not None
    assert moved.topk_indices is not None
    assert [r.query_len for r in moved.requests] == [1, 2, 9]
    assert torch.equal(moved.topk_indices[3:], plain.topk_indices[:9])
    assert torch.equal(moved.query[3:], plain.query[:9])


def test_seed_and_dense_batches() -> None:
    text = f"2q1s90 {SHAPE} topk=5:random"
    once, again, other = (make_batch(Workload.parse(t)) for t in (text, text, f"{text} seed=1"))
    assert once.topk_indices is not None
    assert again.topk_indices is not None
    assert other.topk_indices is not None
    assert torch.equal(once.topk_indices, again.topk_indices)
    assert not torch.equal(once.topk_indices, other.topk_indices)
    assert not torch.equal(once.topk_indices[0], once.topk_indices[1])
    assert make_batch(Workload.parse(f"2q1s90 {SHAPE}")).topk_indices is None


@pytest.mark.parametrize(
    "text",
    [
        f"3q1s300 {SHAPE} topk=64:random",
        f"2q5s300 {SHAPE} topk=64:random",
        f"3q1s300 {SHAPE} topk=64:window",
        f"3q1s300 {SHAPE} topk=64:prefix",
        "2q1s300 heads=2 mla=512+64:16+16 topk=64:random kv=fp8_ds_mla",
    ],
)
@pytest.mark.parametrize("wrong", ["dense", "one dropped", "last dropped", "one shifted"])
def test_a_wrong_selection_shows(text: str, wrong: str) -> None:
    """What a query must not see is made to look like it, and what it must see is weighty."""
    run = Run(TorchMLABackend, text)
    assert run.check().ok
    indices = run.batch.metadata.topk_indices_buffer
    assert indices is not None
    bad = indices.clone()
    if wrong == "dense":
        bad = torch.arange(300).repeat(len(indices), 1).to(torch.int32)
        own = torch.cat([torch.arange(r.seq_len - r.query_len, 300) for r in run.batch.requests])
        bad.masked_fill_(bad > own[:, None], -1)
    elif wrong == "one dropped":
        bad[:, 0] = -1
    elif wrong == "last dropped":
        bad[:, -1] = -1
    else:
        bad = (bad - 1).clamp_min(0)
    common = run.batch.metadata.replace(topk_indices_buffer=bad)
    run.metadata = run.builder.build(0, common)
    assert not run.check().ok


@pytest.mark.parametrize("kv", ["", " kv=fp8_ds_mla"])
def test_decode_steps_choose_again_and_stay_right(kv: str) -> None:
    text = f"q1s20_q3s9 heads=2 mla=512+64:16+16 block=8 topk=6:random{kv}"
    batch = make_batch(Workload.parse(text))
    steps = DecodeSteps(batch, 3)
    cache = allocate_kv_cache(TorchMLABackend, batch.spec, steps.first.num_blocks, "cpu")
    fill_context(steps.first, cache, TorchMLABackend)
    write_new_tokens(steps.first, cache, TorchMLABackend)
    result = reference_attention(steps.first)
    before = batch.topk_indices
    for step in range(3):
        following = steps.feed(result.output)
        write_new_tokens(following, cache, TorchMLABackend)
        assert following.topk_indices is not None
        assert following.topk_indices.shape == (2, 6)
        assert before is not None
        assert not torch.equal(following.topk_indices, before[:2])
        assert int(following.topk_indices.max()) <= 20 + step
        before = following.topk_indices
        result = reference_attention(following)
        paged = paged_attention(following, cache, TorchMLABackend)
        torch.testing.assert_close(paged.output, result.output, rtol=1e-9, atol=1e-11)
    again = DecodeSteps(batch, 1).feed(reference_attention(batch).output)
    assert again.topk_indices is not None
