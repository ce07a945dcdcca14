"""The attention layers of a model, from its Hugging Face `config.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attnbench.errors import UsageError
from attnbench.upgrade.cells import Cell, MLADims, cell_of_shape
from attnbench.workload import get_shape, shape_names
from attnbench.workload.closest import did_you_mean

_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def cells_of_model(
    text: str,
    *,
    tensor_parallel_size: int = 1,
    kv_cache_dtype: str = "auto",
    block_size: int | None = None,
) -> tuple[Cell, ...]:
    """One cell for each kind of attention layer of a model.

    Args:
        text: a registered shape's name (`attnbench.workload.shape_names()`), or the path of a
            `config.json` or of the folder that holds it.

    Raises:
        UsageError: neither, or a config that describes no attention layer.
    """
    changes: dict[str, Any] = {"kv_cache_dtype": kv_cache_dtype, "block_size": block_size}
    if text in shape_names():
        return tuple(
            cell_of_shape(get_shape(name, tensor_parallel_size), **changes)
            for name in (text, f"{text}-local")
            if name in shape_names()
        )
    path = Path(text).expanduser()
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise UsageError(
            f"unknown model {text!r}; {did_you_mean(text, shape_names())}, or the path of a "
            "model's config.json"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not a readable config.json: {error}") from error
    if not isinstance(config, dict):
        raise UsageError(f"{path} is not a model's config.json: it holds no object")
    return _cells_of_config(config, path, tensor_parallel_size, changes)


def _cells_of_config(
    config: Mapping[str, Any], path: Path, ranks: int, changes: Mapping[str, Any]
) -> tuple[Cell, ...]:
    text = config.get("text_config") or config
    name = str(config.get("_name_or_path") or path.parent.name or path.stem)
    num_heads = _number(text, "num_attention_heads", path)
    num_kv_heads = int(text.get("num_key_value_heads") or num_heads)
    if num_heads % ranks:
        raise UsageError(f"tp={ranks} does not divide the {num_heads} heads of {path}")
    values: dict[str, Any] = {
        "model": name,
        "hf_config": config,
        "dtype": _dtype(config, text),
        "num_heads": num_heads // ranks,
        "num_kv_heads": max(1, num_kv_heads // ranks),
        "softcap": bool(text.get("attn_logit_softcapping")),
        "alibi": bool(text.get("alibi") or (text.get("attn_config") or {}).get("alibi"))
        or text.get("model_type") == "bloom",
        "sinks": text.get("model_type") == "gpt_oss",
        **changes,
    }
    if text.get("kv_lora_rank"):
        dims = MLADims(
            **{
                key: _number(text, key, path)
                for key in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
            }
        )
        values |= {"mla": dims, "head_size": dims.head_size, "num_kv_heads": 1}
        return (Cell(**values, topk=int(text.get("index_topk") or 0)),)
    head_size = int(text.get("head_dim") or _number(text, "hidden_size", path) // num_heads)
    window = int(text.get("sliding_window") or 0)
    if text.get("use_sliding_window") is False:
        window = 0
    kinds = _layer_kinds(text, window)
    global_head_size = int(text.get("global_head_dim") or head_size)
    head_sizes = {"full_attention": global_head_size, "sliding_attention": head_size}
    values["layer_head_sizes"] = tuple(head_sizes.get(kind, head_size) for kind in kinds)
    cells = [
        Cell(
            **values,
            head_size=head_sizes.get(kind, head_size),
            sliding_window=window if kind == "sliding_attention" else 0,
        )
        for kind in dict.fromkeys(kinds)
        if kind in head_sizes
    ]
    if not cells:
        raise UsageError(f"{path} names no layer of full or sliding attention")
    return tuple(dict.fromkeys(cells))


def _layer_kinds(text: Mapping[str, Any], window: int) -> list[str]:
    """The kind of each layer, in the words of `layer_types`, whatever way the config says it."""
    kinds = text.get("layer_types")
    if kinds:
        return [str(kind) for kind in kinds]
    num_layers = int(text.get("num_hidden_layers") or 1)
    every = text.get("sliding_window_pattern")
    if window and every:
        return [
            "full_attention" if (layer + 1) % int(every) == 0 else "sliding_attention"
            for layer in range(num_layers)
        ]
    return ["sliding_attention" if window else "full_attention"] * num_layers


def _number(text: Mapping[str, Any], key: str, path: Path) -> int:
    value = text.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UsageError(f"{path} has no valid {key} (found {value!r})")
    return value


def _dtype(config: Mapping[str, Any], text: Mapping[str, Any]) -> str:
    name = str(
        text.get("dtype") or text.get("torch_dtype") or config.get("torch_dtype") or "bfloat16"
    )
    # vLLM's `auto` turns a float32 checkpoint into bfloat16.
    return "bf16" if name == "float32" else _DTYPES.get(name, "bf16")


def num_layers_of(cell: Cell) -> int:
    """How many layers of its model are this cell's; 1 for a cell of no model."""
    if cell.model in shape_names():
        return get_shape(cell.model).num_layers
    config = cell.hf_config
    if config is None:
        return 1
    text = config.get("text_config") or config
    if cell.mla is not None:
        return int(text.get("num_hidden_layers") or 1)
    window = int(text.get("sliding_window") or 0)
    if text.get("use_sliding_window") is False:
        window = 0
    kind = "sliding_attention" if cell.sliding_window else "full_attention"
    return max(1, _layer_kinds(text, window).count(kind))


def softcap_of(cell: Cell) -> float:
    """The soft cap of a cell's logits, 0.0 for none; Gemma 2's where a cell names no model."""
    if not cell.softcap:
        return 0.0
    config = cell.hf_config or {}
    text = config.get("text_config") or config
    return float(text.get("attn_logit_softcapping") or 50.0)
