"""TRITON_MLA: our own Triton kernels for multi-head latent attention.

Decode runs in the absorbed form over the paged latent cache. Prefill runs in the expanded form: the
latents of the prefill requests are gathered and projected by torch, and the dense path of our
attention kernel does the rest. That needs room for the expanded keys and values of all prefill
requests at once: `seq_len * num_heads * (qk_head_dim + v_head_dim)` elements a request, 80 KiB a
token for DeepSeek-V3 on one rank in bf16.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from attnbench.backends.abstract import AttentionConfig, is_quantized_kv_cache
from attnbench.backends.cache_shapes import LatentCacheBackend
from attnbench.backends.device import Device, DeviceCapability
from attnbench.backends.dtypes import FLOAT_AND_FP8_CACHES, movable
from attnbench.backends.impl import MLAAttentionImpl, MLALayer
from attnbench.backends.mla_prefill import project
from attnbench.backends.triton_attn import (
    interpreter_limit,
    require_launchable,
    triton_combination_refusal,
    triton_compilation_key,
    triton_unavailable_reason,
)
from attnbench.backends.triton_attn_launch import INTERPRETER_TILE, attention_launches
from attnbench.backends.triton_kernels.attention import attention_kernel
from attnbench.backends.triton_kernels.latent import latent_attention_kernel
from attnbench.backends.triton_launch import Launch, kernel_patterns_of
from attnbench.backends.triton_mla_launch import latent_launches, write_latent_launch
from attnbench.backends.triton_mla_metadata import (
    MAX_ABSORBED_QUERY_LEN,
    TritonMLAMetadata,
    TritonMLAMetadataBuilder,
    TritonMLAPrefill,
)
from attnbench.workload.types import AttentionShape, AttentionType, WorkloadFields


class TritonMLABackend(LatentCacheBackend):
    """Multi-head latent attention, decode and prefill, by kernels written for this project."""

    supported_dtypes: ClassVar[tuple[torch.dtype, ...]] = (
        torch.float16,
        torch.bfloat16,
        torch.float32,
    )
    supported_kv_cache_dtypes: ClassVar[tuple[str, ...]] = FLOAT_AND_FP8_CACHES
    install_hint: ClassVar[str] = "pip install triton"
    interpreted_on_cpu: ClassVar[bool] = True

    @staticmethod
    def get_name() -> str:
        return "TRITON_MLA"

    @staticmethod
    def get_impl_cls() -> type[TritonMLAImpl]:
        return TritonMLAImpl

    @staticmethod
    def get_builder_cls() -> type[TritonMLAMetadataBuilder]:
        return TritonMLAMetadataBuilder

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return 32 <= head_size <= 640

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability) -> bool:
        # Below, a tile of 16 x 512 fp32 operands overruns shared memory.
        return capability >= (8, 0)

    @classmethod
    def supports_device(cls, device: Device) -> bool:
        return device.kind in ("cuda", "rocm", "cpu")

    @classmethod
    def supports_combination(cls, config: AttentionConfig, device: Device) -> str | None:
        return triton_combination_refusal(config, device)

    @classmethod
    def unavailable_reason(cls, device: Device) -> str | None:
        return triton_unavailable_reason(device)

    @classmethod
    def compilation_key(cls, workload: WorkloadFields, variant: str, device: Device) -> str:
        return triton_compilation_key(workload)

    @classmethod
    def kernel_patterns(cls, variant: str, device: Device) -> tuple[str, ...]:
        return kernel_patterns_of(latent_attention_kernel, attention_kernel)

    @classmethod
    def promised_kernels(
        cls, workload: WorkloadFields, variant: str, device: Device
    ) -> tuple[tuple[str, ...], ...]:
        latent, dense = cls.kernel_patterns(variant, device)
        query_lens = [request.query_len for request in workload.batch_spec.requests]
        groups = [(latent,)] if min(query_lens) <= MAX_ABSORBED_QUERY_LEN else []
        if max(query_lens) > MAX_ABSORBED_QUERY_LEN:
            groups.append((dense,))
        return tuple(groups)

    @classmethod
    def interpreter_refusal(cls, workload: WorkloadFields) -> str | None:
        tiles = 0
        for request in workload.batch_spec.requests:
            key_tiles = -(-request.seq_len // INTERPRETER_TILE.tile_n)
            if request.query_len <= MAX_ABSORBED_QUERY_LEN:
                rows = request.query_len * workload.shape.num_heads
                tiles += -(-rows // INTERPRETER_TILE.block_m) * key_tiles
            else:
                query_tiles = -(-request.query_len // INTERPRETER_TILE.block_m)
                tiles += query_tiles * workload.shape.num_heads * key_tiles
        return interpreter_limit(tiles)


class TritonMLAImpl(MLAAttentionImpl[TritonMLAMetadata]):
    """Launches the kernels. `do_kv_cache_update` must have run before either forward."""

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
        super().__init__(shape, kv_cache_dtype, attn_type, alibi_slopes, sinks, variant)
        self.is_quantized = is_quantized_kv_cache(kv_cache_dtype)

    def do_kv_cache_update(
        self,
        layer: MLALayer,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        require_launchable(kv_c_normed.device)
        self.update_launch(layer, kv_c_normed, k_pe, kv_cache, slot_mapping).run()

    def update_launch(
        self,
        layer: MLALayer,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> Launch:
        """The launch of `do_kv_cache_update`."""
        k_scale = layer._k_scale if self.is_quantized else None
        return write_latent_launch(kv_c_normed, k_pe, kv_cache, slot_mapping, k_scale)

    def forward_mqa(
        self,
        layer: MLALayer,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: TritonMLAMetadata,
        output: torch.Tensor,
    ) -> torch.Tensor:
        require_launchable(q.device)
        lse = torch.empty(output.shape[:2], dtype=torch.float32, device=q.device)
        for launch in self.mqa_launches(layer, q, kv_cache, attn_metadata, output, lse):
            launch.run()
        return lse

    def mqa_launches(
        self,
        layer: MLALayer,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: TritonMLAMetadata,
        output: torch.Tensor,
        lse: torch.Tensor,
    ) -> list[Launch]:
        """The launches of `forward_mqa`."""
        launches: list[Launch] = []
        for group in attn_metadata.decode_groups:
            launches += latent_launches(
                group,
                query=q,
                kv_cache=kv_cache,
                output=output,
                block_table=attn_metadata.block_table,
                query_start_loc=attn_metadata.query_start_loc,
                seq_lens=attn_metadata.seq_lens,
                scale=self.scale,
                k_scale=layer._k_scale if self.is_quantized else None,
                lse=lse,
            )
        return launches

    def forward_mha(
        self,
        layer: MLALayer,
        q: torch.Tensor,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: TritonMLAMetadata,
        output: torch.Tensor,
    ) -> None:
        require_launchable(q.device)
        for launch in self.mha_launches(layer, q, kv_cache, attn_metadata, output):
            launch.run()

    def mha_launches(
        self,
        layer: MLALayer,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: TritonMLAMetadata,
        output: torch.Tensor,
    ) -> list[Launch]:
        """The launches of `forward_mha`; the keys and values they read are expanded here."""
        prefill = attn_metadata.prefill
        if prefill is None:
            return []
        key, value = self._expand(layer, kv_cache, attn_metadata.block_table, prefill, q.dtype)
        launches: list[Launch] = []
        for group in prefill.groups:
            launches += attention_launches(
                group,
                query=q,
                key=key,
                value=value,
                output=output,
                query_start_loc=prefill.query_start_loc,
                key_start_loc=prefill.key_start_loc,
                seq_lens=prefill.seq_lens,
                scale=self.scale,
                causal=True,
            )
        return launches

    def _expand(
        self,
        layer: MLALayer,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        prefill: TritonMLAPrefill,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (num_keys, num_heads, qk_head_dim) and values (num_keys, num_heads, v_head_dim)."""
        block_size = kv_cache.shape[1]
        block = block_table[prefill.key_request, prefill.key_position // block_size]
        stored = movable(kv_cache)[block.long(), prefill.key_position % block_size]
        latent = stored.view(kv_cache.dtype).to(dtype)
        if self.is_quantized:
            latent = latent * layer._k_scale.to(dtype)
        kv_c, k_pe = latent[:, : self.kv_lora_rank], latent[:, self.kv_lora_rank :]
        return project(layer, kv_c, k_pe[:, None])
