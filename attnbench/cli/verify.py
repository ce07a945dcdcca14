"""`attnbench verify`: is a backend right, and are two that differ both right?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attnbench.cli.output import Format, FormatOption, emit, note
from attnbench.cli.sweeping import BackendOption
from attnbench.cli.workload_options import (
    BlockSizeOption,
    DtypeOption,
    KVCacheDtypeOption,
    ShapeOption,
    workload_text,
)
from attnbench.errors import ExitCode, SelectionError, UsageError

if TYPE_CHECKING:
    from attnbench.measure.verify import Verification, Verifier
    from attnbench.measure.verify_shrink import Smallest

#: More would measure the drift of rounding, not find bugs.
_MAX_STEPS = 1000


def verify(
    ctx: typer.Context,
    spec: Annotated[
        list[str], typer.Argument(help="Batch spec and features: 2q9_8q1s400 window=64")
    ],
    shape: ShapeOption = "",
    dtype: DtypeOption = "",
    kv_cache_dtype: KVCacheDtypeOption = "",
    block_size: BlockSizeOption = 0,
    backend: BackendOption = None,
    steps: Annotated[
        int, typer.Option(help="Decode steps after the call, each fed by the one before.")
    ] = 8,
    timeout: Annotated[
        float | None,
        typer.Option(help="Wall seconds per backend before it is killed. Default: settings."),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            help="Write the issue report here. Default: only if something is wrong, "
            "attnbench-verify-ID.md in this folder.",
            show_default=False,
        ),
    ] = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """Compare every backend of this machine with the float64 reference and with each other.

    Exit code 4 if one is wrong, crashes or hangs, and an issue report with the smallest such batch.
    """
    from attnbench.measure.verify import Verifier, plan_verification
    from attnbench.measure.verify_report import (
        COLUMNS,
        conclusion,
        issue_report,
        verification_rows,
    )
    from attnbench.measure.verify_shrink import BUDGET_S
    from attnbench.selection import current_device
    from attnbench.settings import load_settings
    from attnbench.workload import Workload

    if not 0 <= steps <= _MAX_STEPS:
        raise UsageError(f"--steps {steps}: use 0 to {_MAX_STEPS}, e.g. --steps 8")
    settings = load_settings()
    timeout_s = settings.timeout_s if timeout is None else timeout
    text = workload_text(spec, ctx.params)
    if "{" in text:
        raise UsageError(f"{text!r}: verify takes one workload; write one without braces")
    workload = Workload.parse(text)
    if report is not None:
        _require_place(report)
    device = current_device()
    plan = plan_verification(workload, backend or [], device)
    if not plan:
        raise SelectionError(
            f"no backend of {device} takes {workload.text!r}; `attnbench backends` lists them"
        )
    with Verifier(device, timeout_s) as verifier:
        found = verifier.verify(plan, steps, note)
        if found.steps != steps:
            note(f"attn={workload.attn_type}: nothing is generated, so there are no decode steps")
        emit(verification_rows(found), format, COLUMNS)
        note(conclusion(found))
        smallest = _shrink_all(verifier, found, BUDGET_S, timeout_s)
    if report is None and found.failed:
        report = Path(f"attnbench-verify-{workload.id}.md")
    if report is not None and found.ran:
        _write(report, issue_report(found, smallest))
    if not found.ran:
        first = found.findings[0]
        raise SelectionError(
            f"{first.name} refuses {workload.text!r}: {'; '.join(first.outcome.reasons)}. "
            f"See who accepts it: attnbench explain {workload.text}"
        )
    raise typer.Exit(ExitCode.INCOMPLETE if found.failed else ExitCode.OK)


def _shrink_all(
    verifier: Verifier, found: Verification, budget_s: float, timeout_s: float
) -> dict[str, Smallest]:
    from dataclasses import replace

    from attnbench.measure.verify_shrink import shrink
    from attnbench.store.record import Status

    smallest: dict[str, Smallest] = {}
    for finding in found.failed:
        hangs = finding.outcome.status == Status.TIMEOUT
        limit = f"{budget_s + timeout_s * hangs:.0f} s; Ctrl-C: as small as it is by then"
        note(f"looking for the smallest batch that {finding.name} fails on (up to {limit})")
        planned = finding.planned
        small = shrink(
            found.workload,
            found.steps,
            finding.outcome,
            lambda workload, steps, planned=planned: verifier.ask(  # type: ignore[misc]
                replace(planned, workload=workload), steps
            ),
            budget_s=budget_s,
        )
        smallest[finding.name] = small
        note(f"{finding.name} fails on {small.workload.text!r} --steps {small.steps}")
        if small.is_stopped:
            break
    return smallest


def _require_place(path: Path) -> None:
    """Raises UsageError now where a report could not be written in minutes from now."""
    folder = path.parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        why = "is a folder" if path.is_dir() else f"cannot be written: {folder} is no such place"
        raise UsageError(f"--report {str(path)!r} {why}; name a file in a folder that is there")


def _write(path: Path, text: str) -> None:
    """Raises UsageError where it cannot be written."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"--report {str(path)!r} cannot be written ({error.strerror}); name another file"
        ) from error
    note(f"report: {path}")
