"""The numbers that decide an engine's batches, under vLLM's names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from attnbench.errors import UsageError

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class SchedulerSettings:
    """What vLLM's `SchedulerConfig`, `CacheConfig` and `SpeculativeConfig` say about batches.

    The defaults are those of vLLM 0.22.1's API server on a GPU of 70 GiB or more that is not an
    A100; `for_gpu` gives another GPU's.

    Attributes:
        max_num_batched_tokens: new tokens of one step, all requests together.
        max_num_seqs: requests running at a time.
        block_size: tokens of one KV-cache block.
        num_gpu_blocks: blocks of the whole cache, vLLM's null block included (so one less can be
            used); None: as many as are asked for, so nothing is ever preempted or evicted.
        enable_prefix_caching: full blocks stay findable after their request until they are needed.
        max_model_len: tokens a request may reach, None: no limit. Only matters with speculative
            decoding, where drafts are cut short of it; `load_trace` rejects what is longer.
        long_prefill_token_threshold: tokens of one prompt that one step computes at most, 0: no
            limit of its own.
        scheduler_reserve_full_isl: a waiting request starts only when its whole prompt fits.
        num_speculative_tokens: drafts per request and step, 0: no speculative decoding.
        speculative_method: "eagle" (EAGLE, MTP: drafts have KV slots, the last cached block is
            computed again), "draft_model" (drafts have slots, and one token per request of the
            budget), "ngram" (neither).
        acceptance_rate: probability that a draft is accepted once all before it were.
        seed: of the acceptance.

    Raises:
        UsageError: a number outside its range.
    """

    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 1024
    block_size: int = 16
    num_gpu_blocks: int | None = None
    enable_prefix_caching: bool = True
    max_model_len: int | None = None
    long_prefill_token_threshold: int = 0
    scheduler_reserve_full_isl: bool = True
    num_speculative_tokens: int = 0
    speculative_method: Literal["eagle", "draft_model", "ngram"] = "eagle"
    acceptance_rate: float = 0.7
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("max_num_batched_tokens", 1),
            ("max_num_seqs", 1),
            ("block_size", 1),
            ("long_prefill_token_threshold", 0),
            ("num_speculative_tokens", 0),
            ("seed", 0),
        ):
            if getattr(self, name) < least:
                raise UsageError(f"{name} is {getattr(self, name)}: give {least} or more")
        if self.num_gpu_blocks is not None and self.num_gpu_blocks < 2:
            raise UsageError(
                f"num_gpu_blocks is {self.num_gpu_blocks}, one of which is vLLM's null block: "
                "give 2 or more"
            )
        if self.max_model_len is not None and self.max_model_len < 2:
            raise UsageError(f"max_model_len is {self.max_model_len}: give 2 or more")
        if self.speculative_method not in ("eagle", "draft_model", "ngram"):
            raise UsageError(
                f"speculative_method is {self.speculative_method!r}: "
                "give eagle, draft_model or ngram"
            )
        if not 0.0 <= self.acceptance_rate <= 1.0:
            raise UsageError(
                f"acceptance_rate is {self.acceptance_rate}: give a probability from 0 to 1"
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            # vLLM refuses it too: a step must be able to decode every running request.
            raise UsageError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) is less than "
                f"max_num_seqs ({self.max_num_seqs}): raise the one or lower the other"
            )
        if self.token_budget < 1:
            raise UsageError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) leaves nothing beside one "
                f"draft slot for each of max_num_seqs ({self.max_num_seqs}): raise it"
            )

    @classmethod
    def for_gpu(cls, memory_bytes: int, name: str = "") -> SchedulerSettings:
        """The API server's defaults on a GPU of so much memory (vLLM 0.22.1, engine/arg_utils.py).

        An A100 counts as a small one whatever its memory.
        """
        if memory_bytes >= 70 * GIB and "a100" not in name.lower():
            return cls(max_num_batched_tokens=8192, max_num_seqs=1024)
        return cls(max_num_batched_tokens=2048, max_num_seqs=256)

    @property
    def token_budget(self) -> int:
        """Tokens one step may schedule: `max_num_batched_tokens` less a draft model's slots."""
        slots = self.num_speculative_tokens > 0 and self.speculative_method == "draft_model"
        return self.max_num_batched_tokens - (self.max_num_seqs if slots else 0)

    @property
    def num_lookahead_tokens(self) -> int:
        """KV slots allocated ahead for the drafts of the next step."""
        return 0 if self.speculative_method == "ngram" else self.num_speculative_tokens

    @property
    def drops_last_hit(self) -> bool:
        """Whether the last cached block is computed again: EAGLE heads need its hidden states."""
        return self.num_speculative_tokens > 0 and self.speculative_method == "eagle"
