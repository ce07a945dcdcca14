"""Rendered sites and one browser for all tests here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from typer.testing import CliRunner

from attnbench.cli.main import app
from attnbench.dashboard import render
from attnbench.dashboard.watch import Watch
from attnbench.history.acknowledge import Acknowledgement, AlarmKind
from attnbench.history.alarms import alarms_of
from attnbench.history.panel import Panel
from attnbench.history.runs import runs_of
from attnbench.history.self_record import gate_record
from attnbench.history.verdict import judge
from attnbench.store.ceilings import Ceilings
from tests.dashboard.browsing import OpenSite, Reader, launched
from tests.dashboard.choices_store import fill_all
from tests.dashboard.watch_history import watched_rows
from tests.history.fake import HOSTILE, history, table_of

MATRIX: list[dict[str, Any]] = [
    {
        "device": device,
        "dtype": dtype,
        "feature": feature,
        "head_size": 128,
        "kv_cache_dtype": "auto",
        "block_size": None,
        "backend": "none"
        if feature == "alibi"
        else "FLASH_ATTN"
        if device == "sm90"
        else "CPU_ATTN",
        "source": "platform chain",
        "note": "",
        "followed": "FLASHINFER",
        "refused": [f"FLASHINFER: {feature} not supported {HOSTILE}"],
    }
    for device in ("sm90", "cpu")
    for dtype in ("bf16", "fp32")
    for feature in ("none", "sinks", "alibi")
]


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the pages of the made-up history."""
    folder = tmp_path_factory.mktemp("site")
    table = table_of(history())
    runs = runs_of(table)
    rates = Ceilings(copy_bytes_per_s=1e10, matmul_flops_per_s={"fp32": 1e12, "bf16": 2e12})
    ceilings = {run.run_id: rates for run in runs}
    render(table, runs, judge(table), folder, matrix=MATRIX, ceilings=ceilings)
    return folder


@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    with launched() as started:
        yield started


@pytest.fixture
def opened(browser: Any) -> Iterator[OpenSite]:
    """Gives a reader of a site; nothing may go wrong in its page."""
    readers: list[Reader] = []

    def open_site(site: Path, **options: Any) -> Reader:
        readers.append(Reader(browser, site, **options))
        return readers[-1]

    yield open_site
    for one in readers:
        assert one.problems == []
        one.page.close()


@pytest.fixture(scope="session")
def watched_table() -> pa.Table:
    return table_of(watched_rows())


@pytest.fixture(scope="session")
def watched(tmp_path_factory: pytest.TempPathFactory, watched_table: pa.Table) -> Path:
    """The pages of a history with change points, groups, lost support and an acknowledgement."""
    folder = tmp_path_factory.mktemp("watched")
    panel = Panel.of_table(watched_table)
    known = Acknowledgement(
        kind=AlarmKind.SLOWER,
        patterns={"workload": "4q1s4k*"},
        since="2026-12-01",
        reason=f"torch checks bounds {HOSTILE}",
        by="A. Person",
        expires=date(2027, 3, 1),
        up_to=1.4,
    )
    judgement = judge(panel)
    judgement = replace(judgement, alarms=alarms_of(judgement, panel, [known]))
    clocks = {run.run_id: "free" if i < 30 else "locked" for i, run in enumerate(panel.runs)}
    watch = Watch(record=gate_record(panel, nights=6), clocks=clocks)
    render(panel, panel.runs, judgement, folder, watch=watch)
    return folder


@pytest.fixture(scope="session")
def choices_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results with saved answers, and the pages beside them, as `attnbench dashboard` writes."""
    target = tmp_path_factory.mktemp("choices")
    results = fill_all(target)
    advice = json.loads((results / "answers" / "decode.json").read_text())
    advice["default"]["why"] = HOSTILE
    advice["scope"]["expires_at"] = "2020-01-01T00:00:00+00:00"
    (results / "answers" / "old.json").write_text(json.dumps(advice))
    words = ["dashboard", "--results", str(results), "--site", str(target / "site")]
    outcome = CliRunner().invoke(app, words, catch_exceptions=False)
    assert outcome.exit_code == 0
    assert "broken.json: cannot be read as JSON" in outcome.stderr
    return target


@pytest.fixture
def choices_site(choices_folder: Path) -> Path:
    return choices_folder / "site"


@pytest.fixture
def reader(opened: OpenSite, watched: Path) -> Reader:
    """Of the pages of the night watch, where a module has none of its own."""
    return opened(watched)


@pytest.fixture
def choices_reader(opened: OpenSite, choices_site: Path) -> Reader:
    return opened(choices_site)
