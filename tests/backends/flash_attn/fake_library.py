"""The FlashAttention libraries as they look from outside, computing with plain torch on the CPU.

Signatures are the recorded ones (`signatures.json`): a parameter they lack is a TypeError. What the
real kernels refuse is refused, with their words: the checks of hopper/flash_api.cpp,
csrc/flash_attn/flash_api.cpp and flash_attn/cute/interface.py, and of vLLM's Python interface.
"""

from __future__ import annotations

import inspect
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "signatures.json").read_text())
_DEFAULTS = {"torch": torch}
HALF = (torch.float16, torch.bfloat16)
FP8 = torch.float8_e4m3fn
#: Compute capability of the device that is played.
ARCH = {"major": 9}


def check(ok: bool, message: str) -> None:
    """As TORCH_CHECK."""
    if not ok:
        raise RuntimeError(message)


def signature_of(record: str, name: str) -> inspect.Signature:
    """The recorded signature of a function."""
    parameters = [
        inspect.Parameter(
            parameter,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=inspect.Parameter.empty if text is None else eval(text, _DEFAULTS),
        )
        for parameter, text in RECORDED[record]["functions"][name]
    ]
    # ast gives defaults only at the end, as Python demands: this is a valid signature.
    return inspect.Signature(parameters)


class Call(NamedTuple):
    """One call of a library: which parameters were passed, and the value of all."""

    name: str
    given: frozenset[str]
    arguments: SimpleNamespace


