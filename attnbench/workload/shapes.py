"""Attention layers of real models by name, each with the public source of its numbers.

A model whose layers are of two kinds has two names: `gemma-3-27b` are its global layers,
`gemma-3-27b-local` its sliding-window layers; `num_layers` counts the layers of that kind.

Numbers are of the whole model; `get_shape(name, tensor_parallel_size)` gives one rank's share, as
vLLM splits it: query heads are divided, KV heads too, and replicated once there are fewer KV heads
than ranks; a latent (MLA) cache is replicated on every rank. The softmax scale is always
1/sqrt(width of a query head): Gemma-2 27b and Gemma-3 27b publish another constant
(`query_pre_attn_scalar` 144 and 168), which changes no time.
"""

from __future__ import annotations

from dataclasses import replace

from attnbench.errors import WorkloadError
from attnbench.workload.closest import did_you_mean
from attnbench.workload.types import AttentionShape

DEFAULT_SHAPE = "llama-3-8b"


def _hugging_face(repository: str) -> str:
    return f"https://huggingface.co/{repository}/blob/main/config.json"


def _heads(
    name: str,
    source: str,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    *,
    sliding_window: int = 0,
    logits_soft_cap: float = 0.0,
    has_sink: bool = False,
    use_alibi: bool = False,
) -> AttentionShape:
    return AttentionShape(
        name=name,
        source=_hugging_face(source),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        v_head_size=head_size,
        sliding_window=sliding_window,
        logits_soft_cap=logits_soft_cap,
        has_sink=has_sink,
        use_alibi=use_alibi,
    )


def _latent(name: str, source: str, num_layers: int, num_heads: int) -> AttentionShape:
    """A model with DeepSeek's MLA widths: latent 512 + 64, heads 128 (+ 64 rotary) and 128."""
    return AttentionShape(
        name=name,
        source=_hugging_face(source),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=1,
        head_size=576,
        v_head_size=128,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
    )


