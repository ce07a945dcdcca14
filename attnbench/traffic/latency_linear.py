"""Sizes of a model's matrix products: from its Hugging Face `config.json`, or by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attnbench.errors import UsageError
from attnbench.traffic.latency import LinearSizes
from attnbench.workload.closest import did_you_mean

_DEEPSEEK_V3: dict[str, Any] = {
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "vocab_size": 129280,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "bytes_per_parameter": 1.0,  # published in fp8
}


def _llama(hidden: int, layers: int, heads: int, mlp: int, vocab: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "vocab_size": vocab,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": mlp,
    }


#: Numbers of the models' public config.json, whose addresses docs/workloads.md lists by name. A
#: test holds each to the number of parameters of the published weights, to the last one.
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "llama-3-8b": _llama(4096, 32, 32, 14336, 128256),
    "llama-3-70b": _llama(8192, 80, 64, 28672, 128256),
    "llama-3.1-405b": _llama(16384, 126, 128, 53248, 128256),
    "qwen3-8b": _llama(4096, 36, 32, 12288, 151936),
    "qwen3-32b": _llama(5120, 64, 64, 25600, 151936),
    "deepseek-v3": _DEEPSEEK_V3,
    "deepseek-r1": _DEEPSEEK_V3,
}


def linear_sizes(model: str | Mapping[str, Any], tensor_parallel_size: int = 1) -> LinearSizes:
    """The matrix products of one rank of a model, all of its layers.

    Experts are split over the ranks too; what ranks tell each other is not counted.

    Args:
        model: a name of `CONFIGS`, or the contents of a `config.json`.

    Raises:
        UsageError: an unknown name, or a config without the sizes.
    """
    if isinstance(model, str):
        if model not in CONFIGS:
            raise UsageError(
                f"the sizes of {model!r} are not known; {did_you_mean(model, tuple(CONFIGS))}, or "
                "give a config.json"
            )
        config: Mapping[str, Any] = CONFIGS[model]
    else:
        config = model.get("text_config") or model
    hidden, layers = _number(config, "hidden_size"), _number(config, "num_hidden_layers")
    dense_mlp = 3 * hidden * _number(config, "intermediate_size")
    experts = int(config.get("n_routed_experts") or config.get("num_experts") or 0)
    experts = experts or int(config.get("num_local_experts") or 0)
    dense_layers, expert, shared = layers, 0, 0
    if experts:
        # Mixtral and gpt-oss give the width of an expert as intermediate_size.
        expert = (
            3
            * hidden
            * int(config.get("moe_intermediate_size") or _number(config, "intermediate_size"))
        )
        shared = int(config.get("n_shared_experts") or 0) * expert
        dense_layers = min(int(config.get("first_k_dense_replace") or 0), layers)
    moe_layers = layers - dense_layers
    total = layers * _projections(config, hidden) + dense_layers * dense_mlp + moe_layers * shared
    total += hidden * _number(config, "vocab_size") + moe_layers * hidden * experts  # the routers
    return LinearSizes(
        dense_parameters=total / tensor_parallel_size,
        expert_parameters=moe_layers * expert / tensor_parallel_size,
        num_experts=experts,
        num_experts_per_token=_number(config, "num_experts_per_tok") if experts else 0,
        bytes_per_parameter=float(config.get("bytes_per_parameter") or 2.0),
    )


def _projections(config: Mapping[str, Any], hidden: int) -> int:
    """Parameters of one attention layer's projections."""
    heads = _number(config, "num_attention_heads")
    if config.get("kv_lora_rank"):
        rank, rope = _number(config, "kv_lora_rank"), _number(config, "qk_rope_head_dim")
        nope, value = _number(config, "qk_nope_head_dim"), _number(config, "v_head_dim")
        query_rank = int(config.get("q_lora_rank") or 0)
        query = heads * (nope + rope)
        query_parameters = query_rank * (hidden + query) if query_rank else hidden * query
        return (
            query_parameters
            + hidden * (rank + rope)
            + rank * heads * (nope + value)
            + heads * value * hidden
        )
    head_size = int(config.get("head_dim") or hidden // heads)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    return hidden * head_size * (2 * heads + 2 * kv_heads)


def _number(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UsageError(f"the model's config has no valid {key} (found {value!r})")
    return value
