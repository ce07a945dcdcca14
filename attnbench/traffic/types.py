"""What traffic is made of: requests as they arrive, and the batches an engine makes of them.

Both are columns of numpy arrays, not lists of objects: a day of traffic is a million requests, and
its schedule tens of millions of entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Requests in order of arrival.

    Attributes:
        name: where they come from, for people.
        arrival_s: (num_requests,) seconds since the first one, not decreasing.
        input_tokens, output_tokens: (num_requests,) at least 1 each.
        hash_offsets, hash_ids: the requests' prefix blocks, those of request i are
            `hash_ids[hash_offsets[i]:hash_offsets[i + 1]]`; two requests share a prefix as far as
            their ids agree. Both empty where the trace has none.
        hash_block_tokens: tokens one id stands for.
        num_rejected: requests left out because they were longer than the model's context.
        num_empty: requests left out because they had no prompt or no output (failed ones, mostly).
    """

    name: str
    arrival_s: Floats
    input_tokens: Ints
    output_tokens: Ints
    hash_offsets: Ints
    hash_ids: Ints
    hash_block_tokens: int = 0
    num_rejected: int = 0
    num_empty: int = 0

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def has_prefixes(self) -> bool:
        return len(self.hash_offsets) > 0


@dataclass(frozen=True, slots=True, eq=False)
class StepBatches:
    """The exact batches of a schedule, step by step.

    Step i has the entries `step_offsets[i]:step_offsets[i + 1]` of the entry arrays.

    Attributes:
        step_offsets: (num_steps + 1,)
        start_s, duration_s: (num_steps,) the step's clock.
        num_blocks: (num_steps,) KV-cache blocks in use while it runs.
        num_preempted: (num_steps,) requests put back to the queue before it.
        request: (num_entries,) index into the trace.
        query_len: (num_entries,) new tokens the step computes for the request.
        context_len: (num_entries,) tokens of the request in the cache before the step.
        produces: (num_entries,) tokens of output the step brings the request: 0 while its prompt
            is not yet done, 1, or more with speculative decoding.
    """

    step_offsets: Ints
    start_s: Floats
    duration_s: Floats
    num_blocks: Ints
    num_preempted: Ints
    request: Ints
    query_len: Ints
    context_len: Ints
    produces: Ints

    def __len__(self) -> int:
        return len(self.start_s)

    def entries_of(self, step: int) -> slice:
        """The slice of the entry arrays that is this step's."""
        return slice(int(self.step_offsets[step]), int(self.step_offsets[step + 1]))
