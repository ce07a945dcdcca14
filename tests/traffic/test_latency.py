"""Step models: against the closed formulas one request at a time, and one call against many."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnbench.errors import UsageError
from attnbench.traffic.latency import (
    AttentionRoofline,
    DeviceRates,
    LinearRoofline,
    LinearSizes,
    StepModel,
    SumOfParts,
)
from attnbench.traffic.latency_costs import LayerCosts
from attnbench.traffic.latency_linear import CONFIGS, linear_sizes
from attnbench.traffic.latency_measured import MeasuredLatency
from attnbench.traffic.types import StepBatches
from attnbench.workload import BatchSpec, Request, Workload
from attnbench.workload.cost import attention_bytes, attention_flops

LAYERS = (
    "q1",
    "q1 shape=llama-3-70b tp=8 kv=fp8_e4m3",
    "q1 window=100 dtype=fp16",
    "q1 heads=4/2 head_size=64 v_head_size=32",
    "q1 shape=deepseek-v3 tp=8",
    "q1 shape=deepseek-v3 kv=fp8_ds_mla block=64",
    "q1 shape=deepseek-v3.2 topk=64:random",
    "q1 shape=deepseek-v3.2 topk=64:window",
    "q1 shape=deepseek-v3.2 topk=64:prefix kv=fp8_ds_mla",
)
RATES = DeviceRates(4.8e12, 989.4e12)
BATCH = st.lists(
    st.tuples(st.one_of(st.just(1), st.integers(1, 300)), st.integers(0, 400)),
    min_size=1,
    max_size=6,
)


def made(batches: list[list[tuple[int, int]]]) -> StepBatches:
    """Steps of (query length, context length)."""
    offsets = np.cumsum([0, *(len(batch) for batch in batches)])
    query, context = (
        np.array([entry[part] for batch in batches for entry in batch]) for part in (0, 1)
    )
    steps, none = np.zeros(len(batches)), np.zeros(len(batches), dtype=np.int64)
    return StepBatches(offsets, steps, steps, none, none, query, query, context, query)


def models() -> list[StepModel]:
    layer = Workload.parse("q1 shape=llama-3-8b")
    roofline = AttentionRoofline(layer, RATES)
    linear = LinearRoofline(linear_sizes("deepseek-v3", 8), RATES)
    workloads = [
        Workload.parse(f"{count}q1s{length}")
        for count in (1, 3, 9, 40)
        for length in (9, 500, 4000, 9999)
    ]
    seconds = np.linspace(1e-6, 1e-4, len(workloads))
    return [roofline, linear, SumOfParts([roofline, linear]), MeasuredLatency(workloads, seconds)]


@settings(deadline=None, max_examples=150)
@given(text=st.sampled_from(LAYERS), batches=st.lists(BATCH, min_size=1, max_size=4))
def test_costs_are_those_of_the_formulas(text: str, batches: list[list[tuple[int, int]]]) -> None:
    layer, steps = Workload.parse(text), made(batches)
    costs = LayerCosts(layer)
    query, context = steps.query_len, steps.context_len
    flops, moved = costs.flops(query, context), costs.bytes(query, context)
    expansion = costs.expansion_bytes(query, steps.step_offsets)
    for index, batch in enumerate(batches):
        requests = tuple(Request(new, new + cached) for new, cached in batch)
        workload = layer.replace(batch_spec=BatchSpec(requests))
        entries = steps.entries_of(index)
        assert int(flops[entries].sum()) == attention_flops(workload)
        assert int(moved[entries].sum() + expansion[index]) == attention_bytes(workload)


def test_a_roofline_is_the_slower_of_memory_and_matrix() -> None:
    layer = Workload.parse("q1 shape=llama-3-8b")
    steps = made([[(1, 4095)] * 8, [(4096, 0)]])
    decode, prefill = AttentionRoofline(layer, RATES).of_steps(steps)
    one = {text: Workload.parse(text) for text in ("8q1s4k", "q4k")}
    assert decode == pytest.approx(32 * attention_bytes(one["8q1s4k"]) / 4.8e12)
    assert prefill == pytest.approx(32 * attention_flops(one["q4k"]) / 989.4e12)
    assert AttentionRoofline(layer, RATES, 1).of_steps(steps)[0] == pytest.approx(decode / 32)


@settings(deadline=None, max_examples=30)
@given(batches=st.lists(BATCH, min_size=1, max_size=5))
def test_one_step_alone_has_the_same_time_to_the_last_bit(
    batches: list[list[tuple[int, int]]],
) -> None:
    steps = made(batches)
    for model in models():
        together = model.of_steps(steps)
        for index in range(len(steps)):
            entries = steps.entries_of(index)
            alone = model(steps.query_len[entries], steps.context_len[entries])
            assert alone == together[index]


def test_a_run_of_decodes_is_as_many_single_steps() -> None:
    contexts = np.array([5, 900, 31, 4000])
    ones = np.ones(4, dtype=np.int64)
    for model in models():
        run = model.decode_run(contexts, 7)
        assert run.tolist() == [model(ones, contexts + step) for step in range(7)]


def test_many_entries_are_priced_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = made([[(1, 10 * n)] * (n % 5 + 1) for n in range(50)] + [[(1, 1)] * 40])
    model = models()[0]
    whole = model.of_steps(steps)
    monkeypatch.setattr("attnbench.traffic.latency._CHUNK_ENTRIES", 16)
    assert model.of_steps(steps).tolist() == whole.tolist()
    assert len(model.of_steps(made([]))) == 0


def test_sizes_add_up_to_the_published_numbers_of_parameters() -> None:
    """Model cards: 8.03, 70.6, 405.9 and 671 billion, input embedding included there."""
    for name, billions in (("llama-3-8b", 8.03), ("llama-3-70b", 70.6), ("llama-3.1-405b", 405.9)):
        config = CONFIGS[name]
        embedding = config["hidden_size"] * config["vocab_size"]
        assert linear_sizes(name).dense_parameters + embedding == pytest.approx(
            billions * 1e9, rel=2e-3
        )
    sizes = linear_sizes("deepseek-v3")
    total = sizes.dense_parameters + sizes.num_experts * sizes.expert_parameters
    assert total + 7168 * 129280 == pytest.approx(671e9, rel=2e-3)
    active = sizes.dense_parameters + 8 * sizes.expert_parameters
    assert active + 7168 * 129280 == pytest.approx(37e9, rel=0.03)
    shared = linear_sizes("deepseek-v3", 8)
    assert shared.dense_parameters == sizes.dense_parameters / 8


def test_touched_experts_are_what_even_choices_touch() -> None:
    sizes = LinearSizes(0.0, 1.0, 64, 4, 1.0)
    rng = np.random.default_rng(0)
    for tokens in (1, 7, 60):
        touched = [
            len({int(e) for _ in range(tokens) for e in rng.choice(64, 4, replace=False)})
            for _ in range(300)
        ]
        seconds = LinearRoofline(sizes, DeviceRates(1.0, 1e30))(np.array([tokens]), np.array([0]))
        assert seconds == pytest.approx(np.mean(touched), rel=0.02)


@pytest.mark.parametrize(
    ("text", "word"),
    [("q8 attn=encoder", "attn="), ("q1s4k lengths=geometric", "lengths=")],
)
def test_layers_that_no_schedule_has_are_refused(text: str, word: str) -> None:
    with pytest.raises(UsageError, match=f"leave {word}"):
        LayerCosts(Workload.parse(text))


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(UsageError, match="above zero"):
        DeviceRates(0.0, 1.0)
    with pytest.raises(UsageError, match="did you mean"):
        linear_sizes("llama-3-8")
    with pytest.raises(UsageError, match="hidden_size"):
        linear_sizes({"num_hidden_layers": 3})
    with pytest.raises(UsageError, match="one part"):
        SumOfParts([])
