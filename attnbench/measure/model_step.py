"""A step of a decoder with random weights, made of plain torch around our attention layers.

Llama's layer (RMSNorm, QKV, rotation, `Attention`, output projection, SwiGLU MLP) or DeepSeek's
(MLA's low-rank projections, `MLAAttention`, routed and shared experts), an embedding before and a
head behind, which sees the last token of each request. One rank's part: nothing is communicated.
Nothing is fused and no token is sampled, so what is around attention takes longer than in an engine
that compiles its model; metadata is built outside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn.functional import linear, rms_norm, silu

from attnbench.backends.batch import AttentionBatch
from attnbench.backends.check import OutputCheck, poison_
from attnbench.backends.device import Device
from attnbench.backends.kv_cache import allocate_kv_cache, fill_context
from attnbench.backends.registry import get_backend_class
from attnbench.errors import SelectionError
from attnbench.measure.model_truth import StepTruth, check_step
from attnbench.measure.model_weights import (
    NORM_EPS,
    ExpertWeights,
    LayerWeights,
    MLPWeights,
    StepWeights,
)
from attnbench.measure.plan import PlannedPoint
from attnbench.measure.prepare import graph_refusal
from attnbench.selection.layer import Attention, MLAAttention
from attnbench.store.record import Metric


class PreparedStep:
    """One step, ready: `attend` is the forward pass.

    Raises:
        SelectionError: `for_graph`, and the backend's metadata is not made for graphs of `batch`.
    """

    def __init__(
        self,
        planned: PlannedPoint,
        batch: AttentionBatch,
        weights: StepWeights,
        truth: StepTruth,
        device: Device,
        for_graph: bool = False,
    ) -> None:
        backend = get_backend_class(planned.backend)
        name = f"{planned.backend}:{planned.variant}".rstrip(":")
        self.batch, self.weights = batch, weights
        self._truth = truth
        self._for_graph = for_graph
        self.layers = [
            _DecoderLayer(batch, weights, number, name, device)
            for number in range(len(weights.layers))
        ]
        self._builder = backend.get_builder_cls()(
            batch.spec,
            [f"layers.{number}.attn" for number in range(len(self.layers))],
            batch.device,
            planned.variant,
        )
        if for_graph:
            query_lens = [request.query_len for request in batch.requests]
            if reason := graph_refusal(name, self._builder.cudagraph_support, query_lens):
                raise SelectionError(reason)
        self.logits = torch.empty(
            (len(weights.last_tokens), weights.sizes.vocab_size),
            dtype=batch.spec.dtype,
            device=batch.device,
        )
        self.metadata: Any = None
        self.build_metadata()

    def build_metadata(self) -> None:
        """Metadata of the batch, one for all layers."""
        if self._for_graph:
            self.metadata = self._builder.build_for_cudagraph_capture(self.batch.metadata)
        else:
            self.metadata = self._builder.build(0, self.batch.metadata)

    def attend(self) -> None:
        """The step. Its last product is written to `logits`, and each layer's attention kept."""
        weights, hidden = self.weights, self.weights.sizes.hidden_size
        residual = weights.embedding[weights.token_ids]
        for layer in self.layers:
            residual = layer(residual, self.metadata)
        last = rms_norm(residual[weights.last_tokens], (hidden,), eps=NORM_EPS)
        torch.mm(last, weights.head.t(), out=self.logits)

    def poison(self) -> None:
        """Fill what a step must write with values that no step writes."""
        for layer in self.layers:
            poison_(layer.attended)
        poison_(self.logits)

    def check(self) -> OutputCheck:
        """Every layer's attention and the logits, against the truth."""
        return check_step([layer.attended for layer in self.layers], self.logits, self._truth)

    def timed_calls(self) -> Mapping[Metric, Callable[[], object]]:
        """None: what is timed beside attention is timed with attention alone."""
        return {}


