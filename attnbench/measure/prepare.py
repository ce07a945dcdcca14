"""Everything a timed call needs, made before the clock starts: inputs, cache, metadata, output."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, Self

import torch

from attnbench.backends.abstract import AttentionBackend
from attnbench.backends.batch import AttentionBatch
from attnbench.backends.builder import AttentionCGSupport, AttentionMetadataBuilder
from attnbench.backends.check import poison_
from attnbench.backends.kv_cache import allocate_kv_cache, fill_context
from attnbench.backends.registry import get_backend_class
from attnbench.errors import SelectionError
from attnbench.measure.plan import PlannedPoint
from attnbench.store.record import Metric
from attnbench.workload import AttentionType


class TimedPoint(Protocol):
    """What is timed: one layer's attention, or a whole step of a model."""

    batch: AttentionBatch

    def build_metadata(self) -> None: ...
    def attend(self) -> None: ...
    def poison(self) -> None:
        """Fill the output, and an LSE that is there, with values no kernel writes."""
        ...

    def timed_calls(self) -> Mapping[Metric, Callable[[], object]]:
        """What to time besides `attend`, by metric."""
        ...


class PreparedPoint(TimedPoint, Protocol):
    """One layer's point, ready: each method is one call of the engine's step for one layer."""

    kv_cache: torch.Tensor

    def output(self) -> torch.Tensor:
        """(num_tokens, num_heads, v_head_size), to compare with the reference."""
        ...

    def lse(self) -> torch.Tensor | None:
        """(n, num_heads) of the first n tokens that the last `attend` returned; None: none."""
        ...

    def twin(self) -> Self:
        """The same point over its own copy of every tensor a call reads or writes."""
        ...

    def next_step(self, batch: AttentionBatch) -> Self:
        """The engine's next step: another batch over the same cache, which gets its new tokens."""
        ...

    @property
    def twin_bytes(self) -> int:
        """Memory of a twin, but for its metadata."""
        ...


def prepare(planned: PlannedPoint, batch: AttentionBatch, for_graph: bool = False) -> PreparedPoint:
    """Allocate and fill what `planned` needs. New tokens are in the cache when this returns.

    Args:
        for_graph: the calls are to be captured in a CUDA graph: metadata is built as an engine
            builds it for its capture, in memory that stays, and without a pass for a shared prefix.

    Raises:
        SelectionError: `for_graph`, and the backend's metadata is not made for graphs of `batch`.
    """
    backend = get_backend_class(planned.backend)
    if planned.workload.shape.is_mla:
        return _PreparedMLA(planned, batch, backend, for_graph)
    return _PreparedAttention(planned, batch, backend, for_graph)


#: What each kind of support stands for, where it does not cover a batch.
_CAPTURED = {
    AttentionCGSupport.NEVER: "no batches",
    AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE: "batches of one new token per request only",
    AttentionCGSupport.UNIFORM_BATCH: "batches of one query length only",
}


def graph_refusal(name: str, support: AttentionCGSupport, query_lens: Sequence[int]) -> str | None:
    """Why calls of backend `name` over such a batch are not captured; None: they may be."""
    if support.covers(query_lens):
        return None
    lens = sorted(set(query_lens))
    has = f"{lens[0]} to {lens[-1]}" if len(lens) > 1 else f"{lens[0]}"
    return (
        f"{name} builds metadata for CUDA graphs of {_CAPTURED[support]}, this one has "
        f"{has} new tokens per request; use --timer event"
    )


