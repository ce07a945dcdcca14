"""`attnbench dashboard` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from attnbench.cli import page_values
from attnbench.cli.dashboard import dashboard
from attnbench.errors import DataError
from attnbench.history.panel import Panel
from attnbench.store import ResultsFolder
from tests.history.fake import fill, row


def test_dashboard_writes_the_pages_and_says_where(tmp_path: Path) -> None:
    fill(tmp_path / "results")
    (tmp_path / "results" / "matrix.json").write_text("[]")
    app = typer.Typer()
    app.command()(dashboard)
    words = ["--results", str(tmp_path / "results"), "--site", str(tmp_path / "site")]
    outcome = CliRunner().invoke(app, [*words, "--format", "json"], catch_exceptions=False)
    assert json.loads(outcome.stdout)[0]["page"] == str(tmp_path / "site" / "index.html")
    assert (tmp_path / "site" / "matrix.html").exists()
    CliRunner().invoke(app, [*words, "--run", row(5).run_id], catch_exceptions=False)
    assert "05c0ffe" in (tmp_path / "site" / "index.html").read_text()
    with pytest.raises(DataError, match="not stored; newest"):
        CliRunner().invoke(app, [*words, "--run", "nothing"], catch_exceptions=False)


def test_the_gates_record_is_kept_where_counting_it_takes_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path)
    folder = ResultsFolder(tmp_path)
    panel = Panel.of(folder)
    record = page_values.watch_of(folder, panel).record
    assert record is not None
    assert record["as_of"] == panel.runs[-1].run_id
    kept = tmp_path / "gate.json"
    kept.write_text(json.dumps({**record, "marked": True}))
    monkeypatch.setattr(page_values, "_SMALL", 0)
    assert "marked" in (page_values.watch_of(folder, panel).record or {})
    for text in ("{", "[]", json.dumps({**record, "as_of": panel.runs[2].run_id, "marked": True})):
        kept.write_text(text)
        assert page_values.watch_of(folder, panel).record == record
    assert folder.check().is_ok
