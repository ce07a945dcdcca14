"""The command as a whole: help, start-up, a bug."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

from attnbench.cli import main as cli
from attnbench.errors import ExitCode

ROOT = Path(__file__).parent.parent.parent


def commands() -> list[tuple[str, Any]]:
    """(verb, command) of every verb, those in groups included."""

    def walk(command: Any, name: str) -> list[tuple[str, Any]]:
        inner = getattr(command, "commands", None)
        if inner is None:
            return [(name, command)]
        return [
            pair for word, child in inner.items() for pair in walk(child, f"{name} {word}".strip())
        ]

    return walk(typer.main.get_command(cli.app), "")


def test_importing_the_command_line_loads_nothing_heavy() -> None:
    code = (
        "import sys, attnbench.cli.main; "
        "heavy = {'torch','triton','scipy','pandas','pyarrow','duckdb','plotly','jinja2','asv',"
        "'numpy'} & set(sys.modules); print(sorted(heavy)); sys.exit(bool(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("name", "command"), commands(), ids=lambda c: str(c)[:20])
def test_every_verb_and_option_has_help_and_is_in_the_readme(name: str, command: Any) -> None:
    assert command.help, name
    for parameter in command.params:
        assert getattr(parameter, "help", ""), f"{name} {parameter.name}"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"attnbench {name}" in readme


def test_a_bug_is_a_report_file_and_exit_4(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def bug(**ignored: object) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr(cli, "app", bug)
    with pytest.raises(SystemExit) as stopped:
        cli.main([])
    assert stopped.value.code == ExitCode.INCOMPLETE
    line = capsys.readouterr().err
    assert "Traceback" not in line
    report = Path(line.split("the report is ")[1].strip())
    assert "surprise" in report.read_text(encoding="utf-8")
    report.unlink()


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        ([], 0),
        ([ExitCode.UNDECIDED], 3),
        ([ExitCode.UNDECIDED, ExitCode.INCOMPLETE], 4),
        ([ExitCode.INCOMPLETE, ExitCode.REGRESSION, ExitCode.UNDECIDED], 1),
        ([ExitCode.REGRESSION, ExitCode.USAGE], 2),
        ([ExitCode.OK, ExitCode.UNDECIDED], 3),
    ],
)
def test_one_exit_code_when_several_hold(held: list[ExitCode], expected: int) -> None:
    assert ExitCode.join(*held) == expected
