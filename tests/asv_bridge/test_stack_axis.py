"""asv over stacks: the real asv publishes a manifest repository's history."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from attnbench.asv_bridge.exporter import export_to_asv
from attnbench.history.manifest import write_manifest
from attnbench.history.runs import runs_of
from attnbench.history.stacks import Stack, stacks_of_runs
from attnbench.store import ResultsFolder, RunHeader
from attnbench.store.record import Measurement, stack_id
from tests.asv_bridge.rows import LARGE, SMALL, history, row, table_of
from tests.asv_bridge.test_exporter import POINTS, ROLLUP, read

ROOT = Path(__file__).resolve().parents[2]
OLD = ("python==3.11.7", "torch==2.12.0")
NEW = ("python==3.11.7", "torch==2.13.0")
SLOW_SINCE = 5


def at(stack: tuple[str, ...], night: int, factor: float = 1.0, **more: Any) -> list[Measurement]:
    """A night of one stack and another commit."""
    return [
        replace(
            one,
            stack=stack,
            stack_id=stack_id(stack),
            samples=tuple(s * factor for s in one.samples),
            **more,
        )
        for one in history([night])
    ]


def written(folder: Path, rows: list[Measurement]) -> list[Stack]:
    return list(write_manifest(folder, stacks_of_runs(runs_of(table_of(rows)))).stacks)


def test_a_run_goes_under_its_stacks_commit(tmp_path: Path) -> None:
    rows = [
        *at(OLD, 1),
        *at(OLD, 2, 1.1),
        *at(NEW, 3, 1.2),
        *at(NEW, 4, 1.3, driver_version="580.1"),
    ]
    stacks = written(tmp_path / "m", rows)
    outcome = export_to_asv(table_of(rows), None, tmp_path / "out", stacks)
    assert (outcome.series, outcome.commits, dict(outcome.left_out)) == (2, 3, {})
    # A stack of two nights has the newest; a driver alone has a place of its own.
    found = [read(tmp_path / "out", s.commit)[POINTS]["result"] for s in stacks]
    assert found == [pytest.approx([4e-3 * f, 9e-3 * f]) for f in (1.1, 1.2, 1.3)]
    for stack in stacks:
        (path,) = (tmp_path / "out" / "cpu-xeon-2c").glob(f"{stack.commit[:8]}-*.json")
        data = json.loads(path.read_text())
        assert data["date"] == int(stack.first_measured.timestamp() * 1000)
        # Nothing of the stack is a parameter: that would start a new line at every stack.
        assert data["params"] == {"machine": "cpu-xeon-2c"}


def test_a_stack_that_comes_back_is_published_where_it_was(tmp_path: Path) -> None:
    rows = [*at(OLD, 1), *at(NEW, 2, 2.0), *at(OLD, 3, 3.0)]
    stacks = written(tmp_path / "m", rows)
    assert export_to_asv(table_of(rows), None, tmp_path / "out", stacks).commits == 2
    assert read(tmp_path / "out", stacks[0].commit)[POINTS]["result"] == [
        pytest.approx(12e-3),
        pytest.approx(27e-3),
    ]


def test_devices_go_under_their_own_stacks(tmp_path: Path) -> None:
    gpu: dict[str, Any] = {"device_class": "h200", "driver_version": "580.1"}
    rows = [*at(OLD, 1), *at(OLD, 2, 2.0, **gpu), *at(NEW, 3, 3.0)]
    stacks = written(tmp_path / "m", rows)
    export_to_asv(table_of(rows), None, tmp_path / "out", stacks)
    names = {p.name[:8]: p.parent.name for p in (tmp_path / "out").glob("*/*-stacks.json")}
    assert names == {s.commit[:8]: s.device_class for s in stacks}


def test_what_has_no_place_on_a_stack_axis_is_named(tmp_path: Path) -> None:
    rows = [
        *at(OLD, 1),
        *at(OLD, 2, commit="", commit_time=None),
        *at(OLD, 3, commit="a" * 40 + "+dirty"),
        *at(NEW, 4),
    ]
    stacks = [s for s in written(tmp_path / "m", rows) if s.stack_id == stack_id(OLD)]
    outcome = export_to_asv(table_of(rows), None, tmp_path / "out", stacks)
    assert {run_id[:8]: why for run_id, why in outcome.left_out.items()} == {
        "20261103": "its files differed from the commit",
        "20261104": "its stack is not in the manifest repository (attnbench manifest write)",
    }


def test_what_was_written_under_hashes_that_are_gone_goes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    rows = at(NEW, 2)
    gone = written(tmp_path / "m", rows)
    export_to_asv(table_of(rows), None, out, gone)
    mine = out / "cpu-xeon-2c" / f"{gone[0].commit[:8]}-virtualenv-py3.11.json"
    shutil.copy(next((out / "cpu-xeon-2c").glob("*-stacks.json")), mine)
    rows = [*at(OLD, 1), *rows]
    stacks = written(tmp_path / "m", rows)
    assert gone[0].commit not in {s.commit for s in stacks}
    export_to_asv(table_of(rows), None, out, stacks)
    assert {p.name[:8] for p in out.glob("*/*-stacks.json")} == {s.commit[:8] for s in stacks}
    assert mine.is_file()


def test_a_driver_is_never_drawn_as_the_fault_of_a_commit(tmp_path: Path) -> None:
    """On the commit axis a new driver starts a new line, as a new torch does."""
    old = row(1, driver_version="570.1")
    new = row(2, driver_version="580.1", commit=old.commit, commit_time=old.commit_time)
    rows = [old, new]
    export_to_asv(table_of(rows), None, tmp_path)
    labels = {
        json.loads(path.read_text())["params"]["stack"]
        for path in (tmp_path / "cpu-xeon-2c").glob("*-stack-*.json")
    }
    assert len(labels) == 2
    assert all(label.startswith("torch-2.13.0 ") for label in labels)


def test_asv_publishes_stacks(tmp_path: Path) -> None:
    """As docs/stacks.md says, with the configuration of this repository."""
    shutil.copy(ROOT / "asv-stacks.conf.json", tmp_path)
    (tmp_path / "attnbench.toml").write_text('manifest = "results/stacks"\n')
    nights = [at((f"torch==2.{n}.0",), n, 1.2 if n >= SLOW_SINCE else 1.0) for n in range(1, 8)]
    nights.append(at(("torch==2.7.0",), 8, 1.2, driver_version="580.1"))
    folder = ResultsFolder(tmp_path / "results")
    for rows in nights:
        with folder.open_run(
            RunHeader(run_id=rows[0].run_id, started_at=rows[0].started_at)
        ) as run:
            for one in rows:
                run.append(one)
            run.seal()
    environment = os.environ | {"HOME": str(tmp_path / "home")}
    (tmp_path / "home").mkdir()

    def attnbench(*words: str, status: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "attnbench", *words],
            check=False,
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    publish = ("asv", "--config", "asv-stacks.conf.json", "publish")
    assert "attnbench manifest write" in attnbench(*publish, status=2)
    assert "8 stacks, 8 of them new" in attnbench("manifest", "write")
    said = attnbench(*publish)
    assert "2 series of 8 stacks" in said
    assert "Couldn't find" not in said

    html = tmp_path / ".asv" / "stacks" / "html"
    index = json.loads((html / "index.json").read_text())
    log = subprocess.run(
        ["git", "log", "--reverse", "--format=%H %at"],
        cwd=tmp_path / "results" / "stacks",
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert index["revision_to_hash"] == {str(n): sha for n, sha in enumerate(log[::2])}
    assert index["revision_to_date"] == {str(n): int(at) * 1000 for n, at in enumerate(log[1::2])}
    for benchmark in (POINTS, ROLLUP):
        # One line through all stacks.
        (graph,) = (
            p for p in (html / "graphs").rglob(f"{benchmark}.json") if "summary" not in p.parts
        )
        values = json.loads(graph.read_text())
        assert [revision for revision, _ in values] == list(range(8))
        levels = [value[0] / values[0][1][0] for _, value in values]
        assert levels == pytest.approx([1.2 if n >= SLOW_SINCE else 1.0 for n in range(1, 9)])
    # asv's own step detection names the stack, and no range of several.
    steps = [one[-1] for one in json.loads((html / "regressions.json").read_text())["regressions"]]
    assert len(steps) == 4
    assert all([jump[:2] for jump in jumps] == [[None, SLOW_SINCE - 1]] for jumps in steps)
    assert {p for axis in index["benchmarks"][POINTS]["params"] for p in axis} == {
        repr(LARGE),
        "'CPU_ATTN'",
        "'TORCH_SDPA'",
    }
    assert SMALL not in json.dumps(index["benchmarks"][POINTS])
