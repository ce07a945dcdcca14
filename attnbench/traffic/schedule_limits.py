"""Whether an engine can serve a trace at all, and the block pool it needs for it."""

from __future__ import annotations

from attnbench.errors import UsageError
from attnbench.traffic.blocks import UNLIMITED, BlockCounter, PrefixBlockPool
from attnbench.traffic.schedule_settings import SchedulerSettings
from attnbench.traffic.types import Trace


def check_servable(trace: Trace, settings: SchedulerSettings) -> None:
    """Refuse a trace with a request that would wait for ever, as vLLM refuses it at its start.

    Raises:
        UsageError: it, or a trace without requests.
    """
    if not len(trace):
        raise UsageError(f"{trace.name} has no requests: give a trace with at least one")
    total = trace.input_tokens + trace.output_tokens
    longest = int(total.argmax())
    limit = settings.max_model_len
    if limit is not None and total[longest] > limit:
        raise UsageError(
            f"{trace.name}: request {longest} reaches {total[longest]} tokens, max_model_len is "
            f"{limit}: load the trace with that max_model_len, which leaves such requests out"
        )
    if settings.num_gpu_blocks is None:
        return
    usable = settings.num_gpu_blocks - 1
    needed = _most_blocks(int(total[longest]), settings)
    if needed > usable:
        raise UsageError(
            f"{trace.name}: request {longest} needs {needed} blocks of {settings.block_size} "
            f"tokens, {usable} of num_gpu_blocks can be used: give {needed + 1} or more"
        )


def _most_blocks(total_tokens: int, settings: SchedulerSettings) -> int:
    """Blocks that a request of so many tokens may hold in its last step."""
    # The last token of output is never computed; drafts and the slots ahead of them may be.
    drafts = settings.num_speculative_tokens + settings.num_lookahead_tokens
    tokens = total_tokens - 1 + drafts
    if settings.max_model_len is not None:
        tokens = min(tokens, settings.max_model_len)
    return -(-tokens // settings.block_size)


def make_pool(
    trace: Trace, settings: SchedulerSettings, num_slots: int, longest: int
) -> BlockCounter:
    limited = settings.num_gpu_blocks is not None
    num_usable = (settings.num_gpu_blocks or 0) - 1 if limited else UNLIMITED
    # A block is found again by another request with the same prefix, or by its own one after a
    # preemption: without limit and without prefixes by nobody.
    if not settings.enable_prefix_caching or not (limited or trace.has_prefixes):
        return BlockCounter(num_usable)
    most = _most_blocks(longest, settings) + 1
    return PrefixBlockPool(
        num_usable, trace, settings.block_size, num_slots, most, settings.drops_last_hit
    )