class _Prepared:
    """What ordinary and latent attention share: builder, impl, cache, metadata."""

    def __init__(
        self,
        planned: PlannedPoint,
        batch: AttentionBatch,
        backend: type[AttentionBackend],
        for_graph: bool,
    ) -> None:
        workload = planned.workload
        self.workload = workload
        self.batch = batch
        self.device = batch.query.device
        self.for_graph = for_graph
        self.make_builder: Callable[[], AttentionMetadataBuilder[Any]] = partial(
            backend.get_builder_cls(), batch.spec, ["layers.0.attn"], self.device, planned.variant
        )
        self.builder = self.make_builder()
        if for_graph:
            name = f"{planned.backend}:{planned.variant}".rstrip(":")
            query_lens = [request.query_len for request in batch.requests]
            if reason := graph_refusal(name, self.builder.cudagraph_support, query_lens):
                raise SelectionError(reason)
        make_impl: Callable[..., Any] = backend.get_impl_cls()
        self.impl = make_impl(
            workload.shape,
            workload.kv_cache_dtype,
            workload.attn_type,
            batch.alibi_slopes,
            batch.sinks,
            planned.variant,
        )
        self.impl.process_weights_after_loading(batch.query.dtype)
        self.has_cache = workload.attn_type in (
            AttentionType.DECODER,
            AttentionType.ENCODER_DECODER,
        )
        self.writes_cache = self.has_cache and not backend.forward_includes_kv_cache_update
        if self.has_cache:
            self.kv_cache = allocate_kv_cache(backend, batch.spec, batch.num_blocks, self.device)
            fill_context(batch, self.kv_cache, backend)
        else:
            self.kv_cache = torch.empty(0, device=self.device)
        self.common_prefix_len = self._cascade_prefix_len()
        self.metadata: Any = None
        self.build_metadata()
        self._make_ready()

    def _cascade_prefix_len(self) -> int:
        prefix = 0 if self.for_graph else self.workload.common_prefix_len
        wanted = prefix > 0 and self.builder.use_cascade_attention(
            prefix,
            [r.query_len for r in self.batch.requests],
            self.workload.shape.num_heads,
            self.workload.shape.num_kv_heads,
            self.workload.shape.use_alibi,
            self.workload.shape.sliding_window > 0,
            False,
            torch.cuda.get_device_properties(0).multi_processor_count
            if self.device.type == "cuda"
            else torch.get_num_threads(),
            1,
        )
        return prefix if wanted else 0

    def build_metadata(self) -> None:
        if self.for_graph:
            # Again for each step: the graph reads the memory of the first time.
            self.metadata = self.builder.build_for_cudagraph_capture(self.batch.metadata)
        else:
            self.metadata = self.builder.build(self.common_prefix_len, self.batch.metadata)

    def twin(self) -> Self:
        twin = copy.copy(self)
        batch = self.batch
        twin.batch = replace(
            batch,
            query=batch.query.clone(),
            key=batch.key.clone(),
            value=batch.value.clone(),
            metadata=copy.deepcopy(batch.metadata),
            layer=copy.deepcopy(batch.layer),
        )
        twin.kv_cache = copy.deepcopy(self.kv_cache)  # with its strides, which clone() may lose
        if self.for_graph:
            twin.builder = self.make_builder()  # which keeps memory of its own
        twin.build_metadata()
        return twin

    def _make_ready(self) -> None:
        """What depends on the batch, beside its metadata: outputs, and new tokens in the cache."""
        raise NotImplementedError

    def next_step(self, batch: AttentionBatch) -> Self:
        step = copy.copy(self)
        step.batch = batch
        step.common_prefix_len = step._cascade_prefix_len()
        step.build_metadata()
        step._make_ready()
        return step

    @property
    def twin_bytes(self) -> int:
        batch, layer = self.batch, self.batch.layer
        copied = (self.kv_cache, batch.query, batch.key, batch.value, layer.W_UK, layer.W_UV)
        return sum(tensor.nbytes for tensor in copied) + batch.query.nbytes  # and an output


