"""Workloads every latent-attention library must get right or refuse: without a GPU and on one."""

from __future__ import annotations

SMALL = "heads=4/1 mla=512+64:128+128"

#: Small enough for plain torch on the CPU. Blocks are the library's (`{block}`).
WORKLOADS = {
    "decode": f"3q1s170 {SMALL}",
    "decode, first token": f"2q1 {SMALL}",
    "decode, ragged": f"q1s5_q1s330_q1s64_2q1s65 {SMALL}",
    "decode, fp16": f"2q1s70 {SMALL} dtype=fp16",
    "decode, fp8": f"3q1s170 {SMALL} kv=fp8_e4m3",
    "decode, rank 256": "2q1s70 heads=4/1 mla=256+64:64+64",
    "decode, 128 heads": "2q1s70 heads=128/1 mla=512+64:16+16",
    "decode, prefix": f"3q1s300 {SMALL} prefix=256",
    "speculative": f"3q4s170 {SMALL}",
    "speculative, ragged": f"q1s70_q4s9_2q2s130_q1s33 {SMALL}",
    "speculative, fp8": f"2q3s90 {SMALL} kv=fp8_e4m3",
    "prefill": f"2q530 {SMALL}",
    "prefill, fp16": f"q530 {SMALL} dtype=fp16",
    "prefill, odd widths": "q530 heads=2/1 mla=512+64:16+24",
    "extend": f"q520s700_q515s600 {SMALL}",
    "extend, fp8": f"q520s700 {SMALL} kv=fp8_e4m3",
    "mixed": f"q530_3q1s170_q520s700 {SMALL}",
    "mixed, two prefill lengths": f"q530_q1s70_q600 {SMALL}",
}

#: Sizes where tiles, splits and schedules matter.
_SHAPE = "shape=deepseek-v3"
GPU_WORKLOADS = {
    "decode": f"4q1s4k {_SHAPE} tp=8",
    "decode, all heads": f"4q1s4k {_SHAPE}",
    "decode, one": f"q1s1k {_SHAPE} tp=8",
    "decode, ragged": f"q1s5_q1s4k_q1s777_q1 {_SHAPE} tp=4",
    "decode, many": f"256q1s600 {_SHAPE} tp=8",
    "decode, long": f"q1s32k {_SHAPE}",
    "decode, fp16": f"4q1s4k {_SHAPE} tp=8 dtype=fp16",
    "decode, fp8": f"4q1s4k {_SHAPE} kv=fp8_e4m3",
    "decode, prefix": f"8q1s2k {_SHAPE} tp=8 prefix=1024",
    "speculative": f"4q4s2k {_SHAPE} tp=8",
    "speculative, ragged": f"q1s2k_q4s2k_q2s777 {_SHAPE} tp=8",
    "speculative, fp8": f"4q4s2k {_SHAPE} tp=8 kv=fp8_e4m3",
    "prefill": f"2q2k {_SHAPE} tp=8",
    "prefill, fp16": f"q1500 {_SHAPE} tp=8 dtype=fp16",
    "extend": f"2q600s3k {_SHAPE} tp=8",
    "extend, fp8": f"q600s3k {_SHAPE} tp=8 kv=fp8_e4m3",
    "mixed": f"16q1s2k_q1k_q600s3k {_SHAPE} tp=8",
}
