"""How long a step takes, for the scheduler's clock and for all steps of a schedule at once.

A `StepModel` is what `schedule` takes as its clock (it answers for one step, and for a run of
decode steps) and what prices a finished schedule, with the same numbers either way.

**Attention, roofline.** One call per layer takes `max(flops / peak, bytes / bandwidth)` with the
formulas of `workload/cost.py`: a lower bound, whatever the kernel.

**The rest of the layer, roofline** (`LinearRoofline`): `max(flops / peak, bytes / bandwidth)` of
the matrix products of the model, where a step of T tokens has `2 T parameters` FLOPs and reads the
weights once. Of E experts of which each token picks k, T tokens touch `E (1 - (1 - k/E)^T)` on
average when the choice is even. Norms, activations, sampling and communication are not in it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from attnbench.errors import UsageError
from attnbench.traffic.latency_costs import LayerCosts, sums
from attnbench.traffic.types import Floats, Ints, StepBatches
from attnbench.workload import Workload

_CHUNK_ENTRIES = 1 << 21


class StepModel(ABC):
    """Seconds of steps from the lengths of their entries."""

    @abstractmethod
    def of_entries(self, step_offsets: Ints, query_lens: Ints, context_lens: Ints) -> Floats:
        """(num_steps,) seconds. Each step's depends on its own entries only, to the last bit."""

    def of_steps(self, steps: StepBatches) -> Floats:
        """(num_steps,) seconds of a schedule, a few million entries at a time."""
        found, first = [np.zeros(0)], 0
        offsets = steps.step_offsets
        while first < len(steps):
            end = int(np.searchsorted(offsets, offsets[first] + _CHUNK_ENTRIES, side="right")) - 1
            end = min(max(end, first + 1), len(steps))
            entries = slice(int(offsets[first]), int(offsets[end]))
            found.append(
                self.of_entries(
                    offsets[first : end + 1] - offsets[first],
                    steps.query_len[entries],
                    steps.context_len[entries],
                )
            )
            first = end
        return np.concatenate(found)

    def __call__(self, query_lens: Ints, context_lens: Ints, /) -> float:
        offsets = np.array([0, len(query_lens)], dtype=np.int64)
        return float(self.of_entries(offsets, query_lens, context_lens)[0])

    def decode_run(self, context_lens: Ints, num_steps: int) -> Floats:
        """(num_steps,) seconds: every request computes one token, each step one later."""
        count = len(context_lens)
        contexts = context_lens[None, :] + np.arange(num_steps, dtype=np.int64)[:, None]
        offsets = np.arange(0, (num_steps + 1) * count, count, dtype=np.int64)
        return self.of_entries(offsets, np.ones(contexts.size, dtype=np.int64), contexts.ravel())


@dataclass(frozen=True, slots=True)
class DeviceRates:
    """What a device does at most, measured or published.

    Raises:
        UsageError: a rate that is none.
    """

    memory_bytes_per_s: float
    matmul_flops_per_s: float

    def __post_init__(self) -> None:
        for name in ("memory_bytes_per_s", "matmul_flops_per_s"):
            value = getattr(self, name)
            if not 0.0 < value < float("inf"):
                raise UsageError(f"{name} is {value}: give a rate above zero")


class AttentionRoofline(StepModel):
    """The attention layers of one kind at the roofline of a device.

    Args:
        layer: one rank's share of the layer, as a workload; its batch is not looked at.
        rates: the device's.
        num_layers: layers of this kind; None: as many as the shape says.
    """

    def __init__(self, layer: Workload, rates: DeviceRates, num_layers: int | None = None) -> None:
        self.costs = LayerCosts(layer)
        self.rates = rates
        self.num_layers = layer.shape.num_layers if num_layers is None else num_layers

    def of_entries(self, step_offsets: Ints, query_lens: Ints, context_lens: Ints) -> Floats:
        flops = sums(self.costs.flops(query_lens, context_lens), step_offsets)
        moved = sums(self.costs.bytes(query_lens, context_lens), step_offsets)
        moved = moved + self.costs.expansion_bytes(query_lens, step_offsets)
        return self.num_layers * np.maximum(
            flops / self.rates.matmul_flops_per_s, moved / self.rates.memory_bytes_per_s
        )


@dataclass(frozen=True, slots=True)
class LinearSizes:
    """Weights of one rank's matrix products, all layers together.

    Attributes:
        dense_parameters: used by every token: projections, dense and shared MLPs, output head.
        expert_parameters: of one routed expert, summed over the layers that have them.
        num_experts, num_experts_per_token: of one such layer; 0: none.
        bytes_per_parameter: 2 for bf16, 1 for fp8.
    """

    dense_parameters: float
    expert_parameters: float = 0.0
    num_experts: int = 0
    num_experts_per_token: int = 0
    bytes_per_parameter: float = 2.0


class LinearRoofline(StepModel):
    """The matrix products around attention at the roofline of a device."""

    def __init__(self, sizes: LinearSizes, rates: DeviceRates) -> None:
        self.sizes = sizes
        self.rates = rates

    def of_entries(self, step_offsets: Ints, query_lens: Ints, context_lens: Ints) -> Floats:
        sizes = self.sizes
        tokens = sums(query_lens, step_offsets).astype(np.float64)
        active = sizes.dense_parameters + sizes.num_experts_per_token * sizes.expert_parameters
        touched = np.zeros_like(tokens)
        if sizes.num_experts:
            missed = 1.0 - sizes.num_experts_per_token / sizes.num_experts
            touched = sizes.num_experts * (1.0 - missed**tokens)
        weights = sizes.dense_parameters + touched * sizes.expert_parameters
        return np.maximum(
            2.0 * tokens * active / self.rates.matmul_flops_per_s,
            weights * sizes.bytes_per_parameter / self.rates.memory_bytes_per_s,
        )


class SumOfParts(StepModel):
    """Parts one after the other: kinds of attention layers, and what is around them.

    Raises:
        UsageError: no parts.
    """

    def __init__(self, parts: Sequence[StepModel]) -> None:
        if not parts:
            raise UsageError("a step of no parts takes no time; give one part or more")
        self.parts = tuple(parts)

    def of_entries(self, step_offsets: Ints, query_lens: Ints, context_lens: Ints) -> Floats:
        total = self.parts[0].of_entries(step_offsets, query_lens, context_lens)
        for part in self.parts[1:]:
            total = total + part.of_entries(step_offsets, query_lens, context_lens)
        return total
