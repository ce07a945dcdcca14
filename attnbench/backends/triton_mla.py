"""TRITON_MLA: our own Triton kernels for multi-head latent attention.

Decode runs in the absorbed form over the paged latent cache. Prefill runs in the expanded form: the
latents of the prefill requests are gathered and projected by torch, and the dense path of our
attention kernel does the rest. That needs room for the expanded keys and values of all prefill
requests at once: `seq_len * num_heads * (qk_head_dim + v_head_dim)` elements a request, 80 KiB a
token for DeepSeek-V3 on one rank in bf16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch

from attnbench.backends.abstract import AttentionConfig, is_quantized_kv_cache
from attnbench.backends.builder import AttentionCGSupport, AttentionMetadataBuilder, KVCacheSpec
from attnbench.backends.cache_shapes import LatentCacheBackend
from attnbench.backends.device import Device, DeviceCapability
from attnbench.backends.dtypes import FLOAT_AND_FP8_CACHES, movable, torch_dtype
from attnbench.backends.impl import MLAAttentionImpl, MLALayer
from attnbench.backends.metadata import CommonAttentionMetadata
from attnbench.backends.triton_attn import (
    SHORT_ROWS,
    interpreter_limit,
    require_launchable,
    triton_combination_refusal,
    triton_compilation_key,
    triton_unavailable_reason,
)
from attnbench.backends.triton_attn_launch import (
    INTERPRETER_TILE,
    attention_launches,
    attention_tile_shape,
)
from attnbench.backends.triton_kernels.attention import attention_kernel
from attnbench.backends.triton_kernels.latent import latent_attention_kernel
from attnbench.backends.triton_launch import (
    Launch,
    TileGroup,
    TileShape,
    host_lengths,
    kernel_patterns_of,
    launch_device,
    multiprocessors,
    plan_tile_groups,
)
from attnbench.backends.triton_mla_launch import (
    latent_launches,
    latent_tile_shape,
    write_latent_launch,
)
from attnbench.workload.types import AttentionShape, AttentionType, WorkloadFields

#: Requests with more new tokens run in the expanded form. By arithmetic alone the absorbed form is
#: cheaper up to rank * (nope + v) / (2 * rank - nope - v) = 170 tokens for DeepSeek-V3, but its
#: tiles are small.
MAX_ABSORBED_QUERY_LEN = 64


@dataclass(slots=True, kw_only=True)
class TritonMLAPrefill:
    """The expanded part of one step: requests `num_decodes` onwards."""

    query_start_loc: torch.Tensor
    """(num_prefills + 1,) int32, counted from the first prefill token."""
    key_start_loc: torch.Tensor
    """(num_prefills + 1,) int32, into the gathered keys."""
    seq_lens: torch.Tensor
    key_request: torch.Tensor
    """(num_keys,) int64, request of each gathered key."""
    key_position: torch.Tensor
    """(num_keys,) int64, its position in that request."""
    groups: tuple[TileGroup, ...]


@dataclass(slots=True, kw_only=True)
class TritonMLAMetadata:
    """One step's metadata; the first `num_decodes` requests run in the absorbed form."""

    num_actual_tokens: int
    num_decodes: int
    num_decode_tokens: int
    num_prefills: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    decode_groups: tuple[TileGroup, ...]
    prefill: TritonMLAPrefill | None


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
        return capability >= (
            8,
            0,
        )  # below, a tile of 16 x 512 fp32 operands overruns shared memory

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


