"""Decode: one new token per request, over caches of every kind."""

from __future__ import annotations

from attnbench.asv_bridge.suite_support import SETUP_TIMEOUT_S, measure_once
from attnbench.asv_bridge.suite_support import SweepBenchmark as _SweepBenchmark
from attnbench.workload import Suite

SUITE = Suite(
    "decode",
    "One new token per request: batch, context, head size, types, block size and features.",
    smoke=[
        "2q1s256 tp=8",
        "4q1s128 dtype=fp32 tp=8",
        "2q1s256 block=32 head_size=64 heads=4/2 sinks=1 window=128",
        "2q1s200 head_size=96 heads=2/2",
        "2q1s256 head_size=256 heads=2/1 softcap=50",
        "3q1s256 heads=2/1 lengths=geometric prefix=64",
    ],
    nightly=[
        "{1,4}q1s1k",
        "8q1s512",
        "2q1s2k",
        "4q1s1k dtype=fp32",
        "4q1s1k block=128",
        "4q1s1k kv=fp8_e4m3",
        "2q1s512 shape={falcon-7b,phi-3-mini,gemma-2-9b,bloom-7b1}",
        "2q1s2k shape={gpt-oss-20b-local,gemma-3-27b-local}",
        "8q1s512 prefix=256",
        "8q1s512 lengths={geometric,uniform:0.5}",
        # Small enough for Triton's interpreter: checked on a CPU, timed on a GPU.
        "2q1s256 dtype=fp32 head_size=64 heads=4/2",
        "2q1s256 block=32 dtype=fp16 head_size=64 heads=4/2 sinks=1 window=128",
    ],
    full=[
        "{1,4,16}q1s{1k..32k*2}",
        "{64,256}q1s{1k..8k*2}",
        # The batch sizes around which FlashInfer switches kernels.
        "{255,257}q1s2k",
        "{1,16,128}q1s{2k,8k} dtype={fp16,fp32}",
        "{1,16,128}q1s{2k,8k} kv={fp8_e4m3,fp8_e5m2}",
        "{4,64}q1s4k block={1,8,32,64,128,256}",
        "{4,64}q1s4k layout=HND",
        "{4,64}q1s4k head_size={64,96,128,192,256} heads=32/8",
        "{4,64}q1s4k heads={32/32,32/16,32/4,32/1}",
        "{1,16,128}q1s4k shape=llama-3-70b tp={1,2,4,8}",
        "{1,16,128}q1s4k shape=llama-3.1-405b tp=8",
        "{1,16,128}q1s4k shape={qwen3-8b,qwen3-32b,qwen3-30b-a3b,qwen3-235b-a22b}",
        "{1,16,64}q1s8k shape={gemma-2-9b,gemma-2-9b-local,gemma-3-27b,gemma-3-27b-local}",
        "{1,16,64}q1s8k shape={gpt-oss-120b,gpt-oss-120b-local}",
        "{1,16,64}q1s2k shape={phi-3-mini,falcon-7b,bloom-7b1,mpt-7b}",
        "{1,16,64}q1s8k shape=mistral-7b-v0.1",
        "{16,64}q1s8k prefix={1k,4k}",
        "{16,64}q1s4k lengths={geometric,uniform:0.5} seed={0..2}",
    ],
)


def setup_cache() -> str:
    """asv calls this once per commit: the whole suite, measured in one process."""
    return measure_once(SUITE)


setup_cache.timeout = SETUP_TIMEOUT_S  # type: ignore[attr-defined]


class Decode(_SweepBenchmark, suite=SUITE):
    """What asv tracks of this suite."""
