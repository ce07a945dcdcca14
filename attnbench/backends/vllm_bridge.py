"""VLLM: any attention backend of an installed vLLM, by its own builder and impl.

`VLLM:TRITON_ATTN` is the class behind that name in vLLM's registry, as vLLM deploys it: its
predicates decide what is refused, its layer makes the impl, its builder the metadata. vLLM is
imported when one is asked something only the class can answer, never before.
"""

from __future__ import annotations

import difflib
from functools import cache
from typing import Any, ClassVar, cast

import torch

from attnbench.backends.abstract import AttentionBackend, AttentionConfig, MultipleOf
from attnbench.backends.device import Device
from attnbench.backends.dtypes import torch_dtype
from attnbench.backends.family import BackendFamily
from attnbench.backends.vllm_bridge_builder import VllmMetadataBuilder
from attnbench.backends.vllm_bridge_engine import (
    VllmLibrary,
    cache_dtype,
    config_of_question,
    load_vllm,
    parameters_of,
)
from attnbench.backends.vllm_bridge_impl import VllmAttentionImpl, VllmMLAImpl
from attnbench.backends.vllm_bridge_install import INSTALL, find_vllm, missing_reason
from attnbench.errors import BackendUnavailableError, UnknownBackendError, WorkloadError
from attnbench.workload.types import AttentionType

_KINDS = ("cuda", "rocm", "cpu", "xpu")

#: Kernels that are the backend's own in every recorded version; others pick among libraries.
_KERNELS = {"TRITON_ATTN": ("kernel_unified_attention", "_fwd_kernel")}


#: Backends that keep keys in tiles of their own behind the shape they state (`ops/paged_attn.py`;
#: the extension's `cpu_attn_reshape_and_cache`): a context that attnbench writes is not theirs.
_TILED = ("CPU_ATTN", "ROCM_ATTN", "ROCM_SEGMENTED_ATTN")


class _Theirs:
    """A class attribute that is answered by vLLM's class, when it is asked for."""

    def __get__(self, instance: object, owner: type[VllmBackend]) -> bool:
        theirs = owner.theirs()
        # An MLA layer of vLLM always writes to the cache apart from its forward.
        return bool(theirs.forward_includes_kv_cache_update) and not theirs.is_mla()


class VllmBackend(AttentionBackend):
    """One backend of vLLM. A subclass with its name is made for each (`vllm_backend`)."""

    install_hint: ClassVar[str] = INSTALL
    vllm_name: ClassVar[str] = ""
    forward_includes_kv_cache_update = cast(bool, _Theirs())

    @classmethod
    def theirs(cls) -> type[Any]:
        """vLLM's class, imported now. Raises BackendUnavailableError."""
        return load_vllm().backend(cls.vllm_name)

    @classmethod
    def full_cls_name(cls) -> tuple[str, str]:
        """That of vLLM's class."""
        theirs = cls.theirs()
        return (theirs.__module__, theirs.__qualname__)

    @staticmethod
    def get_impl_cls() -> type[Any]:
        raise NotImplementedError  # made for each name

    @staticmethod
    def get_builder_cls() -> type[VllmMetadataBuilder]:
        raise NotImplementedError  # made for each name

    @classmethod
    def is_mla(cls) -> bool:
        return bool(cls.theirs().is_mla())

    @classmethod
    def is_sparse(cls) -> bool:
        return bool(cls.theirs().is_sparse())

    @classmethod
    def is_ssm(cls) -> bool:
        return bool(cls.theirs().is_ssm())

    @classmethod
    def supports_device(cls, device: Device) -> bool:
        return device.kind in _KINDS

    @classmethod
    def unavailable_reason(cls, device: Device) -> str | None:
        """Why the installed vLLM cannot run on `device` here."""
        if reason := missing_reason():
            return reason
        try:
            library = load_vllm()
            library.backend(cls.vllm_name)
        except BackendUnavailableError as error:
            return str(error)
        kind = library.platform_kind()
        if kind != device.kind:
            return (
                f"vLLM {library.version} was built for or found "
                f"{kind or 'no device'} here, not {device.kind}; install vLLM for {device.kind}"
            )
        return None

    @classmethod
    def kernel_patterns(cls, variant: str, device: Device) -> tuple[str, ...]:
        return _KERNELS.get(cls.vllm_name, ())

    @classmethod
    def get_required_kv_cache_layout(cls) -> str | None:
        layouts = load_vllm().api.layouts(cls.theirs())
        return layouts[0] if len(layouts) == 1 else None

    @classmethod
    def get_supported_kernel_block_sizes(cls) -> tuple[int | MultipleOf, ...]:
        library, question = load_vllm(), AttentionConfig(head_size=128, dtype=torch.bfloat16)
        with library.current_config(config_of_question(library, question)):
            return library.api.kernel_block_sizes(cls.theirs())

    @classmethod
    def validate_configuration(cls, config: AttentionConfig, device: Device) -> list[str]:
        """vLLM's own reasons, then what attnbench cannot give this backend.

        Without vLLM there is one reason: how to install it.
        """
        if not cls.supports_device(device):
            return [f"device {device.kind} not supported"]
        try:
            library, theirs = load_vllm(), cls.theirs()
        except BackendUnavailableError as error:
            return [str(error)]
        if theirs.is_ssm():
            return ["it is no attention over a KV cache"]
        with library.current_config(config_of_question(library, config)):
            reasons = [str(reason) for reason in _ask(library, theirs, config, device)]
            if cls.vllm_name in _TILED and _reads_cache(config):
                reasons.append(
                    "it keeps keys in tiles of its own, which attnbench does not write; "
                    "use VLLM:TRITON_ATTN or CPU_ATTN"
                )
            return reasons + _not_given(library, theirs, config, reasons)


