"""Traffic into the batches an engine runs: continuous batching by the rules of vLLM v1.

Followed: `v1/core/sched/scheduler.py` and `v1/core/kv_cache_manager.py` of vLLM 0.22.1, first come
first served, chunked prefill, synchronous scheduling. docs/traffic.md lists the rules and what is
not modelled.

The running requests are columns of one matrix, in the engine's order, so a step costs a few numpy
calls however many run. Steps that only decode, with nobody able to join, are done at once.
"""

from __future__ import annotations

import math
from collections import deque

import numpy as np

from attnbench.traffic.drafts import accepted_drafts
from attnbench.traffic.schedule_limits import check_servable, make_pool
from attnbench.traffic.schedule_record import StepRecorder
from attnbench.traffic.schedule_settings import SchedulerSettings
from attnbench.traffic.step_clock import DecodeRunSeconds, StepSeconds, checked_seconds
from attnbench.traffic.types import Floats, Ints, StepBatches, Trace

# Rows of the matrix: the request, tokens in the cache, tokens known (prompt and output so far),
# tokens it ends with, blocks held, its row of the block table, drafts waiting to be checked, tokens
# whose blocks may be found again, shared blocks already made findable, tokens of this step.
(_REQ, _COMPUTED, _KNOWN, _TOTAL, _BLOCKS, _SLOT, _DRAFTS, _FINAL, _SHARED, _NEW) = range(10)
_RUN_ENTRIES = 1 << 16


def schedule(trace: Trace, settings: SchedulerSettings, step_seconds: StepSeconds) -> StepBatches:
    """The batches, step by step, of an engine that serves the trace alone.

    A request waits from its arrival; a step begins when the one before it ends, or when the next
    request arrives if there is nothing to do. Deterministic: the same arguments, the same steps.

    Raises:
        UsageError: a request that can never run (longer than `max_model_len`, or than the whole
            cache), a step time that is not above zero.
    """
    check_servable(trace, settings)
    engine = _Engine(trace, settings, step_seconds)
    while engine.advance():
        pass
    return engine.recorder.finish()


