"""Run every capability that this machine can, and record it for `docs/backends.md`.

    python -m attnbench.measure.record_runs docs/backend-runs.csv [BACKEND ...]

A line for each backend, variant and capability that its predicates accept here and whose library is
here: right, or how it failed. Lines of other machines stay; those of what has
changed since go.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from attnbench.backends.registry import get_backend_class
from attnbench.errors import UsageError
from attnbench.measure.plan import PlannedPoint, runnable_backends
from attnbench.measure.point import is_interpreted
from attnbench.measure.verify import Verifier
from attnbench.selection import current_device
from attnbench.selection.capabilities import (
    CapabilityRun,
    accepting_variants,
    capabilities_of,
    format_runs,
    is_current,
    read_runs,
)
from attnbench.store.record import Status

#: Decode steps after each call.
STEPS = 2
#: A kernel may be compiled, or interpreted.
_TIMEOUT_S = 300.0
#: Of the installed versions these are worth a column.
_SHOWN = ("torch", "triton", "flash-attn", "flashinfer-python", "flash-mla", "vllm")


def record(verifier: Verifier, names: Sequence[str]) -> Iterator[CapabilityRun]:
    """Run what `names` accept on the verifier's device; refusals have no line."""
    environment, device = verifier.environment, verifier.device
    stack = [word.replace("==", " ") for word in environment.stack]
    versions = ", ".join(word for word in stack if word.split()[0] in _SHOWN)
    for name in names:
        backend = get_backend_class(name)
        for capability, workload in capabilities_of(backend).items():
            for variant in accepting_variants(backend, workload, device):
                outcome = verifier.ask(PlannedPoint(workload, name, variant), STEPS)
                if outcome.status == Status.UNSUPPORTED:
                    continue
                yield CapabilityRun(
                    backend=name,
                    variant=variant,
                    capability=capability,
                    workload=workload.text,
                    device=str(device),
                    hardware=environment.device_name,
                    date=datetime.now(UTC).strftime("%Y-%m-%d"),
                    status=str(outcome.status),
                    interpreted="interpreted" if is_interpreted(backend, device) else "",
                    versions=versions,
                )


def main(arguments: Sequence[str]) -> None:
    """Run and record. Raises UsageError, InfrastructureError."""
    if not arguments:
        raise UsageError(
            "name the file: python -m attnbench.measure.record_runs docs/backend-runs.csv"
        )
    path, names = Path(arguments[0]), arguments[1:]
    runs = [run for run in read_runs(path) if is_current(run)]
    with Verifier(current_device(), _TIMEOUT_S) as verifier:
        device = verifier.device
        all_here = [*runnable_backends(device, is_mla=False), *runnable_backends(device, True)]
        for run in record(verifier, names or all_here):
            print(run.backend, run.variant, run.capability, run.status, file=sys.stderr)
            runs.append(run)
            # After each: whatever stops this, what was run is kept.
            path.write_text(format_runs(runs), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
