"""Every torch backend against the float64 reference, over a table of workloads."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from attnbench.backends.abstract import AttentionBackend
from attnbench.backends.cpu_attn import CPUAttentionBackend
from attnbench.backends.device import Device, cuda_device
from attnbench.backends.dtypes import movable
from attnbench.backends.kv_cache import fill_context, write_new_tokens
from attnbench.backends.paged_ops import quantize
from attnbench.backends.torch_sdpa import TorchSDPABackend
from attnbench.errors import SelectionError
from attnbench.workload import Workload
from tests.backends.running import CPU, Run, config_of, formula_not_causal, refusals

BACKENDS = [TorchSDPABackend, CPUAttentionBackend]
SMALL = "dtype=fp32 heads=4/2 head_size=64"

WORKLOADS = {
    "decode": f"3q1s70 {SMALL}",
    "decode, first token": f"2q1 {SMALL}",
    "decode, ragged": f"q1s5_q1s130_q1s64_2q1s33 {SMALL}",
    "decode, one slot left": f"q1s63_q1s15_q1s16 {SMALL}",
    "decode, window from a block's second slot": f"q1s80 {SMALL} window=15",
    "decode, block 1": f"3q1s37 {SMALL} block=1",
    "decode, block 33": f"3q1s70 {SMALL} block=33",
    "decode, block 256": f"2q1s300 {SMALL} block=256",
    "decode, HND": f"3q1s70 {SMALL} layout=HND",
    "decode, MQA": "3q1s70 dtype=fp32 heads=4/1 head_size=64",
    "decode, MHA": "3q1s70 dtype=fp32 heads=3/3 head_size=64",
    "decode, head size 96": "2q1s50 dtype=fp32 heads=4/2 head_size=96",
    "decode, head size 128": "2q1s50 dtype=fp32 heads=4/2 head_size=128",
    "decode, narrow values": f"3q1s70 {SMALL} v_head_size=32",
    "decode, wide values": f"3q1s70 {SMALL} v_head_size=80",
    "decode, window": f"2q1s70_q1s9 {SMALL} window=20",
    "decode, soft cap": f"3q1s70 {SMALL} softcap=20",
    "decode, sinks": f"3q1s70 {SMALL} sinks=1",
    "decode, ALiBi": f"3q1s70 {SMALL} alibi=1",
    "decode, fp8": f"3q1s70 {SMALL} kv=fp8_e4m3",
    "decode, fp8 e5m2 HND": f"3q1s70 {SMALL} kv=fp8_e5m2 layout=HND",
    "decode, prefix": f"3q1s70 {SMALL} prefix=32",
    "decode, bf16": "3q1s70 heads=4/2 head_size=64",
    "decode, fp16": "3q1s70 heads=4/2 head_size=64 dtype=fp16",
    "decode, everything": f"q1s70_q1s200 {SMALL} window=50 softcap=20 sinks=1 alibi=1 layout=HND",
    "speculative": f"3q4s70 {SMALL}",
    "speculative, at a block's end": f"q2s64 {SMALL}",
    "speculative, window": f"3q4s70 {SMALL} window=9",
    "prefill": f"2q40 {SMALL}",
    "prefill, one": f"q150 {SMALL}",
    "prefill, window": f"2q50 {SMALL} window=11",
    "prefill, soft cap": f"2q40 {SMALL} softcap=20",
    "prefill, sinks": f"2q40 {SMALL} sinks=1",
    "prefill, ALiBi": f"2q40 {SMALL} alibi=1",
    "prefill, narrow values": f"2q40 {SMALL} v_head_size=32",
    "prefill, fp8": f"q40 {SMALL} kv=fp8_e4m3",
    "prefill, bf16": "2q40 heads=4/2 head_size=64",
    "extend": f"2q30s100 {SMALL}",
    "extend, block 33 HND": f"2q30s100 {SMALL} block=33 layout=HND",
    "extend, window": f"2q30s100 {SMALL} window=40",
    "extend, everything": f"q30s100 {SMALL} window=40 softcap=20 sinks=1 alibi=1",
    "mixed": f"q40_3q1s70_q20s60_q4s9 {SMALL}",
    "mixed, geometric": f"3q1s90_2q20s60 {SMALL} lengths=geometric",
    "encoder": f"2q40_q9 {SMALL} attn=encoder",
    "encoder, short": f"3q5_q1 {SMALL} attn=encoder",
    "encoder only, window": f"2q40 {SMALL} attn=encoder_only window=7",
    "encoder only, ALiBi, sinks": f"2q40 {SMALL} attn=encoder_only alibi=1 sinks=1",
    "cross": f"2q1s50_q30s70 {SMALL} attn=encoder_decoder",
}
REFUSED = {
    "TORCH_SDPA": {
        "sinks": "attention sinks not supported",
        "softcap": "logits soft cap not supported",
    },
}


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.get_name())
def test_right_or_refused(backend: type[AttentionBackend], name: str) -> None:
    text = WORKLOADS[name]
    expected = [r for word, r in REFUSED.get(backend.get_name(), {}).items() if f"{word}=" in text]
    assert refusals(backend, text) == expected
    if not expected:
        result = Run(backend, text).check()
        assert result.ok, result.reason


def test_every_reason_is_given() -> None:
    text = f"2q1s70 {SMALL} sinks=1 softcap=20"
    assert refusals(TorchSDPABackend, text) == [
        "attention sinks not supported",
        "logits soft cap not supported",
    ]
    assert refusals(CPUAttentionBackend, text) == []
    assert "MLA not supported" in refusals(CPUAttentionBackend, "2q1s70 shape=deepseek-v3")
    gpu = cuda_device(9, 0)
    assert CPUAttentionBackend.validate_configuration(config_of(Workload.parse(text)), gpu) == [
        "device cuda not supported"
    ]
    alibi = config_of(Workload.parse("2q1s70 heads=4/2 head_size=64 alibi=1"))
    assert TorchSDPABackend.validate_configuration(alibi, gpu) == [
        "ALiBi needs fp32 on this device: the bias would be rounded"
    ]


@pytest.mark.parametrize(
    "text",
    [
        f"3q1s200_q1s17 {SMALL}",
        f"2q3s200_q3s40 {SMALL} window=70 alibi=1 sinks=1",
        f"q90s200_q50 {SMALL}",
        f"q90s200_q50 {SMALL} window=30 layout=HND",
        f"q90s200 {SMALL} window=30 softcap=20 alibi=1 sinks=1",
        f"q90 {SMALL} attn=encoder window=20",
        f"q90s100 {SMALL} attn=encoder_decoder",
    ],
)
def test_cpu_attn_in_small_tiles(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """The same result when requests are cut into many splits, chunks and row tiles."""
    module = "attnbench.backends.cpu_attn"
    monkeypatch.setattr("attnbench.backends.split_kv.SPLIT_TOKENS", 32)
    monkeypatch.setattr(f"{module}_metadata._SPLIT_TILE_BYTES", 3 * 32 * 2 * 64 * 4)
    monkeypatch.setattr(f"{module}._PREFILL_CHUNK_BYTES", 27 * 2 * 64 * 4)
    monkeypatch.setattr(f"{module}._MASKED_TILE", 25)
    result = Run(CPUAttentionBackend, text).check()
    assert result.ok, result.reason


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.get_name())
@pytest.mark.parametrize("window", [0, 6])
def test_not_causal_over_the_cache(
    monkeypatch: pytest.MonkeyPatch, backend: type[AttentionBackend], window: int
) -> None:
    """`causal=False` (drafting, multimodal spans): the formula, on the batch's dense K and V."""
    monkeypatch.setattr("attnbench.backends.split_kv.SPLIT_TOKENS", 4)
    monkeypatch.setattr("attnbench.backends.cpu_attn_metadata._SPLIT_TILE_BYTES", 1)
    features = f"block=4 window={window}" if window else ""
    run = Run(backend, f"q12s40_q8s20_q1s9 {SMALL} {features}")
    run.metadata = run.builder.build(0, run.batch.metadata.replace(causal=False))
    output = run.attend()
    expected = formula_not_causal(run.batch, window)
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.get_name())
@pytest.mark.parametrize("features", ["", "layout=HND", "kv=fp8_e4m3", "v_head_size=32"])
def test_writes_its_slots_and_no_other(backend: type[AttentionBackend], features: str) -> None:
    text = f"q5s40_q1s17 {SMALL} {features}"
    run = Run(backend, text)
    batch, wanted = run.batch, Run(backend, text).kv_cache
    fill_context(batch, run.kv_cache, backend)
    fill_context(batch, wanted, backend)
    write_new_tokens(batch, wanted, backend)
    skipped = batch.metadata.slot_mapping.clone()
    skipped[1] = -1
    run.impl.do_kv_cache_update(batch.layer, batch.key, batch.value, run.kv_cache, skipped)
    same = (movable(run.kv_cache) == movable(wanted)) | (
        run.kv_cache.float().isnan() & wanted.float().isnan()
    )
    # (2, num_blocks, block_size): only the token that was skipped differs, in K and in V.
    different = (~same).any(-1).any(-1).nonzero().tolist()
    block, offset = divmod(int(batch.metadata.slot_mapping[1]), 16)
    assert different == [[0, block, offset], [1, block, offset]]


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.get_name())
def test_page_gather_is_a_part(backend: type[AttentionBackend]) -> None:
    run = Run(backend, f"q20s40_q1s17 {SMALL}")
    args = (run.batch.layer, run.batch.query, run.kv_cache, run.metadata)
    parts = run.impl.parts(*args)
    assert list(parts) == ["page_gather"]
    before = run.attend()
    parts["page_gather"]()
    assert torch.equal(run.attend(), before)
    encoder = Run(backend, f"q20 {SMALL} attn=encoder")
    assert (
        encoder.impl.parts(encoder.batch.layer, encoder.batch.query, encoder.kv_cache, None) == {}
    )


