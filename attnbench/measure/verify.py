"""`attnbench verify`: every backend of a device against the truth and against each other.

**One call.** Every backend gets the workload's batch; its output is compared, row by row, with the
float64 reference (`backends/check.py`), and with the outputs of the others.

**Decode steps.** Then n tokens are generated, each step's inputs made from the step before by
fixed maps (`backends/decode_steps.py`). Two numbers come out of it:

- `step_error`: the largest error of a step against the reference *for the inputs this backend had
  in that step*. Rounding leaves it where one call has it, whatever happened before; a token that is
  not written, not read, or read at the wrong place does not. This is what is judged.
- `drift`: how far the backend is from the reference that fed itself in float64, rounding its
  tokens to the same formats. Two backends that are both right drift apart, the more the longer they
  run, as two engines that are both right write different texts; it is shown and not judged.

**Rounding or bug.** A call or step whose `error` is within `row_tolerance` (twice that of an honest
implementation of the same precision) is right, and so a difference between two right backends is
one of rounding. Anything else is a bug, of the backend that is off: the reference decides, not the
majority.

Backends run in worker processes, which may die or hang.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from attnbench.backends.check import row_tolerance
from attnbench.backends.device import Device
from attnbench.backends.registry import get_backend_class
from attnbench.errors import InfrastructureError, UsageError
from attnbench.measure.environment import Environment, read_environment
from attnbench.measure.executor import TRUTH_TIMEOUT_S, WorkerExecutor
from attnbench.measure.options import MeasureOptions
from attnbench.measure.plan import PlannedPoint, plan_workloads, runnable_backends
from attnbench.measure.point import is_interpreted
from attnbench.measure.verify_worker import (
    HAS_RUN,
    VerifyOutcome,
    VerifyTask,
    possible_steps,
)
from attnbench.measure.worker import TRUTH_KNOWN, Task, WorkerLostError, WorkerSetup
from attnbench.store.record import Status
from attnbench.workload import Workload

#: Rows compared at a time: a few MB.
_CHUNK_ROWS = 1 << 15


@dataclass(frozen=True, slots=True)
class Finding:
    """One backend's answer. `drift` is None where it has no steps or did not get through them."""

    planned: PlannedPoint
    outcome: VerifyOutcome
    drift: float | None = None

    @property
    def name(self) -> str:
        return f"{self.planned.backend}:{self.planned.variant}".rstrip(":")

    @property
    def call_error(self) -> float | None:
        checks = self.outcome.checks
        return checks[0].rel_error if checks else None

    @property
    def step_error(self) -> float | None:
        steps = [check.rel_error for check in self.outcome.checks[1:]]
        return max(steps) if steps else None

    @property
    def difference(self) -> str:
        """`rounding` or `bug`; "" where there was nothing to compare."""
        return {Status.OK: "rounding", Status.INCORRECT: "bug"}.get(self.outcome.status, "")


@dataclass(frozen=True, slots=True)
class Pair:
    """Two backends that gave an output each.

    call, drift: largest difference of a row of the call, and of any step's; None: no steps.
    is_equal: bit for bit, in all of them.
    """

    first: Finding
    second: Finding
    call: float
    drift: float | None
    is_equal: bool

    @property
    def wrong(self) -> list[str]:
        return [f.name for f in (self.first, self.second) if f.outcome.status != Status.OK]

    @property
    def difference(self) -> str:
        if self.wrong:
            return "bug"
        return "equal" if self.is_equal else "rounding"


@dataclass(frozen=True, slots=True)
class Verification:
    """What was found about one workload."""

    workload: Workload
    steps: int
    device: Device
    environment: Environment
    findings: tuple[Finding, ...]
    pairs: tuple[Pair, ...]

    @property
    def tolerance(self) -> float:
        """Largest relative error of a row that is rounding."""
        return row_tolerance(self.workload.dtype, self.workload.resolved_kv_cache_dtype)

    @property
    def failed(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.outcome.has_failed]

    @property
    def ran(self) -> list[Finding]:
        return [f for f in self.findings if f.outcome.status != Status.UNSUPPORTED]


def plan_verification(
    workload: Workload, backends: Sequence[str], device: Device
) -> list[PlannedPoint]:
    """`backends` as `run` takes them; for none, every variant of all that run on `device`.

    Raises UsageError for a step of a model, which `run` verifies itself.
    """
    if workload.is_step:
        raise UsageError(
            f"{workload.text!r} is a step of a model, which `attnbench run` checks as it measures; "
            f"verify its attention: {workload.attention.text}"
        )
    if backends:
        return plan_workloads([workload], backends, device)
    return [
        PlannedPoint(workload, name, variant)
        for name in runnable_backends(device, workload.shape.is_mla)
        for variant in get_backend_class(name).get_variants(device)
    ]


