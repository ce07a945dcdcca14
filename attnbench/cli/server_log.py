"""`attnbench explain --log`: which backend a server took, and whether the selectors agree."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from attnbench.cli.output import Format, emit, note

if TYPE_CHECKING:
    from attnbench.upgrade.log_verdict import LogVerdict
    from attnbench.upgrade.server_log import ServerLog


def explain_log(source: str, model: str, device: str, *, ask_vllm: bool, format: Format) -> None:
    """Print what the log says and, where the layer and the device are known, who agrees.

    Raises:
        UsageError, DataError: a log that cannot be read or is of no vLLM server, an unknown model
            or device.
    """
    from attnbench.upgrade.log_verdict import capability_of, causes, cells_of_log
    from attnbench.upgrade.probe import parse_capability
    from attnbench.upgrade.server_log import read_server_log

    log = read_server_log(source)
    # A device named by the user counts, also against the log.
    capability = parse_capability(device) if device else capability_of(log)
    cells = cells_of_log(log, model)
    verdicts: list[LogVerdict] = []
    if cells and capability:
        verdicts = _verdicts(log, cells, capability, ask_vllm=ask_vllm)
    missing = []
    if not capability:
        missing.append("the log names no device; say it with --device 9.0")
    if not cells:
        missing.append("the log does not describe the layers; say whose with --model CONFIG.JSON")
    _print(log, capability, verdicts, list(causes(log)), missing, format)


def _verdicts(log: ServerLog, cells: Any, capability: str, *, ask_vllm: bool) -> list[LogVerdict]:
    from attnbench.cli.downloads import TerminalTell
    from attnbench.upgrade import log_verdict

    answer = None
    if ask_vllm or log_verdict.is_cached(log.version):
        answer = log_verdict.ask_vllm(log, cells, capability, TerminalTell())
    return log_verdict.judge(log, cells, capability, answer)


def _print(
    log: ServerLog,
    capability: str,
    verdicts: list[LogVerdict],
    causes: list[str],
    missing: list[str],
    format: Format,
) -> None:
    rows = [
        {
            "cell": one.cell,
            "server took": ", ".join(one.taken) or "none",
            "our selector": one.ours,
            "vLLM's selector": one.vllm or "not asked",
            "verdict": "as expected" if one.agrees else "differs",
            "why": ". ".join(one.why),
        }
        for one in verdicts
    ]
    if format is Format.JSON:
        import json

        answer = {
            "log": asdict(log),
            "capability": capability or None,
            "causes": causes,
            "cells": [asdict(one) for one in verdicts],
            "missing": missing,
        }
        print(json.dumps(answer, indent=2))
        return
    if format is Format.TABLE:
        for name, text in _summary(log, capability, causes).items():
            if text:
                print(f"{name:<9} {text}")
        print()
    emit(rows, format)
    for text in missing:
        note(f"attnbench: not compared: {text}")


def _summary(log: ServerLog, capability: str, causes: list[str]) -> dict[str, str]:
    took = [
        f"{one.backend} (line {one.line}"
        + (f", of {', '.join(one.potential)})" if one.potential else ")")
        for one in log.taken
    ]
    device = capability if capability in ("", "cpu") else f"compute capability {capability}"
    restarts = f"; the last of {log.starts} starts" if log.starts > 1 else ""
    types = [log.dtype and f"dtype {log.dtype}"]
    types += [log.kv_cache_dtype and f"KV cache {log.kv_cache_dtype}"]
    types += [f"--block-size {log.block_size}" if log.block_size else ""]
    return {
        "vLLM": (log.version or "no version in the log") + restarts,
        "model": log.model,
        "types": ", ".join(one for one in types if one),
        "device": ", ".join(one for one in (log.device_name, device) if one),
        "took": "; ".join(took) or "no backend is named",
        "behind": "; ".join(f"{what} {', '.join(said)}" for what, said in log.behind.items()),
        "why": "; ".join(causes),
    }
