"""The text of a workload: a batch spec and `key=value` words, read and written.

The canonical text is the batch spec, then the keys that differ from their default in alphabetical
order, separated by single spaces. `docs/workloads.md` has the table of keys.

The attention shape is written as a name (`shape=`, with `tp=`; llama-3-8b is left out) or by
numbers (`heads=`, always written, with `head_size=`, `v_head_size=` or `mla=`); features that
differ from the named shape's, or from none, follow as `window=`, `softcap=`, `sinks=`, `alibi=`,
`layers=`. Numbers on top of a name are accepted; if they change its heads or widths, the result is
no longer that model: the name is dropped and the canonical text gives the numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from attnbench.errors import WorkloadError
from attnbench.workload.batch_spec import (
    EXAMPLE,
    GRAMMAR,
    MAX_TOKENS,
    format_batch_spec,
    parse_batch_spec,
)
from attnbench.workload.closest import did_you_mean
from attnbench.workload.lengths import EXPECTED as LENGTHS_EXPECTED
from attnbench.workload.lengths import normalise_lengths
from attnbench.workload.model import EXPECTED as MODEL_EXPECTED
from attnbench.workload.model import normalise_model
from attnbench.workload.shapes import DEFAULT_SHAPE, get_shape
from attnbench.workload.types import AttentionShape, AttentionType, WorkloadFields

_NUMBER = re.compile(r"([0-9]{1,19})(k?)")
_HEADS = re.compile(r"([0-9]{1,18})(?:/([0-9]{1,18}))?")
_MLA = re.compile(r"([0-9]{1,9})\+([0-9]{1,9}):([0-9]{1,9})\+([0-9]{1,9})")
_DECIMAL = re.compile(r"[0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?")

DTYPES = ("fp32", "fp16", "bf16")
#: DeepSeek-V3.2's sparse cache: 656 bytes a token.
DS_MLA = "fp8_ds_mla"
KV_CACHE_DTYPES = ("auto", "fp32", "fp16", "bf16", "fp8_e4m3", "fp8_e5m2", DS_MLA)
#: Which tokens a sparse query attends to: any it may see, its first ones, its last ones.
TOPK_PATTERNS = ("random", "prefix", "window")
LAYOUTS = ("NHD", "HND")
#: Other spellings people type: torch's names, and vLLM's `fp8`.
_DTYPE_SPELLINGS = {
    "float32": "fp32",
    "float16": "fp16",
    "half": "fp16",
    "bfloat16": "bf16",
    "fp8": "fp8_e4m3",
}
#: torch seeds are 64 bits, Parquet's integers are signed.
MAX_SEED = 2**63 - 1

#: Numbers of a shape that names no model.
_PLAIN = AttentionShape(num_heads=32, num_kv_heads=8, head_size=128, v_head_size=128)
_GEOMETRY = ("heads", "head_size", "v_head_size", "mla")


def _number(text: str, at_most: int = MAX_TOKENS) -> int:
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise ValueError
    number = int(match[1]) * (1024 if match[2] else 1)
    if number > at_most:
        raise ValueError
    return number


def _positive(text: str) -> int:
    number = _number(text)
    if number < 1:
        raise ValueError
    return number


def _decimal(text: str) -> float:
    if _DECIMAL.fullmatch(text) is None or (number := float(text)) == float("inf"):
        raise ValueError
    return number


def _flag(text: str) -> bool:
    return {"0": False, "1": True}[text]


def _heads(text: str) -> tuple[int, int | None]:
    match = _HEADS.fullmatch(text)
    if match is None:
        raise ValueError
    return _positive(match[1]), _positive(match[2]) if match[2] else None


def _mla(text: str) -> tuple[int, int, int, int]:
    match = _MLA.fullmatch(text)
    if match is None:
        raise ValueError
    lora, rope, nope, value = (_positive(group) for group in match.groups())
    return lora, rope, nope, value


def _topk(text: str) -> tuple[int, str]:
    count, _, pattern = text.partition(":")
    if pattern not in TOPK_PATTERNS:
        raise ValueError
    return _positive(count), pattern


def _one_of(*names: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        word = _DTYPE_SPELLINGS.get(text, text)
        if word not in names:
            raise ValueError
        return word

    return read


@dataclass(frozen=True, slots=True)
class Key:
    """One `key=value` of the text: how a value is read, and what to say when it cannot be."""

    name: str
    read: Callable[[str], Any]
    expected: str
    example: str


KEYS: Mapping[str, Key] = {
    key.name: key
    for key in (
        Key("alibi", _flag, "0 or 1", "1"),
        Key("attn", AttentionType, "one of " + ", ".join(AttentionType), "encoder_only"),
        Key("block", _positive, "tokens of one KV-cache block, 1 or more", "16"),
        Key("dtype", _one_of(*DTYPES), "one of " + ", ".join(DTYPES), "bf16"),
        Key("head_size", _positive, "the width of one head, 1 or more", "128"),
        Key("heads", _heads, "num_heads/num_kv_heads of one rank", "32/8"),
        Key("kv", _one_of(*KV_CACHE_DTYPES), "one of " + ", ".join(KV_CACHE_DTYPES), "fp8_e4m3"),
        Key("layers", _positive, "layers of this kind in the model, 1 or more", "32"),
        Key("layout", _one_of(*LAYOUTS), "NHD or HND", "HND"),
        Key("lengths", normalise_lengths, LENGTHS_EXPECTED, "uniform:0.5"),
        Key(
            "mla",
            _mla,
            "kv_lora_rank+qk_rope_head_dim:qk_nope_head_dim+v_head_dim",
            "512+64:128+128",
        ),
        Key(
            "model",
            normalise_model,
            f"{MODEL_EXPECTED}, the sizes of one rank of a model",
            "4096:14336:128256",
        ),
        Key("prefix", _number, "tokens that all requests share, 0 or more", "512"),
        Key("seed", lambda text: _number(text, MAX_SEED), f"0 to {MAX_SEED}", "7"),
        Key("shape", str, "a registered attention shape", "llama-3-70b"),
        Key("sinks", _flag, "0 or 1", "1"),
        Key("softcap", _decimal, "a number, 0 for none", "50"),
        Key(
            "topk",
            _topk,
            "COUNT:PATTERN, the cached tokens each query attends to, 1 or more, and which: "
            + ", ".join(TOPK_PATTERNS),
            "2048:random",
        ),
        Key("tp", _positive, "tensor-parallel ranks, 1 or more", "4"),
        Key("v_head_size", _positive, "the width of one value head, 1 or more", "128"),
        Key("window", _number, "tokens a query sees, 0 for all", "4096"),
    )
}


def parse_workload_text(text: str) -> dict[str, Any]:
    """The fields of `WorkloadFields` that `text` gives.

    Raises:
        WorkloadError: the text is not a workload; the message names the word and where it starts.
    """
    words = [(match.start() + 1, match[0]) for match in re.finditer(r"\S+", text)]
    if not words or "=" in words[0][1]:
        found = f"{text!r} starts with {words[0][1]!r}" if words else "the workload text is empty"
        raise WorkloadError(
            f"{found}; expected a batch spec {GRAMMAR} first, e.g. {EXAMPLE} dtype=fp32"
        )
    values: dict[str, Any] = {}
    for position, word in words[1:]:
        name, equals, value = word.partition("=")
        where = f"workload {text!r}: {word!r} (at character {position})"
        if not equals:
            raise WorkloadError(
                f"{where} is not key=value; write one batch spec (join segments with _), then "
                f"keys, e.g. {EXAMPLE} block=32"
            )
        if name not in KEYS:
            raise WorkloadError(f"{where}: unknown key {name!r}; {did_you_mean(name, KEYS)}")
        if name in values:
            raise WorkloadError(f"{where}: {name}= is given twice; leave one out")
        values[name] = _read_value(KEYS[name], value, where)
    fields: dict[str, Any] = {
        "batch_spec": parse_batch_spec(words[0][1]),
        "shape": _read_shape(values, text),
    }
    renamed = {
        "dtype": "dtype",
        "kv": "kv_cache_dtype",
        "block": "block_size",
        "layout": "kv_cache_layout",
        "attn": "attn_type",
        "prefix": "common_prefix_len",
        "lengths": "lengths",
        "seed": "seed",
        "model": "model",
    }
    if "topk" in values:
        fields["topk_tokens"], fields["topk_pattern"] = values["topk"]
    return fields | {renamed[key]: value for key, value in values.items() if key in renamed}


def _read_value(key: Key, value: str, where: str) -> Any:
    try:
        if not value:
            raise ValueError
        return key.read(value)
    except (ValueError, KeyError, WorkloadError):
        raise WorkloadError(
            f"{where}: expected {key.expected}, e.g. {key.name}={key.example}"
        ) from None


def _read_shape(values: Mapping[str, Any], text: str) -> AttentionShape:
    """The shape that the keys of one text describe."""
    by_numbers = any(key in values for key in _GEOMETRY)
    if "shape" not in values and by_numbers:
        if "tp" in values:
            raise WorkloadError(
                f"workload {text!r}: tp= needs a named shape, because heads= are those of one "
                "rank; leave tp= out or write shape=llama-3-70b tp=4"
            )
        shape = _PLAIN
    else:
        shape = get_shape(values.get("shape", DEFAULT_SHAPE), values.get("tp", 1))
    if by_numbers:
        numbers = _latent_numbers if shape.is_mla or "mla" in values else _head_numbers
        changed = replace(shape, **numbers(values, shape, text))
        if changed != shape:
            shape = replace(changed, name="", tensor_parallel_size=1, source="")
    features = {
        "window": "sliding_window",
        "softcap": "logits_soft_cap",
        "sinks": "has_sink",
        "alibi": "use_alibi",
        "layers": "num_layers",
    }
    return replace(shape, **{features[key]: values[key] for key in features if key in values})


def _head_numbers(values: Mapping[str, Any], shape: AttentionShape, text: str) -> dict[str, Any]:
    num_heads, num_kv_heads = values.get("heads", (shape.num_heads, shape.num_kv_heads))
    head_size = values.get("head_size", shape.head_size)
    same = shape.v_head_size == shape.head_size
    return {
        "num_heads": num_heads,
        "num_kv_heads": num_heads if num_kv_heads is None else num_kv_heads,
        "head_size": head_size,
        "v_head_size": values.get("v_head_size", head_size if same else shape.v_head_size),
    }


def _latent_numbers(values: Mapping[str, Any], shape: AttentionShape, text: str) -> dict[str, Any]:
    for key in ("head_size", "v_head_size"):
        if key in values:
            raise WorkloadError(
                f"workload {text!r}: {key}= has no meaning for MLA, whose widths are given by "
                "mla=; leave it out, e.g. heads=128/1 mla=512+64:128+128"
            )
    if "heads" not in values and not shape.is_mla:
        raise WorkloadError(
            f"workload {text!r}: mla= needs heads=, e.g. heads=128/1 mla=512+64:128+128"
        )
    num_heads, num_kv_heads = values.get("heads", (shape.num_heads, 1))
    if num_kv_heads not in (None, 1):
        raise WorkloadError(
            f"workload {text!r}: an MLA cache has one KV head; write heads={num_heads}/1"
        )
    lora, rope, nope, value = values.get(
        "mla",
        (shape.kv_lora_rank, shape.qk_rope_head_dim, shape.qk_nope_head_dim, shape.v_head_size),
    )
    return {
        "num_heads": num_heads,
        "num_kv_heads": 1,
        "head_size": lora + rope,
        "v_head_size": value,
        "kv_lora_rank": lora,
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope,
    }


def format_workload_text(workload: WorkloadFields) -> str:
    """The canonical text of a valid workload."""
    words = _shape_words(workload.shape)
    for key, value, default in (
        ("dtype", workload.dtype, "bf16"),
        ("kv", workload.kv_cache_dtype, "auto"),
        ("block", workload.block_size, 16),
        ("layout", workload.kv_cache_layout, "NHD"),
        ("attn", workload.attn_type, AttentionType.DECODER),
        ("prefix", workload.common_prefix_len, 0),
        ("lengths", workload.lengths, ""),
        ("seed", workload.seed, 0),
        ("topk", f"{workload.topk_tokens}:{workload.topk_pattern}", "0:"),
        ("model", workload.model, ""),
    ):
        if value != default:
            words[key] = str(value)
    keys = (f"{key}={words[key]}" for key in sorted(words))
    return " ".join((format_batch_spec(workload.batch_spec), *keys))


def _shape_words(shape: AttentionShape) -> dict[str, str]:
    words: dict[str, str] = {}
    base = _PLAIN
    if shape.name:
        base = get_shape(shape.name, shape.tensor_parallel_size)
        if shape.name != DEFAULT_SHAPE:
            words["shape"] = shape.name
        if shape.tensor_parallel_size != 1:
            words["tp"] = str(shape.tensor_parallel_size)
    else:
        words["heads"] = f"{shape.num_heads}/{shape.num_kv_heads}"
        if shape.is_mla:
            words["mla"] = (
                f"{shape.kv_lora_rank}+{shape.qk_rope_head_dim}"
                f":{shape.qk_nope_head_dim}+{shape.v_head_size}"
            )
        else:
            if shape.head_size != _PLAIN.head_size:
                words["head_size"] = str(shape.head_size)
            if shape.v_head_size != shape.head_size:
                words["v_head_size"] = str(shape.v_head_size)
    if shape.sliding_window != base.sliding_window:
        words["window"] = str(shape.sliding_window)
    if shape.logits_soft_cap != base.logits_soft_cap:
        words["softcap"] = repr(float(shape.logits_soft_cap)).removesuffix(".0")
    if shape.has_sink != base.has_sink:
        words["sinks"] = str(int(shape.has_sink))
    if shape.use_alibi != base.use_alibi:
        words["alibi"] = str(int(shape.use_alibi))
    if shape.num_layers != base.num_layers:
        words["layers"] = str(shape.num_layers)
    return words
