"""One sweep at a time on a device, whoever started it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from attnbench.errors import InfrastructureError
from attnbench.measure.device_lock import device_lock

HOLD = """
import sys
from attnbench.measure.device_lock import device_lock
with device_lock("GPU-1"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_device_is_held_against_other_processes_and_free_after_their_death(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with device_lock("GPU-2"), device_lock(""), device_lock(""):
            pass
        with (
            pytest.raises(InfrastructureError, match="another attnbench is measuring on GPU-1"),
            device_lock("GPU-1"),
        ):
            pass
        holder.kill()
    with device_lock("GPU-1"):
        pass


def test_a_lock_that_cannot_be_opened_names_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "attnbench-GPU-1.lock").symlink_to(tmp_path / "none" / "file")
    with pytest.raises(InfrastructureError, match=r"attnbench-GPU-1\.lock"), device_lock("GPU-1"):
        pass
