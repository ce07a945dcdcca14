"""Steps written down as they come, millions of entries at a time."""

from __future__ import annotations

from array import array

import numpy as np

from attnbench.errors import UsageError
from attnbench.traffic.types import Floats, Ints, StepBatches

_CHUNK = 1 << 20
MAX_STEPS = 30_000_000
MAX_ENTRIES = 300_000_000
"""More of either is 10 GiB and more, before anything is made of them."""


class StepRecorder:
    """Collects steps; `finish` makes the arrays. Entries take 16 bytes each until then."""

    def __init__(self) -> None:
        self._chunks: list[np.ndarray[tuple[int, ...], np.dtype[np.int32]]] = []
        self._chunk = np.empty((4, _CHUNK), dtype=np.int32)
        self._filled = 0
        self._num_entries = 0
        self._counts = array("q")
        self._starts = array("d")
        self._seconds = array("d")
        self._blocks = array("q")
        self._preempted = array("q")

    @property
    def num_steps(self) -> int:
        return len(self._starts)

    def add(
        self,
        request: Ints,
        query_len: Ints,
        context_len: Ints,
        produces: Ints,
        *,
        start_s: float,
        seconds: float,
        num_blocks: int,
        num_preempted: int,
    ) -> None:
        """One step, from its (num_entries,) columns."""
        into = self._room(len(request))
        into[0], into[1], into[2], into[3] = request, query_len, context_len, produces
        self._counts.append(len(request))
        self._starts.append(start_s)
        self._seconds.append(seconds)
        self._blocks.append(num_blocks)
        self._preempted.append(num_preempted)

    def add_decodes(
        self,
        request: Ints,
        context_len: Ints,
        *,
        starts: Floats,
        seconds: Floats,
        num_blocks: Ints,
    ) -> None:
        """Steps of one token for each of the same requests.

        Args:
            request: (num_reqs,)
            context_len: (num_steps, num_reqs)
            starts, seconds, num_blocks: (num_steps,)
        """
        num_steps, num_reqs = context_len.shape
        into = self._room(num_steps * num_reqs)
        into[0].reshape(num_steps, num_reqs)[:] = request
        into[1] = 1
        into[2] = context_len.ravel()
        into[3] = 1
        self._counts.frombytes(np.full(num_steps, num_reqs, dtype=np.int64).tobytes())
        self._starts.frombytes(starts.tobytes())
        self._seconds.frombytes(seconds.tobytes())
        self._blocks.frombytes(num_blocks.tobytes())
        self._preempted.frombytes(bytes(8 * num_steps))

    def finish(self) -> StepBatches:
        chunks = [*self._chunks, self._chunk[:, : self._filled]]
        request, query_len, context_len, produces = (
            np.concatenate([chunk[row] for chunk in chunks], dtype=np.int64) for row in range(4)
        )
        return StepBatches(
            step_offsets=np.concatenate(
                (np.zeros(1, np.int64), np.cumsum(np.array(self._counts, dtype=np.int64)))
            ),
            start_s=np.array(self._starts),
            duration_s=np.array(self._seconds),
            num_blocks=np.array(self._blocks, dtype=np.int64),
            num_preempted=np.array(self._preempted, dtype=np.int64),
            request=request,
            query_len=query_len,
            context_len=context_len,
            produces=produces,
        )

    def _room(self, count: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
        self._num_entries += count
        if self.num_steps > MAX_STEPS or self._num_entries > MAX_ENTRIES:
            raise UsageError(
                f"the trace makes more than {MAX_STEPS:,} steps, or {MAX_ENTRIES:,} entries in "
                "them, too many to keep: take fewer requests (--requests), or leave out the "
                "longest (--max-model-len)"
            )
        if self._filled + count > self._chunk.shape[1]:
            self._chunks.append(self._chunk[:, : self._filled].copy())
            if count > self._chunk.shape[1]:
                self._chunk = np.empty((4, count), dtype=np.int32)
            self._filled = 0
        into = self._chunk[:, self._filled : self._filled + count]
        self._filled += count
        return into
