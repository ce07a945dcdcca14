"""`attnbench init`: what it writes loads, runs and passes, and nothing is overwritten."""

from __future__ import annotations

import errno
import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

import attnbench.scaffold as scaffold
from attnbench.errors import InfrastructureError, UsageError
from attnbench.history.acknowledge import load_acknowledgements
from attnbench.scaffold import project_files, write_project
from attnbench.settings import Settings, load_settings
from attnbench.workload.suite import load_suites
from tests.cli.conftest import Attnbench

ROOT = Path(__file__).parent.parent.parent
WORKFLOW = ".github/workflows/attnbench.yml"


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def workflow(folder: Path) -> dict[Any, Any]:
    loaded: dict[Any, Any] = yaml.safe_load((folder / WORKFLOW).read_text(encoding="utf-8"))
    return loaded


def scripts(folder: Path) -> list[str]:
    return [step["run"] for step in workflow(folder)["jobs"]["nightly"]["steps"] if "run" in step]


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    write_project(tmp_path / "mine")
    return tmp_path / "mine"


def test_what_is_written_is_what_this_project_uses(fresh: Path) -> None:
    written = files_of(fresh)
    assert set(written) == {*project_files("mine"), ".gitignore"}
    for name in ("decode", "mixed", "mla", "prefill", "__init__"):
        assert written[f"suites/{name}.py"] == (ROOT / "suites" / f"{name}.py").read_bytes()
    assert written["dashboards/default.toml"] == (ROOT / "dashboards/default.toml").read_bytes()


def test_settings_suites_and_acknowledgements_load(fresh: Path) -> None:
    found = load_settings(fresh / "attnbench.toml")
    plain = Settings()
    for name in Settings.__dataclass_fields__:
        value, default = getattr(found, name), getattr(plain, name)
        assert value == (fresh / default if isinstance(default, Path) else default), name
    assert set(load_suites(found.suites)) == {"decode", "mixed", "mla", "prefill"}
    assert load_acknowledgements(found.acknowledgements) == ()


def test_the_example_in_the_acknowledgements_is_one(fresh: Path) -> None:
    from datetime import date

    from attnbench.history.acknowledge import parse_acknowledgements

    text = (fresh / "acknowledged.toml").read_text(encoding="utf-8")
    example = text[text.index("# [[known]]") :]
    lines = [line.removeprefix("# ").replace("# statuses", "#") for line in example.splitlines()]
    (entry,) = parse_acknowledgements("\n".join(lines).encode(), "example", date(2026, 11, 21))
    assert entry.up_to == 1.08


def test_asv_loads_its_settings(tmp_path: Path) -> None:
    from asv.config import Config

    hostile = tmp_path / 'my "proj\\ect'
    write_project(hostile)
    config = Config.load(str(hostile / "asv.conf.json"))
    assert config.project == 'my "proj\\ect'
    ours = Config.load(str(ROOT / "asv.conf.json"))
    names = ("plugins", "launch_method", "benchmark_dir", "results_dir", "html_dir", "branches")
    for name in names:
        assert getattr(config, name) == getattr(ours, name), name


def test_the_workflow_is_one(fresh: Path) -> None:
    found = workflow(fresh)
    triggers = found[True]  # YAML 1.1 reads `on` as a truth value
    assert [list(one) for one in triggers["schedule"]] == [["cron"]]
    assert triggers["workflow_dispatch"]["inputs"]["preset"]["options"][0] == "nightly"
    assert found["permissions"] == {"contents": "read"}
    assert found["concurrency"] == {"group": "attnbench-nightly", "cancel-in-progress": False}
    job = found["jobs"]["nightly"]
    assert "self-hosted" in job["runs-on"]
    assert 0 < job["timeout-minutes"] <= 24 * 60
    text = (fresh / WORKFLOW).read_text(encoding="utf-8")
    assert "secrets." not in text
    for step in job["steps"]:
        assert re.fullmatch(r"actions/[a-z-]+@v\d+", step.get("uses", "actions/checkout@v4"))
        # What somebody types reaches the shell as a variable, never as a piece of its script.
        assert "${{" not in step.get("run", "")
    uploads = [step["with"]["path"] for step in job["steps"] if "upload" in step.get("uses", "")]
    assert uploads == ["dashboards/site", "${{ env.RESULTS }}"]


