"""The dense reference against plain Python loops, and against itself where theory says so."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnbench.backends import reference as reference_module
from attnbench.backends.batch import AttentionBatch, make_batch
from attnbench.backends.reference import (
    ReferenceResult,
    _cheaper_mla_form,
    masked_logits,
    reference_attention,
)
from attnbench.workload import Workload, get_shape
from tests.backends.layouts import small_workloads


def loops(batch: AttentionBatch) -> tuple[list[list[list[float]]], list[list[float]]]:
    """Attention as a formula: one Python loop per index, no tensor operation."""
    shape, kind = batch.shape, str(batch.workload.attn_type)
    outputs, lses = [], []
    for i, request in enumerate(batch.requests):
        key, value = (t.double().tolist() for t in expanded(batch, i))
        first = batch.query_range(i)[0]
        for t in range(request.query_len):
            p = request.seq_len - request.query_len + t
            out_token, lse_token = [], []
            for h in range(shape.num_heads):
                g = h * len(key[0]) // shape.num_heads
                q = batch.query[first + t, h].double().tolist()
                terms: list[tuple[float, list[float]]] = []
                for j in range(request.seq_len):
                    if kind == "decoder" and j > p:
                        continue
                    behind = p - j if kind == "decoder" else abs(p - j)
                    if shape.sliding_window and behind >= shape.sliding_window:
                        continue
                    s = sum(a * b for a, b in zip(q, key[j][g], strict=True)) * shape.scale
                    if shape.logits_soft_cap:
                        s = shape.logits_soft_cap * math.tanh(s / shape.logits_soft_cap)
                    if batch.alibi_slopes is not None:
                        s -= float(batch.alibi_slopes[h]) * abs(p - j)
                    terms.append((math.exp(s), value[j][g]))
                total = sum(w for w, _ in terms)
                if batch.sinks is not None:
                    total += math.exp(float(batch.sinks[h]))
                out_token.append(
                    [sum(w * v[d] for w, v in terms) / total for d in range(shape.v_head_size)]
                )
                lse_token.append(math.log(total))
            outputs.append(out_token)
            lses.append(lse_token)
    return outputs, lses


def expanded(batch: AttentionBatch, request: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys (seq_len, kv_heads, size) and values of every head, MLA's latent expanded."""
    key, value = batch.keys_values(request)
    if not batch.shape.is_mla:
        return key, value
    heads = batch.shape.num_heads
    k = torch.stack([key.double() @ batch.layer.W_UK[h].double().T for h in range(heads)], 1)
    v = torch.stack([key.double() @ batch.layer.W_UV[h].double() for h in range(heads)], 1)
    return torch.cat([k, value.double().expand(-1, heads, -1)], -1), v


