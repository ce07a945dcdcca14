"""The truth that outputs are compared with: dense softmax attention in float64.

It reads K and V from the batch's own dense data, not from any cache, block table or backend.
Nothing is expanded over the heads of a group. Requests of the same lengths and all their KV heads
go together, as far as the largest temporaries stay near `_CHUNK_BYTES`: few and large steps, since
on a device every small one is a launch, and a sweep's time would be the reference's.

Rules, the same for every backend (`s` a scaled logit of query position i and key position j):

- positions: the queries of a request are its last `query_len` positions;
- soft cap first: `cap * tanh(s / cap)` (Gemma 2, arXiv:2408.00118, section 2);
- then ALiBi: `s - slope * |i - j|` (Press et al., arXiv:2108.12409);
- decoder: `j <= i`, and with a sliding window `i - j < window` (a query sees `window` tokens,
  itself included); encoder: all, with a window `|i - j| < window`; encoder_decoder: all;
- sparse: of those, the positions that the batch's `topk_indices` gives each query;
- a sink adds `exp(sink)` to the denominator of its head, and nothing to the numerator
  (gpt-oss, arXiv:2508.10925);
- `lse` is the natural log of the denominator, sink included.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import torch

from attnbench.backends.topk import selected_keys
from attnbench.workload.types import AttentionShape, AttentionType

if TYPE_CHECKING:
    from attnbench.backends.batch import AttentionBatch

#: Small enough for the cache of a CPU; on a device large enough to fill it.
_CHUNK_BYTES = 16 << 20
_DEVICE_CHUNK_BYTES = 512 << 20


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
    lse = torch.empty((num_tokens, shape.num_heads, 1), dtype=torch.float64, device=batch.device)
    for alike in _alike(batch):
        run = _Run(batch, alike, mla_form)
        for lanes in run.lanes():
            run.store(_attend(run, lanes), lanes, output, lse)
    return ReferenceResult(
        output=output, lse=lse[..., 0], query_start_loc=batch.metadata.query_start_loc_cpu
    )


def _alike(batch: AttentionBatch) -> Iterator[range]:
    """Requests that follow each other and have the same lengths."""
    first = 0
    for _, group in groupby(batch.requests):
        last = first + len(list(group))
        yield range(first, last)
        first = last


@dataclass(frozen=True, slots=True)
class _Lanes:
    """What is computed in one go: groups of heads that share one key and value head, of requests.

    requests, groups: which, counted within the run.
    """

    requests: slice
    groups: slice


@dataclass(frozen=True, slots=True)
class _LaneData:
    """All float64 but `heads`; n lanes, the groups of a request beside each other.

    query: (n, query_len, group, size); key: (n, keys, size), value: (n, keys, v_size) of positions
    `first_key` onwards; heads: (n, group) numbers of the query heads.
    up: (group, v_size, v_head_size) or None, applied to each head's output (absorbed MLA).
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    heads: torch.Tensor
    first_key: int
    up: torch.Tensor | None = None


