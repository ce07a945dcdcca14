"""The second look: rounds of fresh processes of this build and the one before, exact by the fake
timer."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from attnbench.backends.device import Device
from attnbench.history.panel import Panel
from attnbench.history.rule import Reason, Verdict, VerdictSettings
from attnbench.history.series_verdict import SeriesVerdict
from attnbench.history.verdict import judge
from attnbench.measure import MeasureOptions, PlannedPoint, run_sweep
from attnbench.measure.confirming import Confirmed, Subject, confirm
from attnbench.measure.environment import read_environment
from attnbench.measure.header import new_header
from attnbench.measure.reference import Reference
from attnbench.store import ResultsFolder
from attnbench.workload import Workload
from tests.measure.other_python import answering_python, changed_python

CPU = Device("cpu")
ENVIRONMENT = read_environment(CPU)
WORKLOAD = Workload.parse("3q1s40 heads=4/2 head_size=32 dtype=fp32")
PLAN = [PlannedPoint(WORKLOAD, "CPU_ATTN", suite="tiny"), PlannedPoint(WORKLOAD, "TORCH_SDPA")]
QUIET = MeasureOptions(timer="fake", replicates=3)
SLOW = replace(QUIET, fake_slowdown=(("CPU_ATTN", 1.3),))
BOTH_SLOW = replace(QUIET, fake_slowdown=(("CPU_ATTN", 1.3), ("TORCH_SDPA", 1.3)))


def night(folder: ResultsFolder, options: MeasureOptions) -> Subject:
    header = new_header(PLAN, options, ENVIRONMENT)
    with folder.open_run(header) as run:
        run_sweep(PLAN, run, options, CPU, ENVIRONMENT)
    return Subject(
        folder=folder, header=header, options=options, device=CPU, environment=ENVIRONMENT
    )


@pytest.fixture(scope="module")
def quiet_nights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nights") / "results"
    for _ in range(4):
        night(ResultsFolder(folder), QUIET)
    return folder


@pytest.fixture
def folder(quiet_nights: Path, tmp_path: Path) -> ResultsFolder:
    shutil.copytree(quiet_nights, tmp_path / "results")
    return ResultsFolder(tmp_path / "results")


def verdicts(subject: Subject, reference: bool) -> dict[str, SeriesVerdict]:
    settings = VerdictSettings(has_reference=reference)
    found = judge(Panel.of(subject.folder), subject.header.run_id, settings)
    return {v.series.identity["backend"]: v for v in found.verdicts}


def second_look(subject: Subject, python: str = "", tell: Any = lambda line: None) -> Confirmed:
    settings = VerdictSettings(has_reference=bool(python))
    flagged = judge(Panel.of(subject.folder), subject.header.run_id, settings).flagged_points()
    points = [point for point in PLAN if point.point_id in flagged]
    return confirm(subject, points, settings, python, tell=tell)


def rows(subject: Subject) -> list[dict[str, Any]]:
    table = subject.folder.table(
        ["replicate", "backend", "started_at", "stack_id", "suite", "status"],
        {"run_id": subject.header.run_id, "metric": "attention"},
        references=True,
    )
    return sorted(table.to_pylist(), key=lambda row: row["started_at"])


@pytest.mark.slow
def test_a_slow_down_is_confirmed_beside_the_build_before(
    folder: ResultsFolder, tmp_path: Path
) -> None:
    subject = night(folder, SLOW)
    assert verdicts(subject, reference=True)["CPU_ATTN"].reasons[0] is Reason.NOT_CONFIRMED_YET
    outcome = second_look(subject, changed_python(tmp_path))
    assert (outcome.trouble, outcome.given_up) == ("", frozenset())
    found = verdicts(subject, reference=True)
    slower = found["CPU_ATTN"]
    assert (slower.verdict, slower.reasons[0]) == (Verdict.REGRESSION, Reason.CONFIRMED)
    assert slower.estimate is not None
    assert slower.estimate.ratio == pytest.approx(1.3, rel=2e-3)
    assert slower.note == ""
    assert found["TORCH_SDPA"].verdict is Verdict.UNCHANGED
    assert not found["TORCH_SDPA"].subject.confirmations

    value = slower.subject
    assert (len(value.replicates), len(value.confirmations), len(value.references)) == (3, 10, 10)
    assert max(value.references) < 1.01 * min(value.references) < min(value.confirmations)
    # The subject's value is its own, and so is what the run was.
    assert value.stack_id == ENVIRONMENT.stack_id
    assert len(value.statuses) == 13
    again = [row for row in rows(subject) if row["replicate"] >= 100]
    assert {row["backend"] for row in again} == {"CPU_ATTN"}
    theirs = [row for row in again if row["replicate"] >= 200]
    assert {row["suite"] for row in theirs} == {"tiny"}
    assert ENVIRONMENT.stack_id not in {row["stack_id"] for row in theirs}
    turns = [row["replicate"] for row in again]
    assert turns == [n for r in range(10) for n in ([100, 200], [200, 100])[r % 2] for n in [n + r]]
    # Nobody who reads the results sees the build before as this one.
    assert folder.table(["replicate"]).column("replicate").combine_chunks().to_numpy().max() < 200


@pytest.mark.slow
def test_an_odd_night_is_no_alarm_beside_the_build_before_and_ends_after_four_rounds(
    folder: ResultsFolder, tmp_path: Path
) -> None:
    subject = night(folder, BOTH_SLOW)
    outcome = second_look(subject, changed_python(tmp_path, slowdown=1.3))
    assert outcome.given_up == {point.point_id for point in PLAN}
    for verdict in verdicts(subject, reference=True).values():
        assert (verdict.verdict, verdict.reasons[0]) == (Verdict.UNCHANGED, Reason.NOT_CONFIRMED)
        assert len(verdict.subject.confirmations) == len(verdict.subject.references) == 4


def test_without_the_build_before_the_night_shares_its_oddness_and_nothing_is_given_up(
    folder: ResultsFolder,
) -> None:
    subject = night(folder, BOTH_SLOW)
    assert second_look(subject).given_up == frozenset()
    for verdict in verdicts(subject, reference=False).values():
        assert verdict.reasons[0] is Reason.CONFIRMED
        assert (len(verdict.subject.confirmations), verdict.subject.references) == (10, ())


def test_what_shows_nothing_any_more_is_given_up_and_the_rest_goes_on(
    folder: ResultsFolder,
) -> None:
    subject = night(folder, BOTH_SLOW)
    calm = replace(subject, options=SLOW)  # in the rounds only one of the two is still slow
    lines: list[str] = []
    outcome = second_look(calm, tell=lines.append)
    assert outcome.given_up == {PLAN[1].point_id}
    found = verdicts(subject, reference=False)
    assert len(found["CPU_ATTN"].subject.confirmations) == 10
    assert len(found["TORCH_SDPA"].subject.confirmations) == 4
    assert found["CPU_ATTN"].reasons[0] is Reason.CONFIRMED
    assert found["TORCH_SDPA"].reasons[0] is Reason.NOT_CONFIRMED
    assert "1 points show nothing any more: not measured further" in lines
    assert lines[-1] == "round 10 of 10: 1 points"
    # Gone on with when it is done, it says so, and nothing else.
    lines.clear()
    confirm(calm, PLAN, VerdictSettings(), tell=lines.append)
    assert lines == ["2 points were measured again already"]


class Killed(BaseException):
    """As a signal ends it, in the middle."""


@pytest.mark.slow
def test_one_that_was_stopped_goes_on_there_and_doubles_nothing(
    folder: ResultsFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = night(folder, SLOW)
    python = changed_python(tmp_path)

    def tell(line: str) -> None:
        if line.startswith("round 6"):
            raise Killed

    with pytest.raises(Killed):
        second_look(subject, python, tell)
    before = [row for row in rows(subject) if row["replicate"] >= 100]
    assert len(before) == 2 * 5
    asked: list[int] = []
    own = Reference.measure

    def measure(self: Reference, points: Any, options: Any, replicate: int, run_id: str) -> Any:
        asked.append(replicate)
        return own(self, points, options, replicate, run_id)

    monkeypatch.setattr(Reference, "measure", measure)
    # What it had begun is no longer flagged: the night goes on with what has confirmations.
    confirm(subject, PLAN[:1], VerdictSettings(has_reference=True), python)
    after = [row for row in rows(subject) if row["replicate"] >= 100]
    assert after[: len(before)] == before
    assert asked == [*range(205, 210)]
    assert Counter(row["replicate"] for row in after) == Counter(
        [*range(100, 110), *range(200, 210)]
    )
    assert verdicts(subject, reference=True)["CPU_ATTN"].reasons[0] is Reason.CONFIRMED


@pytest.mark.slow
def test_a_point_that_the_build_before_cannot_do_is_judged_without_it(
    folder: ResultsFolder, tmp_path: Path
) -> None:
    """One it does not know, one whose output is wrong there: neither is the subject's fault."""
    change = """
import attnbench.backends.registry as registry
own = registry.get_backend_class
def known(name):
    if name == "CPU_ATTN":
        raise KeyError("no such backend yet")
    return own(name)
registry.get_backend_class = known
import attnbench.measure.point as point
from attnbench.store.record import Status
own_measure = point.measure_point
def crashing(planned, context, *more):
    first, *rest = own_measure(planned, context, *more)
    from dataclasses import replace
    return [replace(first, status="CRASH", samples=(), reasons=("it fell over",))]
import attnbench.measure.executor as executor
executor.measure_point = crashing
"""
    subject = night(folder, BOTH_SLOW)
    outcome = second_look(subject, changed_python(tmp_path, change))
    assert outcome.trouble == ""
    for verdict in verdicts(subject, reference=True).values():
        assert verdict.reasons[0] is Reason.CONFIRMED
        assert str(verdict.subject.status) == "OK"
        assert verdict.subject.references == ()
        assert "the build before did not time it" in verdict.note
    theirs = [row for row in rows(subject) if row["replicate"] >= 200]
    # Asked once, not ten times: each would cost its timeout.
    assert [(row["backend"], row["status"]) for row in theirs] == [("TORCH_SDPA", "CRASH")]


def test_one_that_dies_is_told_and_asked_no_more(folder: ResultsFolder, tmp_path: Path) -> None:
    subject = night(folder, SLOW)
    lines: list[str] = []
    outcome = second_look(subject, answering_python(tmp_path), lines.append)
    assert "ended (1): it fell over" in outcome.trouble
    assert sum("has no times of the build before" in line for line in lines) == 2
    verdict = verdicts(subject, reference=True)["CPU_ATTN"]
    assert verdict.reasons[0] is Reason.CONFIRMED
    assert len(verdict.subject.confirmations) == 10
    assert "the build before did not time it" in verdict.note
