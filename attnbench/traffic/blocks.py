"""KV-cache blocks by the rules of vLLM v1: a pool, its free queue, and the prefix cache on top.

Followed: `v1/core/block_pool.py`, `v1/core/single_type_kv_cache_manager.py` (full attention) of
vLLM 0.22.1. Every running request has a slot, a row of the block table. Where no block can ever be
found again (`BlockCounter`) only their number matters; `PrefixBlockPool` knows each one.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

from attnbench.traffic.types import Ints, Trace

Element = TypeVar("Element", bound=np.generic)

UNLIMITED = 1 << 62
_NONE: Ints = np.empty(0, dtype=np.int64)


class BlockCounter:
    """A pool without a prefix cache: blocks are all alike."""

    tracks_blocks = False

    def __init__(self, num_usable: int) -> None:
        self.num_usable = num_usable
        self.num_free = num_usable

    @property
    def num_used(self) -> int:
        return self.num_usable - self.num_free

    def place(self, slots: Ints, columns: Ints) -> None:
        """Give the slots' rows a new block each at these columns, in order; they must be free."""
        self.num_free -= len(slots)

    def take(self, count: int) -> None:
        """What `place` does where nobody asks which blocks they were."""
        self.num_free -= count

    def release(self, slot: int, num_blocks: int) -> None:
        """Give up a row's blocks, the last one first."""
        self.num_free += num_blocks

    def find(self, request: int, num_tokens: int) -> Ints:
        """The cached blocks that hold the request's first tokens, at most so many tokens."""
        return _NONE

    def num_idle(self, blocks: Ints) -> int:
        """How many of these are in no running request, so that using them takes from the free."""
        return 0

    def adopt(self, slot: int, blocks: Ints) -> None:
        """Make found blocks the row's first ones."""

    def commit(self, request: int, slot: int, first: int, end: int) -> None:
        """Let others find the row's blocks `first:end`, whose tokens are computed from here on."""

    def remember(self, request: int, slot: int, num_blocks: int) -> None:
        """Let the request itself find its first full blocks again, before it is preempted."""

    def num_shared_blocks(self, requests: Ints) -> Ints:
        """Blocks of each request's prompt that another request of the trace may use."""
        return np.zeros(len(requests), dtype=np.int64)


