"""What a suite file needs to be an asv benchmark: a base class and one function. No torch.

    from attnbench.asv_bridge.suite_support import SweepBenchmark as _SweepBenchmark
    from attnbench.asv_bridge.suite_support import measure_once, SETUP_TIMEOUT_S

    def setup_cache() -> str:
        return measure_once(SUITE)

    setup_cache.timeout = SETUP_TIMEOUT_S

    class Decode(_SweepBenchmark, suite=SUITE):
        '''...'''

`setup_cache` is written in each file: asv keys it by file and line, so a shared one would run once,
for the first suite, and hand its data to all. The base class is imported under a name that starts
with an underscore, because asv collects every public class of a module.

Suites come from the working tree and this module from the commit under test: what is used above is
an interface between commits.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, ClassVar

from attnbench.asv_bridge.grid import current_grid, grid_id
from attnbench.store.record import Metric
from attnbench.workload import Suite

#: Seconds a suite's sweep may take under asv.
SETUP_TIMEOUT_S = 3 * 3600.0

#: What a `track_*` method returns: asv's form of a sampled result, or NaN for "not applicable".
Tracked = dict[str, Any] | float


def measure_once(suite: Suite) -> str:
    """Sweep `suite` once, in this process, and return the path of what `track_*` methods read.

    asv calls `setup_cache` in a process of its own; only there is torch imported.
    """
    from attnbench.asv_bridge.sweep import sweep_suite

    grid = current_grid()
    if grid is None:
        raise RuntimeError("setup_cache is asv's to call; use `attnbench asv run`")
    return str(sweep_suite(suite.name, grid, Path.cwd()))


def readings_file(folder: Path, metric: str) -> Path:
    """Where a sweep leaves `{workload: {backend: reading}}` of one metric.

    A reading is a list of samples in seconds, or a text: why there are none.
    """
    return folder / f"{metric}.json"


class SweepBenchmark:
    """Base of a suite's asv class: one `track_*` per metric, over workloads x backends."""

    params: ClassVar[list[list[str]]]
    param_names: ClassVar[list[str]] = ["workload", "backend"]
    unit: ClassVar[str] = "seconds"
    version: ClassVar[str]
    timeout: ClassVar[float] = 60.0

    def __init_subclass__(cls, *, suite: Suite) -> None:
        super().__init_subclass__()
        grid = current_grid()
        axes = grid.axes(suite.name) if grid is not None else None
        cls.params = [list(axes.workloads), list(axes.backends)] if axes else [[], []]
        cls.version = grid_id(suite.name)

    def track_attention(self, sweep: str, workload: str, backend: str) -> Tracked:
        """Seconds of the kernel calls of one layer, cache write excluded."""
        return _read(sweep, Metric.ATTENTION, workload, backend)

    def track_metadata_build(self, sweep: str, workload: str, backend: str) -> Tracked:
        """Seconds to build the metadata of one step."""
        return _read(sweep, Metric.METADATA_BUILD, workload, backend)

    def track_kv_cache_write(self, sweep: str, workload: str, backend: str) -> Tracked:
        """Seconds to write the new keys and values of one layer."""
        return _read(sweep, Metric.KV_CACHE_WRITE, workload, backend)


def _read(sweep: str, metric: str, workload: str, backend: str) -> Tracked:
    stored = json.loads(readings_file(Path(sweep), metric).read_text(encoding="utf-8"))
    reading = stored.get(workload, {}).get(backend, "not measured")
    if isinstance(reading, str):
        # Not an exception: one failed point would keep `asv continuous` from comparing the rest.
        print(f"{metric}: {reading}")  # shown by `asv run --show-stderr`
        return math.nan
    return {"samples": reading, "number": 1}