class _Run:
    """Requests of the same lengths: their lanes have the same shapes and are computed together."""

    def __init__(self, batch: AttentionBatch, requests: range, mla_form: str | None) -> None:
        shape = batch.shape
        self.batch = batch
        self.requests = requests
        self.query_len = batch.requests[requests.start].query_len
        self.seq_len = batch.requests[requests.start].seq_len
        self.tokens = slice(
            batch.query_range(requests.start)[0], batch.query_range(requests.stop - 1)[1]
        )
        self.num_groups, self._data_of = shape.num_kv_heads, self._plain
        self._width = shape.head_size + shape.v_head_size
        if shape.is_mla:
            form = mla_form or _cheaper_mla_form(shape, self.query_len)
            absorbed = form == "absorbed"
            self.num_groups = 1 if absorbed else shape.num_heads
            self._data_of = self._absorbed if absorbed else self._expanded
            # Latents too, and the keys and values that are made from them.
            self._width = 2 * (shape.kv_lora_rank + shape.qk_rope_head_dim)
        self.group = shape.num_heads // self.num_groups
        self.chunk_bytes = _CHUNK_BYTES if batch.device.type == "cpu" else _DEVICE_CHUNK_BYTES

    @property
    def first_key(self) -> int:
        """Keys before it are hidden from every query: work saved, nothing else."""
        return visible_range(self.batch, self.requests.start, 0, self.query_len)[0]

    def lanes(self) -> Iterator[_Lanes]:
        """All of them, so many at a time that their data fit `chunk_bytes`; at least one."""
        lane_bytes = 8 * self.seq_len * (self._width + self.group * self.query_len)
        at_once = max(1, self.chunk_bytes // lane_bytes)
        groups = min(at_once, self.num_groups)
        requests = max(1, at_once // self.num_groups)
        for request in range(0, len(self.requests), requests):
            for group in range(0, self.num_groups, groups):
                yield _Lanes(slice(request, request + requests), slice(group, group + groups))

    def data(self, lanes: _Lanes) -> _LaneData:
        """Queries, keys and values of `lanes`."""
        return self._data_of(lanes)

    def selected(self, lanes: _Lanes, queries: slice, low: int, high: int) -> torch.Tensor | None:
        """(n, queries, keys low to high) bool: what sparse queries attend to; None: dense."""
        indices = self.batch.topk_indices
        if indices is None:
            return None
        rows = indices[self.tokens].view(len(self.requests), self.query_len, -1)
        rows = rows[lanes.requests, queries]
        groups = len(range(self.num_groups)[lanes.groups])
        return selected_keys(rows, low, high - low).repeat_interleave(groups, dim=0)

    def store(
        self,
        found: tuple[torch.Tensor, torch.Tensor],
        lanes: _Lanes,
        output: torch.Tensor,
        lse: torch.Tensor,
    ) -> None:
        """Put `found`, (n, query_len, group, size) each, to its place in (token, head, size)."""
        for part, whole in zip(found, (output, lse), strict=True):
            place = self._by_group(whole)[lanes.requests, :, lanes.groups]
            place.copy_(part.view(place.transpose(1, 2).shape).transpose(1, 2))

    def _by_group(self, tensor: torch.Tensor) -> torch.Tensor:
        """(token, head, size) as (request, query_len, num_groups, group, size), this run's part."""
        counts = (len(self.requests), self.query_len, self.num_groups, self.group)
        return tensor[self.tokens].view(*counts, tensor.shape[-1])

    def _query(self, lanes: _Lanes) -> torch.Tensor:
        query = self._by_group(self.batch.query)[lanes.requests, :, lanes.groups]
        return query.transpose(1, 2).flatten(0, 1).double()

    def _heads(self, lanes: _Lanes, requests: int) -> torch.Tensor:
        heads = torch.arange(self.batch.shape.num_heads, device=self.batch.device)
        return heads.view(self.num_groups, self.group)[lanes.groups].repeat(requests, 1)

    def _ids(self, lanes: _Lanes) -> torch.Tensor:
        """(requests, keys) token ids."""
        device = self.batch.device
        requests = torch.arange(self.requests.start, self.requests.stop, device=device)
        positions = torch.arange(self.first_key, self.seq_len, device=device)
        return self.batch.tokens.ids(requests[lanes.requests, None], positions)

    def _plain(self, lanes: _Lanes) -> _LaneData:
        ids = self._ids(lanes)[:, None]
        kv_heads = torch.arange(self.num_groups, device=self.batch.device)[lanes.groups, None]
        pools = (self.batch.tokens.key_pool, self.batch.tokens.value_pool)
        key, value = (pool.take(ids, kv_heads).flatten(0, 1).double() for pool in pools)
        heads = self._heads(lanes, len(ids))
        return _LaneData(self._query(lanes), key, value, heads, self.first_key)

    def _latents(self, lanes: _Lanes) -> tuple[torch.Tensor, torch.Tensor]:
        """(requests, keys, kv_lora_rank) and (requests, keys, qk_rope_head_dim)."""
        ids = self._ids(lanes)
        tokens = self.batch.tokens
        return tokens.key_pool.take(ids).double(), tokens.value_pool.take(ids)[:, :, 0].double()

    def _expanded(self, lanes: _Lanes) -> _LaneData:
        """MLA as ordinary attention: each head's own keys and values from the latent (DeepSeek-V2,
        arXiv:2405.04434, section 2.1)."""
        latent, rotary = self._latents(lanes)
        layer = self.batch.layer
        w_uk, w_uv = (w[lanes.groups].double() for w in (layer.W_UK, layer.W_UV))
        nope = torch.einsum("rkl,hdl->rhkd", latent, w_uk)
        rotary = rotary[:, None].expand(-1, len(w_uk), -1, -1)
        key = torch.cat([nope, rotary], dim=-1).flatten(0, 1)
        value = torch.einsum("rkl,hlv->rhkv", latent, w_uv).flatten(0, 1)
        heads = self._heads(lanes, len(latent))
        return _LaneData(self._query(lanes), key, value, heads, self.first_key)

    def _absorbed(self, lanes: _Lanes) -> _LaneData:
        """MLA as multi-query attention over the latent: `W_UK` moves into the query, `W_UV`
        behind."""
        latent, rotary = self._latents(lanes)
        shape, layer = self.batch.shape, self.batch.layer
        query = self._query(lanes)
        nope, rope = query[..., : shape.qk_nope_head_dim], query[..., shape.qk_nope_head_dim :]
        wide = torch.einsum("rthn,hnl->rthl", nope, layer.W_UK.double())
        return _LaneData(
            query=torch.cat([wide, rope], dim=-1),
            key=torch.cat([latent, rotary], dim=-1),
            value=latent,
            heads=self._heads(lanes, len(latent)),
            first_key=self.first_key,
            up=layer.W_UV.double(),
        )


def _cheaper_mla_form(shape: AttentionShape, query_len: int) -> str:
    """Expanding costs once per key, the wider absorbed products once per query and key."""
    expand = shape.kv_lora_rank * (shape.qk_nope_head_dim + shape.v_head_size)
    wider = 2 * shape.kv_lora_rank - shape.qk_nope_head_dim - shape.v_head_size
    return "absorbed" if query_len * wider <= expand else "expanded"


def _attend(run: _Run, lanes: _Lanes) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (n, query_len, group, v_head_size) and LSE (n, query_len, group, 1) of `lanes`."""
    batch, data = run.batch, run.data(lanes)
    num_lanes, query_len, group, _ = data.query.shape
    step = max(1, run.chunk_bytes // (8 * num_lanes * group * run.seq_len))
    all_positions = query_positions(batch, run.requests.start)
    outputs, lses = [], []
    for first in range(0, query_len, step):
        query = data.query[:, first : first + step]
        low, high = visible_range(batch, run.requests.start, first, min(first + step, query_len))
        keys = slice(low - data.first_key, high - data.first_key)
        positions = all_positions[first : first + step]
        chosen = run.selected(lanes, slice(first, first + step), low, high)
        logits = masked_logits(batch, query, data.key[:, keys], positions, low, data.heads, chosen)
        top = logits.amax(dim=-1)  # (n, chunk, group)
        weights = logits.sub_(top[..., None]).exp_()
        total = weights.sum(dim=-1)
        if batch.sinks is not None:
            total += torch.exp(batch.sinks[data.heads].double()[:, None] - top)
        out = weights.flatten(1, 2) @ data.value[:, keys]
        out = out.view(num_lanes, -1, group, out.shape[-1])
        out /= total[..., None]
        if data.up is not None:
            out = torch.einsum("rtgl,glv->rtgv", out, data.up)
        outputs.append(out)
        lses.append((top + torch.log(total))[..., None])
    return torch.cat(outputs, dim=1), torch.cat(lses, dim=1)


def query_positions(batch: AttentionBatch, request: int) -> torch.Tensor:
    """(query_len,) position of each new token in its sequence.

    Decoder tokens of cross attention have positions of their own; they are put at the end of the
    encoder's, which matters to ALiBi only (as flash-attn's bottom-right alignment).
    """
    r = batch.requests[request]
    return torch.arange(r.seq_len - r.query_len, r.seq_len, device=batch.device)


def visible_range(batch: AttentionBatch, request: int, first: int, last: int) -> tuple[int, int]:
    """Keys outside [low, high) are hidden from all query tokens `first` to `last` of a request."""
    r = batch.requests[request]
    if batch.attn_type is not AttentionType.DECODER:
        return 0, r.seq_len
    before = r.seq_len - r.query_len
    window = batch.shape.sliding_window
    return max(0, before + first - window + 1) if window else 0, before + last


def masked_logits(
    batch: AttentionBatch,
    query: torch.Tensor,
    key: torch.Tensor,
    positions: torch.Tensor,
    first_key: int,
    heads: slice | torch.Tensor,
    selected: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits (..., queries, group, keys) in float64; -inf where a key is hidden.

    Args:
        query: (..., queries, group, size) at `positions` (queries,).
        key: (..., keys, size), the keys of positions `first_key` onwards.
        heads: which heads the group is, for ALiBi: a slice, or (..., group) numbers.
        selected: (..., queries, keys) bool, the keys a sparse query attends to; None: all.
    """
    shape = batch.shape
    logits = query.flatten(-3, -2) @ key.transpose(-2, -1)
    logits = logits.view(*query.shape[:-1], key.shape[-2]).mul_(shape.scale)
    if shape.logits_soft_cap:
        logits = logits.div_(shape.logits_soft_cap).tanh_().mul_(shape.logits_soft_cap)
    keys = torch.arange(first_key, first_key + key.shape[-2], device=query.device)
    distance = positions[:, None] - keys[None, :]
    if batch.alibi_slopes is not None:
        slopes = batch.alibi_slopes[heads].double()
        logits -= slopes[..., None, :, None] * distance.abs()[:, None, :]
    if batch.attn_type is AttentionType.DECODER:
        hidden = distance < 0
        if shape.sliding_window:
            hidden |= distance >= shape.sliding_window
        if selected is not None:
            hidden = hidden | ~selected
    elif shape.sliding_window:
        hidden = distance.abs() >= shape.sliding_window
    else:
        return logits
    return logits.masked_fill_(hidden[..., None, :], float("-inf"))
