"""Which physical block holds which token: block tables and slot mappings.

Block 0 is the null block, as in vLLM: no request owns it, and block tables are padded with it. The
others are handed out in a seeded random order with some left over, so that a kernel which takes the
block table for `arange` reads memory that is not its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

NULL_BLOCK = 0


@dataclass(frozen=True, slots=True)
class BlockTable:
    """Where the tokens of a batch live.

    table: (num_reqs, max_num_blocks) int32 on the host, padded with `NULL_BLOCK`.
    num_blocks: physical blocks of the cache, the null block and the spare ones included.
    """

    table: torch.Tensor
    num_blocks: int
    block_size: int

    def slots(self, request: int, positions: torch.Tensor) -> torch.Tensor:
        """Slot (`block * block_size + offset`, int64) of each position of one request."""
        blocks = self.table[request].to(torch.int64)[positions // self.block_size]
        return blocks * self.block_size + positions % self.block_size


def shuffled_block_table(
    seq_lens: Sequence[int], block_size: int, num_shared: int, generator: torch.Generator
) -> BlockTable:
    """Physical blocks in random order for requests of `seq_lens` tokens.

    The first `num_shared` tokens (a multiple of `block_size`) of all requests are the same blocks.
    """
    shared_blocks = num_shared // block_size
    blocks_of = [-(-n // block_size) for n in seq_lens]
    used = shared_blocks + sum(n - shared_blocks for n in blocks_of)
    num_blocks = 1 + used + max(4, used // 16)
    in_order = torch.arange(1, used + 1)
    while True:
        order = torch.randperm(num_blocks - 1, generator=generator)[:used] + 1
        if used == 0 or not torch.equal(order, in_order):
            break
    table = torch.full((len(seq_lens), max([*blocks_of, 1])), NULL_BLOCK, dtype=torch.int32)
    taken = shared_blocks
    for request, count in enumerate(blocks_of):
        own = count - shared_blocks
        table[request, :shared_blocks] = order[:shared_blocks]
        table[request, shared_blocks:count] = order[taken : taken + own]
        taken += own
    return BlockTable(table, num_blocks, block_size)
