"""Runs a backend on a workload as the measuring room does, in few lines and without it."""

from __future__ import annotations

from typing import Any

import torch

from attnbench.backends.abstract import AttentionBackend, AttentionConfig
from attnbench.backends.batch import AttentionBatch, make_batch
from attnbench.backends.check import OutputCheck, check_output, poison_
from attnbench.backends.device import Device
from attnbench.backends.dtypes import torch_dtype
from attnbench.backends.kv_cache import allocate_kv_cache, fill_context
from attnbench.backends.reference import reference_attention
from attnbench.workload import AttentionType, Workload

CPU = Device("cpu")


def config_of(workload: Workload) -> AttentionConfig:
    """The selector's question about a workload."""
    shape = workload.shape
    return AttentionConfig(
        head_size=shape.head_size,
        dtype=torch_dtype(workload.dtype),
        kv_cache_dtype=workload.kv_cache_dtype,
        block_size=workload.block_size,
        use_mla=shape.is_mla,
        has_sink=shape.has_sink,
        use_sparse=workload.is_sparse,
        attn_type=workload.attn_type,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        v_head_size=shape.v_head_size,
        has_sliding_window=shape.sliding_window > 0,
        has_logits_soft_cap=shape.logits_soft_cap > 0,
        use_alibi=shape.use_alibi,
        kv_cache_layout=workload.kv_cache_layout,
        kv_lora_rank=shape.kv_lora_rank,
        qk_nope_head_dim=shape.qk_nope_head_dim,
        qk_rope_head_dim=shape.qk_rope_head_dim,
    )


def refusals(backend: type[AttentionBackend], text: str) -> list[str]:
    return backend.validate_configuration(config_of(Workload.parse(text)), CPU)


class Run:
    """A backend with everything one call needs; new tokens are written by its own code."""

    def __init__(
        self, backend: type[AttentionBackend], text: str, variant: str = "", device: str = "cpu"
    ) -> None:
        workload = self.workload = Workload.parse(text)
        builder_cls = backend.get_builder_cls()
        threshold = builder_cls.reorder_batch_threshold
        batch: AttentionBatch = make_batch(workload, device, threshold)
        self.batch = batch
        self.builder = builder_cls(batch.spec, ["layers.0.attn"], batch.device, variant)
        impl_cls: Any = backend.get_impl_cls()
        self.impl = impl_cls(
            workload.shape,
            workload.kv_cache_dtype,
            workload.attn_type,
            batch.alibi_slopes,
            batch.sinks,
            variant,
        )
        self.kv_cache = torch.empty(0)
        if workload.attn_type in (AttentionType.DECODER, AttentionType.ENCODER_DECODER):
            self.kv_cache = allocate_kv_cache(backend, batch.spec, batch.num_blocks, device)
            fill_context(batch, self.kv_cache, backend)
            self.impl.do_kv_cache_update(
                batch.layer, batch.key, batch.value, self.kv_cache, batch.metadata.slot_mapping
            )
        self.metadata: Any = self.builder.build(0, batch.metadata)

    def attend(self) -> torch.Tensor:
        shape, batch = self.workload.shape, self.batch
        out = batch.query.new_empty((len(batch.query), shape.num_heads, shape.v_head_size))
        poison_(out)
        if shape.is_mla:
            return self._attend_mla(out)
        result: torch.Tensor = self.impl.forward(
            batch.layer, batch.query, batch.key, batch.value, self.kv_cache, self.metadata, out
        )
        assert result is out
        return out

    def _attend_mla(self, out: torch.Tensor) -> torch.Tensor:
        shape, batch, num_decode = self.workload.shape, self.batch, self.metadata.num_decode_tokens
        if num_decode:
            nope, rope = torch.split(
                batch.query[:num_decode], [shape.qk_nope_head_dim, shape.qk_rope_head_dim], dim=-1
            )
            absorbed = torch.cat([torch.einsum("thn,hnl->thl", nope, batch.layer.W_UK), rope], -1)
            latent = poison_(absorbed.new_empty((num_decode, shape.num_heads, shape.kv_lora_rank)))
            self.lse = self.impl.forward_mqa(
                batch.layer, absorbed, self.kv_cache, self.metadata, latent
            )
            out[:num_decode] = torch.einsum("thl,hlv->thv", latent, batch.layer.W_UV)
        if num_decode < len(out):
            self.impl.forward_mha(
                batch.layer,
                batch.query[num_decode:],
                batch.kv_c_normed[num_decode:],
                batch.k_pe[num_decode:],
                self.kv_cache,
                self.metadata,
                out[num_decode:],
            )
        return out

    def check(self) -> OutputCheck:
        return check_output(
            self.attend(),
            reference_attention(self.batch),
            self.workload.dtype,
            self.workload.resolved_kv_cache_dtype,
        )


def formula_not_causal(batch: AttentionBatch, window: int = 0) -> torch.Tensor:
    """(num_tokens, num_heads, v_head_size) float64: every query sees all of its request, or what is
    less than `window` away on either side; the formula, on the batch's dense K and V."""
    shape = batch.shape
    repeats = shape.num_heads // shape.num_kv_heads
    outputs = []
    for i, request in enumerate(batch.requests):
        start, end = batch.query_range(i)
        key, value = (x.double().repeat_interleave(repeats, 1) for x in batch.keys_values(i))
        logits = torch.einsum("qhd,khd->hqk", batch.query[start:end].double(), key)
        logits *= shape.head_size**-0.5
        if window:
            rows = torch.arange(request.seq_len - request.query_len, request.seq_len)
            far = (rows[:, None] - torch.arange(request.seq_len)).abs() >= window
            logits = logits.masked_fill(far, -torch.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", logits.softmax(-1), value))
    return torch.cat(outputs)
