"""A worker: a process of its own that does one task at a time, and may die or hang doing it.

`WorkerProcess` is the parent's end; `serve` is what runs in the process. Whatever a kernel does,
the parent learns of it in bounded time: an answer, a death with its cause, or a timeout.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnbench.backends.device import Device
from attnbench.errors import AttnBenchError
from attnbench.measure.environment import Environment
from attnbench.measure.health import HealthCheck, check_device
from attnbench.measure.options import MeasureOptions
from attnbench.measure.plan import PlannedPoint
from attnbench.store.record import Status

if TYPE_CHECKING:
    from attnbench.measure.point import PointContext
    from attnbench.measure.verify_worker import VerifyTask

#: A worker's first answer to a point that is not refused.
TRUTH_KNOWN = "truth known"

#: Seconds a process that has closed its end of the pipe gets to end by itself.
_LAST_WORDS_S = 5.0

#: The variable that says which devices a process sees.
_VISIBLE = {"cuda": "CUDA_VISIBLE_DEVICES", "rocm": "HIP_VISIBLE_DEVICES"}


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """What a worker is told when it starts.

    Attributes:
        interpret: run Triton's kernels under its interpreter.
        health: proves that the device works; called at the start and when the parent asks.
        start_method: of `multiprocessing`. `spawn` gives every worker a memory layout of its own,
            as replicates need; `forkserver` starts in milliseconds.
    """

    run_id: str
    replicate: int
    device: Device
    environment: Environment
    options: MeasureOptions
    truth_folder: Path | None = None
    interpret: bool = False
    health: HealthCheck = check_device
    start_method: str = "spawn"


class Task(StrEnum):
    """What a worker can be asked."""

    MEASURE = "measure"  # a point; answers TRUTH_KNOWN unless it is refused, then its rows
    COMPILE = "compile"  # a point; answers seconds, or why it does not compile
    VERIFY = "verify"  # a VerifyTask; answers TRUTH_KNOWN, HAS_RUN, and how it did
    HEALTH = "health"  # answers "" or what is wrong with the device


class WorkerLostError(Exception):
    """A worker that is gone: never seen outside this room, where it becomes a row.

    `status` is CRASH, OOM or TIMEOUT; `reason` says how it ended.
    """

    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


class WorkerProcess:
    """One process. After a WorkerLostError and after `kill` it and all its children are gone."""

    def __init__(self, setup: WorkerSetup) -> None:
        """Start it; its first answer is "", or why it cannot work."""
        context: Any = multiprocessing.get_context(setup.start_method)
        self._connection: Connection
        self._connection, theirs = context.Pipe()
        self._oom_kills = oom_kills()
        self._process: BaseProcess = context.Process(
            target=serve, args=(theirs, setup), daemon=True, name="attnbench-worker"
        )
        # A Ctrl-C reaches the new process too until it has a session of its own, and would leave
        # its traceback behind. It inherits what is blocked; here the signal waits for the start.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process.start()
        except BaseException:
            self._connection.close()
            raise
        finally:
            theirs.close()
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        self._death = _watch(self._process)

    def send(self, task: Task, work: PlannedPoint | VerifyTask | None = None) -> None:
        """Give it a task. Raises WorkerLostError."""
        self._oom_kills = oom_kills()
        try:
            self._connection.send((task, work))
        except OSError:
            raise self._lost() from None

    def receive(self, limit_s: float, doing: str) -> Any:
        """Its next answer. Raises WorkerLostError; after `limit_s` it is killed."""
        # A worker's own child may hold the pipe open, so the end of the process is watched too.
        ready = wait([self._connection, self._death], timeout=limit_s)
        try:
            if self._connection in ready or self._connection.poll():
                return self._connection.recv()
        except (EOFError, OSError, pickle.UnpicklingError):
            raise self._lost() from None
        if ready:
            raise self._lost()
        self.kill()
        raise WorkerLostError(Status.TIMEOUT, f"killed after {limit_s:g} s of {doing}")

    def kill(self) -> None:
        """End it and everything it started. Killing twice does nothing."""
        if self._connection.closed:
            return
        self._connection.close()
        pid = self._process.pid
        if pid is not None:
            # The whole group: a compiler the worker started would go on beside the next timings.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
            self._process.kill()
            self._process.join()
        if self._death != self._process.sentinel:
            os.close(self._death)

    @staticmethod
    def first_ready(workers: Sequence[WorkerProcess], limit_s: float) -> list[WorkerProcess]:
        """Those of `workers` whose `receive` would not wait; none after `limit_s`."""
        sources = [source for worker in workers for source in (worker._connection, worker._death)]
        ready = wait(sources, timeout=limit_s)
        return [w for w in workers if w._connection in ready or w._death in ready]

    def _lost(self) -> WorkerLostError:
        wait([self._death], timeout=_LAST_WORDS_S)
        ended = bool(wait([self._death], timeout=0))
        self.kill()
        code = self._process.exitcode
        if not ended or code is None:
            return WorkerLostError(Status.CRASH, "the worker closed its connection")
        if code >= 0:
            return WorkerLostError(Status.CRASH, f"worker exited with {code}")
        if code == -signal.SIGKILL and oom_kills() > self._oom_kills:
            return WorkerLostError(
                Status.OOM, "the kernel killed the worker: the host is out of memory"
            )
        return WorkerLostError(Status.CRASH, f"worker killed by {signal.Signals(-code).name}")


def _watch(process: BaseProcess) -> int:
    """A descriptor that is ready when the process itself has ended, whatever it left running."""
    try:
        return os.pidfd_open(process.pid or 0)
    except (AttributeError, OSError):
        return process.sentinel


def oom_kills(counters: Path = Path("/proc/vmstat")) -> int:
    """Processes Linux has killed for want of memory since it started; 0 where it does not say."""
    with contextlib.suppress(OSError, ValueError):
        for line in counters.read_text(encoding="ascii").splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def serve(connection: Connection, setup: WorkerSetup) -> None:
    """Body of a worker: do what is sent until the other end is gone."""
    os.setsid()  # a group of its own: Ctrl-C is the parent's to handle, a kill takes children too
    _die_with_parent()
    _be_killed_first()
    os.dup2(2, 1)  # stdout is for results; what a kernel library prints goes to stderr
    see_one_device(setup.device)
    if setup.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are decorated
    try:
        setup.health(setup.device)
        context = make_context(setup)
    # Whatever it is, the parent must know it and says it better than a traceback.
    except Exception as error:
        connection.send(describe(error))
        return
    connection.send("")
    with contextlib.suppress(EOFError, OSError):
        while True:
            task, work = connection.recv()
            connection.send(_do(task, work, context, connection, setup))


def _do(
    task: Task,
    work: Any,
    context: PointContext,
    connection: Connection,
    setup: WorkerSetup,
) -> Any:
    if task is Task.HEALTH:
        try:
            setup.health(setup.device)
        except Exception as error:
            return describe(error)
        return ""
    if task is Task.VERIFY:
        from attnbench.measure.verify_worker import verify_point

        return verify_point(work, context, connection.send)
    if task is Task.COMPILE:
        from attnbench.measure.compile_ahead import compile_point

        started = time.perf_counter()
        try:
            compile_point(work, context.device)
        # The point itself will fail the same way, and its row will say so.
        except Exception as error:
            return describe(error)
        return time.perf_counter() - started
    from attnbench.measure.point import measure_point

    return measure_point(work, context, lambda: connection.send(TRUTH_KNOWN))


def describe(error: BaseException) -> str:
    """One line that says what an exception says."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return first if isinstance(error, AttnBenchError) else f"{type(error).__name__}: {first}"[:500]


def see_one_device(device: Device) -> None:
    """Let this process see one device only, the first of those the user lets us see.

    A worker is for one device; a library that looks for more would make contexts on all of them.
    """
    if (name := _VISIBLE.get(device.kind)) is not None:
        os.environ[name] = os.environ.get(name, "").split(",")[0] or "0"


def _die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies, even inside a kernel that hangs."""
    pr_set_pdeathsig = 1
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _be_killed_first() -> None:
    """Ask Linux to take the worker, not the parent that keeps the results, when memory is short."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def make_context(setup: WorkerSetup) -> PointContext:
    """What the points of one worker share."""
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
        host_floor_s=timer.host.floor_s(),
        truths=TruthCache(setup.truth_folder),
    )
