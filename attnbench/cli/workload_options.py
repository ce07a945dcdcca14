"""Features of a workload as options of a verb: `--dtype fp16` is `dtype=fp16` in its text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

ShapeOption = Annotated[str, typer.Option(help="Named attention shape, e.g. llama-3-8b.")]
DtypeOption = Annotated[str, typer.Option(help="fp32, fp16 or bf16.")]
KVCacheDtypeOption = Annotated[
    str, typer.Option(help="auto, fp32, fp16, bf16, fp8_e4m3, fp8_e5m2 or fp8_ds_mla.")
]
BlockSizeOption = Annotated[int, typer.Option(help="Tokens in a KV-cache block; 0: default.")]

#: Parameter of the verb -> key in the workload's text.
FEATURES = {"shape": "shape", "dtype": "dtype", "kv_cache_dtype": "kv", "block_size": "block"}


def workload_text(spec: list[str], params: Mapping[str, Any]) -> str:
    """`spec` and the features among a verb's `params`, as one text."""
    features = [f"{key}={params[name]}" for name, key in FEATURES.items() if params[name]]
    return " ".join([*spec, *features])
