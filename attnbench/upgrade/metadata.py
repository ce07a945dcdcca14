"""The metadata folder beside an import package: read, or written where there is none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution
from pathlib import Path

from attnbench.errors import DataError
from attnbench.upgrade.cache import writing
from attnbench.upgrade.versions import normalized


@dataclass(frozen=True, slots=True)
class Metadata:
    """Version and `Requires-Dist` lines of a distribution."""

    version: str
    requires: tuple[str, ...]


def read_metadata(folder: Path, distribution: str) -> Metadata | None:
    """What `folder`'s `*.dist-info` says of `distribution`; None if it has none.

    The `*.egg-info` of a source tree does not count: it lists no compiled modules.
    """
    for home in sorted(folder.glob("*.dist-info")):
        found = Distribution.at(home)
        if normalized(found.metadata["Name"] or "") == distribution:
            return Metadata(found.version, tuple(found.requires or ()))
    return None


def need_metadata(folder: Path, distribution: str, what: str) -> Metadata:
    """Like `read_metadata`. Raises DataError where there is none."""
    found = read_metadata(folder, distribution)
    if found is None:
        raise DataError(f"{what}: holds no metadata of {distribution}; take another wheel")
    return found


def write_metadata(
    folder: Path, version: str, requires: Sequence[str], extensions: Iterable[str]
) -> None:
    """Write a `vllm-VERSION.dist-info` into `folder`.

    `extensions` are the import names of vLLM's compiled modules: an installed vLLM lists their
    files in RECORD, which is where the probe looks for them.
    """
    home = folder / f"vllm-{version}.dist-info"
    lines = ["Metadata-Version: 2.1", "Name: vllm", f"Version: {version}"]
    lines += [f"Requires-Dist: {line}" for line in requires]
    record = [f"{name.replace('.', '/')}.abi3.so,," for name in extensions]
    with writing(home):
        home.mkdir(parents=True)
        (home / "METADATA").write_text("\n".join([*lines, ""]), encoding="utf-8")
        (home / "RECORD").write_text("\n".join([*record, ""]), encoding="utf-8")
