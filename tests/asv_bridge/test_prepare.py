"""What must be in place before an asv command, and the pages in asv's site."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from attnbench.asv_bridge import asv_api
from attnbench.asv_bridge.command import with_factor
from attnbench.asv_bridge.plan_grid import plan_grid
from attnbench.asv_bridge.plugin import FOLDER, add_pages
from attnbench.asv_bridge.prepare import check_repository, find_config
from attnbench.errors import UsageError
from attnbench.workload import Suite

ROOT = Path(__file__).resolve().parents[2]


def attnbench(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`attnbench WORDS...` in `folder`, as typed."""
    return subprocess.run(
        [sys.executable, "-m", "attnbench", *words],
        check=False,
        cwd=folder,
        env=os.environ | {"HOME": str(folder), "PYTHONPATH": str(ROOT)} | variables,
        capture_output=True,
        text=True,
    )


def project(folder: Path, **keys: object) -> Path:
    """A git repository with one commit and asv.conf.json."""
    config = {
        "version": 1,
        "project": "toy",
        "repo": ".",
        "branches": ["HEAD"],
        "environment_type": "virtualenv",
        "benchmark_dir": "suites",
        "env_dir": ".asv/env",
        "results_dir": ".asv/results",
        "html_dir": ".asv/html",
        **keys,
    }
    (folder / "asv.conf.json").write_text(json.dumps(config))
    subprocess.run(["git", "init", "-q", "."], check=True, cwd=folder)
    words = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-q", "--allow-empty"]
    subprocess.run([*words, "-m", "one"], check=True, cwd=folder)
    return folder


def test_our_own_configuration() -> None:
    """asv.conf.json of this repository says what docs/asv.md says."""
    config = find_config(str(ROOT / "asv.conf.json"))
    assert config.benchmark_dir == ROOT / "suites"
    assert config.env_dir == ROOT / ".asv" / "env"
    text = (ROOT / "asv.conf.json").read_text()
    values = json.loads("\n".join(x for x in text.splitlines() if not x.strip().startswith("//")))
    assert values["environment_type"] == "virtualenv"
    assert values["matrix"] == {}
    assert values["launch_method"] == "forkserver"
    assert values["plugins"] == [".attnbench.asv_bridge.plugin"]
    for command in (values["build_command"][0], values["install_command"][0]):
        assert "--no-deps" in command
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert ".asv/" in ignored
    assert not [word for word in ("/home", "/work", "/root", "/usr") if word in text]


def test_subcommand_and_config_argument() -> None:
    for words, command, config in (
        ([], "", None),
        (["--help"], "", None),
        (["run", "-b", "x"], "run", None),
        (["--config", "a.json", "publish"], "publish", "a.json"),
        (["-v", "compare", "--config=b.json", "A", "B"], "compare", "b.json"),
    ):
        assert asv_api.subcommand(words) == command
        assert asv_api.config_argument(words) == config


def test_our_factor_comes_before_the_users() -> None:
    ours = ["--factor", "1.02"]
    assert with_factor(["continuous", "A", "B"]) == ["continuous", *ours, "A", "B"]
    assert with_factor(["-v", "compare", "-f", "1.5", "A", "B"]) == [
        *("-v", "compare", *ours, "-f", "1.5", "A", "B")
    ]
    assert with_factor(["run", "HEAD"]) == ["run", "HEAD"]
    from asv.commands import make_argparser

    parser, _ = make_argparser()
    assert parser.parse_args(with_factor(["compare", "A", "B"])).factor == 1.02
    assert parser.parse_args(with_factor(["compare", "A", "B", "-f", "1.5"])).factor == 1.5


def test_no_configuration(tmp_path: Path) -> None:
    done = attnbench(tmp_path, "asv", "run")
    assert done.returncode == 2
    assert done.stderr.strip() == (
        f"attnbench: no asv.conf.json in {tmp_path}; go to the folder that has it, "
        "or give --config FILE"
    )
    done = attnbench(tmp_path, "asv", "--config", "absent.json", "run")
    assert done.returncode == 2
    assert "absent.json: no such file" in done.stderr


@pytest.mark.parametrize("text", ["{", '{"version": 1, "project": "x"}', '{"version": 99}'])
def test_a_broken_configuration(tmp_path: Path, text: str) -> None:
    (tmp_path / "asv.conf.json").write_text(text)
    with pytest.raises(UsageError, match=r"asv\.conf\.json.*docs/asv\.md"):
        find_config(str(tmp_path / "asv.conf.json"))


