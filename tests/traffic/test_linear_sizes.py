"""Sizes of named models: against the number of parameters their published weights have."""

from __future__ import annotations

import pytest

from attnbench.traffic.latency_linear import CONFIGS, linear_sizes

#: Parameters of the weights, as their repositories' safetensors headers add up (without the
#: multi-token-prediction module of the DeepSeek models, which no step of ours runs).
PUBLISHED = {
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "deepseek-v3": 671_026_419_200,
    "deepseek-r1": 671_026_419_200,
}


def norms_and_biases(name: str) -> int:
    """Parameters of a model that are no matrix product: two norms a layer and the last one, the
    norms of Qwen3's heads and of DeepSeek's latents, the routers' biases."""
    config = CONFIGS[name]
    layers = int(config["num_hidden_layers"])
    count = (2 * layers + 1) * int(config["hidden_size"])
    if name.startswith("qwen3"):
        count += layers * 2 * int(config["head_dim"])
    if "kv_lora_rank" in config:
        count += layers * int(config["q_lora_rank"] + config["kv_lora_rank"])
        count += (layers - int(config["first_k_dense_replace"])) * int(config["n_routed_experts"])
    return count


def test_every_named_model_is_held_to_its_weights() -> None:
    assert set(PUBLISHED) == set(CONFIGS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_products_embedding_and_norms_are_all_parameters(name: str) -> None:
    config, sizes = CONFIGS[name], linear_sizes(name)
    products = sizes.dense_parameters + sizes.num_experts * sizes.expert_parameters
    embedding = config["hidden_size"] * config["vocab_size"]
    assert products + embedding + norms_and_biases(name) == PUBLISHED[name]
