"""What a trace's requests have in common, against comparing them block by block."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from attnbench.traffic.blocks import SharedPrefixes
from attnbench.traffic.types import Trace
from tests.traffic.strategies import traces


@given(traces(), st.sampled_from([1, 2, 3, 4, 5, 8, 16]))
@hypothesis_settings(max_examples=200, deadline=None)
def test_blocks_have_the_same_key_exactly_where_they_end_the_same_prefix(
    trace: Trace, block_size: int
) -> None:
    prefixes = SharedPrefixes(trace, block_size)
    tokens = max(trace.hash_block_tokens, 1)
    ids_of = [
        tuple(trace.hash_ids[trace.hash_offsets[i] : trace.hash_offsets[i + 1]].tolist())
        if trace.has_prefixes
        else ()
        for i in range(len(trace))
    ]
    beginnings = Counter(ids[:n] for ids in ids_of for n in range(1, len(ids) + 1))
    meaning: dict[int, object] = {}
    for request, ids in enumerate(ids_of):
        # Blocks whose end lies in the prompt and in an id that another request has there too.
        expected = []
        for block in range(int(trace.input_tokens[request]) // block_size):
            end = (block + 1) * block_size
            beginning = ids[: -(-end // tokens)]
            if end <= len(ids) * tokens and beginnings[beginning] > 1:
                expected.append((beginning, end))
        keys = prefixes.keys(request, 1000).tolist()
        assert len(keys) == len(expected) == prefixes.num_blocks[request]
        assert keys[:2] == prefixes.keys(request, 2).tolist()
        for key, block_end in zip(keys, expected, strict=True):
            assert 0 <= key < prefixes.num_keys
            assert meaning.setdefault(key, block_end) == block_end
    assert len(set(meaning.values())) == len(meaning)
