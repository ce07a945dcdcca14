"""What of a step decides how long its attention takes, as a row of numbers.

Entries of at most `SHORT_QUERY` new tokens (decodes, drafts) are told apart from longer ones
(prompts and their chunks): kernels serve the two differently. Per step:

    short_reqs, short_tokens, short_reads, short_longest   how many, new tokens, cached and new
    long_reqs, long_tokens, long_reads, long_pairs         tokens read, pairs that attend
    long_tiles, long_tile_reads, long_longest              tiles of 128 new tokens, and their reads

`short_longest` against `short_reads / short_reqs` is the imbalance of the decodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from attnbench.traffic.latency_costs import LayerCosts, maxima, sums
from attnbench.traffic.types import Floats, Ints, StepBatches

SHORT_QUERY = 16
#: New tokens that a block of a kernel for prompts works on; a rest costs as much as a whole one.
TILE = 128
NAMES = (
    *("short_reqs", "short_tokens", "short_reads", "short_longest"),
    *("long_reqs", "long_tokens", "long_reads", "long_pairs"),
    *("long_tiles", "long_tile_reads", "long_longest"),
)
#: What a coordinate counts for: how many there are moves waves and splits, so it is told finely.
_SCALES = np.array([6.0, 0.5, 0.25, 3.0, 6.0, 0.25])
#: Pairs that take as long to multiply as one token takes to read, on a large accelerator.
_PAIRS_PER_READ = 64.0
_CHUNK_STEPS = 1 << 16


@dataclass(frozen=True, slots=True, eq=False)
class Batches:
    """Step batches without a clock, in the form of `StepBatches`: offsets, and their entries."""

    step_offsets: Ints
    query_len: Ints
    context_len: Ints

    def __len__(self) -> int:
        return len(self.step_offsets) - 1


def batches_of(steps: StepBatches) -> Batches:
    """The batches of a schedule."""
    return Batches(steps.step_offsets, steps.query_len, steps.context_len)


def features_of(batches: Batches, costs: LayerCosts) -> Floats:
    """(num_steps, len(NAMES)) features of one layer's attention."""
    rows = [np.zeros((0, len(NAMES)))]
    for first in range(0, len(batches), _CHUNK_STEPS):
        offsets = batches.step_offsets[first : first + _CHUNK_STEPS + 1]
        entries = slice(int(offsets[0]), int(offsets[-1]))
        query, context = batches.query_len[entries], batches.context_len[entries]
        rows.append(features_of_entries(offsets - offsets[0], query, context, costs))
    return np.concatenate(rows)


def features_of_entries(
    step_offsets: Ints, query_len: Ints, context_len: Ints, costs: LayerCosts
) -> Floats:
    """As `features_of`, all at once."""
    short = (query_len <= SHORT_QUERY).astype(np.int64)
    long = 1 - short
    reads = costs.tokens_read(query_len, context_len)
    tiles = long * -(-query_len // TILE)
    columns = (
        sums(short, step_offsets),
        sums(short * query_len, step_offsets),
        sums(short * reads, step_offsets),
        maxima(short * reads, step_offsets),
        sums(long, step_offsets),
        sums(long * query_len, step_offsets),
        sums(long * reads, step_offsets),
        sums(long * costs.pairs(query_len, context_len), step_offsets),
        sums(tiles, step_offsets),
        sums(tiles * reads, step_offsets),
        maxima(long * reads, step_offsets),
    )
    return np.stack([column.astype(np.float64) for column in columns], axis=1)


def coordinates(features: Floats) -> Floats:
    """(num_steps, 6) where a step lies, for distances: octaves of counts, lengths and imbalance.

    New short tokens, their mean context, the longest against it; long requests, their new tokens,
    the context of their pairs; the first three by the root of the short part's share of the
    step's work, the others by the root of the long part's.
    """
    short, tokens, reads, longest, long, new, long_reads, pairs, *_ = features.T
    mean = reads / np.maximum(short, 1)
    long_worth = long_reads + pairs / _PAIRS_PER_READ
    # A step that is nearly all prompt is told by its prompt, and the other way round.
    share = np.sqrt(reads / np.maximum(reads + long_worth, 1))
    other = np.sqrt(long_worth / np.maximum(reads + long_worth, 1))
    scales = np.stack((share, share, share, other, other, other), axis=1) * _SCALES
    place = np.stack(
        (
            np.log2(1 + tokens),
            np.log2(1 + mean),
            np.log2(np.maximum(longest, 1) / np.maximum(mean, 1)),
            np.log2(1 + long),
            np.log2(1 + new),
            np.log2(1 + np.maximum(pairs / np.maximum(new, 1), long_reads / np.maximum(long, 1))),
        ),
        axis=1,
    )
    return np.asarray(place * scales, dtype=np.float64)
