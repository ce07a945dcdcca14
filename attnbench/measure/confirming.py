"""The second look: points that look slower, measured again in rounds of fresh processes.

In each round this build and the build before take turns, A B, B A, A B: so a device that warms up,
and a night that is odd, are on both sides alike. docs/verdict.md says what is made of the times.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from attnbench.backends.device import Device
from attnbench.errors import AttnBenchError
from attnbench.history.confirm import FUTILITY_ROUNDS, ROUNDS
from attnbench.history.panel import Panel
from attnbench.history.rounds import given_up
from attnbench.history.rule import VerdictSettings
from attnbench.history.series import FIRST_CONFIRMATION
from attnbench.measure.compile_ahead import Tell
from attnbench.measure.environment import Environment
from attnbench.measure.options import MeasureOptions
from attnbench.measure.plan import PlannedPoint
from attnbench.measure.reference import Reference, open_reference
from attnbench.measure.sweep import Progress, run_sweep, stored_points
from attnbench.store import ResultsFolder
from attnbench.store.header import RunHeader
from attnbench.store.record import FIRST_REFERENCE, Measurement
from attnbench.store.results import Run

#: The other side is asked no more once so many of its rounds have failed as a whole.
_MAX_FAILURES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """The run whose points are measured again, as it was measured first."""

    folder: ResultsFolder
    header: RunHeader
    options: MeasureOptions
    device: Device
    environment: Environment


@dataclass(frozen=True, slots=True)
class Confirmed:
    """What a second look did.

    Attributes:
        given_up: points that showed nothing after `FUTILITY_ROUNDS`.
        trouble: why the build before missed rounds; "" where it did not.
    """

    duration_s: float
    given_up: frozenset[str] = frozenset()
    trouble: str = ""


def confirm(
    subject: Subject,
    points: Sequence[PlannedPoint],
    settings: VerdictSettings,
    reference: str = "",
    progress: Progress | None = None,
    tell: Tell = lambda line: None,
) -> Confirmed:
    """Measure `points` of a stored run again, as long as they show something, and seal it.

    `reference` is the Python of the build before, "" where there is none; `check_reference` has
    taken it. Whatever happens to it, this build's rounds go on. What is stored already is not
    measured again, so a second look that was stopped goes on where it was. The device is held by
    the caller. Raises as `run_sweep`.
    """
    started = time.perf_counter()
    going, gone = list(points), frozenset[str]()
    has_measured = False
    with ExitStack() as stack:
        truths = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="attnbench-")))
        other = _OtherSide(reference, subject, tell, stack)
        for rounds in (range(FUTILITY_ROUNDS), range(FUTILITY_ROUNDS, ROUNDS)):
            if not going:
                break
            with subject.folder.open_run(subject.header, resume=True) as run:
                for number in rounds:
                    if not (_left(subject, going, number, run) or other.left(going, number, run)):
                        continue
                    has_measured = True
                    tell(f"round {number + 1} of {ROUNDS}: {len(going)} points")
                    if number % 2:
                        other.measure(going, number, run)
                    _measure(subject, going, number, run, truths, progress, tell)
                    if not number % 2:
                        other.measure(going, number, run)
            if rounds.start == 0:
                panel = Panel.of(subject.folder)
                gone = given_up(panel, run.run_id, {p.point_id for p in going}, settings)
                going = [point for point in going if point.point_id not in gone]
                if gone and has_measured:
                    tell(f"{len(gone)} points show nothing any more: not measured further")
    if points and not has_measured:
        tell(f"{len(points)} points were measured again already")
    return Confirmed(time.perf_counter() - started, gone, other.trouble)


def _left(subject: Subject, points: Sequence[PlannedPoint], number: int, run: Run) -> bool:
    """Whether this build has not measured all of `points` in a round."""
    stored = stored_points(run, subject.options)
    replicate = str(FIRST_CONFIRMATION + number)
    return any((point.point_id, replicate) not in stored for point in points)


def _measure(
    subject: Subject,
    points: Sequence[PlannedPoint],
    number: int,
    run: Run,
    truths: Path,
    progress: Progress | None,
    tell: Tell,
) -> None:
    options = replace(subject.options, replicates=1, first_replicate=FIRST_CONFIRMATION + number)
    run_sweep(
        points,
        run,
        options,
        subject.device,
        subject.environment,
        progress,
        tell,
        truths=truths,
    )


class _OtherSide:
    """The build before, started when it is first needed, and asked while it answers."""

    def __init__(self, python: str, subject: Subject, tell: Tell, stack: ExitStack) -> None:
        self.trouble = ""
        self._python = python
        self._subject = subject
        self._tell = tell
        self._stack = stack
        self._process: Reference | None = None
        self._failures = 0
        self._unable: set[str] = set()  # points that it cannot time: each would cost a timeout

    def left(self, points: Sequence[PlannedPoint], number: int, run: Run) -> list[PlannedPoint]:
        """Those of `points` that it has not measured in a round, and can be asked for."""
        if not self._python or self._failures >= _MAX_FAILURES:
            return []
        stored = stored_points(run, self._subject.options)
        replicate = str(FIRST_REFERENCE + number)
        return [
            point
            for point in points
            if (point.point_id, replicate) not in stored and point.point_id not in self._unable
        ]

    def measure(self, points: Sequence[PlannedPoint], number: int, run: Run) -> None:
        """Its turn of a round. What fails is told, and is nobody's error."""
        todo = self.left(points, number, run)
        if not todo:
            return
        replicate, options = FIRST_REFERENCE + number, self._subject.options
        try:
            if self._process is None:
                self._process = self._stack.enter_context(open_reference(self._python))
            rows = self._process.measure(todo, options, replicate, run.run_id)
        except AttnBenchError as error:
            self._failures += 1
            self.trouble = str(error)
            self._tell(f"round {number + 1} has no times of the build before: {error}")
            if self._process is not None:
                self._process.close()
                self._process = None
            return
        heads = {point.point_id: point.metric for point in todo}

        def is_head(row: Measurement) -> bool:
            return row.metric == heads[row.point_id] and row.l2_state not in options.l2_states[1:]

        self._unable |= heads.keys() - {row.point_id for row in rows if row.samples}
        # As in a sweep: the row that says that a point is stored goes last.
        for row in sorted(rows, key=is_head):
            if row.key not in run.done:
                run.append(row)