def test_fp8_saturates() -> None:
    assert quantize(torch.tensor([1e4, -1e4]), torch.float8_e4m3fn, 0.5).tolist() == [448.0, -448.0]


# --- variants of TORCH_SDPA ----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("variant", "op"),
    [("flash", "flash_attention_for_cpu"), ("math", "attention_math"), ("", "flash_attention")],
)
def test_a_variant_is_that_kernel(variant: str, op: str) -> None:
    run = Run(TorchSDPABackend, f"2q30s40 {SMALL}", variant)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = run.check()
    assert result.ok, result.reason
    assert any(op in event.key for event in profile.key_averages())


@pytest.mark.filterwarnings("ignore:Flash attention")
def test_a_variant_never_becomes_another_kernel() -> None:
    """torch's flash kernel wants values as wide as keys; only the math kernel takes these."""
    run = Run(TorchSDPABackend, f"2q30s40 {SMALL} v_head_size=32", "flash")
    with pytest.raises(SelectionError, match=r"TORCH_SDPA:flash has no kernel .* torch chooses"):
        run.attend()


SM75, SM80, SM90, MI300 = (
    cuda_device(7, 5),
    cuda_device(8, 0),
    cuda_device(9, 0),
    Device("rocm", "gfx942"),
)


@pytest.mark.parametrize(
    ("variant", "text", "device", "reason"),
    [
        ("flash", "q1s70 v_head_size=64", SM90, "needs values as wide as keys"),
        ("flash", "q1s70 v_head_size=64", CPU, "needs values as wide as keys"),
        ("flash", "q1s70 dtype=fp32 alibi=1", CPU, "takes no bias by head"),
        ("flash", "q1s70 dtype=fp32", SM90, "is fp16 or bf16"),
        ("flash", "q1s70 dtype=fp32", CPU, None),
        ("flash", "q1s70 head_size=256", SM90, None),
        ("flash", "q1s70 head_size=288", SM90, "takes heads of at most 256 numbers"),
        ("flash", "q1s70 head_size=512", MI300, None),
        ("flash", "q1s70 head_size=520", MI300, "takes heads of at most 512 numbers"),
        ("flash", "q1s70", SM75, "needs compute capability 8.0, sm75 has 7.5"),
        ("flash", "q1s70 window=9", SM90, None),
        ("cudnn", "q1s70", SM90, None),
        ("cudnn", "q1s70 dtype=fp32", SM90, "is fp16 or bf16"),
        ("cudnn", "q1s70 head_size=100", SM90, "takes heads of multiples of 8 numbers"),
        ("cudnn", "q1s70 v_head_size=100", SM90, "takes heads of multiples of 8 numbers"),
        ("cudnn", "q1s70 head_size=256", SM90, None),
        ("cudnn", "q1s70 head_size=256", SM80, "takes heads of at most 128 numbers here"),
        ("cudnn", "q1s70 v_head_size=264", SM90, "takes heads of at most 256 numbers here"),
        ("cudnn", "q1s70", SM75, "needs compute capability 8.0, sm75 has 7.5"),
        ("efficient", "q1s70 v_head_size=64", SM80, None),
        (
            "efficient",
            "q1s70 head_size=100",
            SM80,
            "takes heads of multiples of 8 numbers in this dtype",
        ),
        ("efficient", "q1s70 head_size=100 dtype=fp32", SM80, None),
        (
            "efficient",
            "q1s70 head_size=98 dtype=fp32",
            SM80,
            "takes heads of multiples of 4 numbers in this dtype",
        ),
        ("efficient", "q1s70", MI300, "takes as many KV heads as query heads on ROCm"),
        ("efficient", "q1s70 heads=8/8", MI300, None),
        ("efficient", "q1s70", SM75, "needs compute capability 8.0, sm75 has 7.5"),
        ("efficient", "q1s70 dtype=fp16", SM75, None),
        ("math", "q1s70 head_size=98 v_head_size=600 dtype=fp32 alibi=1", SM75, None),
        ("", "q1s70 v_head_size=64", SM90, None),
    ],
)
def test_what_each_kernel_refuses(
    variant: str, text: str, device: Device, reason: str | None
) -> None:
    config = config_of(Workload.parse(text))
    expected = reason and f"torch's {variant} kernel {reason}; ask for TORCH_SDPA:math"
    assert TorchSDPABackend.variant_refusal(variant, config, device) == expected


