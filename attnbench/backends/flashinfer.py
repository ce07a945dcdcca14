"""FLASHINFER: FlashInfer's paged wrappers, XQA, TRTLLM-GEN and cascade, by the real library.

What it accepts is vLLM 0.22.1's FLASHINFER as declared for the selector, less what the library's
kernels refuse. `plan` is the builder's work and `run` the call's, as in an engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from attnbench.backends.abstract import AttentionConfig
from attnbench.backends.builder import AttentionCGSupport, AttentionMetadataBuilder, KVCacheSpec
from attnbench.backends.declared.vllm_0_22_1 import FlashInfer
from attnbench.backends.device import Device
from attnbench.backends.flashinfer_calls import LayerInputs, Planned
from attnbench.backends.flashinfer_library import (
    CASCADE,
    INSTALL,
    MAX_SPECULATIVE_QUERY_LEN,
    TRTLLM_GEN,
    XQA,
    compilation_key,
    default_variant,
    find_variant,
    kernel_patterns,
    load_names,
    missing_reason,
    promised_kernels,
    refusal,
    require,
    variants_of,
)
from attnbench.backends.flashinfer_trtllm import TrtllmPlanner
from attnbench.backends.flashinfer_wrappers import Span, WrapperPlanner, page_table
from attnbench.backends.impl import AttentionLayer
from attnbench.backends.metadata import CommonAttentionMetadata
from attnbench.backends.paged_impl import PagedAttentionImpl
from attnbench.errors import UsageError
from attnbench.workload.types import AttentionShape, AttentionType, WorkloadFields

_FUNCTIONS = (XQA, TRTLLM_GEN)


class FlashInferBackend(FlashInfer):
    """Variants name the kernels of prefill and decode; see `flashinfer_library`. Asked for none,
    a workload gets what vLLM takes for its configuration."""

    install_hint: ClassVar[str] = INSTALL

    @classmethod
    def get_impl_cls(cls) -> type[FlashInferImpl]:
        """Raises BackendUnavailableError when FlashInfer is not installed."""
        require()
        return FlashInferImpl

    @classmethod
    def get_builder_cls(cls) -> type[FlashInferMetadataBuilder]:
        """Raises BackendUnavailableError when FlashInfer is not installed."""
        require()
        return FlashInferMetadataBuilder

    @classmethod
    def get_variants(cls, device: Device) -> tuple[str, ...]:
        return variants_of(device)

    @classmethod
    def default_variant(cls, config: AttentionConfig, device: Device) -> str:
        return default_variant(config, device)

    @classmethod
    def variant_refusal(cls, variant: str, config: AttentionConfig, device: Device) -> str | None:
        return refusal(variant, config, device)

    @classmethod
    def variant_unavailable(cls, variant: str, device: Device) -> str | None:
        return missing_reason(variant)

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

    @classmethod
    def compilation_key(cls, workload: WorkloadFields, variant: str, device: Device) -> str:
        return compilation_key(workload, variant, device)

    @classmethod
    def kernel_patterns(cls, variant: str, device: Device) -> tuple[str, ...]:
        return kernel_patterns(variant)

    @classmethod
    def promised_kernels(
        cls, workload: WorkloadFields, variant: str, device: Device
    ) -> tuple[tuple[str, ...], ...]:
        query_lens = [request.query_len for request in workload.batch_spec.requests]
        return promised_kernels(variant, query_lens, device)

    @classmethod
    def supports_combination(cls, config: AttentionConfig, device: Device) -> str | None:
        """vLLM's reason, else that of the default variant when no variant takes the combination."""
        if reason := super().supports_combination(config, device):
            return reason
        # Sinks that vLLM refuses are refused once.
        config = config._replace(has_sink=config.has_sink and cls.supports_sink())
        if all(refusal(variant, config, device) for variant in cls.get_variants(device)):
            return refusal(default_variant(config, device), config, device)
        return None

    @classmethod
    def get_kv_cache_shape(
        cls,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        """K and V of a block beside each other."""
        return (num_blocks, 2, block_size, num_kv_heads, head_size)

    @staticmethod
    def get_kv_cache_stride_order(
        include_num_layers_dimension: bool = False, kv_cache_layout: str = "NHD"
    ) -> tuple[int, ...]:
        if kv_cache_layout == "NHD":
            return (1, 0, 2, 3, 4, 5) if include_num_layers_dimension else (0, 1, 2, 3, 4)
        return (1, 2, 4, 0, 3, 5) if include_num_layers_dimension else (0, 1, 3, 2, 4)


@dataclass(slots=True, kw_only=True)
class FlashInferMetadata:
    """One step: decodes first, then prefills; the cascade takes the whole batch as prefill."""

    num_actual_tokens: int
    num_decode_tokens: int
    decode: Planned | None
    prefill: Planned | None
    kv_cache_layout: str
    """The order of the library's view of the cache."""


class FlashInferMetadataBuilder(AttentionMetadataBuilder[FlashInferMetadata]):
    """Splits the batch and plans each phase."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = (
        AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    )
    reorder_batch_threshold: int | None = 1

    def __init__(
        self,
        spec: KVCacheSpec,
        layer_names: Sequence[str],
        device: torch.device,
        variant: str = "",
    ) -> None:
        """Raises UsageError without a variant, BackendUnavailableError without the library."""
        super().__init__(spec, layer_names, device, variant)
        self.kernels = find_variant(variant)
        names = load_names(self.kernels)
        self.wrappers = WrapperPlanner(spec, names, device)
        self.functions = TrtllmPlanner(spec, names, device)

    @property
    def cudagraph_support(self) -> AttentionCGSupport:
        match self.kernels.decode:
            case "trtllm-gen":
                return AttentionCGSupport.UNIFORM_BATCH
            case "cascade":
                return AttentionCGSupport.NEVER
            case _:
                return self.get_cudagraph_support(self.spec)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> FlashInferMetadata:
        """Plans every phase; with a `common_prefix_len` (CASCADE only) its pages are read once.

        Raises: UsageError when CASCADE gets a batch without a shared prefix.
        """
        common = common_attn_metadata
        if self.kernels.prefill != CASCADE:
            return self._build(common, for_graph=False)
        block_size = self.spec.block_size
        if not common_prefix_len or common_prefix_len % block_size:
            raise UsageError(
                "FLASHINFER:CASCADE needs a batch whose requests share whole blocks; write "
                f"prefix={32 * block_size}, or ask for FLASHINFER:FA2"
            )
        pages = page_table(common, block_size, common_prefix_len // block_size)
        return FlashInferMetadata(
            num_actual_tokens=common.num_actual_tokens,
            num_decode_tokens=0,
            decode=None,
            prefill=self.wrappers.cascade(common, common_prefix_len, pages),
            kv_cache_layout=self.spec.kv_cache_layout,
        )

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> FlashInferMetadata:
        """Wrappers in graph mode: their grids do not follow the lengths, their tables stay.

        Another call with as many requests, and a block table as wide, plans the same wrappers anew,
        in place, so a captured graph then runs the new batch.

        Raises: UsageError for CASCADE.
        """
        if self.kernels.prefill == CASCADE:
            raise UsageError(
                "FLASHINFER:CASCADE is not planned for graphs, as its split changes with every "
                "batch; ask for FLASHINFER:FA2"
            )
        return self._build(common_attn_metadata, for_graph=True)

    def use_cascade_attention(
        self,
        common_prefix_len: int,
        query_lens: Sequence[int],
        num_query_heads: int,
        num_kv_heads: int,
        use_alibi: bool,
        use_sliding_window: bool,
        use_local_attention: bool,
        num_sms: int,
        dcp_world_size: int,
    ) -> bool:
        """Whenever CASCADE is asked for and there is a prefix; vLLM 0.22.1 never (its switch is
        off, flashinfer.py:1295), so no other variant does."""
        return self.kernels.prefill == CASCADE and common_prefix_len > 0

    def _build(self, common: CommonAttentionMetadata, for_graph: bool) -> FlashInferMetadata:
        num_decodes, query_len = self._decodes(common)
        num_decode_tokens = num_decodes * query_len
        decodes = Span(0, num_decodes)
        prefills = Span(num_decodes, common.num_reqs, num_decode_tokens)
        has_prefills = prefills.first < prefills.last
        needs_pages = (num_decodes and self.kernels.decode not in _FUNCTIONS) or (
            has_prefills and self.kernels.prefill not in _FUNCTIONS
        )
        pages = page_table(common, self.spec.block_size) if needs_pages else None
        width = common.block_table_tensor.shape[1]
        decode: Planned | None = None
        prefill: Planned | None = None
        if num_decodes:
            if self.kernels.decode in _FUNCTIONS:
                decode = self.functions.decode(self.kernels.decode, common, decodes, query_len)
            else:
                assert pages is not None
                decode = self.wrappers.decode(
                    self.kernels.decode, pages.of(decodes), num_decodes * width, for_graph
                )
        if has_prefills:
            if self.kernels.prefill in _FUNCTIONS:
                prefill = self.functions.prefill(common, prefills)
            else:
                assert pages is not None
                starts = common.query_start_loc_cpu[prefills.first :] - num_decode_tokens
                prefill = self.wrappers.prefill(
                    self.kernels.prefill,
                    starts,
                    pages.of(prefills),
                    (prefills.last - prefills.first) * width,
                    for_graph,
                )
        return FlashInferMetadata(
            num_actual_tokens=common.num_actual_tokens,
            num_decode_tokens=num_decode_tokens,
            decode=decode,
            prefill=prefill,
            kv_cache_layout=self.spec.kv_cache_layout,
        )

    def _decodes(self, common: CommonAttentionMetadata) -> tuple[int, int]:
        """How many of the first requests are decoded, and their number of new tokens."""
        lengths = common.query_start_loc_cpu.diff()
        if self.kernels.decode == TRTLLM_GEN and common.max_query_len <= MAX_SPECULATIVE_QUERY_LEN:
            first = int(lengths[0])
            if bool((lengths == first).all()):
                return common.num_reqs, first
        # The batch comes with single tokens first (`reorder_batch_threshold`).
        return int((lengths <= 1).to(torch.int32).cumprod(0).sum()), 1


class FlashInferImpl(PagedAttentionImpl[FlashInferMetadata]):
    """Runs what the builder planned."""

    name: ClassVar[str] = "FLASHINFER"
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
        """Raises UsageError without a variant, and for other than decoder attention."""
        super().__init__(shape, kv_cache_dtype, attn_type, alibi_slopes, sinks, variant)
        find_variant(variant)
        if attn_type is not AttentionType.DECODER:
            raise UsageError(f"FLASHINFER runs decoders only, not {attn_type}; ask for FLASH_ATTN")
        # XQA and TRTLLM-GEN take float32 only.
        self.sinks = None if sinks is None else sinks.float()

    def paired(self, kv_cache: torch.Tensor) -> torch.Tensor:
        return kv_cache.transpose(0, 1)

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: FlashInferMetadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self.refuse_scales(output_scale, output_block_scale)
        self._run(layer, query, kv_cache, attn_metadata, output, None)
        return output

    def forward_with_lse(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: FlashInferMetadata,
        output: torch.Tensor,
    ) -> torch.Tensor:
        """`forward`, which also gives the LSE: (num_tokens, num_heads) float32, base e.

        Raises UsageError for XQA, TRTLLM_GEN and CASCADE, which give none.
        """
        lse = output.new_empty(
            (attn_metadata.num_actual_tokens, self.num_heads), dtype=torch.float32
        )
        self._run(layer, query, kv_cache, attn_metadata, output, lse)
        return lse

    def _run(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: FlashInferMetadata,
        output: torch.Tensor,
        lse: torch.Tensor | None,
    ) -> None:
        inputs = LayerInputs.of(layer, self.sinks, self.is_quantized)
        if metadata.kv_cache_layout == "HND":
            kv_cache = kv_cache.transpose(2, 3)
        middle = metadata.num_decode_tokens
        phases = (
            (metadata.decode, slice(0, middle)),
            (metadata.prefill, slice(middle, metadata.num_actual_tokens)),
        )
        for planned, tokens in phases:
            if planned is None:
                continue
            found = planned.run(query[tokens], kv_cache, output[tokens], inputs, lse is not None)
            if lse is not None and found is not None:
                lse[tokens] = found
