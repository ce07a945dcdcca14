"""Workloads every backend of vLLM must get right or refuse: without a GPU and on one."""

from __future__ import annotations

SMALL = "heads=4/2 head_size=64"

#: Small enough for plain torch on the CPU.
WORKLOADS = {
    "decode": f"3q1s70 {SMALL}",
    "decode, first token": f"2q1 {SMALL}",
    "decode, HND": f"q1s5_q1s130_q1s64 {SMALL} layout=HND",
    "decode, two heads": "2q1s50 heads=2/2 head_size=64",
    "decode, features": f"2q1s70 {SMALL} window=20 softcap=20 sinks=1",
    "decode, ALiBi": f"3q1s70 {SMALL} alibi=1 dtype=fp16",
    "decode, fp8": f"3q1s70 {SMALL} kv=fp8_e4m3",
    "extend, fp8 HND": f"q9s70 {SMALL} kv=fp8_e4m3 layout=HND",
    "mixed, block 32": f"q40_3q1s70_q20s60_q4s9 {SMALL} block=32",
    "encoder only, window": f"2q40_q9 {SMALL} attn=encoder_only window=7",
    "cross": f"2q1s50_q30s70 {SMALL} attn=encoder_decoder",
}

_MLA = "heads=2 mla=512+64:128+128"
MLA_WORKLOADS = {
    "decode": f"3q1s70 {_MLA}",
    "decode, fp16": f"q1s5_q1s130 {_MLA} dtype=fp16",
    "decode, fp8": f"2q1s70 {_MLA} kv=fp8_e4m3",
    "prefill": f"q140 {_MLA}",
    "mixed": f"q140s170_2q1s70_q130 {_MLA}",
}

#: Sizes where tiles, splits and schedules matter.
GPU_WORKLOADS = {
    "decode": "8q1s4k",
    "decode, ragged": "q1s5_q1s4k_q1s777_q1",
    "decode, many": "256q1s600",
    "decode, HND": "4q1s4k layout=HND",
    "decode, window": "4q1s4k window=1000",
    "decode, soft cap": "4q1s4k softcap=30",
    "decode, sinks": "4q1s4k heads=64/8 head_size=64 sinks=1",
    "decode, fp8": "4q1s4k kv=fp8_e4m3",
    "decode, prefix": "8q1s2k prefix=1024",
    "speculative": "4q4s2k",
    "prefill": "2q2k",
    "extend": "2q500s3k",
    "mixed": "16q1s2k_q1k_q100s3k",
    "head size 256": "2q1s2k_q500 heads=16/8 head_size=256",
    "encoder only": "2q500 attn=encoder_only heads=16/16 head_size=64",
}

GPU_MLA_WORKLOADS = {
    "decode": "8q1s4k shape=deepseek-v3 tp=8 block=64",
    "decode, ragged": "q1s5_q1s4k_q1s777_q1 shape=deepseek-v3 tp=8 block=64",
    "decode, 128 heads": "4q1s2k shape=deepseek-v3 block=64",
    "decode, fp8": "8q1s4k shape=deepseek-v3 tp=8 block=64 kv=fp8_e4m3",
    "speculative": "4q4s2k shape=deepseek-v3 tp=8 block=64",
    "prefill": "q1k shape=deepseek-v3 tp=8 block=64",
    "mixed": "8q1s2k_q600_q700s2k shape=deepseek-v3 tp=8 block=64",
}
