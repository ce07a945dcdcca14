"""What the latent-attention backends through libraries share: selection, cache writes, prefill."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch

from attnbench.backends.abstract import AttentionConfig, is_quantized_kv_cache
from attnbench.backends.batch import batch_order
from attnbench.backends.cache_shapes import LatentCacheBackend
from attnbench.backends.declared.base import DeclaredBackend
from attnbench.backends.device import Device, device_of
from attnbench.backends.dtypes import is_fp8
from attnbench.backends.flash_attn_library import LIBRARIES
from attnbench.backends.impl import MLAAttentionImpl, MLALayer
from attnbench.backends.mla_builder import LibraryMLABuilder, LibraryMLAMetadata, count_decodes
from attnbench.backends.mla_libraries import (
    MLA_LIBRARIES,
    MLALibrary,
    capability_refusal,
    kernel_patterns,
    load_functions,
    missing_reason,
    require_any,
    split_variant,
    variants_of,
)
from attnbench.backends.mla_prefill import (
    Latents,
    load_prefill,
)
from attnbench.backends.mla_prefill_library import default_prefill, prefill_refusal
from attnbench.backends.paged_ops import quantize
from attnbench.workload.types import AttentionShape, AttentionType, WorkloadFields

D = TypeVar("D")


class LibraryMLABackend(LatentCacheBackend, DeclaredBackend):
    """A family declared for the selector that attnbench runs: vLLM's predicates and, per variant,
    what its library refuses beyond them. Derive from this first and the declared class second."""

    impl_cls: ClassVar[type[LibraryMLAImpl[Any]]]
    builder_cls: ClassVar[type[LibraryMLABuilder[Any]]]
    #: Latent widths (kv_lora_rank, qk_rope_head_dim) of the kernels.
    latent_widths: ClassVar[tuple[tuple[int, int], ...]] = ((512, 64),)

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        cls.install_hint = MLA_LIBRARIES[cls.name][cls.first_variant()].install

    @classmethod
    def get_impl_cls(cls) -> type[LibraryMLAImpl[Any]]:
        """Raises BackendUnavailableError when no library of this family is installed."""
        require_any(cls.name)
        return cls.impl_cls

    @classmethod
    def get_builder_cls(cls) -> type[LibraryMLABuilder[Any]]:
        """Raises BackendUnavailableError when no library of this family is installed."""
        require_any(cls.name)
        return cls.builder_cls

    @classmethod
    def get_variants(cls, device: Device) -> tuple[str, ...]:
        return variants_of(cls.name, device) or (cls.first_variant(),)

    @classmethod
    def first_variant(cls) -> str:
        """vLLM's choice."""
        return next(iter(MLA_LIBRARIES[cls.name]))

    @classmethod
    def default_variant(cls, config: AttentionConfig, device: Device) -> str:
        """What vLLM 0.22.1 runs; it is refused, and says what to ask for, where that has none."""
        return cls.first_variant()

    @classmethod
    def kernel_patterns(cls, variant: str, device: Device) -> tuple[str, ...]:
        return kernel_patterns(cls.name, variant, device)

    @classmethod
    def promised_kernels(
        cls, workload: WorkloadFields, variant: str, device: Device
    ) -> tuple[tuple[str, ...], ...]:
        """The decode library's where requests run in the absorbed form, the prefill library's where
        others do not."""
        decode, _, prefill = variant.partition("+")
        lib = MLA_LIBRARIES[cls.name].get(decode)
        if lib is None or lib.runs_prefills:
            return super().promised_kernels(workload, variant, device)
        requests = workload.batch_spec.requests
        order = batch_order(requests, cls.builder_cls.reorder_batch_threshold)
        query_lens = [requests[i].query_len for i in order]
        num_decodes = count_decodes(query_lens, *cls.builder_cls.decodes_of(decode))
        shape = workload.shape
        prefill = prefill or default_prefill(device, shape.qk_head_dim, shape.v_head_size)
        groups = [(lib.kernel_pattern,)] if num_decodes else []
        if num_decodes < len(query_lens):
            groups.append((LIBRARIES[prefill].kernel_pattern,))
        return tuple(groups)

    @classmethod
    def variant_refusal(cls, variant: str, config: AttentionConfig, device: Device) -> str | None:
        decode, _, prefill = variant.partition("+")
        if decode not in MLA_LIBRARIES[cls.name]:
            return None
        lib = MLA_LIBRARIES[cls.name][decode]
        if reason := capability_refusal(cls.name, lib, device):
            return reason
        widths = (config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_size or 0)
        if prefill and (reason := prefill_refusal(prefill, device, *widths)):
            return reason
        if reason := cls._feature_refusal(lib, config):
            return reason
        return cls.library_refusal(lib, config)

    @classmethod
    def _feature_refusal(cls, lib: MLALibrary, config: AttentionConfig) -> str | None:
        features = {
            "sliding window": config.has_sliding_window,
            "logits soft cap": config.has_logits_soft_cap,
            "ALiBi": config.use_alibi,
        }
        if refused := [name for name, is_set in features.items() if is_set]:
            return f"{cls.name} has no {' and no '.join(refused)}; leave it out"
        if config.attn_type is not AttentionType.DECODER:
            return "latent attention is decoder attention; leave attn= out"
        widths = (config.kv_lora_rank, config.qk_rope_head_dim)
        if config.kv_lora_rank and widths not in cls.latent_widths:
            known = " or ".join(f"{rank}+{rope}" for rank, rope in cls.latent_widths)
            return f"{lib.variant} takes latents of {known} numbers, not {widths[0]}+{widths[1]}"
        is_fp8 = config.kv_cache_dtype.startswith("fp8")
        names = {torch.float16: "fp16", torch.bfloat16: "bf16"}
        if not is_fp8 and config.kv_cache_dtype not in ("auto", names.get(config.dtype)):
            return f"a {config.kv_cache_dtype} KV cache needs queries of the same type"
        return None

    @classmethod
    def library_refusal(cls, lib: MLALibrary, config: AttentionConfig) -> str | None:
        """Why the kernels of `lib` refuse `config`; None: they take it."""
        return None

    @classmethod
    def supports_kv_cache_layout(cls, kv_cache_layout: str | None) -> bool:
        """Any: a latent has one head, so that what vLLM requires here names the same memory."""
        return kv_cache_layout is None or kv_cache_layout in cls.supported_layouts

    @classmethod
    def supports_combination(cls, config: AttentionConfig, device: Device) -> str | None:
        """vLLM's reason, else that of the default variant when no variant takes the combination."""
        if reason := super().supports_combination(config, device):
            return reason
        variants = variants_of(cls.name, device)
        # Without any, the compute capability is refused already.
        if variants and all(cls.variant_refusal(variant, config, device) for variant in variants):
            return cls.variant_refusal(variants[0], config, device)
        return None

    @classmethod
    def variant_unavailable(cls, variant: str, device: Device) -> str | None:
        return missing_reason(cls.name, variant)

    @classmethod
    def unavailable_reason(cls, device: Device) -> str | None:
        """The first variant's reason when no variant of `device` can be loaded."""
        reasons = []
        for variant in cls.get_variants(device):
            reason = cls.variant_unavailable(variant, device)
            if reason is None:
                return None
            reasons.append(reason)
        return reasons[0]


