"""Latencies of users: against a token-by-token count, and their intervals against the truth."""

from __future__ import annotations

import math
import time
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnbench.errors import UsageError
from attnbench.traffic.itl import (
    check_own_clock,
    retimed,
    serve,
    user_latency,
)
from attnbench.traffic.itl_interval import intervals
from attnbench.traffic.latency import AttentionRoofline, LinearRoofline
from attnbench.traffic.latency_linear import linear_sizes
from attnbench.traffic.latency_measured import MeasuredLatency
from attnbench.traffic.reduce import reduce_steps
from attnbench.traffic.reduce_features import batches_of
from attnbench.traffic.schedule import schedule
from attnbench.traffic.schedule_settings import SchedulerSettings
from attnbench.traffic.step_clock import LinearStepSeconds
from attnbench.traffic.types import StepBatches, Trace
from tests.traffic.real import (
    H200,
    LAYER,
    batches_of_workloads,
    real_steps,
    real_trace,
    rugged_seconds,
)
from tests.traffic.strategies import settings_for, traces

CLOCK = LinearStepSeconds(0.25, 0.03125, 0.0009765625)


def rank(values: list[float], share: float) -> float:
    return sorted(values)[max(math.ceil(share * len(values)) - 1, 0)] if values else math.nan


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_latencies_are_those_of_a_token_by_token_count(data: st.DataObject) -> None:
    trace: Trace = data.draw(traces())
    steps = schedule(trace, data.draw(settings_for(trace)), CLOCK)
    found = user_latency(trace, steps, 0.5 * steps.duration_s)
    last: dict[int, float] = {}
    first_start: dict[int, float] = {}
    gaps: dict[int, list[float]] = defaultdict(list)
    ttft: dict[int, float] = {}
    shares: dict[int, float] = {}
    for step in range(len(steps)):
        start, end = steps.start_s[step], steps.start_s[step] + steps.duration_s[step]
        for entry in range(*steps.entries_of(step).indices(len(steps.request))):
            request, produced = int(steps.request[entry]), int(steps.produces[entry])
            first_start.setdefault(request, start)
            if not produced:
                continue
            if request in last:
                gaps[request] += [(end - last[request]) / produced] * produced
            else:
                ttft[request] = end - trace.arrival_s[request]
                inside = (steps.start_s >= first_start[request]) & (steps.start_s <= start)
                shares[request] = 0.5 * steps.duration_s[inside].sum() / ttft[request]
            last[request] = end
    every = [gap for request in gaps for gap in gaps[request]]
    summary = found.summary()
    for share in (0.5, 0.9, 0.99):
        name = f"p{round(100 * share)}"
        if every:
            assert summary[f"itl_{name}_s"] == pytest.approx(rank(every, share))
        assert summary[f"ttft_{name}_s"] == pytest.approx(rank(list(ttft.values()), share))
    by_request = [[rank(gaps[r], q) for q in (0.5, 0.9, 0.99)] for r in sorted(gaps)]
    np.testing.assert_allclose(found.request_itl_s, np.reshape(by_request, (-1, 3)))
    np.testing.assert_allclose(found.ttft_s, [ttft[r] for r in sorted(ttft)])
    np.testing.assert_allclose(found.ttft_attention_share, [shares[r] for r in sorted(shares)])
    waits = [first_start[r] - trace.arrival_s[r] for r in sorted(ttft)]
    np.testing.assert_allclose(found.wait_s, waits, atol=1e-12)
    busy = steps.duration_s.sum()
    assert found.tokens_per_busy_s == pytest.approx(trace.output_tokens.sum() / busy)
    assert found.tokens_per_s <= found.tokens_per_busy_s * (1 + 1e-12)


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_the_same_times_give_the_same_clock_and_longer_ones_push(data: st.DataObject) -> None:
    trace: Trace = data.draw(traces())
    steps = schedule(trace, data.draw(settings_for(trace)), CLOCK)
    starts, ends = retimed(steps, steps.duration_s)
    np.testing.assert_allclose(starts, steps.start_s, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(ends - starts, steps.duration_s, rtol=1e-6)
    factors = np.random.default_rng(0).uniform(0.5, 3.0, len(steps))
    starts, _ = retimed(steps, steps.duration_s * factors)
    before = -math.inf
    old_end = -math.inf
    for step in range(len(steps)):
        idle = steps.start_s[step] > old_end + 1e-9 * max(old_end, 1.0)
        start = max(before, float(steps.start_s[step])) if idle else before
        assert starts[step] == pytest.approx(start, rel=1e-9, abs=1e-9)
        before = start + steps.duration_s[step] * factors[step]
        old_end = float(steps.start_s[step] + steps.duration_s[step])


def test_another_clock_is_another_schedule() -> None:
    trace = real_trace("azure", 60)
    fast = AttentionRoofline(LAYER, H200)
    rest = LinearRoofline(linear_sizes("llama-3-8b"), H200)
    steps, latency = serve(trace, SchedulerSettings(), fast, rest, "linear layers at the roofline")
    assert latency.scope == "attention, and linear layers at the roofline"
    with pytest.raises(UsageError, match="as its clock"):
        check_own_clock(steps, fast)
    alone, only = serve(trace, SchedulerSettings(), fast)
    assert only.scope == "attention only"
    check_own_clock(alone, fast)
    assert len(alone) != len(steps)
    assert only.summary()["itl_p50_s"] < latency.summary()["itl_p50_s"]
    with pytest.raises(UsageError, match="schedule the trace again"):
        user_latency(trace, alone, 2 * alone.duration_s)


def test_intervals_hold_the_truth_and_grow_with_the_noise() -> None:
    """Attention is the rugged kernel, measured with 3 % noise on representatives."""
    trace, steps = real_trace("azure", 800), real_steps("azure", 800)
    reduction = reduce_steps(steps, LAYER, 128)
    exact = rugged_seconds(batches_of_workloads(reduction.workloads))
    truth = rugged_seconds(batches_of(steps)).sum() * 32
    rng = np.random.default_rng(5)
    widths = []
    for noise in (0.03, 0.6):
        samples = [t * np.exp(noise * rng.standard_normal(9)) for t in exact]
        model = MeasuredLatency(reduction.workloads, np.array([np.median(s) for s in samples]))
        rest = LinearRoofline(linear_sizes("llama-3-8b"), H200)
        own, latency = serve(trace, SchedulerSettings(), model, rest)
        found = intervals(trace, own, model, samples, rest.of_steps(own), num_draws=40)
        for name, value in latency.summary().items():
            if name in found:
                assert found[name].value == pytest.approx(value, rel=1e-9)
        for interval in found.values():
            assert interval.low <= interval.value <= interval.high
        if noise < 0.1:
            fixed = intervals(trace, steps, model, samples, num_draws=40)["attention_s"]
            assert fixed.low <= truth <= fixed.high
            assert (fixed.high - fixed.low) / fixed.value < 0.2
        widths.append((found["itl_p99_s"].high - found["itl_p99_s"].low) / found["itl_p99_s"].value)
    assert widths[1] > widths[0] > 0
    # Without noise the reduction's own error is left.
    model = MeasuredLatency(reduction.workloads, exact)
    quiet = intervals(trace, steps, model, [t[None] for t in exact], num_draws=40)["attention_s"]
    assert quiet.low < quiet.value < quiet.high
    assert (quiet.high - quiet.low) / quiet.value > 0.005
    assert quiet.low <= truth <= quiet.high
    with pytest.raises(UsageError, match="at least one"):
        intervals(trace, steps, model, samples[:-1])


def test_millions_of_entries_take_seconds() -> None:
    num_steps, batch = 20_000, 250
    num = num_steps * batch
    ones, none = np.ones(num, dtype=np.int64), np.zeros(num_steps, dtype=np.int64)
    steps = StepBatches(
        step_offsets=np.arange(0, num + 1, batch),
        start_s=np.linspace(0.0, 0.01 * (num_steps - 1), num_steps),
        duration_s=np.full(num_steps, 0.01, dtype=np.float64),
        num_blocks=none,
        num_preempted=none,
        request=np.tile(np.arange(batch), num_steps),
        query_len=ones,
        context_len=ones,
        produces=ones,
    )
    few = np.ones(batch, dtype=np.int64)
    trace = Trace("made", np.zeros(batch), few, few, few, few)
    begun = time.process_time()
    found = user_latency(trace, steps, steps.duration_s)
    found.summary()
    assert time.process_time() - begun < 20
    np.testing.assert_allclose(found.itl_s, 0.01)
    assert len(found.itl_s) == num - batch


def test_each_error_is_in_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """One error at a time, with a width known by hand."""
    trace, steps = real_trace("azure", 800), real_steps("azure", 800)
    reduction = reduce_steps(steps, LAYER, 64)
    exact = rugged_seconds(batches_of_workloads(reduction.workloads))
    model = MeasuredLatency(reduction.workloads, exact)

    def width(samples: list[np.ndarray], left_out: np.ndarray) -> float:
        monkeypatch.setattr(MeasuredLatency, "left_out_errors", lambda _: left_out)
        found = intervals(trace, steps, model, samples)["attention_s"]
        return (found.high - found.low) / found.value

    one, none = [t[None] for t in exact], np.zeros(len(exact))
    assert width(one, none) < 1e-9
    # Samples of all batches 10 % up or down: only drawing them again shows it.
    noisy = [t * np.array([0.9, 1.0, 1.1]) for t in exact]
    assert width(noisy, none) > 0.005
    # All wrong by 10 %: together, a normal error of 10 % of the total, 0.39 between the limits.
    together = width(one, np.full(len(exact), 0.1))
    assert 0.28 < together < 0.55
    # Half up, half down: no error in common, and what is left averages out in part.
    apart = width(one, np.where(np.arange(len(exact)) % 2, 0.1, -0.1))
    assert 0.01 < apart < 0.6 * together
