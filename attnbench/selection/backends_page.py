"""`docs/backends.md`: what every backend accepts, asked of its predicates, and what was run where.

    python -m attnbench.selection.backends_page docs

reads `docs/backend-runs.csv` and rewrites `docs/backends.md`. A test does the same and compares.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from attnbench.backends.abstract import AttentionBackend, MultipleOf
from attnbench.backends.device import Device, cuda_device
from attnbench.backends.dtypes import torch_dtype
from attnbench.backends.registry import backend_entry, backend_names, get_backend_class
from attnbench.errors import UsageError
from attnbench.selection.capabilities import (
    CapabilityRun,
    accepting_variants,
    capabilities_of,
    describe_numbers,
    is_current,
    read_runs,
)
from attnbench.selection.config import config_of
from attnbench.workload.text import DTYPES, KV_CACHE_DTYPES

RUNS = "backend-runs.csv"
PAGE = "backends.md"
DEVICES = (
    Device("cpu"),
    cuda_device(8, 0),
    cuda_device(9, 0),
    cuda_device(10, 0),
    Device("rocm", "gfx942"),
)
_MAX_HEAD_SIZE = 640

_HEAD = """\
# Backends

Generated: `python -m attnbench.selection.backends_page docs` rewrites this page from the backends'
own predicates and from `docs/backend-runs.csv`, and a test compares. Not to be edited.

What was run is recorded by one command, on the machine it runs on, for every backend and library
that is there; each capability is a small workload (`attnbench/selection/capabilities.py`), compared
with the float64 reference as `attnbench verify` does, over a call and two decode steps:

