"""Name -> class path, imported on demand.

Built-in names are in `_BUILT_IN`; a program adds its own with `register_backend`, a package by the
entry point group `attnbench.backends` (`NAME = "package.module:Class"`). No enum, which would be
closed: a new vendor needs no change here.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib.metadata import entry_points
from typing import TypeVar, overload

from attnbench.backends.abstract import AttentionBackend
from attnbench.backends.device import Device
from attnbench.backends.family import BackendFamily
from attnbench.errors import BackendUnavailableError, UnknownBackendError, UsageError

ENTRY_POINT_GROUP = "attnbench.backends"

B = TypeVar("B", bound=type[AttentionBackend])


@dataclass(frozen=True, slots=True)
class BackendEntry:
    """One registered name. `owner` is who registered it; `install` brings its library."""

    name: str
    class_path: str
    owner: str
    install: str = ""
    selection_only: bool = False
    is_family: bool = False


_HERE = "attnbench.backends"
_DECLARED = f"{_HERE}.declared.vllm_0_22_1"

#: name: (class path, pip command). The order is the order of `backend_names` and of the fallback.
_BUILT_IN: dict[str, tuple[str, str]] = {
    "TORCH_SDPA": (f"{_HERE}.torch_sdpa.TorchSDPABackend", "pip install torch"),
    "TRITON_ATTN": (f"{_HERE}.triton_attn.TritonAttentionBackend", "pip install triton"),
    "FLEX_ATTENTION": (f"{_HERE}.flex_attention.FlexAttentionBackend", "pip install torch"),
    "CPU_ATTN": (f"{_HERE}.cpu_attn.CPUAttentionBackend", "pip install torch"),
    "FLASH_ATTN": (f"{_HERE}.flash_attn.FlashAttentionBackend", "pip install vllm==0.22.1"),
    "FLASHINFER": (
        f"{_HERE}.flashinfer.FlashInferBackend",
        "pip install flashinfer-python==0.6.11.post2",
    ),
    "FLASH_ATTN_MLA": (
        f"{_HERE}.flash_attn_mla.FlashAttentionMLABackend",
        "pip install vllm==0.22.1",
    ),
    "FLASHMLA": (f"{_HERE}.flashmla.FlashMLABackend", "pip install vllm==0.22.1"),
    "FLASHMLA_SPARSE": (
        f"{_HERE}.flashmla_sparse.FlashMLASparseBackend",
        "pip install vllm==0.22.1",
    ),
    "FLASHINFER_MLA": (
        f"{_HERE}.flashinfer_mla.FlashInferMLABackend",
        "pip install flashinfer-python",
    ),
    "CUTLASS_MLA": (f"{_HERE}.cutlass_mla.CutlassMLABackend", "pip install vllm==0.22.1"),
    "TRITON_MLA": (f"{_HERE}.triton_mla.TritonMLABackend", "pip install triton"),
    "TORCH_MLA": (f"{_HERE}.torch_mla.TorchMLABackend", "pip install torch"),
    "ROCM_AITER_FA": (
        f"{_HERE}.aiter_flash_attn.RocmAiterFlashAttentionBackend",
        "pip install amd-aiter",
    ),
    "ROCM_AITER_UNIFIED_ATTN": (
        f"{_HERE}.aiter_unified.RocmAiterUnifiedAttentionBackend",
        "pip install amd-aiter",
    ),
    "ROCM_AITER_MLA": (f"{_HERE}.aiter_mla.RocmAiterMLABackend", "pip install amd-aiter"),
    "ROCM_AITER_TRITON_MLA": (
        f"{_HERE}.aiter_mla.RocmAiterTritonMLABackend",
        "pip install amd-aiter",
    ),
}

#: One name for a library's own backends, each asked for as `NAME:MEMBER` (`BackendFamily`). None of
#: them is in a sweep or a chain unless it was asked for.
_FAMILIES: dict[str, tuple[str, str]] = {
    "VLLM": (f"{_HERE}.vllm_bridge.VllmFamily", "pip install vllm==0.22.1"),
}

#: Families vLLM's chains name and attnbench cannot run yet: known to the selector only.
_SELECTION_ONLY: dict[str, str] = {
    "FLASH_ATTN_DIFFKV": "FlashAttentionDiffKV",
    "TURBOQUANT": "TurboQuant",
    "TOKENSPEED_MLA": "TokenspeedMLA",
    "FLASHINFER_MLA_SPARSE": "FlashInferMLASparse",
    "ROCM_ATTN": "RocmAttention",
    "ROCM_AITER_MLA_SPARSE": "RocmAiterMLASparse",
    "XPU_MLA_SPARSE": "XpuMLASparse",
}

_registered: dict[str, BackendEntry] = {}
_generation = 0


def _built_in() -> dict[str, BackendEntry]:
    entries = {
        name: BackendEntry(name, path, "attnbench", install)
        for name, (path, install) in _BUILT_IN.items()
    }
    for name, (path, install) in _FAMILIES.items():
        entries[name] = BackendEntry(name, path, "attnbench", install, is_family=True)
    for name, class_name in _SELECTION_ONLY.items():
        path = f"{_DECLARED}.{class_name}"
        entries[name] = BackendEntry(name, path, "attnbench", selection_only=True)
    return entries


@lru_cache(maxsize=1)
def _installed() -> dict[str, BackendEntry]:
    """Built-in names and those of installed packages' entry points; none is imported."""
    entries = _built_in()
    for point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda p: p.name):
        package = point.dist.name if point.dist is not None else point.value
        owner = f"package {package}"
        if point.name in entries:
            _refuse_duplicate(entries[point.name], owner, f"uninstall {package}")
        path = point.value.replace(":", ".")
        entries[point.name] = BackendEntry(point.name, path, owner, f"pip install -U {package}")
    return entries