def _ask(
    library: VllmLibrary, theirs: type[Any], config: AttentionConfig, device: Device
) -> list[str]:
    """vLLM's `validate_configuration`, with the arguments the installed version takes."""
    if device.capability is not None:
        capability = library.device_capability(*device.capability)
    else:
        capability = library.platform.get_device_capability() or library.device_capability(0, 0)
    known: dict[str, Any] = {
        "head_size": config.head_size,
        "dtype": config.dtype,
        "kv_cache_dtype": cache_dtype(config.kv_cache_dtype, config.dtype),
        "block_size": config.block_size,
        "use_mla": config.use_mla,
        "has_sink": config.has_sink,
        "use_sparse": config.use_sparse,
        "use_mm_prefix": config.use_mm_prefix,
        "use_per_head_quant_scales": config.use_per_head_quant_scales,
        "device_capability": capability,
        "attn_type": str(config.attn_type),
        "has_sliding_window": config.has_sliding_window,
        "use_non_causal": config.use_non_causal,
        "use_batch_invariant": config.use_batch_invariant,
    }
    taken = parameters_of(theirs.validate_configuration)
    found: list[str] = theirs.validate_configuration(
        **{name: value for name, value in known.items() if name in taken}
    )
    return found


def _reads_cache(config: AttentionConfig) -> bool:
    return config.attn_type in (AttentionType.DECODER, AttentionType.ENCODER_DECODER)


def _not_given(
    library: VllmLibrary, theirs: type[Any], config: AttentionConfig, before: list[str]
) -> list[str]:
    """What vLLM's predicates leave open and this bridge does not do."""
    reasons = []
    if config.use_sparse:
        reasons.append("its indexer, which chooses what sparse queries attend to, is not run here")
    if not config.use_mla and config.v_head_size not in (None, config.head_size):
        reasons.append("v_head_size other than head_size not supported")
    api = library.api
    layouts = api.layouts(theirs)
    if not layouts:
        reasons.append("its KV-cache layouts are neither NHD nor HND")
    elif config.kv_cache_layout not in (None, *layouts):
        reasons.append(f"kv_cache_layout {config.kv_cache_layout} not supported")
    if config.block_size is None or not _reads_cache(config) or before:
        return reasons
    sizes = api.kernel_block_sizes(theirs)
    if not any(
        config.block_size % size.base == 0
        if isinstance(size, MultipleOf)
        else config.block_size == size
        for size in sizes
    ):
        exact = ", ".join(str(size) for size in sizes if not isinstance(size, MultipleOf))
        reasons.append(
            f"vLLM splits blocks of {config.block_size} into the kernel's own before it calls it; "
            f"use block={exact.partition(',')[0]} (of {exact})"
        )
    try:
        name = "bf16" if config.kv_cache_dtype == "auto" else config.kv_cache_dtype
        torch_dtype(name)
        api.shape(
            theirs,
            7,
            config.block_size,
            config.num_kv_heads,
            config.head_size,
            name,
        )
    except (WorkloadError, ValueError) as error:
        reasons.append(str(error))
    return reasons


