"""The closed formulas against counting every pair and every byte one by one."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnbench.workload import AttentionType, Request, Workload
from attnbench.workload.cost import attention_bytes, attention_flops, visible_pairs

WIDTH = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8_e4m3": 1, "fp8_e5m2": 1}


def _sees(workload: Workload, request: Request, query: int, key: int) -> bool:
    """Whether query token `query` (0 is the first new one) attends key position `key`."""
    if workload.attn_type is AttentionType.ENCODER_DECODER:
        return True
    position = request.seq_len - request.query_len + query
    window = workload.shape.sliding_window
    if workload.attn_type is AttentionType.DECODER and key > position:
        return False
    if workload.topk_pattern == "prefix":
        return key < workload.topk_tokens
    if workload.topk_pattern == "window":
        return position - key < workload.topk_tokens
    return not window or abs(position - key) < window


def _count(workload: Workload) -> tuple[int, int]:
    """FLOPs and bytes, by walking over requests, heads, queries, keys and tokens."""
    shape = workload.shape
    cached = workload.attn_type in (AttentionType.DECODER, AttentionType.ENCODER_DECODER)
    kv_width = WIDTH.get(workload.resolved_kv_cache_dtype if cached else workload.dtype, 0)
    width = WIDTH[workload.dtype]
    flops = moved = 0
    tokens_read: set[tuple[object, int]] = set()
    weights_read = False
    for index, request in enumerate(workload.requests):
        absorbed = shape.is_mla and (request.query_len == 1 or workload.is_sparse)
        qk = shape.qk_head_dim
        v = shape.v_head_size
        if absorbed:
            qk, v = shape.kv_lora_rank + shape.qk_rope_head_dim, shape.kv_lora_rank
        seen = set()
        for _head in range(shape.num_heads):
            for query in range(request.query_len):
                moved += (qk + v) * width  # the query in, the output out
                for key in range(request.seq_len):
                    if _sees(workload, request, query, key):
                        flops += 2 * qk + 2 * v
                        seen.add(key)
        for key in seen:
            owner = "shared" if key < workload.common_prefix_len else index
            tokens_read.add((owner, key))
            if shape.is_mla and not absorbed:
                weights_read = True
                up = shape.qk_nope_head_dim + shape.v_head_size
                flops += 2 * shape.kv_lora_rank * up * shape.num_heads
    per_token = shape.num_kv_heads * (shape.head_size + shape.v_head_size)
    if shape.is_mla:
        per_token = shape.kv_lora_rank + shape.qk_rope_head_dim
    ds_mla = workload.kv_cache_dtype == "fp8_ds_mla"
    moved += len(tokens_read) * (656 if ds_mla else per_token * kv_width)
    if weights_read:
        up = shape.qk_nope_head_dim + shape.v_head_size
        moved += shape.num_heads * shape.kv_lora_rank * up * width
    return flops, moved


SMALL = [
    "q1",
    "q7",
    "3q1s20",
    "q4s9_2q1s5",
    "q9 window=4",
    "q4s9 window=3",
    "q1s9 window=20",
    "q1s9 window=1",
    "2q3s20 window=8 prefix=16",
    "2q3s20 window=2 prefix=16",
    "q2s40_q1s22 window=12 prefix=16",
    "3q1s20 prefix=16 block=8",
    "3q1s20 lengths=geometric prefix=16",
    "4q6 lengths=uniform:0.5",
    "q7 attn=encoder",
    "q9 attn=encoder_only window=3",
    "q9 attn=encoder window=9",
    "q2s11 attn=encoder_decoder kv=fp8_e4m3",
    "q5 attn=encoder kv=fp8_e4m3",
    "q4s9 dtype=fp32 kv=fp8_e5m2",
    "q4s9 heads=6/2 v_head_size=32 dtype=fp16",
    "q4s9 heads=6/6 head_size=96",
    "3q1s20 heads=4 mla=32+8:16+24",
    "q5 heads=4 mla=32+8:16+24",
    "q3s20_2q1s20 heads=4 mla=32+8:16+24 prefix=16 kv=fp8_e4m3",
    "q3s20 heads=4 mla=32+8:16+24 window=5",
    "q1s20_q3s20 heads=2 mla=32+8:16+24 window=7 prefix=16 dtype=fp32",
    "3q1s20 heads=2 mla=32+8:16+24 topk=7:prefix",
    "3q1s20 heads=2 mla=32+8:16+24 topk=7:window kv=fp8_e4m3",
    "q9_q3s30 heads=2 mla=32+8:16+24 topk=50:window",
    "q9_q3s30 heads=2 mla=32+8:16+24 topk=50:prefix dtype=fp32",
    "q5s29_q1s40 heads=2 mla=32+8:16+24 topk=20:prefix prefix=16",
    "q5s29_q1s40 heads=2 mla=32+8:16+24 topk=9:prefix prefix=16",
    "q5s29_q1s40 heads=2 mla=32+8:16+24 topk=15:window prefix=16",
    "q5s29_q1s40 heads=2 mla=512+64:16+24 topk=15:window prefix=16 kv=fp8_ds_mla",
    "q1s20_q3s20 heads=2 mla=512+64:16+24 kv=fp8_ds_mla",
]


@pytest.mark.parametrize("text", SMALL)
def test_counted_one_by_one(text: str) -> None:
    workload = Workload.parse(text)
    assert (attention_flops(workload), attention_bytes(workload)) == _count(workload)


@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(0, 12)), min_size=1, max_size=4),
    st.integers(1, 20),
    st.integers(0, 12),
    st.sampled_from(["prefix", "window"]),
)
@settings(deadline=None)
def test_any_small_sparse_batch(
    lengths: list[tuple[int, int]], topk: int, prefix: int, pattern: str
) -> None:
    spec = "_".join(f"q{query}s{query + context}" for query, context in lengths)
    prefix = min(prefix, *(context for _, context in lengths), 12)
    workload = Workload.parse(
        f"{spec} heads=2 mla=8+4:6+5 topk={topk}:{pattern} block=1 prefix={prefix}"
    )
    assert (attention_flops(workload), attention_bytes(workload)) == _count(workload)


@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(0, 12)), min_size=1, max_size=4),
    st.integers(1, 20),
)
@settings(deadline=None)
def test_random_choices_count_as_pairs_and_each_token_at_most_once(
    lengths: list[tuple[int, int]], topk: int
) -> None:
    spec = "_".join(f"q{query}s{query + context}" for query, context in lengths)
    shape = "heads=2 mla=8+4:6+5"
    chosen, window, dense = (
        Workload.parse(f"{spec} {shape} {word}")
        for word in (f"topk={topk}:random", f"topk={topk}:window", "")
    )
    assert attention_flops(chosen) == attention_flops(window)
    by_hand = 0
    for request in chosen.requests:
        own = range(request.seq_len - request.query_len, request.seq_len)
        by_hand += min(request.seq_len, sum(min(topk, position + 1) for position in own))
        assert visible_pairs(chosen, request) == sum(min(topk, p + 1) for p in own)
        assert visible_pairs(chosen, request) <= visible_pairs(dense, request)
    queries = chosen.num_tokens * 2 * (12 + 8) * 2
    assert attention_bytes(chosen) == queries + by_hand * 12 * 2


def test_sparse_decode_by_hand() -> None:
    """32 requests of 8k tokens, 2048 chosen of each: DeepSeek-V3.2's decode on one of 8 ranks."""
    text = "32q1s8k shape=deepseek-v3.2 tp=8 topk=2048:random"
    workload = Workload.parse(text)
    assert attention_flops(workload) == 32 * 2048 * 16 * 2 * (576 + 512)
    queries = 32 * 16 * (576 + 512) * 2
    assert attention_bytes(workload) == queries + 32 * 2048 * 576 * 2
    assert attention_bytes(Workload.parse(f"{text} kv=fp8_ds_mla")) == queries + 32 * 2048 * 656