class Verifier:
    """Workers to verify in; one more under Triton's interpreter where backends need it.

    Args:
        timeout_s: seconds a backend may take for its calls before its worker is killed.
    """

    def __init__(self, device: Device, timeout_s: float, start_method: str = "spawn") -> None:
        self.device = device
        self.environment = read_environment(device)
        self._options = MeasureOptions(timer="fake", timeout_s=timeout_s)
        self._start_method = start_method
        self._open = ExitStack()
        self._executors: dict[bool, _VerifyingExecutor] = {}
        self._folder = Path()

    def __enter__(self) -> Self:
        self._folder = Path(
            self._open.enter_context(tempfile.TemporaryDirectory(prefix="attnbench-verify-"))
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.close()

    def ask(self, planned: PlannedPoint, steps: int, keep: Path | None = None) -> VerifyOutcome:
        """One backend on its own workload. Raises InfrastructureError if no worker works."""
        task = VerifyTask(planned, possible_steps(planned.workload, steps), keep)
        return self._executor(planned).verify(task)

    def verify(
        self,
        plan: Sequence[PlannedPoint],
        steps: int,
        tell: Callable[[str], object] = lambda line: None,
    ) -> Verification:
        """All of `plan`, which are points of one workload.

        Args:
            steps: decode steps after the call; none where nothing is generated.
            tell: gets a line about each backend as it is done.

        Raises:
            InfrastructureError: no worker works, or the reference itself cannot be computed.
        """
        workload = plan[0].workload
        steps = possible_steps(workload, steps)
        kept: dict[str, Path] = {}
        findings: list[Finding] = []
        truth: list[torch.Tensor] = []
        for number, planned in enumerate(plan):
            path = self._folder / f"{number}.pt"
            finding = Finding(planned, self.ask(planned, steps, path))
            if path.exists():
                kept[finding.name] = path
                truth = truth or self._reference(workload, steps)
                drift = list(_differences(_load(path), truth, truth))[1:]
                if len(drift) == steps and drift:
                    finding = Finding(planned, finding.outcome, max(drift))
            findings.append(finding)
            tell(f"{finding.name}: {finding.outcome.status}")
        pairs = [
            _compare(first, second, kept, truth)
            for first, second in combinations(findings, 2)
            if first.name in kept and second.name in kept
        ]
        return Verification(
            workload, steps, self.device, self.environment, tuple(findings), tuple(pairs)
        )

    def _reference(self, workload: Workload, steps: int) -> list[torch.Tensor]:
        """Outputs of the float64 reference that feeds itself."""
        path = self._folder / "reference.pt"
        outcome = self.ask(PlannedPoint(workload, ""), steps, path)
        if outcome.status != Status.OK:
            raise InfrastructureError(
                f"the reference of {workload.text!r} cannot be computed here "
                f"({'; '.join(outcome.reasons)}); use a smaller workload or another device"
            )
        return _load(path)

    def _executor(self, planned: PlannedPoint) -> _VerifyingExecutor:
        interpret = bool(planned.backend) and is_interpreted(
            get_backend_class(planned.backend), self.device
        )
        if interpret not in self._executors:
            setup = WorkerSetup(
                run_id="verify",
                replicate=0,
                device=self.device,
                environment=self.environment,
                options=self._options,
                truth_folder=self._folder,
                interpret=interpret,
                start_method=self._start_method,
            )
            self._executors[interpret] = self._open.enter_context(_VerifyingExecutor(setup))
        return self._executors[interpret]


class _VerifyingExecutor(WorkerExecutor):
    """A worker that verifies; replaced when it is lost, or no longer to be trusted."""

    def _again(self) -> str:
        return "verify again"

    def verify(self, task: VerifyTask) -> VerifyOutcome:
        worker = self._worker or self._start()
        try:
            worker.send(Task.VERIFY, task)
            doing = "computing inputs and the reference, not the backend"
            answer: str | VerifyOutcome = worker.receive(TRUTH_TIMEOUT_S, doing)
            if answer == TRUTH_KNOWN:
                answer = worker.receive(self.setup.options.timeout_s, "running (timeout_s)")
            if answer == HAS_RUN:
                answer = worker.receive(TRUTH_TIMEOUT_S, "comparing, not the backend")
        except WorkerLostError as lost:
            self._worker = None
            return VerifyOutcome(lost.status, (lost.reason,))
        assert isinstance(answer, VerifyOutcome)
        self.look_after([self.row(task.planned, answer.status, *answer.reasons)])
        return answer


def _load(path: Path) -> list[torch.Tensor]:
    outputs: list[torch.Tensor] = torch.load(path, weights_only=True)
    return outputs


def _compare(
    first: Finding, second: Finding, kept: dict[str, Path], truth: Sequence[torch.Tensor]
) -> Pair:
    one, other = _load(kept[first.name]), _load(kept[second.name])
    found = list(_differences(one, other, truth))
    same_length = len(one) == len(other)
    is_equal = same_length and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    return Pair(first, second, found[0], max(found[1:]) if found[1:] else None, is_equal)


def _differences(
    one: Sequence[torch.Tensor], other: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]
) -> Iterator[float]:
    """Largest |one - other| of a (token, head) row relative to the true row, per call: the measure
    of `check_output`. NaN where one is not finite."""
    for a, b, right in zip(one, other, truth, strict=False):
        size = right.shape[-1]
        floor = 0.1 * float(right.square().sum(-1).mean().sqrt())
        parts = (torch.split(t.reshape(-1, size), _CHUNK_ROWS) for t in (a, b, right))
        worst = 0.0
        for x, y, z in zip(*parts, strict=True):
            error = (x.double() - y.double()).norm(dim=-1) / z.norm(dim=-1).clamp_min(floor)
            value = float(error.max())
            worst = value if value != value else max(worst, value)
        yield worst
