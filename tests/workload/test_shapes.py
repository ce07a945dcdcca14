"""The table of shapes against literal numbers: a workload's id is made from a shape's name, so the
numbers behind a name may never change."""

from __future__ import annotations

import pytest

from attnbench.errors import WorkloadError
from attnbench.workload import get_shape, shape_names

# name: layers, num_heads, num_kv_heads, head_size, v_head_size, window, soft cap, sink, ALiBi
GOLDEN = {
    "llama-3-8b": (32, 32, 8, 128, 128, 0, 0.0, False, False),
    "llama-3-70b": (80, 64, 8, 128, 128, 0, 0.0, False, False),
    "llama-3.1-405b": (126, 128, 8, 128, 128, 0, 0.0, False, False),
    "qwen3-8b": (36, 32, 8, 128, 128, 0, 0.0, False, False),
    "qwen3-32b": (64, 64, 8, 128, 128, 0, 0.0, False, False),
    "qwen3-30b-a3b": (48, 32, 4, 128, 128, 0, 0.0, False, False),
    "qwen3-235b-a22b": (94, 64, 4, 128, 128, 0, 0.0, False, False),
    "gemma-2-9b": (21, 16, 8, 256, 256, 0, 50.0, False, False),
    "gemma-2-9b-local": (21, 16, 8, 256, 256, 4096, 50.0, False, False),
    "gemma-2-27b": (23, 32, 16, 128, 128, 0, 50.0, False, False),
    "gemma-2-27b-local": (23, 32, 16, 128, 128, 4096, 50.0, False, False),
    "gemma-3-12b": (8, 16, 8, 256, 256, 0, 0.0, False, False),
    "gemma-3-12b-local": (40, 16, 8, 256, 256, 1024, 0.0, False, False),
    "gemma-3-27b": (10, 32, 16, 128, 128, 0, 0.0, False, False),
    "gemma-3-27b-local": (52, 32, 16, 128, 128, 1024, 0.0, False, False),
    "gpt-oss-20b": (12, 64, 8, 64, 64, 0, 0.0, True, False),
    "gpt-oss-20b-local": (12, 64, 8, 64, 64, 128, 0.0, True, False),
    "gpt-oss-120b": (18, 64, 8, 64, 64, 0, 0.0, True, False),
    "gpt-oss-120b-local": (18, 64, 8, 64, 64, 128, 0.0, True, False),
    "phi-3-mini": (32, 32, 32, 96, 96, 0, 0.0, False, False),
    "falcon-7b": (32, 71, 1, 64, 64, 0, 0.0, False, False),
    "mistral-7b": (32, 32, 8, 128, 128, 0, 0.0, False, False),
    "mistral-7b-v0.1": (32, 32, 8, 128, 128, 4096, 0.0, False, False),
    "bloom-7b1": (30, 32, 32, 128, 128, 0, 0.0, False, True),
    "mpt-7b": (32, 32, 32, 128, 128, 0, 0.0, False, True),
    "deepseek-v2-lite": (27, 16, 1, 576, 128, 0, 0.0, False, False),
    "deepseek-v3": (61, 128, 1, 576, 128, 0, 0.0, False, False),
    "deepseek-v3.2": (61, 128, 1, 576, 128, 0, 0.0, False, False),
    "deepseek-r1": (61, 128, 1, 576, 128, 0, 0.0, False, False),
    "kimi-k2": (61, 64, 1, 576, 128, 0, 0.0, False, False),
}
LATENT = {"deepseek-v2-lite", "deepseek-v3", "deepseek-v3.2", "deepseek-r1", "kimi-k2"}
# Layers of the published configs, by the stem of the names.
WHOLE_MODELS = {
    "gemma-2-9b": 42,
    "gemma-2-27b": 46,
    "gemma-3-12b": 48,
    "gemma-3-27b": 62,
    "gpt-oss-20b": 24,
    "gpt-oss-120b": 36,
}


def test_the_table_is_golden() -> None:
    found = {
        name: (
            s.num_layers,
            s.num_heads,
            s.num_kv_heads,
            s.head_size,
            s.v_head_size,
            s.sliding_window,
            s.logits_soft_cap,
            s.has_sink,
            s.use_alibi,
        )
        for name in shape_names()
        for s in [get_shape(name)]
    }
    assert found == GOLDEN


def test_latent_widths_are_golden() -> None:
    for name in shape_names():
        shape = get_shape(name)
        latent = (shape.kv_lora_rank, shape.qk_nope_head_dim, shape.qk_rope_head_dim)
        assert latent == ((512, 128, 64) if name in LATENT else (0, 0, 0))
        assert shape.is_mla == (name in LATENT)
    assert get_shape("deepseek-v3").qk_head_dim == 192


@pytest.mark.parametrize("name", WHOLE_MODELS)
def test_both_kinds_of_layers_make_the_whole_model(name: str) -> None:
    both = (get_shape(name), get_shape(f"{name}-local"))
    assert sum(shape.num_layers for shape in both) == WHOLE_MODELS[name]


@pytest.mark.parametrize("name", GOLDEN)
def test_every_shape_names_a_public_source(name: str) -> None:
    shape = get_shape(name)
    assert shape.name == name
    assert shape.source.startswith("https://huggingface.co/")
    assert shape.source.endswith("/config.json")


@pytest.mark.parametrize(
    ("name", "ranks", "heads"),
    [
        ("llama-3-70b", 1, (64, 8)),
        ("llama-3-70b", 2, (32, 4)),
        ("llama-3-70b", 4, (16, 2)),
        ("llama-3-70b", 8, (8, 1)),
        ("llama-3-70b", 16, (4, 1)),  # KV heads are replicated
        ("llama-3-70b", 64, (1, 1)),
        ("falcon-7b", 71, (1, 1)),
        ("deepseek-v3", 8, (16, 1)),  # the latent cache is replicated
        ("qwen3-235b-a22b", 8, (8, 1)),
    ],
)
def test_tensor_parallel_split(name: str, ranks: int, heads: tuple[int, int]) -> None:
    shape = get_shape(name, ranks)
    assert (shape.num_heads, shape.num_kv_heads) == heads
    assert shape.tensor_parallel_size == ranks
    whole = get_shape(name)
    assert (shape.head_size, shape.num_layers) == (whole.head_size, whole.num_layers)


@pytest.mark.parametrize(
    ("name", "ranks", "parts"),
    [
        ("lama-3-8b", 1, ["'lama-3-8b'", "did you mean llama-3-8b"]),
        ("Llama-3-8B", 1, ["did you mean llama-3-8b"]),
        ("gpt-5", 1, ["'gpt-5'", "gpt-oss-20b"]),
        ("zzz", 1, ["choose one of", "llama-3-8b", "kimi-k2"]),
        ("llama-3-8b", 3, ["tp=3", "32 heads of llama-3-8b", "1, 2, 4, 8, 16, 32"]),
        ("falcon-7b", 2, ["tp=2", "71 heads", "a tp of 1, 71"]),
        ("llama-3-8b", 64, ["tp=64"]),
        ("llama-3-8b", 0, ["tp=0"]),
    ],
)
def test_error_messages(name: str, ranks: int, parts: list[str]) -> None:
    with pytest.raises(WorkloadError) as caught:
        get_shape(name, ranks)
    for part in parts:
        assert part in str(caught.value)
