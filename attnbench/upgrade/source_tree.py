"""vLLM from a source tree: its Python files as they are, with what a build would add.

A build adds metadata, and Python files of other projects (the CuTe DSL kernels of FlashAttention 4,
FlashMLA's Python side). Without those some backends refuse and others take their place, in part
without a word. So they are taken from the wheel of the release that the tree comes after, as vLLM's
own build with precompiled kernels does.
"""

from __future__ import annotations

import ast
import hashlib
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from email.parser import HeaderParser
from pathlib import Path

from attnbench.errors import DataError, UsageError
from attnbench.upgrade.cache import empty, making, read_stamp, stamp, writing
from attnbench.upgrade.download import is_wanted
from attnbench.upgrade.metadata import Metadata, read_metadata, write_metadata
from attnbench.upgrade.tell import Tell
from attnbench.upgrade.versions import SELECTOR_FILE, Source, git

_EXTENSION = "CMakeExtension"
_NO_VERSION = "0.0.0"
# Folders into which vLLM's build copies files of other projects.
_BUILT = ("vllm/vllm_flash_attn", "vllm/third_party")
# Branches of setup.py that build for something other than an NVIDIA GPU.
_OTHER_TARGETS = ("_is_hip", "_is_cpu", "_is_xpu", "_is_tpu")


def prepare_tree(
    source: Source, cache: Path, tell: Tell, release: Callable[[str], Path]
) -> tuple[Path, Metadata, str]:
    """The folder from which this tree's vLLM is imported, its metadata, and in words what it is.

    `release` gives the folder with a released version's Python files.

    Raises:
        UsageError: git cannot give the commit's files.
        DataError: the tree does not say which compiled modules it has, or after which release it
            comes.
    """
    tree = source.path
    assert tree is not None
    at = f" at commit {source.commit[:12]}" if source.commit else ", as it is on disk"
    how = f"source tree {tree}{at}"
    if source.commit is None and (unpacked := read_metadata(tree, "vllm")) is not None:
        return tree, unpacked, how
    home = cache / "trees" / _key(source, tree)
    built = source.commit is None and any((tree / "vllm").rglob("*.so"))
    content = {"tree": str(tree), "state": source.commit or _state(tree), "built": built}
    with making(home, tell):
        made = read_stamp(home) or {}
        if {key: made.get(key) for key in content} != content:
            empty(home)
            if source.commit is None:
                _copy(tree, home)
            else:
                _archive(tree, source.commit, home)
            metadata, extensions = _described(source, home)
            added = "" if built else _add_built_files(source, metadata, home, release)
            write_metadata(home, metadata.version, metadata.requires, extensions)
            made = {**content, "added": added}
            stamp(home, made)
    found = read_metadata(home, "vllm")
    assert found is not None
    return home, found, how + made["added"]


def _key(source: Source, tree: Path) -> str:
    if source.commit:
        return f"vllm-{source.commit[:16]}"
    return f"vllm-{hashlib.sha256(str(tree).encode()).hexdigest()[:16]}"


def _files(tree: Path) -> list[Path]:
    """What is taken of a tree, relative to it."""
    top = [tree / name for name in ("setup.py", "PKG-INFO")]
    inside = [*(tree / "vllm").rglob("*"), *(tree / "requirements").rglob("*.txt")]
    kept = (one for one in inside if is_wanted(one.name) and one.is_file())
    return sorted(one.relative_to(tree) for one in (*filter(Path.is_file, top), *kept))


def _state(tree: Path) -> str:
    """Changes whenever a file that is taken does, or the version that git says."""
    facts = [git(tree, "describe", "--tags", "--long", "--always").stdout]
    for file in _files(tree):
        status = (tree / file).stat()
        facts.append(f"{file}|{status.st_size}|{status.st_mtime_ns}")
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()


def _copy(tree: Path, home: Path) -> None:
    with writing(home):
        for file in _files(tree):
            (home / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(tree / file, home / file)


def _add_built_files(
    source: Source, metadata: Metadata, home: Path, release: Callable[[str], Path]
) -> str:
    base = metadata.version.partition("+")[0]
    if base == _NO_VERSION:
        raise DataError(
            f"{source.text}: no release tag before it, and the Python files that only a build adds "
            f"come from that release's wheel; fetch the tags (git -C {source.path} fetch --tags), "
            "or build a wheel and name it"
        )
    try:
        folder = release(base)
    except UsageError as error:
        raise DataError(
            f"{source.text} comes after vllm {base}, whose wheel has the Python files that only a "
            f"build adds ({error}); build a wheel of the tree and name it"
        ) from error
    for name in _BUILT:
        for file in (folder / name).rglob("*"):
            target = home / file.relative_to(folder)
            if file.is_file() and not target.exists():
                with writing(home):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, target)
    return f"; files that only a build adds from the wheel of {base}"


