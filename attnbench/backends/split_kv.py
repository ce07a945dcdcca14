"""The plan of a split-KV decode: which pages of which request are worked on together.

The keys of each request are cut into splits of whole pages. Splits of any requests are worked on
side by side in tiles that fit the cache, longest first, so that neither a long request nor a ragged
batch leaves the machine idle; the partial results merge by LSE.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnbench.backends.masks import additive, visible

#: Keys of one split. Enough to amortise a call; few enough that one long request is many splits.
SPLIT_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitTile:
    """Splits `first` to `last` (in plan order), worked on together.

    pages: (num_splits, pages) int64 physical blocks; a shorter split repeats its last page.
    mask: (num_splits, 1, query_len, keys) float32, or None where all is visible.
    distance: (num_splits, query_len, keys) float32, |query - key|, if asked for.
    """

    first: int
    last: int
    pages: torch.Tensor
    mask: torch.Tensor | None
    distance: torch.Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitPlan:
    """Requests with `query_len` new tokens each.

    token_index: (num_reqs, query_len) rows of the query.
    owner, rank: (num_splits,): whose split it is (row of `token_index`), and which of its splits.
    max_pages: pages of the widest tile times its splits: what a scratch must hold.
    """

    query_len: int
    token_index: torch.Tensor
    owner: torch.Tensor
    rank: torch.Tensor
    num_ranks: int
    max_pages: int
    tiles: tuple[SplitTile, ...]


def plan_splits(
    token_index: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
    causal: bool,
    window: int,
    tile_pages: int,
    with_distance: bool = False,
) -> SplitPlan:
    """Plan for requests of one query length.

    Args:
        token_index: (num_reqs, query_len) rows of the query.
        seq_lens: (num_reqs,) keys of each request.
        block_table: (num_reqs, max_num_blocks).
        tile_pages: pages a tile may hold (one split is always allowed).
    """
    query_len = token_index.shape[1]
    seq_lens = seq_lens.long()
    first_key = torch.zeros_like(seq_lens)
    if window and causal:
        first_key = (seq_lens - query_len - window + 1).clamp_min(0)
    split_pages = max(1, SPLIT_TOKENS // block_size)
    first_block, end_block = first_key // block_size, -(-seq_lens // block_size)
    counts = -(-(end_block - first_block) // split_pages)
    owner = torch.repeat_interleave(torch.arange(len(seq_lens)), counts)
    rank = torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]
    start = first_block[owner] + rank * split_pages
    pages = (end_block[owner] - start).clamp_max(split_pages)
    order = torch.argsort(pages, descending=True, stable=True)
    owner, rank, start, pages = (x[order] for x in (owner, rank, start, pages))
    # Splits that need no mask: every query of the request sees every key of the split.
    query_limit = seq_lens - (query_len if causal else 1)
    whole = (start + pages) * block_size - 1 <= query_limit[owner]
    if window:
        whole &= start * block_size > seq_lens[owner] - 1 - window
        if not causal:
            whole &= query_len <= window
    tiles = []
    for first, last in _tiles(pages.tolist(), tile_pages):
        width = int(pages[first])
        mine, begin = owner[first:last], start[first:last, None]
        columns = torch.minimum(begin + torch.arange(width), end_block[mine][:, None] - 1)
        mask = distance = None
        if with_distance or not bool((whole[first:last] & (pages[first:last] == width)).all()):
            key_positions = begin * block_size + torch.arange(width * block_size)
            query_positions = (seq_lens[mine] - query_len)[:, None] + torch.arange(query_len)
            ends = (start + pages)[first:last] * block_size
            exists = key_positions < torch.minimum(ends, seq_lens[mine])[:, None]
            seen = visible(query_positions, key_positions, causal, window) & exists[:, None]
            mask = additive(seen)[:, None]
            if with_distance:
                distance = (query_positions[:, :, None] - key_positions[:, None]).abs().float()
        tiles.append(
            SplitTile(
                first=first,
                last=last,
                pages=block_table[mine[:, None], columns].long(),
                mask=mask,
                distance=distance,
            )
        )
    return SplitPlan(
        query_len=query_len,
        token_index=token_index,
        owner=owner,
        rank=rank,
        num_ranks=int(counts.max()),
        max_pages=max(t.pages.numel() for t in tiles),
        tiles=tuple(tiles),
    )


def _tiles(pages: list[int], tile_pages: int) -> list[tuple[int, int]]:
    """Cut splits (their pages, descending) into tiles: full, and without much padding."""
    tiles, first = [], 0
    while first < len(pages):
        width = pages[first]
        last = min(len(pages), first + max(1, tile_pages // width))
        while pages[last - 1] * 2 < width:
            last -= 1
        tiles.append((first, last))
        first = last
    return tiles
