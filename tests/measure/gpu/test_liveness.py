"""A point whose kernels are not those its variant promises has no time.

The impl computes on the CPU and launches kernels of given names on the simulated device.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from attnbench.backends.cpu_attn import CPUAttentionBackend, CPUAttentionImpl
from attnbench.backends.device import Device, cuda_device
from attnbench.backends.registry import get_backend_class
from attnbench.backends.triton_aot_cases import AOT_CASES, AotCase
from attnbench.measure.environment import read_environment
from attnbench.measure.plan import PlannedPoint
from attnbench.measure.point import RowMaker, other_kernels
from attnbench.measure.timers import FakeTimer
from attnbench.store.record import Measurement, Status
from attnbench.workload import Workload
from tests.measure.gpu.simulated import SimulatedGpu
from tests.measure.gpu.test_gpu_point import measured

SM90 = cuda_device(9, 0)

#: Names as CUPTI gives them, from the symbols of vLLM 0.22.1's wheel and from others' profiles.
FA2 = "void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4, false>, false, true>"
FA2_SPLIT = "void flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<128, 64, 128, 4, false>>"
FA2_COMBINE = "void flash::flash_fwd_splitkv_combine_kernel<Flash_fwd_kernel_traits<128, 64>>"
FA3 = (
    "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<"
    "flash::CollectiveMainloopFwdSm90<2, cute::tuple<cute::C<1> > > > > >"
)
FA3_COMBINE = "void cutlass::device_kernel<flash::FlashAttnFwdCombine<cute::tuple<cute::C<16> > > >"
TORCH_FLASH = "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4>>"
TORCH_SPLIT = "void pytorch_flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<128, 64>>"
EFFICIENT = "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel)"
CUDNN = "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1"
SOFTMAX = "void (anonymous namespace)::softmax_warp_forward<float, float, float, 10, false>"
GEMM = "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64"
COPY = "void at::native::elementwise_kernel<128, 4, copy_kernel>"


@pytest.fixture
def launching(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make CPU_ATTN promise `patterns`, and launch `names` on `gpu`."""
    forward = CPUAttentionImpl.forward

    def install(gpu: SimulatedGpu, names: tuple[str, ...], patterns: tuple[str, ...]) -> None:
        def both(self: CPUAttentionImpl, *args: torch.Tensor) -> torch.Tensor:
            gpu.kernel(names[0], 20e-6, effect=lambda: forward(self, *args))  # type: ignore[arg-type]
            for name in names[1:]:
                gpu.kernel(name, 5e-6)
            return args[6]

        monkeypatch.setattr(CPUAttentionImpl, "forward", both)
        monkeypatch.setattr(CPUAttentionBackend, "kernel_patterns", lambda *_: patterns)

    return install


def row_of(gpu: SimulatedGpu, timer: str) -> Measurement:
    return measured(gpu, timer, ("hot",))[0]


@pytest.mark.parametrize("timer", ["graph", "cupti_span", "cupti_sum"])
def test_a_fallback_is_a_failed_point_that_names_both(
    timer: str, launching: Callable[..., None]
) -> None:
    gpu = SimulatedGpu()
    launching(gpu, ("generic_attention", "merge"), ("^fast_attention$",))
    rows = measured(gpu, timer, ("hot",))
    assert [row.status for row in rows] == [Status.ERROR]
    assert rows[0].samples == ()
    assert rows[0].kernel_names == ("generic_attention", "merge")
    (reason,) = rows[0].reasons
    assert reason == (
        "CPU_ATTN promises a kernel named like ^fast_attention$; it launched generic_attention, "
        "merge: a fallback, whose time is not this variant's"
    )
    # What it computed was right, and stays known.
    assert rows[0].rel_error is not None


@pytest.mark.parametrize("timer", ["graph", "cupti_span"])
@pytest.mark.parametrize(
    "patterns", [(), ("^fast",), ("no_such", "^merge$")], ids=["nothing", "one", "either"]
)
def test_a_promise_that_is_kept_costs_nothing(
    timer: str, patterns: tuple[str, ...], launching: Callable[..., None]
) -> None:
    gpu = SimulatedGpu()
    launching(gpu, ("fast_attention<128>", "merge"), patterns)
    row = row_of(gpu, timer)
    assert row.status == Status.OK, row.reasons
    assert row.kernel_names == ("fast_attention<128>", "merge")


