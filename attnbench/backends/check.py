"""Whether a backend's output is right, and its LSE where it returns one: `check_output`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnbench.backends.dtypes import is_fp8, torch_dtype, unit_roundoff
from attnbench.backends.reference import ReferenceResult

_CHUNK_ROWS = 1 << 15


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputCheck:
    """Outcome of a comparison.

    max_abs_error: largest |output - reference| of one element; NaN if the output is not finite.
    rel_error: largest error of one (token, head) row relative to that row (see `row_tolerance`).
    reason: "" if ok, else what is wrong and in which request, for the stored row.
    """

    ok: bool
    max_abs_error: float
    rel_error: float
    reason: str


def row_tolerance(dtype: str, kv_cache_dtype: str) -> float:
    """Largest accepted |output - reference| / |reference| of one (token, head) row (2-norms).

    The rule is flash-attention's own (tests/test_flash_attn.py): at most twice the error of an
    honest implementation of the same precision. Honest here means: products accumulate in fp32,
    and the scaled query, the softmax weights and the output are each rounded to the dtype once.
    With u the dtype's unit roundoff (fp16 2^-11, bf16 2^-8), such emulations stay below 3 u on
    batches of `make_batch` up to 32k tokens, MLA in both forms included; hence 6 u.
    (flash-attention compares with torch code that rounds the logits too: 4 to 15 u here, which
    would hide more.)

    fp32: errors come from summation; 2e-5 is twice the largest seen, rounded up, and of the size of
    `torch.testing.assert_close`'s 1.3e-6 relative + 1e-5 absolute. TF32 tensor cores (u = 2^-11) do
    not pass: fp32 means fp32.

    fp8 cache: kernels may run on fp8 tensor cores, which rounds query and weights to e4m3
    (u = 2^-4): up to 0.14 in emulation, hence 4 * 2^-4 more. The stored K and V themselves cost
    nothing, since the reference uses the values as stored.
    """
    u = unit_roundoff(torch_dtype(dtype))
    tolerance = max(6 * u, 2e-5)
    if is_fp8(torch_dtype(kv_cache_dtype)):
        tolerance += 4 * unit_roundoff(torch.float8_e4m3fn)
    return tolerance


def lse_tolerance(dtype: str, kv_cache_dtype: str) -> float:
    """Largest accepted |lse - reference|, in nats: the rule of `row_tolerance` again.

    An LSE moves by at most what its logits move, and those by the rounding of the scaled query, a
    sum of as many random errors as the head has elements: the emulations stay below 3.5 u (fp8
    query and weights: 3 times e4m3's). fp32 sums as in `row_tolerance`.
    """
    u = unit_roundoff(torch_dtype(dtype))
    tolerance = max(7 * u, 2e-5)
    if is_fp8(torch_dtype(kv_cache_dtype)):
        tolerance += 6 * unit_roundoff(torch.float8_e4m3fn)
    return tolerance


def poison_(output: torch.Tensor) -> torch.Tensor:
    """Fill an output with NaN before a kernel writes it, so that unwritten elements show."""
    return output.fill_(float("nan"))


def check_output(
    output: torch.Tensor,
    reference: ReferenceResult,
    dtype: str,
    kv_cache_dtype: str,
    lse: torch.Tensor | None = None,
) -> OutputCheck:
    """Compare `output` (num_tokens, num_heads, v_head_size) with the reference, row by row.

    And `lse` (n, num_heads), natural logs of the first n tokens, where the kernel returned one.

    Every element must be finite: `poison_` the output before the kernel runs and an unwritten one
    is NaN. Each (token, head) row must be within `row_tolerance`; a row much smaller than the
    others (below a tenth of their root mean square) is measured against that tenth. Works through
    the rows in chunks of a few MB.

    What it can see: with the data of `make_batch` a row has a size of about half a value, so a
    wrong or missing key shows when its weight is above about 1.3 % in bf16, 0.2 % in fp16 and
    0.001 % in fp32. The keys at the edges of masks weigh about 20 % by construction; an ordinary
    key among 4,096 weighs 0.01 % and does not show in half precision unless a query was drawn
    towards it: check such a fault in fp32.
    """
    expected = reference.output
    if output.shape != expected.shape:
        return OutputCheck(
            ok=False,
            max_abs_error=float("nan"),
            rel_error=float("nan"),
            reason=f"output has shape {tuple(output.shape)}, expected {tuple(expected.shape)}",
        )
    tolerance = row_tolerance(dtype, kv_cache_dtype)
    rows, want = output.reshape(-1, output.shape[-1]), expected.view(-1, expected.shape[-1])
    num_heads = expected.shape[1]
    floor = 0.1 * float(want.square().sum(-1).mean().sqrt())
    worst, worst_row, max_abs = -1.0, 0, 0.0
    for first in range(0, len(rows), _CHUNK_ROWS):
        got = rows[first : first + _CHUNK_ROWS].to(want.device, torch.float64)
        right = want[first : first + _CHUNK_ROWS]
        finite = torch.isfinite(got).all(dim=-1)
        if not bool(finite.all()):
            row = first + int((~finite).nonzero()[0])
            return OutputCheck(
                ok=False,
                max_abs_error=float("nan"),
                rel_error=float("nan"),
                reason=f"not finite or not written in {_where(reference, row, num_heads)}",
            )
        error = got - right
        relative = error.norm(dim=-1) / right.norm(dim=-1).clamp_min(floor)
        max_abs = max(max_abs, float(error.abs().max()))
        value, index = relative.max(dim=0)
        if float(value) > worst:
            worst, worst_row = float(value), first + int(index)
    reason = ""
    if worst > tolerance:
        reason = (
            f"error {worst:.3g} of the row's size exceeds {tolerance:.3g} in "
            f"{_where(reference, worst_row, num_heads)} (max_abs_error {max_abs:.3g})"
        )
    elif lse is not None:
        reason = _wrong_lse(lse, reference, lse_tolerance(dtype, kv_cache_dtype))
    return OutputCheck(ok=not reason, max_abs_error=max_abs, rel_error=worst, reason=reason)


def _wrong_lse(lse: torch.Tensor, reference: ReferenceResult, tolerance: float) -> str:
    expected = reference.lse[: len(lse)]
    if lse.shape != expected.shape:
        return f"LSE has shape {tuple(lse.shape)}, expected {tuple(expected.shape)}"
    error = (lse.to(expected.device, torch.float64) - expected).abs().flatten()
    if not len(error):
        return ""
    # NaN compares as the largest.
    row = int(error.argmax())
    if float(error[row]) <= tolerance:
        return ""
    return (
        f"LSE is off by {float(error[row]):.3g}, more than {tolerance:.3g}, in "
        f"{_where(reference, row, expected.shape[1])}"
    )


def _where(reference: ReferenceResult, row: int, num_heads: int) -> str:
    token, head = divmod(row, num_heads)
    starts = reference.query_start_loc
    request = int(torch.searchsorted(starts, token, right=True)) - 1
    return f"request {request}, query token {token - int(starts[request])}, head {head}"