class PrefixBlockPool(BlockCounter):
    """A pool that knows its blocks: shared by reference count, cached while free, evicted LRU.

    A block's key stands for the contents of all tokens up to its end. Keys of prompt blocks that
    several requests begin with come from the trace's `hash_ids`; every other block can only be
    found again by its own request after a preemption, and gets a key then.

    Args:
        num_usable: blocks that can be in use.
        trace: whose `hash_ids` say what is shared.
        block_size: tokens of a block.
        num_slots, max_blocks: shape of the block table.
        drops_last_hit: compute the last found block again.
    """

    tracks_blocks = True

    def __init__(
        self,
        num_usable: int,
        trace: Trace,
        block_size: int,
        num_slots: int,
        max_blocks: int,
        drops_last_hit: bool = False,
    ) -> None:
        super().__init__(num_usable)
        self._block_size = block_size
        self._drops_last_hit = drops_last_hit
        self._prefixes = SharedPrefixes(trace, block_size)
        self._num_blocks_of = -(-(trace.input_tokens + trace.output_tokens) // block_size)
        self._table = np.empty((num_slots, max_blocks), dtype=np.int64)
        self._block_of = np.full(self._prefixes.num_keys, -1, dtype=np.int32)
        self._duplicates: dict[int, list[int]] = {}
        self._own_keys: dict[int, int] = {}
        self._next_key = self._prefixes.num_keys
        # Blocks never used so far come first, in order; then those given back, oldest first. An
        # entry of the queue counts only while it is its block's latest place: taking a block out
        # of the middle is then one write.
        self._num_touched = 0
        size = min(num_usable, 1024)
        self._references = np.zeros(size, dtype=np.int32)
        self._key = np.full(size, -1, dtype=np.int64)
        self._place = np.full(size, -1, dtype=np.int64)
        self._queue = np.empty(2 * size, dtype=np.int64)
        self._head = 0
        self._tail = 0

    def place(self, slots: Ints, columns: Ints) -> None:
        if not len(slots):
            return
        blocks = self._pop(len(slots))
        self._references[blocks] = 1
        self._table[slots, columns] = blocks

    def release(self, slot: int, num_blocks: int) -> None:
        blocks = self._table[slot, :num_blocks][::-1]
        self._references[blocks] -= 1
        free = blocks[self._references[blocks] == 0]
        self._push(free)
        self.num_free += len(free)

    def find(self, request: int, num_tokens: int) -> Ints:
        keys = self._keys_of(request, num_tokens // self._block_size)
        blocks = self._block_of[keys].astype(np.int64)
        misses = np.flatnonzero(blocks < 0)
        if len(misses):
            blocks = blocks[: misses[0]]
        return blocks[:-1] if self._drops_last_hit else blocks

    def num_idle(self, blocks: Ints) -> int:
        return int(np.count_nonzero(self._references[blocks] == 0))

    def adopt(self, slot: int, blocks: Ints) -> None:
        idle = blocks[self._references[blocks] == 0]
        self._place[idle] = -1
        self.num_free -= len(idle)
        self._references[blocks] += 1
        self._table[slot, : len(blocks)] = blocks

    def commit(self, request: int, slot: int, first: int, end: int) -> None:
        keys = self._prefixes.keys(request, end)[first:]
        self._insert(self._table[slot, first:end], keys)

    def remember(self, request: int, slot: int, num_blocks: int) -> None:
        first = int(self._prefixes.num_blocks[request])
        if num_blocks <= first:
            return
        if request not in self._own_keys:
            self._own_keys[request] = self._next_key
            self._next_key += int(self._num_blocks_of[request]) - first
            self._block_of = _grown(self._block_of, self._next_key, -1)
        start = self._own_keys[request]
        keys = np.arange(start, start + num_blocks - first, dtype=np.int64)
        blocks = self._table[slot, first:num_blocks]
        new = self._key[blocks] != keys
        self._insert(blocks[new], keys[new])

    def num_shared_blocks(self, requests: Ints) -> Ints:
        return self._prefixes.num_blocks[requests]

    def _keys_of(self, request: int, num_blocks: int) -> Ints:
        shared = self._prefixes.keys(request, num_blocks)
        start = self._own_keys.get(request)
        if start is None or len(shared) >= num_blocks:
            return shared
        own = np.arange(start, start + num_blocks - len(shared), dtype=np.int64)
        return np.concatenate((shared, own))

    def _insert(self, blocks: Ints, keys: Ints) -> None:
        self._key[blocks] = keys
        taken = self._block_of[keys] >= 0
        if taken.any():
            # A block is not replaced by an equal one; the one cached first is found first.
            for key, block in zip(keys[taken].tolist(), blocks[taken].tolist(), strict=True):
                self._duplicates.setdefault(key, []).append(block)
            blocks, keys = blocks[~taken], keys[~taken]
        self._block_of[keys] = blocks

    def _evict(self, blocks: Ints) -> None:
        keys = self._key[blocks]
        cached = keys >= 0
        if not cached.any():
            return
        blocks, keys = blocks[cached], keys[cached]
        self._key[blocks] = -1
        if not self._duplicates:
            self._block_of[keys] = -1
            return
        for key, block in zip(keys.tolist(), blocks.tolist(), strict=True):
            others = self._duplicates.get(key)
            if others is None:
                self._block_of[key] = -1
                continue
            if self._block_of[key] == block:
                self._block_of[key] = others.pop(0)
            else:
                others.remove(block)
            if not others:
                del self._duplicates[key]

    def _pop(self, count: int) -> Ints:
        """The next free blocks, no longer cached; there must be so many."""
        self.num_free -= count
        num_fresh = min(count, self.num_usable - self._num_touched)
        fresh = np.arange(self._num_touched, self._num_touched + num_fresh, dtype=np.int64)
        self._num_touched += num_fresh
        if num_fresh:
            self._references = _grown(self._references, self._num_touched, 0)
            self._key = _grown(self._key, self._num_touched, -1)
            self._place = _grown(self._place, self._num_touched, -1)
        if num_fresh == count:
            return fresh
        parts = [fresh]
        left = count - num_fresh
        while left:
            if self._head == self._tail:
                raise RuntimeError(f"{left} of {self.num_free + count} free blocks are not queued")
            end = min(self._head + 2 * left + 16, self._tail)
            blocks = self._queue[self._head : end]
            here = np.flatnonzero(
                self._place[blocks] == np.arange(self._head, end, dtype=np.int64)
            )[:left]
            parts.append(blocks[here])
            left -= len(here)
            # Entries passed over are stale for good; those after the last one taken are kept.
            self._head = self._head + int(here[-1]) + 1 if not left else end
        found = np.concatenate(parts[1:])
        self._place[found] = -1
        self._evict(found)
        return np.concatenate((fresh, found)) if num_fresh else found

    def _push(self, blocks: Ints) -> None:
        count = len(blocks)
        if self._tail + count > len(self._queue):
            live = self._queue[self._head : self._tail]
            live = live[self._place[live] == np.arange(self._head, self._tail, dtype=np.int64)]
            queue = np.empty(max(4 * (len(live) + count), 1024), dtype=np.int64)
            queue[: len(live)] = live
            self._place[live] = np.arange(len(live), dtype=np.int64)
            self._queue, self._head, self._tail = queue, 0, len(live)
        self._queue[self._tail : self._tail + count] = blocks
        self._place[blocks] = np.arange(self._tail, self._tail + count, dtype=np.int64)
        self._tail += count


class SharedPrefixes:
    """What the requests of a trace have in common at their beginnings, in blocks.

    Attributes:
        num_keys: keys are 0 to this, exclusive; the same key, the same tokens up to there.
        num_blocks: (num_requests,) full blocks of each prompt that another prompt begins with too.
    """

    def __init__(self, trace: Trace, block_size: int) -> None:
        self._block_size = block_size
        self._hash_tokens = max(trace.hash_block_tokens, 1)
        # Block ends inside the tokens of one id: at most so many.
        self._per_node = -(-self._hash_tokens // block_size)
        if not trace.has_prefixes:
            self.num_keys = 0
            self.num_blocks: Ints = np.zeros(len(trace), dtype=np.int64)
            return
        self._offsets = trace.hash_offsets
        self._nodes, depths, num_nodes = _shared_nodes(trace.hash_offsets, trace.hash_ids)
        covered = np.minimum(depths * self._hash_tokens, trace.input_tokens)
        self.num_blocks = covered // block_size
        self.num_keys = num_nodes * self._per_node

    def keys(self, request: int, num_blocks: int) -> Ints:
        """The keys of the request's first blocks, as many of them as are shared."""
        count = min(int(self.num_blocks[request]), num_blocks)
        if count <= 0:
            return _NONE
        block = np.arange(count, dtype=np.int64)
        # The id that a block ends in decides it: it stands for everything before it as well.
        depth = ((block + 1) * self._block_size - 1) // self._hash_tokens
        first = depth * self._hash_tokens // self._block_size
        nodes = self._nodes[int(self._offsets[request]) + depth]
        return np.asarray(nodes * self._per_node + (block - first), dtype=np.int64)


def _shared_nodes(offsets: Ints, ids: Ints) -> tuple[Ints, Ints, int]:
    """Number the beginnings that two or more requests have in common.

    Returns:
        (num_ids,) the number of each id's beginning, meaningless beyond the request's depth;
        (num_requests,) how many ids of each request are in common; how many numbers there are.
    """
    nodes = np.full(len(ids), -1, dtype=np.int64)
    lengths = np.diff(offsets)
    depths = np.zeros(len(lengths), dtype=np.int64)
    parents = np.zeros(len(lengths), dtype=np.int64)
    alive = np.arange(len(lengths), dtype=np.int64)
    next_node = 0
    level = 0
    while True:
        alive = alive[lengths[alive] > level]
        if not len(alive):
            return nodes, depths, next_node
        at = offsets[alive] + level
        order = np.lexsort((ids[at], parents[alive]))
        sorted_ids, sorted_parents = ids[at][order], parents[alive][order]
        first = np.ones(len(order), dtype=np.bool_)
        first[1:] = (np.diff(sorted_ids) != 0) | (np.diff(sorted_parents) != 0)
        group = np.cumsum(first) - 1
        shared = np.bincount(group)[group] > 1
        numbers = np.cumsum(first & shared) - 1 + next_node
        # Whoever is alone from here on has nothing in common with anybody further down either.
        order, numbers = order[shared], numbers[shared]
        next_node = int(numbers[-1]) + 1 if len(numbers) else next_node
        nodes[at[order]] = numbers
        alive = alive[order]
        parents[alive] = numbers
        level += 1
        depths[alive] = level


def _grown(array: npt.NDArray[Element], size: int, fill: int) -> npt.NDArray[Element]:
    if size <= len(array):
        return array
    larger = np.full(max(size, 2 * len(array)), fill, dtype=array.dtype)
    larger[: len(array)] = array
    return larger
