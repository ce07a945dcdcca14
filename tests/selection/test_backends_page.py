"""docs/backends.md is what the predicates say today, and says nothing of runs that were not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attnbench.backends.device import cuda_device, parse_device
from attnbench.backends.registry import backend_entry, backend_names, get_backend_class
from attnbench.errors import DataError, UsageError
from attnbench.selection.backends_page import DEVICES, PAGE, RUNS, backends_page, main
from attnbench.selection.capabilities import (
    ATTENTION,
    CapabilityRun,
    accepting_variants,
    capabilities_of,
    describe_numbers,
    format_runs,
    is_current,
    read_runs,
)
from attnbench.workload import Workload

DOCS = Path(__file__).parent.parent.parent / "docs"
RUN = CapabilityRun(
    backend="CPU_ATTN",
    variant="",
    capability="sinks",
    workload=Workload.parse(ATTENTION["sinks"]).text,
    device="cpu",
    hardware="a made-up CPU",
    date="2001-02-03",
    status="OK",
    interpreted="",
    versions="torch 9",
)


def section(page: str, backend: str) -> list[list[str]]:
    """Rows of the table of one backend, cells stripped."""
    lines = page.split(f"\n### {backend}\n", 1)[1].split("\n### ", 1)[0].splitlines()
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if line[:1] == "|"
    ]


def cell(page: str, backend: str, capability: str, device: str) -> str:
    header, _, *rows = section(page, backend)
    (row,) = (row for row in rows if row[0] == capability)
    return row[header.index(device)]


def test_the_page_in_the_repository_is_the_one_that_would_be_written() -> None:
    committed = (DOCS / PAGE).read_text(encoding="utf-8")
    assert committed == backends_page(read_runs(DOCS / RUNS)), (
        "write it anew: python -m attnbench.selection.backends_page docs"
    )


def test_the_committed_runs_are_of_known_backends_and_in_order() -> None:
    runs = read_runs(DOCS / RUNS)
    assert format_runs(runs) == (DOCS / RUNS).read_text(encoding="utf-8")
    for run in runs:
        assert backend_entry(run.backend).owner == "attnbench"
        assert run.capability in capabilities_of(get_backend_class(run.backend))
        assert parse_device(run.device) is not None
        assert run.hardware


def test_every_backend_of_ours_is_on_the_page_once() -> None:
    page = backends_page([])
    for name in backend_names():
        entry = backend_entry(name)
        if entry.owner != "attnbench" or entry.is_family:
            continue
        assert page.count(f"\n| {name} |") == 1, name
        assert page.count(f"\n### {name}\n") == (not entry.selection_only), name


def test_nothing_was_run_unless_a_line_says_so() -> None:
    page = backends_page([])
    for device in DEVICES:
        assert f"| {device} | not yet run |" in page
    assert "20" not in "".join(c for row in section(page, "CPU_ATTN") for c in row[1:])
    assert cell(page, "CPU_ATTN", "sinks", "cpu") == "*not run*"
    ran = backends_page([RUN])
    assert cell(ran, "CPU_ATTN", "sinks", "cpu") == "2001-02-03"
    assert cell(ran, "CPU_ATTN", "soft cap", "cpu") == "*not run*"
    assert "| cpu | a made-up CPU | 2001-02-03 | 1 right | torch 9 |" in ran
    assert "| sm90 | not yet run |" in ran


def test_a_failure_is_shown_as_one_and_the_interpreter_is_no_gpu() -> None:
    wrong = backends_page([replace(RUN, status="INCORRECT")])
    assert cell(wrong, "CPU_ATTN", "sinks", "cpu") == "**INCORRECT** 2001-02-03"
    assert "| 0 right, 1 not |" in wrong
    fp16 = Workload.parse(ATTENTION["fp16"]).text
    interpreted = replace(
        RUN, backend="TRITON_ATTN", capability="fp16", workload=fp16, interpreted="interpreted"
    )
    page = backends_page([interpreted])
    assert cell(page, "TRITON_ATTN", "fp16", "cpu") == "2001-02-03ⁱ"
    assert cell(page, "TRITON_ATTN", "fp16", "sm90") == "*not run*"


def test_variants_are_told_apart() -> None:
    window = Workload.parse(ATTENTION["sliding window"]).text
    run = replace(
        RUN, backend="TORCH_SDPA", variant="math", capability="sliding window", workload=window
    )
    said = cell(backends_page([run]), "TORCH_SDPA", "sliding window", "cpu")
    assert said == "*not run*: torch's choice, flash; 2001-02-03: math"


def test_a_run_of_what_is_now_something_else_or_refused_is_none() -> None:
    assert is_current(RUN)
    assert not is_current(replace(RUN, workload="q1s40"))
    assert not is_current(replace(RUN, capability="no longer known"))
    assert not is_current(replace(RUN, variant="gone"))
    assert not is_current(replace(RUN, device="sm90"))
    assert "a made-up CPU" not in backends_page([replace(RUN, workload="q1s40")])


def test_cells_are_the_predicates() -> None:
    page = backends_page([])
    for name in ("FLASH_ATTN", "TRITON_ATTN", "TRITON_MLA"):
        backend = get_backend_class(name)
        header, _, *rows = section(page, name)
        workloads = capabilities_of(backend)
        assert [row[0] for row in rows] == list(workloads)
        for row in rows:
            for device_text, said in zip(header[1:], row[1:], strict=True):
                device = parse_device(device_text)
                assert device is not None
                accepted = accepting_variants(backend, workloads[row[0]], device)
                assert (said == "–") == (not accepted), (name, row[0], device_text)
    # Known from the libraries: FA2 reads no fp8 cache, and FA2 and upstream FA3 have no sinks.
    assert cell(page, "FLASH_ATTN", "fp8_e4m3 KV cache", "sm80") == "–"
    flash = get_backend_class("FLASH_ATTN")
    sinks = accepting_variants(flash, Workload.parse(ATTENTION["sinks"]), cuda_device(9, 0))
    assert sinks == ("FA3", "FA4", "FA4_UPSTREAM")


def test_the_summary_gives_sizes_and_types() -> None:
    lines = backends_page([]).splitlines()
    (triton,) = (line for line in lines if line.startswith("| TRITON_ATTN | attention"))
    cells = [c.strip() for c in triton.strip("|").split("|")]
    assert cells[2:4] == ["32–512", "fp32, fp16, bf16"]
    backend = get_backend_class("TRITON_ATTN")
    assert backend.supports_head_size(32)
    assert backend.supports_dtype(torch.float32)
    assert not backend.supports_head_size(31)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([], "none"),
        ([64, 128, 256], "64, 128, 256"),
        (list(range(32, 513)), "32–512"),
        (list(range(8, 257, 8)), "8–256 in steps of 8"),
        ([1, 2, 3, 5, 8, 13, 21], "1, 2, 3, 5, 8, 13, 21"),
    ],
)
def test_numbers_are_described(values: list[int], said: str) -> None:
    assert describe_numbers(values) == said


def test_a_later_run_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    other = replace(RUN, capability="ALiBi")
    later = replace(RUN, date="2002-01-01")
    path = tmp_path / "runs.csv"
    path.write_text(format_runs([RUN, other, later]), encoding="utf-8")
    assert read_runs(path) == [other, later]
    assert read_runs(tmp_path / "none.csv") == []
    path.write_text("backend,when\nX,Y\n", encoding="utf-8")
    with pytest.raises(DataError, match="take the committed file back"):
        read_runs(path)


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    (tmp_path / RUNS).write_text(format_runs([RUN]), encoding="utf-8")
    main([str(tmp_path)])
    assert (tmp_path / PAGE).read_text(encoding="utf-8") == backends_page([RUN])
    with pytest.raises(UsageError, match="name the folder"):
        main([])
