"""Larger batches on top of a reduction, and one `--model` for all verbs that read a trace."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from attnbench.choose.itl import _beyond
from attnbench.cli.model_layer import model_layer
from attnbench.errors import UsageError
from attnbench.traffic.itl import serve
from attnbench.traffic.latency import AttentionRoofline, DeviceRates
from attnbench.traffic.latency_linear import CONFIGS
from attnbench.traffic.latency_measured import MeasuredLatency
from attnbench.traffic.reduced import ReducedTrace, TraceOptions, reduced_trace
from attnbench.traffic.schedule_settings import SchedulerSettings
from tests.traffic.real import H200, LAYER, batches_of_workloads

SLOW = 12.0
"""So many times the roofline's time: at this trace's rate it is near its capacity."""


def reduced(folder: Path, headroom: float, model: str = "llama-3-8b") -> ReducedTrace:
    path = folder / "day.csv"
    rng = np.random.default_rng(0)
    arrival = np.cumsum(rng.exponential(0.25, 400))
    rows = [f"{t:.4f},{rng.integers(500, 6000)},{rng.integers(20, 120)}" for t in arrival]
    path.write_text("\n".join(["arrival_s,input_tokens,output_tokens", *rows]), encoding="utf-8")
    one = model_layer(model, 1)
    options = TraceOptions(representatives=64, headroom=headroom)
    return reduced_trace(path, one.layer, one.sizes, 1, H200, options, one.num_layers)


def beyond(found: ReducedTrace) -> float:
    """Share of a slow backend's time that is extrapolated, by its own clock."""
    rates = DeviceRates(H200.memory_bytes_per_s / SLOW, H200.matmul_flops_per_s / SLOW)
    workloads = found.reduction.workloads
    batches = batches_of_workloads(workloads)
    kernel = AttentionRoofline(LAYER, rates, 1)
    seconds = kernel.of_entries(batches.step_offsets, batches.query_len, batches.context_len)
    model = MeasuredLatency(workloads, seconds)
    steps, _ = serve(found.trace, SchedulerSettings(), model, found.linear, "linear layers")
    return _beyond(steps, model, found)


def test_headroom_covers_what_a_slow_backend_piles_up(tmp_path: Path) -> None:
    plain, roomy = reduced(tmp_path, 1.0), reduced(tmp_path, 4.0)
    assert beyond(plain) > 0.05
    assert beyond(roomy) <= 0.01
    # What was there stays, and stands for the same steps; what is new stands for none.
    count = len(plain.reduction)
    assert roomy.reduction.workloads[:count] == plain.reduction.workloads
    assert roomy.reduction.weights[:count].tolist() == plain.reduction.weights.tolist()
    assert 0 < len(roomy.reduction) - count <= 64 // 4 + 11
    assert not roomy.reduction.weights[count:].any()
    assert len(set(roomy.reduction.workloads)) == len(roomy.reduction)
    larger = roomy.reduction.features[count:] > plain.reduction.features.max(axis=0)
    assert larger.any(axis=1).mean() > 0.9  # contexts are rounded


@pytest.mark.parametrize("headroom", [0.0, 0.5, float("nan"), float("inf")])
def test_headroom_below_one_is_refused(tmp_path: Path, headroom: float) -> None:
    with pytest.raises(UsageError, match="--headroom"):
        reduced(tmp_path, headroom)


def config(folder: Path, name: str, **changes: object) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps({**CONFIGS[name], **changes}), encoding="utf-8")
    return str(path)


def test_a_config_json_is_the_named_model(tmp_path: Path) -> None:
    """The same steps, clock and batches; only the layer's name is not known."""
    named = reduced(tmp_path, 1.0)
    found = reduced(tmp_path, 1.0, config(tmp_path, "llama-3-8b"))
    assert found.attention.num_layers == named.attention.num_layers == 32
    np.testing.assert_array_equal(found.steps.start_s, named.steps.start_s)
    specs = [[one.batch_spec for one in each.reduction.workloads] for each in (found, named)]
    assert specs[0] == specs[1]


def test_words_replace_what_the_model_says(tmp_path: Path) -> None:
    for model in ("llama-3-8b", config(tmp_path, "llama-3-8b")):
        layer = model_layer(model, 8, "kv=fp8_e4m3 block=32").layer
        assert (layer.shape.num_heads, layer.shape.num_kv_heads) == (4, 1)
        assert (layer.resolved_kv_cache_dtype, layer.block_size) == ("fp8_e4m3", 32)
    latent = model_layer(config(tmp_path, "deepseek-v3"), 8)
    assert latent.num_layers == 61
    assert latent.layer.shape.is_mla
    assert latent.layer.shape.num_heads == 16
    assert latent.layer.block_size == 64


def test_several_kinds_of_layer_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = ["full_attention", "sliding_attention"] * 16
    path = config(tmp_path, "llama-3-8b", layer_types=kinds, sliding_window=1024)
    assert model_layer(path, 1).num_layers == 16
    assert "2 kinds of attention layer" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["llama-3-8", "none/config.json"])
def test_an_unknown_model_is_refused(model: str) -> None:
    with pytest.raises(UsageError, match="unknown model"):
        model_layer(model, 1)
