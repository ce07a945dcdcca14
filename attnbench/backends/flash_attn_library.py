"""The libraries behind FLASH_ATTN: which there are, what each takes, and how one is found.

A variant is one build of one version, so that a series never changes its kernels by what happens to
be installed. Nothing here imports a library before `load_module` is called.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

from attnbench.backends.device import Device
from attnbench.errors import BackendUnavailableError, UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """One build of one FlashAttention version.

    functions: what is called, and the parameters passed to it, all by keyword.
    page_multiple: the block sizes its paged kernels take.
    install: how to get it.
    majors: the compute capabilities it has kernels for; empty: 8.0 and newer.
    needs: a module its functions import when they are first called; imported with it.
    """

    variant: str
    version: int
    module: str
    functions: Mapping[str, tuple[str, ...]]
    page_multiple: int
    install: str
    majors: tuple[int, ...] = ()
    needs: str = ""

    @property
    def kernel_pattern(self) -> str:
        """Found in the name of a kernel of every forward call. Read off the symbols of vLLM
        0.22.1's wheel; not yet seen on hardware."""
        # Torch's own build of FA2 is in the namespace pytorch_flash. A CuTe DSL kernel is named
        # after its method and, run together, its module and its class.
        return {
            2: r"\bflash::flash_fwd_(splitkv_)?kernel",
            3: r"\bflash::FlashAttnFwdSm90",
            4: r"kernel_\w*FlashAttentionForwardSm\d+",
        }[self.version]

    @property
    def is_vllm(self) -> bool:
        return self.module.startswith("vllm.")

    @property
    def is_found(self) -> bool:
        """Whether its files are installed; it may still fail to import."""
        if self.module in sys.modules:
            return True
        top, *rest = self.module.split(".")
        if top in sys.modules:
            places = list(getattr(sys.modules[top], "__path__", ()))
        else:
            spec = find_spec(top)
            if spec is None or not rest:
                return spec is not None
            places = list(spec.submodule_search_locations or ())
        # Two libraries share the package flash_attn, and either may be there alone.
        paths = [Path(place, *rest) for place in places]
        return any(path.is_dir() or path.with_suffix(".py").is_file() for path in paths)


_COMMON = (
    *("q", "cu_seqlens_q", "max_seqlen_q", "softmax_scale", "causal", "window_size", "softcap"),
)
_DESCALES = ("q_descale", "k_descale", "v_descale")
_SCHEDULE = (
    *("batch_size", "max_seqlen_q", "max_seqlen_k", "num_heads_q", "num_heads_kv", "headdim"),
    *("cache_seqlens", "qkv_dtype", "cu_seqlens_q", "page_size", "causal", "window_size"),
    *("has_softcap", "num_splits"),
)
_VLLM_MODULE = "vllm.vllm_flash_attn.flash_attn_interface"
_VLLM = (
    *(*_COMMON, "k", "v", "max_seqlen_k", "cu_seqlens_k", "seqused_k", "block_table", "out"),
    *("return_softmax_lse", "fa_version"),
)
_VLLM_INSTALL = (
    "pip install vllm==0.22.1 (or put the folder that holds its vllm/ on PYTHONPATH: only "
    "vllm/vllm_flash_attn is imported)"
)

#: Of vLLM's check (flash_attn_interface.py); the paged kernels are for these.
_FA4_MAJORS = (9, 10, 11)

_LIBRARIES = (
    Library(
        variant="FA3",
        version=3,
        module=_VLLM_MODULE,
        functions={
            "flash_attn_varlen_func": (
                *(*_VLLM, *_DESCALES, "scheduler_metadata", "num_splits", "s_aux"),
            ),
            "get_scheduler_metadata": _SCHEDULE,
        },
        page_multiple=16,
        install=_VLLM_INSTALL,
        majors=(9,),
    ),
    Library(
        variant="FA4",
        version=4,
        module=_VLLM_MODULE,
        functions={"flash_attn_varlen_func": (*_VLLM, "num_splits", "s_aux")},
        page_multiple=16,
        install=f"{_VLLM_INSTALL}; pip install 'nvidia-cutlass-dsl[cu13]==4.5.2' quack-kernels",
        majors=_FA4_MAJORS,
        needs="vllm.vllm_flash_attn.cute.interface",
    ),
    Library(
        variant="FA2",
        version=2,
        module=_VLLM_MODULE,
        functions={"flash_attn_varlen_func": (*_VLLM, "alibi_slopes")},
        page_multiple=16,
        install=_VLLM_INSTALL,
    ),
    Library(
        variant="FA3_UPSTREAM",
        version=3,
        module="flash_attn_interface",
        functions={
            "flash_attn_with_kvcache": (
                *(*_COMMON, *_DESCALES, "k_cache", "v_cache", "cache_seqlens", "page_table"),
                *("scheduler_metadata", "num_splits", "return_softmax_lse"),
            ),
            "flash_attn_varlen_func": (*_COMMON, "k", "v", "cu_seqlens_k", "max_seqlen_k"),
            "get_scheduler_metadata": _SCHEDULE,
        },
        # Any size runs; vLLM's predicates, which the selector follows, say multiples of 16.
        page_multiple=16,
        install="build the hopper folder of github.com/Dao-AILab/flash-attention "
        "(pip install --no-build-isolation .)",
        majors=(9,),
    ),
    Library(
        variant="FA4_UPSTREAM",
        version=4,
        module="flash_attn.cute",
        functions={
            "flash_attn_varlen_func": (
                *(*_COMMON, "k", "v", "cu_seqlens_k", "max_seqlen_k", "seqused_k", "page_table"),
                *("learnable_sink", "num_splits", "return_lse"),
            )
        },
        page_multiple=16,
        install="pip install --pre 'flash-attn-4[cu13]'",
        majors=_FA4_MAJORS,
    ),
    Library(
        variant="FA2_UPSTREAM",
        version=2,
        module="flash_attn.flash_attn_interface",
        functions={
            "flash_attn_varlen_func": (
                *(*_COMMON, "k", "v", "cu_seqlens_k", "max_seqlen_k", "alibi_slopes"),
                *("block_table", "return_attn_probs"),
            )
        },
        page_multiple=256,
        install="pip install flash-attn --no-build-isolation",
    ),
)