@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(0, 12)), min_size=1, max_size=4),
    st.integers(0, 20),
    st.integers(0, 12),
    st.sampled_from(["heads=4/2 head_size=8", "heads=2 mla=8+4:6+5"]),
)
@settings(deadline=None)
def test_any_small_batch(
    lengths: list[tuple[int, int]], window: int, prefix: int, shape: str
) -> None:
    spec = "_".join(f"q{query}s{query + context}" for query, context in lengths)
    prefix = min(prefix, *(context for _, context in lengths), 12)
    workload = Workload.parse(f"{spec} {shape} window={window} block=1 prefix={prefix}")
    assert (attention_flops(workload), attention_bytes(workload)) == _count(workload)


@given(
    spec=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 9)), min_size=1, max_size=3),
    heads=st.sampled_from(["heads=4/4", "heads=4/2", "heads=6/1"]),
    sizes=st.sampled_from(["head_size=8", "head_size=8 v_head_size=5"]),
    dtype=st.sampled_from(["fp32", "fp16", "bf16"]),
    kv=st.sampled_from(["auto", "fp32", "bf16", "fp8_e4m3", "fp8_e5m2"]),
    attn=st.sampled_from(["decoder", "encoder", "encoder_only", "encoder_decoder"]),
    window=st.integers(0, 6),
)
@settings(deadline=None)
def test_any_heads_types_and_directions(
    spec: list[tuple[int, int]],
    heads: str,
    sizes: str,
    dtype: str,
    kv: str,
    attn: str,
    window: int,
) -> None:
    encodes = attn in ("encoder", "encoder_only")
    batch = "_".join(f"q{q}s{q + (0 if encodes else context)}" for q, context in spec)
    window = 0 if attn == "encoder_decoder" else window
    workload = Workload.parse(
        f"{batch} {heads} {sizes} dtype={dtype} kv={kv} attn={attn} window={window}"
    )
    assert (attention_flops(workload), attention_bytes(workload)) == _count(workload)


