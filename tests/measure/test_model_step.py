"""A step of a model: its truth against loops over tokens, and what passes and what does not."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from attnbench.backends.batch import AttentionBatch, make_batch
from attnbench.backends.device import Device
from attnbench.backends.registry import get_backend_class
from attnbench.errors import SelectionError, UsageError
from attnbench.measure.environment import read_environment
from attnbench.measure.model_step import PreparedStep
from attnbench.measure.model_truth import StepTruth, step_truth
from attnbench.measure.model_weights import ExpertWeights, MLPWeights, StepWeights, make_weights
from attnbench.measure.options import MeasureOptions
from attnbench.measure.plan import PlannedPoint
from attnbench.measure.point import PointContext, measure_point
from attnbench.measure.timers import FakeTimer, Subject, make_timer
from attnbench.measure.truth import TruthCache
from attnbench.measure.verify import plan_verification
from attnbench.selection import current_device
from attnbench.store.record import Measurement, Metric, Status
from attnbench.workload import Workload
from attnbench.workload.model import step_bytes, step_flops

CPU = Device("cpu")
LLAMA = "3q1s40_q7s20_q5 heads=4/2 head_size=32 layers=3 model=64:96:50"
DEEPSEEK = "3q1s40_q7s20_q5 heads=4/1 mla=64+16:32+24 layers=3 model=64:96:50:q48:8x32k2+32d1"
V3_OF_8 = "7168:2304:16160:q1536:256x256k8+256d1"
MIXTRAL = "2q1s33 heads=4/2 head_size=16 layers=2 model=64:0:40:4x24k2"


def made(text: str, backend: str) -> tuple[AttentionBatch, StepWeights, StepTruth]:
    builder = get_backend_class(backend).get_builder_cls()
    batch = make_batch(Workload.parse(text), "cpu", builder.reorder_batch_threshold)
    weights = make_weights(batch)
    return batch, weights, step_truth(batch, weights)


def prepared(text: str, backend: str) -> PreparedStep:
    batch, weights, truth = made(text, backend)
    planned = PlannedPoint(batch.workload, backend)
    return PreparedStep(planned, batch, weights, truth, CPU)


def run(step: PreparedStep) -> PreparedStep:
    with torch.no_grad():
        step.poison()
        step.attend()
    return step


# The truth, against loops


def loops(batch: AttentionBatch, weights: StepWeights) -> torch.Tensor:
    """Logits of every request's last token: token by token, head by head, in float64."""
    shape, sizes = batch.shape, weights.sizes
    logits = []
    for request in range(len(batch.requests)):
        first, last = batch.query_range(request)
        before = batch.num_computed(request)
        hidden = [weights.embedding[weights.token_ids[t]].double() for t in range(first, last)]
        for number, layer in enumerate(weights.layers):
            past = weights.batch_of(batch, number).keys_values(request, 0, before)
            keys = [past[0][i].double() for i in range(before)]
            values = [past[1][i].double() for i in range(before)]
            after = []
            for offset, residual in enumerate(hidden):
                position = before + offset
                inner = norm(residual)
                query = inner
                for index, matrix in enumerate(layer.query):
                    query = matrix.double() @ (norm(query) if index else query)
                query = query.view(shape.num_heads, shape.qk_head_dim).clone()
                cached = layer.cached.double() @ inner
                if shape.is_mla:
                    rank, nope = shape.kv_lora_rank, shape.qk_nope_head_dim
                    keys.append(norm(cached[:rank]))
                    values.append(turn(cached[rank:], position)[None])
                    for head in range(shape.num_heads):
                        query[head, nope:] = turn(query[head, nope:], position)
                else:
                    both = cached.view(shape.num_kv_heads, -1)
                    size = shape.head_size
                    keys.append(torch.stack([turn(k, position) for k in both[:, :size]]))
                    values.append(both[:, size:])
                    query = torch.stack([turn(q, position) for q in query])
                heads = []
                for head in range(shape.num_heads):
                    k, v = expanded(shape, layer, keys, values, head)
                    score = torch.softmax(k @ query[head] / math.sqrt(shape.qk_head_dim), 0)
                    heads.append(score @ v)
                residual = residual + layer.output.double() @ torch.cat(heads)
                after.append(residual + fed(norm(residual), layer.mlp, first + offset))
            hidden = after
        logits.append(weights.head.double() @ norm(hidden[-1]))
    assert sizes.hidden_size == len(hidden[0])
    return torch.stack(logits)


