"""What drives the scheduler's clock."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from attnbench.errors import UsageError
from attnbench.traffic.step_clock import LinearStepSeconds, StepTable
from attnbench.traffic.types import Floats, Ints


def lens(*numbers: int) -> Ints:
    return np.array(numbers, dtype=np.int64)


def axis(*numbers: float) -> Floats:
    return np.array(numbers, dtype=np.float64)


@given(
    st.lists(st.integers(0, 100_000), min_size=1, max_size=50),
    st.integers(1, 60),
    st.tuples(*(st.floats(1e-9, 1.0),) * 3),
)
@hypothesis_settings(max_examples=100, deadline=None)
def test_a_run_of_decodes_has_the_very_times_of_its_steps(
    contexts: list[int], num_steps: int, numbers: tuple[float, float, float]
) -> None:
    model = LinearStepSeconds(*numbers)
    context_lens = lens(*contexts)
    ones = np.ones(len(contexts), dtype=np.int64)
    singly = [model(ones, context_lens + step) for step in range(num_steps)]
    assert model.decode_run(context_lens, num_steps).tolist() == singly


def test_a_linear_step_counts_what_it_computes_and_reads() -> None:
    model = LinearStepSeconds(1.0, 0.5, 0.25)
    assert model(lens(2, 3), lens(10, 0)) == 1.0 + 0.5 * 5 + 0.25 * 15


def test_a_table_is_exact_on_its_grid_and_bilinear_between() -> None:
    # a + b q + c k + d q k is what bilinear interpolation reproduces, beyond the grid as well.
    def truth(query: float, context: float) -> float:
        return 1.0 + 0.5 * query + 0.25 * context + 0.125 * query * context

    queries, contexts = axis(1, 4, 16), axis(0, 100, 1000)
    seconds = np.array([[truth(q, k) for k in contexts] for q in queries])
    table = StepTable(queries, contexts, seconds)
    for query, context in ((1, 0), (16, 1000), (4, 100), (2, 55), (9, 500), (40, 3000)):
        got = table(lens(query - 1, 1), lens(context, 0))
        assert got == pytest.approx(truth(query, context))


def test_a_table_continued_downwards_still_takes_time() -> None:
    table = StepTable(axis(1, 2), axis(0, 100), np.array([[2.0, 1.0], [2.0, 1.0]]))
    assert table(lens(1), lens(10_000)) == 1.0


@pytest.mark.parametrize(
    ("queries", "contexts", "seconds", "message"),
    [
        (axis(1), axis(0, 1), np.ones((1, 2)), "two or more"),
        (axis(2, 1), axis(0, 1), np.ones((2, 2)), "increasing"),
        (axis(1, 2), axis(0, 1), np.ones((2, 3)), "shape"),
        (axis(1, 2), axis(0, 1), np.array([[1.0, 1.0], [np.nan, 1.0]]), "not above zero"),
        (axis(1, 2), axis(0, 1), np.zeros((2, 2)), "not above zero"),
    ],
)
def test_a_table_that_is_none_is_refused(
    queries: Floats, contexts: Floats, seconds: Floats, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        StepTable(queries, contexts, seconds)
