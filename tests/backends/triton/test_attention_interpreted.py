"""TRITON_ATTN under Triton's interpreter against the float64 reference.

Right there: loads, masks, fp16 and fp32 arithmetic. Wrong there and so not tested here: all bf16
arithmetic, and fp8 stores that round (the values of a batch are exact in its cache's format).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from attnbench.backends import kv_cache
from attnbench.backends.dtypes import movable
from attnbench.backends.reference import reference_attention
from attnbench.backends.triton_attn import TritonAttentionBackend
from attnbench.backends.triton_launch import TileGroup, TileShape, choose_num_segments
from tests.backends.running import Run

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 from the start"
    ),
]

SMALL = "dtype=fp32 heads=4/2 head_size=64"

WORKLOADS = {
    "decode": f"3q1s70 {SMALL}",
    "decode, first token": f"2q1 {SMALL}",
    "decode, fp16": "3q1s130 heads=4/2 head_size=64 dtype=fp16",
    "decode, odd block, HND": f"3q1s70 {SMALL} block=7 layout=HND",
    "decode, block 1": f"2q1s37 {SMALL} block=1",
    "decode, MQA, heads no power of two": "2q1s70 dtype=fp32 heads=71/1 head_size=32",
    "decode, MHA": "2q1s40 dtype=fp32 heads=3/3 head_size=64",
    "decode, head size 96": "2q1s50 dtype=fp32 heads=4/2 head_size=96",
    "decode, head size 512": "2q1s50 dtype=fp16 heads=2/1 head_size=512",
    "decode, wide values": f"2q1s70 {SMALL} v_head_size=80",
    "decode, narrow values": f"2q1s70 {SMALL} v_head_size=32",
    "decode, fp8 e4m3": f"2q1s70 {SMALL} kv=fp8_e4m3",
    "decode, fp8 e5m2": "2q1s70 heads=4/2 head_size=64 dtype=fp16 kv=fp8_e5m2 layout=HND",
    "decode, everything": f"q1s70_q1s200 {SMALL} window=50 softcap=20 sinks=1 alibi=1 layout=HND",
    "speculative, window": f"3q4s70 {SMALL} window=9",
    "prefill": f"2q40 {SMALL}",
    "prefill, fp16": "q70 heads=2/1 head_size=128 dtype=fp16",
    "prefill, soft cap": f"q40 {SMALL} softcap=20",
    "prefill, sinks": f"q40 {SMALL} sinks=1",
    "extend, everything": f"q30s100 {SMALL} window=40 softcap=20 sinks=1 alibi=1",
    "mixed": f"q40_3q1s70_q20s60_q4s9 {SMALL}",
    "mixed, prefix": f"2q1s90_q40s100 {SMALL} prefix=48",
    "encoder": f"q40_q9 {SMALL} attn=encoder",
    "encoder only, window, ALiBi": f"q40_q60 {SMALL} attn=encoder_only window=7 alibi=1",
    "cross": f"2q1s50_q30s60 {SMALL} attn=encoder_decoder alibi=1",
}


@pytest.mark.parametrize("text", WORKLOADS.values(), ids=WORKLOADS.keys())
def test_output_equals_the_reference(text: str) -> None:
    check = Run(TritonAttentionBackend, text).check()
    assert check.ok, check.reason


def retiled(text: str, shape: TileShape, num_sms: int) -> Run:
    """A run whose builder takes this tile shape and fills this many multiprocessors."""
    run = Run(TritonAttentionBackend, text)
    builder: Any = run.builder
    builder.tile_shape = lambda rows, is_short: shape
    builder.num_sms = num_sms
    run.metadata = builder.build(0, run.batch.metadata)
    poison_scratch(run.metadata.groups)
    return run


def poison_scratch(groups: Sequence[TileGroup]) -> None:
    """What a segment does not write, the merge must not read."""
    for group in groups:
        for scratch in (group.partial_acc, group.partial_stats):
            if scratch is not None:
                scratch.fill_(float("nan"))


#: Small tiles make first, full and last key tiles out of short requests.
TILES = {
    "all kinds of tiles": (f"q50s130 {SMALL}", TileShape(32, 16, 4, 1), 1),
    "window inside tiles": (f"q40s130 {SMALL} window=50", TileShape(16, 32, 4, 1), 1),
    "window smaller than a tile": (f"q33s90 {SMALL} window=5", TileShape(16, 32, 4, 1), 1),
    "several tiles of several requests": (
        f"q21s30_q33s100_q15s22 {SMALL}",
        TileShape(16, 32, 4, 1),
        1,
    ),
    "encoder window": (
        f"q70 {SMALL} attn=encoder_only window=20",
        TileShape(16, 16, 4, 1),
        1,
    ),
    "heads of one KV head over two tiles": (
        "2q2s40 dtype=fp32 heads=40/1 head_size=32",
        TileShape(16, 32, 4, 1),
        1,
    ),
    "split": (f"2q1s160 {SMALL}", TileShape(16, 16, 4, 1), 8),
    "split, ragged, sinks": (f"q1s160_q2s20_q1s1 {SMALL} sinks=1", TileShape(16, 16, 4, 1), 16),
    "split, window": (f"2q2s160 {SMALL} window=70", TileShape(16, 16, 4, 1), 16),
    "split, everything": (
        f"2q1s150 {SMALL} window=99 softcap=20 sinks=1 alibi=1 kv=fp8_e4m3",
        TileShape(16, 16, 4, 1),
        16,
    ),
    "split, cross": (
        f"2q1s150 {SMALL} attn=encoder_decoder",
        TileShape(16, 16, 4, 1),
        16,
    ),
    "split beside whole": (f"2q1s160_q60 {SMALL}", TileShape(16, 16, 4, 1), 16),
}


@pytest.mark.parametrize(("text", "shape", "num_sms"), TILES.values(), ids=TILES.keys())
def test_tiles_and_segments_change_nothing(text: str, shape: TileShape, num_sms: int) -> None:
    run = retiled(text, shape, num_sms)
    assert (num_sms > 1) == (run.metadata.groups[0].num_segments > 1)
    check = run.check()
    assert check.ok, check.reason


@pytest.mark.parametrize("num_sms", [1, 16], ids=["whole", "split"])
def test_lse_is_the_log_of_the_denominator(num_sms: int) -> None:
    run = retiled(
        f"q1s100_q3s20 {SMALL} sinks=1 window=90 softcap=20", TileShape(16, 16, 4, 1), num_sms
    )
    batch = run.batch
    out, lse = torch.empty_like(batch.query), torch.empty(batch.query.shape[:2])
    for launch in run.impl.launches(
        batch.layer, batch.query, batch.key, batch.value, run.kv_cache, run.metadata, out, lse
    ):
        launch.run()
    torch.testing.assert_close(lse.double(), reference_attention(batch).lse, atol=1e-5, rtol=1e-5)


def test_slots_behind_a_sequence_are_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "HIDDEN_POISON", float("nan"))
    for text in (f"q1s33_q1s70 {SMALL}", f"q20s41 {SMALL} block=32 window=30"):
        check = Run(TritonAttentionBackend, text).check()
        assert check.ok, check.reason


@pytest.mark.parametrize("num_sms", [1, 16], ids=["whole", "split"])
def test_padding_of_a_captured_batch_is_left_alone(num_sms: int) -> None:
    run = retiled(f"2q1s100 {SMALL}", TileShape(16, 16, 4, 1), num_sms)
    common = run.batch.metadata
    assert run.metadata.groups[0].tile_map is None
    # A graph captured for four requests replays two: the tensors change, the launch does not.
    captured = run.builder.build(
        0,
        common.replace(
            num_reqs=4,
            query_start_loc_cpu=torch.arange(5, dtype=torch.int32),
            seq_lens_cpu=torch.full((4,), 100, dtype=torch.int32),
        ),
    )
    pad = torch.nn.functional.pad
    captured.query_start_loc = torch.tensor([0, 1, 2, 2, 2], dtype=torch.int32)
    captured.seq_lens = pad(common.seq_lens, (0, 2))
    captured.block_table = pad(common.block_table_tensor, (0, 0, 0, 2))
    query = pad(run.batch.query, (0, 0, 0, 0, 0, 2))
    out = torch.full_like(query, 7.0)
    run.impl.forward(
        run.batch.layer, query, run.batch.key, run.batch.value, run.kv_cache, captured, out
    )
    expected = reference_attention(run.batch).output
    torch.testing.assert_close(out[:2].double(), expected, atol=2e-5, rtol=2e-5)
    assert bool((out[2:] == 7.0).all())


@pytest.mark.parametrize(
    "text", [f"2q5s40 {SMALL}", f"q3s9 {SMALL} kv=fp8_e4m3 layout=HND block=4"]
)
def test_cache_write_stores_the_new_tokens_and_nothing_else(text: str) -> None:
    run = Run(TritonAttentionBackend, text)
    batch = run.batch
    expected = kv_cache.allocate_kv_cache(
        TritonAttentionBackend, batch.spec, batch.num_blocks, "cpu"
    )
    kv_cache.fill_context(batch, expected, TritonAttentionBackend)
    kv_cache.write_new_tokens(batch, expected, TritonAttentionBackend)
    bits = {1: torch.uint8, 4: torch.int32}[expected.dtype.itemsize]
    assert torch.equal(movable(run.kv_cache).view(bits), movable(expected).view(bits))


def test_cache_write_skips_negative_slots() -> None:
    run = Run(TritonAttentionBackend, f"q4s8 {SMALL}")
    before = run.kv_cache.clone()
    slots = torch.full((4,), -1)
    run.impl.do_kv_cache_update(
        run.batch.layer, run.batch.key + 1, run.batch.value + 1, run.kv_cache, slots
    )
    assert torch.equal(run.kv_cache.view(torch.int32), before.view(torch.int32))


def test_number_of_segments_is_a_power_of_two_that_fills_the_device() -> None:
    assert choose_num_segments(num_programs=8, num_keys=8192, tile_n=64, num_sms=132) == 32
    assert choose_num_segments(num_programs=264, num_keys=8192, tile_n=64, num_sms=132) == 1
    assert choose_num_segments(num_programs=1, num_keys=32768, tile_n=64, num_sms=132) == 64
    # Of at least 64 keys, or two tiles where that is less.
    assert choose_num_segments(num_programs=1, num_keys=9 * 64, tile_n=64, num_sms=132) == 8
    assert choose_num_segments(num_programs=1, num_keys=9 * 32, tile_n=32, num_sms=132) == 4
    assert choose_num_segments(num_programs=1, num_keys=9 * 16, tile_n=16, num_sms=132) == 4
    assert choose_num_segments(num_programs=1, num_keys=9 * 128, tile_n=128, num_sms=132) == 8
    assert choose_num_segments(num_programs=1, num_keys=40, tile_n=64, num_sms=132) == 1
