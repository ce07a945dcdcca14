"""Running softmax of a tile: (row_max, row_sum, acc), scores already times log2(e)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rescale(scores, row_max, row_sum, MASKED: tl.constexpr):
    """(probabilities, new row_max, new row_sum, factor by which the accumulator must shrink)."""
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    if MASKED:
        # A row that has seen no key yet: -inf - -inf would be NaN.
        offset = tl.where(new_max == float("-inf"), 0.0, new_max)
    else:
        offset = new_max
    probs = tl.exp2(scores - offset[:, None])
    shrink = tl.exp2(row_max - offset)
    return probs, new_max, row_sum * shrink + tl.sum(probs, 1), shrink
