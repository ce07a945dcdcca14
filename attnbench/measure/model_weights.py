"""Random weights and inputs of a decoder, one rank's: what `model_step` runs and its truth checks.

Matrices are (out, in) and keep the variance of what passes through them; the query's are twice as
large, so that attention prefers some keys and a wrong one shows. The same seed on the same kind of
device gives the same numbers.

**Routing.** Which experts a token goes to is drawn: a score of 2 for `num_experts_per_token` of
them, different for each token and layer, is added to the router's own (0 to 1) before the top-k. A
model with random weights would send all tokens to few experts, a trained one spreads them; and the
choice is the same in every precision, so that an output can be checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from attnbench.backends.batch import AttentionBatch, context_tokens
from attnbench.backends.token_pool import BatchTokens, seeded_generator
from attnbench.workload import BatchSpec, Workload
from attnbench.workload.model import ModelSizes

ROPE_THETA = 10_000.0
NORM_EPS = 1e-5
_QUERY_GAIN = 2.0
_CHOSEN = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MLPWeights:
    """SwiGLU: gate and up (2 * width, hidden), down (hidden, width)."""

    gate_up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeights:
    """Routed experts.

    router (experts, hidden); drawn (num_tokens, experts) float32, added to the router's scores;
    gate_up (experts, hidden, 2 * width), down (experts, width, hidden), to be multiplied from the
    right; shared: None where there is none.
    """

    router: torch.Tensor
    drawn: torch.Tensor
    per_token: int
    gate_up: torch.Tensor
    down: torch.Tensor
    shared: MLPWeights | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One decoder layer.

    query: its projections one after the other, with a norm between where there are two. cached:
    to keys and values, (num_kv_heads * (head_size + v_head_size), hidden); MLA: to latent and
    rotary key, (kv_lora_rank + qk_rope_head_dim, hidden). W_UK and W_UV as `MLAAttention` takes
    them, empty without MLA.
    """

    query: tuple[torch.Tensor, ...]
    cached: torch.Tensor
    W_UK: torch.Tensor
    W_UV: torch.Tensor
    output: torch.Tensor
    mlp: MLPWeights | ExpertWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWeights:
    """A decoder and one batch of it.

    Attributes:
        embedding, head: (vocab_size, hidden_size).
        token_ids, positions: (num_tokens,) int64.
        last_tokens: (num_reqs,) int64, whose logits are computed.
        rope: (positions up to the longest, rotary width) float32: cosines, then sines.
        contexts: what each layer's cache holds before the step: other tokens for each.
    """

    sizes: ModelSizes
    layers: tuple[LayerWeights, ...]
    embedding: torch.Tensor
    head: torch.Tensor
    token_ids: torch.Tensor
    positions: torch.Tensor
    last_tokens: torch.Tensor
    rope: torch.Tensor
    contexts: tuple[BatchTokens, ...]

    def batch_of(self, batch: AttentionBatch, layer: int) -> AttentionBatch:
        """`batch` with the context of one layer."""
        return replace(batch, tokens=self.contexts[layer])


def make_weights(batch: AttentionBatch) -> StepWeights:
    """The model that `batch.workload` names, on the batch's device and in its dtype."""
    workload, shape, device = batch.workload, batch.shape, batch.device
    sizes = ModelSizes.parse(workload.model)
    draw = _Draw(batch)
    layers = tuple(_layer(draw, batch, sizes, number) for number in range(shape.num_layers))
    hidden, vocab = sizes.hidden_size, sizes.vocab_size
    ids = torch.randint(
        0, vocab, (len(batch.query),), generator=seeded_generator(workload.id, "token ids")
    )
    starts = batch.metadata.query_start_loc_cpu.long()
    positions = torch.cat(
        [torch.arange(r.seq_len - r.query_len, r.seq_len) for r in batch.requests]
    )
    width = shape.qk_rope_head_dim if shape.is_mla else shape.head_size
    return StepWeights(
        sizes=sizes,
        layers=layers,
        embedding=draw((vocab, hidden), 1.0),
        head=draw((vocab, hidden), hidden**-0.5),
        token_ids=ids.to(device),
        positions=positions.to(device),
        last_tokens=(starts[1:] - 1).to(device),
        rope=_rope(max(r.seq_len for r in batch.requests), width).to(device),
        contexts=_contexts(batch),
    )


