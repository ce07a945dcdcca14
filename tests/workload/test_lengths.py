"""Drawn lengths: literal values (they may never change), means and bounds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnbench.errors import WorkloadError
from attnbench.workload import Request, Workload
from attnbench.workload.lengths import draw_lengths, normalise_lengths
from tests.workload.strategies import workloads

# Stored results depend on these: a change of any number here breaks the meaning of old rows.
GOLDEN = [
    (
        "8q1s1025 lengths=geometric",
        [(1, 219), (1, 34), (1, 1519), (1, 1499), (1, 478), (1, 93), (1, 209), (1, 257)],
    ),
    (
        "8q1s1025 lengths=uniform:0.5",
        [(1, 1340), (1, 1505), (1, 745), (1, 750), (1, 1156), (1, 1449), (1, 1349), (1, 1310)],
    ),
    ("4q1s1025 lengths=geometric seed=7", [(1, 87), (1, 12), (1, 1076), (1, 1445)]),
    ("4q256 lengths=geometric", [(55, 55), (9, 9), (379, 379), (374, 374)]),
    ("4q256 lengths=uniform:0.25 seed=1", [(311, 311), (262, 262), (312, 312), (254, 254)]),
    ("4q16s528 lengths=geometric prefix=256", [(16, 326), (16, 280), (16, 652), (16, 647)]),
]


@pytest.mark.parametrize(("text", "expected"), GOLDEN)
def test_golden_draws(text: str, expected: list[tuple[int, int]]) -> None:
    assert [(r.query_len, r.seq_len) for r in Workload.parse(text).requests] == expected


def test_draws_are_those_of_the_inverse_distribution() -> None:
    """The quantile of the docstring through floating-point formulas of textbooks."""
    import hashlib

    for index, request in enumerate(Workload.parse("64q1s513 lengths=geometric seed=5").requests):
        digest = hashlib.sha256(f"attnbench lengths 5 {index}".encode()).digest()
        quantile = (int.from_bytes(digest[:8], "big") + 0.5) / 2**64
        p = 1 / 513
        assert request.seq_len - 1 == min(int(math.log(quantile) / math.log(1 - p)), 8 * 512)
    for index, request in enumerate(Workload.parse("64q1s513 lengths=uniform:.5").requests):
        digest = hashlib.sha256(f"attnbench lengths 0 {index}".encode()).digest()
        quantile = (int.from_bytes(digest[:8], "big") + 0.5) / 2**64
        assert request.seq_len - 1 == 256 + int(quantile * 513)


def _contexts(drawn: tuple[Request, ...]) -> list[int]:
    return [r.seq_len - r.query_len for r in drawn]


def _queries(drawn: tuple[Request, ...]) -> list[int]:
    return [r.query_len for r in drawn]


@pytest.mark.parametrize(
    ("request_", "prefix", "lengths", "of", "mean", "deviation"),
    [
        # deviation: of one draw; geometric on 0, 1, ...: sqrt(m (m + 1)); uniform: spread / sqrt(3)
        (Request(1, 1001), 0, "geometric", _contexts, 1000, 1000.5),
        (Request(4, 504), 100, "geometric", _contexts, 500, 400.5),
        (Request(300, 300), 0, "geometric", _queries, 300, 299.5),
        (Request(1, 1001), 0, "uniform:0.5", _contexts, 1000, 500 / math.sqrt(3)),
        (Request(1, 1001), 800, "uniform:0.5", _contexts, 1000, 200 / math.sqrt(3)),
        (Request(300, 300), 0, "uniform:1", _queries, 300, 299 / math.sqrt(3)),
    ],
)
def test_means_are_those_of_the_batch_spec(
    request_: Request,
    prefix: int,
    lengths: str,
    of: Callable[[tuple[Request, ...]], list[int]],
    mean: int,
    deviation: float,
) -> None:
    draws = 4000
    values = of(draw_lengths([request_] * draws, lengths, seed=3, common_prefix_len=prefix))
    # Four standard errors; the seed is fixed, so this either always passes or never does.
    assert abs(statistics.fmean(values) - mean) < 4 * deviation / math.sqrt(draws)
    assert statistics.pstdev(values) == pytest.approx(deviation, rel=0.06)


@given(workloads())
@settings(deadline=None)
def test_drawn_requests_are_valid(workload: Workload) -> None:
    prefix = workload.common_prefix_len
    assert len(workload.requests) == len(workload.batch_spec.requests)
    for drawn, written in zip(workload.requests, workload.batch_spec.requests, strict=True):
        assert 1 <= drawn.query_len <= drawn.seq_len
        if written.seq_len > written.query_len:  # the context varies, the query does not
            assert drawn.query_len == written.query_len
            context, mean = drawn.seq_len - drawn.query_len, written.seq_len - written.query_len
            assert prefix <= context <= 9 * mean
        else:  # a pure prefill stays one
            assert drawn.query_len == drawn.seq_len
            context, mean = drawn.seq_len, written.seq_len
        if workload.lengths.startswith("uniform:"):
            jitter = float(workload.lengths.removeprefix("uniform:"))
            assert abs(context - mean) <= jitter * mean
        elif not workload.lengths:
            assert drawn == written


@given(st.integers(0, 2**40), st.integers(1, 5000), st.sampled_from(["geometric", "uniform:0.3"]))
@settings(deadline=None)
def test_a_request_is_drawn_alike_in_every_batch(seed: int, tokens: int, lengths: str) -> None:
    request = Request(1, tokens + 1)
    one = draw_lengths([request], lengths, seed)
    many = draw_lengths([request] * 5, lengths, seed)
    assert many[0] == one[0]
    assert many == draw_lengths([request] * 5, lengths, seed)


def test_geometric_is_cut_at_eight_means() -> None:
    # One in 512 draws with mean 1 is above 8.
    drawn = draw_lengths([Request(1, 2)] * 8192, "geometric", seed=0)
    assert max(_contexts(drawn)) == 8
    prompts = draw_lengths([Request(2, 2)] * 8192, "geometric", seed=0)
    assert max(_queries(prompts)) == 9  # at least 1, plus at most 8 times the rest of the mean


def test_seeds_differ() -> None:
    drawn = {Workload.parse(f"8q1s4k lengths=geometric seed={s}").requests for s in range(50)}
    assert len(drawn) == 50


@pytest.mark.parametrize(
    ("text", "expected"),
    [("uniform:.50", "uniform:0.5"), ("uniform:1.0", "uniform:1"), ("uniform:5e-1", "uniform:0.5")],
)
def test_one_spelling(text: str, expected: str) -> None:
    assert normalise_lengths(text) == expected


@pytest.mark.parametrize("text", ["uniform", "uniform:0", "uniform:1.5", "uniform:nan", "poisson"])
def test_error_messages(text: str) -> None:
    with pytest.raises(WorkloadError) as caught:
        normalise_lengths(text)
    for part in (f"lengths={text}", "geometric or uniform:J", "e.g. lengths=uniform:0.5"):
        assert part in str(caught.value)
