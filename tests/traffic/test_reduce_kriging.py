"""Kriging against dense formulas, and terms by hand."""

from __future__ import annotations

import numpy as np
import pytest

from attnbench.traffic.latency_costs import LayerCosts
from attnbench.traffic.latency_kriging import NEIGHBOURS, Kriging, Scales, fitted_scales
from attnbench.traffic.latency_measured import MeasuredLatency
from attnbench.traffic.latency_terms import (
    NUMBERS,
    numbers_of_entries,
    term_values,
    terms_of,
)
from attnbench.traffic.types import Floats
from attnbench.workload import Workload

LAYER = Workload.parse("q1 shape=llama-3-8b")


def matern(first: Floats, second: Floats, scales: Scales) -> Floats:
    distance = np.linalg.norm((first[:, None] - second[None]) / scales.lengths, axis=2)
    return np.asarray((1 + np.sqrt(3) * distance) * np.exp(-np.sqrt(3) * distance))


def test_shares_are_those_of_the_dense_formula() -> None:
    rng = np.random.default_rng(1)
    known, asked = rng.normal(size=(NEIGHBOURS, 3)), rng.normal(size=(7, 3))
    scales = Scales(np.array([0.5, 2.0, 1.0]), 0.1)
    near, shares = Kriging(known, scales).shares(asked)
    among = matern(known, known, scales) + 0.1 * np.eye(len(known))
    wanted = np.linalg.solve(among, matern(known, asked, scales)).T
    np.testing.assert_allclose(np.take_along_axis(wanted, near, axis=1), shares, atol=1e-9)


def test_a_known_place_has_its_own_value_and_a_far_one_has_none() -> None:
    rng = np.random.default_rng(2)
    known, values = rng.normal(size=(60, 2)), rng.normal(size=60)
    known[59] = known[0]
    kriging = Kriging(known, Scales(np.ones(2), 0.5))
    near, shares = kriging.shares(np.concatenate((known, [[99.0, 99.0]])))
    found = (shares * values[near]).sum(axis=1)
    np.testing.assert_allclose(found[1:59], values[1:59], atol=1e-9)
    assert found[0] == pytest.approx((values[0] + values[59]) / 2)
    assert found[59] == pytest.approx(found[0])
    assert found[60] == pytest.approx(0.0, abs=1e-9)


def test_shares_of_others_are_those_of_leaving_each_out() -> None:
    rng = np.random.default_rng(3)
    known, scales = rng.normal(size=(20, 2)), Scales(np.array([1.0, 0.7]), 0.2)
    found = Kriging(known, scales).from_others()
    for index in range(20):
        kept = np.delete(np.arange(20), index)
        among = matern(known[kept], known[kept], scales) + 0.2 * np.eye(19)
        wanted = np.linalg.solve(among, matern(known[kept], known[[index]], scales))[:, 0]
        np.testing.assert_allclose(found[index, kept], wanted, atol=1e-9)
        assert found[index, index] == 0.0


def test_scales_tell_what_matters_from_what_does_not() -> None:
    rng = np.random.default_rng(4)
    places = rng.uniform(0, 4, (120, 3))
    places[:, 2] = 5.0
    scales = fitted_scales(places, np.sin(2 * places[:, 0]))
    assert scales.lengths[0] < 3 < 5 * scales.lengths[0] < scales.lengths[1]
    assert scales.nugget < 0.01
    noise = fitted_scales(places, rng.normal(size=120) * 0.1)
    assert noise.nugget > 1.0


def test_numbers_and_terms_by_hand() -> None:
    # Two decodes of 100 and 300 tokens; a chunk of 40 new tokens after 60.
    query, context = np.array([1, 1, 40]), np.array([99, 299, 60])
    numbers = numbers_of_entries(np.array([0, 3]), query, context, LayerCosts(LAYER))
    row = dict(zip(NUMBERS, numbers[0].tolist(), strict=True))
    pairs = 40 * 60 + 40 * 41 // 2
    wanted = [1, 2, 2, 400, 300, 400, 1, 40, 100, 100, pairs, pairs, 40]
    wanted += [3, 2, 1, 1, 240, 160, 80, 80]
    assert row == dict(zip(NUMBERS, wanted, strict=True))
    values = term_values([term for group in terms_of(LAYER) for term in group], numbers)[0]
    assert (values >= 0).all()
    # The longest on four units; padded; all work on one unit; whole waves.
    for value in (1200.0, 8.0, 64.0, 480.0, 80 * 132 / 8):
        assert np.isclose(values, value).any(), value


def test_few_prompts_share_a_model_with_decodes() -> None:
    """Twenty decodes and three prompts: too few for scales of their own, and still followed."""
    decodes = [Workload.parse(f"{n}q1s{s}k") for n in (1, 2, 4, 8) for s in (1, 2, 4, 8, 16)]
    prompts = [Workload.parse(f"q{length}") for length in ("1k", "2k", "4k")]
    seconds = np.array(
        [
            2e-6 + 1e-9 * sum(r.seq_len for r in w.requests if r.query_len == 1)
            + 1e-12 * sum(r.query_len**2 for r in w.requests if r.query_len > 1)
            for w in (*decodes, *prompts)
        ]
    )  # fmt: skip
    model = MeasuredLatency([*decodes, *prompts], seconds, 1)
    assert len(model.scales) == 1
    decode = model(np.ones(3, dtype=np.int64), np.full(3, 5999))
    assert decode == pytest.approx(2e-6 + 1e-9 * 18000, rel=0.05)
    prompt = model(np.array([3000]), np.array([0]))
    assert prompt == pytest.approx(2e-6 + 9e-6, rel=0.1)
