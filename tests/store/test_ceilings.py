"""Ceilings in a run's header, through journal, seal, compaction and resumption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from attnbench.store import ResultsFolder, RunHeader
from attnbench.store.ceilings import Ceilings
from tests.store.rows import make_header, make_row, store_run

CEILINGS = Ceilings(
    copy_bytes_per_s=3.5e10,
    read_bytes_per_s=4.25e10,
    matmul_flops_per_s={"bf16": 4e11, "fp32": 2e11},
)


def test_they_are_read_back_from_journal_seal_and_compaction(tmp_path: Path) -> None:
    folder = ResultsFolder(tmp_path)
    header = make_header(ceilings=CEILINGS)
    with folder.open_run(header) as run:
        run.append(make_row(run.run_id, 0))
        run.close()
        assert folder.header(run.run_id).ceilings == CEILINGS  # from the journal
        folder.seal_orphans()
    assert folder.header(header.run_id).ceilings == CEILINGS
    store_run(folder, make_header(number=1), 1)
    folder.compact()
    assert folder.header(header.run_id).ceilings == CEILINGS
    assert folder.ceilings() == {header.run_id: CEILINGS}


def test_a_resumed_run_keeps_those_it_began_with(tmp_path: Path) -> None:
    folder = ResultsFolder(tmp_path)
    header = make_header(ceilings=CEILINGS)
    store_run(folder, header, 1)
    again = make_header(ceilings=Ceilings(copy_bytes_per_s=1.0))
    with folder.open_run(again, resume=True) as run:
        assert run.header.ceilings == CEILINGS


def test_a_header_written_before_there_were_ceilings_is_read() -> None:
    value = make_header().to_json()
    assert "ceilings" not in value
    assert RunHeader.from_json(json.loads(json.dumps(value))).ceilings is None


@pytest.mark.parametrize("bad", [0, -1.0, float("nan"), float("inf"), "fast", None])
def test_what_is_no_rate_is_not_known(bad: Any) -> None:
    read = Ceilings.from_json({"copy_bytes_per_s": bad, "matmul_flops_per_s": {"bf16": bad}})
    assert read == Ceilings()
    assert read.memory_bytes_per_s == 0.0


def test_the_better_memory_rate_is_the_ceiling() -> None:
    assert CEILINGS.memory_bytes_per_s == 4.25e10
