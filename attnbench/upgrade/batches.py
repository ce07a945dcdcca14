"""The user's mix of batches, and what attnbench measures for a cell on one side of an upgrade."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attnbench.errors import UsageError, WorkloadError
from attnbench.upgrade.cells import Cell
from attnbench.upgrade.models import softcap_of
from attnbench.workload import AttentionShape, Workload, get_shape, shape_names
from attnbench.workload.ranges import expand_ranges

_WEIGHTED = re.compile(r"([0-9]+(?:\.[0-9]+)?)\*(.+)", re.DOTALL)
_KEYS = ("lengths", "prefix", "seed")
_KV_DTYPES = {
    "auto": "auto",
    "float16": "fp16",
    "bfloat16": "bf16",
    "fp8": "fp8_e4m3",
    "fp8_e4m3": "fp8_e4m3",
    "fp8_e5m2": "fp8_e5m2",
    "fp8_ds_mla": "fp8_ds_mla",
}
_HND = ("HND", "LBHNC")
"""One layout by the names of 0.2x and of 0.30 and later: heads before tokens within a block."""

_NOT_MEASURED = ("mm_prefix", "batch_invariant")
"""Features of a cell that no workload has."""


@dataclass(frozen=True, slots=True)
class BatchShare:
    """A batch and its part in the mix: how many of the engine's steps look like it, relatively."""

    workload: Workload
    weight: float

    @property
    def text(self) -> str:
        """The words of `workload` that are the batch's."""
        words = self.workload.text.split()
        return " ".join([words[0], *(w for w in words[1:] if w.partition("=")[0] in _KEYS)])


class UnmeasurableError(Exception):
    """No workload stands for this cell and batch; the text says why."""


def parse_batches(texts: Sequence[str]) -> tuple[BatchShare, ...]:
    """Read `32q1s4k`, `0.7*32q1s4k` and braces; each text of a brace has the weight before it.

    Raises:
        UsageError: no batch, no weight, or words that the model decides.
    """
    shares: dict[str, BatchShare] = {}
    for text in texts:
        match = _WEIGHTED.fullmatch(text.strip())
        weight, batch = (float(match[1]), match[2]) if match else (1.0, text)
        if not 0 < weight < math.inf:
            raise UsageError(f"--batch {text!r}: a weight is above 0, e.g. 0.7*32q1s4k")
        for one in expand_ranges(batch):
            share = BatchShare(Workload.parse(one), weight)
            if share.text != share.workload.text:
                raise UsageError(
                    f"--batch {text!r}: the model says what a layer is; give requests and "
                    f"{', '.join(f'{key}=' for key in _KEYS)} only, e.g. 0.7*32q1s4k"
                )
            before = shares.get(share.text)
            total = weight + (before.weight if before else 0.0)
            shares[share.text] = BatchShare(share.workload, total)
    return tuple(shares.values())


def workload_of(cell: Cell, share: BatchShare, behind: Mapping[str, Any] | None = None) -> Workload:
    """The workload of a cell under a batch; `behind` (of a `CellAnswer`) says what a cache is like.

    Raises UnmeasurableError.
    """
    behind = behind or {}
    for name in _NOT_MEASURED:
        if getattr(cell, name):
            raise UnmeasurableError(f"attnbench has no workload with {name}")
    if cell.dcp != 1 or cell.pcp != 1:
        raise UnmeasurableError("attnbench has no workload with context parallelism")
    kv = str(behind.get("effective_kv_cache_dtype", cell.kv_cache_dtype))
    if kv not in _KV_DTYPES:
        raise UnmeasurableError(f"attnbench has no workload with kv={kv}")
    block = cell.block_size or int(behind.get("preferred_block_size") or (64 if cell.mla else 16))
    first_layout = str(behind.get("kv_cache_layout") or "").partition(",")[0]
    changes: dict[str, Any] = {
        "shape": shape_of(cell),
        "dtype": cell.dtype,
        "kv_cache_dtype": _KV_DTYPES[kv],
        "block_size": block,
        "kv_cache_layout": "HND" if first_layout in _HND and cell.mla is None else "NHD",
        "attn_type": cell.attn_type,
        "topk_tokens": cell.topk,
        "topk_pattern": "random" if cell.topk else "",
    }
    try:
        return share.workload.replace(**changes)
    except WorkloadError as error:
        raise UnmeasurableError(str(error)) from error


def shape_of(cell: Cell) -> AttentionShape:
    """The cell's layer: by the name of its model where it is a registered one."""
    if cell.model in shape_names():
        for ranks in (1, 2, 4, 8, 16, 32, 64):
            try:
                named = get_shape(cell.model, ranks)
            except WorkloadError:
                break
            if (named.num_heads, named.num_kv_heads) == (cell.num_heads, cell.num_kv_heads):
                return named
    return AttentionShape(
        num_heads=cell.num_heads,
        num_kv_heads=1 if cell.mla else cell.num_kv_heads,
        head_size=cell.head_size,
        v_head_size=cell.mla.v_head_dim if cell.mla else cell.head_size,
        sliding_window=cell.sliding_window,
        logits_soft_cap=softcap_of(cell),
        has_sink=cell.sinks,
        use_alibi=cell.alibi,
        kv_lora_rank=cell.mla.kv_lora_rank if cell.mla else 0,
        qk_nope_head_dim=cell.mla.qk_nope_head_dim if cell.mla else 0,
        qk_rope_head_dim=cell.mla.qk_rope_head_dim if cell.mla else 0,
    )
