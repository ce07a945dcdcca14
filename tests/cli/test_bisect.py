"""`attnbench bisect` as it is typed: wheels of a made-up project, and the commits of its git."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from attnbench.errors import ExitCode
from attnbench.history.bisect import Reading
from attnbench.measure import MeasureOptions
from attnbench.store import ResultsFolder
from attnbench.upgrade import alternate
from attnbench.upgrade.alternate import PlanPart
from attnbench.upgrade.bisect_sides import (
    Candidate,
    Measurer,
    commit_candidates,
    package_candidates,
)
from attnbench.upgrade.tell import Silent
from tests.cli.bisecting import (
    ENTRY,
    MODULE,
    POINT,
    WORKLOAD,
    ForkedSides,
    attnbench,
    bisect,
    offline_pip,
    write_wheel,
)

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


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkedSides]:
    server = ForkedSides(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with `wheels`, which is all that pip finds, and the environments made of them."""
    folder = tmp_path_factory.mktemp("packages")
    wheels = folder / "wheels"
    for version in ("0.9", "1.0"):
        write_wheel(wheels, "tinyattn", version, 1.0)
    write_wheel(wheels, "tinyattn", "1.2", 1.0, extra="raise OSError('an older libcuda')")
    write_wheel(wheels, "tinyattn", "1.10", 1.07)
    with offline_pip(wheels):
        yield folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Repository:
    """A clone of the made-up project."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.git("init", "-q", "-b", "main")

    def git(self, *words: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        done = subprocess.run(
            ["git", *who, *words], cwd=self.folder, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    def commit(self, subject: str, factor: float = 1.0, project: str = PROJECT) -> str:
        """Its hash."""
        text = MODULE.format(factor=factor, extra=f"# {subject}")
        (self.folder / "tinyattn.py").write_text(text)
        (self.folder / "pyproject.toml").write_text(project)
        (self.folder / "tiny_build.py").write_text(f"ENTRY = {ENTRY!r}\n{BUILD}")
        self.git("add", "-A")
        self.git("commit", "-q", "-m", subject)
        return self.git("rev-parse", "HEAD")


def test_versions_of_a_package(
    packages: Path, here: Path, sides: ForkedSides, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alternate, "_run", sides)
    words = ("--package", "tinyattn==1.0..1.10")
    found, said = bisect(*words, status=3)
    # What does not load may be the first bad one as well as what comes after it.
    assert found["suspects"] == ["tinyattn 1.2", "tinyattn 1.10"]
    assert found["first_bad"] is None
    (step,) = found["steps"]
    assert (step["candidate"], step["outcome"]) == ("tinyattn 1.2", "skipped")
    assert "an older libcuda" in step["why"]
    assert "tinyattn 1.10 is 1.07 times tinyattn 1.0, p = 0.004" in said
    # Rows lie apart from the history.
    (measured,) = (here / "results" / ".bisect").glob("*/measurements")
    assert len(ResultsFolder(measured).runs()) == 10
    # Asked again, it answers from its journal.
    started = sides.started
    again, said = bisect(*words, status=3)
    assert again == found
    assert "going on with 11 measurements" in said
    assert sides.started == started
    # Swapped ends are a usage error.
    swapped, _ = bisect("--package", "tinyattn==1.10..1.0", status=2)
    assert "the bad end is the faster one; swap the ends" in swapped["problem"]
    # Equal ends are refused.
    refused, _ = bisect("--package", "tinyattn==0.9..1.0", status=3)
    assert "do not really differ here" in refused["problem"]
    assert refused["first_bad"] is None


def test_a_candidate_in_a_real_process(packages: Path, here: Path) -> None:
    """Its own interpreter, its own version of the package, and torch from behind."""
    line = package_candidates("tinyattn==1.0..1.10")
    assert [one.label for one in line] == ["tinyattn 1.0", "tinyattn 1.2", "tinyattn 1.10"]
    part = PlanPart((WORKLOAD,), ("TINY_ATTN",))
    options = MeasureOptions(timer="fake")
    measure = Measurer(line, part, options, here / "rows", packages / "c", Silent())
    good, broken, bad = (measure(n) for n in range(3))
    assert good.seconds is not None
    assert bad.seconds is not None
    assert bad.seconds == pytest.approx(1.07 * good.seconds, rel=1e-6)
    assert (broken.seconds, broken.status) == (None, "CRASH")
    assert "an older libcuda" in broken.why


def test_commits_of_a_project(
    packages: Path, here: Path, sides: ForkedSides, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alternate, "_run", sides)
    repository = Repository(here / "repository")
    good = repository.commit("Good")
    broken = repository.commit("Broken build", project="[project")
    repository.commit("Still good")
    bad = repository.commit("A faster kernel, promised", 1.05)
    # What is not committed is neither measured nor touched.
    (repository.folder / "tinyattn.py").write_text("raise OSError('edited')")
    found, said = bisect("--commits", f"{good}..main", "--repo", "repository", status=0)
    assert found["first_bad"] == f"{bad[:12]} A faster kernel, promised"
    assert found["ratio"] == pytest.approx(1.05, rel=0.002)
    steps = {step["candidate"]: step["outcome"] for step in found["steps"]}
    assert steps[f"{broken[:12]} Broken build"] == "skipped"
    assert sorted(steps.values()) == ["good", "skipped"]
    assert "no wheel of" in said
    assert repository.git("status", "--porcelain") == "M tinyattn.py"


def test_a_line_of_commits(here: Path) -> None:
    repository = Repository(here / "repository")
    first = repository.commit("First")
    repository.git("switch", "-q", "-c", "side")
    side = repository.commit("On a branch", 1.01)
    repository.git("switch", "-q", "main")
    second = repository.commit("Second", 1.02)
    repository.git("merge", "-q", "-s", "ours", "-m", "A merge", "side")
    merge = repository.git("rev-parse", "HEAD")
    hostile = "\x1b[31m" + 90 * "x" + "\u202e"
    repository.git("commit", "-q", "--allow-empty", "-m", hostile)
    line = commit_candidates(f"{first}..main", repository.folder)
    assert [one.label[:12] for one in line[:3]] == [one[:12] for one in (first, second, merge)]
    assert [one.label[13:] for one in line[:3]] == ["First", "Second", "A merge"]
    assert line[3].label.isprintable()
    assert len(line[3].label) <= 80
    # From a commit of the branch that was merged: the states of the line that have it.
    line = commit_candidates(f"{side}..main", repository.folder)
    assert [one.label[13:] for one in line[:3]] == ["On a branch", "Second", "A merge"]
    # A clone that does not go back that far.
    url = f"file://{repository.folder}"
    subprocess.run(["git", "clone", "-q", "--depth=2", url, "shallow"], cwd=here, check=True)
    repository.git("commit", "-q", "--allow-empty", "-m", "\udcff\udcfe not UTF-8")
    assert "not UTF-8" in commit_candidates("main~..main", repository.folder)[-1].label
    repository.git("branch", "other", first)
    repository.git("switch", "-q", "other")
    repository.commit("Elsewhere", 1.03)
    for words, said in (
        ((f"{first}..main", "shallow"), "no commit .*--unshallow"),
        (("main..main~0", "repository"), "both are .*; name two that differ"),
        ((f"main..{first}", "repository"), "comes after .*; swap them"),
        (("main..other", "repository"), r"does not follow main \(rebased\?\)"),
        (("main..main", "repository"), "good and bad are the same"),
        (("main...other", "repository"), "as GOOD..BAD"),
        (("--help..main", "repository"), "no commit '--help'"),
        (("nothing..main", "nowhere"), "no commit|no git repository|nowhere"),
    ):
        code, _, told = attnbench(
            "bisect", WORKLOAD, "--backend", "CPU_ATTN", "--commits", words[0], "--repo", words[1]
        )
        assert code == ExitCode.USAGE
        (told_line,) = told.splitlines()
        assert re.search(said, told_line), told_line


def test_a_search_goes_on_only_where_it_began(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What candidates do not change is behind them: other packages here, other times."""
    from attnbench.cli.bisect import _measurer
    from attnbench.measure import environment
    from attnbench.settings import Settings

    line = [Candidate(label, lambda cache, tell: pytest.fail("not made")) for label in "ab"]

    def begun(torch: str) -> int:
        monkeypatch.setattr(environment, "read_stack", lambda: (f"torch=={torch}",))
        _, journal = _measurer(
            line, WORKLOAD, "CPU_ATTN", "fake", None, here, Settings(), here / "results", False
        )
        known = len(journal)
        journal.read("a reading", lambda: Reading(1e-3, "OK"))
        return known

    assert [begun(torch) for torch in ("2.12", "2.12", "2.13", "2.13")] == [0, 1, 0, 1]