class _Draw:
    """Normal numbers in the workload's dtype, one generator for all."""

    def __init__(self, batch: AttentionBatch) -> None:
        self.device = batch.device
        self.dtype = batch.spec.dtype
        self._generator = torch.Generator(device=batch.device).manual_seed(batch.workload.seed)

    def __call__(self, size: Sequence[int], std: float) -> torch.Tensor:
        new = torch.empty(tuple(size), dtype=self.dtype, device=self.device)
        return new.normal_(0.0, std, generator=self._generator)

    def matrix(self, rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        return self((rows, columns), gain * columns**-0.5)


def _layer(draw: _Draw, batch: AttentionBatch, sizes: ModelSizes, number: int) -> LayerWeights:
    shape, hidden = batch.shape, sizes.hidden_size
    queries = shape.num_heads * shape.qk_head_dim
    if sizes.q_lora_rank:
        first = draw.matrix(sizes.q_lora_rank, hidden)
        query: tuple[torch.Tensor, ...] = (
            first,
            draw.matrix(queries, sizes.q_lora_rank, _QUERY_GAIN),
        )
    else:
        query = (draw.matrix(queries, hidden, _QUERY_GAIN),)
    cached, heads = shape.num_kv_heads * (shape.head_size + shape.v_head_size), 0
    if shape.is_mla:
        cached, heads = shape.head_size, shape.num_heads
    rank = shape.kv_lora_rank
    return LayerWeights(
        query=query,
        cached=draw.matrix(cached, hidden),
        W_UK=draw((heads, shape.qk_nope_head_dim, rank), max(rank, 1) ** -0.5),
        W_UV=draw((heads, rank, shape.v_head_size), max(rank, 1) ** -0.5),
        output=draw.matrix(hidden, shape.num_heads * shape.v_head_size),
        mlp=_experts(draw, batch, sizes, number)
        if sizes.has_experts(number)
        else _mlp(draw, hidden, sizes.intermediate_size),
    )


def _mlp(draw: _Draw, hidden: int, width: int) -> MLPWeights:
    return MLPWeights(gate_up=draw.matrix(2 * width, hidden), down=draw.matrix(hidden, width))


def _experts(draw: _Draw, batch: AttentionBatch, sizes: ModelSizes, number: int) -> ExpertWeights:
    hidden, width, count = sizes.hidden_size, sizes.moe_intermediate_size, sizes.num_experts
    shared = sizes.shared_intermediate_size
    return ExpertWeights(
        router=draw.matrix(count, hidden),
        drawn=_routes(batch, sizes, number),
        per_token=sizes.num_experts_per_token,
        gate_up=draw((count, hidden, 2 * width), hidden**-0.5),
        down=draw((count, width, hidden), width**-0.5),
        shared=_mlp(draw, hidden, shared) if shared else None,
    )


def _routes(batch: AttentionBatch, sizes: ModelSizes, number: int) -> torch.Tensor:
    """(num_tokens, experts): 2 for the experts a token goes to, 0 for the others."""
    generator = seeded_generator(batch.workload.id, "routes", str(number))
    order = torch.rand((len(batch.query), sizes.num_experts), generator=generator).argsort(1)
    drawn = torch.zeros(order.shape)
    drawn.scatter_(1, order[:, : sizes.num_experts_per_token], _CHOSEN)
    return drawn.to(batch.device)


def _rope(num_positions: int, width: int) -> torch.Tensor:
    """(num_positions, width): cosines of half of the width, then sines (Su et al., 2104.09864)."""
    speeds = ROPE_THETA ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(num_positions, dtype=torch.float64)[:, None] * speeds
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


def _contexts(batch: AttentionBatch) -> tuple[BatchTokens, ...]:
    workload = batch.workload
    alike: Workload = workload.replace(batch_spec=BatchSpec(workload.requests), lengths="")
    found = []
    for number in range(workload.shape.num_layers):
        # A layer that read another's cache would be wrong.
        other = alike.replace(seed=(workload.seed + 1 + number) % (1 << 62))
        found.append(context_tokens(other, batch))
    return tuple(found)
