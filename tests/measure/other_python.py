"""Pythons of "the build before": this interpreter with something of it changed, or none at all."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: Stands before whatever else a changed interpreter does: another package makes it another stack.
_CHANGED = """
import attnbench.measure.environment as environment
import attnbench.measure.timers as timers
own_stack = environment.read_stack
environment.read_stack = lambda: (*own_stack(), "flashinfer-python==0.1")
"""

_RUN = """
import runpy, sys
if __name__ == "__main__":
    assert sys.argv.pop(1) == "-P"
    sys.argv.pop(0)
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def changed_python(folder: Path, change: str = "", slowdown: float = 1.0) -> str:
    """A Python with this attnbench and another stack, after the statements `change`.

    Its fake timer is `slowdown` times as slow: the machine's doing, not an option's.
    """
    slower = f"""
own_seconds = timers.FakeTimer.seconds
timers.FakeTimer.seconds = lambda self, subject: own_seconds(self, subject) * {slowdown}
"""
    return program(folder, _CHANGED + slower + change + _RUN)


def answering_python(folder: Path, *answers: Mapping[str, Any] | str) -> str:
    """A Python without attnbench that gives these answers, then ends."""
    texts = [one if isinstance(one, str) else json.dumps(one) for one in answers]
    lines = "".join(f"sys.stdin.readline(); print({text!r}, flush=True)\n" for text in texts)
    return program(folder, f"import sys\n{lines}sys.exit('it fell over')\n")


def program(folder: Path, source: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "other.py").write_text(source, encoding="utf-8")
    python = folder / "python"
    words = shlex.join([sys.executable, str(folder / "other.py")])
    python.write_text(f'#!/bin/sh\nexec {words} "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    return str(python)
