"""The engine configuration that vLLM's selector reads, filled from one case.

Only `AttentionConfig` is vLLM's own (its validators are part of the answer). The rest is a strict
namespace: a field that this version reads and the probe does not know is an AttributeError that
names it, never a guess.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

Case = dict[str, Any]

_DEFAULTS = (None, False, 1, "decoder")
"""Values that say nothing: an argument that is left at one of them is not missed."""


class Strict(types.SimpleNamespace):
    """A namespace whose missing fields say where the probe falls short of this version."""

    def __init__(self, part: str, **fields: Any) -> None:
        super().__init__(**fields)
        self._part = part

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise UnknownField(f"{self._part}.{name}")


class UnknownField(AttributeError):
    """vLLM reads a field of its configuration that the probe does not fill."""

    def __init__(self, field: str) -> None:
        super().__init__(f"the probe does not know the field {field} that this version reads")
        self.field = field


def torch_dtype(name: str) -> Any:
    """`bf16` -> `torch.bfloat16`."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def hf_configs(case: Case) -> tuple[types.SimpleNamespace, types.SimpleNamespace]:
    """The model's whole `config.json` and the part about text, or as much as the case says.

    Not strict: vLLM asks them with `hasattr` and `getattr(..., default)`, and an absent
    `index_topk` is how it knows a dense model.
    """
    raw = case.get("hf_config")
    if raw:
        text = raw.get("text_config") or raw
        return types.SimpleNamespace(**raw), types.SimpleNamespace(**text)
    fields: dict[str, Any] = {
        "head_dim": case["head_size"],
        "num_attention_heads": case["num_heads"],
        "num_key_value_heads": case["num_kv_heads"],
        "model_type": "llama",
    }
    mla = case.get("mla")
    if mla:
        fields |= mla
        if case.get("topk"):
            fields["index_topk"] = case["topk"]
    config = types.SimpleNamespace(**fields)
    return config, config


class _Layers:
    """`model_arch_config`: per-layer head sizes, as models with two kinds of layer are asked."""

    def __init__(self, case: Case) -> None:
        self._head_sizes = case.get("layer_head_sizes") or [case["head_size"]]
        self.total_num_hidden_layers = len(self._head_sizes)

    def __getitem__(self, layer: int) -> Strict:
        return Strict("model_arch_config[layer]", head_size=self._head_sizes[layer])


def vllm_config(case: Case) -> Strict:
    """What `get_current_vllm_config()` gives while the case is evaluated.

    Raises:
        ValueError: this version's AttentionConfig refuses the case's settings (pydantic's
            ValidationError is one).
        TypeError: it does not know one of them.
    """
    from vllm.config.attention import AttentionConfig

    block_size = case.get("block_size")
    hf_config, text_config = hf_configs(case)
    is_window = bool(case.get("sliding_window"))
    return Strict(
        "vllm_config",
        attention_config=AttentionConfig(**case.get("attention_config", {})),
        cache_config=Strict(
            "cache_config",
            block_size=block_size or 16,
            user_specified_block_size=block_size is not None,
            cache_dtype=case["kv_cache_dtype"],
            sliding_window=case.get("sliding_window") or None,
            enable_prefix_caching=True,
            mamba_cache_dtype="auto",
            mamba_ssm_cache_dtype="auto",
            kv_cache_dtype_skip_layers=[],
        ),
        model_config=Strict(
            "model_config",
            dtype=torch_dtype(case["dtype"]),
            hf_text_config=text_config,
            hf_config=hf_config,
            is_hybrid=False,
            is_diffusion=bool(case.get("diffusion")),
            is_mm_prefix_lm=bool(case.get("mm_prefix")),
            rswa_window=None,
            model_arch_config=_Layers(case),
            use_mla=bool(case.get("mla")),
            max_model_len=32768,
            get_head_size=lambda: case["head_size"],
            get_sliding_window=lambda: case.get("sliding_window") if is_window else None,
            get_num_attention_heads=lambda *_args: case["num_heads"],
            get_num_kv_heads=lambda *_args: case["num_kv_heads"],
            runner_type="generate",
        ),
        parallel_config=Strict(
            "parallel_config",
            decode_context_parallel_size=case.get("dcp", 1),
            prefill_context_parallel_size=case.get("pcp", 1),
            tensor_parallel_size=1,
            pipeline_parallel_size=1,
            dcp_kv_cache_interleave_size=1,
            cp_kv_cache_interleave_size=1,
        ),
        kv_transfer_config=(
            Strict("kv_transfer_config", is_kv_transfer_instance=True)
            if case.get("kv_connector")
            else None
        ),
        speculative_config=(
            Strict(
                "speculative_config",
                num_speculative_tokens=case["num_speculative_tokens"],
                enable_adaptive_verification=False,
                method="eagle",
                parallel_drafting=False,
            )
            if case.get("num_speculative_tokens")
            else None
        ),
        scheduler_config=Strict("scheduler_config", max_num_seqs=256, max_num_batched_tokens=8192),
        compilation_config=Strict(
            "compilation_config",
            static_forward_context={},
            max_cudagraph_capture_size=512,
            cudagraph_mode=None,
        ),
        num_speculative_tokens=case.get("num_speculative_tokens", 0),
    )


def set_current(config: Any) -> None:
    """Make `config` the one every getter of vLLM reads."""
    import vllm.config.vllm as module

    if not hasattr(module, "_current_vllm_config"):
        raise UnknownField("vllm.config.vllm._current_vllm_config")
    module._current_vllm_config = config


def call(function: Callable[..., Any], wanted: dict[str, Any], dropped: list[str]) -> Any:
    """Call with those of the wanted arguments that this version has; note the others."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return function(**wanted)
    unknown = {name for name in wanted if name not in parameters}
    dropped.extend(sorted(name for name in unknown if wanted[name] not in _DEFAULTS))
    return function(**{name: value for name, value in wanted.items() if name not in unknown})