@pytest.mark.parametrize(
    ("variant", "spec", "reason"),
    [
        ("flash", "2q30s40", "takes no mask, and 30 new tokens over 40 keys need one"),
        ("flash", "3q1s70_q4s70", "takes no mask, and 4 new tokens over 70 keys need one"),
        ("flash", "2q50 window=11", "takes no mask, and 50 new tokens over 50 keys need one"),
        ("flash", "3q1s70_2q40", None),
        ("flash", "3q1s70 window=11", None),
        ("cudnn", "q1_q1s70", "takes two keys at least, and a request of this batch has one"),
        ("cudnn", "q1s70 window=1", "takes two keys at least, and a request of this batch has one"),
        ("cudnn", "2q30s40", None),
        ("efficient", "2q30s40_q1", None),
        ("math", "2q30s40_q1", None),
        ("", "2q30s40_q1", None),
    ],
)
def test_a_batch_that_a_gpu_kernel_cannot_serve_is_refused_when_it_is_built(
    variant: str, spec: str, reason: str | None
) -> None:
    run = Run(TorchSDPABackend, f"{spec} {SMALL}")
    builder: Any = run.builder
    builder.variant = variant
    run.builder.build(0, run.batch.metadata)  # the CPU's kernels have no such rule
    builder.on_cpu = False
    if reason is None:
        run.builder.build(0, run.batch.metadata)
        return
    with pytest.raises(SelectionError, match=f"^TORCH_SDPA:{variant} {reason}; use --backend"):
        run.builder.build(0, run.batch.metadata)