class LibraryMLAImpl(MLAAttentionImpl[LibraryMLAMetadata[D]]):
    """Cache writes and the expanded form; the absorbed one is one call of the family's library.

    `do_kv_cache_update` must have run before either forward.
    """

    backend: ClassVar[str]
    can_return_lse_for_decode: ClassVar[bool] = True

    def __init__(
        self,
        shape: AttentionShape,
        kv_cache_dtype: str = "auto",
        attn_type: AttentionType = AttentionType.DECODER,
        alibi_slopes: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        variant: str = "",
    ) -> None:
        """Raises UsageError without a variant, BackendUnavailableError without its library."""
        super().__init__(shape, kv_cache_dtype, attn_type, alibi_slopes, sinks, variant)
        self.library, self._prefill_variant = split_variant(self.backend, variant)
        self.functions: dict[str, Callable[..., Any]] = load_functions(self.backend, self.library)
        self.is_quantized = is_quantized_kv_cache(kv_cache_dtype)

    def do_kv_cache_update(
        self,
        layer: MLALayer,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """By attnbench's own kernel: these libraries have none that follows a slot mapping."""
        # Here, so that the class, which the selector asks, needs no triton.
        from attnbench.backends.triton_mla_launch import write_latent_launch

        k_scale = layer._k_scale if self.is_quantized else None
        write_latent_launch(kv_c_normed, k_pe, kv_cache, slot_mapping, k_scale).run()

    def forward_mha(
        self,
        layer: MLALayer,
        q: torch.Tensor,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: LibraryMLAMetadata[D],
        output: torch.Tensor,
    ) -> None:
        """Raises BackendUnavailableError without the prefill library."""
        device = device_of(q.device)
        prefill = self._prefill_variant or default_prefill(device, q.shape[-1], self.v_head_dim)
        kernels = load_prefill(prefill)
        latents = Latents(layer, self.shape, kv_c_normed, k_pe, kv_cache)
        for chunk in attn_metadata.prefill:
            kernels.run_chunk(q, latents, output, chunk, self.scale)

    def quantized_query(self, layer: MLALayer, q: torch.Tensor) -> torch.Tensor:
        """`q` as a kernel of an fp8 cache takes it: in e4m3, as it is where it comes so."""
        return q if is_fp8(q.dtype) else quantize(q, torch.float8_e4m3fn, layer._q_scale_float)

    def decode_of(self, attn_metadata: LibraryMLAMetadata[D]) -> D:
        """The decode part, which a call of `forward_mqa` presupposes."""
        assert attn_metadata.decode is not None, "forward_mqa of a batch without decodes"
        return attn_metadata.decode
