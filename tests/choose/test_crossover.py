"""Where the winner changes, on grids worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest

from attnbench.choose.crossover import Crossover
from tests.choose.fake import FA3, FLASHINFER, TRITON, chosen, ended, timed


def found(times: Mapping[str, tuple[float, float]]) -> list[Crossover]:
    """Of stored batches: (FLASH_ATTN, FLASHINFER) in microseconds."""
    rows = [
        one
        for text, (first, second) in times.items()
        for one in (*timed(FA3, first * 1e-6, text), *timed(FLASHINFER, second * 1e-6, text))
    ]
    advice = chosen(rows, batches=(next(iter(times)),))
    return list(advice.crossovers["full_attention"])


def test_the_place_is_where_the_line_through_both_ratios_is_zero() -> None:
    (one,) = found({"4q1s4k": (100, 110), "8q1s4k": (200, 150)})
    below, above = math.log(100 / 110), math.log(200 / 150)
    expected = 4 * 2 ** (-below / (above - below))
    assert one.at == pytest.approx(expected, rel=1e-3)
    assert (one.axis, one.low, one.high) == ("requests", 4, 8)
    assert "between 4 and 8 requests (about" in one.text
    assert "FLASH_ATTN:FA3 below, FLASHINFER:FA3 above" in one.text


def test_a_tie_between_widens_the_bracket() -> None:
    (one,) = found({"4q1s4k": (100, 150), "8q1s4k": (200, 201), "16q1s4k": (400, 300)})
    assert (one.low, one.high) == (4, 16)
    assert 8 < one.at < 8.2  # the ratio is 0.995 at 8


def test_over_the_context_too_and_never_across_lines() -> None:
    times = {"4q1s1k": (100, 150), "4q1s8k": (400, 300), "8q1s1k": (200, 300)}
    (one,) = found(times)
    assert (one.axis, one.low, one.high) == ("context", 1023, 8191)
    assert dict(one.fixed) == {"requests": 4, "query": 1}


def test_differences_in_the_noise_are_no_crossover() -> None:
    assert found({"4q1s4k": (100, 101), "8q1s4k": (200, 199)}) == []
    assert found({"4q1s4k": (100, 150), "8q1s4k": (200, 199)}) == []


def test_prefills_cross_over_their_length() -> None:
    (one,) = found({"q1k": (100, 150), "q4k": (900, 600)})
    assert (one.axis, one.low, one.high) == ("query", 1024, 4096)


def test_ragged_batches_have_no_place_on_a_grid() -> None:
    assert found({"4q1s4k": (100, 150), "4q1s4k_4q1s1k": (400, 300)}) == []


def test_who_is_excluded_wins_nowhere() -> None:
    rows = timed(FA3, 1e-4, "4q1s4k") + timed(FA3, 2e-4, "8q1s4k")
    rows += timed(TRITON, 2e-4, "4q1s4k") + timed(TRITON, 4e-4, "8q1s4k")
    wrong = ended(FLASHINFER, "INCORRECT", "4q1s4k") + timed(FLASHINFER, 1e-5, "8q1s4k")
    advice = chosen(rows, wrong, batches=("4q1s4k",))
    assert advice.crossovers["full_attention"] == ()


def test_one_backend_alone_wins_nothing() -> None:
    rows = timed(FA3, 1e-4, "4q1s4k") + timed(FLASHINFER, 1e-4, "8q1s4k")
    assert chosen(rows, batches=("4q1s4k",)).crossovers["full_attention"] == ()


def test_a_shared_prefix_is_another_line() -> None:
    assert found({"4q1s4k": (100, 150), "8q1s4k prefix=1k": (400, 300)}) == []
