"""Errors of batches left out: against slow refits, with everything done again for each batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from scipy.optimize import nnls

from attnbench.traffic.latency_costs import LayerCosts
from attnbench.traffic.latency_kriging import Scales
from attnbench.traffic.latency_measured import MeasuredLatency, _places
from attnbench.traffic.latency_terms import number, numbers_of_entries, term_values, terms_of
from attnbench.traffic.reduce import reduce_steps
from attnbench.traffic.reduce_features import Batches
from attnbench.traffic.types import Floats
from attnbench.workload import Workload
from tests.traffic.real import LAYER, batches_of_workloads, real_steps, rugged_seconds

FOLDS = 16


def made_up() -> tuple[Workload, ...]:
    """Decodes of many sizes, and half as many of them again with prompts among them."""
    rng = np.random.default_rng(5)
    texts = []
    for index in range(80):
        parts = [f"{rng.integers(1, 65)}q1s{rng.integers(16, 9000)}" for _ in range(2)]
        if index % 3 == 0:
            new = int(rng.integers(17, 2049))
            parts.append(f"q{new}s{new + int(rng.integers(0, 4096))}")
        texts.append("_".join(parts))
    return tuple(Workload.parse(f"{text} shape=llama-3-8b") for text in texts)


def measured(name: str) -> tuple[tuple[Workload, ...], Batches, Floats]:
    """Batches, and their times by a kernel full of jumps."""
    if name == "made up":
        workloads = made_up()
    else:
        workloads = reduce_steps(real_steps(name, 800), LAYER, 96).workloads
    batches = batches_of_workloads(workloads)
    return workloads, batches, rugged_seconds(batches)


def line_without(left_out: int, values: Floats, seconds: Floats) -> Floats:
    """(num_batches,) the terms' sum, fitted without the sixteenth that `left_out` is in."""
    kept = [other for other in range(len(seconds)) if other % FOLDS != left_out % FOLDS]
    scale = np.maximum(values[kept].max(axis=0), 1.0)
    rows = np.array([values[other] / scale / seconds[other] for other in kept])
    slopes, _ = nnls(rows, np.ones(len(kept)), maxiter=20 * values.shape[1])
    return np.asarray((values / scale) @ slopes)


def values_of_needed_terms(numbers: Floats, seconds: Floats) -> Floats:
    """Of the first groups of terms: as few as are within 5 % and 0.1 points of the best."""
    groups = terms_of(LAYER)
    firsts = [
        [term for group in groups[: last + 1] for term in group] for last in range(len(groups))
    ]
    values = [term_values(terms, numbers) for terms in firsts]
    wrong = []
    for one in values:
        guesses = [line_without(index, one, seconds)[index] for index in range(len(seconds))]
        wrong.append(
            np.mean([abs(guess / s - 1) for guess, s in zip(guesses, seconds, strict=True)])
        )
    fewest = next(i for i, error in enumerate(wrong) if error <= 1.05 * min(wrong) + 1e-3)
    return values[fewest]


def kriged_without(left_out: int, places: Floats, values: Floats, scales: Scales) -> float:
    """What all other places suggest, by the dense formula of Matern's covariance."""

    def covariance(first: Floats, second: Floats) -> Floats:
        distance = np.sqrt(3) * np.linalg.norm(
            (first[:, None] - second[None]) / scales.lengths, axis=2
        )
        return np.asarray((1 + distance) * np.exp(-distance))

    others = np.delete(np.arange(len(places)), left_out)
    known = places[others]
    among = covariance(known, known) + scales.nugget * np.eye(len(others))
    shares = np.linalg.solve(among, covariance(known, places[[left_out]]))[:, 0]
    return float(shares @ values[others])


def slow_errors(model: MeasuredLatency, batches: Batches, seconds: Floats) -> Floats:
    """(num_batches,) by a fit for each; only the scales of distances are the model's."""
    entries = (batches.step_offsets, batches.query_len, batches.context_len)
    numbers = numbers_of_entries(*entries, LayerCosts(LAYER))
    has_prompts = number(numbers, "long_reqs") > 0
    errors = np.full(len(seconds), np.nan)
    for scales, of_kind in zip(model.scales, (~has_prompts, has_prompts), strict=True):
        own, times = np.flatnonzero(of_kind), seconds[of_kind]
        places, values = _places(numbers[own]), values_of_needed_terms(numbers[own], times)
        for index, batch in enumerate(own):
            line = line_without(index, values, times)
            ratio = kriged_without(index, places, np.log(times / line), scales)
            errors[batch] = line[index] * np.exp(ratio) / times[index] - 1
    return errors


def really_left_out(
    workloads: Sequence[Workload], batches: Batches, seconds: Floats, index: int
) -> float:
    """The error of a model that was never given this batch: its own terms, factors and scales."""
    kept = [other for other in range(len(seconds)) if other != index]
    without = MeasuredLatency([workloads[other] for other in kept], seconds[kept], 1)
    entries = slice(int(batches.step_offsets[index]), int(batches.step_offsets[index + 1]))
    guess = without(batches.query_len[entries], batches.context_len[entries])
    return guess / float(seconds[index]) - 1


BATCHES = ["made up", "azure"]


@pytest.mark.parametrize("name", BATCHES)
def test_a_model_is_exact_where_it_was_measured(name: str) -> None:
    workloads, batches, seconds = measured(name)
    model = MeasuredLatency(workloads, seconds, 1)
    again = model.of_entries(batches.step_offsets, batches.query_len, batches.context_len)
    np.testing.assert_allclose(again, seconds, rtol=1e-12)


@pytest.mark.parametrize("name", BATCHES)
def test_left_out_errors_are_those_of_a_fit_for_each(name: str) -> None:
    workloads, batches, seconds = measured(name)
    model = MeasuredLatency(workloads, seconds, 1)
    assert len(model.scales) == 2  # without prompts, and with
    found, wanted = model.left_out_errors(), slow_errors(model, batches, seconds)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-9)
    assert np.abs(wanted).max() > 0.01


def test_left_out_errors_are_as_large_as_really_leaving_out_gives() -> None:
    """Scales are learned from all batches and terms without a sixteenth: it hardly matters."""
    workloads, batches, seconds = measured("azure")
    places = np.arange(0, len(seconds), 4)
    errors = np.abs(MeasuredLatency(workloads, seconds, 1).left_out_errors()[places])
    really = np.abs([really_left_out(workloads, batches, seconds, int(i)) for i in places])
    assert errors.mean() == pytest.approx(really.mean(), rel=0.15)
    assert np.corrcoef(errors, really)[0, 1] > 0.8


@pytest.mark.parametrize("name", BATCHES)
def test_the_time_of_a_batch_left_out_is_not_looked_at(name: str) -> None:
    workloads, _, seconds = measured(name)
    model = MeasuredLatency(workloads, seconds, 1)
    before = model.left_out_errors()
    for index in (0, 5, 40):
        model.seconds = seconds.copy()
        model.seconds[index] *= 3.0
        after = model.left_out_errors()
        assert 3.0 * (1.0 + after[index]) == pytest.approx(1.0 + before[index], rel=1e-9)
