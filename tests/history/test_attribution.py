"""What changed with a change of level: code, environment, both or neither; over real commits."""

from __future__ import annotations

import random
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from attnbench.history.attribution import (
    Attribution,
    Cause,
    attribute,
    attribute_since,
    locked_clocks,
    series_changes,
)
from attnbench.history.runs import RunSummary, runs_of
from attnbench.history.series import Series
from attnbench.history.series_rows import series_of
from attnbench.store import ResultsFolder, RunHeader
from attnbench.store.record import Measurement, stack_id
from attnbench.store.schema import rows_to_table
from tests.history.fake import HOSTILE, row

NIGHTS, STEP = 20, 12
SHAS = [f"{night:02x}" * 20 for night in range(NIGHTS)]


def stack(**versions: str) -> dict[str, Any]:
    entries = tuple(sorted(f"{name}=={version}" for name, version in versions.items()))
    return {"stack": entries, "stack_id": stack_id(entries)}


OLD = stack(python="3.11.7", torch="2.12.0", triton="3.6.0")


def nights(of_night: Any, **common: Any) -> list[Measurement]:
    """A series that is 8 % slower from night STEP on; `of_night(n)` are the columns of night n."""
    rows = []
    for night in range(NIGHTS):
        seconds = 1e-3 * (1.08 if night >= STEP else 1.0) * (1 + 0.001 * (night % 3))
        columns = {"commit": SHAS[0], **OLD, **common, **of_night(night)}
        rows += [row(night, r, seconds=seconds, **columns) for r in range(3)]
    return rows


def read(rows: list[Measurement]) -> tuple[Series, dict[str, RunSummary]]:
    table = rows_to_table(rows)
    (series,) = series_of(table)
    return series, {run.run_id: run for run in runs_of(table)}


def found(rows: list[Measurement], repository: Path | None = None) -> Attribution:
    series, runs = read(rows)
    (change,) = series_changes(series)
    assert change.index == STEP
    result = attribute(series, change, runs, repository)
    since = attribute_since(series, series.values[STEP], runs, repository)
    assert since == result
    return result