class TritonMLAMetadataBuilder(AttentionMetadataBuilder[TritonMLAMetadata]):
    """Splits the batch into an absorbed and an expanded part, and chooses tiles and splits."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    reorder_batch_threshold: int | None = MAX_ABSORBED_QUERY_LEN
    supports_update_block_table: ClassVar[bool] = True

    def __init__(
        self,
        spec: KVCacheSpec,
        layer_names: Sequence[str],
        device: torch.device,
        variant: str = "",
    ) -> None:
        super().__init__(spec, layer_names, device, variant)
        self.launch_device = launch_device(device)
        self.num_sms = multiprocessors(device)

    def latent_tile_shape(self, rows: int, is_short: bool) -> TileShape:
        """The tile shape of the absorbed form."""
        spec = self.spec
        return latent_tile_shape(
            self.launch_device, spec.dtype, torch_dtype(spec.kv_cache_dtype), rows
        )

    def expanded_tile_shape(self, rows: int, is_short: bool) -> TileShape:
        """The tile shape of the expanded form."""
        shape, dtype = self.spec.shape, self.spec.dtype
        return attention_tile_shape(
            self.launch_device, shape.qk_head_dim, shape.v_head_size, dtype, dtype, rows, is_short
        )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> TritonMLAMetadata:
        common = common_attn_metadata
        query_lens, seq_lens = host_lengths(common)
        is_prefill = query_lens > MAX_ABSORBED_QUERY_LEN
        num_decodes = int(is_prefill.argmax()) if bool(is_prefill.any()) else common.num_reqs
        num_decode_tokens = int(query_lens[:num_decodes].sum())
        shape = self.spec.shape
        decode_groups = plan_tile_groups(
            query_lens[:num_decodes],
            seq_lens[:num_decodes],
            num_heads=shape.num_heads,
            num_kv_heads=1,
            v_head_size=shape.kv_lora_rank,
            window=0,
            max_short_query_len=MAX_ABSORBED_QUERY_LEN,
            choose_shape=self.latent_tile_shape,
            num_sms=self.num_sms,
            device=self.device,
        )
        prefill = None
        if num_decodes < common.num_reqs:
            prefill = self._build_prefill(common, num_decodes, query_lens, seq_lens)
        return TritonMLAMetadata(
            num_actual_tokens=common.num_actual_tokens,
            num_decodes=num_decodes,
            num_decode_tokens=num_decode_tokens,
            num_prefills=common.num_reqs - num_decodes,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            decode_groups=decode_groups,
            prefill=prefill,
        )

    def _build_prefill(
        self,
        common: CommonAttentionMetadata,
        num_decodes: int,
        query_lens: npt.NDArray[np.int64],
        seq_lens: npt.NDArray[np.int64],
    ) -> TritonMLAPrefill:
        shape = self.spec.shape
        if common.seq_lens_cpu is None:  # the gather needs the true lengths: synchronises
            seq_lens = common.seq_lens.cpu().numpy().astype(np.int64)
        query_lens, seq_lens = query_lens[num_decodes:], seq_lens[num_decodes:]
        key_start_loc = np.concatenate([[0], np.cumsum(seq_lens)])
        requests = np.arange(num_decodes, common.num_reqs)
        positions = np.arange(key_start_loc[-1]) - np.repeat(key_start_loc[:-1], seq_lens)
        groups = plan_tile_groups(
            query_lens,
            seq_lens,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_heads,
            v_head_size=shape.v_head_size,
            window=0,
            max_short_query_len=SHORT_ROWS,
            choose_shape=self.expanded_tile_shape,
            num_sms=self.num_sms,
            device=self.device,
        )

        def on_device(array: npt.NDArray[np.int64], dtype: torch.dtype) -> torch.Tensor:
            return torch.from_numpy(array).to(self.device, dtype, non_blocking=True)

        query_start_loc = common.query_start_loc[num_decodes:]
        return TritonMLAPrefill(
            query_start_loc=query_start_loc - query_start_loc[0],
            key_start_loc=on_device(key_start_loc, torch.int32),
            seq_lens=common.seq_lens[num_decodes:],
            key_request=on_device(np.repeat(requests, seq_lens), torch.int64),
            key_position=on_device(positions, torch.int64),
            groups=groups,
        )

    def update_block_table(
        self, metadata: TritonMLAMetadata, blk_table: torch.Tensor, slot_mapping: torch.Tensor
    ) -> TritonMLAMetadata:
        return replace(metadata, block_table=blk_table, slot_mapping=slot_mapping)


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
        k_nope = torch.einsum("sl,hnl->shn", kv_c, layer.W_UK)
        key = torch.cat([k_nope, k_pe[:, None].expand(-1, self.num_heads, -1)], dim=-1)
        return key, torch.einsum("sl,hlv->shv", kv_c, layer.W_UV).contiguous()
