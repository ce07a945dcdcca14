from __future__ import annotations

import io
import sys

import pytest

from attnbench.cli.downloads import TerminalTell


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    tell = TerminalTell()
    tell.note("to download: 3.0 MB")
    with tell.progress("vllm.whl", 3_000_000, "bytes") as advance:
        advance(1_500_000)
    with tell.progress("packages", 2, "packages") as advance:
        advance(2)
    shown = screen.getvalue()
    assert shown.startswith("to download: 3.0 MB\n")
    assert "vllm.whl" in shown
    assert "3.0 MB" in shown.partition("\n")[2]
    assert "2/2" in shown


def test_only_notes_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    tell = TerminalTell()
    tell.note("to download: 3.0 MB")
    with tell.progress("vllm.whl", 3_000_000, "bytes") as advance:
        advance(1_500_000)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "to download: 3.0 MB\n")
