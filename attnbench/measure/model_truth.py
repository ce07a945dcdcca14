"""What a model step must give: the same weights in float64, computed another way.

Attention is the reference of single layers (`backends/reference.py`), over dense keys and values
that never saw a cache; experts are run one after the other. A kernel's own error says nothing of
how far the end of several layers may be off, so the truth is computed a second time, with every
product, norm and sum rounded to the dtype as an honest implementation rounds them. The rule is
that of `row_tolerance`, which flash-attention's tests have too: an output may be wrong by a small
multiple of the error of that emulation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from attnbench.backends.batch import AttentionBatch, roundings
from attnbench.backends.check import OutputCheck, row_tolerance
from attnbench.backends.dtypes import is_fp8, torch_dtype
from attnbench.backends.reference import reference_attention
from attnbench.backends.token_pool import TokenPool
from attnbench.measure.model_weights import NORM_EPS, ExpertWeights, MLPWeights, StepWeights

#: Times the emulation's worst row: two differ that round in another order.
_FACTOR = 3.0

Round = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Outputs:
    attended: tuple[torch.Tensor, ...]
    logits: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTruth:
    """Attention of each layer (num_tokens, num_heads, v_head_size), logits (num_reqs, vocab_size).

    All float64, on the batch's device; `tolerances`: of each layer's attention, then of the
    logits, the largest accepted error of a row relative to the row.
    """

    attended: tuple[torch.Tensor, ...]
    logits: torch.Tensor
    tolerances: tuple[float, ...]


def step_truth(batch: AttentionBatch, weights: StepWeights) -> StepTruth:
    """The outputs of a step of `weights` over `batch`, and how wrong others may be."""
    dtype = batch.spec.dtype
    exact = _forward(batch, weights, lambda x: x)
    honest = _forward(batch, weights, lambda x: x.to(dtype).double())
    least = row_tolerance(batch.workload.dtype, batch.workload.resolved_kv_cache_dtype)
    pairs = zip((*honest.attended, honest.logits), (*exact.attended, exact.logits), strict=True)
    tolerances = tuple(max(least, _FACTOR * _worst_row(got, want)[0]) for got, want in pairs)
    return StepTruth(attended=exact.attended, logits=exact.logits, tolerances=tolerances)


def check_step(
    attended: Sequence[torch.Tensor], logits: torch.Tensor, truth: StepTruth
) -> OutputCheck:
    """Compare a step's outputs with the truth, row by row; the first part that is wrong is named.

    A part that was not written is NaN, if it was poisoned before, and never passes.
    """
    worst = largest = 0.0
    wanted = (*truth.attended, truth.logits)
    for number, (got, want) in enumerate(zip((*attended, logits), wanted, strict=True)):
        where = "the logits" if number == len(attended) else f"attention of layer {number}"
        if not bool(torch.isfinite(got).all()):
            nowhere = float("nan")
            reason = f"not finite or not written in {where}"
            return OutputCheck(ok=False, max_abs_error=nowhere, rel_error=nowhere, reason=reason)
        error, row = _worst_row(got, want)
        largest = max(largest, float((got.double() - want).abs().max()))
        worst = max(worst, error)
        if error > truth.tolerances[number]:
            reason = (
                f"error {error:.3g} of the row's size exceeds {truth.tolerances[number]:.3g} in "
                f"{where}, row {row}"
            )
            return OutputCheck(ok=False, max_abs_error=largest, rel_error=error, reason=reason)
    return OutputCheck(ok=True, max_abs_error=largest, rel_error=worst, reason="")


def _worst_row(got: torch.Tensor, want: torch.Tensor) -> tuple[float, int]:
    """Largest relative error of a row (last dimension), and which; small rows count as larger."""
    size = want.norm(dim=-1).flatten()
    floor = 0.1 * float(size.square().mean().sqrt())
    error = (got.double() - want).norm(dim=-1).flatten() / size.clamp_min(max(floor, 1e-300))
    value, row = error.max(dim=0)
    return float(value), int(row)


def _forward(batch: AttentionBatch, weights: StepWeights, rounded: Round) -> _Outputs:
    """One pass in float64; `rounded` is applied wherever an implementation stores a result."""
    residual = weights.embedding[weights.token_ids].double()
    attended = []
    for number, layer in enumerate(weights.layers):
        hidden = _norm(residual, rounded)
        query, first, second = _projected(batch, weights, number, hidden, rounded)
        found = rounded(_attention(batch, weights, number, query, first, second))
        attended.append(found)
        residual = rounded(residual + rounded(found.flatten(1) @ layer.output.double().t()))
        hidden = _norm(residual, rounded)
        residual = rounded(residual + _feed_forward(hidden, layer.mlp, rounded))
    last = _norm(residual[weights.last_tokens], rounded)
    return _Outputs(tuple(attended), rounded(last @ weights.head.double().t()))


def _norm(hidden: torch.Tensor, rounded: Round) -> torch.Tensor:
    return rounded(hidden / (hidden.square().mean(-1, keepdim=True) + NORM_EPS).sqrt())


def _projected(
    batch: AttentionBatch, weights: StepWeights, number: int, hidden: torch.Tensor, rounded: Round
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, and what the cache gets: keys and values, or latents and rotary keys."""
    shape, layer, tokens = batch.shape, weights.layers[number], len(hidden)
    angles = weights.rope[weights.positions].double()

    def turned(heads: torch.Tensor) -> torch.Tensor:
        half = heads.shape[-1] // 2
        numbers = torch.complex(heads[..., :half], heads[..., half:])
        turns = torch.complex(angles[:, :half], angles[:, half:])[:, None]
        both = numbers * turns
        return rounded(torch.cat([both.real, both.imag], dim=-1))

    query = rounded(hidden @ layer.query[0].double().t())
    for matrix in layer.query[1:]:
        query = rounded(_norm(query, rounded) @ matrix.double().t())
    query = query.view(tokens, shape.num_heads, shape.qk_head_dim)
    cached = rounded(hidden @ layer.cached.double().t())
    if shape.is_mla:
        nope = shape.qk_nope_head_dim
        query = torch.cat([query[..., :nope], turned(query[..., nope:])], dim=-1)
        latent = _norm(cached[:, : shape.kv_lora_rank], rounded)
        return query, latent, turned(cached[:, None, shape.kv_lora_rank :])
    heads = cached.view(tokens, shape.num_kv_heads, -1)
    return turned(query), turned(heads[..., : shape.head_size]), heads[..., shape.head_size :]


