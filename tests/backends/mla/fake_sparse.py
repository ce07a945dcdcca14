"""FlashMLA's sparse kernels as they look from outside, computing with plain torch on the CPU.

Signatures are the recorded ones (`signatures.json`). What the real ones refuse is refused: the
checks of FlashMLA's csrc/api/sparse_fwd.h and sparse_decode.h, of the kernels' `run` functions, and
of `flash_mla_interface.py`. The cache's bytes are decoded by hand here, with numpy.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from tests.backends.flash_attn.fake_library import Call, check
from tests.backends.mla.fake_library import RECORDED, importable, signature_of, with_signature

RANK, ROPE, ROW = 512, 64, 656


class SchedMeta:
    """The library's `FlashMLASchedMeta`: made by the first call, good for calls like it."""

    def __init__(self) -> None:
        self.config: tuple[Any, ...] | None = None


def e4m3(code: int) -> float:
    """The number a byte stands for: 1 sign, 4 exponent (bias 7), 3 mantissa bits (OCP e4m3fn)."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code >> 3) & 0xF, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return float(sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7))


_E4M3 = np.array([e4m3(code) for code in range(256)])


def decode_row(row: torch.Tensor) -> torch.Tensor:
    """576 numbers of 656 bytes, in float64."""
    data = np.ascontiguousarray(row.numpy()).tobytes()
    assert len(data) == ROW
    scales = np.repeat(np.frombuffer(data[RANK : RANK + 16], dtype="<f4"), 128)
    latent = _E4M3[np.frombuffer(data[:RANK], dtype=np.uint8)] * scales
    halves = np.frombuffer(data[RANK + 16 :], dtype="<u2").astype(np.uint32) << 16
    return torch.from_numpy(np.concatenate([latent, halves.view("<f4")]).astype(np.float64))


def attend(q: torch.Tensor, keys: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Heads (H, 576) over latents (n, 576): output (H, 512) and natural LSE (H,)."""
    logits = q.double() @ keys.double().T * scale
    return logits.softmax(-1) @ keys[:, :RANK].double(), logits.logsumexp(-1)


