"""Prefill: prompts, whole or in chunks over a cache."""

from __future__ import annotations

from attnbench.asv_bridge.suite_support import SETUP_TIMEOUT_S, measure_once
from attnbench.asv_bridge.suite_support import SweepBenchmark as _SweepBenchmark
from attnbench.workload import Suite

SUITE = Suite(
    "prefill",
    "Whole and chunked prompts: length, head size, types, features; encoders too.",
    smoke=[
        "q64 tp=8",
        "2q32 dtype=fp32 tp=8",
        "q64s192 block=32 head_size=64 heads=2/1",
        "q96 head_size=64 heads=2/1 sinks=1 window=32",
        "2q48 head_size=96 heads=2/2 lengths=uniform:0.5",
        "q64 attn=encoder_only head_size=64 heads=2/2",
    ],
    nightly=[
        "q{128..512*2}",
        "q256 dtype=fp32",
        "q1k shape=llama-3-70b tp=8",
        "q256 shape={falcon-7b,phi-3-mini,gemma-2-9b}",
        "q512 shape=gpt-oss-20b-local",
        "q128s1k",
        "4q96 lengths=geometric",
        "q512 attn=encoder_only head_size=64 heads=16/16",
    ],
    full=[
        "q{512..16k*2}",
        "{4,16}q{512,2k}",
        "q{1k,4k} dtype={fp16,fp32}",
        "q{1k,4k} kv={fp8_e4m3,fp8_e5m2}",
        "q{512,2k}s{8k,32k}",
        "q2k block={1,32,64,128,256}",
        "q2k head_size={64,96,128,192,256} heads=32/8",
        "q2k heads={32/32,32/16,32/4,32/1}",
        "q{2k,8k} shape=llama-3-70b tp={1,2,4,8}",
        "q{2k,8k} shape=llama-3.1-405b tp=8",
        "q{2k,8k} shape={qwen3-32b,qwen3-30b-a3b,qwen3-235b-a22b}",
        "q{2k,8k} shape={gemma-2-9b,gemma-2-9b-local,gemma-3-27b,gemma-3-27b-local}",
        "q{2k,8k} shape={gpt-oss-120b,gpt-oss-120b-local,mistral-7b-v0.1}",
        "q2k shape={phi-3-mini,falcon-7b,bloom-7b1,mpt-7b}",
        "8q1k lengths={geometric,uniform:0.5} seed={0..2}",
        "4q{512,2k}s8k prefix=4k",
        "{1,8}q512 attn={encoder,encoder_only} head_size=64 heads=16/16",
        "q64s1500 attn=encoder_decoder head_size=64 heads=20/20",
    ],
)


def setup_cache() -> str:
    """asv calls this once per commit: the whole suite, measured in one process."""
    return measure_once(SUITE)


setup_cache.timeout = SETUP_TIMEOUT_S  # type: ignore[attr-defined]


class Prefill(_SweepBenchmark, suite=SUITE):
    """What asv tracks of this suite."""
