"""CPU_ATTN: paged attention on the CPU in vectorised torch; the CPU platform's default.

Pages are copied tile by tile into a scratch that stays in the processor's cache, never the whole
context at once, and the tile is worked on by torch's fused kernel with the query heads of a group
folded together (GQA costs no copy of K and V). Tiles merge by LSE in float32. Two ways through:

- decode (few query tokens): split-KV, many requests side by side (`split_kv.py`);
- prefill and extend: one request at a time, chunk of keys by chunk of keys. The context before the
  new tokens needs no mask; on the diagonal the kernel's own causal mode is used.

A soft cap needs logits in memory: the tile is then computed by plain float32 products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch

from attnbench.backends.attend import add_sink, attend, causal_rows, merge_into, merge_splits
from attnbench.backends.cache_shapes import PairedCacheBackend
from attnbench.backends.cpu_attn_metadata import (
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
    PrefillRequest,
)
from attnbench.backends.device import Device
from attnbench.backends.dtypes import FLOAT_AND_FP8_CACHES
from attnbench.backends.impl import AttentionImpl, AttentionLayer
from attnbench.backends.masks import additive, alibi_bias, visible
from attnbench.backends.paged_ops import dequantize, gather_heads, write_slots
from attnbench.backends.split_kv import SplitPlan
from attnbench.workload.types import AttentionType

#: K (or V) bytes of one chunk of prefill.
_PREFILL_CHUNK_BYTES = 8 << 20
#: Keys and queries of a tile where a mask or the logits are held in memory.
_MASKED_TILE = 512


class CPUAttentionBackend(PairedCacheBackend):
    supported_dtypes: ClassVar[tuple[torch.dtype, ...]] = (
        torch.float16,
        torch.bfloat16,
        torch.float32,
    )
    supported_kv_cache_dtypes: ClassVar[tuple[str, ...]] = FLOAT_AND_FP8_CACHES

    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN"

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionImpl]:
        return CPUAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return CPUAttentionMetadataBuilder

    @classmethod
    def supports_device(cls, device: Device) -> bool:
        return device.kind == "cpu"

    @classmethod
    def supports_attn_type(cls, attn_type: AttentionType) -> bool:
        return True

    @classmethod
    def supports_v_head_size(cls, head_size: int, v_head_size: int) -> bool:
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_logits_soft_cap(cls) -> bool:
        return True

    @classmethod
    def supports_alibi(cls) -> bool:
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        return True


class CPUAttentionImpl(AttentionImpl[CPUAttentionMetadata]):
    """Holds a scratch for one tile of K and one of V, reused from call to call."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reads_cache = self.attn_type in (AttentionType.DECODER, AttentionType.ENCODER_DECODER)
        self.group_size = self.num_heads // self.num_kv_heads
        self.v_head_size = self.shape.v_head_size
        self._scratch: dict[str, torch.Tensor] = {}

    def do_kv_cache_update(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        write_slots(kv_cache[0], key, slot_mapping, layer._k_scale_float)
        write_slots(kv_cache[1], value, slot_mapping, layer._v_scale_float)

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CPUAttentionMetadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        for plan in attn_metadata.decodes:
            self._decode(layer, query, kv_cache, plan, output)
        for request in attn_metadata.prefills:
            rows = request.tokens
            if self.reads_cache:
                chunks = self._cached_chunks(layer, kv_cache, request, attn_metadata.causal, query)
            else:
                chunks = self._given_chunks(key[rows], value[rows])
            self._prefill(query[rows], chunks, request, attn_metadata.causal, output[rows])
        return output

    def parts(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CPUAttentionMetadata,
    ) -> Mapping[str, Callable[[], Any]]:
        if not self.reads_cache:
            return {}

        def gather_all() -> None:
            for plan in attn_metadata.decodes:
                for tile in plan.tiles:
                    self._gather(layer, kv_cache, tile.pages, query.dtype)
            for request in attn_metadata.prefills:
                for _ in self._cached_chunks(layer, kv_cache, request, attn_metadata.causal, query):
                    pass

        return {"page_gather": gather_all}

    # --- pages -------------------------------------------------------------------------------
    def _gather(
        self, layer: AttentionLayer, kv_cache: torch.Tensor, pages: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of some pages in the scratch: (rows, num_kv_heads, tokens, size), in `dtype`."""
        elements = pages.numel() * kv_cache[0, 0].numel()
        tiles = []
        for plane, name, size, scale in (
            (kv_cache[0], "key", self.head_size, layer._k_scale_float),
            (kv_cache[1], "value", self.v_head_size, layer._v_scale_float),
        ):
            tile = gather_heads(plane, pages, self._memory(name, elements, plane.dtype))
            tiles.append(dequantize(tile, dtype, scale)[..., :size])
        return tiles[0], tiles[1]

    def _memory(self, name: str, elements: int, dtype: torch.dtype) -> torch.Tensor:
        memory = self._scratch.get(name)
        if memory is None or memory.numel() < elements or memory.dtype != dtype:
            memory = self._scratch[name] = torch.empty(elements, dtype=dtype)
        return memory

    # --- decode ------------------------------------------------------------------------------
    def _decode(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        plan: SplitPlan,
        output: torch.Tensor,
    ) -> None:
        num_reqs, query_len = plan.token_index.shape
        kv_heads, group = self.num_kv_heads, self.group_size
        rows = plan.token_index.reshape(-1)
        # (num_reqs, num_kv_heads, query_len * group, head_size): a KV head's queries side by side.
        folded = (
            query[rows]
            .view(num_reqs, query_len, kv_heads, group, self.head_size)
            .transpose(1, 2)
            .reshape(num_reqs, kv_heads, query_len * group, self.head_size)
        )
        num_splits = len(plan.owner)
        outputs = torch.empty((num_splits, *folded.shape[1:3], self.v_head_size))
        lses = torch.empty((num_splits, *folded.shape[1:3]))
        for tile in plan.tiles:
            part = slice(tile.first, tile.last)
            keys, values = self._gather(layer, kv_cache, tile.pages, query.dtype)
            mask = tile.mask
            if mask is not None:
                mask = mask.repeat_interleave(group, dim=2)
            if self.alibi_slopes is not None and tile.distance is not None:
                slopes = self.alibi_slopes.view(kv_heads, 1, group, 1)
                bias = (-slopes * tile.distance[:, None, :, None]).flatten(2, 3)
                mask = bias if mask is None else bias + mask
            outputs[part], lses[part] = attend(
                folded[plan.owner[part]],
                keys,
                values,
                self.scale,
                mask,
                soft_cap=self.logits_soft_cap,
            )
        result, lse = merge_splits(outputs, lses, plan.owner, plan.rank, num_reqs, plan.num_ranks)
        result = result.view(num_reqs, kv_heads, query_len, group, -1).transpose(1, 2)
        result = result.reshape(num_reqs * query_len, self.num_heads, -1)
        if self.sinks is not None:
            lse = lse.view(num_reqs, kv_heads, query_len, group).transpose(1, 2)
            result = add_sink(result, lse.reshape(-1, self.num_heads), self.sinks)
        output[rows] = result.to(output.dtype)

    # --- prefill -----------------------------------------------------------------------------
    @property
    def _needs_mask(self) -> bool:
        """Whether tiles hold a mask or logits in memory, and are kept small for it."""
        return bool(self.sliding_window or self.logits_soft_cap) or self.alibi_slopes is not None

    def _cached_chunks(
        self,
        layer: AttentionLayer,
        kv_cache: torch.Tensor,
        request: PrefillRequest,
        causal: bool,
        query: torch.Tensor,
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """(position of the first key, K, V), each (1, num_kv_heads, tokens, size).

        No chunk holds both context and new tokens where that matters: with `causal`.
        """
        block_size = kv_cache.shape[2]
        token = kv_cache.shape[3] * kv_cache.shape[4] * query.element_size()
        size = _MASKED_TILE if self._needs_mask else max(1, _PREFILL_CHUNK_BYTES // token)
        first_query = request.seq_len - request.query_len if causal else 0
        first = 0
        if causal and self.sliding_window:
            first = max(0, first_query - self.sliding_window + 1)
        while first < request.seq_len:
            border = first_query if first < first_query else request.seq_len
            last = min(first + size, border)
            block = first // block_size
            pages = request.block_table[None, block : -(-last // block_size)]
            keys, values = self._gather(layer, kv_cache, pages, query.dtype)
            tokens = slice(first - block * block_size, last - block * block_size)
            yield first, keys[:, :, tokens], values[:, :, tokens]
            first = last

    def _given_chunks(
        self, key: torch.Tensor, value: torch.Tensor
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        size = _MASKED_TILE if self._needs_mask else len(key)
        for first in range(0, len(key), size):
            tokens = slice(first, first + size)
            yield first, key[tokens].transpose(0, 1)[None], value[tokens].transpose(0, 1)[None]

    def _prefill(
        self,
        query: torch.Tensor,
        chunks: Iterator[tuple[int, torch.Tensor, torch.Tensor]],
        request: PrefillRequest,
        causal: bool,
        output: torch.Tensor,
    ) -> None:
        """`query`, `output`: the tokens of one request."""
        length, group = len(query), self.group_size
        # (group, num_kv_heads, query_len, size): K and V broadcast over the first dimension.
        queries = query.view(length, self.num_kv_heads, group, -1).permute(2, 1, 0, 3)
        result = torch.zeros((*queries.shape[:3], self.v_head_size))
        lse = torch.full(queries.shape[:3], -torch.inf)
        for first_key, keys, values in chunks:
            keys, values = (x.expand(group, -1, -1, -1) for x in (keys, values))
            for rows, is_causal, mask in self._row_tiles(request, first_key, keys.shape[2], causal):
                part, part_lse = attend(
                    queries[:, :, rows],
                    keys,
                    values,
                    self.scale,
                    mask,
                    is_causal,
                    self.logits_soft_cap,
                )
                merge_into(result[:, :, rows], lse[:, :, rows], part, part_lse)
        if self.sinks is not None:
            sinks = self.sinks.view(self.num_kv_heads, group).t()[:, :, None]
            result = add_sink(result, lse, sinks)
        output.view(length, self.num_kv_heads, group, -1).copy_(result.permute(2, 1, 0, 3))

    def _row_tiles(
        self, request: PrefillRequest, first_key: int, num_keys: int, causal: bool
    ) -> Iterator[tuple[slice, bool, torch.Tensor | None]]:
        """(query rows, whether they are a diagonal, mask) that see some of a chunk's keys."""
        length, first_query = request.query_len, request.seq_len - request.query_len
        if not self._needs_mask:
            if not causal:
                yield slice(0, length), False, None
                return
            for rows, is_diagonal in causal_rows(length, first_query, first_key, num_keys):
                yield rows, is_diagonal, None
            return
        # Rows before the first key see nothing of the chunk.
        first_row = max(0, first_key - first_query) if causal else 0
        for row in range(first_row, length, _MASKED_TILE):
            rows = slice(row, min(row + _MASKED_TILE, length))
            query_positions = torch.arange(first_query + row, first_query + rows.stop)
            key_positions = torch.arange(first_key, first_key + num_keys)
            seen = visible(query_positions, key_positions, causal, self.sliding_window)
            if not bool(seen.any()):
                continue
            mask = None if bool(seen.all()) else additive(seen)
            if self.alibi_slopes is not None:
                bias = alibi_bias(self.alibi_slopes, query_positions, key_positions)
                bias = bias.view(self.num_kv_heads, self.group_size, *bias.shape[1:])
                mask = bias.transpose(0, 1) if mask is None else bias.transpose(0, 1) + mask
            yield rows, False, mask
