"""Timer `graph`: events inside one captured CUDA graph, so that the host has no part in it.

Every sample in the graph has its own pair of events, and its own copy of the data or its own flush:
a graph that replays over one input reads a hot cache and calls it a kernel's time.
"""

from __future__ import annotations

import torch

from attnbench.errors import TimerError
from attnbench.measure.gpu.layout import enqueue_samples, plan_layout
from attnbench.measure.gpu.runtime import Event, GpuRuntime, Graph
from attnbench.measure.gpu.throttle import ThrottleGuard
from attnbench.measure.gpu.trace import kernel_names, sample_kernels
from attnbench.measure.sampling import Block, Target

_BLOCK_S = 0.02
_MAX_SAMPLES = 64
_WARM_UP_CALLS = 3


class GraphSession:
    """Replays of one graph of `count` samples.

    Raises:
        TimerError: the call cannot be captured, or the graph launches other kernels than the call.
    """

    execution = "graph"

    def __init__(
        self, gpu: GpuRuntime, target: Target, l2_state: str, throttle: ThrottleGuard
    ) -> None:
        self._gpu = gpu
        self._throttle = throttle
        self._layout = plan_layout(target, gpu, l2_state, prefer_rotation=True)
        self.l2_state = self._layout.l2_state
        self.reuse_distance_bytes = self._layout.reuse_distance_bytes
        self._count = self._choose_count()
        # Before the capture: what a captured call returned must stay what its replays write to.
        self.kernel_names = self._eager_kernels(target)
        self._starts = [gpu.new_event() for _ in range(self._count)]
        self._ends = [gpu.new_event() for _ in range(self._count)]
        self._graph = self._capture(self._starts, self._ends)
        self._graph.replay()
        gpu.synchronize()
        self._compare_kernels()

    def now_s(self) -> float:
        return self._gpu.now_s()

    def _choose_count(self) -> int:
        """Samples in a graph: whole turns of the rotation, for a block of a few milliseconds."""
        gpu, turn = self._gpu, len(self._layout.calls)
        for _ in range(_WARM_UP_CALLS):
            enqueue_samples(gpu, self._layout, turn)
        gpu.synchronize()
        started = gpu.now_s()
        enqueue_samples(gpu, self._layout, turn)
        gpu.synchronize()
        turn_s = max(gpu.now_s() - started, 1e-6)
        turns = max(1, min(_MAX_SAMPLES // turn, int(_BLOCK_S / turn_s)))
        return turns * turn

    def _capture(self, starts: list[Event], ends: list[Event]) -> Graph:
        def enqueue() -> None:
            enqueue_samples(
                self._gpu,
                self._layout,
                self._count,
                [event.record for event in starts],
                [event.record for event in ends],
            )

        try:
            return self._gpu.capture(enqueue)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            first = (str(error).splitlines() or [""])[0]
            raise TimerError(
                f"the call cannot be captured in a graph ({first}); use --timer event"
            ) from error

    def _eager_kernels(self, target: Target) -> tuple[str, ...]:
        """Names of one call's kernels; none where kernels cannot be traced."""
        gpu = self._gpu
        if gpu.trace_missing:
            return ()
        with gpu.trace() as records:
            gpu.stamp(0)
            target.call()
            gpu.stamp(1)
        return kernel_names(sample_kernels(records, gpu.mark_name, 1)[0])

    def _compare_kernels(self) -> None:
        """Every sample of the graph must run the kernels of the call."""
        gpu = self._gpu
        if gpu.trace_missing:
            return
        with gpu.trace() as records:
            self._graph.replay()
        for kernels in sample_kernels(records, gpu.mark_name, self._count):
            if (captured := kernel_names(kernels)) != self.kernel_names:
                raise TimerError(
                    f"the graph runs {list(captured)}, the call {list(self.kernel_names)}: its "
                    "time would be of something else; use --timer event"
                )

    def block(self) -> Block:
        self._graph.replay()
        self._gpu.synchronize()
        pairs = zip(self._starts, self._ends, strict=True)
        return self._throttle.judge([end.elapsed_s(start) for start, end in pairs])
