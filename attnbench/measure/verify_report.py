"""What `attnbench verify` says: rows of its table, and a report to paste into an issue.

A report is pasted in public, so names of hosts, accounts and folders are taken out of what others
wrote into it (reasons, tracebacks); files of source keep their names and lines.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import re
import secrets
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from attnbench.backends.registry import backend_entry
from attnbench.measure.verify import Finding, Verification
from attnbench.measure.verify_shrink import Smallest
from attnbench.measure.verify_worker import VerifyOutcome
from attnbench.store.anonymous import Anonymizer, names_here, users_in
from attnbench.store.record import Status
from attnbench.workload import Workload
from attnbench.workload.batch_spec import format_batch_spec

COLUMNS = (
    *("backend", "against", "status", "difference"),
    *("call_error", "step_error", "drift", "tolerance", "reasons"),
)
REFERENCE = "reference"

#: A right backend is named if it is so many times as far off as the nearest.
_OUTLIER = 5.0

#: Lines of a traceback, from its end, that go into a report.
_TRACE_LINES = 30

#: A file of source within a path: its own name tells nothing of anybody.
_SOURCE = re.compile(
    r"(?<![\w>])/(?:[\w.+-]+/)+([\w.+-]+\.(?:py|cu|cuh|cc|cpp|cxx|c|h|hpp|inl|so)\b)"
)


def verification_rows(found: Verification) -> list[dict[str, Any]]:
    """A row for each backend against the reference, and for each pair of backends."""
    rows = [
        {
            "backend": finding.name,
            "against": REFERENCE,
            "status": str(finding.outcome.status),
            "difference": finding.difference,
            "call_error": _short(finding.call_error),
            "step_error": _short(finding.step_error),
            "drift": _short(finding.drift),
            "tolerance": _short(found.tolerance),
            "reasons": list(finding.outcome.reasons),
        }
        for finding in found.findings
    ]
    rows += [
        {
            "backend": pair.first.name,
            "against": pair.second.name,
            "status": "",
            "difference": pair.difference,
            "call_error": _short(pair.call),
            "step_error": None,
            "drift": _short(pair.drift),
            # Each may be off by its own.
            "tolerance": _short(2 * found.tolerance),
            "reasons": [f"{' and '.join(pair.wrong)} is wrong"] if pair.wrong else [],
        }
        for pair in found.pairs
    ]
    return rows


def _short(number: float | None) -> float | None:
    return None if number is None else float(f"{number:.3g}")


def conclusion(found: Verification) -> str:
    """One sentence: rounding, or who is wrong."""
    ran = len(found.ran)
    refused = len(found.findings) - ran
    others = f", {refused} refused" if refused else ""
    if failed := found.failed:
        named = ", ".join(f"{finding.name} ({finding.outcome.status})" for finding in failed)
        return f"{ran} run{others}; wrong: {named}"
    errors = [
        error
        for finding in found.ran
        for error in (finding.call_error, finding.step_error)
        if error is not None
    ]
    if not errors:
        return f"none run{others}"
    worst = max(errors) / found.tolerance
    return (
        f"{ran} run{others}; all differences are rounding: at most {worst:.2g} of the tolerance"
        f"{_outliers(found)}"
    )


def _outliers(found: Verification) -> str:
    """Right backends that are much further off than the nearest: formats may explain it, or not."""
    errors = {
        f.name: max(f.call_error, f.step_error or 0.0)
        for f in found.ran
        if f.call_error is not None
    }
    nearest = min(errors, key=lambda name: errors[name])
    far = [
        f"{name} is {error / errors[nearest]:.0f} times as far off as {nearest}"
        for name, error in errors.items()
        if error > _OUTLIER * errors[nearest] > 0
    ]
    return f"; but {', '.join(far)}: does it round more by design?" if far else ""


def reproduce(workload: Workload, backend: str, steps: int) -> str:
    """The command that shows it again."""
    return f"attnbench verify {shlex.quote(workload.text)} --backend {backend} --steps {steps}"


def issue_report(found: Verification, smallest: Mapping[str, Smallest]) -> str:
    """Markdown. `smallest`: by the name of a failed backend; one that is missing was not shrunk."""
    anonymous = _anonymizer(found, smallest)
    found = _without_names(found, anonymous)
    smallest = {
        name: replace(small, outcome=_nameless(small.outcome, anonymous))
        for name, small in smallest.items()
    }
    parts = [_title(found)]
    parts += [_failure(found, finding, smallest.get(finding.name)) for finding in found.failed]
    parts.append(_context(found))
    return "\n".join(parts)


def _anonymizer(found: Verification, smallest: Mapping[str, Smallest]) -> Callable[[str], str]:
    hosts, users, homes = names_here()
    outcomes = [f.outcome for f in found.findings] + [small.outcome for small in smallest.values()]
    texts = [text for outcome in outcomes for text in (*outcome.reasons, outcome.trace)]
    anonymizer = Anonymizer(
        secrets.token_bytes(32),
        hosts={*hosts, found.environment.hostname},
        users=users | users_in(texts),
        homes=homes,
        gpus=[found.environment.device_uuid],
    )
    return lambda text: anonymizer.text(_SOURCE.sub(r"<path>/\1", text))


def _without_names(found: Verification, anonymous: Callable[[str], str]) -> Verification:
    findings = tuple(
        replace(finding, outcome=_nameless(finding.outcome, anonymous))
        for finding in found.findings
    )
    return replace(found, findings=findings)


def _nameless(outcome: VerifyOutcome, anonymous: Callable[[str], str]) -> VerifyOutcome:
    trace = "\n".join(anonymous(line) for line in outcome.trace.splitlines())
    return replace(outcome, reasons=tuple(map(anonymous, outcome.reasons)), trace=trace)


def _title(found: Verification) -> str:
    where = f"{found.environment.device_name} ({found.device})"
    if not found.failed:
        return f"# No backend is wrong on {where}\n\n{conclusion(found)}.\n"
    listed = ", ".join(finding.name for finding in found.failed)
    verb = "fails" if len(found.failed) == 1 else "fail"
    return f"# {listed} {verb} on {where}\n"


def _failure(found: Verification, finding: Finding, small: Smallest | None) -> str:
    lines = [f"## {finding.name}: {finding.outcome.status}", ""]
    lines += [f"- {reason}" for reason in finding.outcome.reasons]
    if finding.outcome.status == Status.INCORRECT:
        lines.append(
            f"- a right result is within {found.tolerance:.3g} of each row's size: this difference "
            "is a bug, not rounding"
        )
    lines.append(f"- backend: {_owner(finding)}")
    if finding.outcome.trace:
        kept = finding.outcome.trace.strip().splitlines()[-_TRACE_LINES:]
        lines += ["", "```", *kept, "```"]
    lines += ["", "Reproduce:", "", "```"]
    if small is None:
        lines += [reproduce(found.workload, finding.name, found.steps), "```", ""]
        return "\n".join(lines)
    tries = f"{small.tries} {'try' if small.tries == 1 else 'tries'}"
    how_far = "nothing smaller fails" if small.is_final else "stopped there"
    lines += [
        reproduce(small.workload, finding.name, small.steps),
        "```",
        "",
        f"Smallest failing batch found ({tries}, {how_far}):",
        "",
        *_batch_lines(small.workload, small.steps),
        *[f"- {reason}" for reason in small.outcome.reasons],
        "",
    ]
    return "\n".join(lines)


def _owner(finding: Finding) -> str:
    """Where the code of a backend comes from: a name alone does not say it."""
    entry = backend_entry(finding.planned.backend)
    package = entry.owner.removeprefix("package ")
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # a program registered it
        package += f" {importlib.metadata.version(package)}"
    return f"`{entry.class_path}` of {package}"


def _batch_lines(workload: Workload, steps: int) -> list[str]:
    shape = workload.shape
    heads = f"heads {shape.num_heads}/{shape.num_kv_heads} of size {shape.head_size}"
    if shape.v_head_size != shape.head_size:
        heads += f" (values {shape.v_head_size})"
    if shape.is_mla:
        heads += (
            f", MLA {shape.kv_lora_rank} + {shape.qk_rope_head_dim} latent, "
            f"{shape.qk_nope_head_dim} without rotation"
        )
    features = [
        f"{name} {value:g}" if value is not True else name
        for name, value in (
            ("window", shape.sliding_window),
            ("soft cap", shape.logits_soft_cap),
            ("sinks", shape.has_sink),
            ("ALiBi", shape.use_alibi),
            ("shared prefix", workload.common_prefix_len),
        )
        if value
    ]
    batch = format_batch_spec(workload.batch_spec)
    cache = f"KV cache {workload.resolved_kv_cache_dtype} in blocks of {workload.block_size}"
    lines = [
        f"- workload: `{workload.text}`",
        f"- requests: `{batch}` ({workload.attn_type}), then {steps} decode steps",
        f"- shape: {heads}; {workload.dtype}, {cache}, {workload.kv_cache_layout}",
    ]
    if features:
        lines.append(f"- features: {', '.join(features)}")
    lines.append(f"- seeds: `seed={workload.seed}`, data drawn from workload id `{workload.id}`")
    return lines


def _context(found: Verification) -> str:
    environment = found.environment
    device = [environment.device_name, str(found.device)]
    if environment.driver_version:
        device += [f"driver {environment.driver_version}", f"CUDA {environment.cuda_version}"]
    commit = f" at {environment.commit}" if environment.commit else ""
    legend = (
        "Errors are of the worst (token, head) row, relative to its size: `call_error` of one "
        "call, `step_error` of a decode step against the reference for the same inputs, `drift` "
        "what fed steps add up to (not judged)."
    )
    lines = [
        "## As found",
        "",
        *_batch_lines(found.workload, found.steps),
        f"- command: `{_typed(found)}`",
        f"- on {datetime.now(UTC):%Y-%m-%d} with {platform.system()} {platform.release()}",
        f"- device: {', '.join(device)}",
        f"- attnbench {environment.harness_version}{commit}",
        f"- versions: {', '.join(environment.stack)}",
        "",
        legend,
        "",
        *_table(verification_rows(found)),
        "",
    ]
    return "\n".join(lines)


def _typed(found: Verification) -> str:
    backends = " ".join(f"--backend {finding.name}" for finding in found.findings)
    return f"attnbench verify {shlex.quote(found.workload.text)} {backends} --steps {found.steps}"


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in rows:
        cells = [_cell(row[name]).replace("|", "\\|") for name in COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _cell(value: object) -> str:
    if value is None:
        return ""
    return "; ".join(map(str, value)) if isinstance(value, list) else str(value)