def _refuse_duplicate(existing: BackendEntry, owner: str, mend: str) -> None:
    raise UsageError(
        f"backend {existing.name} is registered twice: by {existing.owner} "
        f"({existing.class_path}) and by {owner}; {mend}, or pass override=True to register_backend"
    )


def _entries() -> dict[str, BackendEntry]:
    return {**_installed(), **_registered}


@overload
def register_backend(
    name: str, class_path: None = None, *, override: bool = False, install: str = ""
) -> Callable[[B], B]: ...


@overload
def register_backend(
    name: str, class_path: str, *, override: bool = False, install: str = ""
) -> None: ...


def register_backend(
    name: str, class_path: str | None = None, *, override: bool = False, install: str = ""
) -> Callable[[B], B] | None:
    """Add a backend, as a call with a dotted class path or as a decorator of the class.

    Args:
        name: upper case, e.g. `MY_ATTN`.
        class_path: `package.module.Class`; None makes this a decorator.
        override: replace a name that exists.
        install: pip command shown when the class cannot be imported.

    Raises: UsageError if the name is taken and `override` is False (naming both owners), or if the
        decorated class cannot be reached again by its path (it is local to a function).
    """
    if class_path is None:

        def decorate(cls: B) -> B:
            if "<locals>" in cls.__qualname__:
                raise UsageError(
                    f"backend {name}: {cls.__qualname__} is local to a function and cannot be "
                    "imported by its path; define it at module level"
                )
            _register(name, f"{cls.__module__}.{cls.__qualname__}", override, install)
            return cls

        return decorate
    _register(name, class_path, override, install)
    return None


def _register(name: str, class_path: str, override: bool, install: str) -> None:
    if "." not in class_path:
        raise UsageError(
            f"backend {name}: {class_path!r} is not a path; write package.module.Class"
        )
    existing = _entries().get(name)
    if existing is not None and existing.class_path != class_path and not override:
        _refuse_duplicate(existing, class_path, "choose another name")
    _registered[name] = BackendEntry(name, class_path, class_path.rpartition(".")[0], install)
    _forget()


