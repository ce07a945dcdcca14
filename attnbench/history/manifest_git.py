"""git, as the manifest repository needs it: no shell, no other repository, no hooks."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from attnbench.errors import InfrastructureError, UsageError

#: What a hook or a CI job may have set for a repository of its own.
_ELSEWHERE = (
    "GIT_DIR",
    "GIT_WORK_TREE",
    "GIT_INDEX_FILE",
    "GIT_OBJECT_DIRECTORY",
    "GIT_ALTERNATE_OBJECT_DIRECTORIES",
    "GIT_COMMON_DIR",
    "GIT_NAMESPACE",
    "GIT_PREFIX",
    "GIT_DEFAULT_HASH",
    "GIT_TEMPLATE_DIR",
    "GIT_REPLACE_REF_BASE",
    "GIT_GRAFT_FILE",
)

_SETTINGS = ("-c", "core.hooksPath=/dev/null", "-c", "core.autocrlf=false", "-c", "gc.auto=0")

#: Folders a repository is made in.
_UNFINISHED = ".attnbench-new-"

_TIMEOUT_S = 120


class ManifestGit:
    """The repository whose top is `path`, and never one that `path` lies in."""

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.realpath(path))

    def is_repository(self) -> bool:
        """Whether `path` is the top of a repository with a working tree."""
        if not (self.path / ".git").exists():
            return False
        done = self._try("rev-parse", "--is-inside-work-tree", "--show-prefix")
        if done.returncode:
            self._fail(done, "rev-parse")
        return done.stdout.decode().split("\n")[:2] == ["true", ""]

    def init(self) -> None:
        """Make the repository whole or not at all: another night may be about to.

        Raises OSError.
        """
        with tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=self.path) as folder:
            self._run("init", "--quiet", "--initial-branch=main", "--template=", folder)
            try:
                os.rename(Path(folder, ".git"), self.path / ".git")
            except OSError:
                if not self.is_repository():
                    raise

    def has_files(self) -> bool:
        """In the folder. Raises OSError."""
        return any(not path.name.startswith(_UNFINISHED) for path in self.path.iterdir())

    def config_file(self) -> Path:
        """git's own, of the repository."""
        return self.path / os.fsdecode(self._run("rev-parse", "--git-path", "config").rstrip(b"\n"))

    def tip(self) -> str | None:
        """The newest commit of the branch; None: it has none yet."""
        done = self._try("rev-parse", "--verify", "--quiet", "HEAD^{commit}")
        return done.stdout.decode().strip() if done.returncode == 0 else None

    def is_shallow(self) -> bool:
        """Whether it is a clone that lacks older commits."""
        return self._run("rev-parse", "--is-shallow-repository").strip() == b"true"

    def is_on_branch(self) -> bool:
        return self._try("symbolic-ref", "--quiet", "HEAD").returncode == 0

    def has_commits(self) -> bool:
        """On any branch or tag."""
        return bool(self._run("for-each-ref", "--count=1"))

    def has_file(self, name: str) -> bool:
        """In the newest commit."""
        return self._try("cat-file", "-e", f"HEAD:{name}").returncode == 0

    def changed_files(self) -> list[str]:
        """Files that differ from the newest commit, or are not in it."""
        listed = self._run("status", "--porcelain", "-z", "--untracked-files=normal")
        names = [os.fsdecode(entry[3:]) for entry in listed.split(b"\0") if entry]
        return [name for name in names if not name.startswith(_UNFINISHED)]

    def log(self) -> list[tuple[str, str]]:
        """Commit and message, oldest first."""
        listed = self._run("log", "-z", "--reverse", "--first-parent", "--format=%H%n%B", "HEAD")
        found = []
        for entry in listed.decode(errors="replace").split("\0"):
            if entry.strip():
                commit, _, message = entry.partition("\n")
                found.append((commit, message))
        return found

    def files(self, names: Sequence[str]) -> list[str | None]:
        """Text of each `commit:path`; None: it is not there. Raises ValueError for no text."""
        stdin = "".join(f"{name}\n" for name in names).encode()
        out = self._run("cat-file", "--batch", stdin=stdin)
        texts: list[str | None] = []
        for _ in names:
            head, _, out = out.partition(b"\n")
            if head.endswith(b" missing"):
                texts.append(None)
                continue
            size = int(head.split()[-1])
            texts.append(out[:size].decode(errors="replace"))
            out = out[size + 1 :]
        return texts

    def fast_import(self, stream: bytes, ref: str) -> list[str]:
        """The commits that `stream` puts on `ref`, oldest first; `ref` is gone afterwards."""
        try:
            self._run("fast-import", "--quiet", "--done", "--date-format=raw", stdin=stream)
            return self._run("rev-list", "--reverse", ref).decode().split()
        finally:
            self._try("update-ref", "-d", ref)

    def move_to(self, commit: str) -> None:
        """Put the branch and the working tree to `commit`."""
        self._run("reset", "--quiet", "--hard", commit)

    def _run(self, *words: str, stdin: bytes = b"") -> bytes:
        done = self._try(*words, stdin=stdin)
        if done.returncode:
            self._fail(done, words[0])
        return done.stdout

    def _try(self, *words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        environment = {name: v for name, v in os.environ.items() if name not in _ELSEWHERE}
        # git must not look for a repository above: the folder may lie in the user's project.
        environment["GIT_CEILING_DIRECTORIES"] = str(self.path.parent)
        environment["LC_ALL"] = "C"
        try:
            return subprocess.run(
                ["git", *_SETTINGS, *words],
                cwd=self.path,
                env=environment,
                input=stdin,
                capture_output=True,
                timeout=_TIMEOUT_S,
                check=False,
            )
        except FileNotFoundError as error:
            raise UsageError("the manifest repository needs git; install git") from error
        except (OSError, subprocess.TimeoutExpired) as error:
            raise InfrastructureError(
                f"{self.path}: git {words[0]} did not end ({error}); run it again"
            ) from error

    def _fail(self, done: subprocess.CompletedProcess[bytes], word: str) -> None:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        why = said[-1] if said else f"status {done.returncode}"
        raise InfrastructureError(
            f"{self.path}: git {word} failed ({why}); mend the repository, or move it away: "
            "`attnbench manifest write` makes it anew"
        )
