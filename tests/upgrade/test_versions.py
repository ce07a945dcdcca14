from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from attnbench.errors import ExitCode, UsageError
from attnbench.upgrade.versions import SELECTOR_FILE, SourceKind, installed_source, parse_source

WHEEL = "vllm-0.22.1-cp38-abi3-manylinux_2_28_x86_64.whl"


def make_tree(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def commit(folder: Path, message: str = "one") -> str:
    """Commit everything in `folder`; returns the full hash."""
    who = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
    for arguments in (["init", "-q"], ["add", "-A"], [*who, "commit", "-q", "-m", message]):
        subprocess.run(["git", "-C", str(folder), *arguments], check=True)
    done = subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("text", "distribution", "version"),
    [
        ("vllm==0.22.1", "vllm", "0.22.1"),
        (" vllm == 0.22.1 ", "vllm", "0.22.1"),
        ("vLLM==v0.22.1", "vllm", "0.22.1"),
        ("FlashInfer_Python==0.6.11.post2", "flashinfer-python", "0.6.11.post2"),
        ("torch==2.11.0+cu129", "torch", "2.11.0+cu129"),
        ("triton==3.7.1", "triton", "3.7.1"),
    ],
)
def test_a_version_number(text: str, distribution: str, version: str) -> None:
    source = parse_source(text)
    assert source.kind is SourceKind.VERSION
    assert (source.distribution, source.version) == (distribution, version)


def test_a_wheel_a_tree_and_a_commit(tmp_path: Path) -> None:
    (tmp_path / WHEEL).write_bytes(b"")
    wheel = parse_source(str(tmp_path / WHEEL))
    assert (wheel.kind, wheel.distribution, wheel.version) == (SourceKind.WHEEL, "vllm", "0.22.1")
    tree = make_tree(tmp_path / "tree", {SELECTOR_FILE: ""})
    first = commit(tree)
    (tree / SELECTOR_FILE).unlink()
    (tree / "attnbench/selection").mkdir(parents=True)
    (tree / "attnbench/selection/__init__.py").write_text("")
    commit(tree, "two")
    now = parse_source(str(tree))
    assert (now.kind, now.distribution, now.commit) == (SourceKind.TREE, "attnbench", None)
    then = parse_source(f"{tree}@{first[:10]}")
    assert (then.distribution, then.commit, then.path) == ("vllm", first, tree)
    assert parse_source(f"{tree}@HEAD").distribution == "attnbench"


def test_a_folder_with_an_at_in_its_name_is_a_folder(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "vllm@work", {SELECTOR_FILE: ""})
    source = parse_source(str(tree))
    assert (source.path, source.commit) == (tree, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no version"),
        ("vllm", "does not say which version"),
        ("vllm>=0.22", "does not say which version"),
        ("vllm==", "does not say which version"),
        ("vllm==latest", "'latest' is no version number"),
        ("/nowhere/vllm", "does not exist"),
        ("/nowhere/vllm@abc", "does not exist"),
        (f"/nowhere/{WHEEL}", "no such wheel"),
        (f"https://example.org/{WHEEL}", "download it first"),
        (sys.executable, "--from-python"),
    ],
)
def test_what_is_no_version(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse_source(text)
    assert caught.value.exit_code == ExitCode.USAGE
    assert "\n" not in str(caught.value)


def test_bad_files_and_trees(tmp_path: Path) -> None:
    (tmp_path / "vllm.whl").write_bytes(b"")
    with pytest.raises(UsageError, match="not named as a wheel is"):
        parse_source(str(tmp_path / "vllm.whl"))
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UsageError, match="no wheel"):
        parse_source(str(tmp_path / "notes.txt"))
    tree = make_tree(tmp_path / "tree", {"README": ""})
    with pytest.raises(UsageError, match="no attention selector"):
        parse_source(str(tree))
    with pytest.raises(UsageError, match="names no commit"):
        parse_source(f"{tree}@")
    with pytest.raises(UsageError, match="no git repository"):
        parse_source(f"{tree}@HEAD")
    commit(tree)
    with pytest.raises(UsageError, match=r"no commit 'v9'; .* fetch --tags"):
        parse_source(f"{tree}@v9")
    with pytest.raises(UsageError, match="no commit '--all'"):
        parse_source(f"{tree}@--all")
    with pytest.raises(UsageError, match="no attention selector"):
        parse_source(f"{tree}@HEAD")
    make_tree(tree, {f"inner/{SELECTOR_FILE}": ""})
    with pytest.raises(UsageError, match="top folder"):
        parse_source(f"{tree}/inner@HEAD")


def test_an_installed_environment(tmp_path: Path) -> None:
    source = installed_source(Path(sys.executable))
    assert source.kind is SourceKind.INSTALLED
    assert source.path == Path(sys.executable)
    with pytest.raises(UsageError, match="no Python interpreter"):
        installed_source(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(sys.executable)
    # A link stays: following it would leave a virtual environment.
    assert installed_source(tmp_path).path == tmp_path / "bin/python"