def expanded(
    shape: Any, layer: Any, keys: list[torch.Tensor], values: list[torch.Tensor], head: int
) -> tuple[torch.Tensor, torch.Tensor]:
    if not shape.is_mla:
        group = head // (shape.num_heads // shape.num_kv_heads)
        return torch.stack([k[group] for k in keys]), torch.stack([v[group] for v in values])
    up, out = layer.W_UK[head].double(), layer.W_UV[head].double()
    wide = [torch.cat([up @ k, v.double()[0]]) for k, v in zip(keys, values, strict=True)]
    return torch.stack(wide), torch.stack([k @ out for k in keys])


def norm(x: torch.Tensor) -> torch.Tensor:
    return x / math.sqrt(float(x @ x) / len(x) + 1e-5)


def turn(x: torch.Tensor, position: int) -> torch.Tensor:
    half, found = len(x) // 2, x.clone()
    for i in range(half):
        angle = position * 10_000.0 ** (-2 * i / len(x))
        # Tables are float32: so are engines'.
        c = float(torch.tensor(math.cos(angle), dtype=torch.float32))
        s = float(torch.tensor(math.sin(angle), dtype=torch.float32))
        found[i], found[half + i] = x[i] * c - x[half + i] * s, x[half + i] * c + x[i] * s
    return found


def fed(x: torch.Tensor, mlp: MLPWeights | ExpertWeights, token: int) -> torch.Tensor:
    if isinstance(mlp, MLPWeights):
        both = mlp.gate_up.double() @ x
        gate, up = both.chunk(2)
        return mlp.down.double() @ (gate / (1 + torch.exp(-gate)) * up)
    scores = 1 / (1 + torch.exp(-(mlp.router.double() @ x)))
    chosen = torch.topk(scores + mlp.drawn[token].double(), mlp.per_token).indices.tolist()
    total = torch.zeros_like(x)
    for expert in chosen:
        own = MLPWeights(gate_up=mlp.gate_up[expert].t(), down=mlp.down[expert].t())
        total += fed(x, own, token) * scores[expert] / sum(scores[e] for e in chosen)
    return total + (fed(x, mlp.shared, token) if mlp.shared is not None else 0.0)


@pytest.mark.parametrize(
    ("text", "backend"), [(LLAMA, "CPU_ATTN"), (DEEPSEEK, "TORCH_MLA"), (MIXTRAL, "CPU_ATTN")]
)
def test_the_truth_is_what_loops_over_tokens_give(text: str, backend: str) -> None:
    batch, weights, truth = made(f"{text} dtype=fp32", backend)
    torch.testing.assert_close(truth.logits, loops(batch, weights), rtol=1e-9, atol=1e-9)


def test_experts_are_drawn_evenly_and_for_each_layer_anew() -> None:
    text = "400q1s2 heads=1/1 head_size=8 layers=2 model=16:0:8:8x8k2"
    layers = make_weights(make_batch(Workload.parse(text))).layers
    drawn = [layer.mlp.drawn for layer in layers if isinstance(layer.mlp, ExpertWeights)]
    for scores in drawn:
        assert ((scores > 0).sum(1) == 2).all()
        assert (scores > 0).sum(0).min() > 60  # of 100 on average
    assert not torch.equal(*drawn)


