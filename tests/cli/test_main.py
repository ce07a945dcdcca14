"""The command as a whole: help, start-up, a bug."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import typer.main

from attnbench.cli import main as cli
from attnbench.cli.output import Format, emit
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
    assert "\n" not in command.help.replace("\n\n", ""), "the terminal breaks lines"
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


@pytest.mark.parametrize(
    ("cause", "expected", "said"),
    [
        (KeyboardInterrupt(), ExitCode.INCOMPLETE, "attnbench: stopped\n"),
        (EOFError(), ExitCode.INCOMPLETE, "attnbench: stopped\n"),
    ],
)
def test_a_stop_is_never_a_regression(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    cause: BaseException,
    expected: ExitCode,
    said: str,
) -> None:
    from attnbench.backends import registry

    def stop(**ignored: object) -> None:
        raise cause

    monkeypatch.setattr(registry, "backend_names", stop)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["backends"])
    assert stopped.value.code == expected
    # `backends` measures nothing, so there is nothing to resume.
    assert capsys.readouterr().err == said


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = (
        f"{sys.executable} -m attnbench matrix --format csv | head -n 1; exit ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("device,")
    assert "Traceback" not in done.stderr


def test_a_bug_on_a_full_disk_is_still_not_a_regression(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def bug(**ignored: object) -> None:
        raise KeyError("surprise")

    def full(*args: object, **ignored: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cli, "app", bug)
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", full)
    with pytest.raises(SystemExit) as stopped:
        cli.main([])
    assert stopped.value.code == ExitCode.INCOMPLETE
    assert "surprise" in capsys.readouterr().err


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    emit([{"a": float("nan"), "b": [1.0, float("inf")], "c": "NaN"}], Format.JSON)
    assert json.loads(capsys.readouterr().out) == [{"a": None, "b": [1.0, None], "c": "NaN"}]
