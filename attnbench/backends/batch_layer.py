"""The layer that a batch goes through: the scales of its cache, and the projections of MLA."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from attnbench.backends.builder import KVCacheSpec
from attnbench.backends.dtypes import is_fp8, torch_dtype
from attnbench.backends.token_pool import seeded_generator

#: Scales of fp8 caches. Different from 1 and from each other, so that ignoring or swapping them
#: shows; powers of two, so that `stored * scale` is exact in fp16, bf16 and fp32 and the reference
#: does not depend on how a backend rounds.
FP8_K_SCALE = 0.25
FP8_V_SCALE = 0.5


@dataclass(kw_only=True)
class BatchLayer:
    """The layer an impl is called with: an `AttentionLayer`, and an `MLALayer` when MLA.

    Scalars are float32 tensors on the batch's device; `W_UK` is (num_heads, qk_nope_head_dim,
    kv_lora_rank), `W_UV` (num_heads, kv_lora_rank, v_head_size); both empty unless MLA.
    """

    _q_scale: torch.Tensor
    _k_scale: torch.Tensor
    _v_scale: torch.Tensor
    _prob_scale: torch.Tensor
    _q_scale_float: float
    _k_scale_float: float
    _v_scale_float: float
    W_UK: torch.Tensor
    W_UV: torch.Tensor


def make_layer(spec: KVCacheSpec, device: torch.device) -> BatchLayer:
    """The layer of every batch whose cache is as `spec`; nothing of it depends on the requests."""
    shape = spec.shape
    quantised = is_fp8(torch_dtype(spec.kv_cache_dtype))
    k_scale = FP8_K_SCALE if quantised else 1.0
    # MLA stores key and value in one latent, which has one scale.
    v_scale = (k_scale if shape.is_mla else FP8_V_SCALE) if quantised else 1.0
    heads = shape.num_heads if shape.is_mla else 0
    w_uk, w_uv = _draw_projections(
        (heads, shape.qk_nope_head_dim, shape.kv_lora_rank),
        (heads, shape.kv_lora_rank, shape.v_head_size),
        spec.dtype,
        device,
    )

    def scalar(x: float) -> torch.Tensor:
        return torch.tensor(x, dtype=torch.float32, device=device)

    return BatchLayer(
        _q_scale=scalar(1.0),
        _k_scale=scalar(k_scale),
        _v_scale=scalar(v_scale),
        _prob_scale=scalar(1.0),
        _q_scale_float=1.0,
        _k_scale_float=k_scale,
        _v_scale_float=v_scale,
        W_UK=w_uk,
        W_UV=w_uv,
    )


@lru_cache(maxsize=4)
def _draw_projections(
    w_uk: tuple[int, int, int], w_uv: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """`W_UK` and `W_UV` of the given sizes, the same for every workload and never written to.

    Their standard deviation gives expanded keys and values the variance of the latent, one.
    """
    generator = seeded_generator("weights")
    std = max(w_uv[1], 1) ** -0.5
    drawn = [torch.randn(size, generator=generator) * std for size in (w_uk, w_uv)]
    return drawn[0].to(device, dtype), drawn[1].to(device, dtype)
