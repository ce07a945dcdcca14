"""Where points run: a worker process that may die, hang or be killed without costing the sweep.

A worker measures the points it is sent, one at a time. When it crashes or runs past its time, the
point in flight becomes a CRASH or TIMEOUT row and a fresh worker takes the next one. Replicates are
fresh workers by construction. Points of the fake timer run inline: there is nothing to isolate.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from attnbench.backends.device import Device
from attnbench.errors import InfrastructureError
from attnbench.measure.environment import Environment
from attnbench.measure.options import MeasureOptions
from attnbench.measure.plan import PlannedPoint
from attnbench.store.record import Measurement, Status

if TYPE_CHECKING:
    from attnbench.measure.point import PointContext, RowMaker

#: Seconds a worker may take to import torch and answer that it is ready.
_START_TIMEOUT_S = 180.0

#: Seconds the float64 reference of one point may take: it is ours, not the backend's.
_TRUTH_TIMEOUT_S = 900.0

#: A worker's first answer to a point that is not refused.
_TRUTH_KNOWN = "truth known"


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """What a worker is told when it starts."""

    run_id: str
    replicate: int
    device: Device
    environment: Environment
    options: MeasureOptions
    truth_folder: Path | None = None
    interpret: bool = False  # run Triton's kernels under its interpreter


class Executor(Protocol):
    """Measures one point after another."""

    def measure(self, planned: PlannedPoint) -> list[Measurement]: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class InlineExecutor:
    """Runs points in this process."""

    def __init__(self, setup: WorkerSetup) -> None:
        self._context = _context_of(setup)

    def measure(self, planned: PlannedPoint) -> list[Measurement]:
        from attnbench.measure.point import measure_point

        return measure_point(planned, self._context)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None


class WorkerExecutor:
    """Runs points in a process of its own and replaces it when it is lost."""

    def __init__(self, setup: WorkerSetup) -> None:
        self._setup = setup
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def measure(self, planned: PlannedPoint) -> list[Measurement]:
        if self._process is None:
            self._start()
        assert self._connection is not None
        maker = self._row_maker(planned)
        limit_s, doing = _TRUTH_TIMEOUT_S, "computing inputs and the reference, not the backend"
        try:
            self._connection.send(planned)
            while True:
                if not self._connection.poll(limit_s):
                    self._stop()
                    reason = f"killed after {limit_s:g} s of {doing}"
                    return [maker.row(Status.TIMEOUT, reasons=(reason,))]
                answer: str | list[Measurement] = self._connection.recv()
                if answer == _TRUTH_KNOWN:
                    limit_s, doing = self._setup.options.timeout_s, "running (timeout_s)"
                elif isinstance(answer, list):
                    break
        except (EOFError, OSError):
            return [maker.row(Status.CRASH, reasons=(self._cause_of_death(),))]
        if answer[0].status in (Status.ERROR, Status.OOM):
            # A sticky device error or memory that was not given back would fail the next point.
            self._stop()
        return answer

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=serve, args=(theirs, self._setup), daemon=True, name="attnbench-worker"
        )
        self._process.start()
        theirs.close()
        try:
            if not self._connection.poll(_START_TIMEOUT_S):
                raise EOFError
            self._connection.recv()
        except (EOFError, OSError):
            cause = self._cause_of_death()
            raise InfrastructureError(
                f"a worker process did not start ({cause}); run `attnbench backends` to see which "
                "library fails to load"
            ) from None

    def _cause_of_death(self) -> str:
        assert self._process is not None
        self._process.join(timeout=5)
        code = self._process.exitcode
        self._stop()
        if code is None:
            return "the worker closed its connection"
        if code < 0:
            name = signal.Signals(-code).name
            hint = " (out of memory?)" if -code == signal.SIGKILL else ""
            return f"worker killed by {name}{hint}"
        return f"worker exited with {code}"

    def _stop(self) -> None:
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            # The whole group: a compiler the worker started would go on beside the next timings.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid or 0, signal.SIGKILL)
            self._process.kill()
            self._process.join()
        self._process = self._connection = None

    def _row_maker(self, planned: PlannedPoint) -> RowMaker:
        """For the row of a point that is lost: its clock runs from now."""
        from attnbench.measure.point import RowMaker
        from attnbench.measure.timers import make_timer

        setup = self._setup
        timer = make_timer(setup.options)
        return RowMaker(planned, setup.run_id, setup.replicate, setup.environment, timer)


def make_executor(setup: WorkerSetup) -> Executor:
    """Inline for the fake timer; a worker process otherwise, and always for the interpreter."""
    if setup.options.timer == "fake" and not setup.interpret:
        return InlineExecutor(setup)
    return WorkerExecutor(setup)


def serve(connection: Connection, setup: WorkerSetup) -> None:
    """Body of a worker: measure what is sent until the other end is gone."""
    os.setsid()  # a group of its own: Ctrl-C is the parent's to handle, a kill takes children too
    _die_with_parent()
    os.dup2(2, 1)  # stdout is for results; what a kernel library prints goes to stderr
    if setup.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are decorated
    from attnbench.measure.point import measure_point

    context = _context_of(setup)
    connection.send("ready")
    while True:
        try:
            planned: PlannedPoint = connection.recv()
            connection.send(measure_point(planned, context, lambda: connection.send(_TRUTH_KNOWN)))
        except (EOFError, OSError):
            return


def _die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies, even inside a kernel that hangs."""
    pr_set_pdeathsig = 1
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _context_of(setup: WorkerSetup) -> PointContext:
    from attnbench.measure.point import PointContext
    from attnbench.measure.timers import make_timer
    from attnbench.measure.truth import TruthCache

    timer = make_timer(setup.options)
    return PointContext(
        run_id=setup.run_id,
        replicate=setup.replicate,
        device=setup.device,
        environment=setup.environment,
        options=setup.options,
        timer=timer,
        timer_floor_s=timer.floor_s(),
        truths=TruthCache(setup.truth_folder),
    )
