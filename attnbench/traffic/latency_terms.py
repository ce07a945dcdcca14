"""Terms that a kernel's time may be a sum of. docs/itl.md says why each is there.

Which of them a kernel has, and with which factor, is fitted to its measured batches. They are
computed from `NUMBERS` of a step: of its entries of at most `SHORT_QUERY` new tokens ("short"), and
of its longer ones ("long").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from attnbench.traffic.latency_costs import LayerCosts, maxima, sums
from attnbench.traffic.reduce_features import SHORT_QUERY
from attnbench.traffic.types import Floats, Ints
from attnbench.workload import Workload

#: New tokens that a block of a kernel for prompts works on.
_TILES = (16, 32, 64, 128)
NUMBERS = (
    *("one", "short_reqs", "short_tokens", "short_reads", "short_longest", "short_work"),
    *("long_reqs", "long_tokens", "long_reads", "long_longest"),
    *("long_pairs", "most_pairs", "most_tokens"),
    *(f"tiles_{tile}" for tile in _TILES),
    *(f"work_{tile}" for tile in _TILES),
)
_AT = {name: index for index, name in enumerate(NUMBERS)}
#: Multiprocessors that kernels' heuristics ask for: of an A100, an H100 or H200, a B200.
_NUM_SMS = (108, 132, 148)
#: Units that share all work, against the one that has the longest entry: half octaves.
_UNITS = tuple(2.0 ** (half / 2) for half in range(19))
#: Pairs that take as long to multiply as one token takes to read.
_PAIRS_PER_READ = tuple(2.0 ** (half / 2) for half in range(4, 19))
#: How often all multiprocessors are taken when a kernel no longer splits a context.
_FULL = (0.8, 1.0, 2.0, 4.0)
_PADDED = {"short_reqs": (8, 16), "long_tokens": (64, 128, 256, 512)}

#: (num_steps,) of a term, from a function that gives (num_steps,) of a number by its name.
Term = Callable[[Callable[[str], Floats]], Floats]


def numbers_of_entries(
    step_offsets: Ints, query_len: Ints, context_len: Ints, costs: LayerCosts
) -> Floats:
    """(num_steps, len(NUMBERS)).

    `reads` are tokens read, `work` tiles times what a tile in the middle of its causal prompt
    reads; `longest` and `most` are of one entry.
    """
    short = (query_len <= SHORT_QUERY).astype(np.int64)
    long = 1 - short
    reads = costs.tokens_read(query_len, context_len)
    pairs = long * costs.pairs(query_len, context_len)
    seen = np.maximum(reads - query_len // 2, 1)
    tiles = [long * -(-query_len // tile) for tile in _TILES]
    columns = (
        np.ones(len(step_offsets) - 1, dtype=np.int64),
        sums(short, step_offsets),
        sums(short * query_len, step_offsets),
        sums(short * reads, step_offsets),
        maxima(short * reads, step_offsets),
        sums(short * seen, step_offsets),
        sums(long, step_offsets),
        sums(long * query_len, step_offsets),
        sums(long * reads, step_offsets),
        maxima(long * reads, step_offsets),
        sums(pairs, step_offsets),
        maxima(pairs, step_offsets),
        maxima(long * query_len, step_offsets),
        *(sums(of_tile, step_offsets) for of_tile in tiles),
        *(sums(of_tile * seen, step_offsets) for of_tile in tiles),
    )
    return np.stack([column.astype(np.float64) for column in columns], axis=1)


def number(numbers: Floats, name: str) -> Floats:
    """(num_steps,) of one of `NUMBERS`."""
    column: Floats = numbers[:, _AT[name]]
    return column


def term_values(terms: Sequence[Term], numbers: Floats) -> Floats:
    """(num_steps, num_terms), none negative."""
    values = np.empty((len(numbers), len(terms)))
    for index, term in enumerate(terms):
        values[:, index] = term(lambda name: number(numbers, name))
    return values


def terms_of(layer: Workload) -> tuple[tuple[Term, ...], ...]:
    """Terms that a kernel of this layer may have: simple ones, and what is added for others.

    Three groups: sums; what is later than something else, and padded counts; switches and waves.
    """
    shape = layer.shape
    many = {2**power for power in range(8)}
    many |= {int(full * sms / shape.num_kv_heads) for sms in _NUM_SMS for full in _FULL}
    waves = {
        full * sms / heads
        for sms in _NUM_SMS
        for heads in (shape.num_heads, shape.num_kv_heads)
        for full in (1, 2)
    }
    return (
        tuple(_plain(name) for name in NUMBERS),
        (
            *(_padded(name, size) for name, sizes in _PADDED.items() for size in sizes),
            *(_memory_or_matrix(pairs) for pairs in _PAIRS_PER_READ),
            *_critical_paths(),
        ),
        (
            *(term for count in sorted(many - {0}) for term in _split_up_to(count)),
            *(_waves(tile, size) for tile in _TILES[2:] for size in sorted(waves)),
        ),
    )


def _plain(name: str) -> Term:
    return lambda row: row(name)


def _padded(name: str, size: int) -> Term:
    """A count that a captured graph or a tile rounds up."""
    return lambda row: np.ceil(row(name) / size) * size


def _memory_or_matrix(pairs_per_read: float) -> Term:
    """The roofline of the whole step."""
    return lambda row: np.maximum(
        row("short_reads") + row("long_reads"), row("long_pairs") / pairs_per_read
    )


def _longest_of(kinds: Sequence[str], row: Callable[[str], Floats]) -> Floats:
    longest = row(f"{kinds[0]}_longest")
    for kind in kinds[1:]:
        longest = np.maximum(longest, row(f"{kind}_longest"))
    return longest


def _later(work: Sequence[str], kinds: Sequence[str], units: float) -> Term:
    """All `work` on `units`, or the longest entry on one of them, whichever ends later."""

    def term(row: Callable[[str], Floats]) -> Floats:
        total = row(work[0])
        for name in work[1:]:
            total = total + row(name)
        return np.maximum(total, units * _longest_of(kinds, row))

    return term


def _critical_paths() -> list[Term]:
    both = ("short", "long")
    found: list[Term] = [lambda row: _longest_of(both, row)]
    for units in _UNITS:
        found.append(_later(("short_reads",), ("short",), units))
        found.append(
            lambda row, units=units: np.maximum(  # type: ignore[misc]
                row("long_pairs"), units * row("most_pairs")
            )
        )
        for tile in _TILES:
            found.append(_later((f"work_{tile}",), ("long",), units))
            found.append(_later(("short_work", f"work_{tile}"), both, units))
    return found


def _split_up_to(count: int) -> list[Term]:
    """A kernel that splits contexts over idle multiprocessors while requests are at most `count`:
    both sides have their own cost of a step, of reads, of the longest and of the later of them."""

    def few(term: Term) -> Term:
        return lambda row: (row("short_reqs") <= count) * term(row)

    def many(term: Term) -> Term:
        return lambda row: (row("short_reqs") > count) * term(row)

    either = [
        *(_plain("one"), _plain("short_reads"), _plain("short_longest")),
        *(_later(("short_reads",), ("short",), units) for units in _UNITS[:17:4]),
    ]
    waves: Term = lambda row: row("short_longest") * np.ceil(row("short_reqs") / count)  # noqa: E731
    return [*(few(term) for term in either), *(many(term) for term in either), many(waves)]


def _waves(tile: int, size: float) -> Term:
    """The work of prompts in whole waves of `size` tiles."""
    count, work = f"tiles_{tile}", f"work_{tile}"
    return lambda row: np.ceil(row(count) / size) * size * row(work) / np.maximum(row(count), 1.0)