class _Engine:
    def __init__(
        self, trace: Trace, settings: SchedulerSettings, step_seconds: StepSeconds
    ) -> None:
        self.settings = settings
        self.step_seconds = step_seconds
        self.runs = step_seconds if isinstance(step_seconds, DecodeRunSeconds) else None
        self.recorder = StepRecorder()
        self.arrival = trace.arrival_s.tolist()
        self.inputs = trace.input_tokens.tolist()
        self.totals = (trace.input_tokens + trace.output_tokens).tolist()
        num_slots = min(settings.max_num_seqs, len(trace))
        self.pool = make_pool(trace, settings, num_slots, max(self.totals))
        self.num_shared = self.pool.num_shared_blocks(np.arange(len(trace), dtype=np.int64))
        self.shares = bool(self.num_shared.any())
        self.state = np.zeros((10, num_slots), dtype=np.int64)
        self.free_slots = list(range(num_slots - 1, -1, -1))
        self.num_running = 0
        self.clock = 0.0
        self.last_s = 0.0
        self.next_arrival = 0
        self.preempted: deque[int] = deque()
        self.known_when_preempted: dict[int, int] = {}
        # What the last step left: only decodes running; a waiting request that lacked blocks.
        self.only_decodes = False
        self.head_lacks_blocks = False

    def advance(self) -> bool:
        """Run the next step or stretch of steps; False once everything is done."""
        if not self.num_running and not self.preempted:
            if self.next_arrival == len(self.arrival):
                return False
            self.clock = max(self.clock, self.arrival[self.next_arrival])
        if not (self.only_decodes and self._decode_on()):
            self._step()
        return True

    # One step.

    def _step(self) -> None:
        num_before = self.num_running
        num_scheduled, budget = self._plan_running()
        num_preempted = num_before - self.num_running
        self.head_lacks_blocks = False
        self._make_findable(self.state[:, :num_scheduled])
        if not num_preempted and budget:
            self._admit(budget)
            num_scheduled += self.num_running - num_before
        state = self.state[:, :num_scheduled]
        request = state[_REQ].copy()
        query_len = state[_NEW].copy()
        context_len = state[_COMPUTED].copy()
        seconds = checked_seconds(
            self.step_seconds(query_len, context_len), self.recorder.num_steps
        )
        produces = self._produce(num_scheduled)
        self.recorder.add(
            request,
            query_len,
            context_len,
            produces,
            start_s=self.clock,
            seconds=seconds,
            num_blocks=self.pool.num_used,
            num_preempted=num_preempted,
        )
        self.clock += seconds
        self.last_s = seconds
        self._finish()

    def _plan_running(self) -> tuple[int, int]:
        """Share out the budget among the running, first ones first, and give them blocks.

        Returns how many of them are in the step and what is left of the budget.
        """
        settings, count = self.settings, self.num_running
        budget = settings.token_budget
        if not count:
            return 0, budget
        state = self.state[:, :count]
        new = state[_KNOWN] - state[_COMPUTED]
        if settings.num_speculative_tokens:
            new += state[_DRAFTS]
        if settings.long_prefill_token_threshold:
            np.minimum(new, settings.long_prefill_token_threshold, out=new)
        if settings.num_speculative_tokens and settings.max_model_len is not None:
            np.minimum(new, settings.max_model_len - 1 - state[_COMPUTED], out=new)
        total = int(new.sum())
        if total > budget:
            before = np.cumsum(new) - new
            np.clip(budget - before, 0, new, out=new)
            count = int(np.count_nonzero(new))
            total = budget
            state, new = state[:, :count], new[:count]
        state[_NEW] = new
        need = self._blocks_for(state[_COMPUTED] + new) - state[_BLOCKS]
        np.maximum(need, 0, out=need)
        num_needed = int(need.sum())
        if num_needed > self.pool.num_free:
            return self._plan_with_preemption(need), budget - total
        if num_needed:
            self._extend(state, need, num_needed)
        return count, budget - total

    def _blocks_for(self, tokens: Ints) -> Ints:
        """Blocks that hold so many computed tokens, and the slots ahead of them."""
        settings = self.settings
        if settings.num_speculative_tokens:
            tokens = tokens + settings.num_lookahead_tokens
            if settings.max_model_len is not None:
                tokens = np.minimum(tokens, settings.max_model_len)
        return -(-tokens // settings.block_size)

    def _extend(self, state: Ints, need: Ints, num_needed: int) -> None:
        if self.pool.tracks_blocks:
            ends = np.cumsum(need)
            within = np.arange(num_needed, dtype=np.int64) - np.repeat(ends - need, need)
            self.pool.place(np.repeat(state[_SLOT], need), np.repeat(state[_BLOCKS], need) + within)
        else:
            self.pool.take(num_needed)
        state[_BLOCKS] += need

    def _plan_with_preemption(self, need: Ints) -> int:
        """Give blocks one request after the other; who lacks some takes them from the last."""
        for index in range(len(need)):
            wanted = int(need[index])
            while wanted > self.pool.num_free:
                self._preempt_last()
                if self.num_running == index:
                    return index
            if wanted:
                self._extend(self.state[:, index : index + 1], need[index : index + 1], wanted)
            if self.num_running == index + 1:
                return index + 1
        return len(need)

    def _preempt_last(self) -> None:
        self.num_running -= 1
        last = self.state[:, self.num_running].tolist()
        request, slot = last[_REQ], last[_SLOT]
        if self.pool.tracks_blocks:
            self.pool.remember(request, slot, last[_FINAL] // self.settings.block_size)
        self.pool.release(slot, last[_BLOCKS])
        self.free_slots.append(slot)
        self.known_when_preempted[request] = last[_KNOWN]
        self.preempted.appendleft(request)

    def _admit(self, budget: int) -> None:
        """Start waiting requests, those preempted before those that never ran."""
        settings, pool = self.settings, self.pool
        while budget and self.num_running < settings.max_num_seqs:
            if self.preempted:
                request = self.preempted[0]
                known = self.known_when_preempted[request]
            elif (
                self.next_arrival < len(self.arrival)
                and self.arrival[self.next_arrival] <= self.clock
            ):
                request = self.next_arrival
                known = self.inputs[request]
            else:
                return
            # All but the last token at most: it must be computed for the logits.
            found = pool.find(request, known - 1)
            computed = len(found) * settings.block_size
            new = known - computed
            if settings.long_prefill_token_threshold:
                new = min(new, settings.long_prefill_token_threshold)
            new = min(new, budget)
            # Slots for drafts come with the first step that has drafts.
            num_blocks = -(-(computed + new) // settings.block_size)
            required = num_blocks
            if settings.scheduler_reserve_full_isl:
                required = max(required, -(-known // settings.block_size))
            if required - len(found) + pool.num_idle(found) > pool.num_free:
                self.head_lacks_blocks = True
                return
            if self.preempted:
                self.preempted.popleft()
                del self.known_when_preempted[request]
            else:
                self.next_arrival += 1
            self._start(request, known, found, new, num_blocks)
            budget -= new

    def _start(self, request: int, known: int, found: Ints, new: int, num_blocks: int) -> None:
        slot, count = self.free_slots.pop(), len(found)
        if count:
            self.pool.adopt(slot, found)
        column = self.state[:, self.num_running : self.num_running + 1]
        column[:, 0] = (
            request,
            count * self.settings.block_size,
            known,
            self.totals[request],
            count,
            slot,
            0,
            0,
            min(count, int(self.num_shared[request])),
            new,
        )
        if num_blocks > count:
            need = np.array([num_blocks - count], dtype=np.int64)
            self._extend(column, need, num_blocks - count)
        self._make_findable(column)
        self.num_running += 1

    def _make_findable(self, state: Ints) -> None:
        """Full blocks can be found once scheduled, by the next request of the same step."""
        if not self.pool.tracks_blocks:
            return
        # Drafts may be rejected, so only tokens that are known count.
        np.minimum(state[_COMPUTED] + state[_NEW], state[_KNOWN], out=state[_FINAL])
        if not self.shares:
            return
        full = np.minimum(state[_FINAL] // self.settings.block_size, self.num_shared[state[_REQ]])
        for index in np.flatnonzero(full > state[_SHARED]).tolist():
            end = int(full[index])
            request, slot = int(state[_REQ, index]), int(state[_SLOT, index])
            self.pool.commit(request, slot, int(state[_SHARED, index]), end)
            state[_SHARED, index] = end

    def _produce(self, num_scheduled: int) -> Ints:
        """What the step brings: (num_scheduled,) tokens of output."""
        settings, state = self.settings, self.state[:, :num_scheduled]
        computed, known = state[_COMPUTED], state[_KNOWN]
        computed += state[_NEW]
        if not settings.num_speculative_tokens:
            produces: Ints = (computed == known).astype(np.int64)
            known += produces
        else:
            num_drafts = computed - known
            done = num_drafts >= 0
            accepted = np.minimum(
                accepted_drafts(state[_REQ], known, settings), np.maximum(num_drafts, 0)
            )
            produces = np.minimum(1 + accepted, state[_TOTAL] - known) * done
            computed -= np.where(done, num_drafts - accepted, 0)
            known += produces
            state[_DRAFTS] = np.where(done, settings.num_speculative_tokens, 0)
        self.only_decodes = (
            num_scheduled == self.num_running
            and not settings.num_speculative_tokens
            and bool(produces.all())
        )
        return produces

    def _finish(self) -> None:
        state = self.state[:, : self.num_running]
        done = state[_KNOWN] == state[_TOTAL]
        if not done.any():
            return
        for index in np.flatnonzero(done).tolist():
            slot = int(state[_SLOT, index])
            self.pool.release(slot, int(state[_BLOCKS, index]))
            self.free_slots.append(slot)
        kept = state[:, ~done]
        self.num_running = kept.shape[1]
        self.state[:, : self.num_running] = kept
        self.head_lacks_blocks = False

    # A stretch of steps in which every running request decodes and nobody joins or leaves before
    # its last one.

    def _decode_on(self) -> bool:
        count = self.num_running
        if not count or count > self.settings.token_budget:
            return False
        until = math.inf
        if count < self.settings.max_num_seqs and not self.head_lacks_blocks:
            if self.preempted:
                return False
            if self.next_arrival < len(self.arrival):
                until = self.arrival[self.next_arrival]
                if until <= self.clock:
                    return False
        state = self.state[:, :count]
        num_steps = min(int((state[_TOTAL] - state[_KNOWN]).min()), max(_RUN_ENTRIES // count, 1))
        if until - self.clock < num_steps * self.last_s:
            num_steps = min(num_steps, int((until - self.clock) / self.last_s) + 2)
        num_steps = self._steps_with_blocks(state, num_steps)
        if not num_steps:
            return False
        seconds, starts = self._run_clock(state[_COMPUTED], num_steps, until)
        self._record_run(state, seconds, starts)
        self._finish()
        return True

    def _steps_with_blocks(self, state: Ints, num_steps: int) -> int:
        """So many steps, or fewer if the free blocks end before."""

        def needed(steps: int) -> int:
            held = -(-(state[_COMPUTED] + steps) // self.settings.block_size)
            return int((held - state[_BLOCKS]).sum())

        if needed(num_steps) <= self.pool.num_free:
            return num_steps
        low, high = 0, num_steps
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if needed(middle) <= self.pool.num_free else (low, middle)
        return low

    def _run_clock(self, context_lens: Ints, num_steps: int, until: float) -> tuple[Floats, Floats]:
        """(steps,) seconds each, (steps + 1,) starts and the end; none starts at `until`."""
        first = self.recorder.num_steps
        if self.runs is not None:
            seconds = np.asarray(self.runs.decode_run(context_lens, num_steps), np.float64)
            usable = np.isfinite(seconds) & (seconds > 0)
            if not usable.all():
                wrong = int(np.argmin(usable))
                checked_seconds(float(seconds[wrong]), first + wrong)
            starts = np.concatenate((np.array([self.clock]), seconds)).cumsum()
            count = min(1 + int(np.searchsorted(starts[1:], until, side="left")), num_steps)
            return seconds[:count], starts[: count + 1]
        query_lens = np.ones(len(context_lens), dtype=np.int64)
        times, ends = list[float](), [self.clock]
        for step in range(num_steps):
            times.append(
                checked_seconds(self.step_seconds(query_lens, context_lens + step), first + step)
            )
            ends.append(ends[-1] + times[-1])
            if ends[-1] >= until:
                break
        return np.array(times), np.array(ends)

    def _record_run(self, state: Ints, seconds: Floats, starts: Floats) -> None:
        num_steps = len(seconds)
        step = np.arange(num_steps, dtype=np.int64)[:, None]
        context = state[_COMPUTED] + step
        held = -(-(context + 1) // self.settings.block_size)
        before = self.pool.num_used - int(state[_BLOCKS].sum())
        if self.pool.tracks_blocks:
            held_before = np.vstack((state[_BLOCKS], held[:-1]))
            steps, rows = np.nonzero(held > held_before)
            self.pool.place(state[_SLOT, rows], held_before[steps, rows])
        else:
            self.pool.take(int(held[-1].sum() - state[_BLOCKS].sum()))
        self.recorder.add_decodes(
            state[_REQ],
            context,
            starts=starts[:-1],
            seconds=seconds,
            num_blocks=before + held.sum(axis=1),
        )
        state[_COMPUTED] += num_steps
        state[_KNOWN] += num_steps
        state[_BLOCKS] = held[-1]
        state[_FINAL] = state[_COMPUTED]
        self.last_s = float(seconds[-1])
        self.clock = float(starts[-1])