```
python -m attnbench.measure.record_runs docs/backend-runs.csv
```
"""

_LEGEND = """\
In the tables below: – is refused; *not run* is accepted by the predicates and was never run on such
a device; a date says when it was last run there, and was right unless it says otherwise. Names are
of variants, where not all of them are meant. ⁱ: by Triton's interpreter, which says nothing about
a GPU.
"""


def backends_page(runs: Sequence[CapabilityRun]) -> str:
    """The page. Depends on no library and no device being here."""
    names = [name for name in backend_names() if _is_ours(name)]
    runs = [run for run in runs if run.backend in names and is_current(run)]
    runnable = [name for name in names if not backend_entry(name).selection_only]
    parts = [
        _HEAD,
        "## Run on\n\n" + "\n".join(_hardware(runs)),
        "## Capabilities\n\n" + "\n".join(_summary(runnable)),
        "## Known to the selector only\n\n"
        "Declared with the capabilities vLLM has for them; attnbench has nothing to run.\n\n"
        + "\n".join(_summary([name for name in names if name not in runnable])),
        "## Capability by device\n\n" + _LEGEND,
        *(f"### {name}\n\n" + "\n".join(_capabilities(name, runs)) for name in runnable),
    ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _is_ours(name: str) -> bool:
    entry = backend_entry(name)
    return entry.owner == "attnbench" and not entry.is_family


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def _hardware(runs: Sequence[CapabilityRun]) -> Iterator[str]:
    rows = []
    for device in DEVICES:
        here = [run for run in runs if run.device == str(device)]
        if not here:
            rows.append([str(device), "not yet run", "", "", ""])
        for hardware in sorted({run.hardware for run in here}):
            mine = [run for run in here if run.hardware == hardware]
            dates = sorted({run.date for run in mine})
            wrong = sum(run.status != "OK" for run in mine)
            result = f"{len(mine) - wrong} right" + (f", {wrong} not" if wrong else "")
            versions = sorted({run.versions for run in mine})
            span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
            rows.append([str(device), hardware, span, result, "; ".join(versions)])
    yield from _table(
        ["device", "hardware", "when", "backend × variant × capability", "with"], rows
    )


def _summary(names: Sequence[str]) -> Iterator[str]:
    header = ["backend", "kind", "head sizes", "dtypes", "KV cache", "block sizes", "devices"]
    yield from _table([*header, "variants"], [_summary_row(name) for name in names])


def _summary_row(name: str) -> list[str]:
    backend = get_backend_class(name)
    sparse = "sparse " if backend.is_sparse() else ""
    devices = [device for device in DEVICES if _supports(backend, device)]
    plain = config_of(next(iter(capabilities_of(backend).values())))

    def accepts(**changes: Any) -> bool:
        """Whether no device has this very field to complain about."""
        (field,) = changes
        return any(
            f"{field} not supported"
            not in backend.validate_configuration(plain._replace(**changes), device)
            for device in devices or DEVICES
        )

    sizes = [size for size in range(1, _MAX_HEAD_SIZE + 1) if accepts(head_size=size)]
    any_size = len(sizes) == _MAX_HEAD_SIZE
    variants = dict.fromkeys(
        variant for device in devices for variant in backend.get_variants(device) if variant
    )
    return [
        name,
        f"{sparse}{'MLA' if backend.is_mla() else 'attention'}",
        "any" if any_size else describe_numbers(sizes),
        ", ".join(dtype for dtype in DTYPES if accepts(dtype=torch_dtype(dtype))),
        ", ".join(dtype for dtype in KV_CACHE_DTYPES if accepts(kv_cache_dtype=dtype)),
        _block_sizes(backend),
        ", ".join(map(str, devices)) or "none of these",
        ", ".join(variants) or "–",
    ]


def _supports(backend: type[AttentionBackend], device: Device) -> bool:
    capability = device.capability
    return backend.supports_device(device) and (
        capability is None or backend.supports_compute_capability(capability)
    )


def _block_sizes(backend: type[AttentionBackend]) -> str:
    """A framework's block may be a multiple of a kernel's: a number stands for its multiples."""
    sizes = backend.get_supported_kernel_block_sizes()
    bases = sorted({size.base if isinstance(size, MultipleOf) else size for size in sizes})
    if bases == [1]:
        return "any"
    return f"multiples of {' or '.join(map(str, bases))}"


def _capabilities(name: str, runs: Sequence[CapabilityRun]) -> Iterator[str]:
    backend = get_backend_class(name)
    devices = [device for device in DEVICES if _supports(backend, device)]
    mine = {run.key: run for run in runs if run.backend == name}
    rows = [
        [
            capability,
            *(
                _cell(
                    backend.get_variants(device),
                    accepting_variants(backend, workload, device),
                    {
                        variant: mine.get((name, variant, capability, str(device)))
                        for variant in backend.get_variants(device)
                    },
                )
                for device in devices
            ),
        ]
        for capability, workload in capabilities_of(backend).items()
    ]
    yield from _table(["capability", *map(str, devices)], rows)


def _cell(
    variants: Sequence[str], accepted: Sequence[str], runs: dict[str, CapabilityRun | None]
) -> str:
    """`2026-11-21: math; not run: flash`, variants left out where all of them are meant."""
    if not accepted:
        return "–"
    groups: dict[str, list[str]] = {}
    for variant in accepted:
        groups.setdefault(_said(runs[variant]), []).append(variant or "torch's choice")
    if len(groups) == 1 and len(accepted) == len(variants):
        return next(iter(groups))
    return "; ".join(f"{said}: {', '.join(names)}" for said, names in groups.items())


def _said(run: CapabilityRun | None) -> str:
    if run is None:
        return "*not run*"
    date = run.date + ("ⁱ" if run.interpreted else "")
    return date if run.status == "OK" else f"**{run.status}** {date}"


def main(arguments: Sequence[str]) -> None:
    """Rewrite the page in the folder named. Raises UsageError."""
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        raise UsageError(
            "name the folder of the page: python -m attnbench.selection.backends_page docs"
        )
    folder = Path(arguments[0])
    page = backends_page(read_runs(folder / RUNS))
    (folder / PAGE).write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