@pytest.mark.parametrize("shape", ["llama-3-8b", "deepseek-v3"])
def test_the_unused_part_of_a_last_block_is_not_counted(shape: str) -> None:
    costs = {
        (attention_flops(w), attention_bytes(w))
        for block in (1, 16, 64, 256)
        for w in [Workload.parse(f"3q1s1001_q7s33 shape={shape} block={block}")]
    }
    assert len(costs) == 1


def test_grouped_heads_read_their_keys_and_values_once() -> None:
    grouped = Workload.parse("4q1s4k heads=32/4")
    every = Workload.parse("4q1s4k heads=32/32")
    queries = 4 * 32 * 256 * 2
    assert attention_bytes(every) - queries == 8 * (attention_bytes(grouped) - queries)
    assert attention_flops(every) == attention_flops(grouped)


def test_an_fp8_cache_halves_what_is_read_and_nothing_else() -> None:
    half = Workload.parse("4q3s4k")
    byte = Workload.parse("4q3s4k kv=fp8_e4m3")
    queries = 4 * 3 * 32 * 256 * 2
    assert attention_bytes(half) - queries == 2 * (attention_bytes(byte) - queries)
    assert attention_flops(half) == attention_flops(byte)


@given(st.integers(1, 30), st.integers(0, 40))
@settings(deadline=None)
def test_encoder_pairs(tokens: int, window: int) -> None:
    workload = Workload.parse(f"q{tokens} attn=encoder window={window}")
    expected = sum(
        1 for i in range(tokens) for j in range(tokens) if not window or abs(i - j) < window
    )
    assert visible_pairs(workload, workload.requests[0]) == expected


def test_published_numbers() -> None:
    # FlashAttention-2 (arXiv:2307.08691, 4.1): an unmasked forward is 4 s^2 d heads.
    encoder = Workload.parse("q2k attn=encoder heads=32/32")
    assert attention_flops(encoder) == 4 * 2048**2 * 128 * 32
    # A causal one is half of it, plus the diagonal.
    causal = Workload.parse("q2k heads=32/32")
    assert attention_flops(causal) == (2048**2 + 2048) // 2 * 4 * 128 * 32
    # Llama-3-8B decode reads 2 x 8 x 128 values per token and layer: 4 KiB in bf16.
    decode = Workload.parse("8q1s4k")
    assert attention_bytes(decode) == 8 * 4096 * 4096 + 8 * 32 * 256 * 2
    # DeepSeek-V3 keeps 576 values per token and layer: 1152 bytes in bf16.
    latent = Workload.parse("8q1s4k shape=deepseek-v3")
    assert attention_bytes(latent) == 8 * 4096 * 1152 + 8 * 128 * (576 + 512) * 2
    assert attention_flops(latent) == 8 * 4096 * 128 * 2 * (576 + 512)


def test_closed_formulas_do_not_walk_over_tokens() -> None:
    workload = Workload.parse("4096q1s128k lengths=geometric prefix=1k")
    assert attention_flops(workload) > 0
    assert attention_bytes(workload) > 0
