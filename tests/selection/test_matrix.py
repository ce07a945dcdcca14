"""The matrix's cells against hand rules."""

from __future__ import annotations

import pytest

from attnbench.errors import UsageError
from attnbench.selection import resolve_device
from attnbench.selection.matrix import DTYPES, FEATURES, Cell, default_devices, matrix


def _cells(device: str, dtype: str = "bf16") -> dict[str, Cell]:
    return {cell.feature: cell for cell in matrix([resolve_device(device)], [dtype])}


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        # By hand from the priority lists and the capability table of vLLM 0.22.1.
        ("sm75", {"none": "FLASHINFER", "head 96": "TRITON_ATTN", "sinks": "TRITON_ATTN"}),
        ("sm80", {"none": "FLASH_ATTN", "fp8 KV": "FLASHINFER", "sinks": "TRITON_ATTN"}),
        ("sm89", {"none": "FLASH_ATTN", "fp8 KV": "FLASHINFER", "MLA": "TRITON_MLA"}),
        (
            "sm90",
            {
                "none": "FLASH_ATTN",
                "head 96": "FLASH_ATTN",
                "fp8 KV": "FLASH_ATTN",
                "sinks": "FLASH_ATTN",
                "fp8_e5m2 KV": "FLASHINFER",
                "MLA": "FLASH_ATTN_MLA",
                "MLA fp8 KV": "FLASHMLA",
                "MLA sparse": "FLASHMLA_SPARSE",
            },
        ),
        (
            "sm100",
            {
                "none": "FLASHINFER",
                "head 96": "FLASH_ATTN",
                "encoder": "FLASH_ATTN",
                "sinks": "FLASHINFER",
                "block 128": "FLASHINFER",
                "MLA": "FLASHINFER_MLA",
                "non-causal": "FLASH_ATTN",
                "MLA sparse": "FLASHMLA_SPARSE",
            },
        ),
        ("sm120", {"none": "FLASH_ATTN", "sinks": "TRITON_ATTN", "MLA": "TRITON_MLA"}),
        (
            "gfx942",
            {
                "none": "ROCM_ATTN",
                "sinks": "ROCM_AITER_UNIFIED_ATTN",
                "MLA": "TRITON_MLA",
                "encoder-decoder": "ROCM_AITER_UNIFIED_ATTN",
                "fp8_e5m2 KV": "ROCM_ATTN",
            },
        ),
    ],
)
def test_what_the_followed_version_takes(device: str, expected: dict[str, str]) -> None:
    cells = _cells(device, "fp16" if device == "sm75" else "bf16")
    assert {feature: cells[feature].followed for feature in expected} == expected


def test_cells_say_why_better_ranked_backends_were_refused() -> None:
    cell = _cells("sm80")["sinks"]
    assert cell.backend == "TRITON_ATTN"
    assert cell.source == "platform chain"
    assert cell.refused == (
        "FLASH_ATTN: attention sinks not supported, sink not supported on compute capability < 9.0",
        "FLASHINFER: attention sinks not supported",
    )
    assert cell.head_size == 64
    assert _cells("sm90")["none"].note == "FA3"
    assert _cells("sm90")["alibi"].note == "FA2"


def test_a_cell_without_a_backend_has_every_candidate_s_refusal() -> None:
    cell = _cells("cpu")["multimodal prefix"]
    assert cell.backend == ""
    assert cell.row()["backend"] == "none"
    assert {line.partition(":")[0] for line in cell.refused} >= {"TORCH_MLA", "TORCH_SDPA"}


def test_cpu_row() -> None:
    cells = _cells("cpu", "fp32")
    assert cells["MLA sparse"].backend == "TORCH_MLA"
    assert cells["none"].backend == "CPU_ATTN"
    assert cells["none"].followed == "CPU_ATTN"
    assert cells["MLA"].followed == ""


def test_the_whole_matrix_is_every_combination() -> None:
    cells = list(matrix())
    devices = default_devices()
    assert len(cells) == len(devices) * len(DTYPES) * len(FEATURES)
    assert {str(d) for d in devices} >= {
        *("sm75", "sm80", "sm86", "sm89", "sm90", "sm100", "sm120"),
        *("gfx942", "xpu", "cpu"),
    }
    keys = [(cell.device, cell.dtype, cell.feature) for cell in cells]
    assert len(set(keys)) == len(keys)
    assert all(cell.backend or cell.refused for cell in cells)


def test_unknown_words_say_what_is_known() -> None:
    with pytest.raises(UsageError, match=r"unknown feature 'sink'.*sinks"):
        list(matrix(features=["sink"]))
    with pytest.raises(UsageError, match=r"unknown dtype 'fp8'.*fp16"):
        list(matrix(dtypes=["fp8"]))