def test_what_is_typed_wrong_is_one_line(packages: Path, here: Path) -> None:
    code, _, told = attnbench("bisect", *POINT, "--package", "tinyattn==1..2", "--rounds", "4")
    assert code == ExitCode.USAGE
    assert "--rounds 4: 5 or more" in told
    code, _, told = attnbench("bisect", "8x1s", "--backend", "B", "--package", "nosuch==1..2")
    assert code == ExitCode.USAGE
    assert "8x1s" in told
    for words, said in (
        ((), "one of --commits, --package and --stacks"),
        (("--package", "a==1..2", "--stacks", "a..b"), "one of --commits"),
        (("--package", "tinyattn==1.0..2.0"), "the index has no tinyattn 2.0"),
        (("--package", "nosuchthing==1.0..2.0"), "pip finds no versions of nosuchthing"),
        (("--package", "tinyattn"), "NAME==GOOD..BAD"),
        (("--package", "tinyattn==1.0"), "GOOD..BAD"),
        (("--package", "tinyattn==1.0..1.0"), "good and bad are the same"),
        (("--package", "tinyattn==1.0..1.0.0"), "both are 1.0; name two that differ"),
        (("--package", "tinyattn==x..y"), "e.g. torch==2.11..2.13"),
        (("--package", "tinyattn==1.0..1.10", "--repo", "."), "leave it out with --package"),
        (("--commits", "a..b"), "no commit 'a'"),
    ):
        _, stderr = bisect(*words, status=2)
        (line,) = stderr.strip().splitlines()
        assert said in line, line


def test_the_command_itself(packages: Path, here: Path) -> None:
    words = ["-m", "attnbench", "bisect", WORKLOAD, "--backend", "X"]
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.returncode == ExitCode.USAGE
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