# What passes


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("text", "backend"),
    [
        (LLAMA, "CPU_ATTN"),
        (LLAMA, "TORCH_SDPA"),
        (LLAMA + " kv=fp8_e4m3", "TORCH_SDPA"),
        (LLAMA + " window=9 softcap=5", "CPU_ATTN"),
        (LLAMA + " sinks=1 layout=HND lengths=geometric block=8", "CPU_ATTN"),
        (LLAMA + " alibi=1 seed=3", "TORCH_SDPA"),
        (MIXTRAL, "TORCH_SDPA"),
        (DEEPSEEK, "TORCH_MLA"),
        (DEEPSEEK + " kv=fp8_e4m3", "TORCH_MLA"),
    ],
)
def test_right_backends_pass(text: str, backend: str, dtype: str) -> None:
    step = prepared(f"{text} dtype={dtype}", backend)
    found = run(step).check()
    assert found.ok, found.reason
    assert 0 < found.rel_error < max(step._truth.tolerances)


# What does not


def test_what_was_not_written_does_not_pass() -> None:
    step = run(prepared(LLAMA + " dtype=fp32", "CPU_ATTN"))
    step.layers[1].attended[3, 2, 5] = float("nan")
    found = step.check()
    assert not found.ok
    assert "layer 1" in found.reason
    step = run(step)
    step.logits[0].fill_(float("nan"))
    assert "the logits" in step.check().reason


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "fault",
    ["cache of another layer", "stale cache", "attention", "weights", "rotation", "experts"],
)
def test_a_step_that_is_wrong_does_not_pass(fault: str, dtype: str) -> None:
    is_latent = fault == "experts"
    step = prepared(
        f"{DEEPSEEK if is_latent else LLAMA} dtype={dtype}",
        "TORCH_MLA" if is_latent else "CPU_ATTN",
    )
    assert run(step).check().ok
    first, second = step.layers[0], step.layers[1]
    if fault == "cache of another layer":
        first.kv_cache, second.kv_cache = second.kv_cache, first.kv_cache
    elif fault == "stale cache":
        first.kv_cache = torch.zeros_like(first.kv_cache)
    elif fault == "attention":
        impl: Any = _Scaled(second.attention.impl)
        second.attention.impl = impl
    elif fault == "weights":
        second.own = replace(second.own, output=-second.own.output)
    elif fault == "rotation":
        second.rope = first.rope.roll(1, 0)
    else:
        mlp = second.own.mlp
        assert isinstance(mlp, ExpertWeights)
        second.own = replace(second.own, mlp=replace(mlp, drawn=mlp.drawn.roll(1, 1)))
    found = run(step).check()
    assert not found.ok
    assert "exceeds" in found.reason


class _Scaled:
    """An impl that is 20 % off."""

    def __init__(self, impl: Any) -> None:
        self._impl = impl

    def __getattr__(self, name: str) -> Any:
        return getattr(self._impl, name)

    def forward(self, *args: Any) -> Any:
        return self._impl.forward(*args).mul_(1.2)


def test_a_graph_is_refused_where_the_backend_has_none() -> None:
    batch, weights, truth = made(LLAMA, "TORCH_SDPA")
    planned = PlannedPoint(batch.workload, "TORCH_SDPA")
    with pytest.raises(SelectionError, match="CUDA graphs of"):
        PreparedStep(planned, batch, weights, truth, CPU, for_graph=True)


def test_a_step_is_not_verified_by_steps() -> None:
    with pytest.raises(UsageError, match="verify its attention: q1s9 "):
        plan_verification(Workload.parse("q1s9 heads=2 layers=2 model=8:8:8"), [], CPU)


# Points


def measured(text: str, backend: str, context: PointContext) -> Measurement:
    (row,) = measure_point(PlannedPoint(Workload.parse(text), backend), context)
    return row


