"""Judging and showing work on a machine without torch, and the command line stays quick."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.history.fake import fill

CODE = """
import sys
from pathlib import Path
from attnbench.store import ResultsFolder
from attnbench.history import compare, judge, runs_of, summary_text
from attnbench.dashboard import render
table = ResultsFolder({results!r}).table()
judgement = judge(table)
runs = runs_of(table)
compare(table, runs[0].run_id, runs[-1].run_id)
summary_text(judgement)
render(table, runs, judgement, Path({site!r}))
heavy = {{"torch", "triton", "attnbench.backends", "attnbench.measure", "attnbench.selection"}}
print(sorted(heavy & set(sys.modules)))
"""


def run_fresh(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_history_and_dashboard_do_not_load_torch(tmp_path: Path) -> None:
    fill(tmp_path / "results")
    code = CODE.format(results=str(tmp_path / "results"), site=str(tmp_path / "site"))
    assert run_fresh(code) == "[]"


def test_cli_modules_load_nothing_heavy() -> None:
    code = (
        "import sys, attnbench.cli.history, attnbench.cli.dashboard, attnbench.history, "
        "attnbench.dashboard\n"
        "print(sorted({'torch', 'pyarrow', 'numpy', 'scipy', 'jinja2', 'pandas', 'plotly'}"
        " & set(sys.modules)))"
    )
    assert run_fresh(code) == "[]"