@cache
def vllm_backend(name: str) -> type[VllmBackend]:
    """The backend `VLLM:name`. vLLM is not imported, nor is the name looked up."""

    def get_name() -> str:
        return f"VLLM:{name}"

    def get_impl_cls() -> type[Any]:
        base = VllmMLAImpl if made.theirs().is_mla() else VllmAttentionImpl
        return _made_impl(base, made)

    def get_builder_cls() -> type[VllmMetadataBuilder]:
        return _made_builder(made)

    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        return load_vllm().api.shape(
            made.theirs(), num_blocks, block_size, num_kv_heads, head_size, cache_dtype_str
        )

    def get_kv_cache_stride_order(
        include_num_layers_dimension: bool = False, kv_cache_layout: str = "NHD"
    ) -> tuple[int, ...]:
        order = load_vllm().api.stride_order(made.theirs(), kv_cache_layout)
        if not include_num_layers_dimension:
            return order
        return (0, *(dim + 1 for dim in order))

    functions = (
        get_name,
        get_impl_cls,
        get_builder_cls,
        get_kv_cache_shape,
        get_kv_cache_stride_order,
    )
    members: dict[str, Any] = {f.__name__: staticmethod(f) for f in functions}
    members |= {"vllm_name": name, "__module__": __name__}
    made: type[VllmBackend] = type(f"VllmBackend_{name}", (VllmBackend,), members)
    return made


@cache
def _made_impl(base: type[Any], backend: type[VllmBackend]) -> type[Any]:
    return type(f"{base.__name__}_{backend.vllm_name}", (base,), {"vllm_name": backend.vllm_name})


@cache
def _made_builder(backend: type[VllmBackend]) -> type[VllmMetadataBuilder]:
    theirs = backend.theirs().get_builder_cls()
    members = {
        "vllm_name": backend.vllm_name,
        # What the class says; an instance may raise it for speculative decoding only.
        "reorder_batch_threshold": theirs.reorder_batch_threshold,
    }
    return type(f"VllmMetadataBuilder_{backend.vllm_name}", (VllmMetadataBuilder,), members)


class VllmFamily(BackendFamily):
    """`VLLM`: the backends of the installed vLLM, by the names of its registry."""

    install_hint: ClassVar[str] = INSTALL

    @staticmethod
    def get_name() -> str:
        return "VLLM"

    @classmethod
    def get_members(cls) -> tuple[str, ...]:
        found = find_vllm()
        return found.backend_names if found is not None else ()

    @classmethod
    def get_member(cls, name: str) -> type[AttentionBackend]:
        known = cls.get_members()
        if known and name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.5)
            hint = f"did you mean VLLM:{near[0]}? " if near else ""
            raise UnknownBackendError(
                f"unknown backend 'VLLM:{name}'; {hint}this vLLM has: {', '.join(known)}"
            )
        return vllm_backend(name)

    @staticmethod
    def get_impl_cls() -> type[VllmAttentionImpl]:
        """Raises BackendUnavailableError when no vLLM is installed; imports none."""
        _require_installed()
        return VllmAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[VllmMetadataBuilder]:
        """Raises BackendUnavailableError when no vLLM is installed; imports none."""
        _require_installed()
        return VllmMetadataBuilder

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        raise WorkloadError(VllmFamily.mend())

    @classmethod
    def supports_device(cls, device: Device) -> bool:
        return device.kind in _KINDS


def _require_installed() -> None:
    if reason := missing_reason():
        raise BackendUnavailableError(reason)
