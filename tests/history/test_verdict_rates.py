"""docs/verdict.md says what the script prints."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_documented_table_is_the_one_the_script_prints() -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "verdict_rates.py"))
    table = "\n".join(script["lines"](trials=1000, seed=20261121))
    documented = (ROOT / "docs" / "verdict.md").read_text(encoding="utf-8")
    assert table in documented, "run python benchmarks/verdict_rates.py and paste what it prints"
