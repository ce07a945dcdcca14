"""The overview and the gate's record of the night watch, as files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from attnbench.dashboard import Pages, render
from attnbench.dashboard.gate_page import rate_text
from attnbench.history.panel import Panel
from attnbench.history.rule import Reason
from attnbench.history.runs import runs_of
from attnbench.history.self_record import gate_record, rate
from attnbench.history.verdict import judge
from tests.dashboard.test_site import Links
from tests.dashboard.watch_history import watched_rows
from tests.history.fake import HOSTILE, row, table_of


def test_one_cause_is_one_entry_and_what_is_known_is_not_an_alarm(watched: Path) -> None:
    text = " ".join(Links((watched / "index.html").read_text()).text.split())
    head = text[: text.index("Support lost")]
    assert "TORCH_SDPA +20." in head
    assert "3 of 3 points" in head
    assert "since 09c0ffe" in head
    assert "Slower 1 (3 points)" in text
    assert "Known and accepted 1" in text
    known = text[text.index("Known and accepted") : text.index("Change of every point")]
    assert "TORCH_SDPA 4q1s4k dtype=fp32" in known
    assert "by A. Person until 2027-03-01, up to +40.0 %" in known
    assert HOSTILE in known


def test_the_command_that_finds_the_change_is_told(tmp_path: Path) -> None:
    rows = [replace(one, commit=f"{int(one.run_id[-6:], 16):07x}abc") for one in watched_rows()]
    panel = Panel.of_table(table_of(rows))
    render(panel, panel.runs, judge(panel), tmp_path, pages=Pages(pages=("overview",)))
    text = " ".join(Links((tmp_path / "index.html").read_text()).text.split())
    worst = judge(panel).because(Reason.CONFIRMED)[0].series.identity["workload"]
    command = f"attnbench bisect '{worst}' --backend TORCH_SDPA --commits 0000025abc..0000026abc"
    assert command in text
    assert "Changed with it: commits 0000025..0000026" in text


def test_a_backend_that_fell_silent_is_on_the_overview(tmp_path: Path) -> None:
    rows = [
        one for one in watched_rows() if one.backend != "CPU_ATTN" or one.run_id < row(30).run_id
    ]
    panel = Panel.of_table(table_of(rows))
    render(panel, panel.runs, judge(panel), tmp_path, pages=Pages(pages=("overview",)))
    text = " ".join(Links((tmp_path / "index.html").read_text()).text.split())
    assert "Missing or silent 4" in text
    assert "not measured for 10 nights" in text


def test_the_gate_page_tells_its_record_without_a_script(
    watched: Path, watched_table: pa.Table
) -> None:
    record = gate_record(Panel.of_table(watched_table), nights=6)
    text = " ".join(Links((watched / "gate.html").read_text()).text.split())
    found = record["false_alarms"]
    assert f"False alarms on {found['alarming']['count']} of {found['nights']} nights" in text
    for one in found["by_timer"]:
        assert rate_text(one["confirmed"]) in text
    for one in record["power"]["by_timer"]:
        assert rate_text(one["confirmed"][-1]) in text


def test_rates_are_told_with_their_limits() -> None:
    assert rate_text(rate(0, 0)) == "none seen yet"
    assert rate_text(rate(3, 1200)) == "3 of 1,200 = 0.25 % [0.052, 0.73]"
    assert rate_text(rate(0, 40)).startswith("0 of 40 = 0 % [0, 8.8]")


def test_without_a_record_there_is_no_gate_page(watched: Path, tmp_path: Path) -> None:
    rows = table_of([row(0)])
    render(rows, runs_of(rows), judge(rows), tmp_path)
    assert not (tmp_path / "gate.html").exists()
    assert "gate.html" not in (tmp_path / "index.html").read_text()
    assert "gate.html" in (watched / "index.html").read_text()
