"""The vLLM of an installed environment: asked with that environment's own interpreter."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import subprocess
from pathlib import Path
from typing import Any

from attnbench.errors import UsageError
from attnbench.upgrade.cache import empty, making, read_stamp, stamp
from attnbench.upgrade.metadata import Metadata, write_metadata
from attnbench.upgrade.tell import Tell
from attnbench.upgrade.versions import SELECTOR_FILE, Source

_TIMEOUT_S = 120.0

# Looks without importing vLLM; torch is imported because a broken one is the usual breakage.
_LOOK = """
import importlib.metadata, importlib.util, json, pathlib, sys
found = {"python": list(sys.version_info[:3])}
try:
    distribution = importlib.metadata.distribution("vllm")
    package = pathlib.Path(importlib.util.find_spec("vllm").origin).parent
except (importlib.metadata.PackageNotFoundError, AttributeError, TypeError):
    pass
else:
    listed = [str(file) for file in distribution.files or ()]
    found |= {
        "version": distribution.version,
        "requires": distribution.requires or [],
        "site": str(distribution.locate_file("")),
        "package": str(package),
        "listed": sum(one.startswith("vllm/") and one.endswith(".so") for one in listed),
        "compiled": [str(one.relative_to(package)) for one in package.rglob("*.so")],
    }
try:
    import torch
    found["torch"] = torch.__version__
except Exception as error:
    found["torch_error"] = f"{type(error).__name__}: {error}"
print("FOUND", json.dumps(found))
"""


def look_at(source: Source, cache: Path, tell: Tell) -> tuple[tuple[Path, ...], Metadata]:
    """Where its vLLM is imported from, and its metadata.

    Raises:
        UsageError: the interpreter does not start, or has no vLLM that can be asked.
    """
    found = _look(source)
    where = f"{source.text}: a broken environment"
    if "version" not in found:
        raise UsageError(
            f"{source.text}: no vLLM is installed there; install one, or name another environment"
        )
    if "torch_error" in found:
        raise UsageError(
            f"{where}: torch cannot be imported ({found['torch_error']}); mend it with "
            f"`{source.path} -m pip install --force-reinstall torch`"
        )
    package = Path(found["package"])
    if not (package.parent / SELECTOR_FILE).is_file():
        raise UsageError(
            f"{source.text}: no attention selector in vLLM {found['version']} ({SELECTOR_FILE} is "
            f"missing in {package.parent}); name an environment with a newer one"
        )
    metadata = Metadata(found["version"], tuple(found["requires"]))
    site = Path(found["site"])
    if found["listed"] or not found["compiled"]:
        return (site,), metadata
    # An editable install lists no compiled module, and the probe replaces those that are listed.
    return (_overlay(found, metadata, cache, tell), site), metadata


def _look(source: Source) -> dict[str, Any]:
    where = f"{source.text}: a broken environment"
    try:
        done = subprocess.run(
            [str(source.path), "-I", "-c", _LOOK],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise UsageError(
            f"{where}: the interpreter gave no answer in {_TIMEOUT_S:.0f} s; try "
            f"`{source.path} -c 'import torch'` there"
        ) from error
    except OSError as error:
        raise UsageError(
            f"{where}: {source.path} does not start ({error.strerror}); make the environment anew"
        ) from error
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    if done.returncode != 0 or not lines:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UsageError(
            f"{where}: {source.path} ended with exit code {done.returncode}: {last}; make the "
            "environment anew"
        )
    answer: dict[str, Any] = json.loads(lines[-1].removeprefix("FOUND "))
    return answer


def _overlay(found: dict[str, Any], metadata: Metadata, cache: Path, tell: Tell) -> Path:
    names = sorted(
        "vllm." + ".".join([*Path(one).parts[:-1], Path(one).name.partition(".")[0]])
        for one in found["compiled"]
    )
    facts = json.dumps([found["package"], metadata.version, metadata.requires, names]).encode()
    home = cache / "overlays" / hashlib.sha256(facts).hexdigest()[:16]
    with making(home, tell):
        if read_stamp(home) is None:
            empty(home)
            write_metadata(home, metadata.version, metadata.requires, names)
            stamp(home, {"package": found["package"]})
    return home


def has_pip() -> bool:
    """Whether this environment has pip. Its metadata is asked: to look for the module makes
    setuptools' hook, where it is installed, warn of a distutils that is loaded already."""
    try:
        importlib.metadata.distribution("pip")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
