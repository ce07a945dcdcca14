"""Every kernel compiles for GPUs that are not here, fits them, and does not spill."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from triton.runtime.driver import driver

from attnbench.backends import triton_aot
from attnbench.backends.device import Device
from attnbench.backends.triton_aot import (
    FAILED,
    NOT_ON_TARGET,
    OK,
    TARGETS,
    AotRow,
    compile_report,
    format_report,
    main,
)
from attnbench.backends.triton_aot_cases import AOT_CASES, AotCase
from attnbench.backends.triton_attn import TritonAttentionBackend
from attnbench.backends.triton_launch import Launch, is_interpreted
from attnbench.backends.triton_mla import TritonMLABackend
from attnbench.errors import DeviceError, UsageError

compiles = pytest.mark.skipif(is_interpreted(), reason="TRITON_INTERPRET=1 excludes compiling")

KERNELS = {
    "attention_kernel",
    "merge_segments_kernel",
    "write_kv_kernel",
    "latent_attention_kernel",
    "write_latent_kernel",
}
#: Registers a kernel may spill on a target. Zero everywhere else.
SPILL_BOUNDS = {("latent_attention_kernel", "sm100"): 4}


@compiles
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", TARGETS)
def test_everything_the_backends_accept_compiles_and_fits(target: str) -> None:
    # One fp8 format stands for both where a target has both; below 8.9 there is only e5m2.
    formats = ["fp16", "bf16", "fp8_e4m3"]
    if target in ("sm75", "sm80"):
        formats.append("fp8_e5m2")
    rows = compile_report([target], formats, workers=1)
    assert {row.kernel for row in rows} == KERNELS
    for row in rows:
        assert row.status == OK or row.refusal, row
        if row.status == OK:
            assert 0 < row.registers <= 512, row
            assert row.shared_bytes <= row.shared_limit_bytes, row
            if not row.refusal:
                bound = SPILL_BOUNDS.get((row.kernel, target), 0)
                assert row.spilled_registers <= bound, row
    without_e4m3 = {row.kernel for row in rows if row.status == NOT_ON_TARGET}
    if target in ("sm75", "sm80"):
        assert without_e4m3 == KERNELS - {"merge_segments_kernel"}
    else:
        assert not without_e4m3
    used = {row.kernel for row in rows if row.shared_bytes}
    assert {"attention_kernel", "latent_attention_kernel"} <= used


@pytest.fixture
def sm90(monkeypatch: pytest.MonkeyPatch) -> Device:
    """Triton compiles for sm90 in this process, until the end of the test."""
    device = triton_aot.aot_device("sm90")
    monkeypatch.setattr(driver, "_active", triton_aot._AbsentDevice(device))
    return device


def compile_one(launch: Launch, device: Device) -> AotRow:
    job = triton_aot._Job(AOT_CASES[0], "sm90", "fp16")
    return triton_aot._compile_launch(job, launch, device, "")


@compiles
def test_a_launch_that_does_not_fit_its_kernel_fails(sm90: Device) -> None:
    launch = AOT_CASES[0].launches(sm90, "fp16")[-1]
    assert launch.kernel.__name__ == "write_kv_kernel"
    assert compile_one(launch, sm90).status == OK

    missing = dict(launch.arguments)
    del missing["slot_mapping_ptr"]
    row = compile_one(replace(launch, arguments=missing), sm90)
    assert row.status == FAILED
    assert "slot_mapping_ptr" in row.reason

    unknown = launch.arguments | {"slots": launch.arguments["slot_mapping_ptr"]}
    row = compile_one(replace(launch, arguments=unknown), sm90)
    assert (row.status, "slots" in row.reason) == (FAILED, True)

    no_pointer = launch.arguments | {"key_ptr": 3.5}
    assert compile_one(replace(launch, arguments=no_pointer), sm90).status == FAILED


@pytest.mark.parametrize("case", AOT_CASES, ids=lambda case: case.name)
def test_every_case_makes_launches_on_meta_tensors(case: AotCase) -> None:
    for target in ("sm75", "sm90", "gfx942"):
        launches = case.launches(triton_aot.aot_device(target), "fp16")
        tensors = [
            value
            for launch in launches
            for value in launch.arguments.values()
            if isinstance(value, torch.Tensor)
        ]
        assert tensors
        assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_a_decode_step_splits_its_contexts_and_a_prefill_does_not() -> None:
    decode, prefill = (
        case.launches(triton_aot.aot_device("sm90"), "fp16") for case in AOT_CASES[:2]
    )
    assert [launch.kernel.__name__ for launch in decode] == [
        "attention_kernel",
        "merge_segments_kernel",
        "write_kv_kernel",
    ]
    # 4 requests x 8 KV heads = 32 programs; 264 places on 132 multiprocessors: 8 segments.
    assert decode[0].grid == (4, 8, 8)
    # 2,048 tokens x 4 heads in tiles of 128 rows: 64 tiles, and none split.
    assert prefill[0].grid == (64, 8, 1)


def test_cases_say_what_the_backends_refuse() -> None:
    decode, _, latent = AOT_CASES[:3]
    assert decode.refusals(triton_aot.aot_device("sm80"), "fp8_e4m3") == [
        "fp8_e4m3 needs compute capability 8.9 in Triton; use fp8_e5m2"
    ]
    assert decode.refusals(triton_aot.aot_device("gfx942"), "fp8_e4m3") == []
    assert latent.refusals(triton_aot.aot_device("sm75"), "fp16") == [
        "compute capability not supported"
    ]


def test_unknown_targets_and_formats_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    if not is_interpreted():
        with pytest.raises(DeviceError, match="target 'cpu' is no GPU; write one of sm75"):
            compile_report(["cpu"])
        with pytest.raises(UsageError, match="number format 'int4': write one of fp16"):
            compile_report(["sm90"], ["int4"])
        assert main(["--targets", "sm9"]) == 2
        assert "target 'sm9'" in capsys.readouterr().err


ROWS = [
    AotRow(case="decode", kernel="k", target="sm90", number_format="bf16", status=OK, registers=99),
    AotRow(
        case="decode", kernel="k", target="sm75", number_format="bf16", status=FAILED, reason="x"
    ),
]


def test_reports_in_three_formats() -> None:
    table = format_report(ROWS, "table").splitlines()
    assert table[0].split()[:4] == ["case", "kernel", "target", "format"]
    assert table[1].split()[-1] == "ok"
    assert table[2].endswith("failed: x")
    markdown = format_report(ROWS, "markdown").splitlines()
    assert markdown[1].startswith("| --- |")
    assert len({line.count("|") for line in markdown}) == 1
    assert [row["registers"] for row in json.loads(format_report(ROWS, "json"))] == [99, 0]


def test_the_summary_has_a_column_a_target() -> None:
    sm75, sm90 = (
        AotRow(
            case="decode",
            kernel="k",
            target=target,
            number_format="bf16",
            status=OK,
            block_m=16,
            tile_n=64,
            num_warps=4,
            num_stages=5,
            registers=99,
            shared_bytes=2048,
        )
        for target in ("sm75", "sm90")
    )
    rows = [replace(sm75, refusal="too old"), replace(sm75, block_m=0), sm90, sm90]
    assert format_report(rows, "summary").splitlines() == [
        "| case | format | sm75 | sm90 |",
        "| --- | --- | --- | --- |",
        "| decode | bf16 | refused | 99 / 0 / 2: 16x64, 4w, 5s |",
        "| decode | bf16 |  | 99 / 0 / 2: 16x64, 4w, 5s |",
    ]


@pytest.mark.parametrize("backend", [TritonAttentionBackend, TritonMLABackend])
def test_on_a_cpu_it_needs_the_interpreter(
    backend: type[TritonAttentionBackend] | type[TritonMLABackend],
) -> None:
    cpu = Device("cpu")
    reason = backend.unavailable_reason(cpu)
    assert backend.interpreted_on_cpu
    assert (reason is None) == is_interpreted()
    if reason is not None:
        assert "TRITON_INTERPRET=1" in reason
