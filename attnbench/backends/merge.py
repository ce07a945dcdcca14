"""Partial softmax states over parts of the keys, and how they merge.

A state over some keys is `(max, denominator, accumulator)`: the largest logit `m`, the sum of
`exp(logit - m)` and the sum of `exp(logit - m) * value`. Merging is associative and commutative, so
keys may be split anywhere, worked on in any order and merged in any order: split-KV decode
(Flash-Decoding), chunked online softmax (M. Milakov, N. Gimelshein, arXiv:1805.02867) and cascade
attention over a shared prefix are all this. A part without visible keys is the neutral element:
`max = -inf`, denominator and accumulator zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import torch


@dataclass(frozen=True, slots=True)
class PartialState:
    """Softmax attention over a part of the keys.

    max: (...,) largest logit, -inf where no key is visible.
    denominator: (...,) sum of `exp(logit - max)`.
    accumulator: (..., v_head_size) sum of `exp(logit - max) * value`.
    """

    max: torch.Tensor
    denominator: torch.Tensor
    accumulator: torch.Tensor

    @classmethod
    def from_logits(cls, logits: torch.Tensor, value: torch.Tensor) -> PartialState:
        """State over the keys of `logits` (..., keys), -inf where hidden; value (keys, size)."""
        if logits.shape[-1] == 0:
            top = logits.new_full(logits.shape[:-1], float("-inf"))
        else:
            top = logits.amax(dim=-1)
        weights = torch.exp(logits - _finite(top)[..., None])
        return cls(top, weights.sum(dim=-1), weights @ value)

    @classmethod
    def from_output(cls, output: torch.Tensor, lse: torch.Tensor) -> PartialState:
        """State of a finished part: its normalised output (..., size) and its LSE (...,)."""
        denominator = torch.where(lse == float("-inf"), 0.0, 1.0).to(output.dtype)
        seen = denominator[..., None] > 0
        return cls(lse, denominator, torch.where(seen, output, 0.0))

    @classmethod
    def from_sink(cls, sink: torch.Tensor, like: PartialState) -> PartialState:
        """A sink's extra logit: weight in the denominator, nothing in the numerator."""
        top = sink.to(like.max.dtype).expand_as(like.max)
        return cls(top, torch.ones_like(top), torch.zeros_like(like.accumulator))

    def merge(self, other: PartialState) -> PartialState:
        """The state over the keys of both."""
        top = torch.maximum(self.max, other.max)
        finite = _finite(top)
        mine, others = torch.exp(self.max - finite), torch.exp(other.max - finite)
        return PartialState(
            top,
            self.denominator * mine + other.denominator * others,
            self.accumulator * mine[..., None] + other.accumulator * others[..., None],
        )

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Output (..., size) and LSE (...,). No visible key at all: zeros and -inf."""
        seen = self.denominator > 0
        safe = torch.where(seen, self.denominator, 1.0)
        output = self.accumulator / safe[..., None]
        lse = torch.where(seen, self.max + torch.log(safe), float("-inf"))
        return output, lse


def merge_all(states: Iterable[PartialState]) -> PartialState:
    """All states merged, left to right; any order gives the same up to rounding."""
    return reduce(PartialState.merge, states)


def merge_attn_states(
    prefix_output: torch.Tensor,
    prefix_lse: torch.Tensor,
    suffix_output: torch.Tensor,
    suffix_lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cascade attention: a shared prefix and each request's rest, merged by LSE.

    Outputs (..., v_head_size), LSEs (...,) natural log. Returns the whole's output and LSE.
    """
    prefix = PartialState.from_output(prefix_output, prefix_lse)
    return prefix.merge(PartialState.from_output(suffix_output, suffix_lse)).finish()


def _finite(top: torch.Tensor) -> torch.Tensor:
    """`top` with -inf replaced by 0: `exp(-inf - 0)` is 0 where `exp(-inf - -inf)` is NaN."""
    return torch.where(top == float("-inf"), 0.0, top)
