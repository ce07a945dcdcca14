"""The nightly path: our history as asv results."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from statistics import median

import pytest

from attnbench.asv_bridge.exporter import export_to_asv
from attnbench.store.record import stack_id
from tests.asv_bridge.rows import LARGE, SHA, SMALL, START, history, row, table_of


def read(folder: Path, commit: str, machine: str = "cpu-xeon-2c") -> dict[str, dict[str, object]]:
    """asv's file of one commit: benchmark -> column -> value."""
    (path,) = (folder / machine).glob(f"{commit[:8]}-*.json")
    data = json.loads(path.read_text())
    assert data["commit_hash"] == commit
    return {
        name: dict(zip(data["result_columns"], values, strict=False))
        for name, values in data["results"].items()
    }


POINTS = "nightly.decode.attention.fake_hot_eager.points"
ROLLUP = "nightly.decode.attention.fake_hot_eager.rollup"


def test_points_and_rollup_of_one_commit(tmp_path: Path) -> None:
    outcome = export_to_asv(table_of(history([1, 2])), None, tmp_path)
    assert (outcome.series, outcome.commits, dict(outcome.left_out)) == (2, 2, {})
    found = read(tmp_path, SHA[1])
    # The sentinel is the workload that moves most bytes.
    assert found[POINTS]["params"] == [[repr(LARGE)], ["'CPU_ATTN'", "'TORCH_SDPA'"]]
    assert found[POINTS]["result"] == pytest.approx([4e-3, 9e-3])
    assert found[POINTS]["stats_repeat"] == [3, 3]
    assert found[ROLLUP]["params"] == [["'decode'"], ["'CPU_ATTN'", "'TORCH_SDPA'"], ["'bf16'"]]
    assert found[ROLLUP]["result"] == pytest.approx([math.sqrt(1e-3 * 4e-3), 9e-3])


