"""The manifest repository: one commit per measured stack, so that git tools see stacks as commits.

Every device class has a folder in it: `requirements.lock` is what pip can install of the stack,
`machine.toml` all the rest. A commit brings one device class to its next stack, dated by when that
was first measured.

The history is a function of the stacks alone: each once, by first measurement. Writing what is
there already changes nothing, the same results give the same hashes anywhere, and a stack that was
left and came back keeps its one commit. What the repository has is never dropped, only joined with
what is stored; a stack that turns out to have been measured earlier moves to its place, which gives
the commits from there on new hashes.
"""

from __future__ import annotations

import fcntl
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from attnbench.errors import DataError, InfrastructureError, ResultsFolderError, UsageError
from attnbench.history.manifest_files import (
    LOCK_FILE,
    MACHINE_FILE,
    folder_name,
    read_stack,
    stack_files,
)
from attnbench.history.manifest_git import ManifestGit
from attnbench.history.stacks import (
    Stack,
    change_text,
    changed_versions,
    merged,
    stack_before,
)

#: What makes a repository one that attnbench writes to. Its text is part of every hash.
MARKER = ".attnbench-manifest"

_MARKER_TEXT = """\
One commit per measured stack, written by `attnbench manifest write`. Edit nothing here:
attnbench refuses a repository that has other commits.
"""

_WHO = "attnbench <manifest@attnbench.invalid>"
_NEW = "refs/attnbench/new"  # only while a history is being made
_TRAILER = "Stack-Folder"
_MAX_SUBJECT = 120
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_SECOND = timedelta(seconds=1)


@dataclass(frozen=True, slots=True)
class Written:
    """What a write did. `moved`: how many commits that were there have new hashes now."""

    stacks: tuple[Stack, ...]
    added: int
    moved: int


def stacks_of(repository: Path) -> list[Stack]:
    """The stacks of a manifest repository with their commits, by first measurement.

    Raises UsageError for a folder that is none, DataError for a commit attnbench did not write.
    """
    git = ManifestGit(repository)
    if not repository.is_dir():
        raise UsageError(
            f"{repository}: no such folder; `attnbench manifest write` makes the repository"
        )
    if not git.is_repository():
        raise UsageError(f"{repository}: {_not_ours('is not a git repository')}")
    if git.tip() is None:
        return []
    _check_marker(git)
    return _read(git)


def is_manifest(folder: Path) -> bool:
    """Whether attnbench writes stacks to the repository in `folder`."""
    git = ManifestGit(folder)
    return (
        folder.is_dir() and git.is_repository() and git.tip() is not None and git.has_file(MARKER)
    )


def write_manifest(repository: Path, stacks: Sequence[Stack]) -> Written:
    """Give every one of `stacks` its commit; the repository is made where there is none.

    Raises: UsageError for a folder or repository that is not a manifest repository, or has files
        that differ from its newest commit; DataError for a commit attnbench did not write;
        InfrastructureError if git cannot be started or fails; ResultsFolderError if the folder
        cannot be written.
    """
    git = ManifestGit(repository)
    _make(git)
    with _locked(git):
        if not git.is_on_branch():
            raise UsageError(f"{repository}: no branch is checked out; git switch main there")
        tip = git.tip()
        if tip is None:
            # One without any commit may be somebody's project before its first: it must be empty.
            if git.has_commits() or git.changed_files():
                raise UsageError(f"{repository}: {_not_ours('has files or commits of its own')}")
            known: list[Stack] = []
        else:
            _check_marker(git)
            known = _read(git)
        if changed := git.changed_files():
            raise UsageError(
                f"{repository}: {changed[0]!r} differs from the newest commit; remove it (after a "
                "write that was killed: git reset --hard there) and write again"
            )
        if tip is not None and _import(git, known)[-1:] != [tip]:
            raise DataError(
                f"{repository}: its history is not as attnbench wrote it (a commit was added, "
                "changed or removed); move it away, `attnbench manifest write` makes it anew"
            )
        wanted = merged([*known, *stacks])
        if [(s.device_class, s.key, s.first_measured) for s in known] == [
            (s.device_class, s.key, s.first_measured) for s in wanted
        ]:
            return Written(tuple(known), 0, 0)
        commits = _import(git, wanted)
        git.move_to(commits[-1])
    written = tuple(replace(s, commit=c) for s, c in zip(wanted, commits, strict=True))
    moved = len({s.commit for s in known} - set(commits))
    return Written(written, len(wanted) - len(known), moved)


