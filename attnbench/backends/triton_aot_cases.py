"""Typical and difficult launches of our Triton kernels, made over meta tensors."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from attnbench.backends.abstract import AttentionBackend, AttentionConfig
from attnbench.backends.builder import KVCacheSpec
from attnbench.backends.device import Device, DeviceCapability
from attnbench.backends.dtypes import torch_dtype
from attnbench.backends.kv_cache import allocate_kv_cache
from attnbench.backends.metadata import CommonAttentionMetadata
from attnbench.backends.triton_attn import TritonAttentionBackend
from attnbench.backends.triton_launch import Launch
from attnbench.backends.triton_mla import TritonMLABackend
from attnbench.workload import Workload

NUMBER_FORMATS = ("fp16", "bf16", "fp8_e4m3", "fp8_e5m2")

#: Multiprocessors of the pretended device (an H200 has 132): decides how contexts are split.
NUM_SMS = 132
NUM_BLOCKS = 4096


@dataclass(frozen=True, slots=True)
class AotCase:
    """A workload whose launches are compiled; `only_in_full`: another case stands for it."""

    name: str
    workload: str
    only_in_full: bool = False

    def launches(self, device: Device, number_format: str) -> list[Launch]:
        """Every launch of one step of this workload on `device`, the cache write included."""
        workload = self._workload(device, number_format)
        if workload.shape.is_mla:
            return _mla_launches(workload, device)
        return _attention_launches(workload, device)

    def refusals(self, device: Device, number_format: str) -> list[str]:
        """Why the backend would not accept this workload on `device`."""
        workload = self._workload(device, number_format)
        shape = workload.shape
        backend: type[AttentionBackend] = TritonAttentionBackend
        if shape.is_mla:
            backend = TritonMLABackend
        config = AttentionConfig(
            head_size=shape.head_size,
            dtype=torch_dtype(workload.dtype),
            kv_cache_dtype=workload.resolved_kv_cache_dtype,
            block_size=workload.block_size,
            use_mla=shape.is_mla,
            has_sink=shape.has_sink,
            attn_type=workload.attn_type,
            v_head_size=shape.v_head_size,
            has_sliding_window=shape.sliding_window > 0,
            has_logits_soft_cap=shape.logits_soft_cap > 0,
            use_alibi=shape.use_alibi,
            kv_cache_layout=workload.kv_cache_layout,
        )
        return backend.validate_configuration(config, device)

    def _workload(self, device: Device, number_format: str) -> Workload:
        return Workload.parse(f"{self.workload} {_dtype_words(device, number_format)}")


AOT_CASES = (
    AotCase("decode", "4q1s8k"),
    AotCase("prefill", "1q2k"),
    AotCase("mla-decode", "4q1s8k shape=deepseek-v3 block=64"),
    AotCase("mixed", "4q1s8k_1q2k", only_in_full=True),
    AotCase("speculative", "4q4s8k", only_in_full=True),
    AotCase("gemma-like", "1q2k heads=16/8 head_size=256 window=1024 softcap=50", True),
    AotCase("gpt-oss-like", "2q1s8k_1q1k heads=64/8 head_size=64 window=128 sinks=1", True),
    AotCase("alibi", "2q1s8k_1q1k alibi=1", True),
    AotCase("head-96", "2q1s8k_1q1k heads=32/32 head_size=96", True),
    AotCase("head-512", "2q1s8k_1q1k heads=8/1 head_size=512", True),
    AotCase("v-head", "2q1s8k_1q1k heads=16/16 head_size=192 v_head_size=128", True),
    AotCase("mqa-71", "4q1s8k heads=71/1 head_size=64", True),
    AotCase("odd-block", "2q1s8k_1q1k block=7 layout=HND", True),
    AotCase("encoder", "2q512 attn=encoder_only heads=16/16 head_size=64", True),
    AotCase("cross", "2q1s1500 attn=encoder_decoder heads=16/16 head_size=64", True),
    AotCase("mla-speculative", "4q4s8k shape=deepseek-v3 tp=8 block=64", True),
    AotCase("mla-prefill", "1q2k shape=deepseek-v3 tp=8 block=64", True),
)


def _dtype_words(device: Device, number_format: str) -> str:
    if not number_format.startswith("fp8"):
        return f"dtype={number_format}"
    has_bf16 = device.capability is None or device.capability >= DeviceCapability(8, 0)
    return f"dtype={'bf16' if has_bf16 else 'fp16'} kv={number_format}"


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _spec(workload: Workload) -> KVCacheSpec:
    return KVCacheSpec(
        shape=workload.shape,
        dtype=torch_dtype(workload.dtype),
        kv_cache_dtype=workload.resolved_kv_cache_dtype,
        block_size=workload.block_size,
        kv_cache_layout=workload.kv_cache_layout,
    )


def _common_metadata(workload: Workload) -> CommonAttentionMetadata:
    query_lens = torch.tensor([r.query_len for r in workload.requests], dtype=torch.int32)
    seq_lens = torch.tensor([r.seq_len for r in workload.requests], dtype=torch.int32)
    num_reqs, num_tokens = len(query_lens), int(query_lens.sum())
    max_seq_len = int(seq_lens.max())
    starts = torch.nn.functional.pad(query_lens.cumsum(0, dtype=torch.int32), (1, 0))
    is_cross = workload.attn_type == "encoder_decoder"
    return CommonAttentionMetadata(
        query_start_loc=starts.to("meta"),
        query_start_loc_cpu=starts,
        seq_lens=seq_lens.to("meta"),
        seq_lens_cpu=seq_lens,
        num_reqs=num_reqs,
        num_actual_tokens=num_tokens,
        max_query_len=int(query_lens.max()),
        max_seq_len=max_seq_len,
        block_table_tensor=_meta(
            num_reqs, -(-max_seq_len // workload.block_size), dtype=torch.int32
        ),
        slot_mapping=_meta(num_tokens, dtype=torch.int64),
        causal=workload.attn_type == "decoder",
        encoder_seq_lens=seq_lens.to("meta") if is_cross else None,
        encoder_seq_lens_cpu=seq_lens if is_cross else None,
    )


def _layer(workload: Workload) -> Any:
    shape, scale = workload.shape, _meta(1, dtype=torch.float32)
    heads = shape.num_heads if shape.is_mla else 0
    dtype = torch_dtype(workload.dtype)
    return SimpleNamespace(
        _k_scale=scale,
        _v_scale=scale,
        W_UK=_meta(heads, shape.qk_nope_head_dim, shape.kv_lora_rank, dtype=dtype),
        W_UV=_meta(heads, shape.kv_lora_rank, shape.v_head_size, dtype=dtype),
    )


def _attention_launches(workload: Workload, device: Device) -> list[Launch]:
    shape, spec, layer = workload.shape, _spec(workload), _layer(workload)
    builder = TritonAttentionBackend.get_builder_cls()(spec, ["layer"], torch.device("meta"))
    builder.launch_device, builder.num_sms = device, NUM_SMS
    impl = TritonAttentionBackend.get_impl_cls()(
        shape,
        workload.resolved_kv_cache_dtype,
        workload.attn_type,
        _meta(shape.num_heads, dtype=torch.float32) if shape.use_alibi else None,
        _meta(shape.num_heads, dtype=torch.float32) if shape.has_sink else None,
    )
    metadata = builder.build(0, _common_metadata(workload))
    tokens = metadata.num_actual_tokens
    query = _meta(tokens, shape.num_heads, shape.head_size, dtype=spec.dtype)
    key = _meta(tokens, shape.num_kv_heads, shape.head_size, dtype=spec.dtype)
    value = _meta(tokens, shape.num_kv_heads, shape.v_head_size, dtype=spec.dtype)
    output = _meta(tokens, shape.num_heads, shape.v_head_size, dtype=spec.dtype)
    kv_cache = allocate_kv_cache(TritonAttentionBackend, spec, NUM_BLOCKS, "meta")
    launches = impl.launches(layer, query, key, value, kv_cache, metadata, output)
    if impl.reads_cache:
        launches.append(impl.update_launch(layer, key, value, kv_cache, metadata.slot_mapping))
    return launches


def _mla_launches(workload: Workload, device: Device) -> list[Launch]:
    shape, spec, layer = workload.shape, _spec(workload), _layer(workload)
    builder = TritonMLABackend.get_builder_cls()(spec, ["layer"], torch.device("meta"))
    builder.launch_device, builder.num_sms = device, NUM_SMS
    impl = TritonMLABackend.get_impl_cls()(shape, workload.resolved_kv_cache_dtype)
    metadata = builder.build(0, _common_metadata(workload))
    tokens, decode_tokens = metadata.num_actual_tokens, metadata.num_decode_tokens
    kv_cache = allocate_kv_cache(TritonMLABackend, spec, NUM_BLOCKS, "meta")
    launches = impl.mqa_launches(
        layer,
        _meta(decode_tokens, shape.num_heads, shape.head_size, dtype=spec.dtype),
        kv_cache,
        metadata,
        _meta(decode_tokens, shape.num_heads, shape.kv_lora_rank, dtype=spec.dtype),
        _meta(decode_tokens, shape.num_heads, dtype=torch.float32),
    )
    launches += impl.mha_launches(
        layer,
        _meta(tokens - decode_tokens, shape.num_heads, shape.qk_head_dim, dtype=spec.dtype),
        kv_cache,
        metadata,
        _meta(tokens - decode_tokens, shape.num_heads, shape.v_head_size, dtype=spec.dtype),
    )
    latent = _meta(tokens, shape.kv_lora_rank, dtype=spec.dtype)
    rope = _meta(tokens, 1, shape.qk_rope_head_dim, dtype=spec.dtype)
    launches.append(impl.update_launch(layer, latent, rope, kv_cache, metadata.slot_mapping))
    return launches
