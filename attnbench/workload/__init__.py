"""What to measure: batch specs, attention shapes, workloads and suites; no torch here."""

from __future__ import annotations

from attnbench.workload.batch_spec import format_batch_spec, parse_batch_spec
from attnbench.workload.ranges import expand_ranges
from attnbench.workload.shapes import get_shape, shape_names
from attnbench.workload.suite import Suite, expand_workloads, load_suites
from attnbench.workload.types import AttentionShape, AttentionType, BatchSpec, Phase, Request
from attnbench.workload.workload import Workload

__all__ = [
    "AttentionShape",
    "AttentionType",
    "BatchSpec",
    "Phase",
    "Request",
    "Suite",
    "Workload",
    "expand_ranges",
    "expand_workloads",
    "format_batch_spec",
    "get_shape",
    "load_suites",
    "parse_batch_spec",
    "shape_names",
]
