"""FLOPs and bytes of millions of requests at once: the formulas of `workload/cost.py` on arrays.

That module has the formulas with their sources; a test holds the two together, number by number.
"""

from __future__ import annotations

import numpy as np

from attnbench.errors import UsageError
from attnbench.traffic.types import Floats, Ints
from attnbench.workload import AttentionType, Workload
from attnbench.workload.cost import BYTES_PER_VALUE, DS_MLA_BYTES_PER_TOKEN
from attnbench.workload.text import DS_MLA


class LayerCosts:
    """What one attention layer costs, entry by entry.

    Args:
        layer: the layer, as a workload; its batch is not looked at.

    Raises:
        UsageError: not decoder attention, or a batch with random lengths or a common prefix, which
            a schedule's batches do not have.
    """

    def __init__(self, layer: Workload) -> None:
        if layer.attn_type is not AttentionType.DECODER:
            raise UsageError(f"{layer.text!r}: a schedule has decoder layers only; leave attn= out")
        if layer.lengths or layer.common_prefix_len:
            raise UsageError(
                f"{layer.text!r}: lengths come from the schedule; leave lengths= and prefix= out"
            )
        self.layer = layer
        shape = layer.shape
        self._window = layer.topk_tokens or shape.sliding_window
        self._width = BYTES_PER_VALUE[layer.dtype]
        if layer.resolved_kv_cache_dtype == DS_MLA:
            self._token_bytes = DS_MLA_BYTES_PER_TOKEN
        else:
            cached = BYTES_PER_VALUE[layer.resolved_kv_cache_dtype]
            values = shape.head_size
            if not shape.is_mla:
                values = shape.num_kv_heads * (shape.head_size + shape.v_head_size)
            self._token_bytes = values * cached
        expanded = shape.qk_nope_head_dim + shape.v_head_size
        self._up_projection = shape.kv_lora_rank * expanded if shape.is_mla else 0

    def pairs(self, query_len: Ints, context_len: Ints) -> Ints:
        """Pairs of a query and a key token that attend, per query head."""
        return self._causal_pairs(context_len + query_len) - self._causal_pairs(context_len)

    def tokens_read(self, query_len: Ints, context_len: Ints) -> Ints:
        """Tokens whose keys and values some query of the entry reads."""
        tokens = context_len + query_len
        pattern = self.layer.topk_pattern
        most: int | Ints
        if pattern == "prefix":
            most = self.layer.topk_tokens
        elif pattern == "random":
            most = self.pairs(query_len, context_len)
        elif self._window:
            most = query_len + (self._window - 1)
        else:
            return tokens
        return np.asarray(np.minimum(tokens, most), dtype=np.int64)

    def flops(self, query_len: Ints, context_len: Ints) -> Ints:
        """Floating-point operations of each entry in one layer."""
        shape = self.layer.shape
        pairs = self.pairs(query_len, context_len)
        if not shape.is_mla:
            return 2 * shape.num_heads * (shape.head_size + shape.v_head_size) * pairs
        absorbed = 2 * pairs * (shape.head_size + shape.kv_lora_rank)
        if self.layer.is_sparse:
            return shape.num_heads * absorbed
        expanded = 2 * pairs * (shape.qk_head_dim + shape.v_head_size)
        expanded += 2 * self.tokens_read(query_len, context_len) * self._up_projection
        return shape.num_heads * np.where(query_len == 1, absorbed, expanded)

    def bytes(self, query_len: Ints, context_len: Ints) -> Ints:
        """Bytes of each entry in one layer, without `expansion_bytes`."""
        shape = self.layer.shape
        sizes: int | Ints = shape.qk_head_dim + shape.v_head_size
        if shape.is_mla:
            absorbed = shape.head_size + shape.kv_lora_rank
            is_absorbed = self.layer.is_sparse | (query_len == 1)
            sizes = np.where(is_absorbed, absorbed, sizes)
        moved = query_len * sizes * (shape.num_heads * self._width)
        return moved + self.tokens_read(query_len, context_len) * self._token_bytes

    def expansion_bytes(self, query_len: Ints, step_offsets: Ints) -> Ints:
        """(num_steps,) weights of MLA's up-projection, read once by a step that needs them."""
        if not self._up_projection or self.layer.is_sparse:
            return np.zeros(len(step_offsets) - 1, dtype=np.int64)
        needed = sums((query_len > 1).astype(np.int64), step_offsets) > 0
        return needed * (self.layer.shape.num_heads * self._up_projection * self._width)

    def _causal_pairs(self, tokens: Ints) -> Ints:
        seen = np.minimum(tokens, self._window) if self._window else tokens
        return seen * (seen + 1) // 2 + (tokens - seen) * seen


def sums(values: Ints, step_offsets: Ints) -> Ints:
    """(num_steps,) sums over each step's entries; whole numbers, so in any order the same."""
    running = np.concatenate((np.zeros(1, dtype=np.int64), values.cumsum(dtype=np.int64)))
    return np.diff(running[step_offsets])


def maxima(values: Ints, step_offsets: Ints) -> Ints:
    """(num_steps,) maxima over each step's entries; every step has one."""
    if len(step_offsets) == 1:
        return np.zeros(0, dtype=np.int64)
    return np.maximum.reduceat(values, step_offsets[:-1])


def quantile(values: Floats, share: float, weights: Floats | None = None) -> float:
    """The value below which `share` of the weight lies (the nearest rank; NaN of nothing)."""
    if not len(values):
        return float("nan")
    if weights is None:
        rank = max(int(np.ceil(share * len(values))) - 1, 0)
        return float(np.partition(values, rank)[rank])
    order = np.argsort(values, kind="stable")
    running = weights[order].cumsum()
    return float(values[order][np.searchsorted(running, share * running[-1], side="left")])
