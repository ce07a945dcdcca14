"""One rendered site for all tests here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from attnbench.dashboard import render
from attnbench.history.runs import runs_of
from attnbench.history.verdict import judge
from attnbench.store.ceilings import Ceilings
from tests.history.fake import HOSTILE, history, table_of

MATRIX: list[dict[str, Any]] = [
    {
        "device": device,
        "dtype": dtype,
        "feature": feature,
        "head_size": 128,
        "kv_cache_dtype": "auto",
        "block_size": None,
        "backend": "none"
        if feature == "alibi"
        else "FLASH_ATTN"
        if device == "sm90"
        else "CPU_ATTN",
        "source": "platform chain",
        "note": "",
        "followed": "FLASHINFER",
        "refused": [f"FLASHINFER: {feature} not supported {HOSTILE}"],
    }
    for device in ("sm90", "cpu")
    for dtype in ("bf16", "fp32")
    for feature in ("none", "sinks", "alibi")
]


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the pages of the made-up history."""
    folder = tmp_path_factory.mktemp("site")
    table = table_of(history())
    runs = runs_of(table)
    rates = Ceilings(copy_bytes_per_s=1e10, matmul_flops_per_s={"fp32": 1e12, "bf16": 2e12})
    ceilings = {run.run_id: rates for run in runs}
    render(table, runs, judge(table), folder, matrix=MATRIX, ceilings=ceilings)
    return folder
