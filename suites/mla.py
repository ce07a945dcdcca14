"""Multi-head latent attention: the layers of the DeepSeek family."""

from __future__ import annotations

from attnbench.asv_bridge.suite_support import SETUP_TIMEOUT_S, measure_once
from attnbench.asv_bridge.suite_support import SweepBenchmark as _SweepBenchmark
from attnbench.workload import Suite

SUITE = Suite(
    "mla",
    "Latent attention: absorbed decode, expanded prefill, both in one batch; heads per rank.",
    smoke=[
        "2q1s128 shape=deepseek-v2-lite tp=8",
        "2q1s128 block=32 dtype=fp32 shape=deepseek-v2-lite tp=8",
        "q32 shape=deepseek-v2-lite tp=8",
        "q16s64_2q1s128 shape=deepseek-v2-lite tp=8",
        "2q1s100 heads=4/1 mla=64+16:32+32",
    ],
    nightly=[
        "{1,4}q1s1k shape=deepseek-v2-lite",
        "2q1s1k dtype=fp32 shape=deepseek-v2-lite",
        "2q1s1k block=64 shape=deepseek-v2-lite",
        "2q1s1k shape=deepseek-v3",
        "q128 shape=deepseek-v2-lite",
        "q64s256 shape=deepseek-v2-lite",
        "q64_4q1s512 shape=deepseek-v2-lite",
        "2q1s1k shape=deepseek-v2-lite topk=128:random",
        "q16s1k_2q1s1k kv=fp8_ds_mla shape=deepseek-v2-lite topk=128:random",
        # Small enough for Triton's interpreter: checked on a CPU, timed on a GPU.
        "2q1s100 dtype=fp16 heads=4/1 mla=64+16:32+32",
    ],
    full=[
        "{1,8,64}q1s{1k..16k*2} shape=deepseek-v3 tp=8",
        "{1,32,128}q1s4k shape=deepseek-v3 tp={1,2,4,16}",
        "{1,32,128}q1s4k kv=fp8_e4m3 shape=deepseek-v3 tp=8",
        "{8,64}q1s4k block={1,32,64,128} shape=deepseek-v3 tp=8",
        "{8,64}q1s4k dtype={fp16,fp32} shape=deepseek-v3 tp=8",
        "{1,32,128}q1s4k shape=kimi-k2 tp=8",
        "{1,32,128}q1s4k shape=deepseek-v2-lite",
        "{8,64}q{2,4}s4k shape=deepseek-v3 tp=8",
        "q{512..4k*2} shape=deepseek-v3 tp=8",
        "q{512,2k}s8k shape=deepseek-v3 tp=8",
        "q{1k,4k} shape={deepseek-v2-lite,kimi-k2}",
        "q2k_{16,64}q1s4k shape=deepseek-v3 tp=8",
        "64q1s4k lengths={geometric,uniform:0.5} shape=deepseek-v3 tp=8",
        # Sparse: FlashMLA wants blocks of 64.
        "{1,8,64}q1s{4k,32k} block=64 shape=deepseek-v3.2 topk=2048:random",
        "{1,8,64}q1s{4k,32k} block=64 kv=fp8_ds_mla shape=deepseek-v3.2 topk=2048:random tp={1,8}",
        "64q1s32k block=64 kv=fp8_ds_mla shape=deepseek-v3.2 topk=2048:{prefix,window}",
        "{8,64}q{2,4}s8k block=64 kv=fp8_ds_mla shape=deepseek-v3.2 topk=2048:random",
        "{q2k,q2ks16k} block=64 shape=deepseek-v3.2 topk=2048:random",
        "q2k_64q1s8k block=64 kv=fp8_ds_mla shape=deepseek-v3.2 topk=2048:random",
    ],
)


def setup_cache() -> str:
    """asv calls this once per commit: the whole suite, measured in one process."""
    return measure_once(SUITE)


setup_cache.timeout = SETUP_TIMEOUT_S  # type: ignore[attr-defined]


class MLA(_SweepBenchmark, suite=SUITE):
    """What asv tracks of this suite."""
