"""The truth that outputs are compared with: dense softmax attention in float64.

It reads K and V from the batch's own dense data, not from any cache, block table or backend. One
request, one KV head and one chunk of queries at a time: nothing is expanded over the heads of a
group, and the largest temporaries stay near `_CHUNK_BYTES`, small
enough for a cache.

Rules, the same for every backend (`s` a scaled logit of query position i and key position j):

- positions: the queries of a request are its last `query_len` positions;
- soft cap first: `cap * tanh(s / cap)` (Gemma 2, arXiv:2408.00118, section 2);
- then ALiBi: `s - slope * |i - j|` (Press et al., arXiv:2108.12409);
- decoder: `j <= i`, and with a sliding window `i - j < window` (a query sees `window` tokens,
  itself included); encoder: all, with a window `|i - j| < window`; encoder_decoder: all;
- a sink adds `exp(sink)` to the denominator of its head, and nothing to the numerator
  (gpt-oss, arXiv:2508.10925);
- `lse` is the natural log of the denominator, sink included.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from attnbench.workload.types import AttentionShape, AttentionType

if TYPE_CHECKING:
    from attnbench.backends.batch import AttentionBatch

_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceResult:
    """What every (token, head) must be.

    output: (num_tokens, num_heads, v_head_size) float64.
    lse: (num_tokens, num_heads) float64, natural log of the softmax's denominator.
    query_start_loc: (num_reqs + 1,) on the host, to say which request a token belongs to.
    """

    output: torch.Tensor
    lse: torch.Tensor
    query_start_loc: torch.Tensor


def reference_attention(batch: AttentionBatch, mla_form: str | None = None) -> ReferenceResult:
    """Attention of `batch` in float64 on the batch's device.

    Args:
        mla_form: `expanded` or `absorbed`: how MLA is computed. They are equal in exact
            arithmetic; None takes the cheaper one per request.
    """
    shape = batch.shape
    num_tokens = batch.query.shape[0]
    output = torch.empty(
        (num_tokens, shape.num_heads, shape.v_head_size), dtype=torch.float64, device=batch.device
    )
    lse = torch.empty((num_tokens, shape.num_heads), dtype=torch.float64, device=batch.device)
    for request in range(len(batch.requests)):
        start, end = batch.query_range(request)
        for part in _head_groups(batch, request, mla_form):
            heads = slice(part.first_head, part.first_head + part.query.shape[1])
            out, part_lse = _attend(batch, request, part)
            output[start:end, heads] = out
            lse[start:end, heads] = part_lse
    return ReferenceResult(
        output=output, lse=lse, query_start_loc=batch.metadata.query_start_loc_cpu
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _HeadGroup:
    """Query heads that share one key and value head. All float64.

    query: (query_len, group, size); key: (seq_len, size); value: (seq_len, v_size);
    up: (group, v_size, v_head_size) or None, applied to each head's output (absorbed MLA).
    """

    first_head: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    up: torch.Tensor | None = None


def _head_groups(batch: AttentionBatch, request: int, mla_form: str | None) -> Iterator[_HeadGroup]:
    shape = batch.shape
    start, end = batch.query_range(request)
    query = batch.query[start:end]
    if shape.is_mla:
        key, value = batch.keys_values(request)
        form = mla_form or _cheaper_mla_form(shape, end - start)
        groups = _absorbed if form == "absorbed" else _expanded
        yield from groups(shape, query, key, value, batch.layer.W_UK, batch.layer.W_UV)
        return
    group = shape.num_heads // shape.num_kv_heads
    for kv_head in range(shape.num_kv_heads):
        first = kv_head * group
        key, value = batch.keys_values(request, kv_head=kv_head)
        yield _HeadGroup(
            first_head=first,
            query=query[:, first : first + group].double(),
            key=key.double(),
            value=value.double(),
        )


def _cheaper_mla_form(shape: AttentionShape, query_len: int) -> str:
    """Expanding costs once per key, the wider absorbed products once per query and key."""
    expand = shape.kv_lora_rank * (shape.qk_nope_head_dim + shape.v_head_size)
    wider = 2 * shape.kv_lora_rank - shape.qk_nope_head_dim - shape.v_head_size
    return "absorbed" if query_len * wider <= expand else "expanded"


def _expanded(
    shape: AttentionShape,
    query: torch.Tensor,
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
) -> Iterator[_HeadGroup]:
    """MLA as ordinary attention: each head's own keys and values from the latent (DeepSeek-V2,
    arXiv:2405.04434, section 2.1)."""
    latent, rotary = kv_c.double(), k_pe[:, 0].double()
    for head in range(shape.num_heads):
        yield _HeadGroup(
            first_head=head,
            query=query[:, head : head + 1].double(),
            key=torch.cat([latent @ w_uk[head].double().T, rotary], dim=-1),
            value=latent @ w_uv[head].double(),
        )


def _absorbed(
    shape: AttentionShape,
    query: torch.Tensor,
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
) -> Iterator[_HeadGroup]:
    """MLA as multi-query attention over the latent: `W_UK` moves into the query, `W_UV` behind."""
    nope = query[..., : shape.qk_nope_head_dim].double()
    rope = query[..., shape.qk_nope_head_dim :].double()
    latent = kv_c.double()
    yield _HeadGroup(
        first_head=0,
        query=torch.cat([torch.einsum("thn,hnl->thl", nope, w_uk.double()), rope], dim=-1),
        key=torch.cat([latent, k_pe[:, 0].double()], dim=-1),
        value=latent,
        up=w_uv.double(),
    )


def _attend(
    batch: AttentionBatch, request: int, part: _HeadGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (query_len, group, v_head_size) and LSE (query_len, group) of one group."""
    query_len, group, _ = part.query.shape
    num_keys = part.key.shape[0]
    step = max(1, _CHUNK_BYTES // (8 * group * num_keys))
    outputs, lses = [], []
    for first in range(0, query_len, step):
        query = part.query[first : first + step]
        positions = query_positions(batch, request)[first : first + step]
        low, high = _visible_range(batch, positions, num_keys)
        heads = slice(part.first_head, part.first_head + group)
        logits = masked_logits(
            batch, query, part.key[low:high, None], positions, low, heads
        )  # (chunk, group, keys)
        top = logits.amax(dim=-1)
        weights = logits.sub_(top[..., None]).exp_()
        total = weights.sum(dim=-1)
        if batch.sinks is not None:
            total += torch.exp(batch.sinks[heads].double() - top)
        out = (weights.flatten(0, 1) @ part.value[low:high]).view(len(query), group, -1)
        out /= total[..., None]
        if part.up is not None:
            out = torch.einsum("tgl,glv->tgv", out, part.up)
        outputs.append(out)
        lses.append(top + torch.log(total))
    return torch.cat(outputs), torch.cat(lses)


def query_positions(batch: AttentionBatch, request: int) -> torch.Tensor:
    """(query_len,) position of each new token in its sequence.

    Decoder tokens of cross attention have positions of their own; they are put at the end of the
    encoder's, which matters to ALiBi only (as flash-attn's bottom-right alignment).
    """
    r = batch.requests[request]
    return torch.arange(r.seq_len - r.query_len, r.seq_len, device=batch.device)


def _visible_range(
    batch: AttentionBatch, positions: torch.Tensor, num_keys: int
) -> tuple[int, int]:
    """Keys outside [low, high) are hidden from all `positions`: work saved, nothing else."""
    if batch.attn_type is not AttentionType.DECODER:
        return 0, num_keys
    window = batch.shape.sliding_window
    low = max(0, int(positions[0]) - window + 1) if window else 0
    return low, int(positions[-1]) + 1


def masked_logits(
    batch: AttentionBatch,
    query: torch.Tensor,
    key: torch.Tensor,
    positions: torch.Tensor,
    first_key: int,
    heads: slice,
) -> torch.Tensor:
    """Logits (queries, group, keys) in float64; -inf where a key is hidden.

    Args:
        query: (queries, group, size) at `positions` (queries,).
        key: (keys, 1, size), the keys of positions `first_key` onwards.
        heads: which heads the group is, for ALiBi.
    """
    shape = batch.shape
    queries, group, size = query.shape
    logits = (query.reshape(-1, size) @ key[:, 0].T).view(queries, group, -1).mul_(shape.scale)
    if shape.logits_soft_cap:
        logits = logits.div_(shape.logits_soft_cap).tanh_().mul_(shape.logits_soft_cap)
    keys = torch.arange(first_key, first_key + key.shape[0], device=query.device)
    distance = positions[:, None] - keys[None, :]
    if batch.alibi_slopes is not None:
        slopes = batch.alibi_slopes[heads].double()
        logits -= slopes[None, :, None] * distance.abs()[:, None, :]
    if batch.attn_type is AttentionType.DECODER:
        hidden = distance < 0
        if shape.sliding_window:
            hidden |= distance >= shape.sliding_window
    elif shape.sliding_window:
        hidden = distance.abs() >= shape.sliding_window
    else:
        return logits
    return logits.masked_fill_(hidden[:, None, :], float("-inf"))