def find_stack(stacks: Sequence[Stack], text: str) -> Stack:
    """The stack that `text`, a prefix of its commit or key, names.

    Raises DataError if it names none, or several.
    """
    found = [s for s in stacks if text and (s.commit.startswith(text) or s.key.startswith(text))]
    exact = [s for s in found if text in (s.commit, s.key)]
    found = exact or found
    if len(found) == 1:
        return found[0]
    if not found:
        newest = stacks[-1].key if stacks else "none"
        raise DataError(
            f"{text!r} names no stack; the newest is {newest}, see `attnbench manifest log`"
        )
    listed = ", ".join(f"{s.commit[:10]} ({s.device_class})" for s in found[:4])
    raise DataError(f"{text!r} names several stacks; name a commit: {listed}")


def subject_of(stack: Stack, before: Stack | None) -> str:
    """The first line of a stack's commit: what changed since the stack of its device before."""
    if before is None:
        versions = stack.versions
        names = [n for n in ("torch", "triton", "vllm", "driver", "cuda") if n in versions]
        what = ", ".join(f"{n} {versions[n]}" for n in names or sorted(versions)[:3])
        text = f"{stack.device_class}: first stack, {what or stack.key}"
    else:
        text = change_text(changed_versions(before.versions, stack.versions))
        text = f"{stack.device_class}: {text or stack.key}"
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= _MAX_SUBJECT else text[: _MAX_SUBJECT - 4] + " ..."


def _make(git: ManifestGit) -> None:
    """A repository where there is none yet. Raises UsageError for a folder that has files."""
    path = git.path
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not git.is_repository() and not git.has_files():
            git.init()
    except OSError as error:
        raise ResultsFolderError(
            f"{path}: cannot be written ({error.strerror}); name another folder"
        ) from error
    if not git.is_repository():
        raise UsageError(f"{path}: {_not_ours('has files and is not a git repository')}")


def _check_marker(git: ManifestGit) -> None:
    if not git.has_file(MARKER):
        raise UsageError(f"{git.path}: {_not_ours('is a git repository of something else')}")
    if git.is_shallow():
        raise UsageError(f"{git.path}: a shallow clone; git fetch --unshallow there")


def _not_ours(why: str) -> str:
    return f"{why}, and not a manifest repository; name an empty folder, or one that attnbench made"


@contextmanager
def _locked(git: ManifestGit) -> Iterator[None]:
    """Two nights that end together write one after the other."""
    try:
        # A file that is there in any repository: locking must not write into somebody else's.
        with git.config_file().open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise InfrastructureError(
            f"{git.path}: cannot be written ({error.strerror}); make it writable and write again"
        ) from error


def _import(git: ManifestGit, stacks: Sequence[Stack]) -> list[str]:
    """The commits of exactly this history, made and not yet on any branch."""
    stream = bytearray(f"reset {_NEW}\n".encode())
    for number, stack in enumerate(stacks):
        folder = folder_name(stack.device_class)
        before = stack_before(stacks[:number], stack)
        message = f"{subject_of(stack, before)}\n\n{_TRAILER}: {folder}\n"
        # git knows no time before 1970, which a clock that was never set may show.
        seconds = max(0, (stack.first_measured - _EPOCH) // _SECOND)
        stream += f"commit {_NEW}\ncommitter {_WHO} {seconds} +0000\n".encode()
        stream += _data(message)
        files = {f"{folder}/{name}": text for name, text in stack_files(stack).items()}
        for name, text in {MARKER: _MARKER_TEXT, **files}.items():
            stream += f"M 100644 inline {name}\n".encode() + _data(text)
    stream += b"done\n"
    return git.fast_import(bytes(stream), _NEW)


def _data(text: str) -> bytes:
    raw = text.encode()
    return b"data %d\n%s\n" % (len(raw), raw)


def _read(git: ManifestGit) -> list[Stack]:
    found = []
    for commit, message in git.log():
        match = re.search(rf"^{_TRAILER}: ([a-z0-9._-]+)$", message, re.MULTILINE)
        if match is None:
            raise DataError(
                f"{git.path}: attnbench did not write commit {commit[:10]}; remove it (git reset), "
                "or move the repository away and write it anew"
            )
        found.append((commit, match[1]))
    names = [f"{c}:{folder}/{name}" for c, folder in found for name in (MACHINE_FILE, LOCK_FILE)]
    texts = git.files(names)
    stacks = []
    for number, (commit, _) in enumerate(found):
        machine, lock = texts[2 * number], texts[2 * number + 1]
        try:
            if machine is None or lock is None:
                raise ValueError(f"it lacks {MACHINE_FILE} or {LOCK_FILE}")
            stacks.append(replace(read_stack(machine, lock), commit=commit))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{git.path}: commit {commit[:10]} cannot be read ({error}); move the repository "
                "away, `attnbench manifest write` makes it anew"
            ) from error
    return stacks
