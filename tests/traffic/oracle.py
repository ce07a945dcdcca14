"""A slow, plain scheduler to compare with: lists of objects, one block and one token at a time.

Written from the rules (docs/traffic.md), not from the fast one: a block's contents are the very
tokens before its end, the free queue is a list, every request is asked one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from attnbench.traffic.schedule_settings import SchedulerSettings
from attnbench.traffic.types import Trace

Token = tuple[object, ...]
Entry = tuple[int, int, int, int]


@dataclass(eq=False)
class Block:
    users: int = 0
    contents: tuple[Token, ...] | None = None


@dataclass(eq=False)
class Job:
    number: int
    arrival: float
    tokens: list[Token]
    num_prompt: int
    num_output: int
    computed: int = 0
    drafts: int = 0
    blocks: list[Block] = field(default_factory=list)
    num_cached: int = 0


@dataclass
class Step:
    start: float
    seconds: float
    entries: list[Entry]
    blocks_used: int
    preempted: int


def uniform(seed: int, request: int, position: int) -> float:
    def mix(x: int) -> int:
        mask = 2**64 - 1
        x = (x + 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    first = mix((mix(seed) + request) % 2**64)
    return (mix((first + position) % 2**64) >> 11) / 2**53


class Oracle:
    def __init__(
        self,
        trace: Trace,
        settings: SchedulerSettings,
        step_seconds: Callable[[list[int], list[int]], float],
        num_blocks: int,
    ) -> None:
        self.s = settings
        self.step_seconds = step_seconds
        self.free = [Block() for _ in range(num_blocks)]
        self.num_blocks = num_blocks
        self.cached: list[Block] = []
        self.jobs = []
        for i in range(len(trace)):
            prompt: list[Token] = [("own", i, t) for t in range(int(trace.input_tokens[i]))]
            if trace.has_prefixes:
                ids = trace.hash_ids[trace.hash_offsets[i] : trace.hash_offsets[i + 1]].tolist()
                for t in range(min(len(prompt), len(ids) * trace.hash_block_tokens)):
                    prompt[t] = (ids[t // trace.hash_block_tokens], t)
            arrival, output = float(trace.arrival_s[i]), int(trace.output_tokens[i])
            self.jobs.append(Job(i, arrival, prompt, len(prompt), output))
        self.max_len = settings.max_model_len or 10**9
        method = settings.speculative_method
        self.lookahead = 0 if method == "ngram" else settings.num_speculative_tokens

    def allocate(self, job: Job, new: int, ahead: int, found: list[Block], whole: bool) -> bool:
        size = self.s.block_size
        computed = job.computed + len(found) * size

        def lacking(tokens: int) -> int:
            blocks = -(-tokens // size)
            missing = max(blocks - len(job.blocks) - len(found), 0)
            return missing + sum(block.users == 0 for block in found)

        slots = min(computed + new + ahead, self.max_len)
        if whole and lacking(min(len(job.tokens), self.max_len)) > len(self.free):
            return False
        if lacking(slots) > len(self.free):
            return False
        for block in found:
            if block.users == 0:
                self.free.remove(block)
            block.users += 1
            job.blocks.append(block)
        job.num_cached += len(found)
        while len(job.blocks) < -(-slots // size):
            block = self.free.pop(0)
            if block in self.cached:
                self.cached.remove(block)
            block.contents = None
            block.users = 1
            job.blocks.append(block)
        if self.s.enable_prefix_caching:
            for i in range(job.num_cached, min(computed + new, len(job.tokens)) // size):
                job.blocks[i].contents = tuple(job.tokens[: (i + 1) * size])
                self.cached.append(job.blocks[i])
                job.num_cached += 1
        return True

    def lookup(self, job: Job) -> list[Block]:
        if not self.s.enable_prefix_caching:
            return []
        size, found = self.s.block_size, list[Block]()
        for end in range(size, len(job.tokens), size):
            contents = tuple(job.tokens[:end])
            block = next((b for b in self.cached if b.contents == contents), None)
            if block is None:
                break
            found.append(block)
        if self.s.num_speculative_tokens and self.s.speculative_method == "eagle":
            found = found[:-1]
        return found

    def give_up(self, job: Job) -> None:
        for block in reversed(job.blocks):
            block.users -= 1
            if block.users == 0:
                self.free.append(block)
        job.blocks, job.num_cached = [], 0

    def run(self) -> list[Step]:
        s, clock, steps = self.s, 0.0, list[Step]()
        coming, waiting, running = list(self.jobs), list[Job](), list[Job]()
        while coming or waiting or running:
            if not waiting and not running:
                clock = max(clock, coming[0].arrival)
            while coming and coming[0].arrival <= clock:
                waiting.append(coming.pop(0))
            budget, plan, preempted = s.max_num_batched_tokens, list[tuple[Job, int]](), 0
            if s.num_speculative_tokens and s.speculative_method == "draft_model":
                budget -= s.max_num_seqs
            turn = 0
            while turn < len(running) and budget > 0:
                job = running[turn]
                new = len(job.tokens) + job.drafts - job.computed
                if s.long_prefill_token_threshold:
                    new = min(new, s.long_prefill_token_threshold)
                new = min(new, budget, self.max_len - 1 - job.computed)
                while not self.allocate(job, new, self.lookahead, [], False):
                    victim = running.pop()
                    self.give_up(victim)
                    victim.computed, victim.drafts = 0, 0
                    waiting.insert(0, victim)
                    preempted += 1
                    if victim is job:
                        break
                if job not in running:
                    break
                plan.append((job, new))
                budget -= new
                turn += 1
            while not preempted and waiting and budget > 0 and len(running) < s.max_num_seqs:
                job = waiting[0]
                found = self.lookup(job)
                new = len(job.tokens) - len(found) * s.block_size
                if s.long_prefill_token_threshold:
                    new = min(new, s.long_prefill_token_threshold)
                new = min(new, budget)
                if not self.allocate(job, new, 0, found, s.scheduler_reserve_full_isl):
                    break
                job.computed = len(found) * s.block_size
                running.append(waiting.pop(0))
                plan.append((job, new))
                budget -= new
            seconds = self.step_seconds([n for _, n in plan], [j.computed for j, _ in plan])
            used = self.num_blocks - len(self.free)
            step = Step(clock, seconds, [], used, preempted)
            for job, new in plan:
                context, made = job.computed, 0
                job.computed += new
                over = job.computed - len(job.tokens)
                if over >= 0:
                    draw = uniform(s.seed, job.number, len(job.tokens))
                    tries = range(1, s.num_speculative_tokens + 1)
                    accepted = min(sum(draw < s.acceptance_rate**i for i in tries), over)
                    job.computed -= over - accepted
                    left = job.num_prompt + job.num_output - len(job.tokens)
                    made = min(accepted + 1, left)
                    for _ in range(made):
                        job.tokens.append(("own", job.number, len(job.tokens)))
                job.drafts = s.num_speculative_tokens if over >= 0 else 0
                step.entries.append((job.number, new, context, made))
                if len(job.tokens) == job.num_prompt + job.num_output:
                    self.give_up(job)
                    running.remove(job)
            steps.append(step)
            clock += seconds
        return steps
