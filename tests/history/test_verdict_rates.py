"""docs/verdict.md says what the scripts print, and the rules keep their bounds."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "benchmarks" / "verdict_rates.py"))


def test_the_documented_table_is_the_one_the_script_prints(script: dict[str, Any]) -> None:
    table = "\n".join(script["lines"](trials=300, seed=20261121))
    documented = (ROOT / "docs" / "verdict.md").read_text(encoding="utf-8")
    assert table in documented, "run python benchmarks/verdict_rates.py and paste what it prints"


@pytest.mark.parametrize(
    ("timer", "baseline_runs", "run_spread"),
    [
        ("wall", 1, 0.03),
        ("wall", 1, 0.08),
        ("wall", 2, 0.08),
        ("wall", 3, 0.08),
        ("wall", 10, 0.08),
        ("event", 1, 0.01),
        ("event", 3, 0.01),
        ("event", 10, 0.01),
        ("event", 10, 0.003),
        ("event", 40, 0.01),
    ],
)
def test_false_alarms_stay_below_one_percent(
    script: dict[str, Any], timer: str, baseline_runs: int, run_spread: float
) -> None:
    """A/A: nothing changed. docs/verdict.md states this bound."""
    rng = np.random.default_rng(20261121)
    found = script["rates"](timer, baseline_runs, run_spread, 0.0, 1500, rng)
    assert found.flagged <= 0.02
    assert found.confirmed <= 0.01


@pytest.mark.parametrize(
    ("timer", "baseline_runs", "run_spread", "power"),
    [("wall", 10, 0.03, 0.8), ("event", 3, 0.01, 0.99), ("event", 10, 0.003, 0.99)],
)
def test_power_at_a_step_of_thirty_percent(
    script: dict[str, Any], timer: str, baseline_runs: int, run_spread: float, power: float
) -> None:
    rng = np.random.default_rng(20261121)
    assert script["rates"](timer, baseline_runs, run_spread, 0.3, 400, rng).confirmed >= power
