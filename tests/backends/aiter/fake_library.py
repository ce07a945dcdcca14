"""AITER as it looks from outside, computing with plain torch on the CPU.

Signatures are the recorded ones (`signatures.json`): a parameter they lack is a TypeError. What the
real functions refuse is refused: their Python asserts, the checks of csrc/py_itfs_cu/asm_mla.cu and
of csrc/cpp_itfs/pa/pa_v1.py, and the sizes their kernels are compiled for.
"""

from __future__ import annotations

import inspect
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.backends.flash_attn.fake_library import (
    FP8,
    HALF,
    Call,
    attend,
    check,
    check_lengths,
    check_table,
    pages,
    split,
)
from tests.backends.mla.fake_library import with_signature

RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "signatures.json").read_text())
RECORDS = tuple(RECORDED)
PARTITION_SIZE = 256


def signature_of(parameters: list[list[str | None]]) -> inspect.Signature:
    """A recorded signature."""
    return inspect.Signature(
        [
            inspect.Parameter(
                str(name),
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=inspect.Parameter.empty if text is None else eval(text),
            )
            for name, text in parameters
        ]
    )


def unified(a: SimpleNamespace) -> torch.Tensor:
    assert a.causal, "Only causal attention is supported"
    assert a.q_descale is None, "Q scales not supported"
    heads, kv_heads, block = a.q.shape[1], a.k.shape[2], a.v.shape[1]
    assert a.sinks is None or a.sinks.shape[0] == heads, "Sinks must be num_query_heads size"
    assert 128 // (heads // kv_heads) >= 1
    # A tile of a decode is a block, and tl.arange wants a power of two.
    check(block & (block - 1) == 0, "arange's range must be a power of 2")
    check(block >= 16, "tl.dot takes 16 keys at least")
    batch = len(a.seqused_k)
    check(tuple(a.cu_seqlens_q.shape) == (batch + 1,), "cu_seqlens_q")
    check_table(a.block_table, batch, "block_table")
    check_lengths(a.seqused_k, batch, a.max_seqlen_k)
    check(int(a.cu_seqlens_q.diff().max()) == a.max_seqlen_q, "max_seqlen_q")
    is_fp8 = a.k.dtype is FP8
    check(is_fp8 or a.k.dtype == a.q.dtype, "Both operands must be same dtype")
    lengths = a.seqused_k.tolist()
    # Read for fp8 keys only.
    scales = (float(a.k_descale), float(a.v_descale)) if is_fp8 else (1.0, 1.0)
    keys, values = (
        [pages(cache, a.block_table, lengths, i).float() * scale for i in range(batch)]
        for cache, scale in zip((a.k, a.v), scales, strict=True)
    )
    result, _ = attend(a, keys, values, a.alibi_slopes, a.sinks)
    a.out.copy_(result)
    return a.out  # type: ignore[no-any-return]


