"""`compare` and `history` as a user types them."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from attnbench.cli import history as verbs
from attnbench.errors import DataError, UsageError
from tests.history.fake import fill, row


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    fill(folder)
    return folder


def run(results: Path, *words: str) -> Result:
    app = typer.Typer()
    app.command()(verbs.compare)
    app.command()(verbs.history)
    arguments = [*words, "--results", str(results)]
    outcome = CliRunner().invoke(app, arguments)
    if outcome.exception is not None and not isinstance(outcome.exception, SystemExit):
        raise outcome.exception
    return outcome


def test_history_lists_every_series_with_its_verdict(results: Path) -> None:
    found = json.loads(run(results, "history", "--format", "json").stdout)
    assert len(found) == 21
    (slow,) = [r for r in found if r["verdict"] == "REGRESSION" and r["since"] and r["change"]]
    assert slow["backend"] == "CPU_ATTN"
    assert slow["since"] == "0ac0ffe"
    assert slow["reasons"] == ["confirmed", "slower_than_floor"]


def test_history_filters_and_levels(results: Path) -> None:
    words = ("history", "--backend", "cpu_attn", "--workload", "16q1s4k dtype=fp32")
    by_commit = run(results, *words, "--by", "commit", "--format", "csv").stdout
    rows = list(csv.DictReader(io.StringIO(by_commit)))
    assert [r["commit"][:2] for r in rows] == [f"{i:02x}" for i in range(12)]
    assert rows[10]["change"].startswith("+3")
    by_stack = json.loads(run(results, *words, "--by", "stack", "--format", "json").stdout)
    assert [r["runs"] for r in by_stack] == [7, 5]


def test_history_that_matches_nothing_says_what_is_there(results: Path) -> None:
    outcome = run(results, "history", "--backend", "NOPE")
    assert "no series of 21 match; backends stored: CPU_ATTN, FLEX" in outcome.stderr


def test_compare_exits_1_and_lists_what_changed(results: Path) -> None:
    outcome = run(results, "compare", row(5).commit[:6], row(11).commit[:6], "--format", "json")
    assert outcome.exit_code == 1
    found = json.loads(outcome.stdout)
    assert [r["verdict"] for r in found] == ["REGRESSION", "REGRESSION"]
    assert "torch 2.12.0 -> 2.13.0" in outcome.stderr
    assert "19 of 21 unchanged" in outcome.stderr
    full = run(results, "compare", row(5).run_id, row(11).run_id, "--all", "--format", "json")
    assert len(json.loads(full.stdout)) == 21


def test_compare_of_equal_runs_exits_0(results: Path) -> None:
    assert run(results, "compare", row(4).run_id, row(5).run_id).exit_code == 0


def test_bad_words_are_refused_with_the_mend(results: Path) -> None:
    with pytest.raises(UsageError, match="use one of series, commit, stack"):
        run(results, "history", "--by", "moon")
    with pytest.raises(UsageError, match="use one of attention, host"):
        run(results, "history", "--metric", "speed")
    with pytest.raises(DataError, match="no stored run, commit or stack"):
        run(results, "compare", "nothing", row(5).run_id)
