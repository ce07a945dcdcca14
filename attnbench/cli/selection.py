"""`attnbench backends`, `explain`, `matrix`: who is here, who would be chosen, and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnbench.cli.output import Format, FormatOption, emit, note
from attnbench.errors import AttnBenchError, UsageError

if TYPE_CHECKING:
    from attnbench.backends.device import Device
    from attnbench.selection import Candidate, Selection

DeviceOption = Annotated[
    str,
    typer.Option(
        "--device",
        help="sm90, 9.0, gfx942, gfx942+aiter, cpu, ...: it need not be here; auto: this machine. "
        "Default: settings, else auto.",
    ),
]


def backends(
    device: DeviceOption = "",
    format: FormatOption = Format.TABLE,
) -> None:
    """List every registered backend: who runs here, who does not, and what to install."""
    from attnbench.backends.registry import backend_names
    from attnbench.selection import platform_of, platform_problems, resolve_device
    from attnbench.settings import load_settings

    where = resolve_device(device or load_settings().device)
    present = platform_of(where).is_present(where)
    emit([_backend_row(name, where, present) for name in backend_names()], format)
    for problem in platform_problems():
        note(f"attnbench: warning: {problem}")


def _backend_row(name: str, device: Device, present: bool) -> dict[str, Any]:
    from attnbench.backends.declared.base import DeclaredBackend
    from attnbench.backends.registry import backend_entry, backend_status, get_backend_class
    from attnbench.errors import BackendUnavailableError

    entry = backend_entry(name)
    row: dict[str, Any] = {
        "backend": name,
        "status": "",
        "kind": "",
        "variants": "",
        "why": "",
        "owner": entry.owner,
        "class": entry.class_path,
    }
    try:
        cls = get_backend_class(name)
    except BackendUnavailableError as error:
        return row | {"status": "not installed", "why": str(error)}
    kind = ("sparse " if cls.is_sparse() else "") + ("MLA" if cls.is_mla() else "attention")
    row["kind"] = kind
    if entry.selection_only and issubclass(cls, DeclaredBackend):
        libraries = f"; in vLLM it needs {cls.libraries}" if cls.libraries else ""
        why = f"capabilities of {cls.version} ({cls.where}), nothing to run{libraries}"
        return row | {"status": "selection only", "why": why}
    row["variants"] = ", ".join(variant for variant in cls.get_variants(device) if variant)
    if entry.is_family and not backend_status(name):
        why = f"imported only when one is asked for: --backend {name}:NAME"
        return row | {"status": "on request", "kind": "many", "why": why}
    if not cls.supports_device(device):
        return row | {"status": "other device", "why": f"not for devices of kind {device.kind}"}
    missing = backend_status(name)
    if missing:
        return row | {"status": "not installed", "why": missing}
    if device.kind == "cpu" and cls.interpreted_on_cpu:
        why = "Triton's interpreter: results are checked, times mean nothing"
        return row | {"status": "interpreted", "why": why}
    unable = backend_status(name, device) if present else None
    return row | {"status": "not runnable" if unable else "available", "why": unable or ""}


def explain(
    workload: Annotated[
        list[str] | None,
        typer.Argument(
            help="Workload text, e.g. 8q1s4k window=1024; features alone are enough: sinks=1"
        ),
    ] = None,
    shape: Annotated[str, typer.Option(help="Named attention shape, e.g. deepseek-v3.")] = "",
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16.")] = "",
    kv_cache_dtype: Annotated[
        str, typer.Option(help="auto, fp32, fp16, bf16, fp8_e4m3, fp8_e5m2 or fp8_ds_mla.")
    ] = "",
    block_size: Annotated[
        int, typer.Option(help="Demand this KV block size; 0: what the backend prefers.")
    ] = 0,
    device: DeviceOption = "",
    backend: Annotated[
        str, typer.Option(help="Ask for this backend: it wins or fails with its reasons.")
    ] = "",
    log: Annotated[
        str,
        typer.Option(
            help="A vLLM server's log (gzip too, - for stdin): which backend it took, and whether "
            "that is what the selectors say."
        ),
    ] = "",
    model: Annotated[
        str, typer.Option(help="With --log: whose layers; a registered shape or a config.json.")
    ] = "",
    probe: Annotated[
        bool,
        typer.Option(
            "--probe",
            help="With --log: ask the log's own vLLM version too; downloads it if it is not here.",
        ),
    ] = False,
    choices: Annotated[
        Path | None,
        typer.Option(
            help="A table of `attnbench choose --save` to put before the platform's chain; refused "
            "on another device or with other package versions."
        ),
    ] = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """Show which backend a workload gets, or a server took, and every candidate's every reason."""
    import os

    if log:
        from attnbench.cli.server_log import explain_log

        if workload or backend or dtype or kv_cache_dtype or block_size or choices:
            raise UsageError("--log says what was asked for; of the others it takes --model")
        explain_log(log, model or shape, device, ask_vllm=probe, format=format)
        return
    if model or probe:
        raise UsageError("--model and --probe are of --log; name a log with it")

    from attnbench.selection import config_of, consider, find_request, resolve_device, select
    from attnbench.settings import load_settings
    from attnbench.workload import Workload

    given = {"shape": shape, "dtype": dtype, "kv": kv_cache_dtype}
    words = [*(workload or []), *(f"{key}={value}" for key, value in given.items() if value)]
    text = " ".join(words)
    if not text or "=" in text.split()[0]:
        text = f"q1s1k {text}".strip()
    parsed = Workload.parse(text)
    config = config_of(parsed, leave_free=True)
    if block_size < 0:
        raise UsageError(f"--block-size {block_size}: write a positive number, e.g. 16")
    if block_size:
        config = config._replace(block_size=block_size)
    settings = load_settings()
    where = resolve_device(device or settings.device)
    if choices is not None:
        from attnbench.choose.table import use_saved

        use_saved(choices)
    request = find_request(backend or None, settings.backend, os.environ)
    for warning in request.warnings:
        note(f"attnbench: warning: {warning}")
    name = request.name
    selection = consider(config, where, name or None)
    listed = selection.candidates
    if name:
        listed += consider(config, where).candidates
    rows = [_candidate_row(candidate, selection) for candidate in listed]
    if format is Format.JSON:
        _print_json(parsed.text, selection, request.origin, rows)
    else:
        if format is Format.TABLE:
            _print_summary(parsed.text, selection, request.origin)
        emit(rows, format)
    if not selection.backend:
        try:
            select(config, where, name or None)
        except AttnBenchError as error:
            raise type(error)(
                f"{request.origin}: {error}" if request.origin else str(error)
            ) from None


