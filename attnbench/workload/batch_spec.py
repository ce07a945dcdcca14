"""Batch specs: the requests of one engine step as one word.

The grammar and its meaning are those of vLLM's attention benchmarks
(`benchmarks/attention_benchmarks/batch_spec.py`): segments joined by `_`, each

    [count]q<query_len>[k][s<seq_len>[k]]

where `k` multiplies by 1024, `count` defaults to 1 and `seq_len` (all tokens of the request, the
new ones included) defaults to `query_len`:

    q2k              one prefill of 2048 tokens
    8q1s4k           eight decodes, each over 4096 tokens
    q4s1k            one request with 4 new tokens over 1020 cached ones (extend)
    2q2k_32q1s1k     two prefills and 32 decodes in one batch
"""

from __future__ import annotations

import itertools
import re

from attnbench.errors import WorkloadError
from attnbench.workload.types import BatchSpec, Phase, Request

GRAMMAR = "[count]q<query_len>[k][s<seq_len>[k]]"
EXAMPLE = "8q1s4k"
#: More requests than any engine schedules in one step: a spec above it is a typo.
MAX_REQUESTS = 65_536
#: Lengths and offsets are int32 in every engine.
MAX_TOKENS = 2**31 - 1

_SEGMENT = re.compile(r"([0-9]{0,18})q([0-9]{1,18})(k?)(?:s([0-9]{1,18})(k?))?")


def parse_batch_spec(text: str) -> BatchSpec:
    """The requests `text` stands for, in order.

    Raises:
        WorkloadError: it is not a batch spec; the message names the segment and where it starts.
    """
    if not text:
        raise WorkloadError(f"the batch spec is empty; expected {GRAMMAR}, e.g. {EXAMPLE}")
    requests: list[Request] = []
    position = 1
    for number, segment in enumerate(text.split("_"), start=1):
        where = f"batch spec {text!r}: segment {number} {segment!r} (at character {position})"
        count, request = _parse_segment(segment, where)
        if len(requests) + count > MAX_REQUESTS:
            raise WorkloadError(
                f"{where} makes more than {MAX_REQUESTS} requests; write a smaller count"
            )
        requests += [request] * count
        position += len(segment) + 1
    spec = BatchSpec(tuple(requests))
    check_batch_spec(spec)
    return spec


def _parse_segment(segment: str, where: str) -> tuple[int, Request]:
    match = _SEGMENT.fullmatch(segment)
    if match is None:
        raise WorkloadError(
            f"{where}: {_unexpected(segment)}; expected {GRAMMAR}, e.g. {EXAMPLE} or q2k"
        )
    count = int(match[1]) if match[1] else 1
    query_len = int(match[2]) * (1024 if match[3] else 1)
    seq_len = query_len if match[4] is None else int(match[4]) * (1024 if match[5] else 1)
    if count == 0:
        raise WorkloadError(
            f"{where}: the count is 0; leave it out for one request, e.g. {EXAMPLE}"
        )
    if query_len == 0:
        raise WorkloadError(f"{where}: query_len is 0; a request has at least q1, e.g. {EXAMPLE}")
    if seq_len < query_len:
        raise WorkloadError(
            f"{where}: seq_len {seq_len} is less than query_len {query_len}, but seq_len counts "
            f"the new tokens too; write s{query_len} or more, e.g. q{query_len}s{2 * query_len}"
        )
    return count, Request(query_len, seq_len)


def _unexpected(segment: str) -> str:
    """What stopped the reading of `segment`, and where in it."""
    if re.search(r"[0-9]{19}", segment):
        return "a number of more than 18 digits"
    # The longest beginning that some longer text could still complete.
    prefix = re.match(r"[0-9]*(?:q(?:[0-9]+k?(?:s(?:[0-9]+k?)?)?)?)?", segment)
    read = prefix.end() if prefix else 0
    if read == len(segment):
        return "it ends too early"
    return f"unexpected {segment[read]!r} at its character {read + 1}"


def check_batch_spec(spec: BatchSpec) -> None:
    """Raise WorkloadError unless `spec` could have been written as text."""
    if not spec.requests:
        raise WorkloadError(f"a batch spec needs at least one request, e.g. {EXAMPLE}")
    if len(spec.requests) > MAX_REQUESTS:
        raise WorkloadError(
            f"a batch spec of {len(spec.requests)} requests; at most {MAX_REQUESTS} are allowed"
        )
    for request in spec.requests:
        if not 1 <= request.query_len <= request.seq_len <= MAX_TOKENS:
            raise WorkloadError(
                f"request {_format_request(request)}: expected 1 <= query_len <= seq_len <= "
                f"{MAX_TOKENS}, e.g. {EXAMPLE}"
            )


def format_batch_spec(spec: BatchSpec) -> str:
    """The canonical text: consecutive equal requests merged, `k` wherever 1024 divides."""
    segments = []
    for request, group in itertools.groupby(spec.requests):
        count = sum(1 for _ in group)
        segments.append(f"{count if count > 1 else ''}{_format_request(request)}")
    return "_".join(segments)


def _format_request(request: Request) -> str:
    query = f"q{format_tokens(request.query_len)}"
    if request.seq_len == request.query_len:
        return query
    return f"{query}s{format_tokens(request.seq_len)}"


def format_tokens(tokens: int) -> str:
    """`4096` as `4k`, `1000` as `1000`."""
    return f"{tokens // 1024}k" if tokens and tokens % 1024 == 0 else str(tokens)


def request_phase(request: Request) -> Phase:
    """vLLM's classification of one request: `q1` alone is both, and counts as decode."""
    if request.query_len == 1:
        return Phase.DECODE
    if request.query_len == request.seq_len:
        return Phase.PREFILL
    return Phase.EXTEND


def batch_phase(spec: BatchSpec) -> Phase:
    """The phase all requests share, else mixed."""
    phases = {request_phase(request) for request in spec.requests}
    return phases.pop() if len(phases) == 1 else Phase.MIXED
