"""Small random traces and scheduler settings under which they can run."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from attnbench.traffic.schedule_settings import SchedulerSettings
from attnbench.traffic.types import Ints, Trace


@st.composite
def traces(draw: st.DrawFn, max_requests: int = 12) -> Trace:
    """Up to `max_requests` requests of up to 40 + 20 tokens, half of the time with prefixes."""
    count = draw(st.integers(1, max_requests))
    gaps = draw(
        st.lists(st.sampled_from([0.0, 0.0, 0.5, 3.0, 100.0]), min_size=count, max_size=count)
    )
    inputs = draw(st.lists(st.integers(1, 40), min_size=count, max_size=count))
    outputs = draw(st.lists(st.sampled_from([1, 1, 2, 3, 7, 20]), min_size=count, max_size=count))
    gaps[0] = 0.0
    offsets: Ints = np.empty(0, dtype=np.int64)
    ids: Ints = np.empty(0, dtype=np.int64)
    hash_tokens = 0
    if draw(st.booleans()):
        hash_tokens = draw(st.sampled_from([3, 4, 8]))
        # Now and then the ids end before the prompt does: what follows is nobody else's.
        counts = [-(-tokens // hash_tokens) - draw(st.sampled_from([0, 0, 1])) for tokens in inputs]
        rows = [draw(st.lists(st.integers(0, 1), min_size=n, max_size=n)) for n in counts]
        offsets = np.cumsum([0, *(len(row) for row in rows)]).astype(np.int64)
        ids = np.array([number for row in rows for number in row], dtype=np.int64)
    return Trace(
        name="random",
        arrival_s=np.cumsum(gaps),
        input_tokens=np.array(inputs, dtype=np.int64),
        output_tokens=np.array(outputs, dtype=np.int64),
        hash_offsets=offsets,
        hash_ids=ids,
        hash_block_tokens=hash_tokens,
    )


@st.composite
def settings_for(draw: st.DrawFn, trace: Trace) -> SchedulerSettings:
    """Tight settings, so that budgets, seats and blocks all run out now and then."""
    block_size = draw(st.sampled_from([1, 2, 4, 8]))
    drafts = draw(st.sampled_from([0, 0, 1, 3]))
    longest = int((trace.input_tokens + trace.output_tokens).max())
    seats = draw(st.integers(1, 6))
    most = -(-(longest - 1 + 2 * drafts) // block_size)
    spare = draw(st.one_of(st.none(), st.integers(0, 2 * most)))
    return SchedulerSettings(
        max_num_batched_tokens=seats + draw(st.integers(1, 60)),
        max_num_seqs=seats,
        block_size=block_size,
        num_gpu_blocks=None if spare is None else 1 + max(most, 1) + spare,
        enable_prefix_caching=draw(st.booleans()),
        max_model_len=draw(st.sampled_from([None, longest, longest + 2, 1000])),
        long_prefill_token_threshold=draw(st.sampled_from([0, 0, 5])),
        scheduler_reserve_full_isl=draw(st.booleans()),
        num_speculative_tokens=drafts,
        speculative_method=draw(st.sampled_from(["eagle", "draft_model", "ngram"])),
        acceptance_rate=draw(st.sampled_from([0.0, 0.5, 0.7, 1.0])),
        seed=draw(st.integers(0, 3)),
    )


@st.composite
def crowds(draw: st.DrawFn) -> tuple[Trace, SchedulerSettings]:
    """Equal prompts in whole blocks and long outputs in a cache that is always too small.

    What is rare elsewhere is common here: several equal blocks, blocks evicted out of the middle
    of a prefix, preempted requests that find some of their own blocks again.
    """
    count = draw(st.integers(3, 14))
    block_size = draw(st.sampled_from([1, 2, 4]))
    inputs = [draw(st.sampled_from([4, 4, 8, 12])) for _ in range(count)]
    outputs = [draw(st.sampled_from([1, 2, 9, 18])) for _ in range(count)]
    first = [draw(st.integers(0, 1)) for _ in range(count)]
    rows = [
        [number, *range(2, tokens // 4 + 1)] for number, tokens in zip(first, inputs, strict=True)
    ]
    trace = Trace(
        name="crowd",
        arrival_s=np.cumsum([0.0, *(draw(st.sampled_from([0.0, 1.0])) for _ in inputs[1:])]),
        input_tokens=np.array(inputs, dtype=np.int64),
        output_tokens=np.array(outputs, dtype=np.int64),
        hash_offsets=np.cumsum([0, *(len(row) for row in rows)]).astype(np.int64),
        hash_ids=np.array([number for row in rows for number in row], dtype=np.int64),
        hash_block_tokens=4,
    )
    drafts = draw(st.sampled_from([0, 0, 3]))
    most = -(-(max(np.add(inputs, outputs)) - 1 + 2 * drafts) // block_size)
    settings = SchedulerSettings(
        max_num_batched_tokens=draw(st.sampled_from([16, 64])),
        max_num_seqs=draw(st.integers(2, 6)),
        block_size=block_size,
        num_gpu_blocks=1 + most + draw(st.integers(0, most)),
        num_speculative_tokens=drafts,
        speculative_method=draw(st.sampled_from(["eagle", "ngram"])),
        acceptance_rate=0.5,
        scheduler_reserve_full_isl=draw(st.booleans()),
    )
    return trace, settings
