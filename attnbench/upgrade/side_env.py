"""Two environments side by side that differ in one distribution and share everything else.

Each is a virtual environment with the changed distribution, installed without its dependencies; a
`.pth` file opens the site-packages of this Python behind it, as for asv's commits.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import attnbench
from attnbench.asv_bridge.outer import PTH_NAME, outer_site_packages
from attnbench.errors import InfrastructureError, UsageError
from attnbench.upgrade.cache import empty, making, read_stamp, stamp, writing
from attnbench.upgrade.installed import has_pip
from attnbench.upgrade.tell import Tell
from attnbench.upgrade.versions import Source, SourceKind

OWN = "attnbench"


@dataclass(frozen=True, slots=True)
class Side:
    """One of both environments. `first` is searched before all else; `variables` are set in it."""

    label: str
    distribution: str
    python: Path
    first: Path | None
    variables: Mapping[str, str] = field(default_factory=dict)


def make_side(source: Source, cache: Path, tell: Tell) -> Side:
    """The environment with `source`; what was made before is used again.

    Raises:
        UsageError: no such version, or a source tree that has to be built.
        InfrastructureError: pip or the disk failed.
    """
    if source.kind is SourceKind.INSTALLED:
        assert source.path is not None
        return Side(source.text, source.distribution, source.path, None)
    if source.kind is SourceKind.TREE:
        return _tree_side(source, cache, tell)
    what = f"{source.distribution}=={source.version}"
    if source.kind is SourceKind.WHEEL:
        assert source.path is not None
        what = str(source.path)
    entry = _environment(cache, what, tell, what)
    library = next(entry.glob("lib/python*/site-packages"))
    label = f"{source.distribution} {source.version}"
    return Side(label, source.distribution, entry / "bin" / "python", library)


def make_stack_side(label: str, pins: Sequence[str], cache: Path, tell: Tell) -> Side:
    """The environment with several `NAME==VERSION`. Raises as `make_side`."""
    entry = _environment(cache, " ".join(pins), tell, *pins)
    library = next(entry.glob("lib/python*/site-packages"))
    return Side(label, pins[0].partition("==")[0], entry / "bin" / "python", library)


def _tree_side(source: Source, cache: Path, tell: Tell) -> Side:
    assert source.path is not None
    if source.distribution != OWN:
        raise UsageError(
            f"{source.text}: {source.distribution} has to be built before it can be measured; "
            f"build a wheel (`pip wheel --no-deps {source.path}`) and name the file"
        )
    variables = {}
    home = source.path
    label = f"{OWN} of {source.path}"
    if source.commit is not None:
        home = cache / "trees" / f"{OWN}-{source.commit[:16]}"
        label = f"{OWN} at {source.commit[:12]}"
        # The rows carry the commit by the words asv has for it.
        variables = {"ASV_COMMIT": source.commit, "ASV_CONF_DIR": str(source.path)}
        with making(home, tell):
            if read_stamp(home) is None:
                empty(home)
                _archive(source.path, source.commit, home)
                stamp(home, {"tree": str(source.path), "commit": source.commit})
    entry = _environment(cache, OWN, tell)
    return Side(label, OWN, entry / "bin" / "python", home, variables)


def _environment(cache: Path, what: str, tell: Tell, *install: str) -> Path:
    outer = [str(Path(attnbench.__file__).parents[1]), *outer_site_packages().splitlines()]
    wheels = [Path(one) for one in install if one.endswith(".whl")]
    changed = wheels[0].stat().st_mtime_ns if wheels else 0
    content = {
        "python": sys.version,
        "prefix": sys.prefix,
        "what": what,
        "outer": outer,
        "changed": changed,
    }
    entry = cache / "sides" / hashlib.sha256(repr(content).encode()).hexdigest()[:16]
    with making(entry, tell):
        if read_stamp(entry) != content:
            with writing(entry):
                empty(entry)
                venv.EnvBuilder(symlinks=True, with_pip=False).create(entry)
                if install:
                    tell.note(f"installing {what} without its dependencies in {entry}")
                    _install(entry, what, install)
                library = next(entry.glob("lib/python*/site-packages"))
                (library / PTH_NAME).write_text("\n".join([*outer, ""]), encoding="utf-8")
            stamp(entry, content)
    return entry


def _install(folder: Path, what: str, install: Sequence[str]) -> None:
    if not has_pip():
        raise InfrastructureError(
            f"{what} is installed by pip, which is not beside attnbench; install it: "
            f"{sys.executable} -m ensurepip"
        )
    # Before the .pth file is there: pip must never see what belongs to the outer environment.
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]
    done = subprocess.run(
        [*pip, "install", "--no-deps", "--prefer-binary", "--no-input", *install],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return
    said = done.stderr.strip().splitlines() or done.stdout.strip().splitlines() or ["no output"]
    first = next((line for line in said if line.startswith("ERROR:")), said[-1])
    if "No matching distribution" in done.stderr or "Could not find a version" in done.stderr:
        raise UsageError(f"{what}: pip finds no such version for this Python ({first})")
    mend = "check the network"
    if "build" in first:
        mend = "build a wheel where that works, and name its folder in PIP_FIND_LINKS"
    raise InfrastructureError(f"pip cannot install {what} ({first}); {mend}")


def _archive(tree: Path, commit: str, home: Path) -> None:
    running = subprocess.Popen(
        ["git", "-C", str(tree), "archive", "--format=tar", commit, "--", OWN],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with running, writing(home):
        assert running.stdout is not None
        try:
            with tarfile.open(fileobj=running.stdout, mode="r|") as archive:
                archive.extractall(home, filter="data")
        except tarfile.TarError as error:
            raise UsageError(
                f"{tree}: git cannot give the files of {commit}; check the clone with `git fsck`"
            ) from error
