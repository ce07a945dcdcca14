"""asv over commits of a project: each measured by its own code, torch never installed again.

The project is a copy of this repository's package and asv.conf.json with one small suite; its
third commit makes the fake timer's attention 8 % slower. asv's environments are made with pip, so a
package index must be reachable.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from attnbench.asv_bridge.outer import PTH_NAME, outer_site_packages
from attnbench.store import ResultsFolder, RunHeader
from tests.asv_bridge.rows import row

ROOT = Path(__file__).resolve().parents[2]
TINY = "q1s32 dtype=fp32 head_size=64 heads=2/1"
SUITE = f'SUITE = Suite("decode", "Toy.", smoke=["{TINY}"], backends=("TORCH_SDPA",))\n\n\n'


class Project:
    """A toy project in its own folder with its own home."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {
            "HOME": str(folder.parent),
            "ATTNBENCH_TIMER": "fake",
            "OMP_NUM_THREADS": "1",
            **{f"GIT_{who}_NAME": "t" for who in ("AUTHOR", "COMMITTER")},
            **{f"GIT_{who}_EMAIL": "t@t" for who in ("AUTHOR", "COMMITTER")},
        }
        for name in ("PYTHONPATH", "PIP_CONSTRAINT", "ATTNBENCH_PRESET"):
            self.environment.pop(name, None)

    def run(self, *words: str, status: int = 0) -> str:
        done = subprocess.run(
            words,
            check=False,
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def asv(self, *words: str, status: int = 0) -> str:
        return self.run(sys.executable, "-m", "attnbench", "asv", *words, status=status)

    def commit(self, message: str) -> str:
        self.run("git", "add", "-A")
        self.run("git", "commit", "-q", "-m", message)
        return self.run("git", "rev-parse", "HEAD").strip()

    def results(self, commit: str) -> dict[str, dict[str, Any]]:
        """asv's results of the developers' suites: benchmark -> column -> value."""
        (path,) = self.folder.glob(f".asv/results/*/{commit[:8]}-virtualenv-*.json")
        data = json.loads(path.read_text())
        assert data["commit_hash"] == commit
        columns = data["result_columns"]
        return {n: dict(zip(columns, v, strict=False)) for n, v in data["results"].items()}


@pytest.fixture
def project(tmp_path: Path) -> Project:
    folder = tmp_path / "project"
    folder.mkdir()
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "attnbench", folder / "attnbench", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE", "asv.conf.json", ".gitignore"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, folder / name)
    (folder / "suites").mkdir()
    (folder / "dashboards").mkdir()
    shutil.copy(ROOT / "dashboards" / "default.toml", folder / "dashboards" / "default.toml")
    (folder / "suites" / "__init__.py").touch()
    ours = (ROOT / "suites" / "decode.py").read_text()
    start, end = ours.index("SUITE = "), ours.index("def setup_cache")
    (folder / "suites" / "decode.py").write_text(ours[:start] + SUITE + ours[end:])
    made = Project(folder)
    made.run("git", "init", "-q", "-b", "main", ".")
    return made


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_three_commits(project: Project) -> None:
    timers = project.folder / "attnbench" / "measure" / "timers.py"
    commits = [project.commit("one")]
    timers.write_text(timers.read_text() + "# a comment\n")
    commits.append(project.commit("two"))
    assert '"attention": 1.0' in timers.read_text()
    timers.write_text(timers.read_text().replace('"attention": 1.0', '"attention": 1.08'))
    commits.append(project.commit("three"))

    # asv run: every commit by its own code.
    project.asv("run", "ALL")
    attention, metadata = "decode.Decode.track_attention", "decode.Decode.track_metadata_build"
    found = [project.results(commit) for commit in commits]
    seconds = [one[attention]["result"][0] for one in found]
    assert seconds[1] == seconds[0]
    assert seconds[2] / seconds[0] == pytest.approx(1.08, rel=1e-9)
    assert len({one[metadata]["result"][0] for one in found}) == 1
    assert found[0][attention]["params"] == [[repr(TINY)], ["'TORCH_SDPA'"]]
    assert found[0][attention]["stats_repeat"] == [5]

    # The truth is in Parquet, one run per commit, and says which commit it is of.
    runs = ResultsFolder(project.folder / ".asv" / "measurements").runs()
    assert sorted(run.commit for run in runs) == sorted(commits)
    assert all(run.commit_time is not None for run in runs)

    # torch was never installed again: the environment looks into this one.
    (site,) = project.folder.glob(".asv/env/*/lib/python*/site-packages")
    installed = {path.name.split("-")[0] for path in site.glob("*.dist-info")}
    assert "attnbench" in installed
    assert not {n for n in installed if n.startswith(("torch", "triton", "nvidia", "numpy"))}
    assert not (site / "torch").exists()
    assert (site / PTH_NAME).read_text() == outer_site_packages()
    version = importlib.metadata.version("asv_runner")
    assert (site / f"asv_runner-{version}.dist-info").is_dir()

    # asv compare exits 0 always; its table shows what changed.
    table = project.asv("compare", "--only-changed", commits[0], commits[2])
    assert [line for line in table.splitlines() if "track_attention" in line and "1.08" in line]
    assert "track_metadata_build" not in table

    # asv continuous, with our factor: 8 % slower is seen, and a comment is not.
    said = project.asv("continuous", commits[1], commits[2], status=1)
    assert "PERFORMANCE DECREASED" in said

    # asv publish: developers' suites, the nightly history of results/, and our pages.
    nightly = row(1, commit=commits[0])
    with ResultsFolder(project.folder / "results").open_run(RunHeader.new()) as run:
        run.append(replace(nightly, run_id=run.run_id))
        run.seal()
    site_folder = project.folder / "dashboards" / "site"
    site_folder.mkdir(parents=True)
    (site_folder / "index.html").write_text("our pages")
    project.asv("publish")
    html = project.folder / ".asv" / "html"
    index = json.loads((html / "index.json").read_text())
    assert index["revision_to_hash"] == {str(n): commit for n, commit in enumerate(commits)}
    assert "nightly.decode.attention.fake_hot_eager.points" in index["benchmarks"]
    (graph,) = (
        path for path in (html / "graphs").rglob(f"{attention}.json") if "summary" not in path.parts
    )
    series = json.loads(graph.read_text())
    assert [point[0] for point in series] == [0, 1, 2]
    assert series[2][1][0] / series[0][1][0] == pytest.approx(1.08, rel=1e-6)
    assert (html / "attnbench" / "index.html").read_text() == "our pages"
    assert 'href="attnbench/index.html"' in (html / "index.html").read_text()

    # asv itself, without `attnbench` before it, loads the plug-in too.
    project.run(sys.executable, "-m", "asv", "publish")
    assert (html / "attnbench" / "index.html").is_file()
