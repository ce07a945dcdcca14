"""A version made ready to be asked: an interpreter, and the folders its vLLM is imported from.

A wheel or a source tree brings Python files only. They run in an environment that is made once and
kept: the packages of `probe_requirements.txt`, and torch and triton as links to those that run
here. They are a gigabyte and more, a selector asks them for nothing that their version changes, and
they are here already, since attnbench needs them. Linked one distribution at a time, and not by
opening this environment's whole folder, because whatever else is installed here (a FlashInfer, say)
would change the answers.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from attnbench.errors import BackendUnavailableError, InfrastructureError, UsageError
from attnbench.upgrade.cache import (
    default_cache_folder,
    empty,
    making,
    read_stamp,
    stamp,
    writing,
)
from attnbench.upgrade.download import unpack_local, unpack_remote
from attnbench.upgrade.installed import has_pip, look_at
from attnbench.upgrade.metadata import Metadata, need_metadata
from attnbench.upgrade.package_index import IndexSettings, find_wheel, open_session, pinned
from attnbench.upgrade.remote_file import RemoteFile
from attnbench.upgrade.source_tree import prepare_tree
from attnbench.upgrade.tell import Tell
from attnbench.upgrade.versions import SELECTOR_FILE, Source, SourceKind, normalized

REQUIREMENTS = Path(__file__).parent / "probe_requirements.txt"
FLASHINFER = "flashinfer-python"

_LINKED = ("torch", "triton")
_DOWNLOAD_MB = 78


@dataclass(frozen=True, slots=True)
class PreparedVersion:
    """One side of a comparison, ready to be asked.

    `python` is the interpreter to start and `paths` are the folders to import from before all
    others. `label` names it for people, `requires` are the release's `Requires-Dist` lines and
    `how` says in words where it comes from. `on_device` asks the installed vLLM about the GPU of
    this machine, without stand-ins; only an installed environment can.
    """

    python: Path
    paths: tuple[Path, ...]
    label: str
    vllm_version: str
    requires: tuple[str, ...]
    how: str
    on_device: bool = False


def prepare(
    source: Source, tell: Tell, cache: Path | None = None, requirements: Sequence[str] = ()
) -> PreparedVersion:
    """Make a version of vLLM ready; what was made before is used again, without a network.

    `requirements` are more packages for the environment, as pip takes them: what a version unknown
    to attnbench imports besides. They come without their dependencies.

    Raises:
        UsageError: no such version, no such package, a broken environment.
        DataError: a wheel that cannot be read or has no attention selector.
        InfrastructureError: network, index or disk failed; what came is kept.
    """
    if source.distribution != "vllm":
        raise UsageError(
            f"{source.text}: {source.distribution} has no attention selector to ask; give vLLM, "
            "e.g. vllm==0.22.1"
        )
    folder = default_cache_folder() if cache is None else cache.expanduser().absolute()
    if source.kind is SourceKind.INSTALLED:
        assert source.path is not None
        paths, metadata = look_at(source, folder, tell)
        return PreparedVersion(
            python=source.path,
            paths=paths,
            label=f"vllm {metadata.version} of {source.text}",
            vllm_version=metadata.version,
            requires=metadata.requires,
            how=f"installed in the environment of {source.path}",
        )
    home, metadata, how = _code(source, folder, tell)
    paths = (home,)
    version = pinned(metadata.requires, FLASHINFER)
    if version is None:
        how += "; it pins no FlashInfer, and none is there"
    else:
        paths += (numbered_wheel(FLASHINFER, version, folder, tell),)
        how += f"; with the FlashInfer it pins, {version}"
    python = make_environment(folder, tell, requirements)
    return PreparedVersion(
        python=python,
        paths=paths,
        label=f"vllm {metadata.version}"
        if source.kind is SourceKind.VERSION
        else f"vllm {metadata.version} of {source.text}",
        vllm_version=metadata.version,
        requires=metadata.requires,
        how=how,
    )


def _code(source: Source, cache: Path, tell: Tell) -> tuple[Path, Metadata, str]:
    if source.kind is SourceKind.TREE:
        return prepare_tree(
            source, cache, tell, lambda version: numbered_wheel("vllm", version, cache, tell)
        )
    if source.kind is SourceKind.WHEEL:
        assert source.path is not None
        home = _file_wheel(source.path, cache, tell)
        return home, need_metadata(home, "vllm", source.text), f"wheel {source.path}"
    assert source.version is not None
    home = numbered_wheel("vllm", source.version, cache, tell, required=SELECTOR_FILE)
    came = read_stamp(home.parent) or {}
    metadata = need_metadata(home, "vllm", source.text)
    return home, metadata, f"Python files of {came.get('wheel', source.text)}"


def numbered_wheel(
    distribution: str, version: str, cache: Path, tell: Tell, required: str | None = None
) -> Path:
    """The folder with the Python files and metadata of a version; fetched if it is not here.

    Raises:
        UsageError, DataError, InfrastructureError: see `prepare`.
    """
    entry = cache / "wheels" / f"{normalized(distribution)}-{version}"
    with making(entry, tell):
        if read_stamp(entry) is None:
            settings = IndexSettings.read()
            with open_session(settings) as session:
                wheel = find_wheel(distribution, version, settings, session)
                remote = RemoteFile(wheel.url, entry / "chunks", session)
                unpack_remote(remote, entry / "files", tell, sha256=wheel.sha256, required=required)
            stamp(entry, {"wheel": wheel.filename, "fetched_bytes": remote.fetched})
            remote.discard()
    return entry / "files"


def _file_wheel(wheel: Path, cache: Path, tell: Tell) -> Path:
    status = wheel.stat()
    facts = f"{wheel}|{status.st_size}|{status.st_mtime_ns}".encode()
    entry = cache / "wheels" / f"file-{hashlib.sha256(facts).hexdigest()[:16]}"
    with making(entry, tell):
        if read_stamp(entry) is None:
            unpack_local(wheel, entry / "files", SELECTOR_FILE)
            stamp(entry, {"wheel": wheel.name})
    return entry / "files"


def make_environment(cache: Path, tell: Tell, requirements: Sequence[str] = ()) -> Path:
    """The interpreter of the environment in which wheels and trees are asked; made if not here.

    Raises:
        UsageError: a package of `requirements` that pip does not take.
        BackendUnavailableError: torch is not installed here.
        InfrastructureError: pip failed.
    """
    pins = [*_pins(), *requirements]
    links = _links()
    version = importlib.metadata.version("torch")
    content = {
        "python": sys.version,
        "prefix": sys.prefix,
        "pins": pins,
        "links": {name: [str(path) for path in paths] for name, paths in sorted(links.items())},
    }
    digest = hashlib.sha256(repr(content).encode()).hexdigest()[:12]
    python_version = f"{sys.version_info.major}.{sys.version_info.minor}"
    entry = cache / "environments" / f"py{python_version}-torch{version}-{digest}"
    python = entry / "bin" / "python"
    with making(entry, tell):
        if read_stamp(entry) != content or not python.exists():
            tell.note(
                f"making the environment that asks vLLM, once: {len(pins)} packages, about "
                f"{_DOWNLOAD_MB} MB to download, in {entry}"
            )
            with writing(entry):
                empty(entry)
                own_pip = has_pip()
                _make_venv(entry, with_pip=not own_pip)
                _install(python, pins, requirements, tell, own_pip)
                _link(entry, links)
            _check(python)
            stamp(entry, content)
    return python


def _pins() -> list[str]:
    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    return [text for line in lines if (text := line.partition("#")[0].strip())]


def _make_venv(folder: Path, with_pip: bool) -> None:
    try:
        venv.EnvBuilder(symlinks=True, with_pip=with_pip).create(folder)
    except subprocess.CalledProcessError as error:
        raise InfrastructureError(
            f"{folder}: an environment with pip cannot be made ({error}); install pip beside "
            f"attnbench: {sys.executable} -m ensurepip"
        ) from error


def _install(
    python: Path, pins: list[str], added: Sequence[str], tell: Tell, own_pip: bool
) -> None:
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    if not own_pip:
        pip = [str(python), "-m", "pip"]
    # torch is not there yet: pip must never see the linked packages, or it might remove files of
    # the environment they belong to.
    command = [*pip, "install", "--no-deps", "--prefer-binary", "--no-input", *pins]
    running = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    said: list[str] = []
    with running, tell.progress("packages", len(pins), "packages") as advance:
        assert running.stdout is not None
        for line in running.stdout:
            said.append(line.strip())
            if line.startswith("Collecting "):
                advance(1)
    if running.returncode == 0:
        return
    errors = [line for line in said if line.startswith("ERROR:")] or said[-1:] or ["no output"]
    message = f"pip cannot install the packages that ask vLLM ({errors[0]})"
    if any(normalized(re.split(r"[\s=<>!~\[]", one, maxsplit=1)[0]) in errors[0] for one in added):
        raise UsageError(f"{message}; check what you added to them")
    raise InfrastructureError(
        f"{message}; check the network and `pip config list`, then run it again"
    )


def _links() -> dict[str, list[Path]]:
    """torch, triton and what they need: of each distribution what it has in site-packages."""
    links: dict[str, list[Path]] = {}
    todo = list(_LINKED)
    while todo:
        name = normalized(todo.pop())
        if name in links:
            continue
        links[name] = []
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError as error:
            if name == "torch":
                raise BackendUnavailableError(
                    "torch is not installed here, and the environment that asks vLLM links to it; "
                    "install it with `pip install torch`"
                ) from error
            continue
        needed = (line for line in distribution.requires or () if "extra ==" not in line)
        todo += [re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0] for line in needed]
        tops = {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}
        paths = [Path(str(distribution.locate_file(top))) for top in sorted(tops)]
        links[name] = [path for path in paths if path.exists()]
    return links


def _link(entry: Path, links: dict[str, list[Path]]) -> None:
    """What pip has installed stays: only what is not there is linked."""
    library = next(entry.glob("lib/python*/site-packages"))
    installed = {normalized(one.name.partition("-")[0]) for one in library.glob("*.dist-info")}
    for name, paths in links.items():
        for path in paths:
            # Several distributions may share a folder (nvidia/), which is linked once.
            if name not in installed and not (library / path.name).exists():
                (library / path.name).symlink_to(path)


def _check(python: Path) -> None:
    done = subprocess.run(
        [str(python), "-I", "-c", "import torch, transformers, pydantic"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise InfrastructureError(
            f"the environment that asks vLLM does not work: {last}; check torch here with "
            f"`{sys.executable} -c 'import torch'`"
        )
