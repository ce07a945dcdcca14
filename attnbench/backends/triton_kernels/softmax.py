"""Running softmax of a tile: (row_max, row_sum, acc), in base 2."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rescale(scores, scale, row_max, row_sum, MASKED: tl.constexpr):
    """(probabilities, new row_max, new row_sum, factor by which the accumulator must shrink).

    `scores` times `scale` (of each row, positive; None: 1) is in base 2. It is applied to the
    maxima and within the exponent, where it costs no instruction of its own.
    """
    tile_max = tl.max(scores, 1)
    if scale is not None:
        tile_max = tile_max * scale
    new_max = tl.maximum(row_max, tile_max)
    if MASKED:
        # A row that has seen no key yet: -inf - -inf would be NaN.
        offset = tl.where(new_max == float("-inf"), 0.0, new_max)
    else:
        offset = new_max
    if scale is None:
        probs = tl.exp2(scores - offset[:, None])
    else:
        probs = tl.exp2(scores * scale[:, None] - offset[:, None])
    shrink = tl.exp2(row_max - offset)
    return probs, new_max, row_sum * shrink + tl.sum(probs, 1), shrink


@triton.jit
def fp16_factors(largest):
    """(factor, its inverse): powers of two that bring rows whose largest magnitude is `largest`
    near 2**10, so that in fp16 none overflows and what underflows is 2**-34 of the largest."""
    # 127 + log2 of the largest; at least 11, so that both factors are normal numbers.
    exponent = tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 11)
    factor = ((264 - exponent) << 23).to(tl.float32, bitcast=True)
    inverse = ((exponent - 10) << 23).to(tl.float32, bitcast=True)
    return factor, inverse