def test_every_command_of_the_workflow_is_one(fresh: Path) -> None:
    """Each `attnbench VERB --option`: the verb is there and its help names the option."""
    from typer.main import get_command

    from attnbench.cli.main import app

    verbs: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
    seen = set()
    for script in scripts(fresh):
        subprocess.run(["bash", "-n", "-c", script], check=True)
        for line in script.splitlines():
            if not line.strip().startswith("attnbench "):
                continue
            words = shlex.split(line.split("||")[0])[1:]
            if words == ["--version"]:
                continue
            verb = verbs[words[0]]
            options = {option for parameter in verb.params for option in parameter.opts}
            assert {word for word in words if word.startswith("--")} <= options
            seen.add(words[0])
    assert seen == {"nightly", "backends"}


def run_night(folder: Path, shim: str, home: Path) -> subprocess.CompletedProcess[str]:
    """The measuring step of the workflow, as a runner does it, with another `attnbench`."""
    (script,) = [s for s in scripts(folder) if "attnbench nightly" in s]
    programs = home / "bin"
    programs.mkdir(parents=True)
    (programs / "attnbench").write_text(f"#!/bin/bash\n{shim}\n", encoding="utf-8")
    (programs / "attnbench").chmod(0o755)
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script],
        cwd=folder,
        env={
            **{k: v for k, v in os.environ.items() if not k.startswith("ATTNBENCH_")},
            "PATH": f"{programs}:{os.environ['PATH']}",
            "HOME": str(home),
            "GITHUB_REPOSITORY": "me/mine",
            "GITHUB_ENV": str(home / "env"),
            "GITHUB_STEP_SUMMARY": str(home / "summary"),
            "PRESET": "smoke",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )


@pytest.mark.parametrize(
    ("code", "expected", "said"),
    [
        (0, 0, ""),
        (1, 1, "::error title=attnbench::a regression is confirmed"),
        (2, 2, "::error title=attnbench::usage"),
        (3, 0, "::warning title=attnbench::undecided"),
        (4, 4, "::error title=attnbench::incomplete"),
        (137, 137, "::error title=attnbench::unexpected exit code 137"),
    ],
)
def test_the_workflow_ends_as_the_exit_code_says(
    fresh: Path, tmp_path: Path, code: int, expected: int, said: str
) -> None:
    home = tmp_path / "home with space"
    shim = f"mkdir -p dashboards/site; echo '### night' > dashboards/site/summary.md; exit {code}"
    done = run_night(fresh, shim, home)
    assert done.returncode == expected, done.stderr
    assert said in done.stdout
    assert ("::" in done.stdout) is bool(said)
    results = home / "attnbench" / "me" / "mine" / "results"
    assert (home / "env").read_text(encoding="utf-8") == f"RESULTS={results}\n"
    assert (home / "summary").read_text(encoding="utf-8") == "### night\n"


@pytest.mark.slow
def test_a_night_of_what_was_written_passes(fresh: Path, tmp_path: Path) -> None:
    real = (
        f'"{sys.executable}" -m attnbench "$@" --timer fake --backend TORCH_SDPA --backend '
        "TORCH_MLA --replicates 1"
    )
    done = run_night(fresh, real, tmp_path / "home")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no baseline yet" in done.stdout
    assert (fresh / "dashboards" / "site" / "index.html").is_file()
    assert list((tmp_path / "home/attnbench/me/mine/results/runs").glob("*.parquet"))
    assert "TORCH" not in (tmp_path / "home" / "summary").read_text(encoding="utf-8")


