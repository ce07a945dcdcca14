"""Queries that make a wrong mask visible.

With independent random queries and keys a single key among 4,096 has a weight of about 1/4096, and
forgetting it moves the output by less than bf16 rounds: an off-by-one mask would pass. Real
attention is not like that: a few keys carry much of the weight. So each query here is random noise
plus multiples of some chosen keys ("needles"), large enough that a needle gets a weight of the
order of a tenth whatever the context length. The rest of the weight is spread over all other keys:
neither uniform nor one-hot, so summation over the whole context is tested too.

The needles sit where masks go wrong:

- decoder: the query's own position, the next one (must not be seen), one random earlier position
  per token and head, and, with a sliding window, the oldest position inside and the first outside;
- sparse: also the first, the last and a random one of the positions the query attends to; the
  random earlier one is, mostly, none of them and must not be seen;
- encoder, encoder_only, encoder_decoder: the first, the last and a random position; with a window
  the last position inside and the first outside, both ways.

Every query also leans towards a key whose elements are all equal and positive. No token has such a
key; slots that a mask must hide hold it (`kv_cache.HIDDEN_POISON`), so that reading one shows in
every head.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from attnbench.backends.token_pool import BatchTokens
from attnbench.workload.types import AttentionShape, AttentionType, Request

_CHUNK_TOKENS = 256


def make_queries(
    requests: Sequence[Request],
    shape: AttentionShape,
    attn_type: AttentionType,
    dtype: torch.dtype,
    tokens: BatchTokens,
    w_uk: torch.Tensor,
    generators: Sequence[torch.Generator],
    noise: Sequence[torch.Tensor] | None = None,
    topk_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """Queries (num_tokens, num_heads, qk_head_dim) for all requests, one generator per request.

    `noise`: what a request's queries are besides needles, (query_len, num_heads, qk_head_dim) of
    root mean square one, in place of random numbers.
    `topk_indices`: (num_tokens, k) positions on the host that sparse queries attend to.
    """
    device = tokens.device
    total = sum(r.query_len for r in requests)
    query = torch.empty((total, shape.num_heads, shape.qk_head_dim), dtype=dtype, device=device)
    constant_key = _constant_key(shape, w_uk, device)
    std = _noise_std(shape)
    firsts = itertools.accumulate((r.query_len for r in requests), initial=0)
    chosen = [
        None if topk_indices is None else topk_indices[first : first + r.query_len]
        for first, r in zip(firsts, requests, strict=False)
    ]
    drawn = [
        _Draws.of(
            index,
            request,
            shape,
            attn_type,
            range(first, last),
            generator,
            std,
            noise[index][first:last] if noise is not None else None,
            None if (rows := chosen[index]) is None else rows[first:last],
        )
        for index, (request, generator) in enumerate(zip(requests, generators, strict=True))
        for first in range(0, request.query_len, _CHUNK_TOKENS)
        for last in [min(first + _CHUNK_TOKENS, request.query_len)]
    ]
    start = 0
    while drawn:
        together = _Draws.joined(drawn, _CHUNK_TOKENS, device)
        del drawn[: together.count]
        chunk = together.noise
        for positions, valid in together.needles:
            keys = _keys_at(together.requests, positions, shape, tokens, w_uk)
            norm = keys.square().sum(-1, keepdim=True).clamp_min(1e-6) * shape.scale
            chunk += keys * (together.boost / norm) * valid[:, :, None]
        query[start : start + len(chunk)] = _lean(chunk, constant_key).to(dtype)
        start += len(chunk)
    return query


@dataclass(frozen=True, slots=True)
class _Draws:
    """What chance decides of C query tokens, of one request or of `count` pieces joined.

    noise: (C, num_heads, size). requests: (C,). boost: (C, 1, 1). needles: see `_needles`.
    """

    noise: torch.Tensor
    requests: torch.Tensor
    boost: torch.Tensor
    needles: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    count: int = 1

    @classmethod
    def of(
        cls,
        index: int,
        request: Request,
        shape: AttentionShape,
        attn_type: AttentionType,
        tokens: range,
        generator: torch.Generator,
        std: float,
        noise: torch.Tensor | None,
        topk_indices: torch.Tensor | None,
    ) -> _Draws:
        if noise is None:
            size = (len(tokens), shape.num_heads, shape.qk_head_dim)
            noise = torch.randn(size, generator=generator)
        noise = noise * std
        own = torch.arange(tokens.start, tokens.stop)
        needles = tuple(_needles(request, shape, attn_type, own, generator, topk_indices))
        most = request.seq_len if topk_indices is None else topk_indices.shape[1]
        boost = needle_boost(min(most, _num_seen(request, shape)), std)
        return cls(
            noise,
            torch.full((len(tokens),), index),
            torch.full((len(tokens), 1, 1), boost),
            needles,
        )

    @classmethod
    def joined(cls, pieces: Sequence[_Draws], limit: int, device: torch.device) -> _Draws:
        """The first pieces of up to `limit` tokens together, at least one, on `device`."""
        sizes = itertools.accumulate(len(piece.noise) for piece in pieces)
        count = max(1, sum(size <= limit for size in sizes))
        first = pieces[:count]

        def together(part: Callable[[_Draws], torch.Tensor]) -> torch.Tensor:
            return torch.cat([part(piece) for piece in first]).to(device)

        needles = tuple(
            (together(lambda p: p.needles[k][0]), together(lambda p: p.needles[k][1]))  # noqa: B023
            for k in range(len(first[0].needles))
        )
        return cls(
            together(lambda p: p.noise),
            together(lambda p: p.requests),
            together(lambda p: p.boost),
            needles,
            count,
        )


def _constant_key(shape: AttentionShape, w_uk: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Unit vector per head (num_heads or 1, qk_head_dim) along the key of a constant cache row."""
    if shape.is_mla:
        rotary = torch.ones((shape.num_heads, shape.qk_rope_head_dim), device=device)
        key = torch.cat([w_uk.float().sum(-1), rotary], dim=-1)
    else:
        key = torch.ones((1, shape.head_size), device=device)
    norm: torch.Tensor = key.norm(dim=-1, keepdim=True)
    return key / norm