def _candidate_row(candidate: Candidate, selection: Selection) -> dict[str, Any]:
    taken = candidate.accepted and candidate == _chosen(selection)
    verdict = "taken" if taken else "accepts" if candidate.accepted else "refuses"
    return {
        "backend": candidate.name,
        "source": f"{candidate.source} {candidate.priority}",
        "verdict": verdict,
        "reasons": list(candidate.reasons),
        "note": candidate.note,
    }


def _chosen(selection: Selection) -> Candidate | None:
    return next((c for c in selection.candidates if c.accepted), None)


def _summary(workload: str, selection: Selection, origin: str) -> dict[str, str]:
    from attnbench.selection import describe_config

    device = f"{selection.device} ({'this machine' if selection.device_is_present else 'named'})"
    if not selection.device_is_present:
        device += ", libraries assumed installed"
    backend = selection.backend or "none"
    if selection.backend:
        backend += f" ({selection.source})"
    return {
        "workload": workload,
        "asks for": describe_config(selection.config),
        "device": device,
        "request": f"{selection.requested} ({origin})" if selection.requested else "none",
        "chain": selection.follows,
        "backend": backend,
        "followed": f"{selection.followed or 'none'} (what that version takes, all installed)",
        "notes": "; ".join(selection.notes),
    }


def _print_summary(workload: str, selection: Selection, origin: str) -> None:
    for key, value in _summary(workload, selection, origin).items():
        if value:
            print(f"{key:<9} {value}")
    print()


def _print_json(
    workload: str, selection: Selection, origin: str, rows: list[dict[str, Any]]
) -> None:
    import json

    answer = {
        "workload": workload,
        "device": str(selection.device),
        "device_is_present": selection.device_is_present,
        "requested": selection.requested,
        "requested_by": origin,
        "follows": selection.follows,
        "backend": selection.backend,
        "variant": selection.variant,
        "source": str(selection.source) if selection.backend else "",
        "followed": selection.followed,
        "notes": list(selection.notes),
        "candidates": rows,
    }
    print(json.dumps(answer, indent=2))


def matrix(
    device: Annotated[
        list[str] | None,
        typer.Option(help="Device to show, here or not; repeat for several. Default: all known."),
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="bf16, fp16 or fp32; repeat. Default: all.")
    ] = None,
    feature: Annotated[
        list[str] | None,
        typer.Option(help="Feature to show, e.g. sinks or 'MLA fp8 KV'; repeat. Default: all."),
    ] = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """Show device × dtype × feature -> backend, with the reasons of better-ranked ones."""
    from attnbench.selection import resolve_device
    from attnbench.selection.matrix import matrix as cells

    devices = [resolve_device(text) for text in device or ()]
    found = list(cells(devices, dtype or (), feature or ()))
    emit([cell.row() for cell in found], format)
    for follows in dict.fromkeys(cell.follows for cell in found):
        named = dict.fromkeys(cell.device for cell in found if cell.follows == follows)
        note(f"{', '.join(named)}: chain of {follows}; followed: what that version itself takes")
