"""Rooflines by hand."""

from __future__ import annotations

import pytest

from attnbench.history.roofline import roofline
from attnbench.store.ceilings import Ceilings

CEILINGS = Ceilings(
    copy_bytes_per_s=1e9, read_bytes_per_s=2e9, matmul_flops_per_s={"bf16": 1e12, "fp32": 1e11}
)


def _row(bytes_moved: int, flops: int, dtype: str = "bf16") -> dict[str, object]:
    return {"bytes_moved": bytes_moved, "flops": flops, "dtype": dtype}


def test_what_moves_much_is_bound_by_the_better_memory_rate() -> None:
    found = roofline(_row(4_000_000, 8_000_000), CEILINGS)
    assert found is not None
    assert found.intensity == 2.0
    assert found.memory_s == pytest.approx(2e-3)
    assert found.compute_s == pytest.approx(8e-6)
    assert found.attainable_s == pytest.approx(2e-3)
    assert found.bound == "memory"
    assert found.percent(2e-3) == pytest.approx(100)
    assert found.percent(8e-3) == pytest.approx(25)


def test_what_multiplies_much_is_bound_by_the_rate_of_its_dtype() -> None:
    row = _row(1000, 10**9)
    found = roofline(row, CEILINGS)
    slower = roofline(row | {"dtype": "fp32"}, CEILINGS)
    assert found is not None
    assert slower is not None
    assert found.bound == "compute"
    assert found.attainable_s == pytest.approx(1e-3)
    assert slower.attainable_s == pytest.approx(1e-2)


def test_the_ridge_is_where_both_take_as_long() -> None:
    intensity = 1e12 / 2e9
    found = roofline(_row(1000, int(1000 * intensity)), CEILINGS)
    assert found is not None
    assert found.memory_s == pytest.approx(found.compute_s)


@pytest.mark.parametrize(
    ("row", "ceilings"),
    [
        (_row(1000, 1000), None),
        (_row(0, 0), CEILINGS),  # another metric than attention
        (_row(1000, 1000, "fp16"), CEILINGS),  # no rate of this dtype was measured
        (_row(1000, 1000), Ceilings(matmul_flops_per_s={"bf16": 1e12})),
        (_row(1000, 1000), Ceilings(copy_bytes_per_s=1e9)),
    ],
)
def test_nothing_is_said_of_what_is_not_known(
    row: dict[str, object], ceilings: Ceilings | None
) -> None:
    assert roofline(row, ceilings) is None
