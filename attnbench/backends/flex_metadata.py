"""What FLEX_ATTENTION makes of a batch: a block mask over physical slots, and its positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.attention.flex_attention import BlockMask

from attnbench.backends.builder import AttentionMetadataBuilder
from attnbench.backends.flex_blocks import block_lists, query_block_rows, visible_pages
from attnbench.backends.metadata import CommonAttentionMetadata

_MIN_CAPACITY = 1 << 12


@dataclass(frozen=True, slots=True, kw_only=True)
class FlexAttentionMetadata:
    """block_mask: over (num_tokens, physical slots of the first `num_blocks` blocks).

    slots: what the mask and the score functions look positions up in.
    """

    block_mask: BlockMask
    slots: SlotTable
    num_blocks: int
    causal: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotTable:
    """From query rows and physical slots to positions, for the mask and the score functions.

    All are (capacity,) int32 and static: torch's CPU template (2.13) makes C++ that does not
    compile when a captured tensor has a symbolic size (it replaces `ks3` inside `ks31`), so the
    capacity is one of a few powers of two and part of what is compiled for. Numbers captured as
    text are constants for the compiler; captured as numbers they would be symbolic too.

    limit, position: of a query row: keys of its request, its position.
    row_start: of a query row: where its request's part of `logical_block` begins.
    logical_block: at `row_start + physical block`: its place in the request, -1 if not its own.
    """

    limit: torch.Tensor
    position: torch.Tensor
    row_start: torch.Tensor
    logical_block: torch.Tensor
    block_size: int

    @classmethod
    def make(
        cls,
        limit: torch.Tensor,
        position: torch.Tensor,
        row_start: torch.Tensor,
        logical_block: torch.Tensor,
        block_size: int,
        device: torch.device,
    ) -> SlotTable:
        capacity = slot_capacity(max(len(limit) + 1, len(logical_block)))

        def static(x: torch.Tensor) -> torch.Tensor:
            table = torch.zeros(capacity, dtype=torch.int32)
            table[: len(x)] = x
            return marked_static(table.to(device))

        return cls(
            limit=static(limit),
            position=static(position),
            row_start=static(row_start),
            logical_block=static(logical_block),
            block_size=block_size,
        )

    def mask_mod(self, causal: bool, window: int) -> Callable[..., torch.Tensor]:
        """flex_attention's `mask_mod`: whether query row `q` sees slot `kv`."""
        limit, position, row_start = self.limit, self.position, self.row_start
        logical_block, size_text, window_text = (
            self.logical_block,
            str(self.block_size),
            str(window),
        )

        def visible(
            b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor
        ) -> torch.Tensor:
            size, reach = int(size_text), int(window_text)
            block = logical_block[row_start[q] + kv // size]
            key = block * size + kv % size
            seen = (block >= 0) & (key < limit[q])
            distance = position[q] - key
            if causal:
                seen = seen & (distance >= 0)
            if reach:
                seen = seen & (distance < reach) & (distance > -reach)
            return seen

        return visible

    def score_mod(
        self, soft_cap: float, slopes: torch.Tensor | None
    ) -> Callable[..., torch.Tensor] | None:
        """flex_attention's `score_mod`: soft cap, then ALiBi."""
        if not soft_cap and slopes is None:
            return None
        position, row_start, logical_block = self.position, self.row_start, self.logical_block
        size_text, cap_text = str(self.block_size), str(soft_cap)

        def modified(
            score: torch.Tensor,
            b: torch.Tensor,
            h: torch.Tensor,
            q: torch.Tensor,
            kv: torch.Tensor,
        ) -> torch.Tensor:
            size, cap = int(size_text), float(cap_text)
            if cap:
                score = cap * torch.tanh(score / cap)
            if slopes is not None:
                key = logical_block[row_start[q] + kv // size] * size + kv % size
                score = score - slopes[h] * (position[q] - key).abs()
            return score

        return modified


def slot_capacity(needed: int) -> int:
    """The smallest size of a slot table that is compiled for and holds `needed` entries."""
    capacity = _MIN_CAPACITY
    while capacity < needed:
        capacity *= 16
    return capacity


def marked_static(x: torch.Tensor) -> torch.Tensor:
    """`x`, marked so that `dynamic=True` leaves its sizes alone."""
    torch._dynamo.mark_static(x)
    return x


class FlexAttentionMetadataBuilder(AttentionMetadataBuilder[FlexAttentionMetadata]):
    """Makes the block mask. Its size is (query blocks) x (physical blocks of the cache)."""

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> FlexAttentionMetadata:
        """`common_prefix_len` changes nothing: shared pages are read per query block anyway."""
        common, block_size = common_attn_metadata, self.spec.block_size
        window = self.spec.shape.sliding_window
        starts = common.query_start_loc_cpu[:-1].long()
        query_lens = common.query_start_loc_cpu.diff().long()
        cpu_lens = common.seq_lens_cpu
        seq_lens = (cpu_lens if cpu_lens is not None else common.seq_lens.cpu()).long()
        table = common.block_table_tensor.cpu().long()
        request = torch.repeat_interleave(torch.arange(common.num_reqs), query_lens)
        row = torch.arange(common.num_actual_tokens)
        position = row - (starts + query_lens - seq_lens)[request]
        # Blocks behind the last one anybody owns are no business of this step.
        owned = torch.arange(table.shape[1]) < -(-seq_lens // block_size)[:, None]
        num_blocks = max(2, int(table[owned].max()) + 1)
        logical = torch.full((common.num_reqs, num_blocks), -1)
        owner, column = owned.nonzero(as_tuple=True)
        logical[owner, table[owner, column]] = column
        slots = SlotTable.make(
            seq_lens[request],
            position,
            request * num_blocks,
            logical.flatten(),
            block_size,
            self.device,
        )
        query_block = query_block_rows(common.max_query_len, self.device.type)
        pages = visible_pages(
            starts, query_lens, seq_lens, query_block, block_size, common.causal, window
        )
        partial, full = block_lists(pages, table, -(-len(row) // query_block), num_blocks)
        block_mask = BlockMask.from_kv_blocks(
            self._dynamic(partial[0]),
            self._dynamic(partial[1]),
            self._dynamic(full[0]),
            self._dynamic(full[1]),
            BLOCK_SIZE=(query_block, block_size),
            mask_mod=slots.mask_mod(common.causal, window),
            seq_lengths=(max(2, len(row)), num_blocks * block_size),
            compute_q_blocks=False,
        )
        return FlexAttentionMetadata(
            block_mask=block_mask, slots=slots, num_blocks=num_blocks, causal=common.causal
        )

    def _dynamic(self, x: torch.Tensor) -> torch.Tensor:
        """(1, 1, query blocks, ...) on the device; 2 at least: a size of 1 is never dynamic."""
        if len(x) == 1:
            x = torch.cat([x, torch.zeros_like(x)])
        return x.to(self.device, torch.int32)[None, None]