class _PreparedAttention(_Prepared):
    def _make_ready(self) -> None:
        shape, query = self.workload.shape, self.batch.query
        self.out = torch.empty(
            (query.shape[0], shape.num_heads, shape.v_head_size),
            dtype=query.dtype,
            device=self.device,
        )
        if self.writes_cache:
            self.write_kv_cache()

    def write_kv_cache(self) -> None:
        self.impl.do_kv_cache_update(
            self.batch.layer,
            self.batch.key,
            self.batch.value,
            self.kv_cache,
            self.batch.metadata.slot_mapping,
        )

    def twin(self) -> Self:
        twin = super().twin()
        twin.out = torch.empty_like(self.out)
        return twin

    def attend(self) -> None:
        self.impl.forward(
            self.batch.layer,
            self.batch.query,
            self.batch.key,
            self.batch.value,
            self.kv_cache,
            self.metadata,
            self.out,
        )

    def poison(self) -> None:
        poison_(self.out)

    def output(self) -> torch.Tensor:
        return self.out

    def lse(self) -> torch.Tensor | None:
        return None

    def timed_calls(self) -> Mapping[Metric, Callable[[], object]]:
        calls: dict[Metric, Callable[[], object]] = {Metric.METADATA_BUILD: self.build_metadata}
        if self.writes_cache:
            calls[Metric.KV_CACHE_WRITE] = self.write_kv_cache
        parts = self.impl.parts(self.batch.layer, self.batch.query, self.kv_cache, self.metadata)
        return calls | {Metric(name): call for name, call in parts.items()}


class _PreparedMLA(_Prepared):
    """Decode tokens (first in the batch) in the absorbed form, the rest expanded, as in vLLM.

    The query's projection by `W_UK` and the output's by `W_UV` belong to the layer, not to the
    kernel: they are done here, outside `attend`.
    """

    def _make_ready(self) -> None:
        shape, batch = self.workload.shape, self.batch
        new = partial(torch.empty, dtype=batch.query.dtype, device=self.device)
        self.num_decode_tokens: int = self.metadata.num_decode_tokens
        decode_query = batch.query[: self.num_decode_tokens]
        nope = decode_query[..., : shape.qk_nope_head_dim]
        rope = decode_query[..., shape.qk_nope_head_dim :]
        absorbed = torch.einsum("thn,hnl->thl", nope, batch.layer.W_UK)
        self.decode_query = torch.cat([absorbed, rope], dim=-1)
        self.latent_out = new((self.num_decode_tokens, shape.num_heads, shape.kv_lora_rank))
        num_prefill_tokens = batch.query.shape[0] - self.num_decode_tokens
        self.prefill_out = new((num_prefill_tokens, shape.num_heads, shape.v_head_size))
        self.returned_lse: torch.Tensor | None = None
        self.write_kv_cache()

    def write_kv_cache(self) -> None:
        self.impl.do_kv_cache_update(
            self.batch.layer,
            self.batch.kv_c_normed,
            self.batch.k_pe,
            self.kv_cache,
            self.batch.metadata.slot_mapping,
        )

    def twin(self) -> Self:
        twin = super().twin()
        twin.decode_query = self.decode_query.clone()
        twin.latent_out = torch.empty_like(self.latent_out)
        twin.prefill_out = torch.empty_like(self.prefill_out)
        twin.returned_lse = None
        return twin

    def attend(self) -> None:
        if self.num_decode_tokens:
            # Kept: replays of a graph write the LSE to where its capture did.
            self.returned_lse = self.impl.forward_mqa(
                self.batch.layer, self.decode_query, self.kv_cache, self.metadata, self.latent_out
            )
        if self.prefill_out.shape[0]:
            assert self.batch.kv_c_normed is not None
            assert self.batch.k_pe is not None
            rest = slice(self.num_decode_tokens, None)
            self.impl.forward_mha(
                self.batch.layer,
                self.batch.query[rest],
                self.batch.kv_c_normed[rest],
                self.batch.k_pe[rest],
                self.kv_cache,
                self.metadata,
                self.prefill_out,
            )

    def poison(self) -> None:
        poison_(self.latent_out)
        poison_(self.prefill_out)
        if self.returned_lse is not None:
            poison_(self.returned_lse)

    def output(self) -> torch.Tensor:
        decoded = torch.einsum("thl,hlv->thv", self.latent_out, self.batch.layer.W_UV)
        return torch.cat([decoded, self.prefill_out])

    def lse(self) -> torch.Tensor | None:
        return self.returned_lse

    def timed_calls(self) -> Mapping[Metric, Callable[[], object]]:
        return {
            Metric.METADATA_BUILD: self.build_metadata,
            Metric.KV_CACHE_WRITE: self.write_kv_cache,
        }