class _DecoderLayer:
    """One layer over its own KV cache, which holds its context."""

    def __init__(
        self,
        batch: AttentionBatch,
        weights: StepWeights,
        number: int,
        backend: str,
        device: Device,
    ) -> None:
        spec, shape = batch.spec, batch.shape
        self.batch, self.shape = batch, shape
        self.own: LayerWeights = weights.layers[number]
        self.rope = weights.rope[weights.positions]
        layout: dict[str, Any] = {
            "dtype": spec.dtype,
            "kv_cache_dtype": batch.workload.kv_cache_dtype,
            "block_size": spec.block_size,
            "backend": backend,
            "device": device,
        }
        self.attention: Attention | MLAAttention
        if shape.is_mla:
            self.attention = MLAAttention(shape, self.own.W_UK, self.own.W_UV, **layout)
        else:
            self.attention = Attention(
                shape,
                kv_cache_layout=spec.kv_cache_layout,
                alibi_slopes=batch.alibi_slopes,
                sinks=batch.sinks,
                **layout,
            )
        scales = batch.layer
        self.attention.to(batch.device).set_scales(
            q=scales._q_scale_float, k=scales._k_scale_float, v=scales._v_scale_float
        )
        self.attention.impl.process_weights_after_loading(spec.dtype)
        kind = self.attention.backend
        self.kv_cache = allocate_kv_cache(kind, spec, batch.num_blocks, batch.device)
        fill_context(weights.batch_of(batch, number), self.kv_cache, kind)
        self.attended = torch.empty(
            (len(batch.query), shape.num_heads, shape.v_head_size),
            dtype=spec.dtype,
            device=batch.device,
        )

    def __call__(self, residual: torch.Tensor, metadata: Any) -> torch.Tensor:
        """(num_tokens, hidden_size) in and out."""
        inner = self._mla if self.shape.is_mla else self._heads
        inner(_norm(residual), metadata)
        residual = residual + linear(self.attended.flatten(1), self.own.output)
        return residual + _feed_forward(_norm(residual), self.own.mlp)

    def _heads(self, hidden: torch.Tensor, metadata: Any) -> None:
        shape, tokens = self.shape, len(hidden)
        query = linear(hidden, self.own.query[0]).view(tokens, shape.num_heads, shape.head_size)
        cached = linear(hidden, self.own.cached).view(tokens, shape.num_kv_heads, -1)
        key, value = cached[..., : shape.head_size], cached[..., shape.head_size :]
        self.attention(
            _rotated(query, self.rope),
            _rotated(key, self.rope),
            value.contiguous(),
            self.kv_cache,
            metadata,
            self.batch.metadata.slot_mapping,
            self.attended,
        )

    def _mla(self, hidden: torch.Tensor, metadata: Any) -> None:
        shape, tokens = self.shape, len(hidden)
        query = linear(hidden, self.own.query[0])
        for matrix in self.own.query[1:]:
            query = linear(_norm(query), matrix)
        query = query.view(tokens, shape.num_heads, shape.qk_head_dim)
        nope, rope = query.tensor_split([shape.qk_nope_head_dim], dim=-1)
        cached = linear(hidden, self.own.cached)
        latent, k_pe = cached.tensor_split([shape.kv_lora_rank], dim=-1)
        self.attention(
            torch.cat([nope, _rotated(rope, self.rope)], dim=-1),
            _norm(latent),
            _rotated(k_pe[:, None], self.rope),
            self.kv_cache,
            metadata,
            self.batch.metadata.slot_mapping,
            self.attended,
        )


def _norm(hidden: torch.Tensor) -> torch.Tensor:
    return rms_norm(hidden, (hidden.shape[-1],), eps=NORM_EPS)


def _rotated(heads: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """(num_tokens, heads, width) turned by the tokens' angles, halves together, in float32."""
    cosines, sines = rope[:, None].chunk(2, dim=-1)
    first, second = heads.float().chunk(2, dim=-1)
    turned = [first * cosines - second * sines, second * cosines + first * sines]
    return torch.cat(turned, dim=-1).to(heads.dtype)


def _feed_forward(hidden: torch.Tensor, weights: MLPWeights | ExpertWeights) -> torch.Tensor:
    if isinstance(weights, MLPWeights):
        return linear(_gated(linear(hidden, weights.gate_up)), weights.down)
    found = _routed(hidden, weights)
    if weights.shared is not None:
        found = found + _feed_forward(hidden, weights.shared)
    return found


def _gated(both: torch.Tensor) -> torch.Tensor:
    gate, up = both.chunk(2, dim=-1)
    return silu(gate) * up


def _routed(hidden: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
    """The experts' part, tokens sorted by expert; no size depends on a value, so graphs may."""
    scores = torch.sigmoid(linear(hidden, weights.router).float())
    chosen = torch.topk(scores + weights.drawn, weights.per_token, dim=-1).indices
    shares = scores.gather(1, chosen)
    shares = (shares / shares.sum(-1, keepdim=True)).to(hidden.dtype)
    flat = chosen.flatten()
    order = torch.argsort(flat, stable=True)
    counts = torch.zeros(len(weights.gate_up), dtype=torch.int32, device=hidden.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
    ends = counts.cumsum(0, dtype=torch.int32)
    rows = hidden[order // weights.per_token]
    rows = _gated(_grouped(rows, weights.gate_up, ends)).contiguous()
    found = torch.empty_like(hidden[:1]).expand(len(flat), -1).contiguous()
    found[order] = _grouped(rows, weights.down, ends)
    parts = found.view(len(hidden), weights.per_token, -1)
    return torch.einsum("tkh,tk->th", parts, shares)


def _grouped(rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Rows up to `ends[e]` times matrix e. Public since torch 2.10."""
    product: Any = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    result: torch.Tensor = product(rows, weights, offs=ends)
    return result
