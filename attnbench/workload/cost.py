"""FLOPs and bytes of one call of one layer, by closed formulas: what the metric `attention` needs.

They count what the mathematics needs, whatever a kernel does: masked pairs, padding, the unused
part of a last block, recomputation and the softmax itself are not counted. A reader divides them
by the time to get TFLOP/s and GB/s, so that two kernels are compared on the same work.

Notation, per request: `q` query tokens, `s` tokens in all, `c = s - q` in the cache before the
step, `w` the sliding window, `H` and `Hkv` heads, `D` and `Dv` widths of a query and a value head.

**Pairs** of a query and a key that may see each other:

- decoder: query position p in [c, s) sees min(p + 1, w) keys, so F(s) - F(c) with
  F(n) = n(n+1)/2 for n <= w, else w(w+1)/2 + (n - w)w;
- encoder, encoder_only (q = s): |i - j| < w, so s^2 - (s - w)(s - w + 1) with a window s > w,
  else s^2;
- encoder_decoder: q s.

**FLOPs**: 2 D for the logit and 2 Dv for the weighted sum of each pair and query head:
`2 H pairs (D + Dv)`. With q = s and no window this is half of the 4 s^2 D H of an unmasked
forward, plus the diagonal (the convention of the FlashAttention papers, arXiv:2307.08691, section
4.1). Soft cap, ALiBi and sinks add no matrix work.

**Bytes**: queries are read once and outputs written once, q H (D + Dv) at the width of the dtype;
of each request, the keys and values that some query sees are read once, each
`Hkv (D + Dv)` at the width of the KV cache (of the dtype for encoders, which have no cache):
min(s, q + w - 1) tokens for a decoder. Tokens of the common prefix are read once for all requests.
Block tables, lengths, scales and sinks are not counted.

**MLA** (DeepSeek-V2, arXiv:2405.04434, section 2.1; R = kv_lora_rank, P = qk_rope_head_dim,
N = qk_nope_head_dim). A request with one query token is counted in the absorbed form: D = R + P,
Dv = R, one latent of R + P per token, and the projections by W_UK and W_UV belong to the layer and
are outside. Any other request is counted in the expanded form: D = N + P, plus the up-projection of
the tokens that some query sees, 2 R H (N + Dv) each, and the weights of the up-projection are read
once per call, R H (N + Dv).
"""

from __future__ import annotations

from attnbench.workload.types import AttentionType, Request
from attnbench.workload.workload import Workload

BYTES_PER_VALUE = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8_e4m3": 1, "fp8_e5m2": 1}


def attention_flops(workload: Workload) -> int:
    """Floating-point operations of one call of one layer (module docstring: formula, source)."""
    shape = workload.shape
    flops = 0
    for request in workload.requests:
        pairs = visible_pairs(workload, request)
        if not shape.is_mla:
            flops += 2 * pairs * (shape.head_size + shape.v_head_size)
        elif is_absorbed(request):
            flops += 2 * pairs * (shape.head_size + shape.kv_lora_rank)
        else:
            expanded = shape.qk_nope_head_dim + shape.v_head_size
            flops += 2 * pairs * (shape.qk_head_dim + shape.v_head_size)
            flops += 2 * _seen_tokens(workload, request) * shape.kv_lora_rank * expanded
    return flops * shape.num_heads


def attention_bytes(workload: Workload) -> int:
    """Bytes that one call of one layer must move (module docstring: formula, source)."""
    shape = workload.shape
    width = BYTES_PER_VALUE[workload.dtype]
    moved = 0
    for request in workload.requests:
        sizes = shape.qk_head_dim + shape.v_head_size
        if shape.is_mla and is_absorbed(request):
            sizes = shape.head_size + shape.kv_lora_rank
        moved += request.query_len * shape.num_heads * sizes * width
    if shape.is_mla and not all(is_absorbed(request) for request in workload.requests):
        expanded = shape.qk_nope_head_dim + shape.v_head_size
        moved += shape.num_heads * shape.kv_lora_rank * expanded * width
    return moved + _cached_tokens_read(workload) * _bytes_per_token(workload)


def is_absorbed(request: Request) -> bool:
    """Whether MLA serves the request in its absorbed (latent) form: a decode."""
    return request.query_len == 1


def visible_pairs(workload: Workload, request: Request) -> int:
    """Pairs of a query token and a key token that attend, per query head."""
    window, tokens = workload.shape.sliding_window, request.seq_len
    if workload.attn_type is AttentionType.ENCODER_DECODER:
        return request.query_len * tokens
    if workload.causal:
        context = tokens - request.query_len
        return _causal_pairs(tokens, window) - _causal_pairs(context, window)
    if 0 < window < tokens:
        return tokens**2 - (tokens - window) * (tokens - window + 1)
    return tokens**2


def _causal_pairs(tokens: int, window: int) -> int:
    """Pairs when `tokens` tokens are both queries and keys."""
    seen = min(tokens, window) if window else tokens
    return seen * (seen + 1) // 2 + (tokens - seen) * seen


def _seen_tokens(workload: Workload, request: Request) -> int:
    """Tokens of `request` that at least one of its queries sees: its last ones."""
    window = workload.shape.sliding_window
    if workload.causal and window:
        return min(request.seq_len, request.query_len + window - 1)
    return request.seq_len


def _cached_tokens_read(workload: Workload) -> int:
    """Tokens whose keys and values are read: those of the common prefix once for all requests."""
    prefix = workload.common_prefix_len
    first = [r.seq_len - _seen_tokens(workload, r) for r in workload.requests]
    own = sum(
        r.seq_len - max(start, prefix) for r, start in zip(workload.requests, first, strict=True)
    )
    return own + max(0, prefix - min(first))


def _bytes_per_token(workload: Workload) -> int:
    """Bytes of one token's keys and values in one layer, where the kernel reads them."""
    shape = workload.shape
    cached = workload.attn_type in (AttentionType.DECODER, AttentionType.ENCODER_DECODER)
    width = BYTES_PER_VALUE[workload.resolved_kv_cache_dtype if cached else workload.dtype]
    if shape.is_mla:
        return shape.head_size * width
    return shape.num_kv_heads * (shape.head_size + shape.v_head_size) * width
