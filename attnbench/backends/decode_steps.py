"""Decode steps that are fed by their own output, as generation is.

After the call that a workload describes, every request grows by one token at a time. What the token
is follows from what the kernel gave for the one before:

1. `x`: the output of the request's last token, all heads beside each other, in float64, divided by
   its root mean square.
2. Query, key and value (MLA: query, latent and rotary key) are the first elements of `O x`, where
   `O` is an orthogonal map of its own for each of the three, drawn from a fixed seed (`FixedMap`):
   an error in `x` is passed on as large as it is. Where more elements are needed than `x` has,
   several such maps follow each other.
3. Key and value are rounded to what the cache holds, the query to the dtype; the query is that of
   `make_queries`, with step 2 in place of its noise: it also leans towards its own key, a random
   earlier one, and both sides of a window's edge, so that a wrong mask shows in every step.

Each step is a batch like any other: `reference_attention` of it is the truth for these very inputs,
and the same chain over the reference's outputs is the truth for a whole generation. All numbers
depend on the workload's text and on the outputs fed, not on the order of requests in the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from attnbench.backends.batch import AttentionBatch, roundings, topk_indices_of
from attnbench.backends.metadata import CommonAttentionMetadata
from attnbench.backends.paging import NULL_BLOCK
from attnbench.backends.queries import make_queries
from attnbench.backends.token_pool import BatchTokens, TokenPool, seeded_generator
from attnbench.errors import WorkloadError
from attnbench.workload.types import AttentionType, Request


class FixedMap:
    """An orthogonal map of `size` numbers: shuffled, their signs drawn, then every `block` of them
    mixed by one random orthogonal matrix. The same for the same name and sizes, everywhere.
    """

    def __init__(self, name: str, size: int, block: int) -> None:
        generator = seeded_generator("fixed map", name, str(size), str(block))
        self._order = torch.randperm(size, generator=generator)
        self._signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
        square = torch.randn((block, block), generator=generator, dtype=torch.float64)
        # Columns up to their sign: fixed, or two LAPACKs would give two maps.
        factor, upper = torch.linalg.qr(square)
        self._mix = factor * upper.diagonal().sign()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`O x` for each row of (n, size) float64."""
        shuffled = x[:, self._order.to(x.device)] * self._signs.to(x.device)
        mixed: torch.Tensor = shuffled.view(len(x), -1, len(self._mix)) @ self._mix.to(x.device)
        return mixed.view_as(x)


@lru_cache(maxsize=64)
def _fixed_map(name: str, size: int, block: int) -> FixedMap:
    return FixedMap(name, size, block)


def project(x: torch.Tensor, part: str, size: int, block: int) -> torch.Tensor:
    """(n, size) numbers made of (n, m) ones by the fixed maps of `part`."""
    count = math.ceil(size / x.shape[1])
    maps = [_fixed_map(f"{part} {i}", x.shape[1], block) for i in range(count)]
    return torch.cat([fixed(x) for fixed in maps], dim=1)[:, :size]


