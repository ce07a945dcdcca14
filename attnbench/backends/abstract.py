"""`AttentionBackend`: names a kernel family and says what it accepts.

The words are vLLM 0.22.1's (`vllm/v1/attention/backend.py`), kept so that a vLLM reader is at home.
Where vLLM passes fourteen arguments to `validate_configuration`, we pass one `AttentionConfig`
value: a new feature is one field and one predicate.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch

from attnbench.backends.device import Device, DeviceCapability
from attnbench.workload.types import AttentionType, WorkloadFields

if TYPE_CHECKING:
    from attnbench.backends.builder import AttentionMetadataBuilder
    from attnbench.backends.impl import AttentionImplBase


@dataclass(frozen=True, slots=True)
class MultipleOf:
    """A block size constraint: any multiple of `base`."""

    base: int


class AttentionConfig(NamedTuple):
    """What a selector asks a backend to accept. Hashable.

    The first twelve fields are vLLM 0.22.1's `AttentionSelectorConfig`; the rest are features that
    release leaves to the kernel to fail on.
    """

    head_size: int
    dtype: torch.dtype
    kv_cache_dtype: str = "auto"
    block_size: int | None = None  # None: the size the backend prefers
    use_mla: bool = False
    has_sink: bool = False
    use_sparse: bool = False
    use_mm_prefix: bool = False
    use_per_head_quant_scales: bool = False
    attn_type: AttentionType = AttentionType.DECODER
    use_non_causal: bool = False
    use_batch_invariant: bool = False
    num_heads: int = 1
    num_kv_heads: int = 1
    v_head_size: int | None = None  # None: same as head_size
    has_sliding_window: bool = False
    has_logits_soft_cap: bool = False
    use_alibi: bool = False
    kv_cache_layout: str | None = None  # None: the layout the backend wants
    kv_lora_rank: int = 0  # this and the next two: MLA only
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0


def is_quantized_kv_cache(kv_cache_dtype: str) -> bool:
    """Whether stored keys and values need scales to be read back."""
    return kv_cache_dtype.startswith(("fp8", "int8", "nvfp4", "turboquant"))


class AttentionBackend(ABC):
    """One kernel family. Never instantiated: everything is on the class."""

    accept_output_buffer: ClassVar[bool] = True
    supported_dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float16, torch.bfloat16)
    supported_kv_cache_dtypes: ClassVar[tuple[str, ...]] = ("auto", "fp16", "bf16")
    supported_layouts: ClassVar[tuple[str, ...]] = ("NHD", "HND")
    #: False: `AttentionImpl.do_kv_cache_update` must be called before `forward`.
    forward_includes_kv_cache_update: ClassVar[bool] = False
    #: pip command that brings the library, shown when it is missing. "": nothing to install.
    install_hint: ClassVar[str] = ""
    #: On the CPU it runs under Triton's interpreter only: in a process of its own that has
    #: `TRITON_INTERPRET=1` from the start; its results are checked, its time means nothing.
    interpreted_on_cpu: ClassVar[bool] = False

    # --- names -------------------------------------------------------------------------------
    @staticmethod
    @abstractmethod
    def get_name() -> str:
        """The registered name, e.g. `TORCH_SDPA`."""

    @classmethod
    def full_cls_name(cls) -> tuple[str, str]:
        """(module, qualified name)."""
        return (cls.__module__, cls.__qualname__)

    @staticmethod
    @abstractmethod
    def get_impl_cls() -> type[AttentionImplBase[Any]]: ...

    @staticmethod
    @abstractmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder[Any]]: ...

    @classmethod
    def get_variants(cls, device: Device) -> tuple[str, ...]:
        """Names of the kernels behind this one name, the default first. `("",)`: only one."""
        return ("",)

    @classmethod
    def default_variant(cls, config: AttentionConfig, device: Device) -> str:
        """The variant that runs `config` when none is asked for."""
        return cls.get_variants(device)[0]

    @classmethod
    def variant_refusal(cls, variant: str, config: AttentionConfig, device: Device) -> str | None:
        """Why `variant` refuses what the backend accepts, here or elsewhere; None: it does not."""
        return None

    @classmethod
    def unavailable_reason(cls, device: Device) -> str | None:
        """Why this process cannot run it on `device` although it is supported; None: it can."""
        return None

    @classmethod
    def variant_unavailable(cls, variant: str, device: Device) -> str | None:
        """As `unavailable_reason`, of one variant."""
        return None

    @classmethod
    def interpreter_refusal(cls, workload: WorkloadFields) -> str | None:
        """Why `workload` is too large for Triton's interpreter, which takes milliseconds a tile;
        None: it is not. Only asked where `interpreted_on_cpu`."""
        return None

    @classmethod
    def compilation_key(cls, workload: WorkloadFields, variant: str, device: Device) -> str:
        """What a kernel that is compiled at its first call is compiled for; "": none is.

        Workloads with equal keys share a kernel, which a compiler keeps on disk for later
        processes. A key that tells too many apart costs time, nothing else.
        """
        return ""

    @classmethod
    def kernel_patterns(cls, variant: str, device: Device) -> tuple[str, ...]:
        """What a call of `variant` promises to launch: regular expressions for kernels' demangled
        names, one of which must be found (`re.search`) in at least one of them; empty: nothing is
        promised. A call that launched other kernels only is not this variant, however fast.
        """
        return ()

    @classmethod
    def promised_kernels(
        cls, workload: WorkloadFields, variant: str, device: Device
    ) -> tuple[tuple[str, ...], ...]:
        """`kernel_patterns` of a call of `workload`: of every group here one must be found.

        One group, unless a backend's decode and prefill launch kernels of their own: then a batch
        of both promises both.
        """
        patterns = cls.kernel_patterns(variant, device)
        return (patterns,) if patterns else ()

    # --- KV cache ----------------------------------------------------------------------------
    @staticmethod
    @abstractmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        """Logical shape. Usual: `(2, num_blocks, block_size, num_kv_heads, head_size)`;
        MLA: `(num_blocks, block_size, head_size)`."""

    @classmethod
    def get_kv_cache_block_dim(
        cls, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> int:
        """Which dimension of the logical shape counts blocks."""
        unlikely = 1_234_567
        return cls.get_kv_cache_shape(
            unlikely, block_size, num_kv_heads, head_size, cache_dtype_str
        ).index(unlikely)

    @staticmethod
    def get_kv_cache_stride_order(
        include_num_layers_dimension: bool = False, kv_cache_layout: str = "NHD"
    ) -> tuple[int, ...]:
        """Permutation of the logical dimensions that gives the physical (allocated) order.

        vLLM reads the layout from a global; here it is an argument. With
        `include_num_layers_dimension` the layer index is logical dimension 0.
        """
        raise NotImplementedError

    @classmethod
    def get_required_kv_cache_layout(cls) -> str | None:
        """`NHD`, `HND`, or None when either will do."""
        return None

    # --- predicates: one capability each -----------------------------------------------------
    @classmethod
    def get_supported_head_sizes(cls) -> tuple[int, ...]:
        """Accepted head sizes; empty: any."""
        return ()

    @classmethod
    def get_supported_kernel_block_sizes(cls) -> tuple[int | MultipleOf, ...]:
        """Block sizes the kernel itself takes. A framework block may be a multiple of one."""
        return (MultipleOf(1),)

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int = 16) -> int:
        """`default_block_size` if supported, else the smallest the kernel takes."""
        if cls.supports_block_size(default_block_size):
            return default_block_size
        sizes = cls.get_supported_kernel_block_sizes()
        return min(s.base if isinstance(s, MultipleOf) else s for s in sizes)

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        sizes = cls.get_supported_head_sizes()
        return not sizes or head_size in sizes

    @classmethod
    def supports_dtype(cls, dtype: torch.dtype) -> bool:
        return dtype in cls.supported_dtypes

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: str) -> bool:
        return kv_cache_dtype in cls.supported_kv_cache_dtypes

    @classmethod
    def supports_block_size(cls, block_size: int | None) -> bool:
        if block_size is None:
            return True
        return any(
            block_size % (s.base if isinstance(s, MultipleOf) else s) == 0
            for s in cls.get_supported_kernel_block_sizes()
        )

    @classmethod
    def is_mla(cls) -> bool:
        return False

    @classmethod
    def is_sparse(cls) -> bool:
        return False

    @classmethod
    def is_ssm(cls) -> bool:
        return False

    @classmethod
    def supports_sink(cls) -> bool:
        return False

    @classmethod
    def supports_alibi_sqrt(cls) -> bool:
        return False

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        return False

    @classmethod
    def supports_per_head_quant_scales(cls) -> bool:
        return False

    @classmethod
    def supports_non_causal(cls) -> bool:
        return False

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return False

    @classmethod
    def supports_attn_type(cls, attn_type: AttentionType) -> bool:
        return attn_type is AttentionType.DECODER

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability) -> bool:
        return True

    @classmethod
    def supports_device(cls, device: Device) -> bool:
        """Whether the family exists for this platform at all."""
        return device.kind == "cuda"

    @classmethod
    def supports_v_head_size(cls, head_size: int, v_head_size: int) -> bool:
        return head_size == v_head_size

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return False

    @classmethod
    def supports_logits_soft_cap(cls) -> bool:
        return False

    @classmethod
    def supports_alibi(cls) -> bool:
        return False

    @classmethod
    def supports_kv_cache_layout(cls, kv_cache_layout: str | None) -> bool:
        if kv_cache_layout is None:
            return True
        required = cls.get_required_kv_cache_layout()
        return kv_cache_layout in cls.supported_layouts and required in (None, kv_cache_layout)

    @classmethod
    def supports_combination(cls, config: AttentionConfig, device: Device) -> str | None:
        """A reason why this combination of otherwise accepted values is refused, or None."""
        return None

    # --- the decision ------------------------------------------------------------------------
    @classmethod
    def validate_configuration(cls, config: AttentionConfig, device: Device) -> list[str]:
        """Every reason why `config` is refused on `device`; empty means accepted.

        Order and texts follow vLLM 0.22.1 (`vllm/v1/attention/backend.py:271-335`); the checks
        that release does not make come after, before `supports_combination`.
        """
        reasons: list[str] = []

        def require(accepted: bool, reason: str) -> None:
            if not accepted:
                reasons.append(reason)

        require(cls.supports_head_size(config.head_size), "head_size not supported")
        require(cls.supports_dtype(config.dtype), "dtype not supported")
        require(cls.supports_kv_cache_dtype(config.kv_cache_dtype), "kv_cache_dtype not supported")
        require(cls.supports_block_size(config.block_size), "block_size not supported")
        require(
            not config.use_mm_prefix or cls.supports_mm_prefix(),
            "partial multimodal token full attention not supported",
        )
        if config.use_mla != cls.is_mla():
            reasons.append("MLA not supported" if config.use_mla else "non-MLA not supported")
        require(not config.has_sink or cls.supports_sink(), "attention sinks not supported")
        if config.use_sparse != cls.is_sparse():
            reasons.append(
                "sparse not supported" if config.use_sparse else "non-sparse not supported"
            )
        require(
            not config.use_per_head_quant_scales or cls.supports_per_head_quant_scales(),
            "per-head quant scales not supported",
        )
        if device.capability is not None:
            require(
                cls.supports_compute_capability(device.capability),
                "compute capability not supported",
            )
        require(
            cls.supports_attn_type(config.attn_type),
            f"attention type {config.attn_type} not supported",
        )
        require(
            not config.use_non_causal or cls.supports_non_causal(),
            "non-causal attention not supported",
        )
        require(
            not config.use_batch_invariant or cls.supports_batch_invariance(),
            "batch invariance not supported",
        )
        # Not validated by vLLM 0.22.1.
        require(cls.supports_device(device), f"device {device.kind} not supported")
        if not config.use_mla:
            v_head_size = config.v_head_size or config.head_size
            require(
                cls.supports_v_head_size(config.head_size, v_head_size),
                "v_head_size other than head_size not supported",
            )
        require(
            not config.has_sliding_window or cls.supports_sliding_window(),
            "sliding window not supported",
        )
        require(
            not config.has_logits_soft_cap or cls.supports_logits_soft_cap(),
            "logits soft cap not supported",
        )
        require(not config.use_alibi or cls.supports_alibi(), "ALiBi not supported")
        require(
            cls.supports_kv_cache_layout(config.kv_cache_layout),
            f"kv_cache_layout {config.kv_cache_layout} not supported",
        )
        if combination := cls.supports_combination(config, device):
            reasons.append(combination)
        return reasons
