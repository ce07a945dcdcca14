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
from types import MappingProxyType, ModuleType
from typing import Any

import torch

from attnbench.backends.abstract import AttentionConfig
from attnbench.backends.device import Device, DeviceCapability
from attnbench.errors import BackendUnavailableError, UsageError
from attnbench.workload.types import AttentionType

#: FlashAttention 2 and 3 end here; vLLM takes FlashAttention 4 above (fa_utils.py:60-180).
MAX_HEAD_SIZE = 256
#: FA3 refuses sinks of more query heads (vLLM's build, hopper/flash_api.cpp).
MAX_SINK_HEADS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """One build of one FlashAttention version.

    functions: what is called, and the parameters passed to it, all by keyword.
    page_multiple: the block sizes its paged kernels take.
    install: how to get it.
    """

    variant: str
    version: int
    module: str
    functions: Mapping[str, tuple[str, ...]]
    page_multiple: int
    install: str

    @property
    def kernel_pattern(self) -> str:
        """Found in the name of a kernel of every forward call. Read off the symbols of vLLM
        0.22.1's wheel; not yet seen on hardware."""
        # Torch's own build of FA2 is in the namespace pytorch_flash.
        return {
            2: r"\bflash::flash_fwd_(splitkv_)?kernel",
            3: r"\bflash::FlashAttnFwdSm90",
        }[self.version]

    @property
    def is_vllm(self) -> bool:
        return self.module.startswith("vllm.")

    @property
    def is_found(self) -> bool:
        """Whether its package is installed; it may still fail to import."""
        top = self.module.partition(".")[0]
        if self.module in sys.modules or top in sys.modules:
            return True
        return find_spec(top) is not None


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
    hopper = device.capability is None or device.capability.major == 9
    return tuple(lib.variant for lib in _LIBRARIES if hopper or lib.version == 2)


def refusal(variant: str, config: AttentionConfig, device: Device) -> str | None:
    """Why the kernels of `variant` refuse `config`, None if they take it (or are unknown)."""
    if variant not in LIBRARIES:
        return None
    lib = LIBRARIES[variant]
    is_fp8 = config.kv_cache_dtype.startswith("fp8")
    reads_cache = config.attn_type in (AttentionType.DECODER, AttentionType.ENCODER_DECODER)
    if config.head_size > MAX_HEAD_SIZE:
        return (
            f"head size {config.head_size} needs FlashAttention 4, which attnbench does not run "
            f"yet; FA2 and FA3 end at {MAX_HEAD_SIZE}"
        )
    if not is_fp8 and not _is_same_dtype(config):
        return f"a {config.kv_cache_dtype} KV cache needs queries of the same type"
    if lib.version == 3:
        capability = device.capability
        if capability is not None and capability.major != DeviceCapability(9, 0).major:
            return f"FA3 needs compute capability 9.x, {device} has {capability}"
        if config.use_alibi:
            return "FA3 has no ALiBi; ask for FLASH_ATTN:FA2"
        if is_fp8 and config.dtype is not torch.bfloat16:
            return "FA3 writes bf16 when the KV cache is fp8; use dtype=bf16"
        if is_fp8 and config.head_size % 16:
            return f"FA3's fp8 kernels take head sizes that are multiples of 16: {config.head_size}"
        if is_fp8 and not reads_cache:
            return "an fp8 KV cache has no meaning where nothing is cached; use kv=auto"
        if config.has_sink and not lib.is_vllm:
            return "sinks are in vLLM's build of FA3 only; ask for FLASH_ATTN:FA3"
        if config.has_sink and config.num_heads > MAX_SINK_HEADS:
            return f"FA3 takes sinks of at most {MAX_SINK_HEADS} query heads: {config.num_heads}"
    else:
        if config.has_sink:
            return "FA2 has no sinks; FA3 (Hopper) has"
        if is_fp8:
            return "FA2 reads no fp8 KV cache; FA3 (Hopper) does"
    if reads_cache and config.block_size is not None and config.block_size % lib.page_multiple:
        return (
            f"{variant} takes blocks of multiples of {lib.page_multiple} only; use "
            f"block={lib.page_multiple}"
        )
    return None


def _is_same_dtype(config: AttentionConfig) -> bool:
    names = {torch.float16: "fp16", torch.bfloat16: "bf16"}
    return config.kv_cache_dtype in ("auto", names.get(config.dtype))


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
            f"FA3 and FA2: {_VLLM_INSTALL}; FA2_UPSTREAM: {LIBRARIES['FA2_UPSTREAM'].install}"
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
