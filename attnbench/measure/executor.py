"""Who measures the points of one round: a worker process that is replaced when it is lost."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self

from attnbench.errors import InfrastructureError
from attnbench.measure.plan import PlannedPoint
from attnbench.measure.point import RowMaker, measure_point
from attnbench.measure.timers import make_timer
from attnbench.measure.worker import (
    TRUTH_KNOWN,
    Task,
    WorkerLostError,
    WorkerProcess,
    WorkerSetup,
    make_context,
)
from attnbench.store.record import Measurement, Status

#: Seconds a worker may take to import torch and answer that it is ready.
START_TIMEOUT_S = 180.0

#: Seconds a small kernel may take on a device that works.
HEALTH_TIMEOUT_S = 60.0

#: Seconds the float64 reference of one point may take: it is ours, not the backend's.
TRUTH_TIMEOUT_S = 900.0

#: What the driver says when nothing in the process will work any more.
_STICKY = ("CUDA error", "HIP error", "AcceleratorError")


class Executor(Protocol):
    """Measures one point after another."""

    def measure(self, planned: PlannedPoint) -> list[Measurement]:
        """Rows of one try; the first is of the point's metric and carries the status.

        Raises InfrastructureError if no worker can be had that works.
        """
        ...

    def renew(self) -> None:
        """What comes next is measured by a fresh worker, which has proved that the device works.

        Raises InfrastructureError.
        """
        ...

    def look_after(self, rows: list[Measurement]) -> None:
        """After a point that had errors: prove that the worker still works, or renew it.

        Raises InfrastructureError.
        """
        ...

    def row(self, planned: PlannedPoint, status: Status, *reasons: str) -> Measurement:
        """The row of a point that was not measured."""
        ...

    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class _Executor:
    def __init__(self, setup: WorkerSetup) -> None:
        self.setup = setup

    def row(self, planned: PlannedPoint, status: Status, *reasons: str) -> Measurement:
        return self._row_maker(planned).row(status, reasons=reasons)

    def _row_maker(self, planned: PlannedPoint) -> RowMaker:
        setup = self.setup
        timer = make_timer(setup.options)
        return RowMaker(planned, setup.run_id, setup.replicate, setup.environment, timer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None


class InlineExecutor(_Executor):
    """Runs points in this process: there is nothing to isolate under the fake timer."""

    def __init__(self, setup: WorkerSetup) -> None:
        super().__init__(setup)
        self._context = make_context(setup)

    def measure(self, planned: PlannedPoint) -> list[Measurement]:
        return measure_point(planned, self._context)

    def renew(self) -> None:
        self._context = make_context(self.setup)

    def look_after(self, rows: list[Measurement]) -> None:
        return None


class WorkerExecutor(_Executor):
    """Runs points in a process of its own."""

    def __init__(self, setup: WorkerSetup) -> None:
        super().__init__(setup)
        self._worker: WorkerProcess | None = None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._drop()

    def measure(self, planned: PlannedPoint) -> list[Measurement]:
        worker = self._worker or self._start()
        maker = self._row_maker(planned)  # its clock runs from now
        limit_s, doing = TRUTH_TIMEOUT_S, "computing inputs and the reference, not the backend"
        try:
            worker.send(Task.MEASURE, planned)
            answer: str | list[Measurement] = worker.receive(limit_s, doing)
            if answer == TRUTH_KNOWN:
                answer = worker.receive(self.setup.options.timeout_s, "running (timeout_s)")
        except WorkerLostError as lost:
            self._worker = None
            return [maker.row(lost.status, reasons=(lost.reason,))]
        assert isinstance(answer, list)
        return answer

    def renew(self) -> None:
        self._drop()
        self._start()

    def look_after(self, rows: list[Measurement]) -> None:
        failed = [row for row in rows if _may_have_broken(row)]
        if self._worker is None or not failed:
            return  # a worker that was lost is followed by one that proves itself at its start
        if any(_poisons(row) for row in failed):
            self.renew()
            return
        try:
            self._worker.send(Task.HEALTH)
            sick = self._worker.receive(HEALTH_TIMEOUT_S, "a small kernel")
        except WorkerLostError as lost:
            sick = lost.reason
        if sick:
            self.renew()

    def _start(self) -> WorkerProcess:
        """A worker that has proved that the device works, at the second attempt if need be."""
        causes = []
        for _ in range(2):
            worker = WorkerProcess(self.setup)
            try:
                cause = worker.receive(START_TIMEOUT_S, "starting")
            except WorkerLostError as lost:
                cause = lost.reason
            if not cause:
                self._worker = worker
                return worker
            worker.kill()
            causes.append(cause)
        raise InfrastructureError(
            f"no worker process works on {self.setup.device}, and a fresh one did not either: "
            f"{causes[-1]}; mend that (`attnbench backends` names a library that fails to load, "
            f"nvidia-smi a device that is lost), then {self._again()}"
        )

    def _again(self) -> str:
        return f"go on with --resume {self.setup.run_id}"

    def _drop(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker = None


def _may_have_broken(row: Measurement) -> bool:
    uncaptured = row.status == Status.UNTIMED and row.execution == "graph"
    return row.status in (Status.ERROR, Status.OOM) or uncaptured


def _poisons(row: Measurement) -> bool:
    """Whether no later point can be trusted in this process, whatever a check may say."""
    return row.status == Status.OOM or any(
        mark in reason for reason in row.reasons for mark in _STICKY
    )


def make_executor(setup: WorkerSetup, isolate: bool = False) -> Executor:
    """Inline for the fake timer unless `isolate`; a worker process otherwise, and always for the
    interpreter."""
    if setup.options.timer == "fake" and not setup.interpret and not isolate:
        return InlineExecutor(setup)
    return WorkerExecutor(setup)
