"""`make_batch`: the tensors and metadata of one engine step, from a workload.

What a request's K and V are, per attention type (`Request(query_len, seq_len)`):

- decoder: the last `query_len` of `seq_len` tokens are new, their K and V are given and must be
  written to the cache; the ones before are the context, already in the cache.
- encoder, encoder_only: all `seq_len == query_len` tokens are new, nothing is cached, every token
  sees every other. The block table holds the null block only and every slot is -1 (skip).
- encoder_decoder (cross attention): `query_len` decoder tokens look at `seq_len` encoder tokens,
  all of them in the cache (written when the encoder ran). There are no new K and V: `key`, `value`
  and `slot_mapping` have length 0. `seq_lens` and `encoder_seq_lens` are both the encoder's
  lengths, as vLLM's cross-attention builder passes them; nothing is causal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from attnbench.backends.batch_layer import BatchLayer, make_layer
from attnbench.backends.builder import KVCacheSpec
from attnbench.backends.ds_mla import DS_MLA, TileRounding
from attnbench.backends.dtypes import torch_dtype
from attnbench.backends.metadata import CommonAttentionMetadata
from attnbench.backends.paging import BlockTable, shuffled_block_table
from attnbench.backends.queries import make_queries
from attnbench.backends.token_pool import BatchTokens, Rounding, TokenPool, seeded_generator
from attnbench.backends.topk import draw_topk_indices
from attnbench.workload.types import AttentionShape, AttentionType, Request

if TYPE_CHECKING:
    from attnbench.workload import Workload


@dataclass(kw_only=True)
class AttentionBatch:
    """One step's inputs. Requests are in batch order; the tokens of request `i` are
    `query[query_start_loc[i]:query_start_loc[i + 1]]`.

    The context is not held as a tensor: `context(i)` makes it again, exactly, when asked.
    """

    workload: Workload
    spec: KVCacheSpec
    device: torch.device
    requests: tuple[Request, ...]
    query: torch.Tensor
    """(num_tokens, num_heads, qk_head_dim), in the workload's dtype."""
    key: torch.Tensor
    """(num_new_tokens, num_kv_heads, head_size); MLA: the normed latent (num_new_tokens,
    kv_lora_rank). Every value is exact in the KV cache's format."""
    value: torch.Tensor
    """(num_new_tokens, num_kv_heads, v_head_size); MLA: the rotary key (num_new_tokens, 1,
    qk_rope_head_dim)."""
    metadata: CommonAttentionMetadata
    num_blocks: int
    common_prefix_len: int
    """Tokens whose blocks all requests share."""
    layer: BatchLayer
    alibi_slopes: torch.Tensor | None
    """(num_heads,) float32."""
    sinks: torch.Tensor | None
    """(num_heads,) float32: one extra logit per head, in the softmax's denominator only."""
    tokens: BatchTokens = field(repr=False)
    reorder_batch_threshold: int | None = None

    @property
    def shape(self) -> AttentionShape:
        return self.spec.shape

    @property
    def attn_type(self) -> AttentionType:
        return self.workload.attn_type

    @property
    def kv_c_normed(self) -> torch.Tensor:
        """MLA: the new latents, (num_tokens, kv_lora_rank)."""
        return self.key

    @property
    def k_pe(self) -> torch.Tensor:
        """MLA: the new rotary keys, (num_tokens, 1, qk_rope_head_dim)."""
        return self.value

    @property
    def topk_indices(self) -> torch.Tensor | None:
        """(num_tokens, topk_tokens) int32 positions that sparse queries attend to; None: dense."""
        return self.metadata.topk_indices_buffer

    def query_range(self, request: int) -> tuple[int, int]:
        """First and one past the last query token of a request."""
        start, end = self.metadata.query_start_loc_cpu[request : request + 2].tolist()
        return start, end

    def num_computed(self, request: int) -> int:
        """Tokens of a request that are in the cache before this step."""
        return num_computed_tokens(self.requests[request], self.attn_type)

    def context(self, request: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V (MLA: latents and rotary keys) of the tokens already in the cache."""
        return self.keys_values(request, 0, self.num_computed(request))

    def keys_values(
        self, request: int, start: int = 0, end: int | None = None, kv_head: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V (MLA: latents and rotary keys) of positions `start` to `end` of a request.

        Dense, in the workload's dtype, and independent of any cache or block table. Position
        `seq_len` exists too: the token that would come next, found behind the end of the cache.
        With `kv_head` only that head, its dimension indexed away (not for MLA).
        """
        last = self.requests[request].seq_len if end is None else end
        positions = torch.arange(start, last, device=self.device)
        ids = self.tokens.ids(request, positions)
        head = None if kv_head is None else torch.tensor(kv_head, device=self.device)
        return self.tokens.key_pool.take(ids, head), self.tokens.value_pool.take(ids, head)


def flat_positions(
    spans: Sequence[tuple[int, int]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(request, position) of every position of `spans`: (first, one past the last) per request.

    Two tensors of one length; a device is not waited for.
    """
    lengths = torch.tensor([last - first for first, last in spans])
    total = int(lengths.sum())
    # What to add to the place in the list to get the position in the request.
    offsets = torch.tensor([first for first, _ in spans]) - (lengths.cumsum(0) - lengths)
    lengths = lengths.to(device)
    numbers = torch.arange(len(spans), device=device)
    requests = torch.repeat_interleave(numbers, lengths, output_size=total)
    return requests, torch.arange(total, device=device) + offsets.to(device)[requests]


def num_computed_tokens(request: Request, attn_type: AttentionType) -> int:
    """Tokens that are in the cache before the step."""
    match attn_type:
        case AttentionType.DECODER:
            return request.seq_len - request.query_len
        case AttentionType.ENCODER_DECODER:
            return request.seq_len
        case _:
            return 0


def batch_order(requests: Sequence[Request], reorder_batch_threshold: int | None) -> list[int]:
    """Which request of the workload is which of the batch: short ones first where asked for."""
    order = list(range(len(requests)))
    if reorder_batch_threshold is not None:
        order.sort(key=lambda i: requests[i].query_len > reorder_batch_threshold)
    return order


def make_batch(
    workload: Workload,
    device: torch.device | str = "cpu",
    reorder_batch_threshold: int | None = None,
) -> AttentionBatch:
    """The batch of `workload`; the same numbers on every machine and device.

    Args:
        workload: what to measure; its id seeds the data.
        device: where the tensors go.
        reorder_batch_threshold: move requests with at most this many query tokens to the front,
            both groups in their order (`AttentionMetadataBuilder.reorder_batch_threshold`).
    """
    device = torch.device(device)
    shape, attn_type = workload.shape, workload.attn_type
    dtype = torch_dtype(workload.dtype)
    spec = KVCacheSpec(
        shape=shape,
        dtype=dtype,
        kv_cache_dtype=workload.resolved_kv_cache_dtype,
        block_size=workload.block_size,
        kv_cache_layout=workload.kv_cache_layout,
    )
    order = batch_order(workload.requests, reorder_batch_threshold)
    requests = tuple(workload.requests[i] for i in order)
    num_shared = workload.common_prefix_len  # whole blocks: `Workload` refuses anything else
    layer = make_layer(spec, device)
    tokens = _make_tokens(workload, spec, layer, order, num_shared, device)
    alibi_slopes = get_alibi_slopes(shape.num_heads).to(device) if shape.use_alibi else None
    topk_indices = topk_indices_of(workload, requests, [(str(i),) for i in order])
    query = make_queries(
        requests,
        shape,
        attn_type,
        dtype,
        tokens,
        layer.W_UK,
        [seeded_generator(workload.id, "query", str(i)) for i in order],
        topk_indices=topk_indices,
    )
    metadata, num_blocks = _make_metadata(workload, requests, num_shared, device)
    if topk_indices is not None:
        metadata = metadata.replace(topk_indices_buffer=topk_indices.to(device))
    new_ids = tokens.ids(
        *flat_positions([(num_computed_tokens(r, attn_type), r.seq_len) for r in requests], device)
    )
    return AttentionBatch(
        workload=workload,
        spec=spec,
        device=device,
        requests=requests,
        query=query,
        key=tokens.key_pool.take(new_ids),
        value=tokens.value_pool.take(new_ids),
        metadata=metadata,
        num_blocks=num_blocks,
        common_prefix_len=num_shared,
        layer=layer,
        alibi_slopes=alibi_slopes,
        sinks=_make_sinks(workload, requests, device) if shape.has_sink else None,
        tokens=tokens,
        reorder_batch_threshold=reorder_batch_threshold,
    )


def get_alibi_slopes(num_heads: int) -> torch.Tensor:
    """(num_heads,) float32 slopes of Press et al., "Train Short, Test Long" (ICLR 2022).

    For n = 2^k heads the geometric sequence 2^(-8/n), 2^(-16/n), ...; for other counts, as in the
    authors' code (`get_slopes`, ofirpress/attention_with_linear_biases), the slopes of the next
    lower power of two followed by every other slope of the next higher one.
    """

    def powers(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

    lower = 1 << (num_heads.bit_length() - 1)
    slopes = powers(lower) + powers(2 * lower)[0::2][: num_heads - lower]
    return torch.tensor(slopes, dtype=torch.float32)


def _make_tokens(
    workload: Workload,
    spec: KVCacheSpec,
    layer: BatchLayer,
    order: list[int],
    num_shared: int,
    device: torch.device,
) -> BatchTokens:
    shape = spec.shape
    first_own_id, next_id = [], num_shared
    for r in workload.requests:
        first_own_id.append(next_id)
        next_id += r.seq_len + 1 - num_shared  # one more: the token that would come next
    features: tuple[tuple[int, ...], tuple[int, ...]]
    if shape.is_mla:
        features = ((shape.kv_lora_rank,), (1, shape.qk_rope_head_dim))
    else:
        features = (
            (shape.num_kv_heads, shape.head_size),
            (shape.num_kv_heads, shape.v_head_size),
        )
    parts = zip(("key", "value"), features, roundings(spec, layer), strict=True)
    pools = [
        TokenPool(name, next_id, f, seeded_generator(workload.id, name), round_to, device)
        for name, f, round_to in parts
    ]
    return BatchTokens(
        key_pool=pools[0],
        value_pool=pools[1],
        num_shared=num_shared,
        device=device,
        first_own_id=torch.tensor([first_own_id[i] for i in order], device=device),
    )


def context_tokens(workload: Workload, batch: AttentionBatch) -> BatchTokens:
    """Tokens of `workload`, whose requests and layer are those of `batch`, in the batch's order."""
    threshold = batch.reorder_batch_threshold
    order = batch_order(workload.requests, threshold)
    num_shared = workload.common_prefix_len
    return _make_tokens(workload, batch.spec, batch.layer, order, num_shared, batch.device)


def roundings(
    spec: KVCacheSpec, layer: BatchLayer
) -> tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]:
    """How keys and values (MLA: latents and rotary keys) become what the cache holds exactly."""
    if spec.kv_cache_dtype == DS_MLA:
        return TileRounding(spec.dtype), Rounding(torch.bfloat16, spec.dtype, 1.0)
    cache_dtype = torch_dtype(spec.kv_cache_dtype)
    return (
        Rounding(cache_dtype, spec.dtype, layer._k_scale_float),
        Rounding(cache_dtype, spec.dtype, layer._v_scale_float),
    )


def topk_indices_of(
    workload: Workload, requests: Sequence[Request], seeds: Sequence[Sequence[str]]
) -> torch.Tensor | None:
    """`draw_topk_indices` for `workload`, None when it is dense; `seeds`: of each request."""
    if not workload.is_sparse:
        return None
    generators = [seeded_generator(workload.id, "topk", *seed) for seed in seeds]
    return draw_topk_indices(requests, workload.topk_tokens, workload.topk_pattern, generators)


def _make_sinks(
    workload: Workload, requests: tuple[Request, ...], device: torch.device
) -> torch.Tensor:
    """Extra logits near the log of the number of keys: a sink that is ignored shows."""
    noise = torch.randn(workload.shape.num_heads, generator=seeded_generator(workload.id, "sinks"))
    longest = max(r.seq_len for r in requests)
    window = workload.shape.sliding_window
    seen = min(longest, window) if window else longest
    sinks = noise + torch.tensor(float(seen)).log() + 1.0
    # As models store them, and as FlashAttention 3 takes them: exact in bf16.
    return sinks.to(torch.bfloat16).float().to(device)


def _make_metadata(
    workload: Workload, requests: tuple[Request, ...], num_shared: int, device: torch.device
) -> tuple[CommonAttentionMetadata, int]:
    attn_type = workload.attn_type
    has_cache = attn_type in (AttentionType.DECODER, AttentionType.ENCODER_DECODER)
    blocks: BlockTable = shuffled_block_table(
        [r.seq_len if has_cache else 0 for r in requests],
        workload.block_size,
        num_shared,
        seeded_generator(workload.id, "blocks"),
    )
    slots = [
        blocks.slots(i, torch.arange(num_computed_tokens(r, attn_type), r.seq_len))
        if has_cache
        else torch.full((r.query_len,), -1, dtype=torch.int64)
        for i, r in enumerate(requests)
    ]
    query_lens = torch.tensor([r.query_len for r in requests], dtype=torch.int32)
    seq_lens = torch.tensor([r.seq_len for r in requests], dtype=torch.int32)
    query_start_loc = torch.zeros(len(requests) + 1, dtype=torch.int32)
    query_start_loc[1:] = query_lens.cumsum(0)
    cross = attn_type is AttentionType.ENCODER_DECODER
    metadata = CommonAttentionMetadata(
        query_start_loc=query_start_loc.to(device),
        query_start_loc_cpu=query_start_loc,
        seq_lens=seq_lens.to(device),
        seq_lens_cpu=seq_lens,
        num_reqs=len(requests),
        num_actual_tokens=int(query_lens.sum()),
        max_query_len=int(query_lens.max()),
        max_seq_len=int(seq_lens.max()),
        block_table_tensor=blocks.table.to(device),
        slot_mapping=torch.cat(slots).to(device),
        causal=attn_type is AttentionType.DECODER,
        encoder_seq_lens=seq_lens.to(device) if cross else None,
        encoder_seq_lens_cpu=seq_lens if cross else None,
    )
    return metadata, blocks.num_blocks