def test_where_no_timer_saw_names_nothing_is_judged(launching: Callable[..., None]) -> None:
    gpu = SimulatedGpu()
    launching(gpu, ("generic_attention",), ("^fast_attention$",))
    assert row_of(gpu, "event").status == Status.OK
    blind = SimulatedGpu(trace_missing="no CUPTI")
    launching(blind, ("generic_attention",), ("^fast_attention$",))
    assert row_of(blind, "graph").status == Status.OK


def _row(backend: str, variant: str, names: tuple[str, ...]) -> Measurement:
    planned = PlannedPoint(Workload.parse("q1s40"), backend, variant)
    maker = RowMaker(planned, "run", 0, read_environment(Device("cpu")), FakeTimer())
    return maker.row(Status.OK, kernel_names=names)


def row_with(names: tuple[str, ...]) -> Measurement:
    """A row whose timer saw these kernels."""
    return _row("CPU_ATTN", "", names)


#: Variant -> lists of kernels it may launch; every other list below is a fallback.
KERNELS: dict[tuple[str, str], list[tuple[str, ...]]] = {
    ("FLASH_ATTN", "FA2"): [(FA2,), (FA2_SPLIT, FA2_COMBINE)],
    ("FLASH_ATTN", "FA3"): [(FA3,), (FA3, FA3_COMBINE)],
    ("TORCH_SDPA", "flash"): [(COPY, TORCH_FLASH), (COPY, TORCH_SPLIT)],
    ("TORCH_SDPA", "efficient"): [(COPY, EFFICIENT)],
    ("TORCH_SDPA", "cudnn"): [(COPY, CUDNN)],
    ("TORCH_SDPA", "math"): [(COPY, GEMM, SOFTMAX, GEMM)],
    ("TRITON_ATTN", ""): [("attention_kernel",), ("attention_kernel", "merge_segments_kernel")],
    ("TRITON_MLA", ""): [("latent_attention_kernel", "merge_segments_kernel")],
}
SAME = {("FLASH_ATTN", "FA3_UPSTREAM"): "FA3", ("FLASH_ATTN", "FA2_UPSTREAM"): "FA2"}


@pytest.mark.parametrize(("backend", "variant"), [*KERNELS, *SAME])
def test_a_variant_knows_its_kernels_from_all_others(backend: str, variant: str) -> None:
    patterns = get_backend_class(backend).kernel_patterns(variant, SM90)
    assert patterns
    mine = (backend, SAME.get((backend, variant), variant))
    for other, launched in KERNELS.items():
        if (mine[0], other[0]) == ("TRITON_MLA", "TRITON_ATTN"):
            continue  # prefills of MLA run the same kernel
        for names in launched:
            reason = other_kernels(patterns, _row(backend, variant, names))
            assert bool(reason) == (other != mine), (other, names, reason)
    helpers = (COPY, FA2_COMBINE, FA3_COMBINE, "merge_segments_kernel", GEMM)
    assert other_kernels(patterns, _row(backend, variant, helpers))


def test_what_promises_nothing_is_believed() -> None:
    for backend, variant in (("TORCH_SDPA", ""), ("CPU_ATTN", ""), ("TORCH_MLA", "")):
        assert get_backend_class(backend).kernel_patterns(variant, SM90) == ()


@pytest.mark.parametrize("case", AOT_CASES, ids=lambda case: case.name)
def test_our_triton_backends_launch_what_they_promise(case: AotCase) -> None:
    workload = Workload.parse(case.workload)
    backend = "TRITON_MLA" if workload.shape.is_mla else "TRITON_ATTN"
    names = tuple(launch.kernel.__name__ for launch in case.launches(SM90, "bf16"))
    patterns = get_backend_class(backend).kernel_patterns("", SM90)
    assert other_kernels(patterns, _row(backend, "", names)) == ""


def test_every_group_of_a_promise_must_be_kept(
    launching: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of both phases: decode's kernel alone is not the variant."""
    backend = get_backend_class("CPU_ATTN")
    promised = (("^decode",), ("^prefill", "^extend"))
    monkeypatch.setattr(backend, "promised_kernels", classmethod(lambda *_: promised))
    for names, status in (
        (("decode<1>", "merge"), Status.ERROR),
        (("prefill<1>",), Status.ERROR),
        (("extend<1>", "decode<1>"), Status.OK),
    ):
        gpu = SimulatedGpu()
        launching(gpu, names, ())
        assert row_of(gpu, "graph").status == status, names
