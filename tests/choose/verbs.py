"""The command as it is typed, in this process."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from attnbench.cli.main import main

#: Words to (exit code, stdout, stderr).
Call = Callable[..., tuple[int, str, str]]


def exit_code(*words: str) -> int:
    """Of `attnbench <words>`."""
    try:
        main([*words])
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


def typed(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `attnbench <words>`."""
    capsys.readouterr()
    code = exit_code(*words)
    printed = capsys.readouterr()
    return code, printed.out, printed.err
