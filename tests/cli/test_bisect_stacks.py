"""`attnbench bisect --stacks`: from runs in six environments to the package that did it."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from attnbench.errors import ExitCode, UsageError
from attnbench.history.manifest import write_manifest
from attnbench.history.stacks import Stack
from attnbench.measure import MeasureOptions
from attnbench.store.record import stack_id
from attnbench.upgrade import alternate
from attnbench.upgrade.alternate import PlanPart, measure_once
from attnbench.upgrade.bisect_stacks import known_stacks, stack_candidates
from attnbench.upgrade.side_env import make_stack_side
from attnbench.upgrade.tell import Silent
from tests.cli.bisecting import WORKLOAD, ForkedSides, attnbench, bisect, offline_pip, write_wheel

#: Versions of two packages over six stacks, and the factor of the second.
STACKS = (
    ("0.1", "1.0", 1.0),
    ("0.1", "1.1", 1.0),
    ("0.1", "1.2", 1.0),
    ("0.2", "1.3", 1.06),
    ("0.2", "1.4", 1.06),
    ("0.2", "1.5", 1.06),
)
START = datetime(2026, 11, 1, 2, tzinfo=UTC)


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkedSides]:
    server = ForkedSides(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.mark.slow
def test_from_runs_to_the_package(
    tmp_path: Path, sides: ForkedSides, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alternate, "_run", sides)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "attnbench.toml").write_text('manifest = "stacks"\n')
    wheels, cache = tmp_path / "wheels", tmp_path / "c"
    for other, version, factor in STACKS:
        write_wheel(wheels, "aiter", other)
        write_wheel(wheels, "tinyattn", version, factor)
    options = MeasureOptions(timer="fake")
    part = PlanPart((WORKLOAD,), ("TINY_ATTN",))
    with offline_pip(wheels):
        for other, version, _ in STACKS:
            pins = [f"aiter=={other}", f"tinyattn=={version}"]
            side = make_stack_side("a night", pins, cache, Silent())
            measure_once(side, [part], options, tmp_path / "results")
            if version == "1.2":
                # Gone since: the index has it no more.
                shutil.rmtree(side.python.parents[1])
        (wheels / "tinyattn-1.2-py3-none-any.whl").unlink()
        assert "6 stacks, 6 of them new" in attnbench("manifest", "write")[2]
        log = json.loads(attnbench("manifest", "log", "--format", "json")[1])
        assert [entry["changed"] for entry in log][1:4] == [
            "tinyattn 1.0 -> 1.1",
            "tinyattn 1.1 -> 1.2",
            "aiter 0.1 -> 0.2, tinyattn 1.2 -> 1.3",
        ]
        commits = [entry["commit"] for entry in log]
        # Ends alike: nothing is searched.
        refused, _ = bisect("--stacks", f"{commits[3]}..{commits[5]}", status=3)
        assert "do not really differ here" in refused["problem"]
        # The one that cannot be installed stands beside the change: a range is left.
        found, said = bisect("--stacks", f"{commits[0]}..{commits[5]}", status=3)
        assert "6 candidates" in said
        outcomes = {step["candidate"][:10]: step["outcome"] for step in found["steps"]}
        assert outcomes == {commits[1]: "good", commits[2]: "skipped", commits[3]: "bad"}
        assert [one[:10] for one in found["suspects"]] == [commits[2], commits[3]]
        assert found["next"] == ""
        # It is there again, and the same command goes on.
        write_wheel(wheels, "tinyattn", "1.2", 1.0)
        started = sides.started
        found, said = bisect("--stacks", f"{commits[0]}..{commits[5]}", status=0)
        assert "going on with" in said
        assert sides.started - started == 5 + 2 * 5 + 2 * 5  # the ends beside it, and once more
        assert found["first_bad"] == f"{commits[3]} aiter 0.1 -> 0.2, tinyattn 1.2 -> 1.3"
        assert found["ratio"] == pytest.approx(1.06, rel=0.002)
        # Which of both packages it was, by the command it says.
        words = shlex.split(found["next"])
        assert words[:4] == ["attnbench", "bisect", WORKLOAD, "--backend"]
        assert words[-2:] == ["--stacks", f"{commits[2]}..{commits[3]}"]
        assert words[:-2][-3:] == ["TINY_ATTN", "--timer", "fake"]
        found, _ = bisect(*words[-2:], status=0)
        assert found["first_bad"] == "tinyattn 1.2 -> 1.3"
        assert found["next"] == ""


def made(day: int, *packages: str, device: str = "h200", driver: str = "") -> Stack:
    listed = tuple(sorted(packages))
    return Stack(
        device_class=device,
        stack_id=stack_id(listed),
        packages=listed,
        driver_version=driver,
        first_measured=START + timedelta(days=day),
    )


def line_of(stacks: list[Stack], text: str, here: str = "h200") -> tuple[list[str], list[str]]:
    """Labels of the candidates, and what is told."""
    told: list[str] = []
    line = stack_candidates(text, known_stacks((), stacks), told.append, lambda: here)
    return [one.label for one in line], told


def ends(stacks: list[Stack], good: int, bad: int) -> str:
    return f"{stacks[good].stack_id}..{stacks[bad].stack_id}"


SIX = [made(n, f"tinya=={n}.0", "tinyz==5") for n in range(6)]


def test_the_stacks_measured_between_are_the_candidates() -> None:
    labels, _ = line_of([*SIX, made(2, "tinya==9.0", device="b200")], ends(SIX, 1, 4))
    assert [label.partition(" ")[2] for label in labels] == [
        "",
        "tinya 1.0 -> 2.0",
        "tinya 2.0 -> 3.0",
        "tinya 3.0 -> 4.0",
    ]
    # The newer one may be the good one.
    backwards, _ = line_of(SIX, ends(SIX, 4, 1))
    assert backwards[0].startswith(SIX[4].stack_id)
    assert backwards[-1].endswith("tinya 2.0 -> 1.0")


def test_neighbours_are_searched_package_by_package() -> None:
    both = [
        made(0, "python==3.11.7", "tinya==1.0", "tinyattn==1.0", "tinyz==5", driver="570.1"),
        made(1, "python==3.12.1", "tinya==2.0", "tinyattn==1.10", "tinyz==5", "new==1"),
    ]
    labels, told = line_of(both, ends(both, 0, 1))
    assert labels == [f"stack {both[0].key}", "tinya 1.0 -> 2.0", "tinyattn 1.0 -> 1.10"]
    assert told == [
        "the stacks differ in driver, new, python too; every candidate has what is here",
        "every candidate has, unlike these stacks: tinyz is not here (they: 5)",
    ]


def test_a_driver_alone_is_no_candidate() -> None:
    drivers = [made(0, "a==1", driver="570.1"), made(1, "a==1", driver="580.1")]
    after = made(2, "a==2", driver="580.1")
    with pytest.raises(UsageError, match="no package is in both with different versions"):
        line_of(drivers, f"{drivers[0].key}..{drivers[1].key}")
    # A stack id is of every driver: the nearest of them, and no candidate twice.
    labels, told = line_of([*drivers, after], f"{drivers[0].stack_id}..{after.key}")
    assert labels == [f"stack {drivers[1].key}", "a 1 -> 2"]
    assert not any("differ in driver" in one for one in told)
    labels, told = line_of([*drivers, after], f"{drivers[0].key}..{after.key}")
    assert labels == [f"stack {drivers[0].key}", "a 1 -> 2"]
    assert "the stacks differ in driver too" in told[0]


def test_one_that_lacks_a_package_takes_it_not_out_of_the_search() -> None:
    line = [
        made(0, "flash==1", "torch==1"),
        made(1, "flash==1", "torch==2"),
        made(2, "torch==2"),  # uninstalled for a night
        made(3, "flash==2", "torch==2"),
    ]
    labels, told = line_of(line, ends(line, 0, 3))
    assert [label.partition(" ")[2] for label in labels] == ["", "torch 1 -> 2", "flash 1 -> 2"]
    assert told[0] == f"{line[2].key} is no candidate: it has no flash"
    assert not any("the stacks differ" in one for one in told)


def test_names_of_stacks() -> None:
    twice = [*SIX, *(replace(stack, device_class="b200") for stack in SIX)]
    assert len(line_of(twice, ends(SIX, 0, 5))[0]) == 6
    for stacks, text, said, here in (
        (SIX, f"{SIX[0].stack_id}..nothing", "'nothing' is no measured stack; known, newest", "a"),
        ([], "a..b", "is no measured stack; known, newest first: none", "a"),
        ([*SIX, made(9, "a==1", device="b200")], f"{SIX[0].key}..{made(9, 'a==1').key}", "on", "a"),
        (twice, ends(SIX, 0, 5), "measured on b200, h200, and this is mi300", "mi300"),
        (SIX, f"{SIX[0].key}..{SIX[0].key}", "good and bad are the same", "a"),
        (SIX, f"{SIX[0].key}..{SIX[0].key[:9]}", "no package is in both", "a"),
    ):
        with pytest.raises(UsageError, match=said):
            line_of(stacks, text, here)


def test_hostile_packages_never_reach_pip() -> None:
    evil = ["--index-url==http://evil{}", "-r==/etc/passwd{}", "a;b==$(x){}", "c==1 -r x{}"]
    both = [made(n, "ok==1", *(one.format(n) for one in evil), f"z=={n}") for n in range(2)]
    labels, _ = line_of(both, ends(both, 0, 1))
    assert labels[1:] == ["z 0 -> 1"]


def test_manifest_repositories_that_cannot_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_manifest(tmp_path / "empty", [])
    (tmp_path / "folder").mkdir()
    write_manifest(tmp_path / "stacks", SIX)
    for repository, said in (
        ("none", "no such folder"),
        ("folder", "is not a git repository"),
        ("empty", "is no measured stack; known, newest first: none"),
        ("stacks", "'a' is no measured stack|'a' names several"),
    ):
        words = ("--backend", "CPU_ATTN", "--stacks", "a..b", "--repo", repository)
        code, _, told = attnbench("bisect", WORKLOAD, *words)
        assert code == ExitCode.USAGE
        (line,) = told.splitlines()
        assert any(one in line for one in said.split("|")), line