def _lean(query: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """`query` (C, num_heads, size) with its part along `direction` set to its own root mean square:
    as large as chance would make it, but never negative."""
    rms = query.square().mean(-1, keepdim=True).sqrt()
    along = (query * direction).sum(-1, keepdim=True)
    return query + (rms - along) * direction


def _noise_std(shape: AttentionShape) -> float:
    """Standard deviation of the logits of ordinary keys.

    One; with a soft cap large enough that the cap bends them (`cap * tanh(s / cap)` differs from
    `s` by s^3 / 3 cap^2), else a kernel that forgets the cap would pass.
    """
    return min(4.0, max(1.0, shape.logits_soft_cap / 12))


def needle_boost(num_keys: int, std: float) -> float:
    """Logit of a needle: one above the log of the summed weight of `num_keys` ordinary keys.

    For normal logits that log is `ln n + std^2 / 2` while `std < sqrt(2 ln n)`; above it the
    largest one dominates and it is `std * sqrt(2 ln n)` (random energy model, B. Derrida,
    Phys. Rev. B 24 (1981) 2613).
    """
    log_n = math.log(max(num_keys, 2))
    critical = math.sqrt(2 * log_n)
    return 1.0 + (log_n + std * std / 2 if std < critical else std * critical)


def _num_seen(request: Request, shape: AttentionShape) -> int:
    return min(request.seq_len, shape.sliding_window or request.seq_len)


def _needles(
    request: Request,
    shape: AttentionShape,
    attn_type: AttentionType,
    tokens: torch.Tensor,
    generator: torch.Generator,
    topk_indices: torch.Tensor | None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(positions, valid) pairs for query tokens (C,), both (C, 1) or (C, num_heads).

    A position is valid once only: a key added twice would leave nothing for the others.
    """
    seq_len, window = request.seq_len, shape.sliding_window
    heads = 1 if shape.is_mla else shape.num_heads
    draws = torch.rand((len(tokens), heads), generator=generator)
    if attn_type is AttentionType.DECODER:
        own = tokens + seq_len - request.query_len
        # The token after the last one exists in the data: it lies behind the end of the cache.
        edges = [own, own + 1]
        if window:
            edges += [own - window + 1, own - window]
        lowest = (own - window + 1).clamp_min(0) if window else torch.zeros_like(own)
        limit = seq_len + 1
        drawn = lowest[:, None] + (draws * (own - lowest + 1)[:, None]).long()
    else:
        edges = [torch.zeros_like(tokens), torch.full_like(tokens, seq_len - 1)]
        if window:
            edges += [tokens + d for d in (window - 1, window, 1 - window, -window)]
        limit = seq_len
        drawn = (draws * seq_len).long()
    drawn = drawn.clamp_max(seq_len - 1)
    places = [*(edge[:, None] for edge in edges), drawn]
    if topk_indices is not None:
        places += _chosen_needles(topk_indices.long(), generator)
    before: list[torch.Tensor] = []
    for positions in places:
        valid = (positions >= 0) & (positions < limit)
        for other in before:
            valid = valid & (positions != other)
        before.append(positions)
        yield positions.clamp(0, limit - 1), valid


def _chosen_needles(chosen: torch.Tensor, generator: torch.Generator) -> list[torch.Tensor]:
    """Of the positions (C, k) that each query attends to: the first, the last and a random one."""
    count = (chosen >= 0).sum(-1, keepdim=True)
    draws = torch.rand(count.shape, generator=generator)
    return [chosen.gather(1, at) for at in (0 * count, count - 1, (draws * count).long())]


def _keys_at(
    requests: torch.Tensor,
    positions: torch.Tensor,
    shape: AttentionShape,
    tokens: BatchTokens,
    w_uk: torch.Tensor,
) -> torch.Tensor:
    """Expanded keys (C, num_heads, qk_head_dim), float32, of positions (C, 1) or (C, num_heads)
    of `requests` (C,)."""
    ids = tokens.ids(requests[:, None], positions)
    if shape.is_mla:
        latent = tokens.key_pool.take(ids[:, 0]).float()
        nope = torch.einsum("hnl,cl->chn", w_uk.float(), latent)
        pe = tokens.value_pool.take(ids[:, 0]).float().expand(-1, shape.num_heads, -1)
        return torch.cat([nope, pe], dim=-1)
    group = shape.num_heads // shape.num_kv_heads
    kv_heads = torch.arange(shape.num_heads, device=positions.device) // group
    return tokens.key_pool.take(ids.expand(-1, shape.num_heads), kv_heads).float()