def paged(a: SimpleNamespace) -> torch.Tensor:
    if a.kv_cache_dtype not in ("auto", "fp8", "fp8_e4m3"):
        raise ValueError(f"Unsupported kv_cache_dtype: {a.kv_cache_dtype}")
    if a.query.dtype not in HALF or a.out.dtype not in HALF:
        raise ValueError(f"Unsupported data type: {a.query.dtype}")
    is_fp8 = a.kv_cache_dtype != "auto"
    # The kernel takes the bytes for what it is told they are.
    check(a.key_cache.dtype is (FP8 if is_fp8 else a.query.dtype), "the cache is of another dtype")
    check(a.kv_cache_layout == "NHD", "the view is NHD")
    check(a.key_cache.shape[1] in (16, 32), "blocks of 16 and 32 are compiled")
    check(a.key_cache.stride() == a.value_cache.stride(), "one stride for both")
    check(a.partition_size == PARTITION_SIZE and a.mtp == 1, "partitions of 256")
    batch, heads, size = a.query.shape
    check(tuple(a.cu_query_lens.tolist()) == tuple(range(batch + 1)), "one new token each")
    check_table(a.block_tables, batch, "block_tables")
    check_lengths(a.context_lens, batch, a.max_context_len)
    parts = batch * heads * -(-a.max_context_len // PARTITION_SIZE)
    needed = parts * (size * a.query.element_size() + 2 * 4)
    check(a.workspace_buffer.dtype is torch.uint8, "workspace_buffer holds bytes")
    check(a.workspace_buffer.numel() == needed, f"workspace_buffer must be of {needed} bytes")
    lengths = a.context_lens.tolist()
    scales = (float(a.k_scale), float(a.v_scale)) if is_fp8 else (1.0, 1.0)
    keys, values = (
        [pages(cache, a.block_tables, lengths, i).float() * scale for i in range(batch)]
        for cache, scale in zip((a.key_cache, a.value_cache), scales, strict=True)
    )
    call = SimpleNamespace(
        q=a.query,
        cu_seqlens_q=torch.arange(batch + 1),
        softmax_scale=a.scale,
        softcap=a.logits_soft_cap,
        window_size=(a.sliding_window - 1, 0) if a.sliding_window else (-1, -1),
        causal=True,
    )
    result, _ = attend(call, keys, values, a.alibi_slopes, None)
    a.out.copy_(result)
    return a.out  # type: ignore[no-any-return]


def _varlen(a: SimpleNamespace, soft_cap: float, lse_is_by_head: bool) -> Any:
    check(a.q.dtype in HALF, "FlashAttention only support fp16 and bf16 data type")
    check(a.k.dtype == a.q.dtype == a.v.dtype, "query, key and value must have the same dtype")
    check(a.cu_seqlens_q.dtype is torch.int32, "cu_seqlens_q must have dtype int32")
    check(int(a.cu_seqlens_q.diff().max()) <= a.max_seqlen_q, "a query is longer")
    check(int(a.cu_seqlens_k.diff().max()) <= a.max_seqlen_k, "a context is longer")
    check(a.block_table is None and a.bias is None and a.dropout_p == 0.0, "not passed here")
    keys, values = split(a.k, a.cu_seqlens_k), split(a.v, a.cu_seqlens_k)
    window = tuple(a.window_size[:2])
    call = SimpleNamespace(**{**vars(a), "softcap": soft_cap, "window_size": window})
    result, lse = attend(call, keys, values, a.alibi_slopes, None)
    out = torch.empty_like(result, dtype=a.q.dtype) if a.out is None else a.out
    check(out.dtype == a.q.dtype and tuple(out.shape) == tuple(result.shape), "out")
    out.copy_(result)
    if not a.return_lse:
        return out
    return out, lse if lse_is_by_head else lse.transpose(0, 1).contiguous()


def varlen(a: SimpleNamespace) -> Any:
    return _varlen(a, a.logits_soft_cap, True)


def triton_varlen(a: SimpleNamespace) -> Any:
    return _varlen(a, 0.0, False)


def mla(a: SimpleNamespace) -> Any:
    assert a.logit_cap <= 0
    heads, width = a.o.shape[1:]
    assert a.work_meta_data is None
    assert heads in (16, 128), f"nhead={heads} not supported"
    check(a.q.is_contiguous(), "only support Q.is_contiguous() for now")
    check(a.q.dtype in (torch.bfloat16, FP8), "unsupport current Q_type")
    check((a.q.dtype is FP8) == (a.kv_buffer.dtype is FP8), "no kernel of q_type and kv_type")
    check(tuple(a.kv_buffer.shape[1:]) == (1, 1, a.q.shape[2]), "only support num_kv_heads==1")
    check(a.q.shape[2] == 576 and width == 512, "latents of 512+64")
    check(a.max_seqlen_q == 1, "one new token a request")
    for name in ("qo_indptr", "kv_indptr", "kv_indices", "kv_last_page_lens"):
        check(getattr(a, name).dtype is torch.int32, f"{name} must be int32")
    check(a.qo_indptr.tolist() == list(range(len(a.q) + 1)), "qo_indptr")
    check(a.kv_last_page_lens.tolist() == [1] * len(a.q), "a page is a token")
    check(a.o.dtype is torch.bfloat16, "o is bf16")
    scale = (1.0, 1.0)
    if a.q.dtype is FP8:
        scale = (float(a.q_scale), float(a.kv_scale))
    stored = a.kv_buffer.view(torch.uint8) if a.q.dtype is FP8 else a.kv_buffer
    starts = a.kv_indptr.tolist()
    for i in range(len(a.q)):
        slots = a.kv_indices[starts[i] : starts[i + 1]].long()
        latent = stored[slots].view(a.kv_buffer.dtype).flatten(1).float() * scale[1]
        logits = (a.q[i].float() * scale[0]) @ latent.T * (a.sm_scale or 1 / math.sqrt(576))
        a.o[i] = logits.softmax(-1) @ latent[:, :512]
    return None, None


_BODIES: dict[str, Callable[[SimpleNamespace], Any]] = {
    "unified_attention": unified,
    "paged_attention_v1": paged,
    "flash_attn_varlen_func": varlen,
    "mla_decode_fwd": mla,
    "triton flash_attn_varlen_func": triton_varlen,
}


def install(
    patch: pytest.MonkeyPatch, record: str, leave_out: str = "", lacking: str = ""
) -> list[Call]:
    """Make AITER importable as recorded. Returns its calls, filled as they come.

    leave_out: a function this one has not; lacking: a parameter no function has.
    """
    calls: list[Call] = []
    for name, recorded in RECORDED[record]["functions"].items():
        module = _module(patch, recorded["module"])
        if name == leave_out:
            continue
        parameters = [p for p in recorded["parameters"] if p[0] != lacking]
        function = with_signature(signature_of(parameters), name, _BODIES[name], calls)
        setattr(module, name.rpartition(" ")[2], function)
    return calls


def _module(patch: pytest.MonkeyPatch, name: str) -> ModuleType:
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        path = ".".join(parts[:depth])
        if path not in sys.modules:
            package = ModuleType(path)
            package.__path__ = []
            patch.setitem(sys.modules, path, package)
    return sys.modules[name]
