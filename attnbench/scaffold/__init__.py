"""A project of one's own: settings, suites, pages, and a nightly workflow for GitHub Actions.

The suites and the pages' settings are this project's own files: in a checkout they are read from
its `suites/` and `dashboards/`, in an installed package from beside this module.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from attnbench.errors import AttnBenchError, InfrastructureError, UsageError

_FILES = Path(__file__).parent / "files"

#: Files written from those beside this module, by their path in the project.
_TEMPLATES: Mapping[str, str] = {
    "attnbench.toml": "attnbench.toml",
    "acknowledged.toml": "acknowledged.toml",
    "asv.conf.json": "asv.conf.json",
    ".github/workflows/attnbench.yml": "workflow.yml",
}

#: Folders of this project whose files are written, and which of them.
_SHARED = {"suites": "*.py", "dashboards": "default.toml"}

_IGNORED = ".gitignore"


def project_files(name: str) -> dict[str, bytes]:
    """Path in the project -> content, of a project called `name`; `.gitignore` aside.

    Raises InfrastructureError if the package lacks its files.
    """
    found = {}
    for path, template in _TEMPLATES.items():
        text = (_FILES / template).read_text(encoding="utf-8")
        found[path] = text.replace('"PROJECT"', json.dumps(name)).encode("utf-8")
    for folder, pattern in _SHARED.items():
        for source in sorted(_shared_folder(folder).glob(pattern)):
            found[f"{folder}/{source.name}"] = source.read_bytes()
    return found


def write_project(folder: Path) -> list[Path]:
    """Write a project into `folder`, which is made if it is not there; returns what was written.

    Nothing is overwritten; lines that `.gitignore` lacks are added to it. Raises UsageError naming
    every file that is there already, or a folder that cannot be written, InfrastructureError for a
    full disk; nothing of it is left behind then.
    """
    target = folder.resolve()
    files = project_files(target.name or "attnbench")
    there = [path for path in files if os.path.lexists(target / path)]
    if there:
        raise UsageError(
            f"{folder}: has {', '.join(there)} already, and nothing is overwritten; to compare, "
            "write a fresh one elsewhere: attnbench init /tmp/fresh && diff -r /tmp/fresh "
            f"{folder}"
        )
    written: list[Path] = []
    made: list[Path] = []
    try:
        for path, content in files.items():
            made += _make_folder((target / path).parent)
            with open(target / path, "xb") as file:
                written.append(target / path)
                file.write(content)
        _add_ignored(target / _IGNORED)
    except OSError as error:
        for one in reversed(written):
            one.unlink(missing_ok=True)
        for one in reversed(made):
            one.rmdir()
        raise _write_error(folder, error) from error
    return [*written, target / _IGNORED]


def _shared_folder(name: str) -> Path:
    package = Path(__file__).parent.parent
    for folder in (_FILES / name, package.parent / name):
        # The root of a checkout, and not whatever lies beside an installed package.
        is_ours = folder.parent == _FILES or (package.parent / "pyproject.toml").is_file()
        if is_ours and folder.is_dir():
            return folder
    raise InfrastructureError(
        f"{_FILES / name}: this installation of attnbench lacks its {name}; install it again"
    )


def _make_folder(folder: Path) -> list[Path]:
    """Make `folder` and its parents; returns those that were not there, outermost first."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()][::-1]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _add_ignored(path: Path) -> None:
    wanted = (_FILES / "gitignore").read_text(encoding="utf-8").splitlines()
    before = path.read_bytes() if path.exists() else b""
    known = {line.strip() for line in before.decode("utf-8", "replace").splitlines()}
    lines = [line for line in wanted if line not in known]
    if not [line for line in lines if not line.startswith("#")]:
        return
    gap = b"" if not before or before.endswith(b"\n") else b"\n"
    with open(path, "ab") as file:
        file.write(gap + "".join(f"{line}\n" for line in lines).encode("utf-8"))


def _write_error(folder: Path, error: OSError) -> AttnBenchError:
    from attnbench.store.disk import DISK_FULL

    where = error.filename or folder
    if error.errno in DISK_FULL:
        return InfrastructureError(f"{where}: {error.strerror}; free some space there")
    return UsageError(f"{where}: cannot be written ({error.strerror}); name a folder you can write")
