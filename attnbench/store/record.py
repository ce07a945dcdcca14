"""The one record both halves meet in: the measuring half writes it, the judging half reads it.

One `Measurement` is one row: one point, metric and replicate. Seconds, bytes and hertz; the unit is
in the field name. Derived numbers (TFLOP/s, GB/s, tokens/s, ITL) are computed by the reader and
never stored. No torch here, and nothing that loads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime
from enum import StrEnum

from attnbench.workload.identity import short_hash as short_hash

#: What the numbers mean. It changes when a change of the method makes old and new incomparable.
PROTOCOL_VERSION = 1


#: Replicates numbered from here on were measured by the build before the one under test, in turn
#: with it: rows of another commit or stack, which say nothing of this run's own.
FIRST_REFERENCE = 200


class Status(StrEnum):
    """How a planned point ended. Only OK and NOISY carry samples."""

    OK = "OK"
    NOISY = "NOISY"  # correct and timed, but the stopping criterion was not met within the budget
    UNTIMED = "UNTIMED"  # correct, but this machine cannot time it (Triton's interpreter)
    UNSUPPORTED = "UNSUPPORTED"  # the backend refuses the workload; `reasons` has every reason
    INCORRECT = "INCORRECT"
    OOM = "OOM"
    TIMEOUT = "TIMEOUT"
    CRASH = "CRASH"
    THROTTLED = "THROTTLED"
    ERROR = "ERROR"

    @property
    def is_timed(self) -> bool:
        return self in (Status.OK, Status.NOISY)


class Metric(StrEnum):
    """What was timed. All in seconds per call."""

    ATTENTION = "attention"  # the kernel call(s) of one layer, cache write excluded
    HOST = "host"
    KV_CACHE_WRITE = "kv_cache_write"
    METADATA_BUILD = "metadata_build"
    PAGE_GATHER = "page_gather"  # the part of `attention` spent copying pages out of the KV cache
    STEP = "step"


def workload_id(workload: str) -> str:
    """Identity of a workload: its canonical text."""
    return short_hash("workload", workload)


def point_id(workload: str, backend: str, variant: str) -> str:
    """Identity of a point: canonical workload text, backend name and variant."""
    return short_hash("point", workload, backend, variant)


def stack_id(stack: tuple[str, ...]) -> str:
    """Identity of a stack: the sorted `name==version` list."""
    return short_hash("stack", *sorted(stack))


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One row of the store. Field order is column order; field names are column names."""

    # keys
    run_id: str
    point_id: str
    workload_id: str
    replicate: int = 0

    # identity: what was measured
    workload: str  # canonical text
    backend: str
    variant: str = ""
    suite: str = ""  # a tag, part of no key
    batch_spec: str
    shape: str  # name of the attention shape, "" if given by numbers
    tensor_parallel_size: int = 1
    num_layers: int = 1
    num_heads: int
    num_kv_heads: int
    head_size: int
    v_head_size: int
    kv_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    dtype: str
    kv_cache_dtype: str
    block_size: int
    kv_cache_layout: str = "NHD"
    attn_type: str = "decoder"
    sliding_window: int = 0  # 0: none
    logits_soft_cap: float = 0.0  # 0: none
    has_sink: bool = False
    use_alibi: bool = False
    common_prefix_len: int = 0
    lengths: str = ""  # how sequence lengths were drawn; "": exactly as the batch spec says
    seed: int = 0
    phase: str
    num_reqs: int
    num_tokens: int  # query tokens of one call
    topk_tokens: int = 0  # cached tokens each query attends to; 0: dense
    topk_pattern: str = ""

    # what came out
    metric: str
    unit: str = "s"
    samples: tuple[float, ...] = ()
    sm_clock_hz: tuple[float, ...] = ()
    kernel_names: tuple[str, ...] = ()
    bytes_moved: int = 0
    flops: int = 0

    # how
    timer: str = ""
    timer_floor_s: float | None = None
    l2_state: str = ""
    reuse_distance_bytes: int | None = None
    execution: str = "eager"
    protocol_version: int = PROTOCOL_VERSION
    stop_reason: str = ""
    discarded: int = 0
    started_at: datetime  # UTC
    duration_s: float = 0.0

    # on what
    device_kind: str  # cpu, cuda, rocm
    device_name: str
    device_class: str  # slug that makes series comparable, e.g. `cpu-xeon-2c`, `h200`
    device_uuid: str = ""
    compute_capability: str = ""
    driver_version: str = ""
    cuda_version: str = ""
    hostname: str = ""
    container_digest: str = ""
    conditions_before: Mapping[str, float] = field(default_factory=dict)  # unit in each key
    conditions_after: Mapping[str, float] = field(default_factory=dict)
    throttle_reasons: tuple[str, ...] = ()
    stack: tuple[str, ...] = ()
    stack_id: str = ""
    harness_version: str = ""

    # of what
    commit: str = ""
    commit_time: datetime | None = None
    commit_subject: str = ""  # first line of the commit's message
    subject: str = "attnbench"  # what is under test

    # outcome
    status: str
    reasons: tuple[str, ...] = ()
    max_abs_error: float | None = None
    rel_error: float | None = None
    checked: tuple[
        str, ...
    ] = ()  # where the output was compared: before, after, after_graph_replay

    @property
    def key(self) -> tuple[str, ...]:
        """A row's key: no two rows of a store share it."""
        return (
            self.run_id,
            self.point_id,
            self.metric,
            self.timer,
            self.l2_state,
            self.execution,
            str(self.replicate),
        )


#: A series is one point and metric over commits or stacks; these columns identify it. A different
#: timer, L2 state, execution mode, protocol or device is a different series: never compared.
SERIES_KEY = (
    "point_id",
    "metric",
    "timer",
    "l2_state",
    "execution",
    "device_class",
    "protocol_version",
)

COLUMNS = tuple(f.name for f in fields(Measurement))
