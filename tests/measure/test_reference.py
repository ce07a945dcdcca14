"""The build before: asked what it is, refused where its times would say nothing."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from attnbench.backends.device import Device
from attnbench.errors import AttnBenchError, InfrastructureError, UsageError
from attnbench.measure import MeasureOptions
from attnbench.measure import reference as reference_module
from attnbench.measure.environment import read_environment
from attnbench.measure.reference import check_reference, open_reference, sent_options
from attnbench.store.record import PROTOCOL_VERSION
from tests.measure.other_python import answering_python, changed_python, program

HERE = read_environment(Device("cpu"))


def facts(**changes: Any) -> dict[str, Any]:
    return {
        "protocol_version": PROTOCOL_VERSION,
        "device_class": HERE.device_class,
        "device_uuid": HERE.device_uuid,
        "commit": "0123456789",
        "stack": ["torch==2.12.0"],
        "stack_id": "abc",
        "harness_version": "0.0.9",
        "package": "/before/attnbench/__init__.py",
        **changes,
    }


def test_another_build_on_this_device_is_taken(tmp_path: Path) -> None:
    found = check_reference(answering_python(tmp_path, facts()), HERE)
    assert found.commit == "0123456789"
    assert found.title(HERE) == "commit 0123456, torch==2.12.0"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"protocol_version": PROTOCOL_VERSION + 1}, "its protocol_version is"),
        ({"device_class": "h200"}, "its device_class is h200, and cpu-"),
        ({"device_uuid": "GPU-7"}, "its device_uuid is GPU-7, and unknown here"),
        ({"stack_id": HERE.stack_id, "commit": HERE.commit or "x"}, "this build itself"),
        (
            {
                "stack_id": HERE.stack_id,
                "package": str(Path(reference_module.__file__).parents[1] / "__init__.py"),
            },
            "this build itself",
        ),
    ],
)
def test_one_whose_times_would_say_nothing_is_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    if "x" in changes.values():
        pytest.skip("no commit is known of this tree")
    python = answering_python(tmp_path, facts(**changes))
    with pytest.raises(UsageError) as caught:
        check_reference(python, HERE)
    assert str(caught.value).startswith(f"--reference {python}: ")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ([], "ended (1): it fell over"),
        (["hello"], "b'hello', which is no JSON"),
        (
            [{"failed": "ModuleNotFoundError: No module named 'attnbench'"}],
            "-m pip install attnbench",
        ),
        ([{"device_class": "h200"}], "answers what this build does not read"),
    ],
)
def test_one_that_cannot_say_what_it_is(
    tmp_path: Path, answers: list[dict[str, Any] | str], said: str
) -> None:
    with pytest.raises(InfrastructureError) as caught:
        check_reference(answering_python(tmp_path, *answers), HERE)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_silent_one_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_module, "START_TIMEOUT_S", 0.2)
    python = program(tmp_path, "import time; time.sleep(100)")
    with pytest.raises(InfrastructureError, match="nothing was heard of it"):
        check_reference(python, HERE)


def test_no_such_program(tmp_path: Path) -> None:
    with pytest.raises(AttnBenchError, match="no such program; name the python of another"):
        check_reference(str(tmp_path / "nowhere" / "python"), HERE)
    (tmp_path / "python").write_bytes(b"\0\0\0\0")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(UsageError, match="does not start"):
        check_reference(str(tmp_path / "python"), HERE)


@pytest.mark.slow
def test_it_imports_its_own_packages_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither PYTHONPATH nor the working directory leads it to another attnbench."""
    trap = tmp_path / "trap" / "attnbench"
    trap.mkdir(parents=True)
    (trap / "__init__.py").write_text("raise SystemExit('the trap')", encoding="utf-8")
    (trap.parent / "attnbench.toml").write_text("future_key = 1", encoding="utf-8")
    monkeypatch.chdir(trap.parent)
    monkeypatch.setenv("PYTHONPATH", str(trap.parent))
    monkeypatch.setenv("ASV_COMMIT", "f" * 40)
    found = check_reference(changed_python(tmp_path), HERE)
    assert found.package == str(Path(reference_module.__file__).parents[1] / "__init__.py")
    assert found.commit == HERE.commit
    assert found.title(HERE) == "flashinfer-python==0.1"


def test_its_variables_are_ours_without_what_leads_to_our_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = str(Path(sys.executable).parent)
    monkeypatch.setenv("PATH", os.pathsep.join([own, "/usr/bin"]))
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    found = reference_module._environment(tmp_path / "bin" / "python")
    assert found["PATH"] == os.pathsep.join([str(tmp_path / "bin"), "/usr/bin"])
    assert found["CUDA_VISIBLE_DEVICES"] == "3"
    assert "VIRTUAL_ENV" not in found


def test_a_closed_one_is_gone(tmp_path: Path) -> None:
    with open_reference(answering_python(tmp_path, facts())) as other:
        other.describe()
        process = other._process
    assert process.poll() is not None


def test_options_that_are_sent() -> None:
    assert sent_options(MeasureOptions()) == {}
    options = MeasureOptions(
        timer="event",
        l2_states=("cold", "hot"),
        locked_clock_hz=1.5e9,
        replicates=3,
        first_replicate=100,
        shard="1/2",
        reference="/x/python",
        confirm_points=7,
        budget_s=0.1,
    )
    # Not the lock: the other side would set the clock free at its end.
    assert sent_options(options) == {
        "timer": "event",
        "l2_states": ("cold", "hot"),
        "rated_clock_hz": 1.5e9,
        "budget_s": 0.1,
    }
    fake = MeasureOptions(timer="fake", fake_slowdown=(("CPU_ATTN", 2.0),))
    assert sent_options(fake) == {"timer": "fake"}
