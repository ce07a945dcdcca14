"""The pairs that are counted are those the reference attends: FLOPs and outputs mean one thing."""

from __future__ import annotations

import pytest
import torch

from attnbench.backends.batch import make_batch
from attnbench.backends.reference import masked_logits, query_positions
from attnbench.backends.topk import selected_keys
from attnbench.workload import Workload
from attnbench.workload.cost import visible_pairs


@pytest.mark.parametrize(
    "text",
    [
        "q9 heads=2/1 head_size=8",
        "q4s21_3q1s17 heads=2/1 head_size=8 window=6",
        "q5s21_q1s40 heads=2/1 head_size=8 prefix=16",
        "q9 heads=2/1 head_size=8 attn=encoder window=3",
        "q3s12 heads=2/1 head_size=8 attn=encoder_decoder",
        "q5s21_q1s40 heads=2 mla=8+4:6+5",
        "q5s21_q1s40_q3 heads=2 mla=8+4:6+5 topk=6:random",
        "q5s21_q1s40_q3 heads=2 mla=8+4:6+5 topk=6:prefix",
        "q5s21_q1s40_q3 heads=2 mla=8+4:6+5 topk=6:window",
    ],
)
def test_pairs(text: str) -> None:
    workload = Workload.parse(text)
    batch = make_batch(workload)
    for index, request in enumerate(batch.requests):
        selected = None
        if batch.topk_indices is not None:
            rows = batch.topk_indices[slice(*batch.query_range(index))]
            selected = selected_keys(rows, 0, request.seq_len)
        logits = masked_logits(
            batch,
            torch.zeros(request.query_len, 1, 8, dtype=torch.float64),
            torch.zeros(request.seq_len, 8, dtype=torch.float64),
            query_positions(batch, index),
            0,
            slice(0, 1),
            selected,
        )
        assert int(torch.isfinite(logits).sum()) == visible_pairs(workload, request)