def assert_same(a: ReferenceResult, b: ReferenceResult) -> None:
    torch.testing.assert_close(a.output, b.output, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(a.lse, b.lse, rtol=1e-9, atol=1e-11)


@settings(deadline=None, max_examples=40)
@given(small_workloads())
def test_dense_is_the_formula(workload: Workload) -> None:
    batch = make_batch(workload)
    result = reference_attention(batch)
    output, lse = loops(batch)
    torch.testing.assert_close(
        result.output, torch.tensor(output, dtype=torch.float64), rtol=1e-9, atol=1e-11
    )
    torch.testing.assert_close(
        result.lse, torch.tensor(lse, dtype=torch.float64), rtol=1e-9, atol=1e-11
    )


@pytest.mark.parametrize(
    "features",
    [
        "",
        "window=5",
        "window=1",
        "softcap=3",
        "alibi=1",
        "sinks=1",
        "heads=6/1",
        "heads=6/6",
        "v_head_size=4",
        "attn=encoder",
        "attn=encoder_only window=4",
        "attn=encoder_decoder alibi=1",
        "heads=3/1 mla=16+8:12+20",
        "window=6 softcap=2 alibi=1 sinks=1 v_head_size=16 heads=6/2",
    ],
)
def test_each_feature_is_the_formula(features: str) -> None:
    """The random test above may skip a feature; this one may not."""
    spec = "q6_q9" if "attn=encoder" in features and "decoder" not in features else "q6s20_2q1s17"
    heads = "" if "heads=" in features else "heads=4/2"
    size = "" if "mla=" in features else "head_size=8"
    batch = make_batch(Workload.parse(f"{spec} dtype=fp32 {heads} {size} {features}"))
    result = reference_attention(batch)
    output, lse = loops(batch)
    torch.testing.assert_close(result.output, torch.tensor(output, dtype=torch.float64))
    torch.testing.assert_close(result.lse, torch.tensor(lse, dtype=torch.float64))
    assert result.output.dtype == result.lse.dtype == torch.float64
    assert result.output.shape == (*batch.query.shape[:2], batch.shape.v_head_size)


@settings(deadline=None, max_examples=15)
@given(small_workloads(attn_types=("decoder",), mla=True))
def test_mla_expanded_equals_absorbed(workload: Workload) -> None:
    batch = make_batch(workload)
    forms = [reference_attention(batch, mla_form=form) for form in ("expanded", "absorbed")]
    assert_same(*forms)
    assert_same(forms[0], reference_attention(batch))


def test_mla_expanded_equals_absorbed_at_the_size_of_a_real_layer() -> None:
    batch = make_batch(Workload.parse("q3s20 shape=deepseek-v2-lite"))
    assert_same(
        reference_attention(batch, mla_form="expanded"),
        reference_attention(batch, mla_form="absorbed"),
    )


@pytest.mark.parametrize(
    ("query_len", "form"), [(1, "absorbed"), (128, "absorbed"), (512, "expanded")]
)
def test_mla_takes_the_form_with_fewer_products(query_len: int, form: str) -> None:
    """DeepSeek-V3: expanding a key costs 512 * 256 products, absorbing 768 more per query."""
    assert _cheaper_mla_form(get_shape("deepseek-v3"), query_len) == form


@settings(deadline=None, max_examples=20)
@given(workload=small_workloads(), limit=st.integers(1, 6000))
def test_the_size_of_a_chunk_changes_nothing(workload: Workload, limit: int) -> None:
    batch = make_batch(workload)
    whole = reference_attention(batch)
    before = reference_module._CHUNK_BYTES
    reference_module._CHUNK_BYTES = limit
    try:
        assert_same(whole, reference_attention(batch))
    finally:
        reference_module._CHUNK_BYTES = before


@settings(deadline=None, max_examples=40)
@given(workload=small_workloads(attn_types=("decoder",)), data=st.data())
def test_chunked_prefill_in_any_chunking_equals_one_shot(
    workload: Workload, data: st.DataObject
) -> None:
    """The same tokens, fed as several steps whose context grows, give the same outputs."""
    batch = make_batch(workload)
    whole = reference_attention(batch)
    request = data.draw(st.integers(0, len(batch.requests) - 1))
    start, end = batch.query_range(request)
    cuts = data.draw(st.sets(st.integers(1, max(1, end - start - 1))))
    edges = sorted({0, *(c for c in cuts if c < end - start), end - start})
    context = batch.num_computed(request)
    outputs, lses = [], []
    for a, b in itertools.pairwise(edges):
        step = one_step(batch, request, context + a, context + b)
        result = reference_attention(step)
        outputs.append(result.output)
        lses.append(result.lse)
    torch.testing.assert_close(torch.cat(outputs), whole.output[start:end], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(torch.cat(lses), whole.lse[start:end], rtol=1e-9, atol=1e-11)


def one_step(batch: AttentionBatch, request: int, computed: int, seq_len: int) -> AttentionBatch:
    """The batch of one request whose tokens `computed` to `seq_len` are new."""
    spec = f"q{seq_len - computed}s{seq_len}"
    step = make_batch(
        batch.workload.replace(batch_spec=Workload.parse(spec).batch_spec, common_prefix_len=0)
    )
    start = batch.query_range(request)[0] - batch.num_computed(request)
    step.query = batch.query[start + computed : start + seq_len]
    step.sinks, step.layer = batch.sinks, batch.layer
    step.tokens = type(batch.tokens)(
        key_pool=batch.tokens.key_pool,
        value_pool=batch.tokens.value_pool,
        num_shared=batch.tokens.num_shared,
        device=batch.tokens.device,
        first_own_id=batch.tokens.first_own_id[request : request + 1],
    )
    return step


def test_temporaries_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of all heads and queries would be 8 MB in float64; no chunk exceeds the limit."""
    sizes = []

    def recorded(*args: Any) -> torch.Tensor:
        logits = masked_logits(*args)
        sizes.append(logits.numel() * 8)
        return logits

    monkeypatch.setattr(reference_module, "_CHUNK_BYTES", 1 << 18)
    monkeypatch.setattr(reference_module, "masked_logits", recorded)
    batch = make_batch(Workload.parse("q512 heads=4/2 head_size=8 dtype=fp32"))
    reference_attention(batch)
    assert max(sizes) <= 1 << 18
    assert sum(sizes) >= 4 * 512 * 512 * 8 // 2, "causal: at least half of all logits"


@settings(deadline=None, max_examples=60)
@given(workload=small_workloads(dtypes=("fp32",)), form=st.sampled_from(["absorbed", "expanded"]))
def test_the_size_of_a_step_changes_nothing(workload: Workload, form: str) -> None:
    """One lane and one query at a time, or all heads of all requests of the same lengths."""
    batch = make_batch(workload)
    together = reference_attention(batch, form)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference_module, "_CHUNK_BYTES", 1)
        alone = reference_attention(batch, form)
    torch.testing.assert_close(alone.output, together.output, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(alone.lse, together.lse, rtol=1e-9, atol=1e-9)
