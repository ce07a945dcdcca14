"""`setup_cache`: the sweep of one suite at one commit."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

import attnbench.measure
from attnbench.asv_bridge.grid import Axes, Grid
from attnbench.asv_bridge.suite_support import readings_file
from attnbench.asv_bridge.sweep import check_installed_commit, plan_axes, read_options, sweep_suite
from attnbench.backends.device import Device
from attnbench.errors import InfrastructureError
from attnbench.measure import MeasureOptions
from attnbench.store import Measurement, ResultsFolder, Run
from tests.asv_bridge.rows import row

TINY = "q1s16 dtype=fp32 head_size=64 heads=2/1"
CPU = Device("cpu")


@pytest.fixture(autouse=True)
def _outside_asv(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ASV_COMMIT", "ASV_ENV_TYPE"):
        monkeypatch.delenv(name, raising=False)


def _grid(tmp_path: Path, axes: Axes) -> Grid:
    return Grid("smoke", "cpu", str(tmp_path / "store"), {"timer": "fake"}, {"decode": axes})


def test_a_real_sweep_is_stored_and_read(tmp_path: Path) -> None:
    axes = Axes((TINY,), ("TORCH_SDPA",))
    assert sweep_suite("decode", _grid(tmp_path, axes), tmp_path) == tmp_path
    rows = ResultsFolder(tmp_path / "store").table().to_pylist()
    assert {r["suite"] for r in rows} == {"decode"}
    for metric in ("attention", "metadata_build", "kv_cache_write"):
        (stored,) = (r for r in rows if r["metric"] == metric)
        readings = json.loads(readings_file(tmp_path, metric).read_text())
        assert readings == {TINY: {"TORCH_SDPA": stored["samples"]}}
        assert len(stored["samples"]) == 5


def test_what_the_commit_does_not_know_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    axes = Axes((TINY, "q1s16 hyperdrive=1"), ("TORCH_SDPA", "WARP_ATTN", "TORCH_SDPA:mach9"))
    plan = plan_axes("decode", axes, CPU)
    assert [(p.workload.text, p.backend, p.suite) for p in plan] == [(TINY, "TORCH_SDPA", "decode")]
    said = capsys.readouterr().err
    assert all(word in said for word in ("hyperdrive", "WARP_ATTN", "mach9"))


def test_nothing_known_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(InfrastructureError, match="knows none of the grid"):
        sweep_suite("decode", _grid(tmp_path, Axes((TINY,), ("WARP_ATTN",))), tmp_path)


def test_options_of_a_newer_grid_are_ignored() -> None:
    grid = Grid("smoke", "cpu", "", {"timer": "fake", "replicates": 2, "clairvoyance": 1}, {})
    assert read_options(grid) == MeasureOptions(timer="fake", replicates=2)


def _measure(monkeypatch: pytest.MonkeyPatch, rows: Sequence[Measurement]) -> None:
    """Let the sweep end as `rows`, under its own run id."""
    from collections import Counter

    def run_sweep(plan: object, run: Run, *_: object) -> attnbench.measure.SweepOutcome:
        for one in rows:
            run.append(replace(one, run_id=run.run_id))
        return attnbench.measure.SweepOutcome(run.run_id, Counter(), 0.0, 0)

    monkeypatch.setattr(attnbench.measure, "run_sweep", run_sweep)


def test_replicates_are_joined_and_refusals_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons = ("no dtype", "no head_size")
    refused = row(1, TINY, "TORCH_SDPA", samples=(), status="UNSUPPORTED", reasons=reasons)
    rows = [
        row(1, TINY, "CPU_ATTN", samples=(1.0, 2.0)),
        row(1, TINY, "CPU_ATTN", samples=(3.0,), replicate=1, status="NOISY"),
        refused,
        row(1, TINY, "FLEX_ATTENTION", samples=(), status="ERROR", reasons=("boom",)),
        row(1, TINY, "FLEX_ATTENTION", samples=(5.0,), replicate=1),
        row(1, TINY, "CPU_ATTN", samples=(9.0,), metric="page_gather"),
    ]
    _measure(monkeypatch, rows)
    sweep_suite("decode", _grid(tmp_path, Axes((TINY,), ("TORCH_SDPA",))), tmp_path)
    assert json.loads(readings_file(tmp_path, "attention").read_text()) == {
        TINY: {
            "CPU_ATTN": [1.0, 2.0, 3.0],
            "TORCH_SDPA": "UNSUPPORTED: no dtype; no head_size",
            "FLEX_ATTENTION": [5.0],
        }
    }
    assert json.loads(readings_file(tmp_path, "metadata_build").read_text()) == {}


def test_a_suite_whose_every_point_failed_is_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons = ("max error 0.3",)
    broken = row(1, TINY, "CPU_ATTN", samples=(), status="INCORRECT", reasons=reasons)
    _measure(monkeypatch, [broken])
    with pytest.raises(InfrastructureError, match=r"every point failed.*INCORRECT: max error 0.3"):
        sweep_suite("decode", _grid(tmp_path, Axes((TINY,), ("TORCH_SDPA",))), tmp_path)


def test_only_the_installed_commit_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_installed_commit()
    monkeypatch.setenv("ASV_ENV_TYPE", "existing")
    check_installed_commit()
    monkeypatch.setenv("ASV_ENV_TYPE", "virtualenv")
    monkeypatch.setenv("ASV_COMMIT", "f" * 40)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(InfrastructureError, match=f"asv measures commit {'f' * 40}, but"):
        check_installed_commit()
    monkeypatch.setattr(sys, "prefix", str(Path(attnbench.__file__).parents[1]))
    check_installed_commit()
