"""Blocks of FLEX_ATTENTION's mask: their sizes, and which pages each block of queries reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: Query rows of one block of the mask. Single-token decodes have one row a block on the CPU, where
#: a block of several requests would compute all their keys for each of them.
_CPU_ROWS = 32
#: The smallest tile `tl.dot` takes.
_MIN_TILE = 16
#: Off the CPU queries of this many tokens and more are worth the largest tile.
_LONG_QUERY = 128
_MAX_KEYS = 64
#: Bytes of one row of a head up to which a tile of so many rows fits: torch's own defaults for the
#: widths it tabulates (torch/_inductor/template_heuristics/triton.py, forward of flex attention).
_ROWS_BY_BYTES = ((256, 128), (512, 64))


def query_block_rows(max_query_len: int, device_type: str) -> int:
    """Rows of a block of the mask for a batch whose longest query this is."""
    if device_type == "cpu":
        return 1 if max_query_len == 1 else _CPU_ROWS
    if max_query_len == 1:
        return _MIN_TILE
    return _CPU_ROWS if max_query_len < _LONG_QUERY else _LONG_QUERY


def kernel_tile(mask_block: tuple[int, int], head_size: int, element_size: int) -> tuple[int, int]:
    """Rows and keys of one tile of the GPU kernel: powers of two that divide the mask's block."""
    rows, keys = mask_block
    row_bytes = head_size * element_size
    most = next((rows for size, rows in _ROWS_BY_BYTES if row_bytes <= size), 2 * _MIN_TILE)
    most_keys = _MAX_KEYS if row_bytes <= _ROWS_BY_BYTES[0][0] else _MAX_KEYS // 2
    return min(rows, most), min(keys & -keys, most_keys)


@dataclass(frozen=True, slots=True)
class PageRuns:
    """For each (query block, request in it): its run of logical pages, all (num_runs,).

    Pages `first` to `last` are visible to some row, `full_first` to `full_last` to every row of
    the query block (empty where `full_last < full_first`).
    """

    query_block: torch.Tensor
    request: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor
    full_first: torch.Tensor
    full_last: torch.Tensor


def visible_pages(
    starts: torch.Tensor,
    query_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    query_block: int,
    block_size: int,
    causal: bool,
    window: int,
) -> PageRuns:
    """Page runs of every query block; arguments are (num_reqs,) int64 on the host."""
    ends = starts + query_lens
    first_block, last_block = starts // query_block, (ends - 1) // query_block
    counts = last_block - first_block + 1
    request = torch.repeat_interleave(torch.arange(len(starts)), counts)
    block = torch.arange(len(request)) - (counts.cumsum(0) - counts - first_block)[request]
    rows_from = torch.maximum(starts[request], block * query_block)
    rows_to = torch.minimum(ends[request], (block + 1) * query_block)
    offset = (seq_lens - ends)[request]
    low, high = rows_from + offset, rows_to - 1 + offset  # positions of the first and last row
    seq_len = seq_lens[request]
    seen_to = high if causal else seq_len - 1
    all_see_to = low if causal else seq_len - 1
    seen_from = all_see_from = torch.zeros_like(low)
    if window:
        seen_from = (low - window + 1).clamp_min(0)
        all_see_from = (high - window + 1).clamp_min(0)
        if not causal:
            seen_to = torch.minimum(seen_to, high + window - 1)
            all_see_to = torch.minimum(all_see_to, low + window - 1)
    alone = rows_to - rows_from == torch.minimum(
        ends[-1] - block * query_block, torch.tensor(query_block)
    )
    full_last = (all_see_to + 1) // block_size - 1
    return PageRuns(
        query_block=block,
        request=request,
        first=seen_from // block_size,
        last=seen_to // block_size,
        full_first=-(-all_see_from // block_size),
        full_last=torch.where(alone, full_last, -1),
    )


def block_lists(
    runs: PageRuns, table: torch.Tensor, num_query_blocks: int, num_blocks: int
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Partially and fully visible physical blocks of each query block: (counts, indices) each."""
    counts = runs.last - runs.first + 1
    run = torch.repeat_interleave(torch.arange(len(counts)), counts)
    page = runs.first[run] + torch.arange(len(run)) - (counts.cumsum(0) - counts)[run]
    query_block, block = runs.query_block[run], table[runs.request[run], page]
    is_full = (page >= runs.full_first[run]) & (page <= runs.full_last[run])

    def ordered(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Requests of one query block may share pages: each only once.
        keys = torch.unique(query_block[chosen] * num_blocks + block[chosen])
        row = keys // num_blocks
        number = torch.bincount(row, minlength=num_query_blocks)
        column = torch.arange(len(row)) - (number.cumsum(0) - number)[row]
        indices = torch.zeros((num_query_blocks, num_blocks), dtype=torch.int32)
        indices[row, column] = (keys % num_blocks).int()
        return number, indices

    return ordered(~is_full), ordered(is_full)
