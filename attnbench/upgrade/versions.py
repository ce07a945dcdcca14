"""Which version is meant: a number, a wheel, a source tree at a commit, an installed environment.

Reading the text touches the disk but no network: whether a number exists is known when it is
looked up in the package index.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from attnbench.errors import UsageError

SELECTOR_FILE = "vllm/v1/attention/selector.py"
"""The file that makes a vLLM one whose selector can be asked."""

_PINNED = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)\s*===?\s*(\S+)")
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")

# The import package that shows which distribution a source tree holds.
_TREES = {
    SELECTOR_FILE: "vllm",
    "attnbench/selection/__init__.py": "attnbench",
    "flashinfer/__init__.py": "flashinfer-python",
    "torch/__init__.py": "torch",
    "python/triton/__init__.py": "triton",
}

FORMS = "vllm==0.22.1, a wheel file, a source tree or PATH@COMMIT"


class SourceKind(StrEnum):
    """Where the code of a version is."""

    VERSION = "version"
    WHEEL = "wheel"
    TREE = "tree"
    INSTALLED = "installed"


@dataclass(frozen=True, slots=True)
class Source:
    """One side of a comparison.

    `version` is set for VERSION only, `path` for the others: the wheel, the tree's folder, or the
    Python interpreter. `commit` is the full hash of the tree's commit, or None for the tree as it
    is on disk.
    """

    text: str
    kind: SourceKind
    distribution: str
    version: str | None = None
    path: Path | None = None
    commit: str | None = None


def normalized(name: str) -> str:
    """A distribution's name as indexes spell it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def parse_source(text: str) -> Source:
    """Read `NAME==VERSION`, a wheel file, a source tree, or `TREE@COMMIT`.

    Raises:
        UsageError: none of these, or the file, folder or commit does not exist.
    """
    stripped = text.strip()
    pinned = _PINNED.fullmatch(stripped)
    if pinned and not os.path.exists(stripped):
        return Source(
            text=stripped,
            kind=SourceKind.VERSION,
            distribution=normalized(pinned[1]),
            version=_checked_version(stripped, pinned[2]),
        )
    if not stripped:
        raise UsageError(f"{text!r} names no version; give {FORMS}")
    path = Path(stripped).expanduser()
    if stripped.endswith(".whl"):
        return _wheel(stripped, path)
    if path.is_dir():
        return _tree(stripped, path, None)
    before, at, after = stripped.rpartition("@")
    if at and before and Path(before).expanduser().is_dir():
        if not after:
            raise UsageError(f"{text!r} names no commit after the @; give {before}@COMMIT")
        return _tree(stripped, Path(before).expanduser(), after)
    if path.is_file():
        raise UsageError(
            f"{text!r} is a file but no wheel; for the vLLM of an installed environment name its "
            "interpreter with --from-python or --to-python"
            if os.access(path, os.X_OK)
            else f"{text!r} is a file but no wheel (.whl); give {FORMS}"
        )
    bare = re.match(_NAME, stripped)
    if bare and re.fullmatch(r"[\[\]<>=!~, .\w-]*", stripped[bare.end() :]) and "/" not in stripped:
        raise UsageError(
            f"{text!r} does not say which version; give one exactly, e.g. vllm==0.22.1, or {FORMS}"
        )
    raise UsageError(f"{text!r} does not exist; give {FORMS}")


def installed_source(python: Path) -> Source:
    """The vLLM of an installed environment: its interpreter, or the environment's folder.

    Raises:
        UsageError: there is no interpreter.
    """
    # Not resolved: a virtual environment's interpreter is a link, and following it would leave it.
    path = Path(os.path.abspath(python.expanduser()))
    if path.is_dir():
        path = path / "bin" / "python"
    if not path.is_file() or not os.access(path, os.X_OK):
        raise UsageError(
            f"{python}: no Python interpreter there; name one, e.g. /opt/vllm/bin/python, or the "
            "virtual environment's folder"
        )
    return Source(text=str(python), kind=SourceKind.INSTALLED, distribution="vllm", path=path)


def _checked_version(text: str, version: str) -> str:
    from packaging.version import InvalidVersion, Version

    try:
        return str(Version(version))
    except InvalidVersion as error:
        raise UsageError(
            f"{text!r}: {version!r} is no version number; give one exactly, e.g. vllm==0.22.1"
        ) from error


def _wheel(text: str, path: Path) -> Source:
    from packaging.utils import InvalidWheelFilename, parse_wheel_filename

    if text.startswith(("http://", "https://")):
        raise UsageError(f"{text}: a wheel is read from disk; download it first and name the file")
    if not path.is_file():
        raise UsageError(f"{text}: no such wheel; check the path, or give {FORMS}")
    try:
        name, version, _, _ = parse_wheel_filename(path.name)
    except InvalidWheelFilename as error:
        raise UsageError(
            f"{text}: not named as a wheel is ({error}); give the file its name back, e.g. "
            "vllm-0.22.1-cp38-abi3-manylinux_2_28_x86_64.whl"
        ) from error
    return Source(
        text=text,
        kind=SourceKind.WHEEL,
        distribution=str(name),
        version=str(version),
        path=path.resolve(),
    )


def _tree(text: str, path: Path, revision: str | None) -> Source:
    folder = path.resolve()
    if revision is None:
        held = (file for file in _TREES if (folder / file).is_file())
        commit = None
    else:
        commit = _commit(folder, revision)
        listed = git(folder, "ls-tree", "-r", "--name-only", commit, "--", *_TREES)
        names = listed.stdout.splitlines()
        held = (file for file in _TREES if file in names)
    found = next(held, None)
    if found is None:
        raise UsageError(
            f"{text}: no attention selector in this tree ({SELECTOR_FILE} is missing); name the "
            "folder that holds vLLM's pyproject.toml, or a newer commit"
        )
    return Source(
        text=text,
        kind=SourceKind.TREE,
        distribution=_TREES[found],
        path=folder,
        commit=commit,
    )


def _commit(folder: Path, revision: str) -> str:
    inside = git(folder, "rev-parse", "--show-prefix")
    if inside.returncode != 0:
        reason = (inside.stderr.strip().splitlines() or ["git failed"])[0]
        raise UsageError(
            f"{folder}: no git repository to take {revision!r} from ({reason}); name a clone"
        )
    if inside.stdout.strip():
        raise UsageError(
            f"{folder}: a folder inside a git repository; name the repository's top folder, "
            f"{git(folder, 'rev-parse', '--show-toplevel').stdout.strip()}@{revision}"
        )
    found = git(
        folder, "rev-parse", "--verify", "--quiet", "--end-of-options", revision + "^{commit}"
    )
    if found.returncode != 0:
        raise UsageError(
            f"{folder}: no commit {revision!r}; check it with `git -C {folder} log`, or fetch it "
            f"first: git -C {folder} fetch --tags"
        )
    return found.stdout.strip()


def git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run git in `folder`, in English. Raises UsageError where there is no git."""
    try:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments],
            check=False,
            capture_output=True,
            encoding="utf-8",
            errors="replace",  # what somebody wrote into a commit may be any bytes
            env={**os.environ, "LC_ALL": "C"},
        )
    except FileNotFoundError as error:
        raise UsageError(
            "git is not installed, and a commit is taken with it; install git, or name the "
            "tree without @COMMIT"
        ) from error
