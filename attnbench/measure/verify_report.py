"""What `attnbench verify` says: rows of its table, and a report to paste into an issue."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from attnbench.measure.verify import Finding, Verification
from attnbench.measure.verify_shrink import Smallest
from attnbench.store.record import Status
from attnbench.workload import Workload
from attnbench.workload.batch_spec import format_batch_spec

COLUMNS = (
    *("backend", "against", "status", "difference"),
    *("call_error", "step_error", "drift", "tolerance", "reasons"),
)
REFERENCE = "reference"


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
    return f"{ran} run{others}; all differences are rounding: at most {worst:.2f} of the tolerance"


def reproduce(workload: Workload, backend: str, steps: int) -> str:
    """The command that shows it again."""
    return f"attnbench verify {shlex.quote(workload.text)} --backend {backend} --steps {steps}"


def issue_report(found: Verification, smallest: Mapping[str, Smallest]) -> str:
    """Markdown. `smallest`: by the name of a failed backend; one that is missing was not shrunk."""
    parts = [_title(found)]
    parts += [_failure(found, finding, smallest.get(finding.name)) for finding in found.failed]
    parts.append(_context(found))
    return "\n".join(parts)


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
    lines += ["", "Reproduce:", "", "```"]
    if small is None:
        lines += [reproduce(found.workload, finding.name, found.steps), "```", ""]
        return "\n".join(lines)
    how_far = "nothing smaller fails" if small.is_final else "stopped there"
    lines += [
        reproduce(small.workload, finding.name, small.steps),
        "```",
        "",
        f"Smallest failing batch found ({small.tries} tries, {how_far}):",
        "",
        *_batch_lines(small.workload, small.steps),
        *[f"- {reason}" for reason in small.outcome.reasons],
        "",
    ]
    return "\n".join(lines)


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
