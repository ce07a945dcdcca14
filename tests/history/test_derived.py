"""Derived numbers by hand."""

from __future__ import annotations

import pytest

from attnbench.history.derived import QUANTITIES, Quantity, derive, itl_s

DECODE = {"phase": "decode", "num_layers": 32, "flops": 5e9, "bytes_moved": 2e6, "num_tokens": 16}


def test_itl_is_one_step_times_the_layers_and_only_of_decode() -> None:
    assert itl_s(2e-3, DECODE) == pytest.approx(64e-3)
    assert itl_s(2e-3, {**DECODE, "phase": "prefill"}) is None
    assert itl_s(2e-3, {**DECODE, "phase": "mixed"}) is None


@pytest.mark.parametrize(
    ("quantity", "shown"),
    [("latency", 2000.0), ("tflop_s", 2.5), ("gb_s", 1.0), ("tokens_s", 8000.0), ("itl", 64.0)],
)
def test_quantities_in_their_units(quantity: str, shown: float) -> None:
    value = derive(Quantity(quantity), 2e-3, DECODE)
    assert value is not None
    assert value * QUANTITIES[Quantity(quantity)].scale == pytest.approx(shown)


def test_roofline_where_the_runs_ceilings_are_known() -> None:
    value = derive(Quantity.ROOFLINE, 2e-3, DECODE | {"attainable_s": 5e-4})
    assert value is not None
    assert value * QUANTITIES[Quantity.ROOFLINE].scale == pytest.approx(25.0)
    assert derive(Quantity.ROOFLINE, 2e-3, DECODE | {"attainable_s": None}) is None
    assert derive(Quantity.ROOFLINE, 2e-3, DECODE) is None


def test_what_is_unknown_is_none() -> None:
    assert derive(Quantity.TFLOP_S, 1e-3, {**DECODE, "flops": 0}) is None
    assert derive(Quantity.LATENCY, 0.0, DECODE) is None
