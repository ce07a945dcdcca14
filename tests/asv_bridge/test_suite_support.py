"""Suites as asv benchmarks."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from attnbench.asv_bridge.grid import GRID_VARIABLE, Axes, Grid, grid_id
from attnbench.asv_bridge.suite_support import SweepBenchmark, measure_once, readings_file
from attnbench.workload import Suite, load_suites

ROOT = Path(__file__).resolve().parents[2]
SUITE = Suite("decode", "For tests.", smoke=["8q1s4k"])


def _grid(path: Path, suites: tuple[str, ...] = ("decode",)) -> Path:
    axes = Axes(("8q1s4k", "1q1s1k"), ("CPU_ATTN", "TORCH_SDPA"))
    Grid("smoke", "cpu", "unused", {}, dict.fromkeys(suites, axes)).save(path)
    return path


def test_parameters_come_from_the_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GRID_VARIABLE, str(_grid(tmp_path / "grid.json")))

    class Decode(SweepBenchmark, suite=SUITE):
        pass

    assert Decode.params == [["8q1s4k", "1q1s1k"], ["CPU_ATTN", "TORCH_SDPA"]]
    assert Decode.param_names == ["workload", "backend"]
    assert Decode.version == grid_id("decode")
    assert Decode.unit == "seconds"


def test_readings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Decode(SweepBenchmark, suite=SUITE):
        pass

    stored = {"8q1s4k": {"CPU_ATTN": [1.0, 2.0, 3.0], "TORCH_SDPA": "UNSUPPORTED: dtype"}}
    for metric in ("attention", "metadata_build", "kv_cache_write"):
        readings_file(tmp_path, metric).write_text(json.dumps(stored))
    bench = Decode()
    assert bench.track_attention(str(tmp_path), "8q1s4k", "CPU_ATTN") == {
        "samples": [1.0, 2.0, 3.0],
        "number": 1,
    }
    refused = bench.track_metadata_build(str(tmp_path), "8q1s4k", "TORCH_SDPA")
    assert isinstance(refused, float)
    assert math.isnan(refused)
    assert "UNSUPPORTED: dtype" in capsys.readouterr().out
    absent = bench.track_kv_cache_write(str(tmp_path), "1q1s1k", "CPU_ATTN")
    assert isinstance(absent, float)
    assert math.isnan(absent)
    assert "not measured" in capsys.readouterr().out


def test_setup_cache_is_for_asv_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(GRID_VARIABLE, raising=False)
    monkeypatch.delenv("ASV", raising=False)
    with pytest.raises(RuntimeError, match="attnbench asv run"):
        measure_once(SUITE)


def test_neither_discovery_nor_children_load_anything_heavy(tmp_path: Path) -> None:
    """What makes asv's forkserver safe, and 5 ms a combination instead of seconds."""
    folder = tmp_path / "sweep"
    folder.mkdir()
    readings_file(folder, "attention").write_text(json.dumps({"8q1s4k": {"CPU_ATTN": [1.0]}}))
    code = (
        "import sys; import suites.decode as d;"
        f"print(d.Decode().track_attention({str(folder)!r}, '8q1s4k', 'CPU_ATTN'));"
        "heavy = {'torch', 'numpy', 'pyarrow', 'pandas', 'triton', 'asv'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    environment = os.environ | {GRID_VARIABLE: str(_grid(tmp_path / "grid.json"))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "'samples': [1.0]" in done.stdout


def test_asv_discovers_every_suite(tmp_path: Path) -> None:
    """By asv's own runner: one setup_cache per file, three metrics, nothing else collected."""
    suites = load_suites(ROOT / "suites")
    out = tmp_path / "found.json"
    import asv.runner

    grid = _grid(tmp_path / "grid.json", tuple(suites))
    subprocess.run(
        [sys.executable, asv.runner.BENCHMARK_RUN_SCRIPT, "discover", str(ROOT / "suites"), out],
        check=True,
        cwd=tmp_path,
        env=os.environ | {GRID_VARIABLE: str(grid), "ASV": "true"},
    )
    found = {b["name"]: b for b in json.loads(out.read_text())}
    metrics = ("attention", "kv_cache_write", "metadata_build")
    assert len(found) == len(suites) * len(metrics)
    keys = {}
    for benchmark in found.values():
        suite = benchmark["name"].split(".")[0]
        assert benchmark["type"] == "track"
        assert benchmark["unit"] == "seconds"
        assert benchmark["version"] == grid_id(suite)
        assert benchmark["param_names"] == ["workload", "backend"]
        assert benchmark["params"] == [["'8q1s4k'", "'1q1s1k'"], ["'CPU_ATTN'", "'TORCH_SDPA'"]]
        keys[suite] = benchmark["setup_cache_key"]
    assert set(keys) == set(suites)
    assert len(set(keys.values())) == len(suites), f"suites share a setup_cache: {keys}"
