"""`roofline_pct` of `attnbench run`: exact under the fake timer, from ceilings the run stored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from attnbench.store import ResultsFolder
from attnbench.workload import Workload
from attnbench.workload.cost import attention_bytes, attention_flops
from tests.cli.conftest import Attnbench

SPEC = ("{3q1s40,q16}", "heads=4/2", "head_size=32", "dtype=fp32")


def test_the_column_is_derived_from_the_stored_ceilings(
    attnbench: Attnbench, project: Path
) -> None:
    done = attnbench(
        "run", *SPEC, "--backend", "CPU_ATTN", "--timer", "fake", "--format", "json"
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {row["roofline_pct"] for row in rows if row["metric"] != "attention"} == {None}
    main = [row for row in rows if row["metric"] == "attention"]
    assert len(main) == 2
    for row in main:
        workload = Workload.parse(row["workload"])
        needed = max(attention_bytes(workload) / 100e9, attention_flops(workload) / 1e12)
        expected = 100 * needed / (row["median_us"] * 1e-6)
        assert row["roofline_pct"] == pytest.approx(expected, abs=0.2)

    folder = ResultsFolder(project / "results")
    (stored,) = folder.ceilings().values()
    assert stored.memory_bytes_per_s == 100e9
    assert stored.matmul_flops_per_s == {"fp32": 1e12}

    again = attnbench("run", "--resume", "last", "--format", "json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout) == rows