def test_git_ignores_results_and_pages_and_nothing_else(fresh: Path) -> None:
    subprocess.run(["git", "init", "--quiet", str(fresh)], check=True)
    for path in ("results/runs/a.parquet", "dashboards/site/index.html", ".asv/env/x", "src/a.py"):
        (fresh / path).parent.mkdir(parents=True, exist_ok=True)
        (fresh / path).write_text("x", encoding="utf-8")
    shown = subprocess.run(
        ["git", "-C", str(fresh), "status", "--porcelain", "-uall"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    listed = {line[3:] for line in shown.splitlines()}
    assert listed == {*project_files("mine"), ".gitignore", "src/a.py"}


def test_what_is_there_is_named_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "suites").mkdir()
    (tmp_path / "suites" / "decode.py").write_text("mine", encoding="utf-8")
    (tmp_path / "asv.conf.json").symlink_to(tmp_path / "nowhere")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UsageError) as caught:
        write_project(tmp_path)
    assert int(caught.value.exit_code) == 2
    assert "has asv.conf.json, suites/decode.py already" in str(caught.value)
    assert "diff -r" in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == before
    assert files_of(tmp_path) == {"suites/decode.py": b"mine"}


def test_twice_is_refused(fresh: Path) -> None:
    before = files_of(fresh)
    with pytest.raises(UsageError, match=r"has attnbench\.toml, acknowledged\.toml, "):
        write_project(fresh)
    assert files_of(fresh) == before


def test_gitignore_gets_the_lines_it_lacks(tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_bytes(b"*.o\n__pycache__/\n\xff")
    write_project(tmp_path)
    found = (tmp_path / ".gitignore").read_bytes()
    assert found.startswith(b"*.o\n__pycache__/\n\xff\n")
    assert found.count(b"__pycache__/\n") == 1
    assert b"\n/results/*\n" in found


def test_other_files_of_a_repository_stay(tmp_path: Path) -> None:
    other = tmp_path / ".github" / "workflows" / "ci.yml"
    other.parent.mkdir(parents=True)
    other.write_text("on: push\n", encoding="utf-8")
    write_project(tmp_path)
    assert other.read_text(encoding="utf-8") == "on: push\n"
    assert (tmp_path / WORKFLOW).is_file()


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".github").mkdir()

    def fail(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(scaffold, "_add_ignored", fail)
    with pytest.raises(InfrastructureError, match="No space left"):
        write_project(tmp_path)
    assert os.listdir(tmp_path) == [".github"]
    assert os.listdir(tmp_path / ".github") == []


def test_a_file_where_a_folder_belongs(tmp_path: Path) -> None:
    (tmp_path / "suites").write_text("", encoding="utf-8")
    with pytest.raises(UsageError, match="cannot be written"):
        write_project(tmp_path)
    assert os.listdir(tmp_path) == ["suites"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(UsageError, match="name a folder you can write"):
        write_project(tmp_path / "mine")


def test_an_installed_package_has_the_files_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the wheel lays them out; and one without them says so."""
    package = tmp_path / "site-packages" / "attnbench" / "scaffold"
    package.mkdir(parents=True)
    files = package / "files"
    files.mkdir()
    for source in (ROOT / "attnbench/scaffold/files").iterdir():
        if source.is_file():
            (files / source.name).write_bytes(source.read_bytes())
    monkeypatch.setattr(scaffold, "_FILES", files)
    monkeypatch.setattr(scaffold, "__file__", str(package / "__init__.py"))
    (tmp_path / "site-packages" / "suites").mkdir()  # of another package
    with pytest.raises(InfrastructureError, match="lacks its suites"):
        write_project(tmp_path / "mine")
    for folder in ("suites", "dashboards"):
        (files / folder).mkdir()
        for source in (ROOT / folder).iterdir():
            if source.is_file():
                (files / folder / source.name).write_bytes(source.read_bytes())
    write_project(tmp_path / "mine")
    assert set(files_of(tmp_path / "mine")) == {*project_files("mine"), ".gitignore"}


def test_as_a_user_types_it(attnbench: Attnbench, project: Path) -> None:
    done = attnbench("init", "night")
    assert done.returncode == 0, done.stderr
    assert "night/attnbench.toml" in done.stdout.splitlines()
    assert "not the root of a git repository" in done.stderr
    again = attnbench("init", "night")
    assert again.returncode == 2
    assert len(again.stderr.strip().splitlines()) == 1
    assert "Traceback" not in again.stderr