def test_no_repository_and_no_commit(tmp_path: Path) -> None:
    (tmp_path / "asv.conf.json").write_text('{"version": 1, "repo": "."}')
    config = find_config(str(tmp_path / "asv.conf.json"))
    with pytest.raises(UsageError, match="not a git repository with a commit"):
        check_repository(config)
    subprocess.run(["git", "init", "-q", "."], check=True, cwd=tmp_path)
    with pytest.raises(UsageError, match="not a git repository with a commit"):
        check_repository(config)
    check_repository(find_config(str(project(tmp_path) / "asv.conf.json")))


def test_a_wrong_preset_is_one_line(tmp_path: Path) -> None:
    folder = project(tmp_path, benchmark_dir=str(ROOT / "suites"))
    done = attnbench(folder, "asv", "run", ATTNBENCH_PRESET="smoky")
    assert done.returncode == 2
    assert "ATTNBENCH_PRESET=smoky" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / ".asv" / "env").exists()


def test_a_wrong_revision_is_one_line_and_no_regression(tmp_path: Path) -> None:
    """asv lets git's failure escape as a traceback and status 1."""
    folder = project(tmp_path)
    (folder / "suites").mkdir()
    text = 'from attnbench.workload import Suite\nSUITE = Suite("toy", "Toy.", smoke=["q1s16"],'
    (folder / "suites" / "toy.py").write_text(text + ' backends=("TORCH_SDPA",))\n')
    done = attnbench(folder, "asv", "run", "no-such-branch..HEAD")
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("attnbench: asv: `")
    assert "no-such-branch" in last
    assert "Traceback" not in done.stderr


def test_asvs_exit_status_is_passed_on(tmp_path: Path) -> None:
    assert attnbench(tmp_path, "asv", "--version").returncode == 0
    assert attnbench(tmp_path, "asv").returncode == 0
    assert attnbench(tmp_path, "asv", "no-such-command").returncode == 2
    done = attnbench(project(tmp_path), "asv", "publish")  # nothing measured: asv's own error
    assert done.returncode == 1
    assert "benchmarks.json" in done.stdout + done.stderr


def test_the_machine_is_remembered_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = asv_api.remember_machine()
    assert path == tmp_path / ".asv-machine.json"
    (name,) = json.loads(path.read_text()).keys() - {"version"}
    assert name == os.uname().nodename
    assert asv_api.remember_machine() is None


def test_a_suite_too_large_for_asv(tmp_path: Path) -> None:
    suite = Suite("big", "Big.", smoke=["{1..1001}q1s16"], backends=("TORCH_SDPA",))
    with pytest.raises(UsageError, match="suite big: 1001 workloads x 1 backends"):
        plan_grid({"big": suite}, "smoke", "wall", tmp_path)


def test_our_suites_fit_into_asv(tmp_path: Path) -> None:
    from attnbench.workload import load_suites

    suites = load_suites(ROOT / "suites")
    for preset in ("smoke", "nightly"):
        grid = plan_grid(suites, preset, "wall", tmp_path)
        assert grid.suites.keys() == suites.keys()
        for name, axes in grid.suites.items():
            assert axes.workloads == tuple(w.text for w in suites[name].workloads(preset))
            assert axes.backends


def _sites(tmp_path: Path, page: str) -> tuple[Path, Path]:
    (tmp_path / "site" / "assets").mkdir(parents=True)
    (tmp_path / "site" / "index.html").write_text("ours")
    (tmp_path / "site" / "assets" / "data.js").write_text("1")
    (tmp_path / "html").mkdir()
    (tmp_path / "html" / "index.html").write_text(page)
    return tmp_path / "site", tmp_path / "html"


def test_pages_are_copied_and_linked_once(tmp_path: Path) -> None:
    import asv

    page = (Path(asv.__file__).parent / "www" / "index.html").read_text(encoding="utf-8")
    site, html = _sites(tmp_path, page)
    assert add_pages(site, html)
    assert add_pages(site, html)
    assert (html / FOLDER / "index.html").read_text() == "ours"
    assert (html / FOLDER / "assets" / "data.js").is_file()
    text = (html / "index.html").read_text()
    assert text.count('<a href="attnbench/index.html">') == 1
    assert len(text) > len(page)


def test_an_asv_page_of_another_form_is_refused(tmp_path: Path) -> None:
    site, html = _sites(tmp_path, "<html></html>")
    with pytest.raises(UsageError, match="not one attnbench knows"):
        add_pages(site, html)


def test_without_pages_asv_publishes_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not add_pages(tmp_path, tmp_path)
    assert "attnbench dashboard" in capsys.readouterr().err