# name, source, layers of this kind, num_heads, num_kv_heads, head_size
_TABLE = (
    _heads("llama-3-8b", "meta-llama/Meta-Llama-3-8B", 32, 32, 8, 128),
    _heads("llama-3-70b", "meta-llama/Meta-Llama-3-70B", 80, 64, 8, 128),
    _heads("llama-3.1-405b", "meta-llama/Llama-3.1-405B", 126, 128, 8, 128),
    _heads("qwen3-8b", "Qwen/Qwen3-8B", 36, 32, 8, 128),
    _heads("qwen3-32b", "Qwen/Qwen3-32B", 64, 64, 8, 128),
    _heads("qwen3-30b-a3b", "Qwen/Qwen3-30B-A3B", 48, 32, 4, 128),
    _heads("qwen3-235b-a22b", "Qwen/Qwen3-235B-A22B", 94, 64, 4, 128),
    # Gemma-2: every second layer is local; soft cap 50 in all.
    _heads("gemma-2-9b", "google/gemma-2-9b", 21, 16, 8, 256, logits_soft_cap=50.0),
    _heads(
        "gemma-2-9b-local",
        "google/gemma-2-9b",
        21,
        16,
        8,
        256,
        sliding_window=4096,
        logits_soft_cap=50.0,
    ),
    _heads("gemma-2-27b", "google/gemma-2-27b", 23, 32, 16, 128, logits_soft_cap=50.0),
    _heads(
        "gemma-2-27b-local",
        "google/gemma-2-27b",
        23,
        32,
        16,
        128,
        sliding_window=4096,
        logits_soft_cap=50.0,
    ),
    # Gemma-3: every sixth layer is global (48 = 40 + 8, 62 = 52 + 10); no soft cap (QK norm).
    _heads("gemma-3-12b", "google/gemma-3-12b-it", 8, 16, 8, 256),
    _heads("gemma-3-12b-local", "google/gemma-3-12b-it", 40, 16, 8, 256, sliding_window=1024),
    _heads("gemma-3-27b", "google/gemma-3-27b-it", 10, 32, 16, 128),
    _heads("gemma-3-27b-local", "google/gemma-3-27b-it", 52, 32, 16, 128, sliding_window=1024),
    # gpt-oss: a learned sink per head in all layers; every second layer is local.
    _heads("gpt-oss-20b", "openai/gpt-oss-20b", 12, 64, 8, 64, has_sink=True),
    _heads(
        "gpt-oss-20b-local", "openai/gpt-oss-20b", 12, 64, 8, 64, sliding_window=128, has_sink=True
    ),
    _heads("gpt-oss-120b", "openai/gpt-oss-120b", 18, 64, 8, 64, has_sink=True),
    _heads(
        "gpt-oss-120b-local",
        "openai/gpt-oss-120b",
        18,
        64,
        8,
        64,
        sliding_window=128,
        has_sink=True,
    ),
    # The 128k model's window (262144) is longer than its context: no window.
    _heads("phi-3-mini", "microsoft/Phi-3-mini-128k-instruct", 32, 32, 32, 96),
    _heads("falcon-7b", "tiiuae/falcon-7b", 32, 71, 1, 64),
    _heads("mistral-7b", "mistralai/Mistral-7B-v0.3", 32, 32, 8, 128),
    _heads("mistral-7b-v0.1", "mistralai/Mistral-7B-v0.1", 32, 32, 8, 128, sliding_window=4096),
    _heads("bloom-7b1", "bigscience/bloom-7b1", 30, 32, 32, 128, use_alibi=True),
    _heads("mpt-7b", "mosaicml/mpt-7b", 32, 32, 32, 128, use_alibi=True),
    _latent("deepseek-v2-lite", "deepseek-ai/DeepSeek-V2-Lite", 27, 16),
    _latent("deepseek-v3", "deepseek-ai/DeepSeek-V3", 61, 128),
    # Its layers are sparse: write topk=2048:random (`index_topk` 2048) for what it runs.
    _latent("deepseek-v3.2", "deepseek-ai/DeepSeek-V3.2", 61, 128),
    _latent("deepseek-r1", "deepseek-ai/DeepSeek-R1", 61, 128),
    _latent("kimi-k2", "moonshotai/Kimi-K2-Instruct", 61, 64),
)
_SHAPES = {shape.name: shape for shape in _TABLE}


def shape_names() -> tuple[str, ...]:
    """Registered names, in table order."""
    return tuple(_SHAPES)


def get_shape(name: str, tensor_parallel_size: int = 1) -> AttentionShape:
    """The layer `name` on one of `tensor_parallel_size` ranks.

    Raises:
        WorkloadError: the name is not registered, or the heads cannot be divided that way.
    """
    shape = _SHAPES.get(name)
    if shape is None:
        raise WorkloadError(f"unknown attention shape {name!r}; {did_you_mean(name, _SHAPES)}")
    if tensor_parallel_size == 1:
        return shape
    if tensor_parallel_size < 1 or shape.num_heads % tensor_parallel_size:
        raise WorkloadError(
            f"tp={tensor_parallel_size} does not divide the {shape.num_heads} heads of {name}; "
            f"write a tp of {', '.join(map(str, _usable_ranks(shape)))}"
        )
    if not _kv_heads_divide(shape, tensor_parallel_size):
        raise WorkloadError(
            f"tp={tensor_parallel_size} neither divides nor multiplies the {shape.num_kv_heads} KV "
            f"heads of {name}; write a tp of {', '.join(map(str, _usable_ranks(shape)))}"
        )
    return replace(
        shape,
        num_heads=shape.num_heads // tensor_parallel_size,
        num_kv_heads=max(1, shape.num_kv_heads // tensor_parallel_size),
        tensor_parallel_size=tensor_parallel_size,
    )


def _kv_heads_divide(shape: AttentionShape, ranks: int) -> bool:
    return shape.num_kv_heads % ranks == 0 or ranks % shape.num_kv_heads == 0


def _usable_ranks(shape: AttentionShape) -> list[int]:
    return [
        ranks
        for ranks in range(1, shape.num_heads + 1)
        if shape.num_heads % ranks == 0 and _kv_heads_divide(shape, ranks)
    ]
