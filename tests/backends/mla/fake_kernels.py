"""What the fake libraries compute, in plain torch, and refuse.

The checks of FlashMLA's csrc/api, of FlashAttention's hopper/flash_api.cpp, of FlashInfer's Python
interfaces and launchers, of vLLM's csrc/attention/mla. Each takes the arguments of its call as a
namespace.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from tests.backends.flash_attn import fake_library as flash_attn
from tests.backends.flash_attn.fake_library import FP8, HALF, check, pages

RANK, ROPE = 512, 64


def latent_attention(
    absorbed: torch.Tensor, rope: torch.Tensor, latents: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """One request. Queries (S, H, rank) and (S, H, rope), latents (n, rank + rope): output (S, H,
    rank) and natural LSE (S, H), the mask aligned to the bottom right corner."""
    query = torch.cat([absorbed, rope], -1).float()
    keys = latents.float()
    logits = torch.einsum("shd,nd->shn", query, keys) * scale
    if causal:
        row = torch.arange(len(query))[:, None] + len(keys) - len(query)
        hidden = torch.arange(len(keys))[None] > row
        logits = logits.masked_fill(hidden[:, None], -math.inf)
    values = keys[:, : absorbed.shape[-1]]
    return torch.einsum("shn,nd->shd", logits.softmax(-1), values), logits.logsumexp(-1)


# --- FlashMLA -------------------------------------------------------------------------------------
class FlashMLASchedMeta:
    def __init__(self) -> None:
        self.made_for: tuple[Any, ...] | None = None


def _check_flashmla(q: torch.Tensor, a: Any, cache: torch.Tensor, table: torch.Tensor) -> None:
    check(a.cache_seqlens.dtype is torch.int32, "seqlens_k must have dtype int32")
    check(a.cache_seqlens.is_contiguous(), "seqlens_k must be contiguous")
    check(table.dtype is torch.int32, "block_table must have dtype torch.int32")
    check(table.stride(-1) == 1, "block_table must have contiguous last dimension")
    check(cache.stride(-1) == 1, "kcache must have contiguous last dimension")
    check(q.dim() == 4 and q.shape[-1] == RANK + ROPE, "Only head_size_k == 576 is supported")
    check(a.head_dim_v == RANK, "Only head_size_v == 512 is supported")
    check(tuple(cache.shape[1:]) == (64, 1, RANK + ROPE), "Currently page_block_size must be 64")
    check(len(q) > 0, "batch size must be positive")
    check(len(table) == len(q) == len(a.cache_seqlens), "must have shape (batch_size)")


def _flashmla(
    q: torch.Tensor, a: Any, scales: tuple[float, float] = (1.0, 1.0)
) -> tuple[torch.Tensor, torch.Tensor]:
    lengths: list[int] = a.cache_seqlens.tolist()
    out = torch.zeros((*q.shape[:3], RANK))
    lse = torch.zeros(q.shape[:3])
    for i in range(len(q)):
        latents = pages(a.k_cache.squeeze(2), a.block_table, lengths, i).float() * scales[1]
        query = q[i].float() * scales[0]
        out[i], lse[i] = latent_attention(
            query[..., :RANK], query[..., RANK:], latents, a.softmax_scale, a.causal
        )
    return out, lse.transpose(1, 2)


def flashmla_dense(a: Any) -> tuple[torch.Tensor, torch.Tensor]:
    meta = a.tile_scheduler_metadata
    assert isinstance(meta, FlashMLASchedMeta), "must be of type FlashMLASchedMeta"
    assert a.num_splits is None
    assert a.indices is None
    assert not a.is_fp8_kvcache
    check(a.q.dtype in HALF, "Expected q_dtype == torch::kBFloat16 || q_dtype == torch::kHalf")
    check(a.k_cache.dtype == a.q.dtype, "query and key must have the same dtype")
    _check_flashmla(a.q, a, a.k_cache, a.block_table)
    made_for = (tuple(a.q.shape), a.causal, a.cache_seqlens.tolist())
    assert meta.made_for in (None, made_for), "inconsistent with sched_meta"
    meta.made_for = made_for
    result, lse = _flashmla(a.q, a)
    given = getattr(a, "out", None)
    if given is None:
        return result.to(a.q.dtype), lse
    batch, length, heads = a.q.shape[:3]
    check(given.dtype == a.q.dtype, "out must have the same dtype as q")
    rows = (batch, 1, length * heads, RANK)
    check(tuple(given.shape) == rows, "out must have shape (batch_size, num_heads, q_seq_per_hk,")
    check(given.is_contiguous(), "out must be contiguous")
    given.copy_(result.view(rows))
    return given.view(batch, length, heads, RANK), lse


def flashmla_fp8_metadata(a: Any) -> tuple[torch.Tensor, torch.Tensor]:
    check(a.cache_seqlens.dtype is torch.int32, "seqlens_k must have dtype int32")
    check(a.num_heads_k == 1, "one latent head")
    tiles = torch.full((4, 8), a.num_q_tokens_per_head_k, dtype=torch.int32)
    return tiles, torch.zeros(len(a.cache_seqlens) + 1, dtype=torch.int32)


def flashmla_fp8(a: Any) -> tuple[torch.Tensor, torch.Tensor]:
    check(a.q.dtype is FP8, "Expected q.dtype() == torch::kFloat8_e4m3fn")
    check(a.k_cache.dtype is FP8, "query and key must have the same dtype")
    _check_flashmla(a.q, a, a.k_cache, a.block_table)
    rows = a.q.shape[1] * a.q.shape[2]
    check(int(a.tile_scheduler_metadata[0, 0]) == rows, "a schedule of another batch")
    check(tuple(a.num_splits.shape) == (len(a.q) + 1,), "num_splits must have shape (batch_size+1)")
    for scale in (a.descale_q, a.descale_k):
        check(tuple(scale.shape) == (1,) and scale.dtype is torch.float32, "must have shape (1)")
    out, lse = _flashmla(a.q, a, (float(a.descale_q), float(a.descale_k)))
    return out.to(torch.bfloat16), lse


# --- FlashAttention 3, absorbed, and prefill of other widths --------------------------------------
def digest(*facts: Any) -> int:
    return hash(tuple(str(fact) for fact in facts)) % (1 << 31)


def fa3_schedule(a: Any) -> torch.Tensor:
    check(a.cache_seqlens.dtype is torch.int32, "seqused_k must have dtype int32")
    result = torch.zeros(1 + -(-a.batch_size // 4) * 4 * 4, dtype=torch.int32)
    result[-1] = digest(
        *(a.batch_size, a.max_seqlen_q, a.max_seqlen_k, a.num_heads_q, a.num_heads_kv, a.headdim),
        *(a.headdim_v, a.qkv_dtype, a.page_size, a.causal, a.num_splits),
        *(a.cache_seqlens.tolist(), a.cu_seqlens_q.tolist()),
    )
    return result


def fa3_absorbed(
    a: Any,
    q_v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    table: torch.Tensor,
    longest: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (total_q, heads, rank) float32 and LSE (heads, total_q)."""
    rank = values.shape[-1]
    batch = len(a.cu_seqlens_q) - 1
    check(a.q.shape[-1] <= 64, "q_v is only supported for head_size <= 64")
    check(rank >= 256, "q_v is only supported for hdim_v >= 256.")
    check(a.q.dtype in HALF, "q_v is only supported for fp16 and bf16 data type")
    check(q_v.dtype == a.q.dtype == keys.dtype == values.dtype, "must have the same dtype")
    check(tuple(q_v.shape) == (*a.q.shape[:2], rank), "q_v must have shape (total_q, num_heads, ")
    for x in (a.q, q_v, keys, values):
        check(x.stride(-1) == 1, "tensor must have contiguous last dimension")
    flash_attn.check_table(table, batch, "page_table")
    flash_attn.check_lengths(lengths, batch, longest)
    check(int(a.cu_seqlens_q.diff().max()) <= a.max_seqlen_q, "a query is longer than max_seqlen_q")
    if a.scheduler_metadata is not None:
        made_for = digest(
            *(batch, a.max_seqlen_q, longest, a.q.shape[1], keys.shape[2], a.q.shape[-1], rank),
            *(a.q.dtype, keys.shape[1], a.causal, a.num_splits),
            *(lengths.tolist(), a.cu_seqlens_q.tolist()),
        )
        check(int(a.scheduler_metadata[-1]) == made_for, "the schedule was made for another call")
    both = torch.cat([values, keys], -1).squeeze(2)
    starts, seen = a.cu_seqlens_q.tolist(), lengths.tolist()
    out = torch.zeros((*a.q.shape[:2], rank))
    lse = torch.zeros((a.q.shape[1], len(a.q)))
    for i in range(batch):
        rows = slice(starts[i], starts[i + 1])
        latents = pages(both, table, seen, i)
        out[rows], found = latent_attention(
            q_v[rows], a.q[rows], latents, a.softmax_scale, a.causal
        )
        lse[:, rows] = found.T
    return out, lse


