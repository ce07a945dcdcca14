"""`attnbench bisect` in real processes: wheels of a made-up project, and the commits of its git.

Its backend is CPU_ATTN under another name; its import makes the fake timer slower by a factor that
the version, or the commit, carries.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from attnbench.store import ResultsFolder, RunHeader
from attnbench.store.record import stack_id
from tests.history.fake import row
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
PROJECT = """
[build-system]
requires = []
build-backend = "tiny_build"
backend-path = ["."]
[project]
name = "tinyattn"
version = "1"
"""
BUILD = """
import zipfile

def build_wheel(folder, config_settings=None, metadata_directory=None):
    name = "tinyattn-1-py3-none-any.whl"
    info = "tinyattn-1.dist-info/"
    with zipfile.ZipFile(f"{folder}/{name}", "w") as wheel:
        wheel.write("tinyattn.py")
        wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\\nName: tinyattn\\nVersion: 1\\n")
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\\nTag: py3-none-any\\n")
        wheel.writestr(info + "entry_points.txt", ENTRY)
        wheel.writestr(info + "RECORD", "")
    return name
"""
POINT = ("2q1s40 dtype=fp32 head_size=64 heads=2/1", "--backend", "TINY_ATTN", "--timer", "fake")


def write_wheel(folder: Path, name: str, version: str, factor: float, extra: str = "") -> None:
    folder.mkdir(exist_ok=True)
    files = {
        "tinyattn.py": MODULE.format(factor=factor, extra=extra).encode(),
        f"{name}-{version}.dist-info/entry_points.txt": ENTRY.encode(),
    }
    if name != "tinyattn":
        files = {f"{name}.py": b""}
    path = folder / f"{name}-{version}-py3-none-any.whl"
    path.write_bytes(wheel_bytes(name, version, files))


def bisect(project: Path, *words: str, status: int) -> tuple[dict[str, Any], str]:
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("ATTNBENCH_", "PIP_"))}
    variables |= {
        "OMP_NUM_THREADS": "1",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(project / "wheels"),
        "PIP_CONFIG_FILE": os.devnull,
    }
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "attnbench",
            "bisect",
            *POINT,
            *words,
            "--rounds",
            "5",
            "--cache-dir",
            str(project / "c"),
            "--format",
            "json",
        ],
        cwd=project,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return (json.loads(done.stdout) if done.stdout else {}), done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_versions_of_a_package(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    write_wheel(wheels, "tinyattn", "1.0", 1.0)
    write_wheel(wheels, "tinyattn", "1.2", 1.0, extra="raise OSError('an older libcuda')")
    write_wheel(wheels, "tinyattn", "1.10", 1.07)
    words = ("--package", "tinyattn==1.0..1.10")
    found, said = bisect(tmp_path, *words, status=3)
    # What does not load may be the first bad one as well as what comes after it.
    assert found["suspects"] == ["tinyattn 1.2", "tinyattn 1.10"]
    assert found["first_bad"] is None
    (step,) = found["steps"]
    assert (step["candidate"], step["outcome"]) == ("tinyattn 1.2", "skipped")
    assert "an older libcuda" in step["why"]
    assert "tinyattn 1.10 is 1.07 times tinyattn 1.0, p = 0.004" in said
    # Rows lie apart from the history.
    (measured,) = (tmp_path / "results" / ".bisect").glob("*/measurements")
    assert len(ResultsFolder(measured).runs()) == 10
    # Asked again, it answers from its journal.
    again, said = bisect(tmp_path, *words, status=3)
    assert again == found
    assert "going on with 11 measurements" in said
    assert len(ResultsFolder(measured).runs()) == 10
    # Equal ends are refused.
    write_wheel(wheels, "tinyattn", "1.9", 1.0)
    refused, _ = bisect(tmp_path, "--package", "tinyattn==1.0..1.9", status=3)
    assert "do not really differ here" in refused["problem"]
    assert refused["first_bad"] is None


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_commits_of_a_project(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()

    def git(*words: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        done = subprocess.run(
            ["git", *who, *words], cwd=repository, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    def commit(subject: str, factor: float, project: str = PROJECT) -> str:
        (repository / "tinyattn.py").write_text(MODULE.format(factor=factor, extra=f"# {subject}"))
        (repository / "pyproject.toml").write_text(project)
        (repository / "tiny_build.py").write_text(f"ENTRY = {ENTRY!r}\n{BUILD}")
        git("add", "-A")
        git("commit", "-q", "-m", subject)
        return git("rev-parse", "HEAD")

    git("init", "-q", "-b", "main")
    good = commit("Good", 1.0)
    broken = commit("Broken build", 1.0, project="[project")
    commit("Still good", 1.0)
    bad = commit("A faster kernel, promised", 1.05)
    found, said = bisect(
        tmp_path, "--commits", f"{good}..main", "--repo", str(repository), status=0
    )
    assert found["first_bad"] == f"{bad[:12]} A faster kernel, promised"
    assert found["ratio"] == pytest.approx(1.05, rel=0.002)
    steps = {step["candidate"]: step["outcome"] for step in found["steps"]}
    assert steps[f"{broken[:12]} Broken build"] == "skipped"
    assert sorted(steps.values()) == ["good", "skipped"]
    assert "no wheel of" in said
    _, said = bisect(tmp_path, "--commits", "main.." + good, "--repo", str(repository), status=2)
    assert f"{good} does not follow main" in said


def test_what_is_typed_wrong_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    write_wheel(tmp_path / "wheels", "tinyattn", "1.0", 1.0)
    for words, said in (
        ((), "one of --commits, --package and --stacks"),
        (("--package", "a==1..2", "--stacks", "a..b"), "one of --commits"),
        (("--package", "tinyattn==1.0..2.0"), "the index has no tinyattn 2.0"),
        (("--package", "nosuchthing==1.0..2.0"), "pip finds no versions of nosuchthing"),
        (("--package", "tinyattn"), "NAME==GOOD..BAD"),
        (("--package", "tinyattn==1.0"), "GOOD..BAD"),
        (("--package", "tinyattn==x..y"), "e.g. torch==2.11..2.13"),
        (("--commits", "a..b"), "no git repository|not a git repository|no commit"),
    ):
        _, stderr = bisect(tmp_path, *words, status=2)
        (line,) = stderr.strip().splitlines()
        assert any(one in line for one in said.split("|")), line


def test_candidates_between_two_stacks(tmp_path: Path) -> None:
    from attnbench.errors import UsageError
    from attnbench.history.runs import RUN_COLUMNS, runs_of
    from attnbench.upgrade.bisect_sides import stack_candidates
    from attnbench.upgrade.tell import Silent

    stacks = [
        ("python==3.11.7", "tinya==1.0", "tinyattn==1.0", "tinyz==5"),
        ("python==3.12.1", "tinya==2.0", "tinyattn==1.10", "tinyz==5"),
    ]
    folder = ResultsFolder(tmp_path / "results")
    for number, stack in enumerate(stacks):
        header = RunHeader.new()
        with folder.open_run(header) as run:
            more: dict[str, Any] = {"stack": stack, "stack_id": stack_id(stack)}
            run.append(row(number, **{"run_id": header.run_id, **more}))
            run.seal()
    runs = runs_of(folder.table(RUN_COLUMNS))
    ids = [stack_id(stack) for stack in stacks]
    line = stack_candidates(f"{ids[0]}..{ids[1]}", runs)
    assert [one.label for one in line] == [
        f"stack of {ids[0]}",
        "tinya 1.0 -> 2.0",
        "tinyattn 1.0 -> 1.10",
    ]
    with pytest.raises(UsageError, match="is no stored stack"):
        stack_candidates(f"{ids[0]}..nothing", runs)
    wheels = tmp_path / "wheels"
    for name, version in (("tinya", "2.0"), ("tinyattn", "1.0")):
        write_wheel(wheels, name, version, 1.0)
    before = {name: os.environ.get(name) for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS")}
    os.environ |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}
    try:
        side = line[1].make(tmp_path / "c", Silent())
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
    assert side.first is not None
    installed = {path.name for path in side.first.glob("*.dist-info")}
    assert installed == {"tinya-2.0.dist-info", "tinyattn-1.0.dist-info"}
