"""Published runs on the pages: shown, marked, and not judged in place of one's own."""

from __future__ import annotations

from pathlib import Path

import typer
from typer.testing import CliRunner

from attnbench.cli.dashboard import dashboard
from attnbench.store import ResultsFolder, RunHeader
from tests.dashboard.reading import read_data
from tests.history.fake import row


def store(folder: ResultsFolder, run: int) -> str:
    one = row(run)
    with folder.open_run(RunHeader(run_id=one.run_id, started_at=one.started_at)) as opened:
        opened.append(one)
    return one.run_id


def render(folder: ResultsFolder, site: Path) -> str:
    app = typer.Typer()
    app.command()(dashboard)
    words = ["--results", str(folder.path), "--site", str(site)]
    CliRunner().invoke(app, words, catch_exceptions=False)
    return (site / "index.html").read_text()


def test_published_runs_are_marked_and_the_newest_own_one_is_judged(tmp_path: Path) -> None:
    theirs, mine = ResultsFolder(tmp_path / "theirs"), ResultsFolder(tmp_path / "mine")
    newest = store(theirs, 8)
    own = store(mine, 3)
    theirs.publish(mine.path / "published" / "theirs.parquet")
    html = render(mine, tmp_path / "site")
    assert html.count('<span class="quiet">published</span>') == 1
    listed = {run["id"]: run["published"] for run in read_data(tmp_path / "site", "runs")["runs"]}
    assert listed == {own: False, newest: True}
    assert "03c0ffe" in html.split("</h1>")[0]
    # With none of one's own, the newest published one is.
    empty = ResultsFolder(tmp_path / "empty")
    theirs.publish(empty.path / "published" / "theirs.parquet")
    assert "08c0ffe" in render(empty, tmp_path / "site").split("</h1>")[0]
