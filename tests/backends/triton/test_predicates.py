"""What the two Triton backends accept, where, and how large a point the interpreter may run."""

from __future__ import annotations

import pytest

from attnbench.backends.abstract import AttentionBackend
from attnbench.backends.device import Device, parse_device
from attnbench.backends.triton_attn import TritonAttentionBackend
from attnbench.backends.triton_mla import TritonMLABackend
from attnbench.workload import Workload
from tests.backends.running import config_of


def reasons(backend: type[AttentionBackend], text: str, device: str) -> list[str]:
    parsed = parse_device(device)
    assert parsed is not None
    return backend.validate_configuration(config_of(Workload.parse(text)), parsed)


@pytest.mark.parametrize("device", ["sm75", "sm80", "sm90", "sm120", "gfx942"])
@pytest.mark.parametrize(
    "text",
    [
        "2q1s4k",
        "2q1s4k heads=32/32 head_size=96 block=1 layout=HND",
        "2q1s4k heads=8/1 head_size=512 kv=fp8_e5m2",
        "2q1s4k window=100 softcap=30 sinks=1 alibi=1 dtype=fp16",
        "q100 attn=encoder heads=4/4 head_size=64 v_head_size=32 dtype=fp32",
        "q1s100 attn=encoder_decoder",
    ],
)
def test_attention_is_accepted_on_every_gpu(text: str, device: str) -> None:
    assert reasons(TritonAttentionBackend, text, device) == []


CPU_BF16 = "bf16 arithmetic is wrong in Triton's interpreter; use --dtype fp16 or fp32"
CPU_FP8 = "fp8 stores round wrongly in Triton's interpreter; use an unquantised KV cache"
NO_E4M3 = "fp8_e4m3 needs compute capability 8.9 in Triton; use fp8_e5m2"
MLA = "q1s100 shape=deepseek-v3"


@pytest.mark.parametrize(
    ("backend", "text", "device", "expected"),
    [
        (TritonAttentionBackend, "q1s100", "cpu", [CPU_BF16]),
        (TritonAttentionBackend, "q1s100 dtype=fp32 kv=bf16", "cpu", [CPU_BF16]),
        (TritonAttentionBackend, "q1s100 dtype=fp16 kv=fp8_e4m3", "cpu", [CPU_FP8]),
        (TritonAttentionBackend, "q1s100 dtype=fp16", "cpu", []),
        (TritonAttentionBackend, "q1s100 dtype=fp32", "cpu", []),
        (TritonAttentionBackend, "q1s100 kv=fp8_e4m3", "sm80", [NO_E4M3]),
        (TritonAttentionBackend, "q1s100 kv=fp8_e4m3", "sm89", []),
        (TritonAttentionBackend, "q1s100", "7.0", ["compute capability not supported"]),
        (
            TritonAttentionBackend,
            "q1s100 heads=4/4 head_size=16",
            "sm90",
            ["head_size not supported"],
        ),
        (TritonAttentionBackend, MLA, "sm90", ["head_size not supported", "MLA not supported"]),
        (TritonMLABackend, MLA, "sm90", []),
        (TritonMLABackend, MLA, "gfx942", []),
        (TritonMLABackend, f"{MLA} dtype=fp16", "cpu", []),
        (TritonMLABackend, MLA, "cpu", [CPU_BF16]),
        (TritonMLABackend, f"{MLA} kv=fp8_e4m3", "sm80", [NO_E4M3]),
        (TritonMLABackend, MLA, "sm75", ["compute capability not supported"]),
        (TritonMLABackend, "q1s100", "sm90", ["non-MLA not supported"]),
    ],
)
def test_refusals(
    backend: type[AttentionBackend], text: str, device: str, expected: list[str]
) -> None:
    assert reasons(backend, text, device) == expected


def test_other_platforms_are_refused() -> None:
    config = config_of(Workload.parse("q1s100"))
    found = TritonAttentionBackend.validate_configuration(config, Device("tpu"))
    assert found == ["device tpu not supported"]


@pytest.mark.parametrize(
    ("backend", "text", "refused"),
    [
        (TritonAttentionBackend, "8q1s4k", True),
        (TritonAttentionBackend, "q1s3k", False),
        (TritonAttentionBackend, "q1s4k", True),
        (TritonAttentionBackend, "q2k", True),
        (TritonAttentionBackend, "2q1s256", False),
        (TritonMLABackend, "q1s4k shape=deepseek-v3", False),
        (TritonMLABackend, "8q1s4k shape=deepseek-v3", True),
        (TritonMLABackend, "q1k shape=deepseek-v3", True),
        (TritonMLABackend, "q65 heads=4/1 mla=128+32:32+16", False),
    ],
)
def test_the_interpreter_refuses_what_takes_too_long(
    backend: type[AttentionBackend], text: str, refused: bool
) -> None:
    reason = backend.interpreter_refusal(Workload.parse(text))
    assert (reason is not None) == refused
    if reason is not None:
        assert "limit 200" in reason
