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

**Sparse MLA** (DeepSeek-V3.2-Exp, technical report, section 2.1; k = topk_tokens): query position p
attends to min(p + 1, k) latents, the pairs of a window of k, and every request is counted in the
absorbed form, whatever its length: no two queries share what would be expanded. Choosing the k is
the indexer's work and outside. A query reads the latents it attends to; one that several queries
read counts once, as everywhere: of a request, min(s, k) for the pattern `prefix`,
min(s, q + k - 1) for `window`, and for `random` min(s, pairs), which is what it reads when no two
draws meet, and at most all. `fp8_ds_mla` is 656 bytes a token.
"""

from __future__ import annotations

from attnbench.workload.text import DS_MLA
from attnbench.workload.types import AttentionType, Request
from attnbench.workload.workload import Workload

BYTES_PER_VALUE = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8_e4m3": 1, "fp8_e5m2": 1}
#: 512 e4m3 values, four fp32 scales, 64 bf16 values.
DS_MLA_BYTES_PER_TOKEN = 512 + 4 * 4 + 64 * 2


def attention_flops(workload: Workload) -> int:
    """Floating-point operations of one call of one layer (module docstring: formula, source)."""
    shape = workload.shape
    flops = 0
    for request in workload.requests:
        pairs = visible_pairs(workload, request)
        if not shape.is_mla:
            flops += 2 * pairs * (shape.head_size + shape.v_head_size)
        elif is_absorbed(workload, request):
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
        if shape.is_mla and is_absorbed(workload, request):
            sizes = shape.head_size + shape.kv_lora_rank
        moved += request.query_len * shape.num_heads * sizes * width
    if shape.is_mla and not all(is_absorbed(workload, r) for r in workload.requests):
        expanded = shape.qk_nope_head_dim + shape.v_head_size
        moved += shape.num_heads * shape.kv_lora_rank * expanded * width
    return moved + _cached_tokens_read(workload) * _bytes_per_token(workload)


def is_absorbed(workload: Workload, request: Request) -> bool:
    """Whether MLA serves the request in its absorbed (latent) form: a decode, or a sparse one."""
    return request.query_len == 1 or workload.is_sparse


def visible_pairs(workload: Workload, request: Request) -> int:
    """Pairs of a query token and a key token that attend, per query head."""
    window, tokens = workload.topk_tokens or workload.shape.sliding_window, request.seq_len
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
    """Tokens of `request` that at least one of its queries sees."""
    first, last = _seen_range(workload, request)
    return last - first


def _seen_range(workload: Workload, request: Request) -> tuple[int, int]:
    """First and one past the last token that queries of `request` see; all between are seen, but
    for the pattern `random`, which may see any."""
    window = workload.shape.sliding_window
    if workload.topk_pattern == "prefix":
        return 0, min(request.seq_len, workload.topk_tokens)
    if workload.topk_pattern == "window":
        window = workload.topk_tokens
    if workload.causal and window:
        return max(0, request.seq_len - request.query_len - window + 1), request.seq_len
    return 0, request.seq_len


def _cached_tokens_read(workload: Workload) -> int:
    """Tokens whose keys and values are read: those of the common prefix once for all requests."""
    prefix = workload.common_prefix_len
    ranges = [_seen_range(workload, r) for r in workload.requests]
    own = sum(max(0, last - max(first, prefix)) for first, last in ranges)
    shared = min(prefix, max(last for _, last in ranges)) - min(first for first, _ in ranges)
    read = own + max(0, shared)
    if workload.topk_pattern == "random":
        drawn = (min(r.seq_len, visible_pairs(workload, r)) for r in workload.requests)
        return min(read, sum(drawn))
    return read


def _bytes_per_token(workload: Workload) -> int:
    """Bytes of one token's keys and values in one layer, where the kernel reads them."""
    shape = workload.shape
    if workload.resolved_kv_cache_dtype == DS_MLA:
        return DS_MLA_BYTES_PER_TOKEN
    cached = workload.attn_type in (AttentionType.DECODER, AttentionType.ENCODER_DECODER)
    width = BYTES_PER_VALUE[workload.resolved_kv_cache_dtype if cached else workload.dtype]
    if shape.is_mla:
        return shape.head_size * width
    return shape.num_kv_heads * (shape.head_size + shape.v_head_size) * width
