"""`DeclaredBackend`: what a family accepts, without a kernel to run."""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar, NoReturn

from attnbench.backends.abstract import AttentionBackend, AttentionConfig
from attnbench.backends.builder import AttentionMetadataBuilder
from attnbench.backends.device import Device, DeviceCapability
from attnbench.backends.impl import AttentionImplBase
from attnbench.errors import BackendUnavailableError
from attnbench.workload.types import AttentionType

ALL_ATTN_TYPES = frozenset(AttentionType)
DECODER = frozenset({AttentionType.DECODER})


class DeclaredBackend(AttentionBackend):
    """Capabilities of one family in one version of vLLM, as data.

    vLLM's predicates may read the platform and the process they run in. Ours are asked about
    devices that are not here, so the class is bound to one (`at`) before they are asked. What that
    version does not validate (sliding window, soft cap, ALiBi) is accepted, as it accepts it.
    """

    name: ClassVar[str]
    where: ClassVar[str]  # file:line in the followed version
    version: ClassVar[str]
    device: ClassVar[Device | None] = None  # what the class is bound to, as is the next
    batch_invariant: ClassVar[bool] = False  # vLLM's process-wide VLLM_BATCH_INVARIANT

    head_sizes: ClassVar[tuple[int, ...]] = ()  # empty: any
    block_sizes: ClassVar[tuple[Any, ...]] = ()
    attn_types: ClassVar[frozenset[AttentionType]] = DECODER
    device_kinds: ClassVar[tuple[str, ...]] = ("cuda",)
    mla: ClassVar[bool] = False
    sparse: ClassVar[bool] = False
    sink: ClassVar[bool] = False
    mm_prefix: ClassVar[bool] = False
    non_causal: ClassVar[bool] = False
    batch_invariance: ClassVar[bool] = False
    layout: ClassVar[str | None] = None
    libraries: ClassVar[str] = ""  # assumed installed on a device that is only named

    @classmethod
    def at(cls, device: Device, batch_invariant: bool = False) -> type[DeclaredBackend]:
        """This class with its predicates answering for `device`."""
        return _bound(cls, device, batch_invariant)

    @classmethod
    def validate_configuration(cls, config: AttentionConfig, device: Device) -> list[str]:
        if (cls.device, cls.batch_invariant) != (device, config.use_batch_invariant):
            return cls.at(device, config.use_batch_invariant).validate_configuration(config, device)
        return super().validate_configuration(config, device)

    @classmethod
    def note(cls, config: AttentionConfig, device: Device) -> str:
        """What the answer assumes, or which sub-variant the name hides here; "": nothing."""
        return ""

    # --- predicates, from the data above ------------------------------------------------------
    @classmethod
    def get_name(cls) -> str:
        return cls.name

    @classmethod
    def get_supported_head_sizes(cls) -> tuple[int, ...]:
        return cls.head_sizes

    @classmethod
    def get_supported_kernel_block_sizes(cls) -> tuple[Any, ...]:
        return cls.block_sizes or super().get_supported_kernel_block_sizes()

    @classmethod
    def get_required_kv_cache_layout(cls) -> str | None:
        return cls.layout

    @classmethod
    def is_mla(cls) -> bool:
        return cls.mla

    @classmethod
    def is_sparse(cls) -> bool:
        return cls.sparse

    @classmethod
    def supports_sink(cls) -> bool:
        return cls.sink

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        return cls.mm_prefix

    @classmethod
    def supports_non_causal(cls) -> bool:
        return cls.non_causal

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return cls.batch_invariance

    @classmethod
    def supports_attn_type(cls, attn_type: AttentionType) -> bool:
        return attn_type in cls.attn_types

    @classmethod
    def supports_device(cls, device: Device) -> bool:
        return device.kind in cls.device_kinds

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_logits_soft_cap(cls) -> bool:
        return True

    @classmethod
    def supports_alibi(cls) -> bool:
        return True

    # --- there is nothing to run ---------------------------------------------------------------
    @classmethod
    def _refuse(cls) -> NoReturn:
        raise BackendUnavailableError(
            f"selection only: attnbench declares {cls.version}'s {cls.name} for the selector and "
            "has no code to run it; `attnbench backends` lists what it runs"
        )

    @classmethod
    def get_impl_cls(cls) -> type[AttentionImplBase[Any]]:
        cls._refuse()

    @classmethod
    def get_builder_cls(cls) -> type[AttentionMetadataBuilder[Any]]:
        cls._refuse()

    @classmethod
    def get_kv_cache_shape(
        cls,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        cls._refuse()

    # --- where the bound device is --------------------------------------------------------------
    @classmethod
    def _major(cls) -> int:
        """Major compute capability of the bound device; 0 when it has none."""
        return cls._capability().major

    @classmethod
    def _capability(cls) -> DeviceCapability:
        if cls.device is None or cls.device.capability is None:
            return DeviceCapability(0, 0)
        return cls.device.capability


@cache
def _bound(
    cls: type[DeclaredBackend], device: Device, batch_invariant: bool
) -> type[DeclaredBackend]:
    members = {"device": device, "batch_invariant": batch_invariant, "__module__": cls.__module__}
    return type(cls.__name__, (cls,), members)
