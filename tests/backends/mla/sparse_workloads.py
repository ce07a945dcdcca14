"""Sparse workloads FLASHMLA_SPARSE must get right, and the comparison with the reference."""

from __future__ import annotations

from attnbench.backends.check import check_output
from attnbench.backends.reference import reference_attention
from tests.backends.running import Run

SMALL = "block=64 heads=4/1 mla=512+64:32+32"
WIDE = "block=64 heads=32/1 mla=512+64:16+16"

WORKLOADS = {
    "decode": f"3q1s170 {SMALL} topk=64:random",
    "decode, first token": f"2q1 {SMALL} topk=8:random",
    "decode, ragged": f"q1s5_q1s330_q1s64 {SMALL} topk=128:random",
    "decode, more than 128": f"2q1s300 {SMALL} topk=200:random",
    "decode, prefix": f"3q1s300 {SMALL} topk=50:prefix prefix=128",
    "decode, window": f"3q1s300 {SMALL} topk=50:window",
    "decode, 64 heads": "2q1s70 block=64 heads=64/1 mla=512+64:8+8 topk=16:random",
    "decode, 128 heads": "2q1s70 block=64 heads=128/1 mla=512+64:8+8 topk=16:random",
    "speculative, ragged": f"q4s70_q1s9_2q2s130 {SMALL} topk=32:random",
    "prefill": f"2q70 {SMALL} topk=32:random",
    "extend": f"q20s100 {SMALL} topk=64:window",
    "mixed": f"q40_3q1s170_q20s100 {SMALL} topk=64:random",
    "wide, decode": f"3q1s70 {WIDE} topk=16:random",
    "wide, speculative": f"2q3s70 {WIDE} topk=16:random",
    "wide, prefill": f"2q20s40 {WIDE} topk=16:random",
    "wide, mixed": f"q20_2q2s70_q17s50 {WIDE} topk=16:random",
    "wide, ragged": f"q2s70_q1s60_q2s9 {WIDE} topk=16:random",
    "wide, 64 heads": "q17s30_q1s70 block=64 heads=64/1 mla=512+64:8+8 topk=16:random",
}


def reason(run: Run) -> str:
    """Compares the output and its LSE; "" when both are right."""
    out = run.attend()
    assert run.lse is not None
    return check_output(
        out,
        reference_attention(run.batch),
        run.workload.dtype,
        run.workload.resolved_kv_cache_dtype,
        lse=run.lse,
    ).reason