def _attention(
    batch: AttentionBatch,
    weights: StepWeights,
    number: int,
    query: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
) -> torch.Tensor:
    """The reference over this layer's context and these new tokens, as the cache holds them."""
    context, layer = weights.contexts[number], weights.layers[number]
    if is_fp8(torch_dtype(batch.spec.kv_cache_dtype)):
        to_key, to_value = roundings(batch.spec, batch.layer)
        first, second = to_key(first), to_value(second)
    requests = torch.repeat_interleave(
        torch.arange(len(batch.requests), device=batch.device),
        torch.tensor([r.query_len for r in batch.requests], device=batch.device),
    )
    ids = context.ids(requests, weights.positions)
    tokens = replace(
        context,
        key_pool=_WithNew(context.key_pool, ids, first),
        value_pool=_WithNew(context.value_pool, ids, second),
    )
    own = replace(batch.layer, W_UK=layer.W_UK, W_UV=layer.W_UV)
    return reference_attention(replace(batch, query=query, tokens=tokens, layer=own)).output


class _WithNew(TokenPool):
    """A pool whose rows of the new tokens are the step's own."""

    def __init__(self, pool: TokenPool, ids: torch.Tensor, rows: torch.Tensor) -> None:
        self._pool = pool
        self._own = rows.double()
        self._place = torch.full((int(ids.max()) + 1,), -1, device=ids.device)
        self._place[ids] = torch.arange(len(ids), device=ids.device)

    def take(self, ids: torch.Tensor, heads: torch.Tensor | None = None) -> torch.Tensor:
        place = torch.where(
            ids < len(self._place), self._place[ids.clamp(max=len(self._place) - 1)], -1
        )
        there = place.clamp(min=0)
        old = self._pool.take(ids, heads).double()
        new = self._own[there] if heads is None else self._own[there, heads]
        is_new = place >= 0
        if heads is not None:
            is_new = is_new | torch.zeros_like(heads, dtype=torch.bool)
        return torch.where(is_new[(..., *(None,) * (old.dim() - is_new.dim()))], new, old)


def _feed_forward(
    hidden: torch.Tensor, weights: MLPWeights | ExpertWeights, rounded: Round
) -> torch.Tensor:
    if isinstance(weights, MLPWeights):
        gate_up = (weights.gate_up.double().t(), weights.down.double().t())
        return _swiglu(hidden, *gate_up, rounded)
    scores = torch.sigmoid(rounded(hidden @ weights.router.double().t()))
    chosen = weights.drawn > 0
    shares = rounded(scores * chosen / (scores * chosen).sum(-1, keepdim=True))
    found = torch.zeros_like(hidden)
    for expert in range(len(weights.gate_up)):
        tokens = chosen[:, expert].nonzero()[:, 0]
        if len(tokens):
            matrices = (weights.gate_up[expert].double(), weights.down[expert].double())
            part = _swiglu(hidden[tokens], *matrices, rounded)
            found[tokens] += part * shares[tokens, expert, None]
    found = rounded(found)
    if weights.shared is not None:
        found = rounded(found + _feed_forward(hidden, weights.shared, rounded))
    return found


def _swiglu(
    hidden: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, rounded: Round
) -> torch.Tensor:
    both = rounded(hidden @ gate_up)
    gate, up = both[:, : both.shape[1] // 2], both[:, both.shape[1] // 2 :]
    return rounded(rounded(rounded(gate * torch.sigmoid(gate)) * up) @ down)
