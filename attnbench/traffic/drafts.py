"""How many drafts the target model accepts, drawn without order: the same for any schedule."""

from __future__ import annotations

import numpy as np

from attnbench.traffic.schedule_settings import SchedulerSettings
from attnbench.traffic.types import Ints


def accepted_drafts(requests: Ints, num_tokens: Ints, settings: SchedulerSettings) -> Ints:
    """(num_entries,) drafts accepted, were all `num_speculative_tokens` of them checked.

    Each draft is accepted with the probability `acceptance_rate` if all before it were. The draw
    depends on the seed, the request and how many tokens it has, so a request accepts the same
    drafts in any company. The generator is splitmix64 (Steele, Lea, Flood 2014).
    """
    key = _mix(np.array([settings.seed], dtype=np.uint64))
    drawn = _mix(_mix(key + requests.astype(np.uint64)) + num_tokens.astype(np.uint64))
    uniform = (drawn >> np.uint64(11)).astype(np.float64) * 2.0**-53
    rate = settings.acceptance_rate
    at_least = np.array([rate**count for count in range(1, settings.num_speculative_tokens + 1)])
    return np.asarray((uniform[:, None] < at_least).sum(axis=1), dtype=np.int64)


def _mix(
    state: np.ndarray[tuple[int, ...], np.dtype[np.uint64]],
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint64]]:
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
