"""Compile before anything is timed: each kernel once, in several processes at a time.

Libraries that compile at the first call keep what they compiled on disk, so workers that come later
load it in about a second. A backend says by `compilation_key` which points share a kernel. What is
on disk already is remembered beside it, by the sources and versions it was made from: a warm night
spends nothing here. A failure is no error of the sweep; the point itself will say what is wrong.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from attnbench.backends.abstract import AttentionBackend
from attnbench.backends.device import Device
from attnbench.backends.registry import get_backend_class
from attnbench.measure.executor import START_TIMEOUT_S
from attnbench.measure.plan import PlannedPoint
from attnbench.measure.point import is_interpreted, refusals
from attnbench.measure.worker import Task, WorkerLostError, WorkerProcess, WorkerSetup
from attnbench.store.record import Status, short_hash
from attnbench.workload.cost import attention_bytes

#: Processes that compile at a time, at most: each holds a context on the device.
_MAX_JOBS = 8

#: Fewer kernels than this are compiled by the worker that checks their points. On two cores the
#: start of two more processes, and the second look at each kernel, cost as much as four save.
_WORTH_IT = 4

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Compiled:
    """What was compiled ahead.

    Attributes:
        seconds: of each kernel, by the id of the point it was compiled with.
        failed: kernels that did not compile, or whose process was lost.
        duration_s: wall seconds of the whole phase.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    failed: int = 0
    duration_s: float = 0.0


def compile_ahead(plan: Sequence[PlannedPoint], setup: WorkerSetup, tell: Tell) -> Compiled:
    """Compile what the points of `plan` need and the disk does not have yet.

    `tell` gets a line when the phase begins and one for each kernel.
    """
    started = time.perf_counter()
    marks = _Marks(setup)
    wanted = kernels(plan, setup.device)
    todo = {key: point for key, point in wanted.items() if not marks.has(key, point)}
    if setup.options.timer == "fake" or len(todo) < _WORTH_IT:
        return Compiled()
    jobs = min(len(todo), len(os.sched_getaffinity(0)), _MAX_JOBS)
    tell(f"compiling {len(todo)} kernels in {jobs} processes before anything is timed")
    found = Compiled()
    failed = 0
    for key, planned, answer in _compile_all(todo, setup, jobs):
        if isinstance(answer, float):
            found.seconds[planned.point_id] = answer
            marks.set(key, planned)
            end = f"{answer:.1f} s"
        else:
            failed += 1
            end = f"not compiled: {answer}"
        done = len(found.seconds) + failed
        tell(f"  {done}/{len(todo)} {planned.backend} {planned.workload.text}: {end}")
    return Compiled(found.seconds, failed, time.perf_counter() - started)


def kernels(plan: Sequence[PlannedPoint], device: Device) -> dict[str, PlannedPoint]:
    """For each kernel that is compiled at its first call: the smallest point that uses it."""
    found: dict[str, PlannedPoint] = {}
    for planned in sorted(plan, key=lambda point: attention_bytes(point.workload)):
        backend = get_backend_class(planned.backend)
        if is_interpreted(backend, device):
            continue
        key = backend.compilation_key(planned.workload, planned.variant, device)
        if key:
            key = f"{planned.backend}:{planned.variant} {key}"
            if key not in found and not refusals(planned, device):
                found[key] = planned
    return found


def compile_point(planned: PlannedPoint, device: Device) -> None:
    """Call everything of one point that will be timed, once, on inputs of its own."""
    import torch

    from attnbench.backends.batch import make_batch
    from attnbench.measure.prepare import prepare

    threshold = get_backend_class(planned.backend).get_builder_cls().reorder_batch_threshold
    # The grad mode of the measurement: torch.compile guards on it.
    with torch.no_grad():
        point = prepare(planned, make_batch(planned.workload, device.torch_device, threshold))
        point.attend()
        for call in point.timed_calls().values():
            call()
        point.output().sum().item()  # waits for the device


@dataclass(slots=True)
class _Job:
    """One worker of the phase: what it compiles (None: it is starting), and until when."""

    worker: WorkerProcess
    task: tuple[str, PlannedPoint] | None
    deadline: float

    @classmethod
    def start(cls, setup: WorkerSetup) -> _Job:
        return cls(WorkerProcess(setup), None, time.monotonic() + START_TIMEOUT_S)

    def take(self, task: tuple[str, PlannedPoint], limit_s: float) -> None:
        """Raises WorkerLostError."""
        self.task, self.deadline = task, time.monotonic() + limit_s
        self.worker.send(Task.COMPILE, task[1])


def _compile_all(
    todo: dict[str, PlannedPoint], setup: WorkerSetup, count: int
) -> Iterator[tuple[str, PlannedPoint, float | str]]:
    """Each kernel with its seconds, or with why it was not compiled, as they end.

    A worker that is lost while it compiles is replaced; one that does not start is not.
    """
    waiting = list(reversed(todo.items()))
    jobs: list[_Job] = []
    try:
        jobs.extend(_Job.start(setup) for _ in range(count))
        while jobs:
            rest_s = min(job.deadline for job in jobs) - time.monotonic()
            ready = WorkerProcess.first_ready([job.worker for job in jobs], max(0.0, rest_s))
            for job in list(jobs):
                is_late = time.monotonic() >= job.deadline
                if job.worker not in ready and not is_late:
                    continue
                task = job.task
                try:
                    answer = job.worker.receive(0.0, "compiling")
                    if task is None and answer:
                        raise WorkerLostError(Status.CRASH, answer)
                    if waiting:
                        job.take(waiting.pop(), setup.options.timeout_s)
                    else:
                        job.worker.kill()
                        jobs.remove(job)
                except WorkerLostError as lost:
                    job.worker.kill()
                    jobs.remove(job)
                    answer = "it took too long" if is_late else lost.reason
                    if job.task is not None and waiting:
                        jobs.append(_Job.start(setup))
                if task is not None:
                    yield *task, answer
        for key, planned in waiting:
            yield key, planned, "no worker process started"
    finally:
        for job in jobs:
            job.worker.kill()


class _Marks:
    """Which kernels the compilers' cache on disk has: one empty file for each, inside that cache.

    Its name is a hash of everything the kernel is made from. A mark that is wrong (a second cache
    was emptied, not this one) costs a compilation in the worker that checks the point.
    """

    def __init__(self, setup: WorkerSetup) -> None:
        self._made_from = (
            *setup.environment.stack,
            setup.environment.device_class,
            os.environ.get("TRITON_CACHE_DIR", ""),
        )

    def has(self, key: str, planned: PlannedPoint) -> bool:
        return self._path(key, planned).exists()

    def set(self, key: str, planned: PlannedPoint) -> None:
        # A cache that cannot be written is one that has nothing: the next run compiles again.
        with suppress(OSError):
            path = self._path(key, planned)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

    def _path(self, key: str, planned: PlannedPoint) -> Path:
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        made_from = (*self._made_from, _sources(get_backend_class(planned.backend)), key)
        return Path(cache_dir()) / "attnbench" / short_hash("compiled", *made_from)


@cache
def _sources(backend: type[AttentionBackend]) -> str:
    """Hash of the Python files of the package that `backend` is defined in."""
    module = sys.modules[backend.__module__]
    file = Path(module.__file__ or "")
    files = sorted(file.parent.rglob("*.py")) if "." in module.__name__ else [file]
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        with suppress(OSError):
            digest.update(path.read_bytes())
    return digest.hexdigest()