def unregister_backend(name: str) -> None:
    """Take back what `register_backend` added under `name`; an overridden name shows again."""
    if name not in _registered:
        raise UnknownBackendError(
            f"backend {name} was not added by register_backend; nothing to take back"
        )
    del _registered[name]
    _forget()


def _forget() -> None:
    global _generation
    _generation += 1
    get_backend_class.cache_clear()
    backend_status.cache_clear()


def generation() -> int:
    """A number that changes with every registration: part of the selector's memo key."""
    return _generation


def reload_entry_points() -> None:
    """Read the installed packages' entry points again (a package came or went)."""
    _installed.cache_clear()
    _forget()


def backend_names() -> tuple[str, ...]:
    """Every registered name: what attnbench runs first, selection-only families after."""
    entries = sorted(_entries().values(), key=lambda entry: entry.selection_only)
    return tuple(entry.name for entry in entries)


def runnable_backend_names() -> tuple[str, ...]:
    """Names of backends attnbench has code for, whether or not their library is here."""
    return tuple(
        entry.name
        for entry in _entries().values()
        if not entry.selection_only and not entry.is_family
    )


def split_request(text: str) -> tuple[str, str]:
    """`NAME:variant` as (name, variant); "": no variant.

    The name of a family's member has a colon of its own: `VLLM:FLASH_ATTN` is a name.
    """
    name, _, rest = text.strip().partition(":")
    entry = _entries().get(name.upper())
    if rest and entry is not None and entry.is_family:
        member, _, rest = rest.partition(":")
        name = f"{name}:{member}"
    return name, rest


def backend_entry(name: str) -> BackendEntry:
    """Where `name` comes from.

    Raises: UnknownBackendError listing the valid names and the closest.
    """
    entries = _entries()
    if name in entries:
        return entries[name]
    family, colon, _ = name.partition(":")
    if colon and family in entries and entries[family].is_family:
        return replace(entries[family], name=name, is_family=False)
    upper = name.strip().upper().replace("-", "_")
    near = [upper] if upper in entries else difflib.get_close_matches(upper, entries, 1, 0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UnknownBackendError(
        f"unknown backend {name!r}; {hint}valid names: {', '.join(backend_names())}; "
        "`attnbench backends` shows them"
    )


@cache
def get_backend_class(name: str) -> type[AttentionBackend]:
    """The class registered as `name`, imported now.

    Raises:
        UnknownBackendError: nobody registered the name.
        BackendUnavailableError: its module or library cannot be imported; says how to install it.
    """
    entry = backend_entry(name)
    family, colon, member = name.partition(":")
    if colon:
        found = get_backend_class(family)
        assert issubclass(found, BackendFamily)
        return found.get_member(member)
    module, _, class_name = entry.class_path.rpartition(".")
    mend = entry.install or f"check the class path {entry.class_path}"
    try:
        cls = getattr(importlib.import_module(module), class_name)
    except (ImportError, AttributeError, OSError) as error:
        raise BackendUnavailableError(
            f"backend {name} cannot be imported ({type(error).__name__}: {error}); {mend}"
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, AttentionBackend)):
        raise BackendUnavailableError(
            f"backend {name}: {entry.class_path} is no AttentionBackend; derive it from "
            "attnbench.backends.abstract.AttentionBackend"
        )
    return cls


@cache
def backend_status(name: str, device: Device | None = None, variant: str = "") -> str | None:
    """None when the backend's library is here, else why not and what to install.

    With `device` also whether this process can run it there, with `variant` that variant of it.

    Raises: UnknownBackendError.
    """
    try:
        cls = get_backend_class(name)
    except BackendUnavailableError as error:
        return str(error)
    try:
        cls.get_impl_cls()
        cls.get_builder_cls()
    except BackendUnavailableError as error:
        return str(error)
    except (ImportError, OSError) as error:
        mend = cls.install_hint or backend_entry(name).install or f"see {cls.__module__}"
        return f"its library cannot be imported ({type(error).__name__}: {error}); {mend}"
    if device is None:
        return None
    return cls.unavailable_reason(device) or cls.variant_unavailable(variant, device)
