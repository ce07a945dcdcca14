"""Killed at any moment, a run loses at most the row in flight, doubles none, and is resumed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from attnbench.store import ResultsFolder
from tests.store.rows import make_header, make_row, numbers, store_run

KILLS = 50
ROWS = 25


class Killed(BaseException):
    """Stands for SIGKILL: no handler of the code under test catches it."""


def test_50_kills_lose_and_double_nothing(tmp_path: Path) -> None:
    folder = ResultsFolder(tmp_path / "results")
    folder.path.mkdir()
    chance = random.Random(7)
    kills = run_number = 0
    met: Counter[str] = Counter()
    with subprocess.Popen(
        [sys.executable, "-m", "tests.store.writer", str(folder.path), "serve"],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:

        def go_on(delay_s: float) -> int:
            """Go on with the run until it ends or is killed; its exit status."""
            assert server.stdin is not None
            assert server.stdout is not None
            server.stdin.write(f"{ROWS} {run_number} {delay_s}\n")
            server.stdin.flush()
            return int(server.stdout.readline())

        assert go_on(0) == 0  # it also imports; the second tells how long a run takes
        run_number += 1
        started = time.perf_counter()
        assert go_on(0) == 0
        run_number += 1
        full_s = time.perf_counter() - started
        while kills < KILLS:
            status = go_on(chance.uniform(0.001, full_s))
            assert status in (0, -signal.SIGKILL), status
            _check(folder, tmp_path / "acknowledged")
            met.update(path.suffix for path in (folder.path / "runs").iterdir())
            kills += status != 0
            run_number += status == 0
        assert go_on(0) == 0
    _check(folder, tmp_path / "acknowledged")
    assert met[".journal"] > 5, met  # kills hit runs in the middle
    stored = Counter(folder.table(["run_id"])["run_id"].to_pylist())
    assert stored == {make_header(number=number).run_id: ROWS for number in range(run_number + 1)}
    counted = folder.query("SELECT count(*) AS n FROM results").to_pylist()
    assert counted == [{"n": stored.total()}]
    assert folder.check().is_ok


def _check(folder: ResultsFolder, acknowledged: Path) -> None:
    """What was acknowledged is there once; what else is there is one row in flight a kill."""
    told = acknowledged.read_text() if acknowledged.exists() else ""
    lines = [tuple(int(w) for w in line.split()) for line in told.splitlines(keepends=False)]
    wanted = {(make_header(number=run).run_id, row + 1) for run, row in lines}
    stored = [
        (r["run_id"], r["num_reqs"]) for r in folder.table(["run_id", "num_reqs"]).to_pylist()
    ]
    assert len(stored) == len(set(stored)), "doubled"
    assert wanted <= set(stored), "lost"
    assert len(lines) == len(wanted), "measured twice"


Step = Callable[[], Any]


def _kill_at_every_step(prepare: Callable[[int], Step], check: Callable[[], None]) -> int:
    """Kill the step before and after each of its calls that change the disk; how many there were.

    `prepare(n)` sets up trial n; `check` looks at the folder after each kill.
    """
    trial = 0
    while True:
        step = prepare(trial)
        with pytest.MonkeyPatch.context() as patch:
            calls = _count_calls(patch, kill_at=trial)
            try:
                step()
            except Killed:
                patch.undo()
                check()
                trial += 1
                continue
        check()
        assert calls[0] <= trial
        return trial


def _count_calls(patch: pytest.MonkeyPatch, kill_at: int) -> list[int]:
    calls = [0]

    def wrap(name: str) -> None:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            for before in (True, False):
                if calls[0] == kill_at:
                    raise Killed
                calls[0] += 1
                if before:
                    value = real(*args, **kwargs)
            return value

        patch.setattr(os, name, call)

    for name in ("replace", "unlink", "fsync"):
        wrap(name)
    return calls


def test_a_kill_at_every_step_of_sealing(tmp_path: Path) -> None:
    folder = ResultsFolder(tmp_path / "results")
    header = make_header()
    store_run(folder, header, 2)
    expected = [0, 1]

    def prepare(trial: int) -> Step:
        # Always a resumed run: an earlier sealed file is merged with the journal.
        run = folder.open_run(header, resume=True)
        run.append(make_row(run.run_id, len(expected)))
        expected.append(len(expected))

        def seal() -> None:
            try:
                run.seal()
            finally:
                run.close()  # as the kernel does for a killed process

        return seal

    def check() -> None:
        assert numbers(folder.table()) == expected
        assert folder.query("SELECT 1 FROM results").num_rows == len(expected)
        assert folder.check().is_ok

    assert _kill_at_every_step(prepare, check) >= 8
    folder.seal_orphans()
    check()
    assert len(list((folder.path / "runs").iterdir())) == 1


def test_a_kill_at_every_step_of_sealing_what_was_killed(tmp_path: Path) -> None:
    folder = ResultsFolder(tmp_path / "results")
    expected = []

    def prepare(trial: int) -> Step:
        run = folder.open_run(make_header(number=trial))
        run.append(make_row(run.run_id, trial))
        run.close()
        expected.append(trial)
        return folder.seal_orphans

    def check() -> None:
        assert numbers(folder.table()) == expected
        assert folder.check().is_ok

    assert _kill_at_every_step(prepare, check) >= 8


def test_a_kill_at_every_step_of_compacting(tmp_path: Path) -> None:
    # Two months; the month file of the second is merged with a new run and with a run that the
    # month file holds as well, since it was resumed.
    template = ResultsFolder(tmp_path / "template")
    store_run(template, make_header(20), 2)
    store_run(template, make_header(21), 2)
    template.compact()
    with template.open_run(make_header(21), resume=True) as run:
        run.append(make_row(run.run_id, 2))
    store_run(template, make_header(22), 3)
    store_run(template, make_header(month=10), 1)
    expected = sorted([0, 1, 0, 1, 2, 0, 1, 2, 0])
    folder = template

    def prepare(trial: int) -> Step:
        nonlocal folder
        folder = ResultsFolder(tmp_path / str(trial))
        shutil.copytree(template.path, folder.path)
        return folder.compact

    def check() -> None:
        for _ in range(2):  # as it was left, and after the next compaction
            assert numbers(folder.table()) == expected
            assert folder.query("SELECT 1 FROM results").num_rows == len(expected)
            assert [info.num_rows for info in folder.runs()] == [1, 2, 3, 3]
            report = folder.check()
            assert report.is_ok, report
            assert report.num_rows == len(expected)
            folder.compact()
        assert not list((folder.path / "runs").iterdir())
        months = sorted(path.name for path in (folder.path / "months").iterdir())
        assert months == ["2026-10.parquet", "2026-11.parquet"]

    assert _kill_at_every_step(prepare, check) >= 20


def test_a_kill_while_a_journal_is_created_leaves_nothing_that_counts(tmp_path: Path) -> None:
    folder = ResultsFolder(tmp_path / "results")
    store_run(folder, make_header(), 1)
    journal = folder.path / "runs" / f"{make_header(22).run_id}.journal"
    for torn in (b"", b"0123", b'0123456789abcdef {"header":'):
        journal.write_bytes(torn)
        assert numbers(folder.table()) == [0]
        assert folder.check().is_ok
        assert folder.seal_orphans() == []
        assert not journal.exists()
