"""The bridge against vLLM's own Python files, where somebody unpacked a wheel of it.

    ATTNBENCH_UNPACKED_VLLM=FOLDER[:FOLDER...] python -m pytest -ra \\
        tests/backends/vllm/test_unpacked.py

FOLDER holds `vllm` and `vllm-*.dist-info`. The packages that vLLM's modules import must be
installed (see docs/vllm.md); a GPU, its compiled extensions and its own version of torch need not
be.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.backends.vllm.unpacked import PACKAGES

FOLDERS = [f for f in os.environ.get("ATTNBENCH_UNPACKED_VLLM", "").split(":") if f]
MISSING = [name for name in PACKAGES if find_spec(name) is None]

pytestmark = [
    pytest.mark.skipif(
        not FOLDERS, reason="no unpacked vLLM: ATTNBENCH_UNPACKED_VLLM names none (docs/vllm.md)"
    ),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]

# float16: Triton's interpreter multiplies bfloat16 wrongly.
_PLAIN = "heads=4/2 head_size=64 dtype=fp16"
_MLA = "heads=2 mla=512+64:128+128 dtype=fp16"
_ENCODER = f"2q20_q9 {_PLAIN} attn=encoder_only"
_CROSS = f"2q1s50_q30s70 {_PLAIN} attn=encoder_decoder"
CASES = {
    "TRITON_ATTN": (
        f"3q1s70 {_PLAIN}",
        f"q40_2q1s33 {_PLAIN} block=32",
        f"q9s30_2q1s33 {_PLAIN} layout=HND window=12 sinks=1 softcap=20",
        f"2q1s40 {_PLAIN} alibi=1",
        f"2q1s40 {_PLAIN} kv=fp8_e4m3",
        f"{_ENCODER} window=7",
        _CROSS,
    ),
    "FLASH_ATTN": (
        f"3q1s70 {_PLAIN}",
        f"q9s30_2q1s33 {_PLAIN} layout=HND window=12 softcap=20",
        f"2q1s40 {_PLAIN} kv=fp8_e4m3",
        f"3q1s70 {_PLAIN} sinks=1",
        _ENCODER,
        _CROSS,
    ),
    "FLEX_ATTENTION": (f"3q1s70 {_PLAIN}", f"q9s30_2q1s33 {_PLAIN} window=12", _ENCODER),
    "TRITON_MLA": (f"3q1s70 {_MLA}", f"2q1s70 {_MLA} kv=fp8_e4m3", f"q20_2q1s40 {_MLA}"),
    "ROCM_ATTN": ("3q1s70 heads=4/2 head_size=128 dtype=fp16 layout=HND",),
}


def _outcomes(folder: str, name: str) -> dict[str, str]:
    process = subprocess.run(
        [sys.executable, "-m", "tests.backends.vllm.unpacked", folder, name, *CASES[name]],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "TORCHDYNAMO_DISABLE": "1",
            # Triton counts as usable without a driver.
            "CUDA_VISIBLE_DEVICES": "",
            "CUDA_HOME": "/nonexistent",
            "VLLM_HAS_FLASHINFER_CUBIN": "1",
            "VLLM_NO_USAGE_STATS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    rows = [json.loads(row) for row in process.stdout.splitlines() if row.startswith("{")]
    assert len(rows) == len(CASES[name]), process.stderr[-3000:]
    return {row["text"]: row["outcome"] for row in rows}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("folder", FOLDERS or ["none"])
def test_vllm_s_own_files_compute_the_reference(folder: str, name: str) -> None:
    expected = dict.fromkeys(CASES[name], "ok")
    if name == "ROCM_ATTN":
        expected = dict.fromkeys(
            CASES[name],
            "refused: it keeps keys in tiles of its own, which attnbench does not write; "
            "use VLLM:TRITON_ATTN or CPU_ATTN",
        )
    found = _outcomes(folder, name)
    is_0_22 = any(Path(folder).glob("vllm-0.2*.dist-info"))
    if name == "TRITON_ATTN" and is_0_22:
        # It masks cross attention as if it were causal (docs/vllm.md).
        assert found.pop(_CROSS).startswith("failed: error")
        del expected[_CROSS]
    assert found == expected
