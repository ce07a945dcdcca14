"""A trace of one request at a time, and constant times of the batches that stand for it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnbench.store.record import Measurement
from tests.choose.fake import timed

TOKENS = 11
REQUESTS = 300
STEP_S = 0.064
"""All layers: 2 ms each."""
EVERY = ("--representatives", "24", "--rest", "none")
RESULTS = Path("results")


def write_day(folder: Path, num_requests: int = REQUESTS, gap_s: float = 1.0) -> Path:
    """`day.csv`: a request every `gap_s`, of `TOKENS` new tokens each."""
    path = folder / "day.csv"
    lines = [f"{i * gap_s:g},{100 + 37 * (i * 7 % 100)},{TOKENS}" for i in range(num_requests)]
    path.write_text("\n".join(["arrival_s,input_tokens,output_tokens", *lines]), encoding="utf-8")
    return path


def constant(
    who: tuple[str, str], batches: Sequence[str], layer_s: Sequence[float], **more: Any
) -> list[Measurement]:
    more = {"timer": "fake", **more}
    return [row for text in batches for row in timed(who, layer_s, text, **more)]


def rows_of(out: str) -> dict[str, dict[str, Any]]:
    return {row["backend"]: row for row in json.loads(out)["backends"]}
