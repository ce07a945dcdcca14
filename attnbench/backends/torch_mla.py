"""TORCH_MLA: multi-head latent attention on the CPU in vectorised torch.

- decode, absorbed (`forward_mqa`): every head attends to the same latents, so all heads of all new
  tokens of a request are the queries of one KV head of width `kv_lora_rank + qk_rope_head_dim`;
  split-KV over tiles of pages as in CPU_ATTN (`split_kv.py`).
- prefill and extend, expanded (`forward_mha`): chunk by chunk, the latents of a request are
  gathered, projected up to keys and values by the two halves of `kv_b_proj`, and attended to;
  chunks merge by LSE, so that the expanded context never exists as a whole.

A request is a decode up to `reorder_batch_threshold` query tokens. Per (query, key, head) the
absorbed form multiplies `2 * kv_lora_rank + qk_rope_head_dim` times, the expanded one
`qk_nope_head_dim + qk_rope_head_dim + v_head_dim` times, and `kv_lora_rank * (qk_nope_head_dim +
v_head_dim)` times per key and head for the projection. For DeepSeek-V3 (1088, 320, 131072) they
cross at 171 new tokens; 16 is chosen below that because the expanded form also writes and reads
keys and values 71 times as large as the latents, and because it keeps speculative decoding
(vLLM's reason for the threshold) in the absorbed form and prompts in the expanded one. Sparse
batches run in the absorbed form whole (`torch_mla_sparse.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch

from attnbench.backends.abstract import AttentionConfig
from attnbench.backends.attend import attend, causal_rows, merge_into, merge_splits
from attnbench.backends.builder import AttentionMetadataBuilder
from attnbench.backends.cache_shapes import LatentCacheBackend
from attnbench.backends.device import Device
from attnbench.backends.ds_mla import DS_MLA, write_rows
from attnbench.backends.dtypes import FLOAT_AND_FP8_CACHES
from attnbench.backends.impl import MLAAttentionImpl, MLALayer
from attnbench.backends.metadata import CommonAttentionMetadata
from attnbench.backends.paged_ops import gather_tokens, write_slots
from attnbench.backends.split_kv import SplitPlan, plan_splits
from attnbench.backends.torch_mla_sparse import (
    SparseTokens,
    attend_sparse,
    read_latents,
    sparse_tokens,
)

#: Bytes of latents in one tile of the absorbed form, per thread: half an L2 cache.
_TILE_BYTES = 1 << 20
#: Bytes of keys in one chunk of the expanded form.
_CHUNK_BYTES = 32 << 20


class TorchMLABackend(LatentCacheBackend):
    supported_dtypes: ClassVar[tuple[torch.dtype, ...]] = (
        torch.float16,
        torch.bfloat16,
        torch.float32,
    )
    supported_kv_cache_dtypes: ClassVar[tuple[str, ...]] = (*FLOAT_AND_FP8_CACHES, DS_MLA)

    @staticmethod
    def get_name() -> str:
        return "TORCH_MLA"

    @staticmethod
    def get_impl_cls() -> type[TorchMLAImpl]:
        return TorchMLAImpl

    @staticmethod
    def get_builder_cls() -> type[TorchMLAMetadataBuilder]:
        return TorchMLAMetadataBuilder

    @classmethod
    def supports_device(cls, device: Device) -> bool:
        return device.kind == "cpu"

    @classmethod
    def validate_configuration(cls, config: AttentionConfig, device: Device) -> list[str]:
        """Dense and sparse are one to it: every reason is that of the dense configuration."""
        return super().validate_configuration(config._replace(use_sparse=False), device)


@dataclass(frozen=True, slots=True, kw_only=True)
class MLAPrefill:
    """One prefill request: its rows among the prefill tokens, its length, its blocks (1, n)."""

    tokens: slice
    seq_len: int
    block_table: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchMLAMetadata:
    """Decode requests come first in the batch; `sparse`: all tokens of one, which are decodes."""

    num_decodes: int
    num_decode_tokens: int
    num_prefills: int
    num_prefill_tokens: int
    decodes: tuple[SplitPlan, ...]
    prefills: tuple[MLAPrefill, ...]
    sparse: SparseTokens | None = None


class TorchMLAMetadataBuilder(AttentionMetadataBuilder[TorchMLAMetadata]):
    reorder_batch_threshold = 16

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> TorchMLAMetadata:
        """Requests up to the first one longer than `reorder_batch_threshold` are decodes.

        `common_prefix_len` changes nothing: each request reads the shared pages itself.
        """
        common = common_attn_metadata
        if common.topk_indices_buffer is not None:
            return TorchMLAMetadata(
                num_decodes=common.num_reqs,
                num_decode_tokens=common.num_actual_tokens,
                num_prefills=0,
                num_prefill_tokens=0,
                decodes=(),
                prefills=(),
                sparse=sparse_tokens(common, common.topk_indices_buffer),
            )
        starts = common.query_start_loc_cpu.tolist()
        query_lens = [b - a for a, b in pairwise(starts)]
        cpu_lens = common.seq_lens_cpu
        seq_lens = cpu_lens if cpu_lens is not None else common.seq_lens.cpu()
        threshold = self.reorder_batch_threshold
        is_prefill = [n > threshold for n in query_lens]
        num_decodes = is_prefill.index(True) if True in is_prefill else common.num_reqs
        num_decode_tokens = starts[num_decodes]
        members: dict[int, list[int]] = {}
        for request in range(num_decodes):
            members.setdefault(query_lens[request], []).append(request)
        plans = [
            self._plan(common, seq_lens, query_len, requests, starts)
            for query_len, requests in members.items()
        ]
        prefills = []
        for request in range(num_decodes, common.num_reqs):
            query_len, seq_len = query_lens[request], int(seq_lens[request])
            first = starts[request] - num_decode_tokens
            prefills.append(
                MLAPrefill(
                    tokens=slice(first, first + query_len),
                    seq_len=seq_len,
                    block_table=common.block_table_tensor[request : request + 1],
                )
            )
        return TorchMLAMetadata(
            num_decodes=num_decodes,
            num_decode_tokens=num_decode_tokens,
            num_prefills=common.num_reqs - num_decodes,
            num_prefill_tokens=common.num_actual_tokens - num_decode_tokens,
            decodes=tuple(plans),
            prefills=tuple(prefills),
        )

    def _plan(
        self,
        common: CommonAttentionMetadata,
        seq_lens: torch.Tensor,
        query_len: int,
        requests: list[int],
        starts: list[int],
    ) -> SplitPlan:
        rows = torch.tensor(requests)
        first_rows = torch.tensor([starts[r] for r in requests])
        page = self.spec.block_size * self.spec.shape.head_size * self.spec.dtype.itemsize
        return plan_splits(
            first_rows[:, None] + torch.arange(query_len),
            seq_lens[rows],
            common.block_table_tensor[rows],
            self.spec.block_size,
            causal=True,
            window=0,
            tile_pages=max(1, _TILE_BYTES * torch.get_num_threads() // page),
        )


class TorchMLAImpl(MLAAttentionImpl[TorchMLAMetadata]):
    can_return_lse_for_decode: ClassVar[bool] = True

    def do_kv_cache_update(
        self,
        layer: MLALayer,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        if self.kv_cache_dtype == DS_MLA:
            write_rows(kv_c_normed, k_pe, kv_cache, slot_mapping)
            return
        rows = torch.cat([kv_c_normed, k_pe.flatten(1)], dim=-1)
        write_slots(kv_cache, rows, slot_mapping, layer._k_scale_float)

    def forward_mqa(
        self,
        layer: MLALayer,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: TorchMLAMetadata,
        output: torch.Tensor,
    ) -> torch.Tensor:
        """Returns the LSE (num_decode_tokens, num_heads) in float32."""
        if (sparse := attn_metadata.sparse) is not None:
            k_scale = layer._k_scale_float
            return attend_sparse(q, kv_cache, sparse, output, self.scale, k_scale)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        for plan in attn_metadata.decodes:
            num_reqs, query_len = plan.token_index.shape
            rows = plan.token_index.reshape(-1)
            # All heads of all query tokens of a request, beside each other: one KV head.
            folded = q[rows].view(num_reqs, 1, query_len * self.num_heads, -1)
            num_splits = len(plan.owner)
            outputs = lse.new_empty((num_splits, *folded.shape[1:3], self.kv_lora_rank))
            lses = lse.new_empty((num_splits, *folded.shape[1:3]))
            for tile in plan.tiles:
                part = slice(tile.first, tile.last)
                tokens = tile.pages.shape[1] * kv_cache.shape[1]
                latents = gather_tokens(kv_cache, tile.pages, tokens)
                latents = read_latents(latents, q.dtype, layer._k_scale_float)[:, None]
                mask = tile.mask
                if mask is not None:
                    mask = mask.repeat_interleave(self.num_heads, dim=2)
                # The values are the first `kv_lora_rank` numbers of the latents; giving all of
                # them costs a little arithmetic and saves a copy.
                wide, lses[part] = attend(
                    folded[plan.owner[part]], latents, latents, self.scale, mask
                )
                outputs[part] = wide[..., : self.kv_lora_rank]
            merged, total = merge_splits(
                outputs, lses, plan.owner, plan.rank, num_reqs, plan.num_ranks
            )
            output[rows] = merged.view(len(rows), self.num_heads, -1).to(output.dtype)
            lse[rows] = total.view(len(rows), self.num_heads)
        return lse

    def forward_mha(
        self,
        layer: MLALayer,
        q: torch.Tensor,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: TorchMLAMetadata,
        output: torch.Tensor,
    ) -> None:
        block_size = kv_cache.shape[1]
        qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        size = max(1, _CHUNK_BYTES // (self.num_heads * qk_head_dim * q.element_size()))
        for request in attn_metadata.prefills:
            queries = q[request.tokens].transpose(0, 1)[None]
            query_len = queries.shape[2]
            first_query = request.seq_len - query_len
            result = torch.zeros((*queries.shape[:3], self.v_head_dim))
            lse = torch.full(queries.shape[:3], -torch.inf)
            first = 0
            while first < request.seq_len:
                border = first_query if first < first_query else request.seq_len
                last = min(first + size, border)
                block = first // block_size
                pages = request.block_table[:, block : -(-last // block_size)]
                latents = gather_tokens(kv_cache, pages, last - block * block_size)
                latents = read_latents(latents, q.dtype, layer._k_scale_float)
                key, value = self._expand(layer, latents[0, first - block * block_size :])
                for rows, is_diagonal in causal_rows(query_len, first_query, first, last - first):
                    part, part_lse = attend(
                        queries[:, :, rows], key, value, self.scale, is_causal=is_diagonal
                    )
                    merge_into(result[:, :, rows], lse[:, :, rows], part, part_lse)
                first = last
            output[request.tokens] = result[0].transpose(0, 1).to(output.dtype)

    def _expand(self, layer: MLALayer, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (1, num_heads, tokens, qk_head_dim) and values (1, num_heads, tokens,
        v_head_dim)."""
        kv_c, k_pe = torch.split(latents, [self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        nope = kv_c @ layer.W_UK.transpose(1, 2)
        key = torch.cat([nope, k_pe.expand(self.num_heads, -1, -1)], dim=-1)
        return key[None], (kv_c @ layer.W_UV)[None]