def with_signature(
    record: str, name: str, body: Callable[[SimpleNamespace], Any], calls: list[Call]
) -> Callable[..., Any]:
    """A function of the recorded signature that hands its bound arguments to `body`."""
    signature = signature_of(record, name)

    def function(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        given = frozenset(bound.arguments)
        bound.apply_defaults()
        arguments = SimpleNamespace(**bound.arguments)
        calls.append(Call(name, given, arguments))
        return body(arguments)

    function.__name__ = name
    function.__signature__ = signature  # type: ignore[attr-defined]
    return function


def attend(
    a: SimpleNamespace,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    alibi: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (total_q, heads, size) float32 and LSE (heads, total_q), request by request."""
    starts = a.cu_seqlens_q.tolist()
    heads = a.q.shape[1]
    out = torch.zeros((a.q.shape[0], heads, values[0].shape[-1]))
    lse = torch.zeros((heads, a.q.shape[0]))
    left, right = a.window_size if a.window_size is not None else (-1, -1)
    if a.causal:
        right = 0
    for request, (key, value) in enumerate(zip(keys, values, strict=True)):
        begin, end = starts[request], starts[request + 1]
        group = heads // key.shape[1]
        query = a.q[begin:end].float()
        if a.q.dtype is FP8:
            query = query * a.q_descale[request].repeat_interleave(group)[None, :, None]
            key = key.float() * a.k_descale[request][None, :, None]
            value = value.float() * a.v_descale[request][None, :, None]
        key = key.float().repeat_interleave(group, 1)
        value = value.float().repeat_interleave(group, 1)
        logits = torch.einsum("qhd,khd->hqk", query, key) * a.softmax_scale
        if a.softcap > 0:
            logits = a.softcap * torch.tanh(logits / a.softcap)
        # The mask is aligned to the bottom right corner.
        row = torch.arange(len(query))[:, None] + len(key) - len(query)
        distance = torch.arange(len(key))[None, :] - row
        if alibi is not None:
            logits = logits - alibi[:, None, None] * distance.abs()
        if left >= 0:
            logits = logits.masked_fill(distance < -left, -math.inf)
        if right >= 0:
            logits = logits.masked_fill(distance > right, -math.inf)
        if sinks is not None:
            extra = sinks.float()[:, None, None].expand(-1, len(query), 1)
            logits = torch.cat([logits, extra], -1)
            value = torch.cat([value, torch.zeros_like(value[:1])])
        out[begin:end] = torch.einsum("hqk,khd->qhd", logits.softmax(-1), value)
        lse[:, begin:end] = logits.logsumexp(-1)
    return out, lse


def pages(
    cache: torch.Tensor, table: torch.Tensor, lengths: list[int], request: int
) -> torch.Tensor:
    """The tokens of a request, out of the blocks its table names."""
    page = cache.shape[1]
    used = -(-lengths[request] // page)
    blocks = table[request, :used].long()
    stored = cache.view(torch.uint8) if cache.dtype is FP8 else cache
    return stored[blocks].flatten(0, 1).view(cache.dtype)[: lengths[request]]


def check_common(a: SimpleNamespace, key: torch.Tensor, value: torch.Tensor) -> None:
    check(key.dtype == a.q.dtype, "query and key must have the same dtype")
    check(value.dtype == a.q.dtype, "query and value must have the same dtype")
    for x in (a.q, key, value):
        check(x.stride(-1) == 1, "Input tensor must have contiguous last dimension")
    check(a.cu_seqlens_q.dtype is torch.int32, "cu_seqlens_q must have dtype torch.int32")
    check(a.cu_seqlens_q.is_contiguous(), "cu_seqlens_q must be contiguous")
    check(a.q.dim() == 3, "q must have shape (total_q, num_heads, head_size)")
    size = a.q.shape[-1]
    check(size <= 256, "FlashAttention forward only supports head dimension at most 256")
    check(a.q.shape[1] % key.shape[-2] == 0, "Number of heads in key/value must divide number of")
    query_lens = a.cu_seqlens_q.diff()
    check(int(query_lens.max()) <= a.max_seqlen_q, "a query is longer than max_seqlen_q")


def check_table(table: torch.Tensor, batch: int, name: str) -> None:
    check(table.dtype is torch.int32, f"{name} must have dtype torch.int32")
    check(table.stride(-1) == 1, f"{name} must have contiguous last dimension")
    check(table.shape[0] == batch, "batch_size must be equal to batch_size_k")


def check_lengths(lengths: torch.Tensor, batch: int, longest: int) -> None:
    check(lengths.dtype is torch.int32, "seqused_k must have dtype int32")
    check(lengths.is_contiguous(), "seqused_k must be contiguous")
    check(tuple(lengths.shape) == (batch,), "seqused_k must have shape (batch_size)")
    check(int(lengths.max()) <= longest, "a context is longer than max_seqlen_k")


def split(packed: torch.Tensor, starts: torch.Tensor) -> list[torch.Tensor]:
    check(starts.dtype is torch.int32, "cu_seqlens_k must have dtype torch.int32")
    check(int(starts[-1]) == len(packed), "k must have shape (total_k, num_heads_k, head_size)")
    lengths: list[int] = starts.diff().tolist()
    return list(torch.split(packed, lengths))


def digest(*facts: Any) -> int:
    """What a schedule was made for, as one number."""
    return hash(tuple(str(fact) for fact in facts)) % (1 << 31)


def schedule(a: SimpleNamespace) -> torch.Tensor:
    """FA3's schedule; its last number says which call it is for."""
    check(a.cache_seqlens.dtype is torch.int32, "seqused_k must have dtype int32")
    check(a.qkv_dtype in (*HALF, FP8), "FlashAttention only supports fp16, bf16, and fp8_e4m3")
    result = torch.zeros(1 + -(-a.batch_size // 4) * 4 * 4, dtype=torch.int32)
    result[-1] = digest(
        *(a.batch_size, a.max_seqlen_q, a.max_seqlen_k, a.num_heads_q, a.num_heads_kv, a.headdim),
        *(a.qkv_dtype, a.page_size, a.causal, tuple(a.window_size), a.has_softcap, a.num_splits),
        *(a.cache_seqlens.tolist(), a.cu_seqlens_q.tolist()),
    )
    return result


def fa3(
    a: SimpleNamespace,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: torch.Tensor | None,
    table: torch.Tensor | None,
    longest: int,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """FA3's `fwd`: paged with a table, dense with `a.cu_seqlens_k`."""
    batch = len(a.cu_seqlens_q) - 1
    check(a.q.dtype in (*HALF, FP8), "FlashAttention only supports fp16, bf16, and fp8_e4m3")
    check_common(a, key, value)
    alignment = 16 if a.q.dtype is FP8 else 8
    check(a.q.shape[-1] % alignment == 0, f"head_size should be a multiple of {alignment}")
    if sinks is not None:
        check(sinks.dtype is torch.bfloat16, "We only support bf16 dtype for S aux.")
        check(a.q.shape[1] <= 64, "We only support query heads <= 64 with S aux")
        check(tuple(sinks.shape) == (a.q.shape[1],), "s_aux must have shape (num_heads)")
        check(sinks.is_contiguous(), "s_aux must be contiguous")
    if a.q.dtype is FP8:
        for name in ("q_descale", "k_descale", "v_descale"):
            scale = getattr(a, name)
            check(scale.dtype is torch.float32, f"{name} must be float32")
            shape = (batch, key.shape[-2])
            check(tuple(scale.shape) == shape, f"{name} must have shape (batch_size, num_heads_k)")
    if table is None:
        return attend(a, split(key, a.cu_seqlens_k), split(value, a.cu_seqlens_k), None, sinks)
    assert lengths is not None
    check_table(table, batch, "page_table")
    check_lengths(lengths, batch, longest)
    if a.scheduler_metadata is not None:
        check(a.scheduler_metadata.dtype is torch.int32, "scheduler_metadata must have dtype int32")
        made_for = digest(
            *(batch, a.max_seqlen_q, longest, a.q.shape[1], key.shape[-2], a.q.shape[-1]),
            *(a.q.dtype, key.shape[1], a.causal, tuple(a.window_size), a.softcap > 0, a.num_splits),
            *(lengths.tolist(), a.cu_seqlens_q.tolist()),
        )
        check(int(a.scheduler_metadata[-1]) == made_for, "the schedule was made for another call")
    seen = lengths.tolist()
    keys = [pages(key, table, seen, i) for i in range(batch)]
    values = [pages(value, table, seen, i) for i in range(batch)]
    return attend(a, keys, values, None, sinks)


def fa2(
    a: SimpleNamespace, lengths: list[int] | None, page_multiple: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """FA2's `varlen_fwd`."""
    batch = len(a.cu_seqlens_q) - 1
    check(a.q.dtype in HALF, "FlashAttention only support fp16 and bf16 data type")
    check_common(a, a.k, a.v)
    check(a.q.shape[-1] % 8 == 0, "must have a head_size that is a multiple of 8")
    if a.alibi_slopes is not None:
        check(a.alibi_slopes.dtype is torch.float32, "ALiBi slopes must have dtype fp32")
    if a.block_table is None:
        keys, values = split(a.k, a.cu_seqlens_k), split(a.v, a.cu_seqlens_k)
    else:
        assert lengths is not None
        check_table(a.block_table, batch, "block_table")
        ok = a.k.shape[1] % page_multiple == 0
        check(ok, f"Paged KV cache block size must be divisible by {page_multiple}")
        check(max(lengths) <= a.max_seqlen_k, "a context is longer than max_seqlen_k")
        keys = [pages(a.k, a.block_table, lengths, i) for i in range(batch)]
        values = [pages(a.v, a.block_table, lengths, i) for i in range(batch)]
    return attend(a, keys, values, a.alibi_slopes, None)


def fa4(
    a: SimpleNamespace, table: torch.Tensor | None, sinks: torch.Tensor | None, is_vllm: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """FA4's `_flash_attn_fwd`: paged with a table, dense with `a.cu_seqlens_k`."""
    arch, size, batch = ARCH["major"], a.q.shape[-1], len(a.cu_seqlens_q) - 1
    check(arch in (9, 10, 11), "paged KV not supported on this device")
    check(a.q.dtype in HALF, "FP8 is given scales, which this function does not take")
    check(a.q.dtype == a.k.dtype == a.v.dtype, "inputs must have the same dtype")
    check(a.q.shape[1] % a.k.shape[-2] == 0, "num_head must be divisible by num_head_kv")
    widths = (size, a.v.shape[-1])
    if arch == 9:
        fits = max(widths) <= (512 if is_vllm else 256)
    else:
        fits = max(widths) <= 128 or widths in ((192, 128), (256, 256))
    fits = fits and all(width >= 8 and width % 8 == 0 for width in widths)
    check(fits, f"(head_dim, head_dim_v)={widths} is not supported on SM{arch}0")
    for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_k"):
        given = getattr(a, name)
        if given is not None:
            check(given.dtype is torch.int32, f"{name} must be int32")
            check(given.is_contiguous(), f"{name} must be contiguous")
    if sinks is not None:
        check(tuple(sinks.shape) == (a.q.shape[1],), "learnable_sink must have shape (num_head,)")
        check(sinks.dtype is torch.bfloat16, "learnable_sink must be bfloat16")
    left, right = a.window_size if a.window_size is not None else (-1, -1)
    if not is_vllm:
        check(None in (left, right) or left + right >= 0, "a window without keys")
        check(left is None or left >= 0, "a window that ends before it begins")
        left, right = -1 if left is None else left, -1 if right is None else right
        check(a.num_splits == 1 or arch != 9, "SplitKV not supported on SM 9.0")
    seen = SimpleNamespace(**(vars(a) | {"window_size": (left, right)}))
    if table is None:
        keys, values = split(a.k, a.cu_seqlens_k), split(a.v, a.cu_seqlens_k)
        return attend(seen, keys, values, None, sinks)
    check(a.cu_seqlens_k is None, "page_table is not supported with cu_seqlens_k")
    check_table(table, batch, "page_table")
    check_lengths(a.seqused_k, batch, a.max_seqlen_k)
    page = a.k.shape[1]
    check(size != 256 or arch == 9 or not is_vllm, "head_dim=256 does not support seqused_k")
    # Pages as long as a tile of keys come by TMA, which takes any head size.
    is_tile = page == 128 and (arch != 9 or size <= 128)
    check(is_tile or size % 16 == 0, "Paged KV does not support irregular head dim")
    lengths = a.seqused_k.tolist()
    keys = [pages(a.k, table, lengths, i) for i in range(batch)]
    values = [pages(a.v, table, lengths, i) for i in range(batch)]
    return attend(seen, keys, values, None, sinks)


def vllm_varlen(a: SimpleNamespace) -> Any:
    assert (a.cu_seqlens_k is None) != (a.seqused_k is None)
    assert a.block_table is None or a.seqused_k is not None
    check(
        a.out is None or a.out.dtype == (torch.bfloat16 if a.q.dtype is FP8 else a.q.dtype), "out"
    )
    if a.fa_version == 2:
        unwanted = (a.scheduler_metadata, a.q_descale, a.k_descale, a.v_descale, a.s_aux)
        if any(x is not None for x in unwanted) or a.num_splits > 1:
            raise NotImplementedError("FA2 does not support this")
        lengths = None if a.seqused_k is None else a.seqused_k.tolist()
        result, lse = fa2(a, lengths, 16)
    elif a.fa_version == 4:
        assert a.alibi_slopes is None, "Alibi is not supported in FA4"
        result, lse = fa4(a, a.block_table, a.s_aux, True)
        shape = (*a.q.shape[:2], a.v.shape[-1])
        check(a.out is None or tuple(a.out.shape) == shape, "out shape")
    else:
        assert a.fa_version == 3
        assert a.alibi_slopes is None, "Alibi is not supported in FA3"
        result, lse = fa3(a, a.k, a.v, a.seqused_k, a.block_table, a.max_seqlen_k, a.s_aux)
    out = torch.empty_like(a.q) if a.out is None else a.out
    check(out.stride(-1) == 1, "Output tensor must have contiguous last dimension")
    out.copy_(result)
    return (out, lse) if a.return_softmax_lse else out


def upstream_kvcache(a: SimpleNamespace) -> Any:
    longest = a.page_table.shape[1] * a.k_cache.shape[1]
    result, lse = fa3(a, a.k_cache, a.v_cache, a.cache_seqlens, a.page_table, longest)
    out = result.to(torch.bfloat16 if a.q.dtype is FP8 else a.q.dtype)
    return (out, lse, None, None) if a.return_softmax_lse else out


def upstream_fa3_varlen(a: SimpleNamespace) -> torch.Tensor:
    result, _ = fa3(a, a.k, a.v, None, None, a.max_seqlen_k)
    return result.to(a.q.dtype)


def upstream_fa4_varlen(a: SimpleNamespace) -> Any:
    result, lse = fa4(a, a.page_table, a.learnable_sink, False)
    return result.to(a.q.dtype), lse if a.return_lse else None


def upstream_fa2_varlen(a: SimpleNamespace) -> Any:
    lengths = a.cu_seqlens_k.diff().tolist()
    check(a.cu_seqlens_k.dtype is torch.int32, "cu_seqlens_k must have dtype int32")
    result, lse = fa2(a, lengths, 256)
    out = result.to(a.q.dtype)
    return (out, lse, None) if a.return_attn_probs else out


_BODIES: dict[str, dict[str, Callable[[SimpleNamespace], Any]]] = {
    "vllm-0.22.1": {
        "flash_attn_varlen_func": vllm_varlen,
        "get_scheduler_metadata": schedule,
    },
    "flash-attn-2.8.3.post2": {"flash_attn_varlen_func": upstream_fa2_varlen},
    "flash-attn-4-4.0.0b36": {"flash_attn_varlen_func": upstream_fa4_varlen},
    **{
        record: {
            "flash_attn_varlen_func": upstream_fa3_varlen,
            "flash_attn_with_kvcache": upstream_kvcache,
            "get_scheduler_metadata": schedule,
        }
        for record in ("hopper-2.8.3", "hopper-01afd16")
    },
}


def install(patch: pytest.MonkeyPatch, record: str, major: int = 9) -> list[Call]:
    """Make one recorded library importable, on a device of compute capability `major`.

    Returns its calls, filled as they come.
    """
    calls: list[Call] = []
    patch.setitem(ARCH, "major", major)
    patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, 0))
    module = _module(patch, RECORDED[record]["module"])
    for function, body in _BODIES[record].items():
        setattr(module, function, with_signature(record, function, body, calls))
    if record.startswith("vllm"):
        for version in (2, 3, 4):
            setattr(module, f"FA{version}_AVAILABLE", True)
        _module(patch, "vllm.vllm_flash_attn.cute.interface")
    return calls


def _module(patch: pytest.MonkeyPatch, name: str) -> ModuleType:
    parts = name.split(".")
    for depth in range(1, len(parts)):
        package = ModuleType(".".join(parts[:depth]))
        package.__path__ = []
        if package.__name__ not in sys.modules:
            patch.setitem(sys.modules, package.__name__, package)
    module = ModuleType(name)
    patch.setitem(sys.modules, name, module)
    return module