def test_writing_again_changes_no_byte(tmp_path: Path) -> None:
    table = table_of(history([1, 2, 3]))
    first = export_to_asv(table, None, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    assert set(first.files) == set(before)
    backwards = table.take(list(range(table.num_rows - 1, -1, -1)))
    assert export_to_asv(backwards, None, tmp_path) == first
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.json")} == before


def test_replicates_are_one_sample(tmp_path: Path) -> None:
    rows = [row(1, seconds=s, replicate=i) for i, s in enumerate((1.0, 2.0, 4.0))]
    export_to_asv(table_of(rows), None, tmp_path)
    found = read(tmp_path, SHA[1])[POINTS]
    assert found["stats_repeat"] == [9]
    assert found["result"] == [pytest.approx(median(s for r in rows for s in r.samples))]


def test_the_newest_run_of_a_commit_counts_point_by_point(tmp_path: Path) -> None:
    old = [row(1, SMALL, seconds=1.0), row(1, LARGE, seconds=1.0)]
    new = row(2, LARGE, seconds=2.0, commit=SHA[1], commit_time=old[0].commit_time)
    export_to_asv(table_of([new, *old]), None, tmp_path)
    found = read(tmp_path, SHA[1])
    assert found[POINTS]["result"] == [pytest.approx(2.0)]
    assert found[ROLLUP]["result"] == [pytest.approx(math.sqrt(2.0))]


def test_points_without_samples_are_not_applicable(tmp_path: Path) -> None:
    refused = row(2, LARGE, "TORCH_SDPA", samples=(), status="UNSUPPORTED", reasons=("why",))
    export_to_asv(table_of([*history([1]), row(2, LARGE), refused]), None, tmp_path)
    results = read(tmp_path, SHA[2])[POINTS]["result"]
    assert isinstance(results, list)
    assert results[0] == pytest.approx(1e-3)
    assert math.isnan(results[1])  # None would be asv's "failed"


def test_what_has_no_place_on_a_commit_axis_is_named(tmp_path: Path) -> None:
    rows = [
        *history([1]),
        row(2, commit="", commit_time=None),
        row(3, commit=SHA[3] + "+dirty"),
        row(4, suite=""),
        row(5, protocol_version=0),
    ]
    outcome = export_to_asv(table_of(rows), None, tmp_path)
    assert outcome.commits == 1
    assert {run_id[:8]: why for run_id, why in outcome.left_out.items()} == {
        "20261102": "no commit is known",
        "20261103": "its files differed from the commit",
        "20261105": "protocol 0, newer is 1",
    }
    assert len(list((tmp_path / "cpu-xeon-2c").glob("*-stack-*.json"))) == 1


def test_only_the_runs_asked_for(tmp_path: Path) -> None:
    rows = history([1, 2, 3])
    outcome = export_to_asv(table_of(rows), {rows[0].run_id, rows[-1].run_id}, tmp_path)
    assert outcome.commits == 2
    assert not list((tmp_path / "cpu-xeon-2c").glob(f"{SHA[2][:8]}*"))


def test_methods_devices_and_stacks_are_kept_apart(tmp_path: Path) -> None:
    other = ("python==3.11.7", "torch==2.14.0")
    rows = [
        row(1, seconds=1.0),
        row(1, seconds=2.0, timer="wall"),
        row(1, seconds=3.0, device_class="h200", compute_capability="9.0"),
        row(2, seconds=4.0, stack=other, stack_id=stack_id(other), commit=SHA[1]),
    ]
    outcome = export_to_asv(table_of(rows), None, tmp_path)
    assert outcome.series == 4
    assert read(tmp_path, SHA[1], "h200")[POINTS]["result"] == [pytest.approx(3.0)]
    stacks = {}
    for path in (tmp_path / "cpu-xeon-2c").glob("*-stack-*.json"):
        data = json.loads(path.read_text())
        stacks[data["params"]["stack"].split()[0]] = data["results"]
    assert set(stacks) == {"torch-2.13.0", "torch-2.14.0"}
    assert stacks["torch-2.13.0"][POINTS][0] == [pytest.approx(1.0)]
    assert stacks["torch-2.13.0"][POINTS.replace("fake", "wall")][0] == [pytest.approx(2.0)]
    assert stacks["torch-2.14.0"][POINTS][0] == [pytest.approx(4.0)]


def test_developers_benchmarks_stay(tmp_path: Path) -> None:
    mine = {"name": "decode.Decode.track_attention", "version": "x", "params": []}
    path = tmp_path / "benchmarks.json"
    path.write_text(json.dumps({"decode.Decode.track_attention": mine, "version": 2}))
    export_to_asv(table_of(history([1])), None, tmp_path)
    stored = json.loads(path.read_text())
    assert stored["decode.Decode.track_attention"] == mine
    assert {POINTS, ROLLUP} < stored.keys()


def test_nothing_measured_writes_nothing(tmp_path: Path) -> None:
    outcome = export_to_asv(table_of([]), None, tmp_path)
    assert (outcome.files, outcome.series, outcome.commits) == ((), 0, 0)
    assert list(tmp_path.iterdir()) == []


def test_sixty_nights_are_quick(tmp_path: Path) -> None:
    """A cap far above the 0.3 s it takes, so that only a change of order fails."""
    import time

    rows = [
        row(1, f"{n}q1s1k", seconds=n * 1e-3, started_at=START + timedelta(days=day),
            run_id=f"20261101T{day // 60:02d}{day % 60:02d}00Z-000000",
            commit=f"{day:040x}", commit_time=START + timedelta(days=day))
        for day in range(60)
        for n in range(1, 25)
    ]  # fmt: skip
    table = table_of(rows)
    started = time.perf_counter()
    outcome = export_to_asv(table, None, tmp_path)
    assert outcome.commits == 60
    assert time.perf_counter() - started < 10


def test_asv_publishes_the_history(tmp_path: Path) -> None:
    """In a real repository: our medians are asv's graphs, at the right revisions."""
    environment = os.environ | {
        "HOME": str(tmp_path),
        **{f"GIT_{who}_NAME": "t" for who in ("AUTHOR", "COMMITTER")},
        **{f"GIT_{who}_EMAIL": "t@t" for who in ("AUTHOR", "COMMITTER")},
    }

    def run(*words: str) -> str:
        done = subprocess.run(
            words, check=True, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        return done.stdout.strip()

    run("git", "init", "-q", "-b", "main", ".")
    commits = []
    for night in (1, 2, 3):
        environment["GIT_COMMITTER_DATE"] = f"2026-11-0{night}T00:00:00Z"
        run("git", "commit", "-q", "--allow-empty", "-m", f"night {night}")
        commits.append(run("git", "rev-parse", "HEAD"))
    config = {
        "version": 1,
        "project": "toy",
        "repo": ".",
        "branches": ["HEAD"],
        "environment_type": "virtualenv",
        "results_dir": "results",
        "html_dir": "html",
    }
    (tmp_path / "asv.conf.json").write_text(json.dumps(config))
    rows = [
        replace(r, commit=commits[night - 1])
        for night in (1, 2, 3)
        for r in history([night], slower_from=3)
    ]
    export_to_asv(table_of(rows), None, tmp_path / "results")
    run(sys.executable, "-m", "asv", "publish")
    index = json.loads((tmp_path / "html" / "index.json").read_text())
    assert {POINTS, ROLLUP} <= index["benchmarks"].keys()
    assert index["params"]["machine"] == ["cpu-xeon-2c"]
    assert [index["revision_to_hash"][str(n)] for n in range(3)] == commits
    (graph,) = (tmp_path / "html" / "graphs").rglob(f"machine-cpu-xeon-2c/**/{POINTS}.json")
    series = json.loads(graph.read_text())
    assert [revision for revision, _ in series] == [0, 1, 2]
    assert [values[0] for _, values in series] == pytest.approx([4e-3, 4e-3, 4.4e-3])