def sparse_fwd(a: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    check(a.q.dim() == a.kv.dim() == a.indices.dim() == 3, "must have 3 dimensions")
    num_tokens, heads, width = a.q.shape
    check(width == RANK + ROPE, f"Invalid d_qk: {width}")
    check(a.d_v == RANK, f"Invalid d_v {a.d_v}")
    check(a.q.dtype is torch.bfloat16 and a.kv.dtype is torch.bfloat16, "must have dtype bf16")
    check(a.indices.dtype is torch.int32, "indices must have dtype int32")
    check(a.kv.shape[1] == 1 and a.kv.shape[2] == width, "kv must have shape (s_kv, 1, d_qk)")
    topk = a.indices.shape[2]
    check(tuple(a.indices.shape) == (num_tokens, 1, topk), "indices must have shape (s_q, 1, topk)")
    for x in (a.q, a.kv, a.indices):
        check(x.stride(-1) == 1, "must have contiguous last dimension")
    check(heads in (64, 128), f"Unsupported h_q: {heads}")
    check(topk > 0 and topk % 128 == 0, "params.topk % (2*B_TOPK) == 0")
    check(a.attn_sink is None and a.topk_length is None, "not used here")
    out = torch.empty((num_tokens, heads, RANK), dtype=torch.bfloat16)
    given = getattr(a, "out", None)
    if given is not None:
        check(tuple(given.shape) == tuple(out.shape), "out must have shape (s_q, h_q, d_v)")
        check(given.dtype is torch.bfloat16 and given.is_contiguous(), "out must be bf16")
        out = given
    lse = torch.empty((num_tokens, heads))
    for token in range(num_tokens):
        rows = a.indices[token, 0]
        rows = rows[(rows >= 0) & (rows < len(a.kv))].long()
        found, lse[token] = attend(a.q[token], a.kv[rows, 0], a.sm_scale)
        out[token] = found.to(torch.bfloat16)
    return out, torch.zeros_like(lse), lse


def with_kvcache(a: Any) -> tuple[torch.Tensor, torch.Tensor]:
    meta = a.tile_scheduler_metadata
    assert isinstance(meta, SchedMeta), "tile_scheduler_metadata must be of type FlashMLASchedMeta"
    assert a.num_splits is None
    assert a.indices is not None, "dense attention is another fake's"
    assert not a.causal, "causal must be False when sparse attention is enabled"
    assert a.is_fp8_kvcache, "is_fp8_kvcache must be True when sparse attention is enabled"
    check(a.q.dim() == 4 and a.indices.dim() == 3 and a.k_cache.dim() == 4, "dimensions")
    batch, tokens, heads, width = a.q.shape
    topk = a.indices.shape[2]
    config = (batch, tokens, heads, tuple(a.k_cache.shape[1:3]), topk)
    assert meta.config in (None, config), "inconsistent with sched_meta"
    meta.config = config
    check(batch > 0 and tokens > 0, "b > 0")
    check(a.k_cache.shape[2] == 1, "Currently only MQA (i.e. h_kv == 1) is supported")
    check(width == RANK + ROPE and a.head_dim_v == RANK, "Only head_size_k == 576")
    check(a.q.dtype is torch.bfloat16, "q must have dtype bf16")
    bytes_like = (torch.uint8, torch.int8, torch.float8_e4m3fn)
    check(a.k_cache.dtype in bytes_like, "key must have dtype fp8_e4m3fn, int8 or uint8")
    check(a.indices.dtype is torch.int32, "indices must have dtype int32")
    check(a.k_cache.shape[3] == ROW and a.k_cache.stride(1) == ROW, "whole block contiguous")
    check(a.k_cache.shape[1] == 64, "vLLM and the tests of FlashMLA have pages of 64 only")
    check(tuple(a.indices.shape[:2]) == (batch, tokens), "indices must have shape (b, s_q, topk)")
    check(heads in (64, 128), f"Unsupported h_q: {heads}")
    check(topk % 64 == 0 and topk > 0, "topk mod B_TOPK must be 0")
    for name in ("attn_sink", "extra_k_cache", "topk_length", "extra_topk_length"):
        check(getattr(a, name) is None, f"{name} is not used here")
    out = torch.empty((batch, tokens, heads, RANK), dtype=torch.bfloat16)
    given = getattr(a, "out", None)
    if given is not None:
        check(tuple(given.shape) == tuple(out.shape), "out must have shape (b, s_q, h_q, d_v)")
        check(given.dtype is torch.bfloat16 and given.is_contiguous(), "out must be contiguous")
        out = given
    lse = torch.empty((batch, tokens, heads))
    rows = a.k_cache.flatten(0, 1)[:, 0]
    for i in range(batch):
        for j in range(tokens):
            chosen = [slot for slot in a.indices[i, j].tolist() if slot >= 0]
            keys = torch.stack([decode_row(rows[slot]) for slot in chosen])
            # The kernel dequantises to bf16 before its products.
            keys = keys.to(torch.bfloat16).double()
            found, lse[i, j] = attend(a.q[i, j], keys, a.softmax_scale)
            out[i, j] = found.to(torch.bfloat16)
    return out, lse.transpose(1, 2)


def install(patch: pytest.MonkeyPatch, record: str) -> list[Call]:
    """Make one recorded FlashMLA importable, its sparse functions only. Returns its calls."""
    calls: list[Call] = []
    module = importable(patch, RECORDED[record]["module"])
    bodies = {
        "flash_mla_sparse_fwd": sparse_fwd,
        "flash_mla_with_kvcache": with_kvcache,
        "get_mla_metadata": lambda a: (SchedMeta(), None),
    }
    for path, body in bodies.items():
        function = with_signature(signature_of(record, path), path, body, calls)
        setattr(module, path, function)
    return calls
