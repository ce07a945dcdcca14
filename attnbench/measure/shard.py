"""`--shard i/n`: one of n disjoint parts of a plan, for n machines to measure.

A point's part is a function of its id alone: the same plan is cut the same way everywhere, and
points that are added or removed move no others.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

from attnbench.errors import UsageError
from attnbench.measure.plan import PlannedPoint

_SHARD = re.compile(r"([1-9]\d{0,3})/([1-9]\d{0,3})")


def parse_shard(text: str) -> tuple[int, int]:
    """Read `2/4`: the second of four. Raises UsageError."""
    match = _SHARD.fullmatch(text)
    if match is None or int(match[1]) > int(match[2]):
        raise UsageError(f"--shard {text!r}: write i/n with 1 <= i <= n, e.g. 2/4")
    return int(match[1]), int(match[2])


def shard_of(point_id: str, count: int) -> int:
    """The shard, from 1 to `count`, that a point belongs to."""
    digest = hashlib.blake2b(point_id.encode(), digest_size=8, person=b"shard").digest()
    return int.from_bytes(digest, "big") % count + 1


def take_shard(plan: Sequence[PlannedPoint], shard: str) -> list[PlannedPoint]:
    """The points of `plan` that belong to `shard` ("": all), in the plan's order.

    Raises UsageError for a text that is no shard, or one that no point falls into.
    """
    if not shard:
        return list(plan)
    index, count = parse_shard(shard)
    part = [point for point in plan if shard_of(point.point_id, count) == index]
    if plan and not part:
        raise UsageError(
            f"--shard {shard}: none of the {len(plan)} points falls into it; use fewer shards"
        )
    return part