def check_prefill_widths(a: Any, version: int) -> None:
    qk, v = a.q.shape[-1], a.v.shape[-1]
    if version == 4:
        return  # it checks them itself
    if version == 2:
        check(qk == v, "v must have shape (total_k, num_heads_k, head_size)")
        return
    large = 128 < qk <= 192 and 96 < v <= 128
    check(qk == v or large or (qk <= 64 and v <= 512), "If V headdim is different from Q/K dim")


def vllm_varlen(a: Any) -> Any:
    if a.q_v is None:
        check_prefill_widths(a, a.fa_version)
        if a.out is None:
            a.out = a.q.new_empty((*a.q.shape[:2], a.v.shape[-1]))
        return flash_attn.vllm_varlen(a)
    assert a.fa_version == 3
    result, lse = fa3_absorbed(a, a.q_v, a.k, a.v, a.seqused_k, a.block_table, a.max_seqlen_k)
    out = torch.empty_like(a.q_v) if a.out is None else a.out
    check(out.dtype == a.q.dtype and out.stride(-1) == 1, "out")
    out.copy_(result)
    return (out, lse) if a.return_softmax_lse else out


def upstream_kvcache(a: Any) -> Any:
    longest = a.page_table.shape[1] * a.k_cache.shape[1]
    result, lse = fa3_absorbed(
        a, a.qv, a.k_cache, a.v_cache, a.cache_seqlens, a.page_table, longest
    )
    out = result.to(a.q.dtype)
    return (out, lse, None, None) if a.return_softmax_lse else out


