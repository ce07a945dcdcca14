"""The manifest repository beside what is not its own: repositories, edits, hooks, settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnbench.errors import DataError, InfrastructureError, ResultsFolderError, UsageError
from attnbench.history.manifest import is_manifest, stacks_of, write_manifest
from attnbench.history.manifest_files import LOCK_FILE
from tests.history.manifests import git, made, state


def test_no_other_repository_is_touched(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    git(project, "init", "-q")
    (project / "README").write_text("mine")
    with pytest.raises(UsageError, match=r"files or commits of its own.*name an empty folder"):
        write_manifest(project, [made(0)])
    git(project, "add", "README")
    git(project, "commit", "-qm", "mine")
    before = state(project)
    with pytest.raises(UsageError, match="a git repository of something else"):
        write_manifest(project, [made(0)])
    with pytest.raises(UsageError, match="a git repository of something else"):
        stacks_of(project)
    assert not is_manifest(project)
    # A folder of the project that has files is none either.
    (project / "src").mkdir()
    (project / "src" / "a.py").touch()
    with pytest.raises(UsageError, match="has files and is not a git repository"):
        write_manifest(project / "src", [made(0)])
    with pytest.raises(UsageError, match="is not a git repository"):
        stacks_of(project / "src")
    (project / "src" / "a.py").unlink()
    assert state(project) == before
    # A new folder in it becomes a repository of its own.
    write_manifest(project / "stacks", [made(0)])
    assert is_manifest(project / "stacks")
    assert state(project)[0] == before[0]
    assert git(project, "log", "--format=%s") == "mine"


def test_a_repository_above_is_not_taken_for_a_broken_one(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "stacks" / ".git").mkdir(parents=True)
    with pytest.raises(InfrastructureError, match="not a git repository"):
        write_manifest(tmp_path / "stacks", [made(0)])
    assert not git(tmp_path, "for-each-ref")


def test_variables_of_another_repository_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "-q")
    for name, path in {"GIT_DIR": ".git", "GIT_WORK_TREE": ".", "GIT_INDEX_FILE": ".git/i"}.items():
        monkeypatch.setenv(name, str(other / path))
    write_manifest(tmp_path / "stacks", [made(0)])
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name)
    assert git(other, "for-each-ref") == ""
    assert len(stacks_of(tmp_path / "stacks")) == 1


def test_hooks_and_settings_of_the_user_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook = tmp_path / "hooks" / "reference-transaction"
    hook.parent.mkdir()
    hook.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\nexit 1\n")
    hook.chmod(0o755)
    config = tmp_path / "config"
    config.write_text(
        f"[core]\nhooksPath={hook.parent}\nautocrlf=true\n[commit]\ngpgsign=true\n"
        "[init]\ndefaultBranch=trunk\n[log]\nshowSignature=true\ndate=relative\n[color]\nui=always\n"
    )
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
    tip = write_manifest(tmp_path / "a", [made(0), made(1)]).stacks[-1].commit
    assert not (tmp_path / "ran").exists()
    assert len(stacks_of(tmp_path / "a")) == 2
    monkeypatch.delenv("GIT_CONFIG_GLOBAL")
    assert write_manifest(tmp_path / "b", [made(0), made(1)]).stacks[-1].commit == tip


def test_a_tree_with_other_files_is_refused(tmp_path: Path) -> None:
    write_manifest(tmp_path, [made(0)])
    before = state(tmp_path)[0]
    lock = tmp_path / "h200" / LOCK_FILE
    lock.write_text("torch==9\n")
    with pytest.raises(UsageError, match=r"'h200/requirements.lock' differs.*git reset --hard"):
        write_manifest(tmp_path, [made(1)])
    git(tmp_path, "checkout", "-q", ".")
    (tmp_path / "notes").touch()
    with pytest.raises(UsageError, match="'notes' differs"):
        write_manifest(tmp_path, [made(1)])
    assert state(tmp_path)[0] == before


@pytest.mark.parametrize("kind", ["added", "amended", "emptied"])
def test_commits_of_somebody_else_are_refused(tmp_path: Path, kind: str) -> None:
    write_manifest(tmp_path, [made(0), made(1)])
    if kind == "amended":
        git(tmp_path, "commit", "-q", "--amend", "--allow-empty", "-m", "x\n\nStack-Folder: h200")
    elif kind == "added":
        git(tmp_path, "commit", "-q", "--allow-empty", "-m", "mine")
    else:
        git(tmp_path, "rm", "-rq", "h200")
        git(tmp_path, "commit", "-q", "-m", "x\n\nStack-Folder: h200")
    before = state(tmp_path)
    with pytest.raises(
        DataError, match=r"attnbench did not write|not as attnbench wrote|cannot be read"
    ):
        write_manifest(tmp_path, [made(2)])
    assert state(tmp_path) == before


def test_a_checkout_of_an_old_stack_is_told(tmp_path: Path) -> None:
    write_manifest(tmp_path, [made(0), made(1)])
    git(tmp_path, "checkout", "-q", "HEAD~")
    with pytest.raises(UsageError, match="git switch main"):
        write_manifest(tmp_path, [made(2)])


def test_a_shallow_clone_is_told(tmp_path: Path) -> None:
    write_manifest(tmp_path / "whole", [made(0), made(1)])
    git(tmp_path, "clone", "-q", "--depth=1", f"file://{tmp_path}/whole", str(tmp_path / "part"))
    for use in (stacks_of, lambda path: write_manifest(path, [made(2)])):
        with pytest.raises(UsageError, match="a shallow clone; git fetch --unshallow"):
            use(tmp_path / "part")


def test_a_merge_is_somebody_elses(tmp_path: Path) -> None:
    write_manifest(tmp_path, [made(0), made(1)])
    git(tmp_path, "switch", "-qc", "side", "HEAD~")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "x")
    git(tmp_path, "switch", "-q", "main")
    git(tmp_path, "merge", "-q", "--no-ff", "-m", "A merge", "side")
    with pytest.raises(DataError, match="attnbench did not write commit"):
        stacks_of(tmp_path)


def test_no_git_and_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no such folder; `attnbench manifest write`"):
        stacks_of(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(ResultsFolderError, match="name another folder"):
        write_manifest(tmp_path / "file" / "stacks", [made(0)])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="needs git; install git"):
        write_manifest(tmp_path / "stacks", [made(0)])