LIBRARIES: Mapping[str, Library] = MappingProxyType({lib.variant: lib for lib in _LIBRARIES})


def library(variant: str) -> Library:
    """The library of a variant. Raises UsageError for a name that is none."""
    if variant not in LIBRARIES:
        raise UsageError(
            f"FLASH_ATTN has no variant {variant!r}; write FLASH_ATTN:VARIANT with one of "
            f"{', '.join(LIBRARIES)}"
        )
    return LIBRARIES[variant]


def variants_of(device: Device) -> tuple[str, ...]:
    """Variants whose kernels exist for `device`, all of them where that is not known."""
    capability = device.capability
    return tuple(
        lib.variant
        for lib in _LIBRARIES
        if capability is None or not lib.majors or capability.major in lib.majors
    )


def missing_reason(variant: str) -> str | None:
    """Why this process cannot load `variant`, with the command that brings it; None: it can."""
    if variant not in LIBRARIES:
        return None
    try:
        load_functions(LIBRARIES[variant])
    except BackendUnavailableError as error:
        return str(error)
    return None


def require_any() -> None:
    """Raises BackendUnavailableError when none of the libraries is installed; imports none."""
    if not any(lib.is_found for lib in _LIBRARIES):
        raise BackendUnavailableError(
            "neither vllm, flash_attn_interface nor flash_attn is installed; "
            f"FA3, FA4 and FA2: {_VLLM_INSTALL}; FA2_UPSTREAM: "
            f"{LIBRARIES['FA2_UPSTREAM'].install}; FA4_UPSTREAM: "
            f"{LIBRARIES['FA4_UPSTREAM'].install}"
        )


def load_functions(lib: Library) -> dict[str, Callable[..., Any]]:
    """The functions of `lib`, imported now, their parameters checked.

    Raises: BackendUnavailableError when it is absent, broken, or of another signature.
    """
    module = load_module(lib)
    functions: dict[str, Callable[..., Any]] = {}
    for name, wanted in lib.functions.items():
        function = getattr(module, name, None)
        if function is None:
            raise _unavailable(lib, f"{lib.module} has no {name}")
        have = inspect.signature(function).parameters
        if lacking := [parameter for parameter in wanted if parameter not in have]:
            raise _unavailable(lib, f"its {name} has no parameter {', '.join(lacking)}")
        functions[name] = function
    return functions


def load_module(lib: Library) -> ModuleType:
    """The library's module. Raises BackendUnavailableError."""
    try:
        if lib.is_vllm:
            with vllm_package():
                module = importlib.import_module(lib.module)
                if lib.needs:
                    importlib.import_module(lib.needs)
        else:
            module = importlib.import_module(lib.module)
    # A library built for another torch or CUDA fails in many ways while it is imported.
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise _unavailable(lib, f"{type(error).__name__}: {error}") from error
    if lib.is_vllm and not getattr(module, f"FA{lib.version}_AVAILABLE", False):
        why = getattr(module, f"FA{lib.version}_UNAVAILABLE_REASON", None)
        raise _unavailable(lib, str(why or "its kernels are not in this wheel"))
    return module


def _unavailable(lib: Library, why: str) -> BackendUnavailableError:
    others = [o.variant for o in _LIBRARIES if o.module != lib.module and o.is_found]
    instead = f"; also installed: FLASH_ATTN:{', FLASH_ATTN:'.join(others)}" if others else ""
    reason = " ".join(why.split())
    return BackendUnavailableError(
        f"FLASH_ATTN:{lib.variant} cannot be imported ({reason}); {lib.install}{instead}"
    )


@contextmanager
def vllm_package() -> Iterator[None]:
    """While open, `vllm.vllm_flash_attn` can be imported without running vLLM's own `__init__`.

    That sets compiler options for the whole process (`vllm/env_override.py`), which would reach
    other backends measured in it, and needs packages the kernels do not. `vllm` is as before
    afterwards: a later import of vLLM itself is a real one.
    """
    if "vllm" in sys.modules:
        yield
        return
    spec = find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'vllm'")
    stub = ModuleType("vllm")
    stub.__path__ = list(spec.submodule_search_locations)
    sys.modules["vllm"] = stub
    try:
        yield
    finally:
        if sys.modules.get("vllm") is stub:
            del sys.modules["vllm"]
