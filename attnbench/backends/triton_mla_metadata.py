"""TRITON_MLA's metadata: which requests run in which form, their tiles, splits and gathers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch

from attnbench.backends.builder import AttentionCGSupport, AttentionMetadataBuilder, KVCacheSpec
from attnbench.backends.dtypes import torch_dtype
from attnbench.backends.metadata import CommonAttentionMetadata
from attnbench.backends.triton_attn import SHORT_ROWS
from attnbench.backends.triton_attn_launch import attention_tile_shape
from attnbench.backends.triton_launch import (
    TileGroup,
    TileShape,
    host_lengths,
    launch_device,
    multiprocessors,
    plan_tile_groups,
)
from attnbench.backends.triton_mla_launch import latent_tile_shape

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