@pytest.mark.parametrize("variant", ["flash", "cudnn", "efficient", "math"])
def test_a_call_of_a_variant_allows_torch_that_kernel_alone(
    monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    """Whatever torch would choose otherwise: the one asked for, or an error."""
    allowed: list[dict[str, bool]] = []

    def seen(query: torch.Tensor, *_: torch.Tensor, **__: object) -> torch.Tensor:
        enabled: Any = torch.backends.cuda
        allowed.append(
            {
                "flash": enabled.flash_sdp_enabled(),
                "cudnn": enabled.cudnn_sdp_enabled(),
                "efficient": enabled.mem_efficient_sdp_enabled(),
                "math": enabled.math_sdp_enabled(),
            }
        )
        return torch.zeros_like(query)

    monkeypatch.setattr("attnbench.backends.torch_sdpa.scaled_dot_product_attention", seen)
    Run(TorchSDPABackend, f"2q30s40_3q1s70 {SMALL}", variant).attend()
    assert len(allowed) == 2
    assert all({name for name, on in state.items() if on} == {variant} for state in allowed)


def test_kernels_that_are_promised() -> None:
    kernels = {
        (SM90, "flash"): "void pytorch_flash::flash_fwd_splitkv_kernel<...>",
        (SM90, "cudnn"): "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16",
        (SM90, "efficient"): "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(...)",
        (SM90, "math"): "void at::native::softmax_warp_forward<...>",
        (MI300, "flash"): "attn_fwd.kd",
        (MI300, "efficient"): "attn_fwd.kd",
        (MI300, "math"): "void at::native::cunn_SoftMaxForward<...>",
    }
    for (device, variant), name in kernels.items():
        for other in TorchSDPABackend.get_variants(device):
            (*patterns,) = TorchSDPABackend.kernel_patterns(other, device)
            shared = device == MI300 and {variant, other} == {"flash", "efficient"}
            expected = bool(other) and (variant == other or shared)
            assert any(re.search(pattern, name) for pattern in patterns) == expected
    assert TorchSDPABackend.kernel_patterns("flash", CPU) == ()


def test_variants_by_device() -> None:
    assert TorchSDPABackend.get_variants(Device("cpu")) == ("", "flash", "math")
    assert "cudnn" in TorchSDPABackend.get_variants(cuda_device(9, 0))
    assert "cudnn" not in TorchSDPABackend.get_variants(Device("rocm", "gfx942"))
