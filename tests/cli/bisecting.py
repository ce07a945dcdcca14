"""What tests of `attnbench bisect` share: a made-up project, and fresh processes that cost little.

The project's backend is CPU_ATTN under another name; its import makes the fake timer slower by a
factor that the version, or the commit, carries.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from attnbench.cli.main import app
from attnbench.errors import AttnBenchError
from attnbench.measure import MeasureOptions
from attnbench.upgrade import alternate
from attnbench.upgrade.side_env import Side
from tests.upgrade.package_server import wheel_bytes

MODULE = """
from attnbench.backends.cpu_attn import CPUAttentionBackend
from attnbench.measure import timers

{extra}
for timer in vars(timers).values():
    if isinstance(timer, type) and hasattr(timer, "_FACTOR"):
        timer._FACTOR = dict(timer._FACTOR, attention={factor})

class TinyBackend(CPUAttentionBackend):
    @staticmethod
    def get_name():
        return "TINY_ATTN"
"""
ENTRY = "[attnbench.backends]\nTINY_ATTN = tinyattn:TinyBackend\n"
WORKLOAD = "2q1s40 dtype=fp32 head_size=64 heads=2/1"
POINT = (WORKLOAD, "--backend", "TINY_ATTN", "--timer", "fake")


def write_wheel(
    folder: Path, name: str, version: str, factor: float = 1.0, extra: str = ""
) -> Path:
    """Of `tinyattn`, or of a package that does nothing."""
    folder.mkdir(exist_ok=True)
    files = {
        "tinyattn.py": MODULE.format(factor=factor, extra=extra).encode(),
        f"{name}-{version}.dist-info/entry_points.txt": ENTRY.encode(),
    }
    if name != "tinyattn":
        files = {f"{name}.py": b""}
    path = folder / f"{name}-{version}-py3-none-any.whl"
    path.write_bytes(wheel_bytes(name, version, files))
    return path


@contextmanager
def offline_pip(wheels: Path) -> Iterator[None]:
    """pip finds what lies in `wheels`, and nothing else."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("ATTNBENCH_", "PIP_"))]:
            patch.delenv(name)
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", str(wheels))
        patch.setenv("PIP_CONFIG_FILE", os.devnull)
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


def attnbench(*words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command, in this process."""
    outcome = CliRunner().invoke(app, list(words))
    said = outcome.stderr
    code = outcome.exit_code
    if isinstance(outcome.exception, AttnBenchError):
        code, said = outcome.exception.exit_code, f"{said}attnbench: {outcome.exception}\n"
    elif outcome.exception is not None and not isinstance(outcome.exception, SystemExit):
        raise outcome.exception
    return code, outcome.stdout, said


def bisect(*words: str, status: int) -> tuple[dict[str, Any], str]:
    """The answer, and what is told. Environments lie beside the wheels."""
    cache = str(Path(os.environ["PIP_FIND_LINKS"]).parent / "c")
    more = ("--rounds", "5", "--cache-dir", cache, "--format", "json")
    code, out, said = attnbench("bisect", *POINT, *words, *more)
    assert code == status, out + said
    return (json.loads(out) if out else {}), said


# A fresh process is a fork of one that has imported torch and measured once: 0.1 s instead of 3 s.
# Which interpreter starts and where it finds torch, a test with real processes says.
_SERVER = """
import importlib, json, os, runpy, sys, traceback
from pathlib import Path

import torch
torch.set_num_threads(1)
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import side_run
side_run.main(Path(sys.argv[2]))
sys.path.pop(0)
from attnbench.backends.registry import reload_entry_points

print("ready", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if not child:
        code = 0
        try:
            with open(request["stderr"], "wb") as file:
                os.dup2(file.fileno(), 2)
            os.environ.update(request["variables"])
            sys.path[:0] = request["path"]
            importlib.invalidate_caches()
            reload_entry_points()
            sys.argv = request["words"]
            runpy.run_path(sys.argv[0], run_name="__main__")
        except BaseException:  # sys.exit too: a forked process never returns
            traceback.print_exc()
            code = 1
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class ForkedSides:
    """Stands for `alternate._run`: processes of a side, forked."""

    def __init__(self, folder: Path) -> None:
        request = {
            "plan": [{"workloads": [WORKLOAD], "backends": ["CPU_ATTN"], "suite": ""}],
            "options": asdict(MeasureOptions(timer="fake")),
            "results": str(folder / "first"),
            "run_id": "",
            "distribution": "attnbench",
            "answer": str(folder / "answer.json"),
        }
        file = folder / "request.json"
        file.write_text(json.dumps(request))
        self.started = 0
        self._server = subprocess.Popen(
            [sys.executable, "-c", _SERVER, str(alternate._SCRIPT), str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self._ask() == "ready", json.loads((folder / "answer.json").read_text())

    def _ask(self, line: str = "") -> str:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        if line:
            self._server.stdin.write(line + "\n")
            self._server.stdin.flush()
        return self._server.stdout.readline().strip()

    def __call__(self, side: Side, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
        assert arguments[0] == "-P"
        self.started += 1
        with tempfile.NamedTemporaryFile(suffix=".stderr") as said:
            request = {
                "words": list(arguments[1:]),
                "path": [str(side.first)] if side.first else [],
                "variables": dict(side.variables),
                "stderr": said.name,
            }
            code = int(self._ask(json.dumps(request)))
            stderr = Path(said.name).read_text()
        return subprocess.CompletedProcess(arguments, code, "", stderr)

    def close(self) -> None:
        """End the server."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(30)
        assert self._server.stdout is not None
        self._server.stdout.close()
