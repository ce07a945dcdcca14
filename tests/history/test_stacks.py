"""The stack axis: packages, driver, CUDA and container, whatever the stored stack id says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from attnbench.cli.history import history
from attnbench.dashboard.data import runs_data
from attnbench.errors import DataError
from attnbench.history.comparison import find_side
from attnbench.history.panel import Panel
from attnbench.history.runs import environment_change, runs_of
from attnbench.history.series import Axis, Series
from attnbench.history.series_rows import series_of
from attnbench.history.stacks import (
    change_text,
    changed_versions,
    driver_number,
    stack_before,
    stack_key,
    stacks_of_runs,
)
from attnbench.store import ResultsFolder, RunHeader
from attnbench.store.record import Measurement, stack_id
from attnbench.upgrade.bisect_stacks import known_stacks, stack_candidates
from tests.history.fake import row, table_of

A = ("python==3.11.7", "torch==2.12.0")
B = ("python==3.11.7", "torch==2.13.0")

#: First lines of /proc/driver/nvidia/version, and what NVML says of the same drivers.
KERNEL_LINES = {
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.105.08  Release Build  "
    "(dvs-builder@U22-I3-AM02-24-3)  Wed Oct 29 22:15:28 UTC 2025": "580.105.08",
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024": (
        "535.183.01"
    ),
}


def night(run: int, stack: tuple[str, ...] = A, **more: Any) -> list[Measurement]:
    made: dict[str, Any] = {"stack": stack, "stack_id": stack_id(stack), **more}
    return [row(run, replicate, **made) for replicate in range(2)]


def series(*nights: list[Measurement]) -> list[Series]:
    """The same by both readers."""
    table = table_of([r for one in nights for r in one])
    found = series_of(table)
    panel = Panel.of_table(table)
    assert panel.all_series(range(panel.num_series)) == found
    return found


def test_one_stack_on_many_nights_is_one_level() -> None:
    (one,) = series(*(night(n) for n in range(5)))
    (level,) = one.levels(Axis.STACK)
    assert (level.label, len(level.values)) == (stack_id(A), 5)


@pytest.mark.parametrize(
    "fact",
    [{"driver_version": "580.1"}, {"cuda_version": "13.0"}, {"container_digest": "sha256:1"}],
)
def test_what_no_package_says_is_a_level_of_its_own(fact: dict[str, Any]) -> None:
    other = {name: text + "9" for name, text in fact.items()}
    (one,) = series(night(0), night(1, **fact), night(2, **fact), night(3, **other))
    levels = one.levels(Axis.STACK)
    assert [len(level.values) for level in levels] == [1, 2, 1]
    assert len({level.label for level in levels}) == 3
    assert all(level.label.startswith(stack_id(A)) for level in levels)
    assert len(one.levels(Axis.COMMIT)) == 4


def test_a_stack_that_comes_back_is_one_level_at_its_first_night() -> None:
    (one,) = series(night(0), night(1, B), night(2, A), night(3, B))
    levels = one.levels(Axis.STACK)
    assert [level.label for level in levels] == [stack_id(A), stack_id(B)]
    assert [[v.started_at.day for v in level.values] for level in levels] == [[9, 11], [10, 12]]


def test_devices_have_axes_of_their_own() -> None:
    gpu: dict[str, Any] = {"device_class": "h200", "driver_version": "580.1"}
    cpu, h200 = series(night(0), night(1, **gpu), night(2, B), night(3, B, **gpu))
    assert [level.label for level in cpu.levels(Axis.STACK)] == [stack_id(A), stack_id(B)]
    assert [level.label for level in h200.levels(Axis.STACK)] == [
        stack_key(stack_id(A), "580.1"),
        stack_key(stack_id(B), "580.1"),
    ]


def test_a_driver_is_one_however_it_is_told() -> None:
    for line, number in KERNEL_LINES.items():
        assert driver_number(line) == driver_number(number) == number
        assert stack_key("s", line) == stack_key("s", number)
    assert driver_number("not a number x86_64 1.2.3") == "not a number x86_64 1.2.3"
    line, number = next(iter(KERNEL_LINES.items()))
    runs = runs_of(table_of([*night(0, driver_version=line), *night(1, driver_version=number)]))
    assert environment_change(runs[0], runs[1]) is None
    assert len(stacks_of_runs(runs)) == 1


def test_stacks_of_runs_are_each_once_by_first_measurement() -> None:
    gpu = {"device_class": "h200", "driver_version": "580.1"}
    nights = [night(3, A), night(0, B), night(1, A), night(2, A, **gpu), night(4, stack_id="")]
    runs = runs_of(table_of([r for one in nights for r in one]))
    found = stacks_of_runs(reversed(runs))
    assert [(s.device_class, s.packages, s.first_measured.day) for s in found] == [
        ("cpu-xeon-2c", B, 9),
        ("cpu-xeon-2c", A, 10),
        ("h200", A, 11),
    ]
    assert {s.key for s in found} == {run.stack_key for run in runs if run.stack_id}
    assert stack_before(found, found[1]) == found[0]
    assert stack_before(found, found[2]) is None
    changed = changed_versions(found[0].versions, found[1].versions)
    assert change_text(changed) == "torch 2.13.0 -> 2.12.0"


def test_two_drivers_can_be_compared_by_their_stacks() -> None:
    nights = [*night(0, driver_version="570.1"), *night(1, driver_version="580.1")]
    runs = runs_of(table_of(nights))
    assert len(find_side(runs, stack_id(A)).runs) == 2
    for run in runs:
        assert find_side(runs, run.stack_key).runs == (run,)
        assert find_side(runs, run.stack_key[:-3]).runs == (run,)
    with pytest.raises(DataError, match="no stored run"):
        find_side(runs, f"{stack_id(A)}-x")


def test_history_by_stack_says_what_changed(tmp_path: Path) -> None:
    folder = ResultsFolder(tmp_path)
    for rows in (night(0), night(1, driver_version="570.1"), night(2, B), night(3)):
        with folder.open_run(
            RunHeader(run_id=rows[0].run_id, started_at=rows[0].started_at)
        ) as run:
            for one in rows:
                run.append(one)
    app = typer.Typer()
    app.command()(history)
    words = ["--by", "stack", "--results", str(tmp_path), "--format", "json"]
    found = json.loads(CliRunner().invoke(app, words).stdout)
    assert [(r["stack"], r["runs"], r["last_run"][:10], r["changed"]) for r in found] == [
        (stack_id(A), 2, "2026-11-12", ""),
        (stack_key(stack_id(A), "570.1"), 1, "2026-11-10", "+ driver 570.1"),
        (stack_id(B), 1, "2026-11-11", "- driver 570.1, torch 2.12.0 -> 2.13.0"),
    ]


def test_pages_and_bisect_go_by_the_same_stacks() -> None:
    nights = [*night(0, driver_version="570.1"), *night(1, B, driver_version="580.1")]
    runs = runs_of(table_of(nights))
    shown = runs_data(runs, 0)["runs"]
    assert [run["stack_key"] for run in shown] == [run.stack_key for run in runs]
    line = next(iter(KERNEL_LINES))
    told = runs_of(table_of(night(0, driver_version=line)))
    assert runs_data(told, 0)["runs"][0]["driver"] == KERNEL_LINES[line]
    for text in (f"{stack_id(A)}..{stack_id(B)}", "..".join(run.stack_key for run in runs)):
        known = known_stacks((), stacks_of_runs(runs))
        candidates = stack_candidates(text, known, print, lambda: runs[0].device_class)
        assert [c.label for c in candidates][1:] == ["torch 2.12.0 -> 2.13.0"]
