"""An installed vLLM as its files say: where it is, its version, its backends. Nothing is imported.

Importing vLLM costs seconds and sets compiler options for the whole process
(`vllm/env_override.py`), so it is imported only by a process that was asked to run it.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

INSTALL = "pip install vllm==0.22.1"

_REGISTRY = "v1/attention/backends/registry.py"
_ENUM = "AttentionBackendEnum"


@dataclass(frozen=True, slots=True)
class VllmInstall:
    """The vLLM this process would import."""

    root: Path
    version: str
    backend_names: tuple[str, ...]


def find_vllm() -> VllmInstall | None:
    """None when no vLLM is installed, or one without the v1 backends' registry."""
    try:
        spec = find_spec("vllm")
    except (ImportError, ValueError):  # a half-removed package
        return None
    for location in (spec.submodule_search_locations or ()) if spec is not None else ():
        root = Path(location)
        if (root / _REGISTRY).is_file():
            version = _read_version(root / "_version.py")
            return VllmInstall(root, version, _read_names(root / _REGISTRY))
    return None


def missing_reason() -> str | None:
    """Why no backend of vLLM can be had, with the command that brings it; None: it is installed."""
    if find_vllm() is not None:
        return None
    return f"vLLM is not installed; {INSTALL}"


def _read_version(path: Path) -> str:
    """`__version__` of vLLM's generated version file; "" where it is another."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return ""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            if "__version__" in names and isinstance(node.value.value, str):
                return node.value.value
    return ""


def _read_names(path: Path) -> tuple[str, ...]:
    """Members of vLLM's enum that have a class path: the others are placeholders."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return ()
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == _ENUM:
            return tuple(
                target.id
                for statement in node.body
                if isinstance(statement, ast.Assign)
                and isinstance(statement.value, ast.Constant)
                and isinstance(statement.value.value, str)
                and "." in statement.value.value
                for target in statement.targets
                if isinstance(target, ast.Name)
            )
    return ()
