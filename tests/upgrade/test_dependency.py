"""Two versions of one dependency, in two real environments, by turns on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import attnbench
from attnbench.errors import DataError, ExitCode
from attnbench.history import NEEDED_COLUMNS
from attnbench.store import ResultsFolder
from attnbench.store.record import Measurement
from attnbench.store.schema import rows_to_table
from attnbench.upgrade.cost import CostVerdict
from attnbench.upgrade.dependency import SidesReport, judge_sides
from tests.history.fake import row
from tests.upgrade.package_server import wheel_bytes

MODULE = """
import time
from attnbench.backends.cpu_attn import CPUAttentionBackend, CPUAttentionImpl

class TinyImpl(CPUAttentionImpl):
    def forward(self, *args, **kwargs):
        time.sleep({delay})
        return CPUAttentionImpl.forward(self, *args, **kwargs)

class TinyBackend(CPUAttentionBackend):
    @staticmethod
    def get_name():
        return "TINY_ATTN"

    @staticmethod
    def get_impl_cls():
        return TinyImpl
"""


def write_wheel(folder: Path, version: str, delay: float) -> Path:
    entry = "[attnbench.backends]\nTINY_ATTN = tinyattn:TinyBackend\n"
    body = wheel_bytes(
        "tinyattn",
        version,
        {
            "tinyattn.py": MODULE.format(delay=delay).encode(),
            f"tinyattn-{version}.dist-info/entry_points.txt": entry.encode(),
        },
    )
    path = folder / f"tinyattn-{version}-py3-none-any.whl"
    path.write_bytes(body)
    return path


def upgrade(project: Path, *words: str) -> subprocess.CompletedProcess[str]:
    (project / "attnbench.toml").write_text("budget_s = 0.3\n", encoding="utf-8")
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("ATTNBENCH_", "PIP_"))}
    variables |= {"OMP_NUM_THREADS": "1", "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}
    return subprocess.run(
        [sys.executable, "-m", "attnbench", "upgrade", *words, "--cache-dir", str(project / "c")],
        cwd=project,
        env={
            **variables,
            "OMP_NUM_THREADS": "1",
            "PIP_NO_INDEX": "1",
            "PIP_CONFIG_FILE": os.devnull,
        },
        capture_output=True,
        text=True,
        check=False,
    )


MIX = ("--model", "llama-3-8b", "--tp", "8", "--batch", "2*2q1s40", "--backend", "TINY_ATTN")


@pytest.mark.slow
def test_a_slower_dependency_is_measured_by_turns(tmp_path: Path) -> None:
    old, new = write_wheel(tmp_path, "1.0", 0.05), write_wheel(tmp_path, "2.0", 0.15)
    done = upgrade(tmp_path, "--from", str(old), "--to", str(new), *MIX, "-f", "json")
    assert done.returncode == ExitCode.REGRESSION, done.stderr
    report = json.loads(done.stdout)
    (family,) = report["families"]
    assert (family["backend"], family["verdict"]) == ("TINY_ATTN", "slower")
    assert family["ratio"] > 2
    assert report["environment"] == "tinyattn 1.0 -> 2.0"

    columns = ["run_id", "replicate", "stack", "started_at"]
    table = ResultsFolder(tmp_path / "results").table(columns, {"metric": "attention"})
    kept = {(one["run_id"], one["replicate"]): one for one in table.to_pylist()}
    before, after = report["runs"]
    assert all("tinyattn==1.0" in kept[before, r]["stack"] for r in range(3))
    assert all("tinyattn==2.0" in kept[after, r]["stack"] for r in range(3))
    # A B, B A, A B: neither is always the first on a device the other has warmed.
    order = sorted(kept, key=lambda key: kept[key]["started_at"])
    assert [run for run, _ in order] == [before, after, after, before, before, after]


@pytest.mark.slow
def test_an_equal_dependency_is_no_regression(tmp_path: Path) -> None:
    old, new = write_wheel(tmp_path, "1.0", 0.05), write_wheel(tmp_path, "3.0", 0.05)
    done = upgrade(tmp_path, "--from", str(old), "--to", str(new), *MIX, "-f", "markdown")
    assert done.returncode == ExitCode.OK, done.stdout + done.stderr
    assert done.stdout.startswith("# tinyattn 1.0 → tinyattn 3.0\n")
    assert "| TINY_ATTN | same |" in done.stdout


@pytest.mark.slow
def test_defaults_of_our_own_selector_between_two_commits(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(attnbench.__file__).parent, clone / "attnbench", ignore=ignore)

    def git(*words: str) -> None:
        who = ("-c", "user.name=n", "-c", "user.email=e@example.org")
        subprocess.run(["git", "-C", str(clone), *who, *words], check=True, capture_output=True)

    git("init", "-q", "-b", "main")
    git("add", ".")
    git("commit", "-qm", "one")
    file = clone / "attnbench" / "selection" / "builtin_platforms.py"
    text = file.read_text(encoding="utf-8")
    assert text.count('("CPU_ATTN",') == 1
    file.write_text(text.replace('("CPU_ATTN",', '("TORCH_SDPA", "CPU_ATTN",'), encoding="utf-8")
    git("commit", "-qam", "two")

    sides = ("--from", f"{clone}@HEAD~1", "--to", f"{clone}@HEAD")
    done = upgrade(tmp_path, *sides, "-f", "json")
    assert done.returncode == ExitCode.OK, done.stderr
    changed = json.loads(done.stdout)["defaults"]
    assert {"cell": "cpu bf16 none", "before": "CPU_ATTN", "after": "TORCH_SDPA"} in changed
    assert all(one["cell"].startswith("cpu ") for one in changed)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--from", "triton==3.6.0", "--to", "triton==3.7.1"), "say what to measure"),
        (("--from", "triton==3.6.0", "--to", "torch==2.13.0"), "two versions of one distribution"),
        (("--from", "triton==3.6.0", "--to", "triton==3.7.1", "--via", "triton==3.7.0"), "--via"),
    ],
)
def test_what_cannot_be_measured_is_said(tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    done = upgrade(tmp_path, *words)
    assert (done.returncode, "Traceback" in done.stderr) == (ExitCode.USAGE, False)
    assert said in done.stderr


# --- judging --------------------------------------------------------------------------------------
def points(backend: str, before: float | None, after: float | None, workload: str) -> Any:
    found: list[Measurement] = []
    for run, seconds in ((0, before), (1, after)):
        status = "OK" if seconds else "UNSUPPORTED"
        found += [
            row(run, r, backend=backend, workload=workload, status=status,
                seconds=seconds and seconds * (1 + 0.01 * (r - 1)))
            for r in range(3)
        ]  # fmt: skip
    return found


def judged(*groups: list[Measurement], weights: dict[str, float] | None = None) -> SidesReport:
    found = [one for group in groups for one in group]
    runs = sorted({one.run_id for one in found})
    table = rows_to_table(found).select(NEEDED_COLUMNS)
    return judge_sides(table, ("old", "new"), (runs[0], runs[1]), weights)


def test_families_are_judged_each() -> None:
    report = judged(
        points("CPU_ATTN", 1e-3, 2e-3, "q1k"),
        points("TORCH_SDPA", 1e-3, 1e-3, "q1k"),
        points("TRITON_ATTN", None, None, "q1k"),
        weights={"q1k": 1.0},
    )
    verdicts = {one.backend: one.verdict for one in report.families}
    assert verdicts == {
        "CPU_ATTN": CostVerdict.SLOWER,
        "TORCH_SDPA": CostVerdict.SAME,
        "TRITON_ATTN": CostVerdict.NOT_MEASURED,
    }
    assert report.exit_code is ExitCode.REGRESSION


def test_a_mix_decides_and_a_suite_is_as_bad_as_its_worst() -> None:
    groups = (
        points("CPU_ATTN", 1e-3, 2e-3, "q1k"),
        points("CPU_ATTN", 1e-3, 0.5e-3, "8q1s1k"),
    )
    mix = judged(*groups, weights={"q1k": 1.0, "8q1s1k": 9.0})
    assert mix.families[0].ratio is not None
    assert mix.families[0].ratio.ratio == pytest.approx((2 + 9 * 0.5) / 10)
    assert (mix.families[0].verdict, mix.exit_code) == (CostVerdict.FASTER, ExitCode.OK)
    suite = judged(*groups)
    assert (suite.families[0].verdict, suite.exit_code) == (CostVerdict.SLOWER, ExitCode.REGRESSION)


def test_lost_support_and_nothing_timed() -> None:
    weights = {"q1k": 1.0}
    lost = judged(points("CPU_ATTN", 1e-3, None, "q1k"), weights=weights)
    assert lost.exit_code is ExitCode.REGRESSION
    assert "was OK and is UNSUPPORTED" in lost.families[0].why
    nothing = judged(points("CPU_ATTN", None, None, "q1k"), weights=weights)
    assert nothing.exit_code is ExitCode.UNDECIDED
    beside = judged(
        points("CPU_ATTN", 1e-3, 1e-3, "q1k"), points("TRITON_ATTN", None, None, "q1k"),
        weights=weights,
    )  # fmt: skip
    assert beside.exit_code is ExitCode.OK


def test_runs_without_a_common_point() -> None:
    one = [one for one in points("CPU_ATTN", 1e-3, 1e-3, "q1k") if one.replicate == 0][:1]
    other = points("TORCH_SDPA", 1e-3, 1e-3, "q1k")[3:]
    with pytest.raises(DataError, match="share no point"):
        judged(one, other)