# --- FlashInfer -----------------------------------------------------------------------------------
def wrapper_init(a: Any) -> None:
    check(a.backend in ("fa2", "fa3"), f"Unsupported backend: {a.backend}")
    check(a.float_workspace_buffer.numel() >= 1 << 27, "the workspace is too small")
    a.self.workspace = a.float_workspace_buffer
    a.self.planned = None


def wrapper_plan(a: Any) -> None:
    for name in ("qo_indptr", "kv_indptr", "kv_indices", "kv_len_arr"):
        check(getattr(a, name).dtype is torch.int32, f"{name} must be int32")
    check(len(a.qo_indptr) == len(a.kv_indptr) == len(a.kv_len_arr) + 1, "batch sizes differ")
    check(len(a.kv_indices) >= int(a.kv_indptr[-1]), "kv_indices is too short")
    needed = -(-a.kv_len_arr // a.page_size)
    check(torch.equal(a.kv_indptr.diff(), needed), "pages and lengths differ")
    check(a.q_data_type in HALF and a.kv_data_type == a.q_data_type, "no such kernel")
    check((a.head_dim_ckv, a.head_dim_kpe) == (RANK, ROPE), "no such kernel")
    a.self.planned = a


def wrapper_run(a: Any) -> Any:
    plan = a.self.planned
    check(plan is not None, "plan() must be called first")
    check(tuple(a.out.shape) == tuple(a.q_nope.shape), "Invalid shape of out")
    check(a.out.dtype == a.q_nope.dtype == plan.q_data_type, "Invalid dtype of out")
    check(a.q_nope.shape[1] == plan.num_heads, "num_heads")
    check(len(a.q_nope) == int(plan.qo_indptr[-1]), "planned for other queries")
    check(a.ckv_cache.shape[1] == plan.page_size, "page_size")
    a.self.workspace[:64] = 7  # partial results of split contexts
    cache = torch.cat([a.ckv_cache, a.kpe_cache], -1)
    for i in range(len(plan.kv_len_arr)):
        rows = slice(int(plan.qo_indptr[i]), int(plan.qo_indptr[i + 1]))
        blocks = plan.kv_indices[int(plan.kv_indptr[i]) : int(plan.kv_indptr[i + 1])].long()
        latents = cache[blocks].flatten(0, 1)[: int(plan.kv_len_arr[i])]
        out, lse = latent_attention(
            a.q_nope[rows], a.q_pe[rows], latents, plan.sm_scale, plan.causal
        )
        a.out[rows] = out.to(a.out.dtype)
        if a.return_lse:
            check(a.lse.dtype is torch.float32, "Invalid dtype of lse")
            a.lse[rows] = lse if a.return_lse_base_on_e else lse / math.log(2)
    return (a.out, a.lse) if a.return_lse else a.out


def _check_trtllm_gen(a: Any, length: int, heads: int) -> None:
    """The tiles of `selectMlaGenerationKernel` (trtllm/fmha/fmhaKernels.cuh)."""
    check(a.out.dtype is torch.bfloat16, "Invalid dtype of out")
    check(a.workspace_buffer.dtype is torch.uint8, "workspace_buffer")
    check(not bool(a.workspace_buffer[:4096].any()), "Must be initialized to 0 for its first use")
    if a.kv_lora_rank == 512:
        tiles = (8,) if heads <= 8 else (16,) if heads <= 32 else (16, 64)
        even = all(heads % min(heads, tile) == 0 for tile in tiles)
        check(even, "The numHeadsQ/numHeadsKv is not supported.")


def _check_cute_dsl(a: Any, length: int, heads: int) -> None:
    """Of cute_dsl_mla_decode and MLAConfig.can_implement (cute_dsl/attention)."""
    check(a.workspace_buffer.dtype is torch.int8, "workspace_buffer must be torch.int8")
    check(heads == 128, f"requires num_heads >= 128 (or 1 for reduction), got {heads}")
    is_supported = 1 <= length <= 4 and (a.kv_lora_rank, a.qk_rope_head_dim) == (512, 64)
    outputs = (torch.bfloat16,) if a.query.dtype is FP8 else HALF
    check(is_supported and a.out.dtype in outputs, "unsupported configuration")
    a.workspace_buffer[:64] = 7  # partial results of split contexts


def trtllm_decode(a: Any) -> torch.Tensor:
    check(a.backend in ("trtllm-gen", "cute-dsl"), f"Backend {a.backend} not supported")
    check(a.query.dim() == 4, "Expected query.ndim == 4")
    check(a.kv_cache.dim() == 4 and a.kv_cache.shape[1] == 1, "Expected kv_cache.ndim == 3 or 4")
    page = a.kv_cache.shape[2]
    check(page in (32, 64), f"Supported block_size are 32 and 64, got {page}")
    batch, length, heads, width = a.query.shape
    rank = a.kv_lora_rank
    check((rank, a.qk_rope_head_dim) in ((512, 64), (256, 64)), "Unsupported MLA dimensions")
    check(width == a.kv_cache.shape[3] == rank + a.qk_rope_head_dim, "Expected head dim")
    check(a.block_tables.dim() == 2 and len(a.block_tables) == batch, "Expected batch size")
    check(a.block_tables.shape[1] % (128 // page) == 0, "Expected block_num % (128 / block_size)")
    check(a.block_tables.dtype is a.seq_lens.dtype is torch.int32, "int32")
    check(tuple(a.out.shape) == (batch, length, heads, rank), "Invalid shape of out")
    check(a.query.dtype == a.kv_cache.dtype, "query and cache differ")
    check(int(a.seq_lens.max()) <= a.max_seq_len, "a context is longer than max_seq_len")
    check(isinstance(a.bmm1_scale, float) and isinstance(a.bmm2_scale, float), "float scales")
    check(a.block_tables.is_contiguous(), "the launcher takes rows to follow each other")
    (_check_cute_dsl if a.backend == "cute-dsl" else _check_trtllm_gen)(a, length, heads)
    lengths: list[int] = a.seq_lens.tolist()
    for i in range(batch):
        latents = pages(a.kv_cache.squeeze(1), a.block_tables, lengths, i).float()
        query = a.query[i].float()
        out, _ = latent_attention(query[..., :rank], query[..., rank:], latents, a.bmm1_scale, True)
        a.out[i] = (out * a.bmm2_scale).to(a.out.dtype)
    return a.out  # type: ignore[no-any-return]


# --- CUTLASS --------------------------------------------------------------------------------------
def cutlass_workspace(a: Any) -> int:
    check(a.num_kv_splits == -1 and a.sm_count >= 1, "arguments")
    return int(a.max_seq_len * a.num_batches)


def cutlass_decode(a: Any) -> None:
    batch, heads, rank = a.q_nope.shape
    check(heads == 128 and rank == RANK and a.q_pe.shape == (batch, heads, ROPE), "q")
    check(tuple(a.out.shape) == (batch, 128, RANK) and a.out.is_contiguous(), "out")
    check(tuple(a.lse.shape) == (batch, 128) and a.lse.dtype is torch.float32, "lse")
    check(a.kv_c_and_k_pe_cache.dim() == 3, "kv_c_and_k_pe_cache must be a 3D tensor")
    check(tuple(a.kv_c_and_k_pe_cache.shape[1:]) == (128, RANK + ROPE), "page size")
    check(a.q_nope.dtype == a.q_pe.dtype == a.kv_c_and_k_pe_cache.dtype, "dtypes")
    check(a.q_nope.dtype in HALF, "q_nope.dtype needs to be fp16 or bf16")
    check(a.seq_lens.dtype is a.page_table.dtype is torch.int32, "int32")
    check(len(a.page_table) == batch, "B_block_table == B_q")
    check(a.page_table.is_contiguous(), "the kernel takes rows to follow each other")
    check(a.workspace.dtype is torch.uint8, "workspace")
    # It splits as for contexts that fill their row of the table (args_from_options).
    check(len(a.workspace) >= a.page_table.numel() * 128, "the workspace is too small")
    lengths: list[int] = a.seq_lens.tolist()
    for i in range(batch):
        latents = pages(a.kv_c_and_k_pe_cache, a.page_table, lengths, i)
        out, lse = latent_attention(a.q_nope[i, None], a.q_pe[i, None], latents, a.scale, False)
        a.out[i] = out[0].to(a.out.dtype)
        a.lse[i] = lse[0]


BODIES: dict[str, Callable[[Any], Any]] = {
    "flash_mla_with_kvcache": flashmla_dense,
    "get_mla_metadata": lambda a: (FlashMLASchedMeta(), None),
    "get_mla_decoding_metadata_dense_fp8": flashmla_fp8_metadata,
    "fwd_kvcache_mla_fp8": flashmla_fp8,
    "BatchMLAPagedAttentionWrapper.__init__": wrapper_init,
    "BatchMLAPagedAttentionWrapper.plan": wrapper_plan,
    "BatchMLAPagedAttentionWrapper.run": wrapper_run,
    "trtllm_batch_decode_with_kv_cache_mla": trtllm_decode,
    "sm100_cutlass_mla_decode": cutlass_decode,
    "sm100_cutlass_mla_get_workspace_size": cutlass_workspace,
}
