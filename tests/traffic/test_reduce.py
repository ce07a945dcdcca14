"""Representatives of a schedule, and what is predicted from their times."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from attnbench.errors import UsageError
from attnbench.traffic.latency import AttentionRoofline
from attnbench.traffic.latency_costs import LayerCosts
from attnbench.traffic.latency_measured import MeasuredLatency
from attnbench.traffic.reduce import (
    WindowError,
    calibrated,
    features_of_workloads,
    reduce_steps,
    rounded,
    window_error,
    window_to_hold_back,
)
from attnbench.traffic.reduce_features import (
    NAMES,
    Batches,
    batches_of,
    features_of,
)
from attnbench.traffic.types import Floats
from attnbench.workload import Workload
from tests.traffic.real import (
    H200,
    LAYER,
    TRACES,
    batches_of_workloads,
    real_steps,
    rugged_seconds,
    window_of,
)


def roofline_seconds(batches: Batches) -> Floats:
    model = AttentionRoofline(LAYER, H200, 1)
    return model.of_entries(batches.step_offsets, batches.query_len, batches.context_len)


def error_of(name: str, place: float, rugged: bool) -> WindowError:
    """The error over a window held back that begins at this part of a real trace's schedule."""
    steps = real_steps(name)
    first = int(place * len(steps))
    window = slice(first, first + max(500, len(steps) // 20))
    reduction = reduce_steps(steps, LAYER, 512, window)
    assert 300 <= len(reduction) <= 512
    held = window_of(steps, window)
    kernel = rugged_seconds if rugged else roofline_seconds
    seconds = kernel(batches_of_workloads(reduction.workloads))
    model = MeasuredLatency(reduction.workloads, seconds, 1)
    predicted = model.of_entries(held.step_offsets, held.query_len, held.context_len)
    return window_error(predicted, kernel(held))


@pytest.mark.parametrize(
    ("name", "place", "rugged"),
    [
        *((name, place, False) for name in TRACES for place in (0.15, 0.5, 0.8)),
        *((name, place, True) for name in TRACES for place in (0.15, 0.5, 0.8)),
    ],
)
def test_a_window_held_back_is_predicted(name: str, place: float, rugged: bool) -> None:
    """Total within 3 %, p99 within 5 %, for a roofline and for a kernel full of jumps."""
    error = error_of(name, place, rugged)
    assert error.num_steps >= 500
    assert abs(error.total) <= 0.03, error
    assert abs(error.p99) <= 0.05, error


@pytest.mark.parametrize("name", TRACES)
def test_weights_add_up_to_the_schedule(name: str) -> None:
    steps = real_steps(name)
    reduction = reduce_steps(steps, LAYER)
    totals = features_of(batches_of(steps), LayerCosts(LAYER)).sum(axis=0)
    assert reduction.totals_error <= 0.005
    assert reduction.weights.sum() == pytest.approx(len(steps), rel=0.005)
    assert (reduction.weights > 0).all()
    np.testing.assert_allclose(reduction.weights @ reduction.features, totals, rtol=0.005)
    assert reduction.num_nearest.sum() == len(steps)
    seconds = roofline_seconds(batches_of_workloads(reduction.workloads))
    whole = roofline_seconds(batches_of(steps)).sum()
    assert reduction.total_seconds(seconds) == pytest.approx(whole, rel=0.01)


def test_a_window_held_back_chooses_nothing() -> None:
    steps = real_steps("azure", 800)
    window = window_to_hold_back(steps)
    assert window.stop - window.start >= 500
    entries = slice(int(steps.step_offsets[window.start]), int(steps.step_offsets[window.stop]))
    query, context = steps.query_len.copy(), steps.context_len.copy()
    query[entries], context[entries] = 7, 123456
    other = replace(steps, query_len=query, context_len=context)
    chosen = reduce_steps(steps, LAYER, 64, window).workloads
    assert reduce_steps(other, LAYER, 64, window).workloads == chosen
    assert reduce_steps(other, LAYER, 64).workloads != reduce_steps(steps, LAYER, 64).workloads


def test_reducing_twice_is_the_same() -> None:
    steps = real_steps("mooncake", 400)
    first, second = (reduce_steps(steps, LAYER, 48) for _ in range(2))
    assert first.workloads == second.workloads
    assert first.weights.tolist() == second.weights.tolist()


def test_contexts_are_rounded_to_five_bits() -> None:
    contexts = np.arange(0, 70000)
    found = rounded(contexts)
    assert found[:33].tolist() == list(range(33))
    assert found[[33, 34, 35, 1000, 4095]].tolist() == [34, 34, 36, 992, 4096]
    assert (np.abs(found - contexts)[1:] / contexts[1:]).max() <= 1 / 32
    assert len({bin(int(value)).strip("0b").rstrip("0") for value in found}) <= 32


def test_features_of_a_batch_by_hand() -> None:
    workload = Workload.parse("3q1s100_q1s400_q512_q100s600 shape=llama-3-8b")
    row = dict(zip(NAMES, features_of_workloads((workload,))[0].tolist(), strict=True))
    assert row == {
        "short_reqs": 4,
        "short_tokens": 4,
        "short_reads": 700,
        "short_longest": 400,
        "long_reqs": 2,
        "long_tokens": 612,
        "long_reads": 1112,
        "long_pairs": 512 * 513 // 2 + 100 * 500 + 100 * 101 // 2,
        "long_tiles": 4 + 1,
        "long_tile_reads": 4 * 512 + 600,
        "long_longest": 600,
    }


def test_calibration_is_the_smallest_change_that_meets_the_totals() -> None:
    from scipy.optimize import minimize

    rng = np.random.default_rng(3)
    counts, features = rng.uniform(5, 50, 20), rng.uniform(1, 9, (20, 3))
    totals = (counts @ features) * np.array([1.05, 0.97, 1.01])
    weights = calibrated(counts, features, totals)
    columns = np.column_stack((np.ones(20), features))
    wanted = np.concatenate(([counts.sum()], totals))
    np.testing.assert_allclose(columns.T @ weights, wanted, rtol=1e-9)
    best = minimize(
        lambda w: ((w - counts) ** 2 / counts).sum(),
        counts,
        jac=lambda w: 2 * (w - counts) / counts,
        constraints={
            "type": "eq",
            "fun": lambda w: columns.T @ w / wanted - 1.0,
            "jac": lambda w: columns.T / wanted[:, None],
        },
        options={"ftol": 1e-12, "maxiter": 500},
    )
    np.testing.assert_allclose(weights, best.x, rtol=1e-3)


def test_calibration_keeps_weights_positive_where_totals_cannot_be_met() -> None:
    counts = np.array([10.0, 20.0, 30.0])
    weights = calibrated(counts, np.array([[1.0], [2.0], [3.0]]), np.array([1e6]))
    assert ((weights >= counts / 4) & (weights <= counts * 4)).all()


def test_bad_input_is_refused() -> None:
    steps = real_steps("azure", 800)
    with pytest.raises(UsageError, match="16 or more"):
        reduce_steps(steps, LAYER, 3)
    with pytest.raises(UsageError, match="longer trace"):
        reduce_steps(steps, LAYER, 16, slice(0, len(steps)))
    with pytest.raises(UsageError, match="too short"):
        window_to_hold_back(real_steps("azure", 20))
    workloads = [Workload.parse(f"{n}q1s100") for n in range(1, 21)]
    with pytest.raises(UsageError, match="above zero"):
        MeasuredLatency(workloads, np.array([1.0] * 19 + [float("nan")]))
    with pytest.raises(UsageError, match="several layers"):
        MeasuredLatency([*workloads, Workload.parse("q1 dtype=fp16")], np.ones(21))
    with pytest.raises(UsageError, match="16 or more"):
        MeasuredLatency(workloads[:3], np.ones(3))
