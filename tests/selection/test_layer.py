"""`Attention` and `MLAAttention` give the reference's output on whatever backend they got."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnbench.backends.batch import AttentionBatch, make_batch
from attnbench.backends.check import check_output
from attnbench.backends.kv_cache import allocate_kv_cache, fill_context
from attnbench.backends.reference import reference_attention
from attnbench.backends.registry import get_backend_class
from attnbench.errors import SelectionError, UsageError
from attnbench.selection import resolve_device
from attnbench.selection.layer import Attention, MLAAttention
from attnbench.workload import Workload

CPU = resolve_device("cpu")


def _attention(batch: AttentionBatch, backend: str | None) -> Attention:
    workload = batch.workload
    layer = Attention(
        workload.shape,
        dtype=batch.query.dtype,
        kv_cache_dtype=workload.kv_cache_dtype,
        block_size=workload.block_size,
        kv_cache_layout=workload.kv_cache_layout,
        attn_type=workload.attn_type,
        alibi_slopes=batch.alibi_slopes,
        sinks=batch.sinks,
        backend=backend,
        device=CPU,
    )
    layer.set_scales(k=batch.layer._k_scale_float, v=batch.layer._v_scale_float)
    return layer


def _check(batch: AttentionBatch, output: torch.Tensor) -> None:
    workload = batch.workload
    reference = reference_attention(batch)
    verdict = check_output(output, reference, workload.dtype, workload.resolved_kv_cache_dtype)
    assert verdict.ok, verdict.reason


WORKLOADS = [
    "2q5_3q1s33 heads=4/2 head_size=32 dtype=fp32",
    "2q3s20_2q1s17 heads=4/2 head_size=64 dtype=fp32 window=7 layout=HND",
    "2q4 heads=4/2 head_size=32 dtype=fp32 attn=encoder_only",
    "2q2s9 heads=4/2 head_size=32 dtype=fp32 attn=encoder_decoder",
]


@pytest.mark.parametrize("backend", ["TORCH_SDPA", "CPU_ATTN", None])
@pytest.mark.parametrize("text", WORKLOADS)
def test_attention_gives_the_reference(text: str, backend: str | None) -> None:
    batch = make_batch(Workload.parse(text))
    layer = _attention(batch, backend)
    if backend is not None:
        assert layer.selection.backend == backend
    cache = allocate_kv_cache(layer.backend, batch.spec, batch.num_blocks, batch.device)
    fill_context(batch, cache, layer.backend)
    metadata = layer.make_builder("cpu").build(0, batch.metadata)
    slots = batch.metadata.slot_mapping
    with torch.no_grad():
        output = layer(batch.query, batch.key, batch.value, cache, metadata, slots)
        _check(batch, output)
        given = torch.full_like(output, float("nan"))
        again = layer(batch.query, batch.key, batch.value, cache, metadata, slots, given)
    assert again is given
    torch.testing.assert_close(given, output)


def test_fp8_cache_is_read_with_the_layer_s_own_scales() -> None:
    text = "1q5_2q1s33 heads=4/2 head_size=32 dtype=fp32 kv=fp8_e4m3"
    batch = make_batch(Workload.parse(text))
    layer = _attention(batch, None)
    cache = allocate_kv_cache(layer.backend, batch.spec, batch.num_blocks, batch.device)
    fill_context(batch, cache, layer.backend)
    metadata = layer.make_builder("cpu").build(0, batch.metadata)
    slots = batch.metadata.slot_mapping
    with torch.no_grad():
        _check(batch, layer(batch.query, batch.key, batch.value, cache, metadata, slots))
    assert float(layer._k_scale) == batch.layer._k_scale_float != 1.0


@pytest.mark.parametrize(
    ("spec", "decode_tokens"),
    [
        ("2q40_3q1s21", 3),
        ("3q1s21", 3),
        ("2q40s52", 0),
        ("q40_q40s45_2q2s21_q1s9", 5),
        ("q40_3q1s21 topk=5:random", 43),
    ],
)
def test_mla_gives_the_reference(
    spec: str, decode_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = Workload.parse(f"{spec} mla=32+16:24+16 heads=4 dtype=fp32")
    backend = get_backend_class("TORCH_MLA")
    threshold = backend.get_builder_cls().reorder_batch_threshold
    batch = make_batch(workload, reorder_batch_threshold=threshold)
    layer = MLAAttention(
        workload.shape,
        batch.layer.W_UK,
        batch.layer.W_UV,
        dtype=batch.query.dtype,
        block_size=workload.block_size,
        device=CPU,
        use_sparse=workload.is_sparse,
    )
    assert layer.selection.backend == "TORCH_MLA"
    prefill: list[torch.Tensor] = []
    forward_mha = layer.impl.forward_mha

    def recorded(*args: Any) -> None:
        prefill.extend(args[1:4])
        forward_mha(*args)

    monkeypatch.setattr(layer.impl, "forward_mha", recorded)
    cache = allocate_kv_cache(layer.backend, batch.spec, batch.num_blocks, batch.device)
    fill_context(batch, cache, layer.backend)
    metadata = layer.make_builder("cpu").build(0, batch.metadata)
    slots = batch.metadata.slot_mapping
    with torch.no_grad():
        output = layer(batch.query, batch.kv_c_normed, batch.k_pe, cache, metadata, slots)
    _check(batch, output)
    # TORCH_MLA reads the new latents from the cache; a kernel that does not gets the right ones.
    split = metadata.num_decode_tokens
    assert split == decode_tokens  # both paths are taken, whatever the backend's threshold
    for got, whole in zip(prefill, (batch.query, batch.kv_c_normed, batch.k_pe), strict=False):
        assert torch.equal(got, whole[split:])
    assert bool(prefill) == (split < batch.query.shape[0])


def test_scales_and_weights_move_with_the_module() -> None:
    batch = make_batch(Workload.parse("1q2 heads=4/2 head_size=32 dtype=fp32"))
    layer = _attention(batch, "TORCH_SDPA")
    layer.set_scales(q=2.0, k=0.5, v=0.25)
    assert (layer._q_scale_float, layer._k_scale_float, layer._v_scale_float) == (2.0, 0.5, 0.25)
    assert {"_q_scale", "_k_scale", "_v_scale", "_prob_scale"} <= set(layer.state_dict())
    assert "TORCH_SDPA" in repr(layer)
    assert layer.to("meta")._k_scale.device.type == "meta"


def test_an_explicit_backend_that_refuses_fails() -> None:
    shape = Workload.parse("1q2 heads=4/2 head_size=32").shape
    with pytest.raises(SelectionError, match="FLASH_ATTN was asked for and refuses"):
        Attention(shape, dtype=torch.float32, backend="FLASH_ATTN", device=CPU)


def test_wrong_parts_say_which() -> None:
    plain = Workload.parse("1q2 heads=4/2 head_size=32").shape
    mla = Workload.parse("1q2 mla=32+16:24+16 heads=4").shape
    sinks = Workload.parse("1q2 heads=4/2 head_size=32 sinks=1").shape
    weight = torch.zeros(1)
    with pytest.raises(UsageError, match="use MLAAttention"):
        Attention(mla, dtype=torch.float32, device=CPU)
    with pytest.raises(UsageError, match="use Attention"):
        MLAAttention(plain, weight, weight, dtype=torch.float32, device=CPU)
    with pytest.raises(UsageError, match=r"needs sinks; pass a tensor of \(4,\)"):
        Attention(sinks, dtype=torch.float32, device=CPU, backend="CPU_ATTN")
    with pytest.raises(UsageError, match="sinks were given"):
        Attention(plain, dtype=torch.float32, device=CPU, sinks=torch.zeros(4))
    with pytest.raises(UsageError, match=r"W_UK has shape \(1,\)"):
        MLAAttention(mla, weight, weight, dtype=torch.float32, device=CPU)
