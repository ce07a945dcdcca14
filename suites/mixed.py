"""Mixed: prefills and decodes in one batch, and speculative decoding."""

from __future__ import annotations

from attnbench.asv_bridge.suite_support import SETUP_TIMEOUT_S, measure_once
from attnbench.asv_bridge.suite_support import SweepBenchmark as _SweepBenchmark
from attnbench.workload import Suite

SUITE = Suite(
    "mixed",
    "Prefill chunks and decodes in one batch, ragged lengths, several tokens per request.",
    smoke=[
        "q32_2q1s128 tp=8",
        "q32s96_2q1s128 dtype=fp32 tp=8",
        "2q4s128 head_size=64 heads=2/1",
        "q33_3q5s70_2q1s99 head_size=64 heads=2/1",
        "q48_2q1s128 head_size=64 heads=4/2 sinks=1 window=64",
    ],
    nightly=[
        "q128_8q1s512",
        "q128_4q1s512 dtype=fp32",
        "q128s512_4q1s512",
        "4q4s1k",
        "q128_q1s2k shape=gemma-3-27b-local",
        # Small enough for Triton's interpreter: checked on a CPU, timed on a GPU.
        "q33_3q5s70_2q1s99 dtype=fp32 head_size=64 heads=2/1",
    ],
    full=[
        "q{512,2k}_{16,64,255}q1s2k",
        "2q2k_32q1s1k dtype={fp16,fp32}",
        "2q2k_32q1s1k kv={fp8_e4m3,fp8_e5m2}",
        "2q1ks8k_{16,128}q1s4k",
        "{16,64}q{2,4,8}s4k",
        "q257_7q1s1057_3q4s2051_2q129s4093",
        "q2k_64q1s4k block={32,64,128}",
        "q2k_64q1s4k shape={gemma-3-27b,gemma-3-27b-local,gpt-oss-120b,gpt-oss-120b-local}",
        "q2k_64q1s4k shape=llama-3-70b tp={1,2,4,8}",
        "q2k_64q1s2k shape={phi-3-mini,falcon-7b,gemma-2-9b,gemma-2-9b-local}",
        "2q2k_64q1s4k lengths={geometric,uniform:0.5} seed={0..2}",
    ],
)


def setup_cache() -> str:
    """asv calls this once per commit: the whole suite, measured in one process."""
    return measure_once(SUITE)


setup_cache.timeout = SETUP_TIMEOUT_S  # type: ignore[attr-defined]


class Mixed(_SweepBenchmark, suite=SUITE):
    """What asv tracks of this suite."""