def _archive(tree: Path, commit: str, home: Path) -> None:
    wanted = git(tree, "ls-tree", "--name-only", commit).stdout.splitlines()
    parts = [name for name in ("vllm", "setup.py", "requirements", "PKG-INFO") if name in wanted]
    running = subprocess.Popen(
        ["git", "-C", str(tree), "archive", "--format=tar", commit, "--", *parts],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with running, writing(home):
        assert running.stdout is not None
        assert running.stderr is not None
        try:
            with tarfile.open(fileobj=running.stdout, mode="r|") as archive:
                for member in archive:
                    if is_wanted(member.name) or member.name == "PKG-INFO":
                        archive.extract(member, home, filter="data")
            running.stdout.read()
        except tarfile.TarError as error:
            said = running.stderr.read().decode(errors="replace").strip() or str(error)
            raise UsageError(
                f"{tree}: git cannot give the files of {commit}: {said}; check the clone with "
                "`git fsck`"
            ) from error


def _described(source: Source, tree: Path) -> tuple[Metadata, tuple[str, ...]]:
    setup = tree / "setup.py"
    if not setup.is_file():
        raise DataError(
            f"{source.text}: no setup.py, which lists the compiled modules; name the folder that "
            f"holds setup.py and {SELECTOR_FILE}"
        )
    try:
        extensions = extension_modules(setup.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise DataError(f"{setup}: cannot be read as Python ({error}); mend that line") from error
    if not extensions:
        raise DataError(
            f"{source.text}: setup.py lists no compiled module ({_EXTENSION}), so what they make "
            "possible would not be seen; build a wheel and name it"
        )
    return _metadata(source, tree), extensions


def extension_modules(setup: str) -> tuple[str, ...]:
    """The compiled modules that `setup.py` builds for NVIDIA GPUs: the names of CMakeExtension."""
    names = set()
    for call in _calls(ast.parse(setup).body):
        values = [*call.args[:1], *(word.value for word in call.keywords if word.arg == "name")]
        for value in values:
            if isinstance(value, ast.Constant) and str(value.value).startswith("vllm."):
                names.add(str(value.value))
    return tuple(sorted(names))


def _calls(body: list[ast.stmt]) -> Iterator[ast.Call]:
    for statement in body:
        if isinstance(statement, ast.If):
            test = ast.unparse(statement.test)
            other = any(name in test for name in _OTHER_TARGETS) and "_is_cuda" not in test
            yield from () if other else _calls(statement.body)
            yield from _calls(statement.orelse)
        else:
            for node in ast.walk(statement):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == _EXTENSION:
                    yield node


def _metadata(source: Source, tree: Path) -> Metadata:
    # A source distribution carries its metadata; a clone has requirement files and tags.
    package_info = tree / "PKG-INFO"
    if package_info.is_file():
        headers = HeaderParser().parsestr(package_info.read_text(encoding="utf-8"))
        if headers["Version"]:
            return Metadata(headers["Version"], tuple(headers.get_all("Requires-Dist", [])))
    requires = tuple(_requirements(tree / "requirements" / "cuda.txt", frozenset()))
    return Metadata(_version(source), requires)


def _requirements(file: Path, seen: frozenset[Path]) -> Iterator[str]:
    if file in seen or not file.is_file():
        return
    for line in file.read_text(encoding="utf-8").splitlines():
        text = re.sub(r"(^|\s)#.*", "", line).strip()
        if text.startswith("-r"):
            yield from _requirements(file.parent / text[2:].strip(), seen | {file})
        elif text and not text.startswith("-"):
            yield text


def _version(source: Source) -> str:
    """Of the tag before, with how far behind it is: 0.22.1+5.gabc1234; 0.0.0 without a tag."""
    assert source.path is not None
    revision = [source.commit] if source.commit else []
    said = git(source.path, "describe", "--tags", "--long", "--match", "v[0-9]*", *revision)
    match = re.fullmatch(r"v(\d[\w.]*)-(\d+)-(g[0-9a-f]+)", said.stdout.strip())
    if match and match[2] == "0":
        return match[1]
    if match:
        return f"{match[1]}+{match[2]}.{match[3]}"
    return f"{_NO_VERSION}+g{source.commit[:8]}" if source.commit else f"{_NO_VERSION}+source"
