"""`model=`: its text, and the FLOPs and bytes of a step against counts made another way."""

from __future__ import annotations

import pytest

from attnbench.errors import UsageError, WorkloadError
from attnbench.traffic.latency_linear import CONFIGS, linear_sizes
from attnbench.traffic.model_sizes import model_sizes
from attnbench.workload import Workload
from attnbench.workload.cost import attention_bytes, attention_flops
from attnbench.workload.model import ModelSizes, step_bytes, step_flops

DENSE = "4096:14336:128256"
LATENT = "7168:18432:129280:q1536:256x2048k8+2048d3"


@pytest.mark.parametrize(
    "text", [DENSE, LATENT, "64:0:32:4x16k2", "64:128:32:4x16k2d1", "64:128:32:q16"]
)
def test_a_text_is_read_and_written_as_it_was(text: str) -> None:
    assert ModelSizes.parse(text).text == text


@pytest.mark.parametrize(
    "words",
    [
        "model=",
        "model=64:128",
        "model=0:128:32",
        "model=64:0:32",  # layers without an MLP
        "model=64:128:32:2x16k4",  # more experts a token than there are
        "model=64:0:32:4x16k2d1",
        "model=64:128:32:q16",  # a low rank without latents
        "layers=2 model=64:128:32:4x16k2d3",
        "heads=4/1 mla=64+16:32+32 topk=4:random model=64:128:32",
    ],
)
def test_a_model_that_is_none_is_refused(words: str) -> None:
    with pytest.raises(WorkloadError, match="model="):
        Workload.parse(f"8q1s64 {words}")


def test_the_attention_of_a_step_is_the_plain_workload() -> None:
    step = Workload.parse(f"8q1s4k kv=fp8_e4m3 layers=4 model={DENSE} shape=llama-3-70b tp=8")
    assert step.is_step
    assert step.attention.text == "8q1s4k kv=fp8_e4m3 shape=llama-3-70b tp=8"
    assert not step.attention.is_step
    assert Workload.parse(step.text) == step
    assert step.attention.id != step.id


@pytest.mark.parametrize("name", ["llama-3-8b", "llama-3-70b", "deepseek-v3"])
@pytest.mark.parametrize("ranks", [1, 8])
def test_a_rank_has_its_part_of_the_model(name: str, ranks: int) -> None:
    """Two countings of one config: of the whole, divided, and of what a rank runs."""
    model = model_sizes(name, ranks)
    sizes, whole = model.sizes, linear_sizes(name, ranks)
    assert model.num_layers == CONFIGS[name]["num_hidden_layers"]
    layers = model.num_layers - (sizes.num_dense_layers if sizes.num_experts else 0)
    if sizes.num_experts:
        expert = 3 * sizes.hidden_size * sizes.moe_intermediate_size * layers
        assert whole.expert_parameters == expert
        assert sizes.shared_intermediate_size == sizes.moe_intermediate_size
    else:
        text = f"q1 layers={model.num_layers} model={sizes.text} shape={name} tp={ranks}"
        step = Workload.parse(text)
        layer_bytes = attention_bytes(step)
        weights = (step_bytes(step) - model.num_layers * layer_bytes) / 2
        # Fewer KV heads than ranks would be replicated; 8 ranks have one each.
        assert weights == whole.dense_parameters


def test_a_dense_step_is_counted() -> None:
    """Llama 3 8B, two layers, eight requests of one token: each weight twice a token."""
    step = Workload.parse(f"8q1s4k layers=2 model={DENSE}")
    layer = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336
    head = 4096 * 128256
    assert step_flops(step) == 2 * attention_flops(step) + 2 * 8 * (2 * layer + head)
    assert step_bytes(step) == 2 * attention_bytes(step) + 2 * (2 * layer + head)
    # The head sees one token of a prompt.
    prompt = Workload.parse(f"q64 layers=2 model={DENSE}")
    assert step_flops(prompt) == 2 * attention_flops(prompt) + 2 * (64 * 2 * layer + head)


def test_a_latent_step_with_experts_is_counted() -> None:
    text = "heads=4/1 mla=64+16:32+24 layers=3 model=96:160:50:q40:8x20k2+20d1"
    step = Workload.parse(f"3q1s40_q5 {text}")
    projections = 40 * (96 + 4 * 48) + 96 * 80 + 4 * 24 * 96
    dense, expert, shared, router = 3 * 96 * 160, 3 * 96 * 20, 3 * 96 * 20, 96 * 8
    latent = 4 * 64 * (32 + 24)
    tokens, absorbed = 8, 3
    every = 3 * projections + dense + 2 * (shared + router)
    flops = 2 * tokens * (every + 2 * 2 * expert) + 2 * absorbed * 3 * latent + 2 * 4 * 96 * 50
    assert step_flops(step) == 3 * attention_flops(step) + flops
    touched = 8 * (1 - (1 - 2 / 8) ** tokens)
    weights = every + 2 * touched * expert + 3 * latent + 96 * 50
    assert step_bytes(step) - 3 * attention_bytes(step) == pytest.approx(2 * weights, abs=2)
    # Without a decode nothing is absorbed.
    prompt = Workload.parse(f"q8 {text}")
    assert step_flops(step) != step_flops(prompt)


@pytest.mark.parametrize(
    ("model", "ranks", "said"),
    [("llama-3-9b", 1, "llama-3-9b"), ("llama-3-8b", 5, "tp=5 does not divide")],
)
def test_ranks_and_names_that_do_not_fit_are_refused(model: str, ranks: int, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        model_sizes(model, ranks)


def test_a_config_without_sizes_is_refused() -> None:
    with pytest.raises(UsageError, match="vocab_size"):
        model_sizes({"hidden_size": 8, "num_hidden_layers": 2, "intermediate_size": 8})


def test_a_config_of_experts_alone_has_no_dense_layer() -> None:
    """Mixtral says an expert's width as intermediate_size."""
    config = {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "vocab_size": 100,
        "intermediate_size": 128,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }
    assert model_sizes(config, 2).sizes.text == "64:0:50:8x64k2"