def at_step(**columns: Any) -> Any:
    return lambda night: columns if night >= STEP else {}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Six commits in a line, the fourth with a hostile subject, and one on another branch."""
    folder = tmp_path_factory.mktemp("repository")

    def git(*words: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        done = subprocess.run(
            ["git", *who, *words], cwd=folder, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    git("init", "-q", "-b", "main")
    shas = []
    for number in range(6):
        subject = HOSTILE if number == 3 else f"Change {number}"
        git("commit", "-q", "--allow-empty", "-m", subject)
        shas.append(git("rev-parse", "HEAD"))
    git("checkout", "-q", "-b", "other", shas[1])
    git("commit", "-q", "--allow-empty", "-m", "Elsewhere")
    shas.append(git("rev-parse", "HEAD"))
    return folder, shas


def test_code_of_one_commit(repository: tuple[Path, list[str]]) -> None:
    folder, shas = repository
    rows = nights(lambda n: {"commit": shas[2] if n >= STEP else shas[1]})
    one = found(rows, folder)
    assert (one.cause, one.num_runs, one.environment) == (Cause.CODE, 1, None)
    assert one.text == f"commit {shas[2][:7]} Change 2"
    assert one.bisect == ""  # it is already named
    assert one.before.run_id < one.after.run_id


def test_code_of_several_commits(repository: tuple[Path, list[str]]) -> None:
    folder, shas = repository
    rows = nights(lambda n: {"commit": shas[5] if n >= STEP else shas[1]})
    one = found(rows, folder)
    assert one.commits is not None
    assert one.commits.count == 4
    assert one.commits.subjects[0].endswith("Change 5")
    assert one.commits.subjects[2] == f"{shas[3][:7]} {HOSTILE}"
    assert one.text == f"commits {shas[1][:7]}..{shas[5][:7]} (4 commits)"
    words = shlex.split(one.bisect)
    assert words[:3] == ["attnbench", "bisect", "4q1s4k dtype=fp32"]
    assert words[3:] == ["--backend", "CPU_ATTN", "--commits", f"{shas[1]}..{shas[5]}"]


def test_commits_that_nobody_knows_are_named_and_not_counted(
    repository: tuple[Path, list[str]],
) -> None:
    for where in (None, repository[0], repository[0] / "absent"):
        one = found(nights(lambda n: {"commit": SHAS[n >= STEP]}), where)
        assert one.text == f"commits {SHAS[0][:7]}..{SHAS[1][:7]}"
        assert one.commits is not None
        assert one.commits.count is None


def test_rebased_history_is_no_line(repository: tuple[Path, list[str]]) -> None:
    folder, shas = repository
    one = found(nights(lambda n: {"commit": shas[6] if n >= STEP else shas[4]}), folder)
    assert one.text == (
        f"commits {shas[4][:7]} and {shas[6][:7]}, of which neither follows the other"
    )
    assert (one.cause, one.bisect) == (Cause.CODE, "")


def test_a_stored_commit_is_never_an_option_of_git(repository: tuple[Path, list[str]]) -> None:
    folder, shas = repository
    evil = f"--output={folder / 'written'}"
    one = found(nights(lambda n: {"commit": evil if n >= STEP else shas[1]}), folder)
    assert not (folder / "written").exists()
    assert one.cause is Cause.CODE


@pytest.mark.parametrize(
    ("columns", "text", "bisect"),
    [
        (
            stack(python="3.11.7", torch="2.13.0", triton="3.6.0"),
            "torch 2.12.0 -> 2.13.0",
            "--package torch==2.12.0..2.13.0",
        ),
        ({"driver_version": "570.1"}, "driver 560.2 -> 570.1", ""),
        ({"container_digest": "sha256:bb"}, "container sha256:aa -> sha256:bb", ""),
        ({"hostname": "night-2"}, "host night-1 -> night-2", ""),
        ({"device_uuid": "GPU-b"}, "device GPU-a -> GPU-b", ""),
        (
            stack(python="3.11.7", torch="2.13.0", triton="3.7.1"),
            "torch 2.12.0 -> 2.13.0, triton 3.6.0 -> 3.7.1",
            "--stacks",
        ),
        (
            stack(python="3.11.7", torch="2.12.0", triton="3.6.0", vllm="0.22.1"),
            "+ vllm 0.22.1",
            "",
        ),
    ],
)
def test_environment(columns: dict[str, Any], text: str, bisect: str) -> None:
    start = {"driver_version": "560.2", "device_uuid": "GPU-a", "container_digest": "sha256:aa"}
    one = found(nights(at_step(**columns), **start))
    assert (one.cause, one.commits, one.text) == (Cause.ENVIRONMENT, None, text)
    if not bisect:
        assert one.bisect == ""
    elif bisect == "--stacks":
        assert one.bisect.endswith(f"--stacks {OLD['stack_id']}..{columns['stack_id']}")
    else:
        assert one.bisect.endswith(f" {bisect}")


def test_a_fact_that_an_older_file_lacks_is_no_change() -> None:
    assert found(nights(at_step(device_uuid="GPU-b"))).cause is Cause.UNKNOWN


def test_a_stored_name_that_is_no_hash_is_never_looked_up(
    repository: tuple[Path, list[str]],
) -> None:
    one = found(nights(lambda n: {"commit": "main" if n >= STEP else "HEAD~1"}), repository[0])
    assert one.commits is not None
    assert (one.commits.first, one.commits.last, one.commits.count) == ("HEAD~1", "main", None)


def test_noise_at_the_step_makes_every_run_of_the_range_a_suspect() -> None:
    rng = random.Random(3)
    rows = []
    for night in range(60):
        level = 1.03 if night >= 40 else 1.0
        seconds = 1e-3 * level * (1 + rng.gauss(0, 0.012))
        rows.append(row(night, seconds=seconds, commit=f"{night:02x}" * 20, **OLD))
    series, runs = read(rows)
    (change,) = series_changes(series)
    assert change.high - change.low > 2
    one = attribute(series, change, runs)
    assert one.commits is not None
    assert one.num_runs == change.high - change.low
    assert (one.commits.first, one.commits.last) == (
        series.values[change.low].commit,
        series.values[change.high].commit,
    )
    assert change.low < 40 <= change.high


def test_both_changed_is_said(repository: tuple[Path, list[str]]) -> None:
    folder, shas = repository
    new = stack(python="3.11.7", torch="2.13.0", triton="3.6.0")
    rows = nights(lambda n: {"commit": shas[5], **new} if n >= STEP else {"commit": shas[3]})
    one = found(rows, folder)
    assert one.cause is Cause.BOTH
    assert one.text == (
        f"commits {shas[3][:7]}..{shas[5][:7]} (2 commits) and torch 2.12.0 -> 2.13.0 "
        "changed together"
    )
    assert one.bisect.endswith("--package torch==2.12.0..2.13.0")


def test_nothing_recorded_changed() -> None:
    one = found(nights(lambda n: {}))
    assert one.cause is Cause.UNKNOWN
    assert "nothing recorded explains it" in one.text
    assert one.bisect == ""


def test_a_change_before_or_after_the_step_is_not_blamed() -> None:
    other = {"driver_version": "570.1"}
    early = found(nights(lambda n: other if n >= STEP - 1 else {"driver_version": "560.2"}))
    late = found(nights(lambda n: other if n > STEP else {"driver_version": "560.2"}))
    assert early.cause is late.cause is Cause.UNKNOWN


def test_noise_that_hides_the_night_widens_the_range() -> None:
    """Commits change every night; missing nights at the step leave three suspects."""
    rows = nights(lambda n: {"commit": SHAS[n]})
    series, _ = read(rows)
    gone = {series.values[STEP].run_id, series.values[STEP + 1].run_id}
    series, runs = read([r for r in rows if r.run_id not in gone])
    (change,) = series_changes(series)
    one = attribute(series, change, runs)
    assert one.commits is not None
    assert (one.commits.first, one.commits.last) == (SHAS[STEP - 1], SHAS[STEP + 2])
    refused = [
        replace(r, status="UNSUPPORTED", samples=(), reasons=("no",)) if r.run_id in gone else r
        for r in rows
    ]
    series, runs = read(refused)
    (change,) = series_changes(series)
    one = attribute(series, change, runs)
    assert one.num_runs == 3


def test_clocks(tmp_path: Path) -> None:
    folder = ResultsFolder(tmp_path)
    ids = []
    for hz in (0.0, 1.5e9, None):
        header = RunHeader.new(options={} if hz is None else {"locked_clock_hz": hz})
        with folder.open_run(header) as run:
            run.append(replace(row(0), run_id=run.run_id))
            run.seal()
        ids.append(header.run_id)
    clocks = locked_clocks(folder, ids)
    assert clocks == {ids[0]: "free", ids[1]: "locked at 1500 MHz"}
    series, runs = read(nights(lambda n: {}))
    (change,) = series_changes(series)
    by_night = {
        v.run_id: "free" if n < STEP else "locked at 1500 MHz" for n, v in enumerate(series.values)
    }
    one = attribute(series, change, runs, clocks=by_night)
    assert (one.cause, one.text) == (Cause.ENVIRONMENT, "clocks free -> locked at 1500 MHz")


def test_the_first_run_has_nothing_before_it() -> None:
    series, runs = read(nights(lambda n: {}))
    assert attribute_since(series, series.values[0], runs) is None


def test_the_run_before_is_one_of_the_same_kind() -> None:
    """A dirty tree and an untimed night between are not what the new level is laid beside."""

    def of_night(night: int) -> dict[str, Any]:
        if night == STEP - 1:
            return {"commit": SHAS[1] + "+dirty"}
        if night == STEP - 2:
            return {"commit": SHAS[2], "status": "UNSUPPORTED"}
        return {"commit": SHAS[3 if night < STEP else 4]}

    series, runs = read(nights(of_night))
    one = attribute_since(series, series.values[STEP], runs)
    assert one is not None
    assert one.commits is not None
    assert (one.commits.first, one.commits.last) == (SHAS[3], SHAS[4])
    assert one.before.run_id == series.values[STEP - 3].run_id


def test_a_lost_support_is_attributed_too() -> None:
    new = stack(python="3.11.7", torch="2.13.0", triton="3.6.0")
    rows = nights(at_step(status="UNSUPPORTED", **new))
    series, runs = read(rows)
    one = attribute_since(series, series.values[STEP], runs)
    assert one is not None
    assert one.text == "torch 2.12.0 -> 2.13.0"