class DecodeSteps:
    """The steps after `batch`: `feed` an output, get the next step's batch.

    Args:
        batch: the first call.
        num_steps: how many may follow it.

    Attributes:
        first: `batch`, with so many more blocks in its cache that every step has room.
        fresh_blocks: those blocks. No block table leads to one before a step needs it; fill them
            (`kv_cache.fill_fresh_blocks`) before the first step.

    Raises:
        WorkloadError: only decoders generate.
    """

    def __init__(self, batch: AttentionBatch, num_steps: int) -> None:
        if batch.attn_type is not AttentionType.DECODER:
            raise WorkloadError(
                f"attn={batch.attn_type}: only decoder attention has steps; use --steps 0"
            )
        block_size = batch.spec.block_size
        self._seq_lens = torch.tensor([r.seq_len for r in batch.requests])
        have = -(-self._seq_lens // block_size)
        need = -(-(self._seq_lens + num_steps) // block_size)
        extra = int((need - have).sum())
        order = torch.randperm(extra, generator=seeded_generator(batch.workload.id, "fresh blocks"))
        fresh = order + batch.num_blocks
        self._table = torch.full((len(have), int(need.max())), NULL_BLOCK, dtype=torch.int32)
        old = batch.metadata.block_table_tensor.cpu()
        taken = 0
        for row, (kept, total) in enumerate(zip(have.tolist(), need.tolist(), strict=True)):
            self._table[row, :kept] = old[row, :kept]
            self._table[row, kept:total] = fresh[taken : taken + total - kept]
            taken += total - kept
        self.first = replace(batch, num_blocks=batch.num_blocks + extra)
        self.fresh_blocks = fresh.to(batch.device)
        self._num_steps = num_steps
        self._fed_keys: list[torch.Tensor] = []
        self._fed_values: list[torch.Tensor] = []
        self._latest = batch

    def feed(self, output: torch.Tensor) -> AttentionBatch:
        """The batch of the next step.

        Args:
            output: (num_tokens, num_heads, v_head_size) of the step before, finite.
        """
        batch, step = self._latest, len(self._fed_keys) + 1
        assert step <= self._num_steps, "no room was made for this step"
        last = batch.metadata.query_start_loc[1:].long() - 1
        x = output[last].double().flatten(1)
        x = x / x.square().mean(dim=1, keepdim=True).sqrt().clamp_min(1e-30)
        shape, layer = batch.shape, batch.layer
        features: tuple[tuple[int, ...], tuple[int, ...]]
        if shape.is_mla:
            features = ((shape.kv_lora_rank,), (1, shape.qk_rope_head_dim))
        else:
            features = (
                (shape.num_kv_heads, shape.head_size),
                (shape.num_kv_heads, shape.v_head_size),
            )
        block = shape.v_head_size
        new = [
            round_to(project(x, part, math.prod(size), block).view(-1, *size))
            for part, size, round_to in zip(
                ("key", "value"), features, roundings(batch.spec, layer), strict=True
            )
        ]
        self._fed_keys.append(new[0])
        self._fed_values.append(new[1])
        requests = tuple(Request(1, int(n) + step) for n in self._seq_lens)
        tokens = self._tokens()
        topk_indices = topk_indices_of(
            batch.workload,
            requests,
            [("step", str(step), str(int(first))) for first in tokens.first_own_id],
        )
        rows = project(x, "query", shape.num_heads * shape.qk_head_dim, block)
        query = make_queries(
            requests,
            shape,
            batch.attn_type,
            batch.spec.dtype,
            tokens,
            layer.W_UK,
            [
                seeded_generator(batch.workload.id, "step", str(step), str(int(first)))
                for first in tokens.first_own_id
            ],
            list(rows.view(-1, 1, shape.num_heads, shape.qk_head_dim)),
            topk_indices,
        )
        metadata = self._metadata(step)
        if topk_indices is not None:
            metadata = metadata.replace(topk_indices_buffer=topk_indices.to(batch.device))
        self._latest = replace(
            self.first,
            requests=requests,
            query=query,
            key=new[0],
            value=new[1],
            metadata=metadata,
            tokens=tokens,
        )
        return self._latest

    def _tokens(self) -> FedTokens:
        base = self.first.tokens
        return FedTokens(
            key_pool=FedPool(base.key_pool, torch.stack(self._fed_keys, dim=1)),
            value_pool=FedPool(base.value_pool, torch.stack(self._fed_values, dim=1)),
            num_shared=base.num_shared,
            device=base.device,
            first_own_id=base.first_own_id,
            first_fed=self._seq_lens.to(base.device),
            num_fed=len(self._fed_keys),
        )

    def _metadata(self, step: int) -> CommonAttentionMetadata:
        common, device = self.first.metadata, self.first.device
        block_size, count = self.first.spec.block_size, len(self._seq_lens)
        seq_lens = (self._seq_lens + step).to(torch.int32)
        used = -(-seq_lens // block_size)
        width = int(used.max())
        table = self._table[:, :width].masked_fill(torch.arange(width) >= used[:, None], NULL_BLOCK)
        own = (seq_lens - 1).long()
        block = table.long().gather(1, (own // block_size)[:, None])[:, 0]
        starts = torch.arange(count + 1, dtype=torch.int32)
        return common.replace(
            query_start_loc=starts.to(device),
            query_start_loc_cpu=starts,
            seq_lens=seq_lens.to(device),
            seq_lens_cpu=seq_lens,
            num_actual_tokens=count,
            max_query_len=1,
            max_seq_len=int(seq_lens.max()),
            block_table_tensor=table.to(device),
            slot_mapping=(block * block_size + own % block_size).to(device),
        )


#: Ids of fed tokens count from here: behind those of any pool.
_FIRST_FED_ID = 1 << 40


class FedPool(TokenPool):
    """A pool, and behind it the tokens that were fed: (num_reqs, num_fed, *features)."""

    def __init__(self, pool: TokenPool, fed: torch.Tensor) -> None:
        self._pool = pool
        self._fed = fed.flatten(0, 1)

    def take(self, ids: torch.Tensor, heads: torch.Tensor | None = None) -> torch.Tensor:
        is_fed = ids >= _FIRST_FED_ID
        base = self._pool.take(ids.masked_fill(is_fed, 0), heads)
        row = (ids - _FIRST_FED_ID).clamp_min(0)
        fed = self._fed[row] if heads is None else self._fed[row, heads]
        if heads is not None:
            is_fed = is_fed | torch.zeros_like(heads, dtype=torch.bool)  # one for each head
        return torch.where(is_fed.view(*is_fed.shape, *[1] * (fed.dim() - is_fed.dim())), fed, base)


@dataclass(kw_only=True)
class FedTokens(BatchTokens):
    """Positions from `first_fed` (num_reqs,) on are the `num_fed` tokens that were fed.

    The one behind them, which comes next, is not known yet: that of the first call stands for it.
    """

    first_fed: torch.Tensor
    num_fed: int

    def ids(self, request: int | torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        behind = positions - self.first_fed[request]
        fed = _FIRST_FED_ID + request * self.num_fed + behind
        next_one = super().ids(request, torch.minimum(positions, self.first_fed[request]))
        return torch.where((behind >= 0) & (behind < self.num_fed), fed, next_one)
