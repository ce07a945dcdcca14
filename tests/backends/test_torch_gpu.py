"""TORCH_SDPA's kernels and FLEX_ATTENTION on a GPU, each over the same list of workloads."""

from __future__ import annotations

import re

import pytest
import torch

from attnbench.backends.abstract import AttentionBackend
from attnbench.backends.device import Device
from attnbench.backends.flex_attention import FlexAttentionBackend
from attnbench.backends.registry import backend_status
from attnbench.backends.torch_sdpa import TorchSDPABackend
from attnbench.errors import SelectionError
from attnbench.selection import current_device
from attnbench.workload import Workload
from tests.backends.running import Run, config_of
from tests.backends.test_torch_backends import WORKLOADS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
    # torch says why a kernel does not serve a batch, and its compiler uses what it deprecates.
    pytest.mark.filterwarnings("ignore"),
]
#: Sizes where tiles and masks matter, in the formats GPU kernels are for.
GPU_WORKLOADS = {
    "decode": "4q1s4k",
    "decode, one": "q1s1k",
    "decode, many": "256q1s600",
    "decode, ragged": "q1s5_q1s4k_q1s777_q1",
    "decode, MHA": "4q1s1k heads=8/8",
    "decode, fp16": "4q1s1k dtype=fp16",
    "decode, head size 256": "4q1s1k heads=8/4 head_size=256",
    "decode, fp8": "4q1s1k kv=fp8_e4m3",
    "decode, block 64": "4q1s4k block=64",
    "decode, window": "4q1s4k window=500",
    "speculative": "4q4s2k",
    "prefill": "2q2k",
    "prefill, ragged": "q1500_q77_q2000",
    "prefill, window": "q2k window=300",
    "extend": "2q600s3k",
    "mixed": "16q1s2k_q1k_q600s3k",
    "mixed, block 64": "16q1s2k_q1k_q600s3k block=64",
}
SDPA_VARIANTS = ("", "flash", "cudnn", "efficient", "math")
TABLES = {"small": WORKLOADS, "large": GPU_WORKLOADS}
POINTS = [
    pytest.param(backend, variant, text, id=f"{backend.get_name()}:{variant} {size} {name}")
    for backend, variants in ((TorchSDPABackend, SDPA_VARIANTS), (FlexAttentionBackend, ("",)))
    for variant in variants
    for size, texts in TABLES.items()
    for name, text in texts.items()
]


def run_or_skip(backend: type[AttentionBackend], variant: str, text: str) -> Run:
    """The workload on a variant; skips with the refusal."""
    device: Device = current_device()
    if variant not in backend.get_variants(device):
        pytest.skip(f"no {variant} on {device}")
    config = config_of(Workload.parse(text))
    reasons = backend.validate_configuration(config, device)
    if refusal := backend.variant_refusal(variant, config, device):
        reasons.append(refusal)
    if missing := backend_status(backend.get_name(), device, variant):
        reasons.append(missing)
    if reasons:
        pytest.skip("; ".join(reasons))
    try:
        return Run(backend, text, variant, "cuda")
    except SelectionError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("backend", "variant", "text"), POINTS)
def test_output_equals_the_reference(
    backend: type[AttentionBackend], variant: str, text: str
) -> None:
    run = run_or_skip(backend, variant, text)
    try:
        check = run.check()
    except SelectionError as error:
        # An older cuDNN or AOTriton than the rules' newest: said, and never another kernel.
        pytest.skip(str(error))
    assert check.ok, check.reason


@pytest.mark.parametrize(
    ("backend", "variant"),
    [(TorchSDPABackend, variant) for variant in SDPA_VARIANTS[1:]] + [(FlexAttentionBackend, "")],
)
def test_it_launches_the_kernels_it_promises(backend: type[AttentionBackend], variant: str) -> None:
    for text in ("4q1s1k heads=8/8", "2q512 heads=8/8"):
        run = run_or_skip(backend, variant, text)
        run.attend()
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            run.attend()
            torch.cuda.synchronize()
        names = [event.key for event in profile.key_averages()]
        patterns = backend.kernel_patterns(variant, current_device())
        assert patterns
        assert any(re.search(pattern, name) for pattern in patterns for name in names), names