@pytest.mark.parametrize(("text", "backend"), [(LLAMA, "CPU_ATTN"), (DEEPSEEK, "TORCH_MLA")])
def test_a_point_ends_as_one_row_of_metric_step(
    text: str, backend: str, context: PointContext
) -> None:
    row = measured(f"{text} dtype=fp32", backend, context)
    workload = Workload.parse(f"{text} dtype=fp32")
    assert (row.status, row.metric, row.workload) == (Status.OK, Metric.STEP, workload.text)
    assert row.checked == ("before", "after")
    assert (row.num_layers, row.flops, row.bytes_moved) == (
        3,
        step_flops(workload),
        step_bytes(workload),
    )
    alone = FakeTimer().seconds(Subject(workload.attention, backend, Metric.ATTENTION, 0))
    rest = (step_bytes(workload) - 3 * row_of(workload).bytes_moved) / 100e9
    rest += (step_flops(workload) - 3 * row_of(workload).flops) / 1e12
    assert row.samples[0] == pytest.approx(3 * alone + rest, rel=1e-12)


def row_of(workload: Workload) -> Any:
    from types import SimpleNamespace

    from attnbench.workload.cost import attention_bytes, attention_flops

    return SimpleNamespace(bytes_moved=attention_bytes(workload), flops=attention_flops(workload))


@pytest.mark.usefixtures("misbehaving")
@pytest.mark.parametrize(
    ("backend", "status", "said"),
    [
        ("WRONG", Status.INCORRECT, "attention of layer 0"),
        ("SILENT", Status.INCORRECT, "not finite or not written in attention of layer 0"),
        ("LATER_WRONG", Status.INCORRECT, "after timing: "),
        ("RAISING", Status.ERROR, "no kernel image"),
        ("HUNGRY", Status.OOM, ""),
    ],
)
def test_a_backend_that_misbehaves_gets_its_status(
    backend: str, status: Status, said: str, context: PointContext
) -> None:
    row = measured(f"{LLAMA} dtype=fp32", backend, context)
    assert (row.status, row.metric, row.samples) == (status, Metric.STEP, ())
    assert said in row.reasons[0]


def test_a_refusal_is_a_row_too(context: PointContext) -> None:
    row = measured(LLAMA + " kv=fp8_e5m2 dtype=fp32", "TORCH_MLA", context)
    assert (row.status, row.metric) == (Status.UNSUPPORTED, Metric.STEP)


def test_the_truth_is_kept_for_the_next_backend() -> None:
    truths = TruthCache()
    point = PlannedPoint(Workload.parse(LLAMA), "CPU_ATTN")
    first = truths.get_step(point, get_backend_class("CPU_ATTN"), CPU)
    again = truths.get_step(point, get_backend_class("TORCH_SDPA"), CPU)
    assert first is again
    plain = PlannedPoint(point.workload.attention, "CPU_ATTN")
    truths.get(plain, get_backend_class("CPU_ATTN"), CPU)
    assert truths.get_step(point, get_backend_class("CPU_ATTN"), CPU) is not first


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device here")
@pytest.mark.parametrize("timer", ["event", "graph"])
@pytest.mark.parametrize(
    ("text", "backend"),
    [
        ("8q1s1k layers=2 model=4096:14336:128256", "TRITON_ATTN"),
        (f"8q1s1k shape=deepseek-v3 tp=8 block=64 layers=3 model={V3_OF_8}", "TRITON_MLA"),
    ],
)
def test_a_step_is_right_and_timed_on_a_gpu(text: str, backend: str, timer: str) -> None:
    device = current_device()
    options = MeasureOptions(timer=timer)
    made_timer = make_timer(options)
    context = PointContext(
        run_id="20261121T000000Z-000000",
        replicate=0,
        device=device,
        environment=read_environment(device),
        options=options,
        timer=made_timer,
        timer_floor_s=made_timer.floor_s(),
        host_floor_s=made_timer.host.floor_s(),
        truths=TruthCache(),
    )
    row = measure_point(PlannedPoint(Workload.parse(text), backend), context)[0]
    assert row.metric == Metric.STEP
    assert row.status in (Status.OK, Status.NOISY), row.reasons
    assert row.l2_state == "cold"
    # Weights alone: no device reads them faster than 10 TB/s.
    assert min(row.samples) > step_bytes(Workload.parse(text)) / 10e12
