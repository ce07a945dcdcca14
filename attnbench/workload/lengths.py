"""Seeded random sequence lengths: the same batch spec, with the ragged lengths traffic has.

What varies is the **context** (tokens already in the cache, `seq_len - query_len`), as with vLLM's
`--kv-len-jitter`; `query_len` stays. A request without context (a pure prefill, or an encoder
request) has only its new tokens to vary: its `query_len = seq_len` is drawn instead, at least 1.
Each draw has the mean the batch spec says.

- `geometric`: the number of failures before a success, as in a memoryless stream of tokens; cut at
  8 times its mean, which lowers the mean by about e^-8 = 0.03 %.
- `uniform:J` with 0 < J <= 1: whole numbers from (1-J) to (1+J) times the mean, both included.

A drawn context is never shorter than the common prefix: the part above the prefix is what is drawn
(geometric), or the interval is made narrower on both sides (uniform), so that the mean stays.

A draw depends on the seed and the request's index only, by SHA-256 and decimal arithmetic: the same
on every machine, in every Python and with every numpy; request `i` of two batch specs gets the same
quantile, so that sweeps over shapes, batch sizes and contexts differ in nothing but what is swept.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from decimal import Context, Decimal

from attnbench.errors import WorkloadError
from attnbench.workload.types import Request

EXPECTED = "geometric or uniform:J with 0 < J <= 1"
EXAMPLE = "lengths=uniform:0.5"
GEOMETRIC_CUT = 8

_UNIFORM = re.compile(r"uniform:([0-9]*\.?[0-9]+(?:e-?[0-9]+)?)")
# Decimal.ln is correctly rounded, so that no C library's log decides where a draw is cut.
_DECIMAL = Context(prec=30)


def normalise_lengths(text: str) -> str:
    """The one spelling of `text`: `uniform:.50` is `uniform:0.5`; `""` and `geometric` as they are.

    Raises:
        WorkloadError: it is neither.
    """
    if text in ("", "geometric"):
        return text
    match = _UNIFORM.fullmatch(text)
    jitter = float(match[1]) if match else 0.0
    if not 0.0 < jitter <= 1.0:
        raise WorkloadError(f"lengths={text}: expected {EXPECTED}, e.g. {EXAMPLE}")
    return f"uniform:{repr(jitter).removesuffix('.0')}"


def draw_lengths(
    requests: Sequence[Request], lengths: str, seed: int, common_prefix_len: int = 0
) -> tuple[Request, ...]:
    """`requests` with the lengths that `lengths` (normalised) and `seed` give them."""
    if not lengths:
        return tuple(requests)
    drawn = []
    for index, request in enumerate(requests):
        quantile = _quantile(seed, index)
        context = request.seq_len - request.query_len
        if context:
            context = _draw(lengths, quantile, context, common_prefix_len)
            drawn.append(Request(request.query_len, context + request.query_len))
        else:
            tokens = _draw(lengths, quantile, request.query_len, 1)
            drawn.append(Request(tokens, tokens))
    return tuple(drawn)


def _quantile(seed: int, index: int) -> Decimal:
    """A number in (0, 1), uniform on the odd multiples of 2**-65."""
    digest = hashlib.sha256(f"attnbench lengths {seed} {index}".encode()).digest()
    odd = 2 * int.from_bytes(digest[:8], "big") + 1
    return _DECIMAL.divide(Decimal(odd), Decimal(2**65))


def _draw(lengths: str, quantile: Decimal, mean: int, at_least: int) -> int:
    """A whole number >= `at_least` with the given mean (`mean` >= `at_least`)."""
    if lengths == "geometric":
        return at_least + _geometric(quantile, mean - at_least)
    jitter = Decimal(lengths.removeprefix("uniform:"))
    spread = min(int(_DECIMAL.multiply(jitter, mean)), mean - at_least)
    return mean - spread + int(_DECIMAL.multiply(quantile, 2 * spread + 1))


def _geometric(quantile: Decimal, mean: int) -> int:
    """Failures before the first success, with this mean, by inversion; cut at 8 times the mean."""
    if mean == 0:
        return 0
    ratio = _DECIMAL.divide(Decimal(mean + 1), Decimal(mean))  # 1 / (1 - p)
    draw = _DECIMAL.divide(-_DECIMAL.ln(quantile), _DECIMAL.ln(ratio))
    return min(int(draw), GEOMETRIC_CUT * mean)
