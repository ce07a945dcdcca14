"""Layers and KV-cache specs of the fake vLLM: what builders and impls get from them."""

from __future__ import annotations

from dataclasses import field, make_dataclass
from types import SimpleNamespace
from typing import Any

import torch

from tests.backends.vllm.fake_state import FP8, State, default_of, has_cache_shapes, with_signature


def make_specs(state: State) -> SimpleNamespace:
    """Spec dataclasses with the recorded fields, frozen, and what of theirs is computed."""

    def made(name: str, *bases: str) -> type[Any]:
        columns: list[Any] = []
        for column, text in state.fields(*bases, name).items():
            default = None if column == "kv_quant_mode" else default_of(text)
            if text is None:
                columns.append((column, Any))
            elif text.startswith("field("):
                columns.append((column, Any, field(default=None)))
            else:
                columns.append((column, Any, field(default=default)))
        # Keyword-only, as vLLM's are: fields without a default may follow others.
        return make_dataclass(name, columns, frozen=True, kw_only=True, bases=(_SpecNumbers,))

    base = ("KVCacheSpec", "AttentionSpec")
    return SimpleNamespace(
        FullAttentionSpec=made("FullAttentionSpec", *base),
        SlidingWindowSpec=made("SlidingWindowSpec", *base),
        MLAAttentionSpec=made("MLAAttentionSpec", *base, "FullAttentionSpec"),
        EncoderOnlyAttentionSpec=made("EncoderOnlyAttentionSpec", *base),
        CrossAttentionSpec=made("CrossAttentionSpec", *base),
        get_kv_quant_mode=with_signature(
            state,
            "get_kv_quant_mode",
            lambda a: SimpleNamespace(
                name="FP8_PER_TENSOR" if a.kv_cache_dtype.startswith("fp8") else "NONE"
            ),
        ),
    )


class _SpecNumbers:
    """What a spec of 0.30+ computes from its fields."""

    @property
    def num_heads(self) -> int:
        own: Any = self
        return int(own.num_head_slots or own.num_kv_heads)

    def get_num_kernel_states(self, kernel_block_size: int) -> int:
        return kernel_block_size

    @property
    def state_content_size_bytes(self) -> int:
        own: Any = self
        if own.state_content_bytes is not None:
            return int(own.state_content_bytes)
        values = own.head_size if own.head_size_v is None else own.head_size_v
        return int((own.head_size + values) * own.dtype.itemsize)


def cache_torch_dtype(name: str, model_dtype: torch.dtype) -> torch.dtype:
    if name == "auto":
        return model_dtype
    return {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(name, torch.uint8)


class Layer:
    """What `Attention` and `MLAAttention` share."""

    def __init__(self, state: State, arguments: SimpleNamespace) -> None:
        config = state.current()
        a = arguments
        assert torch.get_default_dtype() == config.model_config.dtype, "set_default_torch_dtype"
        assert a.cache_config is config.cache_config
        registered = config.compilation_config.static_forward_context
        assert a.prefix not in registered, f"Duplicate layer name: {a.prefix}"
        registered[a.prefix] = self
        self.state = state
        self.kv_cache_dtype = a.cache_config.cache_dtype
        self.query_quant: Any = None
        for scale in ("_q_scale", "_k_scale", "_v_scale", "_prob_scale"):
            setattr(self, scale, torch.tensor(1.0, dtype=torch.float32))
            setattr(self, f"{scale}_float", 1.0)
        if not has_cache_shapes(state.version):
            self._k_scale_cpu = torch.tensor(1.0)
            self._v_scale_cpu = torch.tensor(1.0)

    def quantise(self, rows: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, Any]:
        assert rows.dim() == 2
        return (rows.float() / scale).to(FP8), scale


def make_attention(state: State, specs: SimpleNamespace) -> type[Any]:
    class Attention(Layer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            a = state.bind("Attention.__init__", *args, **kwargs)
            super().__init__(state, a)
            self.attn_type = "decoder" if "." in a.attn_type else a.attn_type
            dtype = state.current().model_config.dtype
            self.kv_cache_torch_dtype = cache_torch_dtype(self.kv_cache_dtype, dtype)
            self.window = a.per_layer_sliding_window
            self.num_kv_heads, self.head_size = a.num_kv_heads, a.head_size
            more = dict(a.__dict__.get("extra_impl_args", {}))
            self.impl = a.attn_backend.get_impl_cls()(
                *(a.num_heads, a.head_size, a.scale, a.num_kv_heads, a.alibi_slopes),
                *(self.window, self.kv_cache_dtype, a.logits_soft_cap, self.attn_type, None),
                **more,
            )
            if self.impl.supports_quant_query_input and self.kv_cache_dtype.startswith("fp8"):
                self.query_quant = self.quantise

        def get_kv_cache_spec(self, *args: Any, **kwargs: Any) -> Any:
            config = state.bind("Attention.get_kv_cache_spec", *args, **kwargs).vllm_config
            assert self.attn_type == "decoder"
            facts: dict[str, Any] = {
                "block_size": config.cache_config.block_size,
                "num_kv_heads": self.num_kv_heads,
                "head_size": self.head_size,
                "dtype": cache_torch_dtype(self.kv_cache_dtype, config.model_config.dtype),
            }
            if self.window is not None:
                # A window's block is vLLM's own choice from 0.30 on.
                facts["block_size"] = 1
                return specs.SlidingWindowSpec(**facts, sliding_window=self.window)
            return specs.FullAttentionSpec(**facts)

    return Attention


def make_mla_attention(state: State, specs: SimpleNamespace) -> type[Any]:
    class MLAAttention(Layer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            a = state.bind("MLAAttention.__init__", *args, **kwargs)
            super().__init__(state, a)
            assert a.attn_backend.is_mla()
            self.attn_type = "decoder"
            self.head_size = a.kv_lora_rank + a.qk_rope_head_dim
            self.impl = a.attn_backend.get_impl_cls()(
                num_heads=a.num_heads,
                head_size=self.head_size,
                scale=a.scale,
                num_kv_heads=1,
                alibi_slopes=None,
                sliding_window=None,
                kv_cache_dtype=self.kv_cache_dtype,
                logits_soft_cap=None,
                attn_type="decoder",
                kv_sharing_target_layer_name=None,
                q_lora_rank=a.q_lora_rank,
                kv_lora_rank=a.kv_lora_rank,
                qk_nope_head_dim=a.qk_nope_head_dim,
                qk_rope_head_dim=a.qk_rope_head_dim,
                qk_head_dim=a.qk_nope_head_dim + a.qk_rope_head_dim,
                v_head_dim=a.v_head_dim,
                kv_b_proj=a.kv_b_proj,
            )
            self.q_pad_num_heads = self.impl.pad

        def _decode_concat_quant_fp8_op(self, nope: Any, rope: Any, scale: Any) -> torch.Tensor:
            joined: torch.Tensor = torch.cat([nope, rope], -1).float() / scale
            return joined.to(FP8)

        def get_kv_cache_spec(self, *args: Any, **kwargs: Any) -> Any:
            config = state.bind("MLAAttention.get_kv_cache_spec", *args, **kwargs).vllm_config
            dtype = cache_torch_dtype(self.kv_cache_dtype, config.model_config.dtype)
            return specs.MLAAttentionSpec(
                block_size=config.cache_config.block_size,
                num_kv_heads=1,
                head_size=self.head_size,
                dtype=dtype,
                cache_dtype_str=self.kv_cache_dtype,
            )

    return MLAAttention
