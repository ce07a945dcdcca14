"""One rank's sizes of a model, from its Hugging Face `config.json` or by name: what a step runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from attnbench.errors import UsageError
from attnbench.traffic.latency_linear import CONFIGS
from attnbench.workload.closest import did_you_mean
from attnbench.workload.model import ModelSizes


@dataclass(frozen=True, slots=True)
class Model:
    """Sizes of one rank, and how many layers the whole model has, dense ones included."""

    sizes: ModelSizes
    num_layers: int


def model_sizes(model: str | Mapping[str, Any], tensor_parallel_size: int = 1) -> Model:
    """What one of `tensor_parallel_size` ranks holds, as vLLM splits it.

    MLPs, every expert's width and the vocabulary are divided (the vocabulary rounded up); the low
    ranks of MLA are on every rank.

    Args:
        model: a name of `CONFIGS`, or the contents of a `config.json`.

    Raises:
        UsageError: an unknown name, a config without the sizes, or ranks that do not divide them.
    """
    if isinstance(model, str) and model not in CONFIGS:
        raise UsageError(
            f"the sizes of {model!r} are not known; {did_you_mean(model, tuple(CONFIGS))}, or "
            "give a config.json"
        )
    whole = CONFIGS[model] if isinstance(model, str) else model
    config: Mapping[str, Any] = whole.get("text_config") or whole
    ranks = tensor_parallel_size
    layers = _number(config, "num_hidden_layers")
    experts = int(
        config.get("n_routed_experts")
        or config.get("num_experts")
        or config.get("num_local_experts")
        or 0
    )
    width = shared = dense_layers = 0
    if experts:
        # Mixtral and gpt-oss give the width of an expert as intermediate_size.
        own = config.get("moe_intermediate_size")
        width = _share(config, "moe_intermediate_size" if own else "intermediate_size", ranks)
        shared = int(config.get("n_shared_experts") or 0) * width
        dense_layers = min(int(config.get("first_k_dense_replace") or 0), layers)
    has_dense = not experts or dense_layers
    sizes = ModelSizes(
        hidden_size=_number(config, "hidden_size"),
        intermediate_size=_share(config, "intermediate_size", ranks) if has_dense else 0,
        vocab_size=-(-_number(config, "vocab_size") // ranks),
        q_lora_rank=int(config.get("q_lora_rank") or 0) if config.get("kv_lora_rank") else 0,
        num_experts=experts,
        moe_intermediate_size=width,
        num_experts_per_token=_number(config, "num_experts_per_tok") if experts else 0,
        shared_intermediate_size=shared,
        num_dense_layers=dense_layers,
    )
    return Model(sizes, layers)


def _share(config: Mapping[str, Any], key: str, ranks: int) -> int:
    number = _number(config, key)
    if number % ranks:
        raise UsageError(f"tp={ranks} does not divide the model's {key} of {number}; use another")
    return number // ranks


def _number(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UsageError(f"the model's config has no valid {key} (found {value!r})")
    return value
