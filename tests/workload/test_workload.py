"""Workloads as text: round trips, golden ids, and what wrong text is answered."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from dataclasses import replace

import pytest
from hypothesis import given, settings

from attnbench.errors import WorkloadError
from attnbench.store import record
from attnbench.workload import AttentionType, BatchSpec, Phase, Workload, get_shape
from attnbench.workload.identity import short_hash
from attnbench.workload.text import KEYS
from attnbench.workload.types import WorkloadFields
from tests.workload.strategies import workloads


@given(workloads())
@settings(deadline=None, max_examples=400)
def test_text_round_trips(workload: Workload) -> None:
    parsed = Workload.parse(workload.text)
    assert parsed == workload
    assert parsed.text == workload.text
    assert parsed.id == workload.id


@given(workloads(), workloads())
@settings(deadline=None)
def test_one_text_per_value(one: Workload, other: Workload) -> None:
    assert (one == other) == (one.text == other.text)
    assert (one == other) == (one.id == other.id)


@given(workloads())
@settings(deadline=None)
def test_canonical_text_is_sorted_words(workload: Workload) -> None:
    keys = [word.partition("=")[0] for word in workload.text.split(" ")[1:]]
    assert keys == sorted(set(keys))
    assert set(keys) <= set(KEYS)


@given(workloads())
@settings(deadline=None)
def test_survives_a_process_boundary(workload: Workload) -> None:
    assert pickle.loads(pickle.dumps(workload)) == workload
    assert copy.deepcopy(workload).text == workload.text
    assert hash(copy.copy(workload)) == hash(workload)


# Ids identify stored rows for ever. A field that is added later is left out of the text at its
# default, so it changes no text and no id here; if one of these changes, old results lose their
# history: mend the code, not the test.
GOLDEN_IDS = {
    "8q1s4k": "7cb9a336855ff7e2",
    "q2k": "722475b09f45fa78",
    "2q2k_32q1s1k": "55bae2b7748dd31a",
    "8q1s4k dtype=fp32": "cf149033d9b74f9b",
    "8q1s4k kv=fp8_e4m3": "604217a74fd6fd4a",
    "8q1s4k block=64 layout=HND": "0e753b983c2b67cd",
    "16q1s4k shape=llama-3-70b tp=8": "e6c4413cc358c9cd",
    "8q1s4k shape=gemma-3-27b-local": "a892cab51d100aad",
    "8q1s4k shape=gpt-oss-20b window=0": "da420df070b3fe77",
    "8q1s4k shape=llama-3-8b window=4096": "e7153ce46d6ca56c",
    "4q1s1k head_size=96 heads=32/32": "481b40036341e400",
    "4q1s1k heads=8/2 v_head_size=64": "095f2aaddb1858d7",
    "4q1s1k heads=16/1 layers=27 mla=512+64:128+128": "ddff1fb9248bd8a6",
    "32q1s8k shape=deepseek-v3 tp=8": "93a52fb20dba4a17",
    "8q1s8k prefix=512": "cdcbfbc7fbda56a7",
    "8q1s8k lengths=geometric seed=7": "f5fbffe4dbbedc78",
    "8q1s8k lengths=uniform:0.5": "0da439ff6a68265f",
    "4q512 attn=encoder_only heads=16/16": "a2f9c4d194ff7ddb",
    "q2k alibi=1 sinks=1 softcap=30.5": "246644d66a4577e6",
    "8q1s4k shape=deepseek-v3 topk=64:random": "e77c8d039e7de44a",
    "32q1s8k block=64 kv=fp8_ds_mla shape=deepseek-v3.2 topk=2048:window tp=8": "9a370c4f1687f3e0",
}


@pytest.mark.parametrize("text", GOLDEN_IDS)
def test_ids_are_golden(text: str) -> None:
    assert Workload.parse(text).id == GOLDEN_IDS[text]


def test_ids_are_made_as_the_record_makes_them() -> None:
    assert Workload.parse("8q1s4096").id == record.workload_id("8q1s4k")
    assert record.short_hash("a", "bc") == short_hash("a", "bc") != short_hash("ab", "c")


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("8q1s4096", "8q1s4k"),
        ("  8q1s4k \t block=16  dtype=bf16 ", "8q1s4k"),
        ("8q1s4k shape=llama-3-8b tp=1 seed=0 prefix=0 window=0 softcap=0 alibi=0", "8q1s4k"),
        ("8q1s4k window=4k tp=2", "8q1s4k tp=2 window=4096"),
        ("8q1s4k dtype=float16 kv=half", "8q1s4k dtype=fp16"),
        ("8q1s4k kv=bf16", "8q1s4k"),
        ("8q1s4k kv=fp8", "8q1s4k kv=fp8_e4m3"),
        ("8q1s4k softcap=50.0", "8q1s4k softcap=50"),
        ("8q1s4k attn=decoder layout=NHD lengths=uniform:.5", "8q1s4k lengths=uniform:0.5"),
        # Numbers that change nothing keep the name; others drop it and are written out.
        ("8q1s4k shape=llama-3-8b heads=32/8 head_size=128", "8q1s4k"),
        ("8q1s4k heads=32/8", "8q1s4k heads=32/8"),
        ("8q1s4k heads=16", "8q1s4k heads=16/16"),
        ("8q1s4k head_size=64", "8q1s4k head_size=64 heads=32/8"),
        ("8q1s4k shape=llama-3-8b head_size=64", "8q1s4k head_size=64 heads=32/8 layers=32"),
        (
            "8q1s4k shape=llama-3-70b tp=8 head_size=64",
            "8q1s4k head_size=64 heads=8/1 layers=80",
        ),
        (
            "8q1s4k shape=gpt-oss-20b heads=32/4",
            "8q1s4k head_size=64 heads=32/4 layers=12 sinks=1",
        ),
        ("8q1s4k v_head_size=64", "8q1s4k heads=32/8 v_head_size=64"),
        (
            "8q1s4k shape=gemma-2-9b softcap=0 window=1k",
            "8q1s4k shape=gemma-2-9b softcap=0 window=1024",
        ),
        ("8q1s4k heads=128 mla=512+64:128+128", "8q1s4k heads=128/1 mla=512+64:128+128"),
        (
            "8q1s4k tp=8 topk=2k:prefix shape=deepseek-v3.2",
            "8q1s4k shape=deepseek-v3.2 topk=2048:prefix tp=8",
        ),
        (
            "8q1s4k shape=deepseek-v2-lite heads=32",
            "8q1s4k heads=32/1 layers=27 mla=512+64:128+128",
        ),
        (
            "8q1s4k shape=deepseek-v2-lite mla=256+64:128+128",
            "8q1s4k heads=16/1 layers=27 mla=256+64:128+128",
        ),
    ],
)
def test_canonical_text(text: str, canonical: str) -> None:
    workload = Workload.parse(text)
    assert workload.text == canonical
    assert Workload.parse(canonical) == workload


def test_default_is_llama_3_8b_in_bf16() -> None:
    workload = Workload.parse("8q1s4k")
    assert workload.shape == get_shape("llama-3-8b")
    assert (workload.dtype, workload.kv_cache_dtype, workload.block_size) == ("bf16", "auto", 16)
    assert workload.resolved_kv_cache_dtype == "bf16"
    assert (workload.phase, workload.num_reqs, workload.num_tokens) == (Phase.DECODE, 8, 8)
    assert workload.causal


def test_numbers_by_hand() -> None:
    workload = Workload.parse(
        "q4s20_2q3 alibi=1 attn=encoder_decoder block=4 dtype=fp16 head_size=96 heads=6/3 "
        "kv=fp8_e5m2 layers=5 layout=HND seed=9 sinks=1 softcap=2.5 v_head_size=32"
    )
    shape = workload.shape
    assert (shape.num_heads, shape.num_kv_heads, shape.head_size, shape.v_head_size) == (
        6,
        3,
        96,
        32,
    )
    assert (shape.use_alibi, shape.has_sink, shape.logits_soft_cap, shape.num_layers) == (
        True,
        True,
        2.5,
        5,
    )
    assert (shape.name, shape.tensor_parallel_size, shape.sliding_window) == ("", 1, 0)
    assert workload.attn_type is AttentionType.ENCODER_DECODER
    assert not workload.causal
    assert (workload.block_size, workload.kv_cache_layout, workload.seed) == (4, "HND", 9)
    assert (workload.dtype, workload.resolved_kv_cache_dtype) == ("fp16", "fp8_e5m2")
    assert (workload.num_reqs, workload.num_tokens, workload.phase) == (3, 10, Phase.MIXED)


def test_mla_numbers_by_hand() -> None:
    shape = Workload.parse("q1s8 heads=4 mla=32+8:16+24").shape
    assert (shape.num_heads, shape.num_kv_heads, shape.head_size, shape.v_head_size) == (
        4,
        1,
        40,
        24,
    )
    assert (shape.kv_lora_rank, shape.qk_rope_head_dim, shape.qk_nope_head_dim) == (32, 8, 16)
    assert shape.qk_head_dim == 24


@given(workloads())
@settings(deadline=None)
def test_columns_are_the_identity_columns_of_the_record(workload: Workload) -> None:
    columns = workload.columns()
    made_elsewhere = {"run_id", "point_id", "replicate", "backend", "variant", "suite"}
    identity = list(record.COLUMNS[: record.COLUMNS.index("metric")])
    assert set(columns) == set(identity) - made_elsewhere
    types = {f.name: f.type for f in dataclasses.fields(record.Measurement)}
    for name, value in columns.items():
        assert type(value).__name__ == types[name], name
    assert columns["workload"] == workload.text
    assert columns["workload_id"] == workload.id
    assert columns["kv_cache_dtype"] != "auto"
    assert columns["num_reqs"] == len(workload.requests)
    assert columns["num_tokens"] == sum(r.query_len for r in workload.requests)


def test_every_field_is_in_the_text() -> None:
    """A field that no key can write would make two workloads one."""
    fields = {f.name for f in dataclasses.fields(WorkloadFields)} - {"batch_spec", "shape"}
    changed = Workload.parse(
        "8q1s4k attn=encoder_decoder block=32 dtype=fp32 kv=bf16 layout=HND lengths=geometric "
        "prefix=32 seed=1"
    )
    default = Workload.parse("8q1s4k")
    sparse = Workload.parse("8q1s4k shape=deepseek-v3 topk=64:window")
    assert {
        name
        for name in fields
        if getattr(changed, name) != getattr(default, name)
        or name.startswith("topk")
        or name == "model"
    } == fields
    assert (sparse.topk_tokens, sparse.topk_pattern, sparse.is_sparse) == (64, "window", True)
    assert not default.is_sparse
    assert Workload.parse("8q1s4k model=64:128:512").model == "64:128:512"


def test_replace_checks_again() -> None:
    workload = Workload.parse("8q1s4k")
    assert workload.replace(dtype="fp32").text == "8q1s4k dtype=fp32"
    with pytest.raises(WorkloadError, match="block=0"):
        workload.replace(block_size=0)
    shape = replace(workload.shape, num_heads=16)
    with pytest.raises(WorkloadError, match='set name=""'):
        workload.replace(shape=shape)
    assert workload.replace(shape=replace(shape, name="")).text == "8q1s4k heads=16/8 layers=32"
    with pytest.raises(WorkloadError, match="at least one request"):
        workload.replace(batch_spec=BatchSpec(()))


# text, what the message must contain: the input, what was expected, an example or the mend
BAD = [
    ("", ["empty", "batch spec", "e.g. 8q1s4k"]),
    ("dtype=fp32", ["starts with 'dtype=fp32'", "batch spec", "first", "e.g. 8q1s4k dtype=fp32"]),
    ("8q1s4k q2k", ["'q2k' (at character 8)", "is not key=value", "join segments with _"]),
    ("8q1s4k dtyp=fp32", ["(at character 8)", "unknown key 'dtyp'", "did you mean dtype"]),
    ("8q1s4k zz=1", ["unknown key 'zz'", "choose one of", "window"]),
    ("8q1s4k block=16 block=32", ["block= is given twice", "(at character 17)"]),
    ("8q1x4k", ["unexpected 'x'", "[count]q<query_len>"]),
    ("8q1s4k dtype=fp64", ["'dtype=fp64'", "fp32, fp16, bf16", "e.g. dtype=bf16"]),
    ("8q1s4k kv=int8", ["fp8_e4m3", "e.g. kv="]),
    ("8q1s4k block=0", ["1 or more", "e.g. block=16"]),
    ("8q1s4k block=-4", ["1 or more"]),
    ("8q1s4k block=", ["e.g. block=16"]),
    ("8q1s4k block=1.5", ["e.g. block=16"]),
    ("8q1s4k block=99999999999999999999999", ["e.g. block=16"]),
    ("8q1s4k layout=hnd", ["NHD or HND", "e.g. layout=HND"]),
    ("8q1s4k window=x", ["0 for all", "e.g. window=4096"]),
    ("8q1s4k softcap=-1", ["0 for none", "e.g. softcap=50"]),
    ("8q1s4k softcap=nan", ["e.g. softcap=50"]),
    ("8q1s4k softcap=1e999", ["e.g. softcap=50"]),
    ("8q1s4k sinks=yes", ["0 or 1", "e.g. sinks=1"]),
    ("8q1s4k alibi=2", ["0 or 1", "e.g. alibi=1"]),
    ("8q1s4k attn=cross", ["decoder, encoder, encoder_only, encoder_decoder"]),
    ("8q1s4k lengths=normal", ["geometric or uniform:J", "e.g. lengths=uniform:0.5"]),
    ("8q1s4k lengths=uniform:2", ["geometric or uniform:J"]),
    ("8q1s4k seed=-1", ["e.g. seed=7"]),
    ("q1s9 shape=deepseek-v3 topk=64", ["COUNT:PATTERN", "random, prefix, window", "2048:random"]),
    ("q1s9 shape=deepseek-v3 topk=64:sliding", ["random, prefix, window", "e.g. topk=2048:random"]),
    ("q1s9 shape=deepseek-v3 topk=0:random", ["1 or more", "e.g. topk=2048:random"]),
    ("q1s9 shape=deepseek-v3 topk=-3:random", ["1 or more"]),
    ("q1s9 shape=deepseek-v3 topk=random", ["COUNT:PATTERN"]),
    ("q1s9 topk=64:random", ["topk=64:random", "shape=deepseek-v3.2", "leave topk= out"]),
    ("q1s9 shape=deepseek-v3 topk=64:prefix window=8", ["topk=8:window", "leave window= out"]),
    ("q1s9 kv=fp8_ds_mla", ["512+64", "shape=deepseek-v3.2", "kv=fp8_e4m3"]),
    ("q1s9 kv=fp8_ds_mla shape=deepseek-v3 dtype=fp16", ["kv=fp8_ds_mla", "dtype=bf16"]),
    ("q1s9 kv=fp8_ds_mla heads=2 mla=256+64:8+8", ["512+64"]),
    ("8q1s4k seed=9223372036854775808", ["0 to 9223372036854775807"]),
    ("8q1s4k heads=32x8", ["num_heads/num_kv_heads", "e.g. heads=32/8"]),
    ("8q1s4k heads=32/5", ["num_kv_heads must divide num_heads", "e.g. heads=32/8"]),
    ("8q1s4k heads=0/0", ["e.g. heads=32/8"]),
    ("8q1s4k mla=512", ["kv_lora_rank+qk_rope_head_dim", "e.g. mla=512+64:128+128"]),
    ("8q1s4k mla=512+64:128+128", ["mla= needs heads=", "e.g. heads=128/1"]),
    ("8q1s4k heads=8/2 mla=512+64:128+128", ["one KV head", "write heads=8/1"]),
    ("8q1s4k head_size=64 heads=8 mla=512+64:128+128", ["head_size= has no meaning for MLA"]),
    ("8q1s4k shape=deepseek-v3 v_head_size=64", ["v_head_size= has no meaning for MLA"]),
    ("8q1s4k layout=HND shape=deepseek-v3", ["no head dimension", "leave layout= out"]),
    ("8q1s4k attn=encoder_decoder shape=deepseek-v3", ["MLA is decoder", "leave attn= out"]),
    ("8q1s4k attn=encoder", ["its own tokens", "write q1 without s4096"]),
    ("8q1s4k attn=encoder_decoder window=64", ["no meaning", "write window=0"]),
    ("8q1s4k shape=lama", ["unknown attention shape 'lama'", "did you mean"]),
    ("8q1s4k shape=", ["a registered attention shape", "e.g. shape=llama-3-70b"]),
    ("8q1s4k tp=3", ["tp=3 does not divide the 32 heads", "1, 2, 4"]),
    ("8q1s4k heads=8/2 tp=2", ["tp= needs a named shape", "shape=llama-3-70b tp=4"]),
    ("8q1s4k prefix=8k", ["prefix=8192", "4095 tokens", "shorter prefix"]),
    ("q1k prefix=16", ["prefix=16", "(0 tokens"]),
    ("8q1s4k prefix=100", ["whole blocks of 16", "prefix=96 or prefix=112"]),
]


@pytest.mark.parametrize(("text", "parts"), BAD)
def test_error_messages(text: str, parts: list[str]) -> None:
    with pytest.raises(WorkloadError) as caught:
        Workload.parse(text)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"dtype": "fp8"}, ["dtype=fp8", "fp32, fp16, bf16"]),
        ({"kv_cache_dtype": "int4"}, ["kv=int4", "fp8_e4m3"]),
        ({"kv_cache_layout": "DHN"}, ["layout=DHN", "NHD, HND"]),
        ({"attn_type": "prefix"}, ["attn=prefix", "encoder_only"]),
        ({"seed": -1}, ["seed=-1"]),
        ({"common_prefix_len": -16}, ["prefix=-16"]),
        ({"lengths": "zipf"}, ["lengths=zipf"]),
        ({"topk_tokens": 64}, ["topk=64:", "unknown pattern", "topk=64:window"]),
        ({"topk_pattern": "prefix"}, ["topk=0:prefix", "1 to", "leave topk= out"]),
        ({"topk_tokens": 64, "topk_pattern": "random"}, ["only latent attention is sparse"]),
    ],
)
def test_values_are_checked_too(changes: dict[str, str | int], parts: list[str]) -> None:
    with pytest.raises(WorkloadError) as caught:
        Workload.parse("8q1s4k").replace(**changes)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"num_heads": 0}, "num_heads=0"),
        ({"name": "", "tensor_parallel_size": 2}, "tp=2"),
        ({"name": "", "kv_lora_rank": 512}, "an MLA shape has all of"),
        ({"logits_soft_cap": float("inf")}, "softcap=inf"),
        ({"name": "nobody"}, "unknown attention shape 'nobody'"),
    ],
)
def test_shapes_are_checked_too(changes: dict[str, object], part: str) -> None:
    workload = Workload.parse("8q1s4k")
    with pytest.raises(WorkloadError, match=part):
        workload.replace(shape=replace(workload.shape, **changes))  # type: ignore[arg-type]
